"""Templates: the placeholder of an image leads to the module.json that the tools of IoT Edge look for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from repository_paths import REPOSITORY
from visionedge.ops.manifest.lint import LintReport, lint_manifest

IMAGE = "${MODULEDIR<./module>.amd64.gpu}"


@pytest.fixture
def solution(tmp_path: Path) -> Path:
    """A folder with a module.json, its Dockerfiles and the shipped template, as a repository has them."""
    (tmp_path / "module").mkdir()
    shutil.copy(REPOSITORY / "module" / "module.json", tmp_path / "module")
    for name in ("Dockerfile.cpu", "Dockerfile.gpu", "deployment.template.json"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def judge(solution: Path, image: str) -> LintReport:
    """The template in the folder with another image."""
    template = solution / "deployment.template.json"
    text = template.read_text()
    assert text.count(IMAGE) == 1
    return lint_manifest(text.replace(IMAGE, image).encode(), template.name, folder=solution)


def errors(solution: Path, image: str) -> list[tuple[str, str]]:
    """The errors about the image: problem and remedy."""
    found = [each for each in judge(solution, image).findings if each.path.endswith(".settings.image")]
    return [(each.problem, each.remedy) for each in found if each.severity == "error"]


@pytest.mark.parametrize("name", ["deployment.template.json", "deployment.cpu.template.json"])
def test_the_shipped_templates_lead_to_the_module_of_this_repository(name: str) -> None:
    """As `iotedgedev` and VS Code resolve them, with the Dockerfile of the platform."""
    report = lint_manifest((REPOSITORY / name).read_bytes(), name, folder=REPOSITORY)
    assert report.findings == ()
    assert "vision" in report.modules


def test_a_module_name_is_searched_only_under_modules(solution: Path) -> None:
    """The tools expand nothing and report nothing, and the device refuses the deployment."""
    [(problem, remedy)] = errors(solution, "${MODULES.vision.amd64.gpu}")
    assert problem.startswith("needs modules/vision/module.json, which cannot be read")
    assert remedy == "write ${MODULEDIR<./module>.amd64.gpu}"
    (solution / "modules").mkdir()
    (solution / "module").rename(solution / "modules" / "vision")
    module: dict[str, Any] = json.loads((solution / "modules/vision/module.json").read_text())
    module["image"]["tag"]["platforms"] = {"amd64.gpu": "../../Dockerfile.gpu"}
    (solution / "modules/vision/module.json").write_text(json.dumps(module))
    assert errors(solution, "${MODULES.vision.amd64.gpu}") == []


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("${MODULEDIR<./module>.arm64v8}", "has the platform arm64v8"),
        ("${MODULEDIR<./vision>.amd64.gpu}", "needs vision/module.json, which cannot be read"),
        ("${MODULEDIR<./module>}", None),
        ("${MODULEDIR<module>.amd64.cpu}", None),
        ("${MODULEDIR<./module>.debug}", None),
        ("registry.example.com/visionedge:1.0-gpu", None),
    ],
)
def test_a_placeholder_of_a_folder_is_resolved_from_the_template(
    solution: Path, image: str, says: str | None
) -> None:
    """Folder and platform have to be there; without a platform the tools take the one they are set to."""
    found = errors(solution, image)
    assert [problem.startswith(says) for problem, _ in found] == [True] if says else found == []


def test_the_dockerfile_of_the_platform_must_exist(solution: Path) -> None:
    """It is named in the module.json, relative to its folder."""
    (solution / "Dockerfile.gpu").unlink()
    [(problem, remedy)] = errors(solution, IMAGE)
    assert problem == "is built from ../Dockerfile.gpu, which does not exist"
    assert "module/module.json" in remedy


@pytest.mark.parametrize("text", ["", "[]", "{", '{"image": {"tag": {"platforms": 5}}}', "[" * 100_000])
def test_an_invalid_module_file_is_one_finding(solution: Path, text: str) -> None:
    """For any content, lint continues with the rest of the template."""
    (solution / "module" / "module.json").write_text(text)
    [(problem, _)] = errors(solution, IMAGE)
    assert "is not JSON with image.tag.platforms" in problem


def test_a_template_from_elsewhere_is_checked_without_its_folder(solution: Path) -> None:
    """For stdin the folder is unknown."""
    text = (solution / "deployment.template.json").read_text().replace("./module", "./nowhere")
    assert not [
        each for each in lint_manifest(text.encode(), "stdin").findings if each.path.endswith(".image")
    ]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("best.onnx", "is relative: in the container it is looked for in /data"),
        ("/models/best.onnx", "is in no folder that is bound into the module"),
        ("/data/best.onnx", None),
    ],
)
@pytest.mark.parametrize("end", ["model.path", "models.small.path"])
def test_a_model_file_must_be_in_the_container(solution: Path, path: str, says: str | None, end: str) -> None:
    """Else the device rejects the section, and the bundled model computes instead."""
    document = json.loads((solution / "deployment.template.json").read_text())
    section, _, name = end.removesuffix(".path").partition(".")
    model = {"path": path}
    document["modulesContent"]["vision"]["properties.desired"][section] = {name: model} if name else model
    report = lint_manifest(json.dumps(document).encode(), "a.template.json", folder=solution)
    found = [finding.problem for finding in report.findings if finding.path.endswith(end)]
    assert found == ([f"{path} {says}"] if says else [])
    assert report.errors == 0


def test_the_address_of_each_model_has_to_be_filled_in(solution: Path) -> None:
    document = json.loads((solution / "deployment.template.json").read_text())
    url = "https://h/<name>.onnx"
    models = {
        "small": {"url": url, "sha256": "0" * 64},
        "large": {"url": "https://h/l.onnx", "sha256": "0" * 64},
    }
    document["modulesContent"]["vision"]["properties.desired"]["models"] = models
    report = lint_manifest(json.dumps(document).encode(), "a.template.json", folder=solution)
    found = [each.path for each in report.findings if each.problem == "is still to be filled in"]
    assert [path.partition("].")[2] for path in found] == ["models.small.url"]
