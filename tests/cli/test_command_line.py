"""The command line: exit codes, one-line errors, and stdout."""

import argparse
import io
import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from clips import make_clip, make_picture
from command_line import CommandLine
from repository_paths import REPOSITORY
from slow_models import save_with_variant
from tiny_models import classifier
from visionedge.__main__ import build_parser
from visionedge.camera.sources.pyav import PyavPicture
from visionedge.cli.run import build_run_document, private_files
from visionedge.config.schema import InferenceConfig
from visionedge.errors import DamagedPictureError
from visionedge.ops.clips import VideoProgress
from visionedge.ops.detect import DetectRequest, _format_box_px, run_detect


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all of them, so that a model is compiled once."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(autouse=True)
def _own_state(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISIONEDGE_DATA", str(state))


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Calls the command line in this process."""
    return CommandLine(capsys)


UNITS = ("SECONDS", "MS", "FPS", "PIXELS", "X")
COUNTS = ("N", "N,N…", "K")


def commands(of: argparse.ArgumentParser | None = None) -> Iterator[argparse.ArgumentParser]:
    """The parser of every command, the outermost one first."""
    of = of or build_parser()
    yield of
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from commands(below)


def command_names() -> list[str]:
    return [each.prog.removeprefix("visionedge").strip() for each in commands()]


@pytest.mark.parametrize("name", command_names())
def test_help_has_examples_and_exit_codes(visionedge: CommandLine, name: str) -> None:
    """Every command explains itself, names its exit codes, and ends with 0."""
    outcome = visionedge(*name.split(), "--help")
    assert outcome.code == 0
    assert "exit codes:\n  0   success\n" in outcome.out
    assert ("  75  " in outcome.out) == (name in ("", "run"))


@pytest.mark.parametrize("command", list(commands()), ids=command_names())
def test_every_option_has_a_description_and_a_unit(command: argparse.ArgumentParser) -> None:
    """No option shows only its default, and a number has its unit."""
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert action.metavar in ("COMMAND", "BENCHMARK")
            continue
        name = "/".join(action.option_strings) or action.dest
        words = (action.help or "").partition("(default")[0].split()
        assert len(words) >= 2, f"{command.prog} {name}: {action.help!r}"
        if action.type is not None:
            assert action.metavar in {*UNITS, *COUNTS}, f"{command.prog} {name}: {action.metavar}"
            assert action.metavar != "X" or "0 to 1" in str(action.help), f"{command.prog} {name}"


def test_the_help_of_run_names_the_variables_that_it_reads(visionedge: CommandLine) -> None:
    """Those that the configuration's documentation names."""
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    documented = set(re.findall(r"VISIONEDGE_[A-Z_]+", text))
    assert documented >= {"VISIONEDGE_DATA", "VISIONEDGE_CONFIG", "VISIONEDGE_HTTP_TOKEN"}
    shown = visionedge("run", "--help").out
    assert {name for name in documented if name not in shown} == set()


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (("detect", "x.jpg", "--source", "y"), "detect"),
        (("bench", "pipeline", "--camera", "a"), "bench pipeline"),
        (("config", "schema", "more"), "config schema"),
        (("config", "check"), "config check"),
    ],
)
def test_a_wrong_argument_names_the_help_of_its_command(
    visionedge: CommandLine, words: tuple[str, ...], command: str
) -> None:
    outcome = visionedge(*words)
    assert outcome.code == 2
    (line,) = outcome.complaints
    assert line.startswith(f"visionedge {command}: ")
    assert line.endswith(f"; see visionedge {command} --help")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("run", "--camera", "dock"),
        ("run", "--camera", "Dock=demo:"),
        ("run", "--camera", "dock=demo:", "--camera", "dock=demo:"),
        ("run", "--camera", "dock=gopher://me:hunter2@host/x"),
        ("run", "--device", "npu"),
        ("run", "--http", "nowhere"),
        ("run", "--duration", "-1"),
        ("run", "--config", "no-such-file.yaml"),
        ("run", "--model", "no-such-model.onnx"),
        ("detect",),
        ("detect", "x.jpg", "--confidence", "2"),
        ("bench", "pipeline", "--cameras", "0"),
        ("bench", "scene", "--boxes-per-frame", "0"),
        ("bench", "scene", "--fps", "0"),
    ],
)
def test_wrong_arguments_give_a_one_line_error_and_exit_2(
    visionedge: CommandLine, arguments: tuple[str, ...]
) -> None:
    """The line names the error and never contains a secret."""
    outcome = visionedge(*arguments)
    assert outcome.code == 2
    assert len(outcome.complaints) == 1
    assert "hunter2" not in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("run", "--duration", "0"), "argument --duration: '0': must be greater than 0"),
        (("run", "--duration", "soon"), "argument --duration: 'soon': must be a number"),
        (("run", "--duration", "nan"), "argument --duration: 'nan': must be a number"),
        (("detect", "x", "--iou", "2"), "argument --iou: '2': must be between 0 and 1"),
        (("detect", "x", "--iou", "half"), "argument --iou: 'half': must be a number"),
        (("bench", "http", "--clients", "0"), "argument --clients: '0': must be 1 or more"),
        (("bench", "http", "--clients", "1.5"), "argument --clients: '1.5': must be a whole number"),
        (("bench", "engine", "--lanes", "1,x"), "argument --lanes: 'x': must be a whole number"),
    ],
)
def test_a_wrong_number_is_refused_with_a_clear_message(
    visionedge: CommandLine, words: tuple[str, ...], line: str
) -> None:
    (complaint,) = visionedge(*words).complaints
    assert complaint.partition(": ")[2].startswith(f"{line}; see ")


