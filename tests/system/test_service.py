"""The whole module, as a process: cameras in, HTTP and messages out, and a clean end."""

import json
import os
import signal
from functools import partial
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from clips import make_clip, make_picture
from edge_runtime.contract import FRAME_KEYS, check_messages
from edge_runtime.runtime import EdgeRuntime
from module_process import ModuleProcess
from rtsp_server import RtspServer
from tiny_models import TinyDetector
from visionedge.app.housekeeping import describe_unwritable_folder
from visionedge.camera.registry import SequencePosition, SequenceStore
from visionedge.ops.manifest.estimate import measure_messages_file


def test_three_kinds_of_cameras_are_analysed_beside_a_failing_one(tmp_path: Path) -> None:
    """A clip, a folder and the demo advance while a camera that cannot be opened says why."""
    clip = make_clip(tmp_path / "yard.mp4", pictures=200)
    (tmp_path / "shots").mkdir()
    for number in range(40):
        make_picture(tmp_path / "shots" / f"{number}.png", number)
    arguments = [
        "--camera",
        f"yard={clip}",
        "--camera",
        f"shots={tmp_path / 'shots'}",
        "--camera",
        "demo=demo:",
    ]
    with ModuleProcess(
        tmp_path / "data", *arguments, "--camera", "gone=rtsp://me:hunter2@127.0.0.1:9/x"
    ) as module:
        module.until(lambda c: all(c[name]["framesAnalysed"] >= 2 for name in ("yard", "shots", "demo")))
        module.until(lambda c: c["gone"]["lastError"] is not None)
        cameras = module.cameras()
        assert cameras["gone"]["state"] == "failed"
        module.until(lambda c: (c["gone"]["nextTrySeconds"] or 0) > 0)
        assert cameras["demo"]["nextTrySeconds"] is None
        assert cameras["yard"]["epoch"] == 1
        assert cameras["yard"]["dropped"].keys() == {"replaced", "stale", "gated", "failed", "discarded"}
        status = module.get("/api/v1/status")
        assert status["engine"]["requested"] == "auto"
        assert status["engine"]["unplannedShapes"] == 0
        assert status["hub"]["state"] == "local"
        assert "hunter2" not in json.dumps(status)
        assert module.stop() == 0
    assert "hunter2" not in module.log
    assert module.log.count("running locally") == 1
    assert "left behind" not in module.log


def test_the_address_is_logged_before_slow_steps(tmp_path: Path) -> None:
    """A first start compiles and measures; whoever waits is told where to look before that."""
    model = TinyDetector().save(tmp_path / "tiny.onnx")
    with ModuleProcess(tmp_path / "data", "--model", str(model), cold=True) as module:
        address = module.ready()
        assert module.stop() == 0
    lines = module.log.splitlines()
    words = (f"open {address} (warming up", "compiling tiny", "measuring this machine", "engine ready: tiny")
    places = [next(n for n, line in enumerate(lines) if word in line) for word in words]
    last = next(n for n, line in enumerate(lines) if f"ready: open {address}" in line)
    assert [*places, last] == sorted({*places, last})


def test_a_configuration_without_cameras_is_reported(tmp_path: Path) -> None:
    """It starts and answers, and the log says why nothing is analysed and what to do."""
    config = tmp_path / "vision.yaml"
    config.write_text("# nothing yet\n")
    model = TinyDetector().save(tmp_path / "tiny.onnx")
    with ModuleProcess(tmp_path / "data", "--config", str(config), "--model", str(model)) as module:
        assert module.get("/api/v1/cameras") == {"cameras": []}
        assert module.stop() == 0
    (line,) = (line for line in module.log.splitlines() if "no camera is configured" in line)
    assert "WARNING" in line
    assert "--camera NAME=URI" in line


def test_a_snapshot_is_the_picture_of_its_frame(tmp_path: Path) -> None:
    """Snapshot and frame tell the same sequence; the picture has the source's size."""
    with ModuleProcess(tmp_path / "data") as module:
        module.until(lambda c: c["demo"]["framesAnalysed"] >= 1)
        frame = module.get("/api/v1/cameras/demo/frame")
        assert set(frame) == FRAME_KEYS
        picture = cv2.imdecode(np.frombuffer(module.raw("/api/v1/cameras/demo/snapshot.jpg"), np.uint8), 1)
        assert picture is not None
        assert picture.shape == (frame["height"], frame["width"], 3)
        assert module.stop(number=signal.SIGINT) == 0


