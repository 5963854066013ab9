"""Videos run through the engine: every picture once and in order, bounded, and without a thread left."""

import io
import json
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from clips import make_clip, make_picture, numbered_picture
from tiny_models import TinyDetector
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import CameraUri
from visionedge.config.schema import InferenceConfig
from visionedge.engine.lanes import infer_frames, make_frame
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.engine.plan import Plan
from visionedge.errors import SourceError
from visionedge.frames.types import FrameResult, Picture
from visionedge.model.model import Model, load_model
from visionedge.model.postprocess import Selection
from visionedge.ops.clips import AnnotatedOutput, ClipPicture, ClipReader, analyse, map_ahead, read_ahead
from visionedge.ops.detect import DetectRequest, run_detect
from visionedge.ops.video_file import VideoFile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    path.write_bytes(TinyDetector().proto().SerializeToString())
    return load_model(path)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    names = ("reader", "lane", "drawing")
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(names)] == []


def open_with(model: Model, lanes: int, batch: int) -> LocalEngine:
    """An engine with this plan."""
    plan = Plan(lanes, (batch,) if batch == 1 else (1, batch), "a test")
    return open_engine(model, InferenceConfig(device="cpu", precision="fp32"), plans={"cpu": plan})


def selection_of(model: Model) -> Selection:
    return Selection.of(model, 0.5, 0.5)


def read_one_by_one(path: Path) -> list[Picture]:
    """The pictures of a video that can be decoded."""
    pictures = []
    with closing(open_source(CameraUri("file", str(path)))) as source:
        while (decoded := source.read()) is not None:
            pictures.append(decoded.picture())
    return pictures


def detect_all(
    model: Model, paths: list[Path], lanes: int, batch: int
) -> list[tuple[ClipPicture, FrameResult | SourceError]]:
    reader = ClipReader(map(str, paths))
    with (
        closing(open_with(model, lanes, batch)) as engine,
        closing(analyse(reader.read(engine), engine, selection_of(model))) as results,
    ):
        return list(results)


@pytest.mark.parametrize(
    ("pictures", "lanes", "batch"), [(1, 1, 1), (3, 8, 1), (2, 3, 4), (17, 2, 1), (23, 3, 4)]
)
def test_each_picture_of_a_video_has_the_result_that_it_has_alone(
    tmp_path: Path, model: Model, pictures: int, lanes: int, batch: int
) -> None:
    """In order, with fewer pictures than lanes or than a batch, too."""
    clip = make_clip(tmp_path / "c.mp4", pictures=pictures)
    found = detect_all(model, [clip], lanes, batch)
    assert [picture.number for picture, _ in found] == list(range(1, pictures + 1))
    with closing(open_with(model, 1, 1)) as engine:
        frames = [make_frame(picture, engine) for picture in read_one_by_one(clip)]
        alone = [infer_frames([frame], engine, selection_of(model))[0] for frame in frames]
    assert len(alone) == pictures
    for (_, result), expected in zip(found, alone, strict=True):
        assert isinstance(result, FrameResult)
        np.testing.assert_allclose(result.detections.boxes, expected.detections.boxes, atol=1e-5)
        np.testing.assert_array_equal(result.detections.class_ids, expected.detections.class_ids)


def test_a_video_that_is_cut_off_gives_what_can_be_decoded(tmp_path: Path, model: Model) -> None:
    clip = make_clip(tmp_path / "c.mkv", pictures=40)
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size * 6 // 10])
    expected = len(read_one_by_one(clip))
    assert 0 < expected < 40
    assert [picture.number for picture, _ in detect_all(model, [clip], 2, 1)] == [*range(1, expected + 1)]


def test_a_file_that_cannot_be_read_has_its_place_among_the_results(tmp_path: Path, model: Model) -> None:
    """The inputs before and after it are complete."""
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video" * 100)
    clip, still = make_clip(tmp_path / "c.mp4", pictures=5), make_picture(tmp_path / "a.png")
    found = detect_all(model, [clip, bad, still, clip], 2, 4)
    kinds = [(picture.input_number, isinstance(result, SourceError)) for picture, result in found]
    assert kinds == [*[(0, False)] * 5, (1, True), (2, False), *[(3, False)] * 5]