@pytest.mark.parametrize(("level", "code"), [("loud", 2), ("DEBUG", 0), ("info", 0)])
def test_a_wrong_log_level_in_the_environment_gives_a_one_line_error(
    visionedge: CommandLine, monkeypatch: pytest.MonkeyPatch, level: str, code: int
) -> None:
    """As a wrong --log-level is; case does not matter."""
    monkeypatch.setenv("VISIONEDGE_LOG_LEVEL", level)
    outcome = visionedge("config", "schema")
    assert outcome.code == code
    assert [line.partition(":")[2].split(":")[0].strip() for line in outcome.complaints] == (
        ["VISIONEDGE_LOG_LEVEL"] if code else []
    )


def test_every_problem_of_a_configuration_is_reported(visionedge: CommandLine, tmp_path: Path) -> None:
    """One line each, with the file, the line and the path of the key; exit 2."""
    path = tmp_path / "vision.yaml"
    path.write_text("camras: {}\ninference: {device: npu}\nhttp: {port: 99999}\n")
    outcome = visionedge("run", "--config", path)
    assert outcome.code == 2
    places = {": ".join(line.split(": ")[1:3]) for line in outcome.complaints}
    assert places == {f"{path}:1: camras", f"{path}:2: inference.device", f"{path}:3: http.port"}


@pytest.mark.parametrize("wrong", ["persn", "Person"])
def test_unknown_classes_are_reported(visionedge: CommandLine, tmp_path: Path, wrong: str) -> None:
    """A label that the model does not know is a wrong configuration; the nearest one is suggested."""
    path = tmp_path / "vision.yaml"
    path.write_text(f"inference: {{classes: [car, {wrong}]}}\n")
    outcome = visionedge("run", "--config", path)
    assert outcome.code == 2
    assert f"'{wrong}'" in outcome.complaints[0]
    assert "did you mean 'person'?" in outcome.complaints[0]


@pytest.mark.parametrize("content", [b"", b"no model at all", bytes(range(256)) * 40])
def test_a_model_that_is_no_model_exits_2(visionedge: CommandLine, tmp_path: Path, content: bytes) -> None:
    """One line that names the file."""
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    outcome = visionedge("detect", make_picture(tmp_path / "a.png"), "--model", path)
    assert outcome.code == 2
    (line,) = outcome.complaints
    assert "bad.onnx" in line


