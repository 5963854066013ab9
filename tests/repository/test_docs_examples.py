"""The examples of README and docs work as printed: commands parse, configurations are valid."""

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from command_line import CommandLine
from repository_paths import REPOSITORY
from visionedge.__main__ import build_parser
from visionedge.cli.run import FAULT_INJECTION_VARIABLE
from visionedge.config.load import parse_config
from visionedge.config.schema import Config

FOLDERS = [REPOSITORY / "docs", REPOSITORY / "models"]
TEXTS = [REPOSITORY / "README.md", *(path for folder in FOLDERS for path in sorted(folder.glob("*.md")))]
OPERATORS = {"|", ">", ">>", ">&2", "&&", ";", "&"}


class Example(NamedTuple):
    """An indented block of a text."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def examples() -> Iterator[Example]:
    """Every block of lines that are indented by four, blank lines inside included."""
    for path in TEXTS:
        block: list[str] = []
        for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), "end"], start=1):
            if line.startswith("    ") or (block and not line.strip()):
                block.append(line[4:])
            elif block:
                yield Example(path.name, number - len(block), "\n".join(block))
                block = []


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each `visionedge …` of the examples and its context: alone, in `make run`, in containers."""
    for example in examples():
        for line in re.sub(r"\\\n\s*", " ", example.text).splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:
                continue  # a part of a document
            if (found := _arguments(words)) is not None:
                yield str(example), found


def _arguments(words: list[str]) -> list[str] | None:
    """The arguments of `visionedge` in a command line; None: it does not call it."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    end = next((n for n, word in enumerate(words) if word in OPERATORS), len(words))
    words = words[:end]
    if words[:1] in (["visionedge"], [".venv/bin/visionedge"]):
        return words[1:]
    if words[:2] == ["make", "run"]:
        given = next((w.removeprefix("ARGS=") for w in words if w.startswith("ARGS=")), "")
        return ["run", *shlex.split(given)]
    if words[:2] == ["docker", "run"]:
        ours = [n for n, word in enumerate(words) if re.fullmatch(r"visionedge:(cpu|gpu)", word)]
        return (words[ours[0] + 1 :] or ["run"]) if ours else None
    if words[:2] == ["docker", "exec"] and words[3:5] == ["sh", "-c"]:
        return _arguments(shlex.split(words[5]))
    if words[:2] == ["docker", "exec"]:
        return words[words.index("visionedge", 3) + 1 :]
    return None


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each configuration of the examples: a mapping in YAML all of whose keys are sections of ours."""
    sections = {field.alias or name for name, field in Config.model_fields.items()}
    for example in examples():
        try:
            document = yaml.safe_load(example.text)
        except yaml.YAMLError:
            continue
        if isinstance(document, dict) and document and document.keys() <= sections:
            yield str(example), document


COMMANDS, DOCUMENTS = list(commands()), list(documents())


@pytest.mark.parametrize(("place", "arguments"), COMMANDS, ids=[f"{p} {a[0]}" for p, a in COMMANDS])
def test_every_command_of_the_docs_is_valid(
    place: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its verb and its options exist, and their values are of the right kind."""
    monkeypatch.setenv(FAULT_INJECTION_VARIABLE, "1")  # as stated before the option that needs it
    if arguments[0] != "VERSION,":  # the first words of doctor's output
        assert build_parser().parse_args(arguments).run, place


def test_the_docs_have_commands_of_every_kind() -> None:
    """Else the test above would look at nothing."""
    files = {place.partition(":")[0] for place, _ in COMMANDS}
    assert {"README.md", "docker.md", "gpu.md", "models.md", "performance.md", "precision.md"} <= files
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(("place", "document"), DOCUMENTS, ids=[place for place, _ in DOCUMENTS])
def test_every_configuration_of_the_docs_is_valid_as_printed(place: str, document: dict[str, Any]) -> None:
    """It can be copied into a file; only values such as addresses must be changed."""
    assert parse_config(document).model_fields_set, place


def test_readme_shows_a_whole_configuration() -> None:
    """With cameras, a model by its address, and the sections that most people touch."""
    (document,) = (d for place, d in DOCUMENTS if place.startswith("README.md") and "cameras" in d)
    assert {"cameras", "model", "inference", "telemetry", "http"} <= document.keys()
    assert re.fullmatch("[0-9a-f]{64}", document["model"]["sha256"])


def composed() -> dict[str, Any]:
    """The compose file of docs/docker.md."""
    texts = [e.text for e in examples() if e.file == "docker.md" and e.text.startswith("services:")]
    (found,) = map(yaml.safe_load, texts)
    assert isinstance(found, dict)
    return found


def container_lines() -> list[list[str]]:
    """The `docker run` lines of docs/docker.md that keep a container."""
    text = re.sub(r"\\\n\s*", " ", (REPOSITORY / "docs" / "docker.md").read_text(encoding="utf-8"))
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    docker run -d ")]


@pytest.mark.parametrize("words", container_lines(), ids=["cpu", "gpu"])
def test_the_docker_run_line_keeps_state_and_publishes_only_to_localhost(words: list[str]) -> None:
    """A volume for /data, files bound to be read only, a token, and a port of this machine only."""
    mounts = [after for word, after in pairwise(words) if word == "-v"]
    assert "visionedge-data:/data" in mounts
    assert all(mount.endswith(":ro") for mount in mounts if not mount.endswith(":/data"))
    assert "127.0.0.1:8080:8080" in words
    assert "VISIONEDGE_HTTP_TOKEN" in words
    assert "--init" in words
    assert ("--gpus" in words) is ("visionedge:gpu" in words)


def test_the_compose_file_equals_the_docker_run_line() -> None:
    service, (words, _) = composed()["services"]["visionedge"], container_lines()
    assert service["image"] in words
    assert service["command"] == words[words.index("visionedge:cpu") + 1 :]
    assert service["ports"] == ["127.0.0.1:8080:8080"]
    mounts = {after for word, after in pairwise(words) if word == "-v"}
    assert {mount.replace("./", "$PWD/") for mount in service["volumes"]} == mounts
    assert service["init"] is service["read_only"] is True
    assert list(composed()["volumes"]) == ["visionedge-data"]


def test_an_example_is_checked_by_the_module_itself(visionedge: CommandLine, tmp_path: Path) -> None:
    """README's configuration in a file: `config check` finds nothing wrong with it."""
    (document,) = (d for place, d in DOCUMENTS if place.startswith("README.md") and "cameras" in d)
    file = tmp_path / "vision.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    outcome = visionedge("config", "check", file)
    assert outcome.code == 0, outcome.err


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)