def test_videos_of_a_camera_follow_each_other_on_one_clock(tmp_path: Path, model: Model) -> None:
    """Each is an epoch; the last picture of a video is shown as long as the one before it."""
    first, second = (
        make_clip(tmp_path / "a.mp4", pictures=3),
        make_clip(tmp_path / "b.mp4", pictures=2, fps=5),
    )
    start = datetime(2026, 11, 30, 8, tzinfo=UTC)
    reader = ClipReader([str(first), str(second)], camera="dock", start=start)
    with closing(open_with(model, 1, 1)) as engine:
        frames = [picture.load() for picture in reader.read(engine)]
    assert [(frame.camera, frame.sequence, frame.epoch) for frame in frames] == [
        *[("dock", number, 1) for number in (1, 2, 3)],
        *[("dock", number, 2) for number in (4, 5)],
    ]
    at_s = [frame.captured_ns / 1e9 for frame in frames]
    assert at_s == pytest.approx([0, 0.1, 0.2, 0.3, 0.5], abs=1e-3)
    assert [(frame.captured_utc - start).total_seconds() for frame in frames] == pytest.approx(at_s, abs=1e-3)


def test_a_variable_rate_keeps_the_times_of_its_pictures(tmp_path: Path, model: Model) -> None:
    """A camera that sends a picture when something moves."""
    pytest.importorskip("av")
    at_s = [0.0, 0.04, 0.54, 2.5, 2.54, 7.0]
    with closing(VideoFile(tmp_path / "c.mp4")) as video:
        for number, position_s in enumerate(at_s):
            video.add(numbered_picture(number), position_s)
    reader = ClipReader([str(tmp_path / "c.mp4")], camera="dock", start=datetime(2026, 11, 30, tzinfo=UTC))
    with closing(open_with(model, 1, 1)) as engine:
        captured_s = [picture.load().captured_ns / 1e9 for picture in reader.read(engine)]
    assert captured_s == pytest.approx(at_s, abs=1e-3)


def test_reading_ahead_is_bounded() -> None:
    """A reader that waits for its caller holds at most one picture more than was agreed."""
    made = 0

    def numbers() -> Generator[int]:
        nonlocal made
        while made < 100:
            made += 1
            yield made

    with closing(read_ahead(numbers(), 3)) as ahead:
        for number in ahead:
            assert made <= number + 3 + 1
    assert made == 100


def test_an_error_while_reading_ahead_comes_after_what_was_read() -> None:
    def numbers() -> Generator[int]:
        yield 1
        yield 2
        raise SourceError("the disk is gone")

    with closing(read_ahead(numbers(), 1)) as ahead:
        seen = [next(ahead), next(ahead)]
        with pytest.raises(SourceError, match="the disk is gone"):
            next(ahead)
    assert seen == [1, 2]


def test_who_stops_early_leaves_nothing_open() -> None:
    """The source is closed on its own thread, and work that has not begun is dropped."""
    closed = threading.Event()

    def numbers() -> Generator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    ahead = read_ahead(numbers(), 2)
    with closing(ahead), closing(map_ahead(lambda number: number * 2, ahead, 3)) as doubled:
        assert [next(doubled) for _ in range(4)] == [(n, 2 * n) for n in range(4)]
    assert closed.is_set()


class _Interrupted(io.StringIO):
    """A stream that fails after three lines."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__()
        self._reason = reason

    def write(self, text: str) -> int:
        if len(self.getvalue().splitlines()) == 3:
            raise self._reason
        return super().write(text)


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), BrokenPipeError()])
def test_an_interrupted_video_ends_all_threads_and_leaves_a_complete_file(
    tmp_path: Path, model: Model, reason: BaseException
) -> None:
    """By Ctrl-C, or by a reader of the results that has ended."""
    clip, out = make_clip(tmp_path / "c.mp4", pictures=60), _Interrupted(reason)
    inference = InferenceConfig(device="cpu", precision="fp32")
    request = DetectRequest((str(clip),), model.path, inference, as_json=True, annotate=tmp_path / "out")
    with pytest.raises(type(reason)):
        run_detect(request, out)
    assert [json.loads(line)["sequence"] for line in out.getvalue().splitlines()] == [1, 2, 3]
    drawn = tmp_path / "out" / "c.mp4"
    assert not drawn.exists() or 1 <= len(read_one_by_one(drawn)) <= 3


def test_a_picture_that_cannot_be_written_ends_the_work(tmp_path: Path) -> None:
    """The thread that draws reports it, at the latest at the end."""
    picture = ClipPicture(0, "c.mp4", 1, 0.0, None, lambda: pytest.fail("not needed"))
    (tmp_path / "taken.mp4").mkdir()

    def draw_one() -> None:
        with AnnotatedOutput(tmp_path) as output:
            output.add(picture, "taken.mp4", lambda: np.zeros((48, 64, 3), np.uint8))

    with pytest.raises(SourceError, match="cannot be written"):
        draw_one()