def test_a_classifier_is_refused(visionedge: CommandLine, tmp_path: Path) -> None:
    """A model that is not a detector is never guessed."""
    outcome = visionedge(
        "detect", make_picture(tmp_path / "a.png"), "--model", classifier(tmp_path / "c.onnx")
    )
    assert outcome.code == 2
    assert len(outcome.complaints) == 1


def test_a_missing_demanded_device_exits_3(visionedge: CommandLine, tmp_path: Path) -> None:
    """With fallback off the error has the reason and the remedy."""
    path = tmp_path / "vision.yaml"
    path.write_text("inference: {device: cuda, fallback: false}\nhttp: {port: 0}\n")
    outcome = visionedge("run", "--config", path, "--duration", "1")
    if outcome.code == 0:
        pytest.skip("this machine has a usable GPU")
    assert outcome.code == 3
    assert "cuda" in outcome.complaints[0]
    assert "fallback" in outcome.complaints[0]


def test_a_port_in_use_exits_3(visionedge: CommandLine) -> None:
    """The line names the address and how to choose another."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = visionedge("run", "--http", f"127.0.0.1:{port}")
    assert outcome.code == 3
    (line,) = outcome.complaints
    assert str(port) in line
    assert "--http" in line


def test_detect_prints_one_frame_object_per_picture(visionedge: CommandLine, tmp_path: Path) -> None:
    """JSON Lines on stdout, in the given order, each with its source as given."""
    first, second = make_picture(tmp_path / "a.png"), make_picture(tmp_path / "b.jpg", 3)
    outcome = visionedge("detect", second, first, "--json")
    assert outcome.code == 0
    frames = [json.loads(line) for line in outcome.out.splitlines()]
    assert [frame["source"] for frame in frames] == [str(second), str(first)]
    assert set(frames[0]) == {
        *("schema", "source", "sequence", "epoch", "capturedAt", "width", "height"),
        *("model", "device", "timing", "detections"),
    }
    assert (frames[0]["width"], frames[0]["height"]) == (160, 120)


def test_sources_are_named_as_given(
    visionedge: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leading './' stays, also before the members of a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    make_picture(tmp_path / "in" / "a.png")
    outcome = visionedge("detect", "./in/a.png", "./in/", "--json")
    frames = [json.loads(line) for line in outcome.out.splitlines()]
    assert [frame["source"] for frame in frames] == ["./in/a.png", "./in/a.png"]


def test_detect_continues_after_a_file_that_is_not_a_picture(visionedge: CommandLine, tmp_path: Path) -> None:
    """Unreadable sources are one line each on stderr, the others are analysed, and the exit code is 1."""
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    empty = tmp_path / "empty"
    empty.mkdir()
    outcome = visionedge(
        "detect", tmp_path / "missing.png", bad, empty, make_picture(tmp_path / "a.png"), "--json"
    )
    assert outcome.code == 1
    assert len(outcome.out.splitlines()) == 1
    assert [name for name in ("missing.png", "bad.jpg", "empty") if name in outcome.err] == [
        "missing.png",
        "bad.jpg",
        "empty",
    ]
    assert len(outcome.complaints) == 3


def test_detect_prints_one_line_per_missing_file_and_analyses_the_others(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    """Nothing is waited for, nothing is read without end."""
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "none.mp4").symlink_to("nowhere")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "empty.mp4").touch()
    wrong = ["pipe.jpg", "pipe.mp4", "zero.png", "none.mp4", "empty.jpg", "empty.mp4", "x" * 300 + ".jpg"]
    paths: list[str | Path] = [*(tmp_path / name for name in wrong), "/dev/null", "/dev/zero", "a\0.jpg"]
    outcome = visionedge("detect", *paths, make_picture(tmp_path / "a.png"), "--json")
    assert outcome.code == 1
    assert len(outcome.out.splitlines()) == 1
    assert len(outcome.complaints) == len(paths)


def test_detect_reports_a_missing_file_before_it_opens_a_model(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    """The model is unreadable here, and it is not opened if no picture is left."""
    outcome = visionedge("detect", tmp_path / "nothere.jpg", "--model", tmp_path / "none.onnx")
    assert outcome.code == 1
    (line,) = outcome.complaints
    assert "nothere.jpg does not exist" in line


def test_detect_of_an_undecodable_video_gives_a_one_line_error(
    visionedge: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The following picture is analysed."""

    def damaged(_picture: object) -> None:
        raise DamagedPictureError("pictures of the pixel format nothing cannot be converted")

    monkeypatch.setattr(PyavPicture, "picture", damaged)
    clip = make_clip(tmp_path / "m8.mp4", pictures=5)
    outcome = visionedge("detect", clip, make_picture(tmp_path / "a.png"), "--json")
    assert outcome.code == 1
    assert len(outcome.out.splitlines()) == 1
    (line,) = outcome.complaints
    assert "m8.mp4: 5 of 5 pictures cannot be decoded" in line


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_detect_prints_any_file_name_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    """JSON stays valid, and no control character of a name reaches the terminal."""
    name = "gr\u00fcn\u4e2d\x1b[31m\udcff.png"
    make_picture(tmp_path / "a.png").rename(tmp_path / name)
    text, document = io.BytesIO(), io.BytesIO()
    for raw, as_json in ((text, False), (document, True)):
        out = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
        request = DetectRequest((str(tmp_path / name),), None, InferenceConfig(device="cpu"), as_json=as_json)
        assert run_detect(request, out) == 0
        out.detach()
    assert b"\x1b" not in text.getvalue()
    assert json.loads(document.getvalue())["source"] == str(tmp_path / name)