def test_the_messages_file_has_the_messages_of_the_hub_and_numbers_never_repeat(tmp_path: Path) -> None:
    """Two runs, one file: sequences rise over the restart; the run ends by itself after its duration."""
    out = tmp_path / "out.jsonl"
    config = tmp_path / "vision.yaml"
    config.write_text("telemetry: {mode: all, intervalSeconds: 0.2}\ncameras: {dock: {uri: 'demo:'}}\n")
    for _ in range(2):
        arguments = ("--config", str(config), "--messages", str(out), "--duration", "1.5")
        with ModuleProcess(tmp_path / "data", *arguments) as module:
            assert module.wait(60) == 0
    documents = [json.loads(line) for line in out.read_text().splitlines()]
    batches = [d for d in documents if d["schema"] == "visionedge/batch/1"]
    events = [d for d in documents if d["schema"] == "visionedge/event/1"]
    sequences = [frame["sequence"] for batch in batches for frame in batch["frames"]]
    assert len(sequences) > 4
    assert all(a < b for a, b in pairwise(sequences))
    assert {"engine", "camera"} <= {event["kind"] for event in events}
    engine = [event for event in events if event["kind"] == "engine"]
    assert all(len(json.dumps(event)) < 1024 for event in engine), "the plan's table belongs into status"
    assert engine[0]["code"] == engine[0]["details"]["reasonCode"]
    measured = measure_messages_file(out)
    assert measured.frames == {
        "dock": len(sequences)
        - sum(len(first["frames"]) for first in batches if first["messageSequence"] == 1)
    }
    assert 0 < measured.seconds < 30
    assert all(frame["camera"] == "dock" for batch in batches for frame in batch["frames"])


def test_a_lost_rtsp_camera_returns_while_the_others_never_pause(tmp_path: Path) -> None:
    """Killed and started again, the server's camera lives in the next epoch; the others kept their pace."""
    (tmp_path / "a").mkdir()
    make_clip(tmp_path / "a" / "cam.mp4", pictures=60)
    (tmp_path / "b").mkdir()
    make_clip(tmp_path / "b" / "cam.mp4", pictures=60)
    with RtspServer(tmp_path / "a") as first, RtspServer(tmp_path / "b") as second:
        arguments = [f"gate={first.uri('cam.mp4')}", f"yard={second.uri('cam.mp4')}", "demo=demo:"]
        cameras = [word for camera in arguments for word in ("--camera", camera)]
        with ModuleProcess(tmp_path / "data", *cameras) as module:
            module.until(lambda c: all(camera["framesAnalysed"] >= 3 for camera in c.values()))
            first.kill()
            module.until(lambda c: c["gate"]["state"] == "reconnecting")
            before = module.cameras()
            first.start()
            module.until(lambda c: c["gate"]["state"] == "live" and c["gate"]["epoch"] == 2)
            module.until(lambda c: c["gate"]["framesAnalysed"] > before["gate"]["framesAnalysed"])
            after = module.cameras()
            for other in ("yard", "demo"):
                assert after[other]["epoch"] == 1
                assert after[other]["framesAnalysed"] > before[other]["framesAnalysed"]
            assert module.stop() == 0


def test_inside_iot_edge_the_messages_have_the_documented_form(tmp_path: Path, edge_runtime: EdgeRuntime) -> None:
    """Detections and events arrive at the hub; sequences rise per camera; SIGTERM ends it within 5 s."""
    config = tmp_path / "vision.yaml"
    config.write_text(
        "telemetry: {mode: all, intervalSeconds: 0.3}\n"
        "cameras: {dock: {uri: 'demo:'}, gate: {uri: 'demo:', fps: 2}}\n"
    )
    with ModuleProcess(tmp_path / "data", "--config", str(config), environ=edge_runtime.environ) as module:
        edge_runtime.wait_for(lambda got: sum(m.output == "detections" for m in got) >= 4, 60)
        hub = module.get("/api/v1/status")["hub"]
        assert hub["connected"] is True
        assert module.stop() == 0
    messages = edge_runtime.messages
    check_messages(messages)
    assert {m.output for m in messages} == {"detections", "events"}
    assert "left behind" not in module.log


def test_numbers_start_above_the_last_ones_even_when_the_clock_went_back(tmp_path: Path) -> None:
    """Neither a lost file nor a clock that was set back makes a number appear twice."""
    path = tmp_path / "state" / "sequences.json"
    assert SequenceStore(path, lambda: 1000.0).first("dock") == 1_000_000
    SequenceStore(path, lambda: 1000.0).remember({"dock": SequencePosition(1_000_400)})
    assert SequenceStore(path, lambda: 1.0).first("dock") > 1_000_400
    assert SequenceStore(path, lambda: 5000.0).first("dock") == 5_000_000
    path.write_text("{broken")
    assert SequenceStore(path, lambda: 6000.0).first("dock") == 6_000_000


def test_runs_killed_before_they_save_a_number_repeat_none(tmp_path: Path) -> None:
    """One after the other, each some seconds after the last, none of them with the numbers of another."""
    path = tmp_path / "sequences.json"
    SequenceStore(path, lambda: 1000.0).remember({"dock": SequencePosition(1_000_400)})
    firsts = [SequenceStore(path, partial(float, now_s)).first("dock") for now_s in (1010.0, 1020.0, 1090.0)]
    assert firsts == [1_010_000, 1_020_000, 1_090_000]


def test_a_data_folder_of_another_user_is_reported_with_the_remedy() -> None:
    """What a volume made by root looks like to the user of the images."""
    denied = describe_unwritable_folder(Path("/data"), PermissionError(13, "Permission denied"))
    assert denied.startswith("/data cannot be written (Permission denied): no state is kept; give the folder")
    assert denied.endswith(f"chown {os.getuid()}:{os.getgid()} FOLDER")
    assert "chown" not in describe_unwritable_folder(Path("/data"), OSError(28, "No space left on device"))
