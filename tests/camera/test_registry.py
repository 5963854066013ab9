"""Cameras are added, changed and removed while the module runs, without an effect on the others."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from camera_doubles import SPEC, FrameRecorder, StatusRecorder
from clips import make_clip
from visionedge.camera.camera import CameraStatus, InputResizer
from visionedge.camera.registry import FORGET_AFTER_NS, CameraRegistry
from visionedge.camera.timing import Throttle
from visionedge.config.load import parse_config
from visionedge.config.schema import Config
from visionedge.frames.types import Frame, InputSpec
from visionedge.runtime.threads import ThreadGroup


class SlotRecorder(FrameRecorder):
    """A basket that knows which cameras are open."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.forgotten: list[str] = []

    def open(self, camera: str) -> None:
        self.opened.append(camera)

    def close_camera(self, camera: str) -> None:
        self.opened.remove(camera)

    def forget(self, camera: str) -> None:
        self.forgotten.append(camera)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a minute, so that none ends within a test."""
    return make_clip(tmp_path_factory.mktemp("clips") / "long.mp4", pictures=1200, fps=40)


@contextmanager
def running(
    slots: SlotRecorder,
    on_change: Callable[[CameraStatus], None],
    clock: Callable[[], int] = time.monotonic_ns,
    last_epoch: int = 0,
    *,
    start_paused: bool = False,
) -> Iterator[CameraRegistry]:
    thread_group = ThreadGroup(lambda name, error: pytest.fail(f"{name} died: {error}"))
    camera_registry = CameraRegistry(
        [InputResizer(SPEC)],
        slots,
        thread_group,
        first_sequence=lambda _name: 100,
        on_change=on_change,
        last_epoch=lambda _name: last_epoch,
        clock=clock,
        start_paused=start_paused,
    )
    try:
        yield camera_registry
    finally:
        camera_registry.stop()
        assert thread_group.join(5) == []


def _config(cameras: dict[str, object]) -> Config:
    return parse_config({"cameras": cameras})


def _of(frames: list[Frame], camera: str) -> list[Frame]:
    return [f for f in frames if f.camera == camera]


def test_cameras_are_added_changed_disabled_and_removed_without_touching_the_others(clip: Path) -> None:
    slots, changes = SlotRecorder(), StatusRecorder()
    dock = {"uri": str(clip)}
    with running(slots, changes) as camera_registry:
        camera_registry.apply(_config({"dock": dock, "yard": dock}).cameras)
        slots.wait_for(lambda f: len(_of(f, "dock")) > 3 and len(_of(f, "yard")) > 3)
        untouched = camera_registry.by_name["dock"]

        camera_registry.apply(_config({"dock": dock, "yard": dock | {"fps": 20}, "gate": dock}).cameras)
        slots.wait_for(lambda f: any(x.epoch == 2 for x in _of(f, "yard")) and bool(_of(f, "gate")))

        camera_registry.apply(_config({"dock": dock, "yard": dock | {"enabled": False}}).cameras)
        assert slots.opened == ["dock"]
        assert list(camera_registry.by_name) == ["dock"]
        gone = len(slots.frames)
        frames = slots.wait_for(lambda f: len(_of(f[gone:], "dock")) > 10)
        assert {x.camera for x in frames[gone:]} == {"dock"}

        assert camera_registry.by_name["dock"] is untouched
        assert {x.epoch for x in _of(frames, "dock")} == {1}


def test_sequence_numbers_and_epochs_continue_over_changes_and_absence(clip: Path) -> None:
    slots = SlotRecorder()
    with running(slots, StatusRecorder()) as camera_registry:
        for fps in (10, 20, 30):
            camera_registry.apply(_config({"dock": {"uri": str(clip), "fps": fps}}).cameras)
            epoch = {10: 1, 20: 2, 30: 3}[fps]
            slots.wait_for(lambda f, epoch=epoch: any(x.epoch == epoch for x in f))  # type: ignore[misc]  # a default
            if fps == 20:
                camera_registry.apply({})
                assert camera_registry.positions()["dock"].sequence > 100
    numbers = [frame.sequence for frame in slots.frames]
    assert numbers == list(range(100, 100 + len(numbers)))
    assert [frame.epoch for frame in slots.frames] == sorted(frame.epoch for frame in slots.frames)


def test_the_end_of_a_replaced_camera_is_not_reported(clip: Path) -> None:
    """The removal is an event; the camera itself reports none."""
    slots, changes = SlotRecorder(), StatusRecorder()
    with running(slots, changes) as camera_registry:
        camera_registry.apply(_config({"dock": {"uri": str(clip)}}).cameras)
        changes.wait_for("live")
        camera_registry.apply(_config({"dock": {"uri": str(clip), "fps": 5}}).cameras)
        slots.wait_for(lambda f: any(x.epoch == 2 for x in f))
        assert changes.states == ["live", "live"]
        camera_registry.apply({})
        changes.wait_for("stopped")


def test_a_configured_gate_skips_still_pictures(tmp_path: Path) -> None:
    still = make_clip(tmp_path / "still.mp4", pictures=80, fps=20, still=True)
    slots, changes = SlotRecorder(), StatusRecorder()
    with running(slots, changes) as camera_registry:
        camera_registry.apply(_config({"dock": {"uri": str(still), "gate": {"everySeconds": 1}}}).cameras)
        changes.wait_for("ended")
    assert slots.gated > 20
    assert len(slots.frames) + slots.gated == 80


def test_a_restarted_camera_begins_a_new_epoch_and_continues_its_numbers(clip: Path) -> None:
    slots = SlotRecorder()
    with running(slots, StatusRecorder()) as camera_registry:
        camera_registry.apply(_config({"dock": {"uri": str(clip)}, "yard": {"uri": str(clip)}}).cameras)
        slots.wait_for(lambda f: len(_of(f, "dock")) > 3)
        untouched = camera_registry.by_name["yard"]

        camera_registry.restart("dock")

        frames = _of(slots.wait_for(lambda f: any(x.epoch == 2 for x in _of(f, "dock"))), "dock")
        numbers = [frame.sequence for frame in frames]
        assert numbers == list(range(100, 100 + len(numbers)))
        assert camera_registry.by_name["yard"] is untouched
        with pytest.raises(KeyError):
            camera_registry.restart("attic")


def test_a_file_that_has_ended_is_played_again_by_a_restart(tmp_path: Path) -> None:
    short = make_clip(tmp_path / "short.mp4", pictures=10, fps=20)
    slots, changes = SlotRecorder(), StatusRecorder()
    with running(slots, changes) as camera_registry:
        camera_registry.apply(_config({"dock": {"uri": str(short)}}).cameras)
        changes.wait_for("ended")
        camera_registry.restart("dock")
        frames = slots.wait_for(lambda f: len([x for x in f if x.epoch == 2]) == 10)
    assert [frame.epoch for frame in frames] == [1] * 10 + [2] * 10


def test_a_throttle_survives_unchanged_settings_and_a_reopened_camera(clip: Path) -> None:
    slots = SlotRecorder()
    cameras: dict[str, object] = {"dock": {"uri": str(clip)}, "yard": {"uri": str(clip)}}
    with running(slots, StatusRecorder()) as camera_registry:
        camera_registry.apply(_config(cameras).cameras)
        camera_registry.throttle({"dock": Throttle(fps=2)})
        slots.wait_for(lambda f: len(_of(f, "yard")) > 10)
        camera_registry.apply(_config(cameras).cameras)
        slots.wait_for(lambda f: len(_of(f, "yard")) > 50)
        assert {x.epoch for x in slots.frames} == {1}
        assert len(_of(slots.frames, "dock")) <= 8

        camera_registry.apply(_config({**cameras, "dock": {"uri": str(clip), "fps": 30}}).cameras)
        slots.wait_for(lambda f: any(x.epoch == 2 for x in _of(f, "dock")))
        first = len(_of(slots.frames, "yard"))
        slots.wait_for(lambda f: len(_of(f, "yard")) > first + 40)
        assert len([x for x in _of(slots.frames, "dock") if x.epoch == 2]) <= 6
        counts = camera_registry.counts()["dock"]
        assert counts.demanded > 3 * counts.admitted > 0

        camera_registry.throttle({})
        slots.wait_for(lambda f: len([x for x in _of(f, "dock") if x.epoch == 2]) > 20)


def test_a_new_priority_does_not_reopen_the_camera(clip: Path) -> None:
    slots = SlotRecorder()
    with running(slots, StatusRecorder()) as camera_registry:
        camera_registry.apply(_config({"dock": {"uri": str(clip)}}).cameras)
        slots.wait_for(lambda f: len(f) > 3)
        camera = camera_registry.by_name["dock"]
        camera_registry.apply(_config({"dock": {"uri": str(clip), "priority": 7}}).cameras)
        assert camera_registry.by_name["dock"] is camera
        camera_registry.apply(_config({"dock": {"uri": str(clip), "priority": 7, "fps": 20}}).cameras)
        assert camera_registry.by_name["dock"] is not camera


def test_a_file_waits_for_the_engine_and_then_plays_from_its_beginning(tmp_path: Path) -> None:
    """Also one that is added meanwhile; one that is added later plays at once."""
    short = str(make_clip(tmp_path / "short.mp4", pictures=10, fps=20))
    slots, changes = SlotRecorder(), StatusRecorder()
    with running(slots, changes, start_paused=True) as camera_registry:
        camera_registry.apply(_config({"a": {"uri": short}}).cameras)
        camera_registry.apply(_config({"a": {"uri": short}, "b": {"uri": short}}).cameras)
        while changes.states.count("waiting") < 2:
            changes.wait_for("waiting")
        assert slots.frames == []
        camera_registry.begin()
        slots.wait_for(lambda f: len(_of(f, "a")) == len(_of(f, "b")) == 10)
        camera_registry.apply(
            _config({"a": {"uri": short}, "b": {"uri": short}, "c": {"uri": short}}).cameras
        )
        slots.wait_for(lambda f: len(_of(f, "c")) == 10)
    assert changes.states.count("waiting") == 2


def test_a_waiting_file_can_be_removed(clip: Path) -> None:
    slots, changes = SlotRecorder(), StatusRecorder()
    with running(slots, changes, start_paused=True) as camera_registry:
        camera_registry.apply(_config({"a": {"uri": str(clip)}}).cameras)
        changes.wait_for("waiting")
        camera_registry.apply({})
        changes.wait_for("stopped")
    assert slots.frames == []


def test_a_looped_file_continues_in_the_same_epoch(tmp_path: Path) -> None:
    """Its numbers continue, and its end is not reported."""
    short = str(make_clip(tmp_path / "short.mp4", pictures=5, fps=25))
    slots, changes = SlotRecorder(), StatusRecorder()
    with running(slots, changes) as camera_registry:
        camera_registry.apply(_config({"a": {"uri": short, "loop": True}}).cameras)
        frames = slots.wait_for(lambda f: len(f) > 12)
    assert [frame.sequence for frame in frames] == list(range(100, 100 + len(frames)))
    assert {frame.epoch for frame in frames} == {1}
    assert changes.states == ["live", "stopped"]


def test_a_removed_camera_is_forgotten_after_an_hour(clip: Path) -> None:
    """A disabled camera keeps its counters; one that returns continues with the numbers on disk."""
    slots, now_ns = SlotRecorder(), 0
    with running(slots, StatusRecorder(), clock=lambda: now_ns, last_epoch=7) as camera_registry:
        dock, off = {"uri": str(clip)}, {"uri": str(clip), "enabled": False}
        camera_registry.apply(_config({"dock": dock, "yard": dock}).cameras)
        slots.wait_for(lambda f: bool(_of(f, "dock")))
        left = _config({"yard": off}).cameras
        camera_registry.apply(left)
        now_ns = FORGET_AFTER_NS - 1
        assert camera_registry.forget_removed(left) == []
        assert camera_registry.positions()["dock"].sequence > 100
        now_ns = FORGET_AFTER_NS
        assert camera_registry.forget_removed(left) == ["dock"]
        assert (slots.forgotten, list(camera_registry.positions())) == (["dock"], ["yard"])
        camera_registry.apply(_config({"dock": dock}).cameras)
        slots.wait_for(lambda f: any(frame.epoch == 8 for frame in _of(f, "dock")[1:]))


def test_a_camera_waits_for_its_model_and_changes_it_without_a_new_connection(clip: Path) -> None:
    slots = SlotRecorder()
    dock: dict[str, object] = {"uri": str(clip)}
    config = parse_config(
        {"cameras": {"dock": dock, "yard": dock | {"model": "small"}}, "models": {"small": {}, "other": {}}}
    )
    with running(slots, StatusRecorder()) as camera_registry:
        camera_registry.apply(config.cameras)
        slots.wait_for(lambda f: len(_of(f, "dock")) > 3)
        assert list(camera_registry.by_name) == ["dock"]
        assert camera_registry.waits_for_model("yard")

        small = InputResizer(InputSpec(32, 24), model="small")
        camera_registry.change_input(small)
        frames = slots.wait_for(lambda f: len(_of(f, "yard")) > 3)
        assert not camera_registry.waits_for_model("yard")
        assert {(f.model, f.spec) for f in _of(frames, "yard")} == {("small", small.spec)}
        assert {(f.model, f.spec) for f in _of(frames, "dock")} == {("", SPEC)}

        wanted = config.cameras["dock"].model_copy(update={"model": "other"})
        camera_registry.apply({**config.cameras, "dock": wanted})
        assert camera_registry.waits_for_model("dock"), "it keeps the model that it has meanwhile"
        camera_registry.change_input(InputResizer(InputSpec(16, 16), model="other"))
        frames = slots.wait_for(lambda f: any(x.model == "other" for x in _of(f, "dock")))
        numbers = [f.sequence for f in _of(frames, "dock")]
        assert numbers == list(range(100, 100 + len(numbers)))
        assert {f.epoch for f in frames} == {1}