def test_detect_takes_classes_and_iou(visionedge: CommandLine, tmp_path: Path) -> None:
    """Labels one by one or with commas; an unknown one is a wrong argument."""
    picture = make_picture(tmp_path / "a.png")
    assert (
        visionedge("detect", picture, "--classes", "person,car", "--classes", "dog", "--iou", "0.4").code == 0
    )
    outcome = visionedge("detect", picture, "--classes", "persn")
    assert outcome.code == 2
    assert "persn" in outcome.err


def test_detect_takes_a_precision(visionedge: CommandLine, tmp_path: Path) -> None:
    """That of `inference.precision`; one without a variant is refused."""
    picture, model = make_picture(tmp_path / "a.png"), save_with_variant(tmp_path / "tiny.onnx")
    for precision in ("auto", "fp32", "int8"):
        assert visionedge("detect", picture, "--model", model, "--precision", precision).code == 0
    outcome = visionedge("detect", picture, "--model", model, "--precision", "fp16")
    assert outcome.code == 2
    assert "fp16" in outcome.complaints[0]
    assert visionedge("detect", picture, "--precision", "fp8").code == 2


class _Terminal(io.StringIO):
    """A terminal that records its output."""

    def isatty(self) -> bool:
        return True


def test_progress_of_a_video_overwrites_one_line_and_its_last_state_stays() -> None:
    """Pictures have no progress, and nothing is written without a terminal."""
    terminal, moments_s = _Terminal(), iter(range(100))
    progress = VideoProgress(terminal, owns_terminal=True, clock=lambda: float(next(moments_s)))
    progress.note("a.png", 1, video=False)
    for number in (1, 2, 3):
        progress.note("c.mp4", number, video=True)
    progress.note("b.png", 1, video=False)
    progress.close()
    shown = terminal.getvalue().split("\r")
    assert shown[1:] == [
        "c.mp4: 2 frames, 2.0 frames/s\x1b[K",
        "c.mp4: 3 frames, 1.5 frames/s\x1b[K",
        "c.mp4: 3 frames, 0.8 frames/s\x1b[K\n",
    ]
    silent = io.StringIO()
    progress = VideoProgress(silent, owns_terminal=True)
    progress.note("c.mp4", 1, video=True)
    progress.close()
    assert silent.getvalue() == ""


