"""Docs are a tested contract: settings, metrics, drop reasons, reason codes and exit codes stand in them."""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from visionedge.app.metrics import HISTOGRAMS, SCRAPED_METRICS
from visionedge.cli.arguments import describe_exit_codes
from visionedge.config.schema import CameraConfig, Config
from visionedge.engine.batcher import DropReason
from visionedge.engine.device.devices import ReasonCode
from visionedge.model.heads import load_heads
from visionedge.outbound.messages import EventKind
from visionedge.web.documents import EngineEventDocument, EventDocument, FrameDocument

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def settings() -> Iterator[str]:
    """The paths of all settings, as docs write them."""
    for field in CameraConfig.model_fields.values():
        yield f"cameras.NAME.{field.alias}"
    for field in Config.model_fields.values():
        section: Any = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from (f"{field.alias}.{inner.alias}" for inner in section.model_fields.values())


@pytest.mark.parametrize("setting", list(settings()))
def test_every_setting_is_documented(setting: str) -> None:
    """docs/configuration.md has a row for it."""
    assert f"`{setting}`" in (DOCS / "configuration.md").read_text()


@pytest.mark.parametrize("name", [*SCRAPED_METRICS, *HISTOGRAMS])
def test_every_metric_is_documented_with_its_labels(name: str) -> None:
    """docs/metrics.md has its row, kind and labels."""
    declared = {**SCRAPED_METRICS, **HISTOGRAMS}[name]
    labels = ", ".join(f"`{label}`" for label in declared.labels)
    wanted = f"| `visionedge_{name}` | {declared.kind} | {labels} | what it counts |"
    start = f"| `visionedge_{name}` |"
    rows = [row for row in (DOCS / "metrics.md").read_text().splitlines() if row.startswith(start)]
    assert len(rows) == 1, f"docs/metrics.md has {len(rows)} rows for it; one is wanted: {wanted}"
    right = declared.kind in rows[0] and all(f"`{label}`" in rows[0] for label in declared.labels)
    assert right, f"docs/metrics.md has '{rows[0]}'; wanted: {wanted}"
    text = re.sub(r" \(\[[^]]*\]\([^)]*\)\)", "", rows[0].split("|")[-2].strip())
    assert text == declared.help, "docs/metrics.md and the HELP line of the metric are one text"


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


@pytest.mark.parametrize("reason", list(DropReason))
def test_every_drop_reason_is_documented(reason: DropReason) -> None:
    """docs/configuration.md says what becomes of frames."""
    assert f"| `{reason}` |" in (DOCS / "configuration.md").read_text()


@pytest.mark.parametrize("code", list(ReasonCode))
def test_every_reason_code_is_documented(code: ReasonCode) -> None:
    """docs/gpu.md says what it means and what to do."""
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
    """A reader who follows it into the code finds these files and threads."""
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
    """At most 18,000 words; README.md and CONTRIBUTING.md are apart."""
    assert sum(len(path.read_text().split()) for path in DOCS.rglob("*.md")) <= 18_000


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
    """Whether a relative link of this file has its file and, behind a #, its heading."""
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    if not target.exists() or not anchor:
        return target.exists()
    headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_exit_codes_are_those_of_the_readme() -> None:
    """All of them, with the same words."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    codes = [line.split(maxsplit=1) for line in describe_exit_codes().splitlines()[1:]]
    assert [code for code, _ in codes] == ["0", "1", "2", "3", "75"]
    assert all(f"{code} {words}" in readme for code, words in codes if code != "75")
