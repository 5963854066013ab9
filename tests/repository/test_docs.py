"""The docs are a tested contract: settings, metrics, drop reasons, reason codes and exit codes."""

import contextlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel
from pydantic.alias_generators import to_camel

from visionedge.cli.arguments import describe_exit_codes
from visionedge.config.schema import CameraConfig, Config, NamedModelConfig
from visionedge.engine.batcher import DropReason
from visionedge.engine.device.devices import ReasonCode
from visionedge.model.heads import load_heads
from visionedge.outbound.messages import EventKind
from visionedge.web.documents import EngineEventDocument, EventDocument, FrameDocument
from write_docs import render_docs

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_make_docs_changes_nothing() -> None:
    """Settings, keys of documents and metrics in the docs are those of the code."""
    assert [path.name for path, text in render_docs().items() if text != path.read_text()] == []


@pytest.mark.parametrize("name", Config.model_fields)
def test_every_section_of_the_configuration_has_its_table(name: str) -> None:
    """`make docs` fills it; that of `cameras` holds for `cameraDefaults`, too."""
    named: dict[str, type[BaseModel]] = {"cameraDefaults": CameraConfig, "cameras": CameraConfig}
    model = (named | {"models": NamedModelConfig}).get(to_camel(name)) or Config.model_fields[name].annotation
    assert model is not None
    assert f"<!--make-docs:{model.__module__}.{model.__name__}-->" in (DOCS / "configuration.md").read_text()


def test_the_documents_in_the_docs_have_the_described_shapes() -> None:
    """The frame object and the event of docs/messages.md can be copied into a test of a reader."""
    blocks = re.findall(r"(?:^    .*\n)+", (DOCS / "messages.md").read_text(), re.MULTILINE)
    models: dict[str, type[BaseModel]] = {
        "visionedge/frame/1": FrameDocument,
        "visionedge/event/1": EventDocument,
    }
    shown = []
    for block in blocks:
        with contextlib.suppress(json.JSONDecodeError):  # a part of a document, or a command
            document = json.loads(block)
            models[document["schema"]].model_validate(document)
            shown.append(document["schema"])
    assert sorted(shown) == sorted(models)


def test_the_kinds_of_events_and_the_details_of_the_engine_are_documented() -> None:
    """docs/messages.md has a row for each kind; that of the engine names all details."""
    rows = re.findall(r"^\| `([a-z]+)` \| (.*) \|$", (DOCS / "messages.md").read_text(), re.MULTILINE)
    kinds = {kind: text for kind, text in rows if kind in get_args(EventKind)}
    assert set(kinds) == set(get_args(EventKind))
    details = {str(field.alias) for field in EngineEventDocument.model_fields.values()}
    assert {key for key in details if f"`{key}`" not in kinds["engine"]} == set()


FAMILY_WORDS = {"head", "anchors", "nms=True", "scale_factor"}
"""What stands between backticks in the first column of the families' table and is no family."""