def test_progress_of_a_video_shows_how_much_is_left() -> None:
    """Where the file says how many pictures it has; the last line needs no estimate."""
    terminal, moments_s = _Terminal(), iter(range(100))
    progress = VideoProgress(terminal, owns_terminal=True, clock=lambda: float(next(moments_s)))
    for number in (1, 3, 5):
        progress.note("c.mp4", number, video=True, expected=20)
    progress.note("d.mp4", 1, video=True, expected=1)
    progress.note("d.mp4", 2, video=True, expected=1)  # an estimate that was too low
    progress.close()
    assert terminal.getvalue().split("\r")[1:] == [
        "c.mp4: 2 frames (up to number 3 of 20), 2.0 frames/s, 6 s left\x1b[K",
        "c.mp4: 3 frames (up to number 5 of 20), 1.5 frames/s, 6 s left\x1b[K",
        "c.mp4: 3 frames (up to number 5), 0.8 frames/s\x1b[K\n",
        "d.mp4: 2 frames, 1.0 frames/s\x1b[K",
        "d.mp4: 2 frames, 0.7 frames/s\x1b[K\n",
    ]


def test_progress_of_a_video_counts_skipped_pictures() -> None:
    """The rate is that of the analysed pictures."""
    terminal, moments_s = _Terminal(), iter(range(100))
    progress = VideoProgress(terminal, owns_terminal=True, clock=lambda: float(next(moments_s)))
    for number in (1, 4, 7):
        progress.note("c.mp4", number, video=True)
    progress.close()
    assert terminal.getvalue().endswith("\rc.mp4: 3 frames (up to number 7), 1.0 frames/s\x1b[K\n")


