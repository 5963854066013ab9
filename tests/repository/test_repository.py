"""The repository as a whole: pins and locks, the content of a wheel, and forbidden names."""

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import pytest

from repository_paths import REPOSITORY
from visionedge import __version__

LOCKS = {file.stem: file.read_text() for file in sorted((REPOSITORY / "requirements").glob("*.txt"))}

# Put together here, so that this file passes its own test.
REGISTRIES = ["py" + "pi.org", "python" + "hosted.org", "registry." + "npmjs"]
MACHINE_PATHS = [
    "/wo" + "rk/",
    "/ro" + "ot/",
    "/home" + "/",
    "/opt/py" + "pi",
    "/opt/wh" + "eels",
    "bash" + "_jobs",
]
TOP_LEVEL = [
    ".ci/run",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Dockerfile.cpu",
    "Dockerfile.gpu",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "THIRD-PARTY.md",
    "deployment.template.json",
    "models",
    "module/visionedge",
    "tests",
]


def project() -> dict[str, Any]:
    """pyproject.toml as a document."""
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def tracked() -> list[Path]:
    """The files that git tracks or would add; the test is skipped outside a clone."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("no git clone here, so nothing tells which files belong to the repository")
    return [REPOSITORY / name.decode() for name in listed.stdout.split(b"\0") if name]


def pins(lock: str) -> dict[str, str]:
    """The packages of a lock and their versions."""
    return dict(re.findall(r"^([a-z0-9.-]+)(?:\[[a-z,]+\])?==([^\s;\\]+)", LOCKS[lock], re.MULTILINE))


def requirement(text: str) -> tuple[str, str]:
    """The name and the exact version of a requirement, as a lock spells them."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[a-z,-]+\])?==([A-Za-z0-9.]+)", text)
    assert match, f"'{text}' is not pinned to one version"
    return match[1].lower(), match[2]


@pytest.mark.parametrize("forbidden", [*REGISTRIES, *MACHINE_PATHS])
def test_no_file_names_a_package_registry_or_a_personal_path(forbidden: str) -> None:
    named = [file for file in tracked() if file.is_file() and forbidden.encode() in file.read_bytes()]
    assert [str(file.relative_to(REPOSITORY)) for file in named] == []


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_the_top_level_has_only_the_expected_entries(name: str) -> None:
    assert (REPOSITORY / name).exists()


def test_every_dependency_is_pinned_and_has_its_licence_and_purpose() -> None:
    document = project()["project"]
    lines = (REPOSITORY / "pyproject.toml").read_text().splitlines()
    for text in chain(document["dependencies"], *document["optional-dependencies"].values()):
        requirement(text)
        stated = [line for line in lines if line.strip().startswith(f'"{text}"')]
        assert stated
        assert all(len(line.partition("#")[2]) > 5 for line in stated), (
            f"'{text}' comes without a word about it"
        )


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", ["run", "dev"])
def test_a_lock_contains_exactly_the_pins_of_pyproject(kind: str, extra: str) -> None:
    document = project()["project"]
    optional = document["optional-dependencies"]
    wanted = [*document["dependencies"], *optional[extra], *(optional["dev"] if kind == "dev" else [])]
    locked = pins(f"{kind}-{extra}")
    for text in wanted:
        name, version = requirement(text)
        assert locked.get(name) == version, (
            f"{kind}-{extra}.txt is older than pyproject.toml: run `make lock`"
        )


def test_the_lock_of_pyav_contains_only_its_pin() -> None:
    (wanted,) = project()["project"]["optional-dependencies"]["av"]
    assert pins("run-av") == dict([requirement(wanted)])


def test_both_decoders_carry_an_ffmpeg_without_the_heap_write_of_8_0() -> None:
    """CVE-2026-8461 is mended in FFmpeg 8.1.2, whose libavcodec is 62.28.102."""
    av = pytest.importorskip("av")
    built = re.search(r"avcodec: +YES \((\d+)\.(\d+)\.(\d+)\)", cv2.getBuildInformation())
    assert built
    assert tuple(map(int, built.groups())) >= (62, 28, 102)
    assert av.library_versions["libavcodec"] >= (62, 28, 102)


