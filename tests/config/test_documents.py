"""Configuration files of any content: right, or refused in one line within a second and little memory."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from command_line import CommandLine
from visionedge.__main__ import main
from visionedge.config import documents
from visionedge.config.documents import add_locations, fill_variables, read_configuration, read_document
from visionedge.config.load import parse_config
from visionedge.config.schema import MAX_PROBLEMS
from visionedge.errors import ConfigError
from visionedge.runtime.files import read_regular_file


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line, in this process."""
    return CommandLine(capsys)


def refusal(path: Path) -> str:
    """The one line that a file is refused with."""
    with pytest.raises(ConfigError) as caught:
        read_document(path)
    (line,) = caught.value.problems
    assert "\n" not in line
    assert len(line) < len(str(path)) + 300
    return line


def written(folder: Path, name: str, text: str) -> Path:
    """A file with this content."""
    path = folder / name
    path.write_text(text)
    return path


def bomb(item: str) -> str:
    """YAML of a few hundred bytes whose aliases come to 9^9 values."""
    names = "abcdefghij"
    lines = [f"{names[0]}: &{names[0]} {item}"]
    for below, name in pairwise(names):
        lines.append(f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("aliases.yaml", bomb("[x, x, x]"), "more than 100000 values"),
        ("mappings.yaml", bomb("{x: 1}"), "more than 100000 values"),
        ("merged.yaml", bomb("{x: 1}").replace("[", "{<<: [").replace("]", "]}"), "more than 100000 values"),
        ("list-in-itself.yaml", "a: &a [*a]", ":1: a value contains itself"),
        ("mapping-in-itself.yaml", "b: 1\na: &a {b: *a}", ":2: a value contains itself"),
        ("deep.yaml", f"a: {'[' * 20_000}{']' * 20_000}", "nested deeper than 50 levels"),
        ("deep-keys.yaml", "\n".join(f"{' ' * n}k:" for n in range(900)), "nested deeper than 50 levels"),
        ("deep.json", f'{{"a": {"[" * 100_000}{"]" * 100_000}}}', "nested deeper than 50 levels"),
        ("a-little-deep.json", f'{{"a": {"[" * 51}{"]" * 51}}}', "nested deeper than 50 levels"),
        ("twice.json", '{"http": {"port": 1, "host": "a", "port": 2}}', "key 'port' is given twice"),
        ("twice.yaml", "http: {port: 1, host: a, port: 2}", "key 'port' is given twice"),
        ("nan.json", '{"a": NaN}', "NaN is not a number in JSON"),
        ("digits.json", f'{{"a": {"1" * 5_000}}}', "a number or a date that cannot be read"),
        ("digits.yaml", f"a: {'1' * 5_000}", "a number or a date that cannot be read"),
        ("date.yaml", "a: 2026-02-31", "a number or a date that cannot be read"),
        ("key.yaml", "? [a, b]\n: 1", "a key is not a text"),
        ("large.yaml", "a: 1\n" + "#" * 2**20, "larger than 1 MiB"),
        ("bytes.yaml", "a: \0", "is not valid YAML"),
    ],
)
def test_a_malicious_file_is_refused_in_one_line(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    """However it is nested, repeated or written, and before its content is built up in memory."""
    assert says in refusal(written(tmp_path, name, text))


def test_parsing_time_grows_with_the_file_size_and_not_with_its_aliases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is given once and used a hundred times is read once."""
    built = 0
    construct = documents._BoundedLoader.construct_object

    def counted(self: documents._BoundedLoader, node: object, deep: bool = False) -> object:
        nonlocal built
        built += 1
        result: object = construct(self, node, deep=deep)
        return result

    monkeypatch.setattr(documents._BoundedLoader, "construct_object", counted)
    document = read_document(written(tmp_path, "a.yaml", f"a: &a [{'x, ' * 90}x]\nb: [{'*a, ' * 99}*a]"))
    assert [len(each) for each in document["b"]] == [91] * 100
    assert built < 1_000


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A FIFO would wait for ever, /dev/zero fills the memory, a name of 300 letters is no name."""
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    assert "not a regular file" in refusal(tmp_path / "fifo.yaml")
    assert "not a regular file" in refusal(tmp_path / "zero.yaml")
    assert "Is a directory" in refusal(tmp_path / "folder.yaml")
    assert "cannot be read: File name too long" in str(refusal(tmp_path / f"{'n' * 300}.yaml")[-60:])
    assert "not a valid file name" in refusal(Path("a\0.yaml"))


def test_a_file_is_read_only_up_to_its_limit(tmp_path: Path) -> None:
    """Exactly the limit is read; one byte more is refused, and so is a file that is none when it is read."""
    path = written(tmp_path, "a", "x" * 100)
    assert read_regular_file(path, max_bytes=100) == b"x" * 100
    with pytest.raises(OSError, match="larger than") as caught:
        read_regular_file(path, max_bytes=99)
    assert caught.value.strerror is not None


def test_a_key_is_the_text_as_written(tmp_path: Path) -> None:
    """YAML takes off for a truth value and 18:00 for 1080; a camera may have such a name all the same."""
    text = "cameras: {off: {uri: 'demo:'}, 1: {uri: 'demo:'}, on: {uri: 'demo:'}}\ninference: {parity: off}\n"
    checked = parse_config(read_document(written(tmp_path, "a.yaml", text)))
    assert list(checked.cameras) == ["off", "1", "on"]
    assert checked.inference.parity == "off"


ANCHORED = """
x-indoors: &indoors {fps: 2, decoder: opencv, gate: {everySeconds: 5}}
x-login: "${NO_SUCH_VARIABLE}"
cameras:
  hall: {<<: *indoors, uri: "demo:"}
  yard: {uri: "demo:", fps: 10, <<: *indoors}
"""


def test_keys_that_begin_with_x_dash_may_contain_anchors_and_are_ignored(tmp_path: Path) -> None:
    """As in compose; a mapping's own keys win over what it merges, wherever `<<` stands."""
    checked = parse_config(read_configuration(written(tmp_path, "a.yaml", ANCHORED), {}))
    hall, yard = checked.cameras["hall"], checked.cameras["yard"]
    assert (hall.fps, yard.fps, yard.decoder) == (2, 10, "opencv")
    assert hall.gate is not None
    assert hall.gate.every_seconds == 5
    assert main(["config", "check", str(written(tmp_path, "b.yaml", ANCHORED))]) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x: {}\n", "x: unknown key"),
        ("cameras: {x-yard: {fps: 5}}\n", "cameras.x-yard.uri: is missing"),
        ("http: {x-port: 1}\n", "http.x-port: unknown key"),
    ],
)
def test_only_top_level_keys_that_begin_with_x_dash_are_ignored(
    tmp_path: Path, text: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(read_document(written(tmp_path, "a.yaml", text)))


def test_a_duplicate_key_beside_a_merge_is_refused(tmp_path: Path) -> None:
    text = "x-a: &a {fps: 2}\ncameras: {hall: {<<: *a, uri: 'demo:', fps: 1, fps: 3}}\n"
    with pytest.raises(ConfigError, match="key 'fps' is given twice"):
        read_document(written(tmp_path, "a.yaml", text))


def test_very_many_problems_are_reported_as_the_first_ones_and_a_number() -> None:
    """Nobody reads ten thousand lines, and making them takes long."""
    with pytest.raises(ConfigError) as caught:
        parse_config({f"key{n}": 1 for n in range(10_000)})
    assert len(caught.value.problems) == MAX_PROBLEMS + 1
    assert caught.value.problems[-1] == "configuration: and 9500 more problems like these"
    assert str(caught.value).endswith("; and 481 more problems")


def test_the_command_line_shows_twenty_problems_and_how_many_more_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--json`, all that were put into words."""
    path = written(tmp_path, "many.json", json.dumps({f"key{n}": 1 for n in range(30)}))
    assert main(["config", "check", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "visionedge: and 10 more problems"
    assert main(["config", "check", str(path), "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 30


def test_a_problem_names_its_file_and_its_line(tmp_path: Path) -> None:
    """The line of the key, or of the section that lacks one; problems of other carriers name none."""
    path = written(
        tmp_path,
        "vision.yaml",
        "# two cameras\ncameras:\n  dock:\n    uri: gopher://x\n    fps: 0\n  yard:\n    fps: 5\nhttps: {}\n",
    )
    problems = ["cameras.dock.fps: a", "cameras.yard.uri: is missing", "https: b", "model.url: c", "d"]
    assert add_locations(problems, path) == [
        f"{path}:5: cameras.dock.fps: a",
        f"{path}:6: cameras.yard.uri: is missing",
        f"{path}:8: https: b",
        "model.url: c",
        "d",
    ]
    tabbed = written(tmp_path, "a.json", '{\n\t"inference": {\n\t\t"classes": [\n\t\t\t"a",\n\t\t\t1]}}')
    assert add_locations(["inference.classes.1: no text"], tabbed) == [
        f"{tabbed}:5: inference.classes.1: no text"
    ]


def test_variables_in_a_file_are_replaced_from_the_environment(tmp_path: Path) -> None:
    """In any text, also several in one; a dollar sign alone means nothing."""
    path = written(
        tmp_path,
        "a.yaml",
        "cameras: {dock: {uri: 'rtsp://${DOCK_USER}:${DOCK_PASSWORD}@192.0.2.5/s', fps: 5}}\n"
        "inference: {classes: ['$person', '${CLASS}']}\n",
    )
    environ = {"DOCK_USER": "me", "DOCK_PASSWORD": "hunter2", "CLASS": "car"}
    document = read_configuration(path, environ)
    assert document == {
        "cameras": {"dock": {"uri": "rtsp://me:hunter2@192.0.2.5/s", "fps": 5}},
        "inference": {"classes": ["$person", "car"]},
    }


def test_a_missing_variable_is_a_problem_with_its_line(tmp_path: Path) -> None:
    """Else a camera would be opened with the placeholder for its password."""
    path = written(tmp_path, "a.yaml", "http:\n  token: ${NO_SUCH_TOKEN}\n  host: ${not a name}\n")
    with pytest.raises(ConfigError) as caught:
        read_configuration(path, {})
    first, second = caught.value.problems
    assert first.startswith(f"{path}:2: http.token: the environment variable NO_SUCH_TOKEN is not set")
    assert second == f"{path}:3: http.host: '${{…}}' must hold the name of an environment variable"
    assert fill_variables({"a": [{"b": "${X}"}]}, {"X": "1"}) == {"a": [{"b": "1"}]}


def test_config_check_reports_every_problem_with_its_line(visionedge: CommandLine, tmp_path: Path) -> None:
    """Exit code 2 and a line each; `--json` gives the same as a document."""
    path = written(tmp_path, "a.yaml", "inference:\n  conf: 0.4\n  classes: person\nhttp:\n  port: 8080.0\n")
    done = visionedge("config", "check", str(path))
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines() == [
        f"visionedge: {path}:3: inference.classes: must be a list: [person]",
        f"visionedge: {path}:2: inference.conf: unknown key; did you mean 'confidence'?",
    ]
    shown = json.loads(visionedge("config", "check", str(path), "--json").out)
    assert [problem.partition(": ")[0] for problem in shown["problems"]] == [f"{path}:3", f"{path}:2"]


def test_config_check_names_the_cameras_of_a_valid_file(visionedge: CommandLine, tmp_path: Path) -> None:
    """So that one sees that the file which was meant was read."""
    path = written(tmp_path, "a.yaml", "cameras: {dock: {uri: 'demo:'}, yard: {uri: 'demo:'}}")
    done = visionedge("config", "check", str(path))
    assert (done.code, done.out) == (0, f"{path}: no problems found; cameras: dock, yard\n")
    shown = json.loads(visionedge("config", "check", str(path), "--json").out)
    assert shown == {"schema": "visionedge/config-check/1", "file": str(path), "problems": []}


def test_problems_of_arguments_name_no_line_of_the_file(visionedge: CommandLine, tmp_path: Path) -> None:
    """`doctor` and `run` lay arguments over the file; each problem names the place where it can be mended."""
    path = written(tmp_path, "a.yaml", "inference:\n  iou: 2\n")
    done = visionedge("doctor", "--config", str(path), "--http", "x:70000")
    assert done.code == 2
    of_file, of_argument = sorted(done.err.splitlines())
    assert of_file.startswith(f"visionedge: {path}:2: inference.iou: ")
    assert of_argument.startswith("visionedge: http.port: ")