def test_detect_analyses_only_every_nth_frame_of_a_video(visionedge: CommandLine, tmp_path: Path) -> None:
    """Frames keep their numbers and times, pictures are all done, and the drawn video keeps its duration."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    make_picture(folder / "a.png")
    make_picture(folder / "b.png")
    make_clip(folder / "q.mp4", pictures=10)
    outcome = visionedge("detect", folder, "--vid-stride", "4", "--json", "--annotate", out)
    assert outcome.code == 0
    frames = [json.loads(line) for line in outcome.out.splitlines()]
    assert [Path(frame["source"]).name for frame in frames] == ["a.png", "b.png", *["q.mp4"] * 3]
    assert [frame["sequence"] for frame in frames[2:]] == [1, 5, 9]
    drawn = cv2.VideoCapture(str(out / "q.mp4"))
    assert (int(drawn.get(cv2.CAP_PROP_FRAME_COUNT)), drawn.get(cv2.CAP_PROP_FPS)) == (3, 2.5)
    drawn.release()
    lines = visionedge("detect", folder / "q.mp4", "--vid-stride", "4").out.splitlines()
    heads = [line.partition(": ")[0] for line in lines if not line.startswith("  ")]
    assert [head.rpartition("#")[2] for head in heads] == ["1 at 0.00 s", "5 at 0.40 s", "9 at 0.80 s"]
    assert visionedge("detect", folder, "--vid-stride", "0").code == 2


def test_detect_prints_boxes_in_pixels() -> None:
    """A frame object has shares of the picture, which are hard to read without names."""
    box = {"left": 0.067, "top": 0.365, "width": 0.213, "height": 0.468}
    assert _format_box_px(box, 640, 480) == "left 43, top 175, 136x225 px"


def test_detect_reads_folders_in_natural_order_and_videos_frame_by_frame(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    """2 comes before 10; a video gives every frame with rising numbers."""
    folder = tmp_path / "in"
    folder.mkdir()
    make_picture(folder / "p10.png")
    make_picture(folder / "p2.png")
    make_clip(folder / "q.mp4", pictures=5)
    (folder / "notes.txt").write_text("not for us")
    outcome = visionedge("detect", folder, "--json")
    frames = [json.loads(line) for line in outcome.out.splitlines()]
    assert [Path(frame["source"]).name for frame in frames] == ["p2.png", "p10.png", *["q.mp4"] * 5]
    assert [frame["sequence"] for frame in frames[2:]] == [1, 2, 3, 4, 5]


def test_annotated_pictures_keep_their_names_without_collisions(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    """Two pictures of one name do not overwrite each other; a video becomes a video of as many frames."""
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        make_picture(tmp_path / name / "same.png")
    clip = make_clip(tmp_path / "clip.mp4", pictures=6)
    out = tmp_path / "out"
    outcome = visionedge("detect", tmp_path / "x", tmp_path / "y", clip, "--annotate", out)
    assert outcome.code == 0
    assert sorted(path.name for path in out.iterdir()) == ["clip.mp4", "same-2.png", "same.png"]
    written = cv2.VideoCapture(str(out / "clip.mp4"))
    assert int(written.get(cv2.CAP_PROP_FRAME_COUNT)) == 6
    assert round(written.get(cv2.CAP_PROP_FPS)) == 10
    written.release()


def test_annotated_files_do_not_replace_those_that_are_read(visionedge: CommandLine, tmp_path: Path) -> None:
    """In the folder of the inputs they get a number."""
    make_picture(tmp_path / "a.png")
    make_clip(tmp_path / "c.mp4", pictures=3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert visionedge("detect", tmp_path, "--annotate", tmp_path / "." / "").code == 0
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(after) == ["a-2.png", "a.png", "c-2.mp4", "c.mp4"]
    assert after | before == after


@pytest.mark.shared
def test_detect_finds_the_objects_on_the_photographs(visionedge: CommandLine, shared_data: Path) -> None:
    """Person, cup, cat, and dog + bicycle + car at their places, with the default settings."""
    outcome = visionedge("detect", shared_data / "photos", "--json")
    seen = {Path(f["source"]).name: f["detections"] for f in map(json.loads, outcome.out.splitlines())}
    expected = {
        "astronaut.png": {"person": (0.02, 0.04, 0.70, 0.95)},
        "coffee.png": {"cup": (0.27, 0.04, 0.43, 0.70)},
        "chelsea.png": {"cat": (0.0, 0.0, 0.98, 1.0)},
        "darknet_dog.jpg": {
            "dog": (0.17, 0.36, 0.25, 0.58),
            "bicycle": (0.07, 0.24, 0.68, 0.50),
            "car": (0.61, 0.14, 0.29, 0.16),
        },
    }
    for picture, things in expected.items():
        for label, box in things.items():
            found = [d["box"] for d in seen[picture] if d["label"] == label]
            assert any(_overlap(b, box) > 0.8 for b in found), f"{label} on {picture}"


def _overlap(box: dict[str, float], other: tuple[float, float, float, float]) -> float:
    a = np.array([box["left"], box["top"], box["left"] + box["width"], box["top"] + box["height"]])
    b = np.array([other[0], other[1], other[0] + other[2], other[1] + other[3]])
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    shared = float(sides.prod())
    return shared / (float((a[2:] - a[:2]).prod()) + float((b[2:] - b[:2]).prod()) - shared)


def test_the_pipeline_bench_reports_both_sides(visionedge: CommandLine, tmp_path: Path) -> None:
    """Figures of the pipeline, of the plain loop, and their ratio, in words and as a document."""
    clip = make_clip(tmp_path / "clip.mp4", pictures=20)
    report = tmp_path / "report.json"
    outcome = visionedge(
        *("bench", "pipeline", "--cameras", "2", "--source", clip, "--seconds", "1", "--rounds", "1"),
        *("--baseline", "--json", report),
    )
    assert outcome.code == 0
    assert "ratio" in outcome.out
    document = json.loads(report.read_text())
    for side in ("pipeline", "baseline"):
        assert document[side]["framesPerSecond"] > 0
        assert document[side]["cpuMsPerFrame"] > 0
        assert set(document[side]["latencyMs"]) == {"p50", "p95", "p99"}
    assert document["pipeline"]["dropped"].get("replaced", 0) == 0
    for side in ("alone", "atOnce"):
        assert document["ceiling"][side]["decodeCpuMs"] > 0
        assert document["ceiling"][side]["runCpuMs"] > document["ceiling"][side]["decodeCpuMs"]
        assert document["ceiling"][side]["cpuToBare"] > 0
    assert document["ceiling"]["atOnce"]["threads"] == document["plan"]["lanes"]
    assert outcome.out.count("ceiling, ") == 2
    assert document["baselineAgreement"]["pictures"] == 2
    assert (document["precision"], document["load"]["precision"]) == ("fp32", "fp32")


def test_the_int8_pipeline_is_compared_with_the_fp32_plain_loop(
    visionedge: CommandLine, tmp_path: Path
) -> None:
    """For a model with an int8 variant; the ceiling is that of the engine in use."""
    model = save_with_variant(tmp_path / "tiny.onnx")
    clip = make_clip(tmp_path / "clip.mp4", pictures=20)
    report = tmp_path / "report.json"
    outcome = visionedge(
        *("bench", "pipeline", "--cameras", "1", "--source", clip, "--seconds", "0.5", "--rounds", "1"),
        *("--model", model, "--baseline", "--precision", "int8", "--json", report),
    )
    assert outcome.code == 0
    document = json.loads(report.read_text())
    assert (document["precision"], document["load"]["precision"]) == ("int8", "int8")
    assert document["ratio"]["framesPerSecond"] > 0
    assert document["ceiling"]["engine"] == document["engine"]
    assert document["engine"].endswith(" int8")
    assert " in int8, " in outcome.out
    assert "; the plain loop in fp32" in outcome.out


def test_a_benchmark_without_a_source_gives_a_one_line_error(visionedge: CommandLine) -> None:
    """A missing source is reported before anything is measured."""
    outcome = visionedge("bench", "pipeline", "--source", "no-such.mp4")
    assert outcome.code == 1
    assert "no-such.mp4" in outcome.complaints[0]


def document_of(*words: str, environ: dict[str, str] | None = None) -> dict[str, Any]:
    """The configuration document of `run` with these arguments."""
    arguments = build_parser().parse_args(["run", *words])
    return build_run_document(arguments, environ or {}, inside_iot_edge=False)


@pytest.mark.parametrize(
    ("values", "cameras"),
    [
        (["rtsp://192.0.2.5/1?a=b"], {"cam1": "rtsp://192.0.2.5/1?a=b"}),
        (["rtsp://me:a=b@192.0.2.5/1"], {"cam1": "rtsp://me:a=b@192.0.2.5/1"}),
        (["https://192.0.2.5/mjpg?channel=1"], {"cam1": "https://192.0.2.5/mjpg?channel=1"}),
        (["0", "/dev/video2"], {"cam1": "v4l2:///dev/video0", "cam2": "v4l2:///dev/video2"}),
        (["dock=1"], {"dock": "v4l2:///dev/video1"}),
        (["yard.mp4", "./a=b.mp4"], {"cam1": "yard.mp4", "cam2": "./a=b.mp4"}),
        (["demo:", "cam1=yard.mp4"], {"cam2": "demo:", "cam1": "yard.mp4"}),
    ],
)
def test_a_camera_without_a_name_gets_a_default_name(values: list[str], cameras: dict[str, str]) -> None:
    """cam1, cam2 and so on in the order given, past the names that are taken; a number is a video device."""
    words = [word for value in values for word in ("--camera", value)]
    made = document_of(*words)["cameras"]
    assert {name: camera["uri"] for name, camera in made.items()} == cameras
    assert list(made) == list(cameras)


def test_a_camera_without_a_name_does_not_replace_those_of_the_file(tmp_path: Path) -> None:
    """A camera of the configuration file is never replaced by one that has no name."""
    file = tmp_path / "vision.yaml"
    file.write_text("cameras: {cam1: {uri: yard.mp4, fps: 2}}\n")
    made = document_of("--config", str(file), "--camera", "demo:")["cameras"]
    assert made == {"cam1": {"uri": "yard.mp4", "fps": 2}, "cam2": {"uri": "demo:"}}


def test_the_name_of_a_camera_is_logged_without_its_password(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        document_of("--camera", "rtsp://me:hunter2@192.0.2.5/1")
    assert "camera cam1 is rtsp://***@192.0.2.5/1" in caplog.text
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("words", [(), ("--camera", "demo=demo:"), ("--http", "127.0.0.1:0")])
def test_the_demo_takes_the_confidence_of_the_models_card(words: tuple[str, ...]) -> None:
    """The first frames of the bundled clip contain no bird and no ball."""
    document = document_of(*words)
    assert document["cameras"] == {"demo": {"uri": "demo:"}}
    assert document["inference"] == {"confidence": 0.4}


@pytest.mark.parametrize(
    "words", [("--camera", "dock=rtsp://192.0.2.5/1"), ("--model", "mine.onnx")], ids=["a camera", "a model"]
)
def test_a_command_without_the_demo_keeps_the_default_confidence(words: tuple[str, ...]) -> None:
    assert "inference" not in document_of(*words)


def test_a_configuration_of_the_demo_is_used_unchanged(tmp_path: Path) -> None:
    """Values of a file, and its missing keys, are the user's choice."""
    file = tmp_path / "vision.yaml"
    file.write_text("cameras: {demo: {uri: 'demo:'}}\n")
    assert "inference" not in document_of("--config", str(file))