def test_the_lock_of_openvino_contains_only_its_pin() -> None:
    """Without openvino-telemetry; all its other packages are those of the CPU image."""
    (wanted,) = project()["project"]["optional-dependencies"]["openvino"]
    assert pins("run-openvino") == dict([requirement(wanted)])


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_the_development_lock_contains_the_whole_run_lock(extra: str) -> None:
    assert pins(f"run-{extra}").items() <= pins(f"dev-{extra}").items()


def test_the_build_lock_contains_the_build_requirements_of_pyproject() -> None:
    for text in project()["build-system"]["requires"]:
        name, version = requirement(text)
        assert pins("build")[name] == version


@pytest.mark.parametrize("lock", list(LOCKS))
def test_a_lock_is_hashed_and_names_no_address(lock: str) -> None:
    assert "://" not in LOCKS[lock]
    entries = re.split(r"^(?=[a-z0-9])", LOCKS[lock], flags=re.MULTILINE)[1:]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)


@pytest.mark.parametrize("lock", list(LOCKS))
def test_no_lock_contains_both_onnxruntimes(lock: str) -> None:
    assert not {"onnxruntime", "onnxruntime-gpu"} <= pins(lock).keys()


def test_the_newest_dated_version_of_the_changelog_is_this_one() -> None:
    """Only the section of the next version may stand before it."""
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    first, *others = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert first == "[Unreleased]"
    newest = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", others[0])
    assert newest
    assert newest[1] == __version__
    assert date.fromisoformat(newest[2]).year >= 2026


def test_the_release_steps_name_each_place_of_the_version() -> None:
    steps = (REPOSITORY / "CONTRIBUTING.md").read_text().partition("## Make a release")[2]
    for place in ("module/visionedge/__init__.py", "module/module.json", "CHANGELOG.md"):
        assert place in steps
        assert __version__ in (REPOSITORY / place).read_text() or place == "CHANGELOG.md"


def test_the_security_policy_has_private_reporting_and_a_threat_model() -> None:
    """With the pages that have the details, under existing headings."""
    text = (REPOSITORY / "SECURITY.md").read_text()
    assert "security advisories" in text
    for page, heading in (("http.md", "Who may ask"), ("models.md", "Models from outside")):
        assert f"docs/{page}" in text
        assert f'"{heading}"' in text
        assert f"## {heading}\n" in (REPOSITORY / "docs" / page).read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed here; `make test` installs it")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    return file


def names_in(wheel: Path) -> set[str]:
    """The files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_contains_the_model_the_clip_the_page_and_the_types(wheel: Path) -> None:
    wanted = {
        "visionedge/py.typed",
        "visionedge/_bundled/models/yolox-nano-416.onnx",
        "visionedge/_bundled/models/yolox-nano-416.labels.txt",
        "visionedge/_bundled/models/LICENSES/YOLOX-Apache-2.0.txt",
        "visionedge/_bundled/media/demo.mp4",
        f"visionedge-{__version__}.dist-info/licenses/LICENSE",
        f"visionedge-{__version__}.dist-info/licenses/THIRD-PARTY.md",
    }
    sources = {
        "visionedge/" + file.relative_to(REPOSITORY / "module/visionedge").as_posix()
        for file in (REPOSITORY / "module/visionedge").rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    wanted.add("visionedge/_build.json")
    assert (wanted | sources) - names_in(wheel) == {"visionedge/engine/process/fault_injection.py"}


def test_the_wheel_contains_nothing_else(wheel: Path) -> None:
    names = names_in(wheel)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"visionedge", f"visionedge-{__version__}.dist-info"}
    assert not [name for name in names if "_bundled" in name and name.endswith(".py")]


def test_an_installed_wheel_finds_its_model_and_clip_by_itself(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    asking = (
        "from visionedge.runtime.installation import find_bundled_file as b;"
        "print(b('media/demo.mp4')); print(b('models/%s.onnx'))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", asking % "yolox-nano-416"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    carried = tmp_path / "visionedge" / "_bundled"
    assert [Path(line) for line in answer.stdout.splitlines()] == [
        carried / "media" / "demo.mp4",
        carried / "models" / "yolox-nano-416.onnx",
    ]