def test_the_table_of_families_lists_the_known_heads() -> None:
    """docs/models.md has each of them in its first column, and no other."""
    lines = (DOCS / "models.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| family (`head`)"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    documented = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    known = {head.name for head in load_heads()} - {"compiled"}
    assert known - documented == set(), "docs/models.md: add a row with each of these families"
    assert documented - known - FAMILY_WORDS == set(), "docs/models.md: these are no known heads"


EXPORTERS = {
    "Ultralytics": "yolo export model=best.pt format=onnx",
    "Custom Vision": "Export, ONNX, in the portal",
    "AutoML": "train_artifacts/model.onnx",
    "RF-DETR": ".export()",
    "D-FINE": "export_onnx.py",
    "YOLOX": "export_onnx.py",
    "Paddle": "paddle2onnx --model_dir",
    "TensorFlow Object Detection": "python -m tf2onnx.convert",
    "torchvision": "torch.onnx.export(model.eval()",
}
"""What people train with, and what the line that makes their ONNX file holds."""


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_the_line_that_makes_an_onnx_file_is_in_the_table_of_exporters(exporter: str) -> None:
    """docs/models.md has a row for each: the command or the place, and what lies beside the file."""
    lines = (DOCS / "models.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| made with |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    commands = [command for made_with, command, beside in cells if exporter in made_with and beside]
    assert any(EXPORTERS[exporter] in command for command in commands)


def test_the_scale_of_the_sample_model_yaml_is_that_of_a_byte() -> None:
    """0.00392157 is not 1/255; on a dynamically quantised model the difference alone moves scores by 0.04."""
    scales = re.findall(r"^ +scale: ([\d.]+)", (DOCS / "models.md").read_text(), re.MULTILINE)
    assert [float(scale) for scale in scales] == [pytest.approx(1 / 255, rel=1e-8)]


def test_the_rtsp_server_of_the_docs_takes_the_options_that_they_give_it() -> None:
    """docs/cameras.md plays the bundled clip with it, for those without a camera."""
    text = (DOCS / "cameras.md").read_text()
    [line] = re.findall(r"^    \.venv/bin/(rtsp-server .*)$", text, re.MULTILINE)
    program, *arguments = line.split()
    assert (ROOT / arguments[arguments.index("-d") + 1] / "demo.mp4").is_file()
    installed = Path(sys.executable).with_name(program)
    if not installed.exists():
        pytest.skip("rtsp-server is not installed here; `make setup` installs it")
    shown = subprocess.run([installed, "--help"], capture_output=True, text=True, check=True).stdout
    options = {word for word in arguments if word.startswith("-")}
    assert options <= set(re.findall(r"(?<![\w-])-[A-Za-z]+", shown))


COSTS_AND_LIMITS = {
    "antialiasing takes processor time": ("performance.md", r"ms with Pillow \(antialiased\)"),
    "antialiasing can be left out": ("models.md", r"`input\.resample: bilinear` avoids it"),
    "a fleet needs one precision": ("precision.md", r"(?s)## A fleet\n.*inference: \{precision: fp32\}"),
    "OpenCV opens one camera at a time": ("cameras.md", r"OpenCV\sopens one stream at a time"),
}
"""What a user decides by, the page that says it, and the words."""


@pytest.mark.parametrize(
    ("family", "how"),
    [("yolov8", r"26"), ("yolov10", r"26 also with nms=False")],
    ids=["a row for each cell", "a list"],
)
def test_the_table_of_families_has_yolo26_as_its_exporter_writes_it_today(family: str, how: str) -> None:
    """Without `nms` it gives a row for each cell, as YOLOv8 does; with `nms=False` a finished list."""
    text = (DOCS / "models.md").read_text()
    [described] = re.findall(rf"^\|[^|]*`{family}` \(([^)]*)\)", text, re.MULTILINE)
    assert re.search(how, described)


@pytest.mark.parametrize("fact", COSTS_AND_LIMITS)
def test_what_a_choice_costs_or_cannot_do_is_in_the_docs(fact: str) -> None:
    page, words = COSTS_AND_LIMITS[fact]
    assert re.search(words, (DOCS / page).read_text())


@pytest.mark.parametrize("reason", list(DropReason))
def test_every_drop_reason_is_documented(reason: DropReason) -> None:
    """In docs/configuration.md."""
    assert f"| `{reason}` |" in (DOCS / "configuration.md").read_text()


@pytest.mark.parametrize("code", list(ReasonCode))
def test_every_reason_code_is_documented(code: ReasonCode) -> None:
    """In docs/gpu.md, with meaning and remedy."""
    assert f"| `{code}` |" in (DOCS / "gpu.md").read_text()


def test_the_files_named_for_contributors_exist() -> None:
    """CONTRIBUTING.md names no file and no make target that does not exist."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    words = re.findall(r"`((?:module|docs|tests|requirements)/[^`\s]*)`", text)
    files = [word for word in words if "NAME" not in word and "*" not in word]
    assert len(files) >= 10
    assert [name for name in files if not (ROOT / name).exists()] == []
    targets = set(re.findall(r"(?:`|^ +)make ([a-z-]+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets >= {"setup", "check", "test"}
    assert {target for target in targets if f"\n{target}:" not in makefile} == set()


def test_the_architecture_names_files_and_threads_that_exist() -> None:
    """The files and threads that it names exist in the code."""
    text = (ROOT / "docs/architecture.md").read_text()
    sources = list((ROOT / "module/visionedge").rglob("*.py"))
    paths = {path.relative_to(ROOT / "module/visionedge").as_posix() for path in sources}
    named = set(re.findall(r"[a-z_]+(?:/[a-z_]+)*\.py", text))
    assert len(named) >= 40
    assert {name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in paths)} == set()
    code = "".join(path.read_text() for path in sources)
    table = text.split("## Threads of the module")[1].split("##")[0]
    threads = [
        name
        for row in table.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert len(threads) >= 8
    assert [name for name in threads if name.split(":")[0] not in code] == []


DECISIONS = sorted((DOCS / "decisions").glob("*.md"))


def test_the_docs_stay_short_enough_to_be_read() -> None:
    """At most 23,500 words, 7,000 for operators of fleets, and 3,500 of scenes with their configurations.

    README.md and CONTRIBUTING.md are apart.
    """
    fleet = ("eflow.md", "fleet.md", "monitoring.md", "operations.md")
    scene = ("scene.md", "scenarios.md", "spatial-analysis.md")
    words = {path.relative_to(DOCS).as_posix(): len(path.read_text().split()) for path in DOCS.rglob("*.md")}
    assert sum(words.pop(name, 0) for name in fleet) <= 7_000
    assert sum(words.pop(name, 0) for name in scene) <= 3_500
    assert sum(words.values()) <= 23_500


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_is_numbered_and_has_three_short_parts(path: Path) -> None:
    """At most 250 words: context, decision, consequences."""
    text = path.read_text()
    assert text.startswith(f"# {int(path.name[:4])}. ")
    assert re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert len(text.split()) <= 250


def test_the_decisions_are_numbered_without_a_gap() -> None:
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    assert len(DECISIONS) >= 8


TEXTS = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *DOCS.rglob("*.md")]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_every_link_has_an_existing_file_and_heading(path: Path) -> None:
    """Links to other sites are not followed."""
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not leads_somewhere(path, link)] == []


def leads_somewhere(path: Path, link: str) -> bool:
    """Whether a relative link of this file has its file and, after a #, its heading."""
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    if not target.exists() or not anchor:
        return target.exists()
    headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_no_page_names_a_bundled_model_that_is_not_in_the_package(path: Path) -> None:
    """Commands, answers and figures are those of the model that is shipped."""
    named = set(re.findall(r"\b(?:nanodet|yolox)-[a-z]+-\d+\b", path.read_text()))
    assert {name for name in named if not (ROOT / f"models/{name}.onnx").exists()} == set()


def test_the_exit_codes_are_those_of_the_readme() -> None:
    """All of them, with the same words."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    codes = [line.split(maxsplit=1) for line in describe_exit_codes().splitlines()[1:]]
    assert [code for code, _ in codes] == ["0", "1", "2", "3", "75"]
    assert all(f"{code} {words}" in readme for code, words in codes if code != "75")