def test_detect_does_not_log_its_engine(visionedge: CommandLine, tmp_path: Path) -> None:
    """Only the results are printed; --log-level debug shows the rest."""
    picture = make_picture(tmp_path / "one.png", 1)
    assert "engine" not in visionedge("detect", picture).err
    assert "engine ready: yolox-nano-416 on cpu" in visionedge("detect", picture, "--log-level", "debug").err


def test_files_written_by_run_are_readable_only_by_their_owner(tmp_path: Path) -> None:
    """New files and state of an earlier version are restricted; other files stay unchanged."""
    old, link, other = tmp_path / "spool.db-wal", tmp_path / "sequences.json", tmp_path / "notes.txt"
    for path in (old, other):
        path.write_text("x")
        path.chmod(0o644)
    link.symlink_to(other)
    before = os.umask(0o022)
    try:
        with private_files(tmp_path):
            (tmp_path / "made").mkdir()
            (tmp_path / "made" / "new.json").write_text("x")
        (tmp_path / "afterwards.json").write_text("x")
    finally:
        os.umask(before)
    modes = {
        path: stat.S_IMODE(path.stat().st_mode)
        for path in (
            old,
            other,
            tmp_path / "made",
            tmp_path / "made" / "new.json",
            tmp_path / "afterwards.json",
        )
    }
    assert [*modes.values()] == [0o600, 0o644, 0o700, 0o600, 0o644]


def test_closed_streams_change_nothing_else(tmp_path: Path) -> None:
    """A file that is opened later must not get the number of stdout or stderr, and what is printed."""
    picture, out = make_picture(tmp_path / "a.png"), tmp_path / "out"
    command = f'"{sys.executable}" -m visionedge detect "{picture}" --annotate "{out}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
    assert cv2.imread(str(out / "a.png")) is not None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stdout_that_is_full_is_one_line() -> None:
    command = f'"{sys.executable}" -m visionedge config schema > /dev/full'
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "visionedge: an output cannot be written: No space left on device\n"
