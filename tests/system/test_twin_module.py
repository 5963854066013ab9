"""The whole module under the cloud's control: twin, direct methods and pictures of other modules.

The real SDK against the stand-in edge runtime; one module serves most tests, each with versions of its own.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from clips import make_picture
from edge_runtime.broker import ReceivedMessage
from edge_runtime.contract import check_message
from edge_runtime.runtime import EdgeRuntime, PortTakenError
from edge_runtime.twin import check_reported
from model_server import ModelServer, content
from module_process import ModuleProcess
from tiny_models import TinyDetector
from visionedge.camera.sources.images import read_picture_size
from visionedge.iothub.desired_properties import DESIRED_FILE_NAME, DesiredDocument, LastGoodFile
from visionedge.iothub.identity import Identity

LOCAL = """
model: {{path: {folder}/tiny.onnx}}
inference: {{process: false, device: cpu, confidence: 0.01}}
telemetry: {{mode: all, intervalSeconds: 0.2, fillSeconds: 0}}
cameras: {{dock: {{uri: 'demo:', fps: 5}}}}
"""


def write_configuration(folder: Path) -> Path:
    """A local document with a tiny model and one camera."""
    TinyDetector().save(folder / "tiny.onnx")
    path = folder / "vision.yaml"
    path.write_text(LOCAL.format(folder=folder))
    return path


@dataclass
class DeployedModule:
    """A module inside the stand-in runtime."""

    runtime: EdgeRuntime
    module: ModuleProcess

    @property
    def reported(self) -> dict[str, Any]:
        """The reported properties so far."""
        return self.runtime.broker.twin.reported

    def desire(self, patch: dict[str, Any]) -> dict[str, Any]:
        """Change the desired properties; the acknowledgement of that version."""
        version = self.runtime.desire(patch)
        self.runtime.wait_until(lambda: version in self._answered(), 60)
        check_reported(self.reported)
        acknowledgement: dict[str, Any] = self.reported["config"]
        return acknowledgement

    def _answered(self) -> set[int]:
        return {entry["version"] for entry in self.reported.get("config", {}).values()}

    def events(self, code: str) -> list[dict[str, Any]]:
        """The events of a code that have arrived."""
        documents = [m.json() for m in self.runtime.messages if m.output == "events"]
        return [document for document in documents if document["code"] == code]

    def frames(self, camera: str) -> list[dict[str, Any]]:
        """The frame objects of a camera that have arrived, duplicates dropped."""
        once = {m.message_id: m for m in self.runtime.messages if m.output == "detections"}
        return [f for m in once.values() for f in m.json()["frames"] if f["camera"] == camera]

    def wait_for_frame(self, camera: str, after: int = 0) -> None:
        """Wait until a newer frame of a camera has arrived."""
        self.runtime.wait_for(lambda _: any(f["sequence"] > after for f in self.frames(camera)), timeout_s=60)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedModule]:
    """One module for the tests of this file that do not restart it."""
    folder = tmp_path_factory.mktemp("deployed")
    runtime = EdgeRuntime()
    try:
        runtime.start()
    except PortTakenError as error:
        pytest.skip(str(error))
    arguments = ("--config", str(write_configuration(folder)))
    try:
        with ModuleProcess(folder / "data", *arguments, environ=runtime.environ) as module:
            deployed = DeployedModule(runtime, module)
            module.ready()
            deployed.wait_for_frame("dock")
            yield deployed
            assert module.stop(10) == 0
        assert runtime.broker.refusals == []
        assert "Traceback" not in module.log
    finally:
        runtime.stop()


def assert_no_frame_missed(deployed: DeployedModule, camera: dict[str, Any]) -> None:
    """Up to this camera object every frame was sent, or dropped and counted.

    On a busy machine some may be dropped.
    """
    deployed.wait_for_frame(camera["name"], camera["sequence"])
    sequences = [f["sequence"] for f in deployed.frames(camera["name"])][: camera["framesAnalysed"]]
    assert len(sequences) == camera["framesAnalysed"]
    assert all(one < other for one, other in pairwise(sequences))
    dropped = camera["dropped"]
    assert dropped["discarded"] == dropped["failed"] == 0
    assert sequences[-1] - sequences[0] + 1 - len(sequences) <= dropped["replaced"] + dropped["stale"]


# --- desired and reported properties ----------------------------------------------------------------------


def test_the_module_reports_itself(deployed: DeployedModule) -> None:
    """Engine, cameras, model and module, as the contract names them."""
    deployed.runtime.wait_until(lambda: deployed.reported.get("cameras") == {"dock": "live"}, 30)
    deployed.runtime.wait_until(lambda: "effective" in deployed.reported["engine"], 30)
    reported = deployed.reported
    check_reported(reported)
    assert reported["engine"].keys() == {"requested", "effective", "precision", "reasonCode", "since"}
    assert (reported["engine"]["requested"], reported["engine"]["effective"]) == ("cpu", "cpu")
    assert reported["model"]["name"] == "tiny"
    assert len(reported["model"]["sha256"]) == 64
    assert reported["module"].keys() == {"version", "build", "started"}
    assert reported["module"]["build"].startswith(f"{reported['module']['version']}+")


def test_the_precision_is_in_twin_status_and_metrics(deployed: DeployedModule) -> None:
    """`precision: auto` decides on each machine, so the cloud must see the result."""
    deployed.runtime.wait_until(lambda: "precision" in deployed.reported.get("engine", {}), 30)
    assert deployed.reported["engine"]["precision"] == "fp32"
    assert deployed.module.get("/api/v1/status")["engine"]["precision"]["precision"] == "fp32"
    labels = {"device": "cpu", "model": "tiny", "precision": "fp32"}
    assert deployed.module.metric("visionedge_engine_info", **labels) == 1


def test_forty_problems_are_all_reported_and_the_old_configuration_stays_in_force(
    deployed: DeployedModule,
) -> None:
    """In the twin, in an event and in status; no camera is reopened and no frame is missed."""
    wrong: dict[str, Any] = {
        "cameras": {f"c{n}": {"uri": "gopher://h", "fps": 0, "decoder": "x", "colour": 1} for n in range(8)},
        "inference": {"device": "npu", "iou": 2, "maxBatch": 0, "confidance": 1},
        "telemetry": {"mode": "some", "maxPerDay": -1},
        "http": {"port": 70000, "host": ""},
    }
    acknowledgement = deployed.desire(wrong)
    assert acknowledgement.keys() == wrong.keys()
    reasons = [reason for entry in acknowledgement.values() for reason in entry["reasons"]]
    assert len(reasons) == 40
    assert {entry["status"] for entry in acknowledgement.values()} == {"rejected"}
    (event,) = deployed.events("config-rejected")
    assert sorted(event["details"]["problems"]) == sorted(reasons)
    status = deployed.module.get("/api/v1/status")
    assert status["hub"]["config"] == acknowledgement
    (dock,) = status["cameras"]
    assert (dock["name"], dock["epoch"]) == ("dock", 1)
    assert_no_frame_missed(deployed, dock)
    deployed.desire({**dict.fromkeys(wrong), "telemetry": {"mode": "all", "maxPerDay": None}})


def test_a_valid_patch_takes_effect_and_a_removed_key_restores_the_local_value(
    deployed: DeployedModule,
) -> None:
    """One camera more and another rule for telemetry, while the first camera runs on."""
    version = deployed.runtime.broker.twin.desired_version + 1
    acknowledgement = deployed.desire(
        {"cameras": {"yard": {"uri": "demo:", "fps": 2}}, "telemetry": {"mode": "none"}}
    )
    assert acknowledgement == {
        "cameras": {"status": "applied", "version": version},
        "telemetry": {"status": "applied", "version": version},
    }
    deployed.module.until(lambda c: c["yard"]["framesAnalysed"] >= 2)
    deployed.runtime.wait_until(lambda: deployed.reported["cameras"].get("yard") == "live", 30)
    assert deployed.frames("yard") == []
    assert deployed.module.cameras()["dock"]["epoch"] == 1

    deployed.desire({"telemetry": {"mode": None, "maxPerDay": 50000}})
    deployed.wait_for_frame("yard")
    deployed.desire({"cameras": None})
    assert list(deployed.module.cameras()) == ["dock"]
    deployed.runtime.wait_until(lambda: deployed.reported["cameras"].keys() == {"dock"}, 30)
    assert len(deployed.events("config-applied")) >= 3


def test_http_moves_to_the_address_of_the_twin_and_stays_if_it_is_unusable(deployed: DeployedModule) -> None:
    """A port that cannot be had rejects that section alone."""
    acknowledgement = deployed.desire({"http": {"host": "192.0.2.1"}, "telemetry": {"maxPerDay": 40000}})
    assert acknowledgement["http"]["status"] == "rejected"
    assert "cannot listen on 192.0.2.1" in acknowledgement["http"]["reasons"][0]
    assert acknowledgement["telemetry"]["status"] == "applied"
    assert deployed.module.cameras()
    acknowledgement = deployed.desire({"http": {"host": "127.0.0.1"}})
    assert acknowledgement["http"]["status"] == "applied"
    deployed.desire({"http": None})


@pytest.mark.parametrize("forget", [False, True])
def test_after_a_lost_connection_everything_is_received_again(deployed: DeployedModule, forget: bool) -> None:
    """With a session that the hub has lost, too; reported properties are sent again."""
    runtime = deployed.runtime
    patches, connects = len(runtime.broker.twin.patches), runtime.broker.connects
    runtime.faults.forget_sessions = forget
    runtime.lose_sessions()
    runtime.cut()
    runtime.wait_until(lambda: runtime.broker.connects > connects, 30)
    runtime.wait_until(lambda: len(runtime.broker.twin.patches) > patches, 30)
    again = runtime.broker.twin.patches[-1]
    assert again.keys() >= {"engine", "cameras", "model", "module"}
    runtime.faults.end()
    assert runtime.invoke("ping").status == 200
    acknowledgement = deployed.desire({"telemetry": {"maxPerDay": 30000 + connects}})
    assert acknowledgement["telemetry"]["status"] == "applied"


# --- direct methods ---------------------------------------------------------------------------------------


def test_ping_and_status_answer(deployed: DeployedModule) -> None:
    """With the answers of HTTP."""
    ping = deployed.runtime.invoke("ping", {"any": "thing"})
    assert ping.status == 200
    assert ping.payload.keys() == {"version", "at", "uptimeSeconds"}
    status = deployed.runtime.invoke("status")
    assert status.status == 200
    engine = deployed.module.get("/api/v1/status")["engine"]
    del engine["plan"]["measured"]
    assert status.payload["engine"] == engine
    assert status.payload["hub"]["connected"] is True


@pytest.mark.parametrize("payload", [None, {"camera": "dock"}, {"camera": "dock", "annotate": True}])
def test_a_snapshot_is_a_jpeg_that_fits(deployed: DeployedModule, payload: dict[str, Any] | None) -> None:
    """As base64, with the frame that it belongs to; the only camera need not be named."""
    answer = deployed.runtime.invoke("snapshot", payload)
    assert answer.status == 200
    assert len(json.dumps(answer.payload)) <= 128 * 1024
    jpeg = base64.b64decode(answer.payload["jpeg"], validate=True)
    assert read_picture_size(jpeg) == (answer.payload["width"], answer.payload["height"])
    assert cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1) is not None
    assert answer.payload["contentType"] == "image/jpeg"
    assert answer.payload["camera"] == "dock"
    assert answer.payload["sequence"] > 0


@pytest.mark.parametrize(
    ("name", "payload", "status", "code"),
    [
        ("snapshot", {"camera": "attic"}, 404, "unknown_camera"),
        ("snapshot", {"camera": 5}, 400, "bad_payload"),
        ("snapshot", ["dock"], 400, "bad_payload"),
        ("restartCamera", {"camera": "attic"}, 404, "unknown_camera"),
        ("restartCamera", {"name": "dock"}, 400, "bad_payload"),
        ("validateConfig", "text", 400, "bad_payload"),
        ("status", {"verbose": True}, 400, "bad_payload"),
        ("reboot", None, 404, "unknown_method"),
    ],
)
def test_unanswerable_calls_get_an_error_document(
    deployed: DeployedModule, name: str, payload: Any, status: int, code: str
) -> None:
    """As over HTTP."""
    answer = deployed.runtime.invoke(name, payload)
    assert (answer.status, answer.payload["error"]["code"]) == (status, code)
    assert answer.payload["error"]["message"]


def test_a_configuration_is_validated_without_changes(deployed: DeployedModule) -> None:
    """As if it were desired: with the local document below it."""
    before = deployed.module.cameras().keys()
    right = deployed.runtime.invoke(
        "validateConfig", {"cameras": {"dock": {"fps": 1}, "x": {"uri": "demo:"}}}
    )
    assert right.payload == {"valid": True, "count": 0, "problems": []}
    wrong = deployed.runtime.invoke("validateConfig", {"telemtry": {}, "http": {"port": "x"}})
    assert wrong.status == 200
    assert (wrong.payload["valid"], wrong.payload["count"]) == (False, 2)
    assert "telemtry: unknown key; did you mean 'telemetry'?" in wrong.payload["problems"]
    assert deployed.module.cameras().keys() == before


def test_a_camera_is_restarted(deployed: DeployedModule) -> None:
    """Its epoch grows, its numbers go on."""
    before = deployed.module.cameras()["dock"]["epoch"]
    assert deployed.runtime.invoke("restartCamera", {"camera": "dock"}).status == 200
    deployed.module.until(lambda c: c["dock"]["epoch"] == before + 1 and c["dock"]["state"] == "live")
    deployed.wait_for_frame("dock", deployed.frames("dock")[-1]["sequence"])
    frames = deployed.frames("dock")
    assert all(one["sequence"] < other["sequence"] for one, other in pairwise(frames))


# --- pictures of other modules ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_picture_is_answered_on_detections(deployed: DeployedModule, tmp_path: Path, suffix: str) -> None:
    """One frame in a document of the contract, and the id of the question as its correlation id."""
    path = make_picture(tmp_path / f"shot{suffix}", 7)
    question = f"question-{suffix[1:]}"
    deployed.runtime.input("frames", path.read_bytes(), {"$.mid": question, "camera": "press-7"})
    answer = _answer(deployed.runtime, question)
    document = check_message(answer)
    (frame,) = document["frames"]
    assert frame["camera"] == answer.properties["cameras"] == "press-7"
    assert (frame["width"], frame["height"]) == read_picture_size(path.read_bytes())


def test_an_input_that_is_not_a_picture_is_counted_and_reported(
    deployed: DeployedModule, tmp_path: Path
) -> None:
    """Neither it nor many at once keep the next one from its answer."""
    deployed.runtime.input("frames", b"\xff\xd8\xff but no JPEG", {"$.mid": "junk"})
    deployed.runtime.input("frames", b"", {"$.mid": "nothing"})
    deployed.runtime.input("others", b"x", {"$.mid": "elsewhere"})
    right = make_picture(tmp_path / "shot.png", 3).read_bytes()
    deployed.runtime.input("frames", right, {"$.mid": "right"})
    assert _answer(deployed.runtime, "right").json()["frames"][0]["camera"] == "frames"
    pictures = deployed.module.get("/api/v1/status")["hub"]["inputPictures"]
    assert (pictures["dropped"]["bad-picture"], pictures["dropped"]["input"]) == (2, 1)
    deployed.runtime.wait_for(lambda _: len(deployed.events("input-picture-refused")) >= 2, 30)
    reasons = {event["details"]["reason"] for event in deployed.events("input-picture-refused")}
    assert reasons == {"bad-picture", "input"}
    name = "visionedge_input_pictures_dropped_total"
    assert deployed.module.metric(name, reason="bad-picture") == 2


def _answer(runtime: EdgeRuntime, question: str) -> ReceivedMessage:
    """The message that answers a question."""
    got = runtime.wait_for(lambda ms: any(m.correlation_id == question for m in ms), timeout_s=30)
    return next(m for m in got if m.correlation_id == question)


# --- models and restarts ----------------------------------------------------------------------------------


def test_a_model_by_address_takes_over_and_a_wrong_one_is_rejected(
    edge_runtime: EdgeRuntime, tmp_path: Path
) -> None:
    """The twin has its checksum; no frame is missed, no camera is affected, and secrets stay masked."""
    arguments = ("--config", str(write_configuration(tmp_path)))
    data = TinyDetector(seed=1).save(tmp_path / "made.onnx").read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    with ModelServer(tmp_path) as server:
        server.answers["/doors.onnx"] = content(data)
        address = server.url("/doors.onnx?sig=s3cret-signature")
        environ = {**edge_runtime.environ, **server.environ}
        with ModuleProcess(tmp_path / "data", *arguments, environ=environ) as module:
            deployed = DeployedModule(edge_runtime, module)
            deployed.wait_for_frame("dock")
            acknowledgement = deployed.desire({"model": {"url": address, "sha256": "0" * 64}})
            assert acknowledgement["model"]["status"] == "rejected"
            assert module.get("/api/v1/status")["model"]["name"] == "tiny"
            acknowledgement = deployed.desire({"model": {"sha256": sha256}})
            assert acknowledgement["model"]["status"] == "applied"
            edge_runtime.wait_until(lambda: deployed.reported["model"]["sha256"] == sha256, 30)
            deployed.wait_for_frame("dock", deployed.frames("dock")[-1]["sequence"])
            dock = module.cameras()["dock"]
            assert dock["epoch"] == 1
            assert_no_frame_missed(deployed, dock)
            assert {frame["model"] for frame in deployed.frames("dock")} == {"tiny", "doors"}
            assert module.stop(10) == 0
        assert "s3cret-signature" not in module.log + json.dumps(edge_runtime.broker.twin.patches)


def test_a_start_without_a_hub_uses_the_last_good_configuration(
    edge_runtime: EdgeRuntime, tmp_path: Path
) -> None:
    """Not the wrong one that came after it; when the hub is back, all is reported and acknowledged."""
    arguments = ("--config", str(write_configuration(tmp_path)))
    with ModuleProcess(tmp_path / "data", *arguments, environ=edge_runtime.environ) as module:
        deployed = DeployedModule(edge_runtime, module)
        deployed.desire({"cameras": {"yard": {"uri": "demo:", "fps": 2}}})
        wrong = deployed.desire({"telemetry": {"mode": "some"}})
        assert wrong["cameras"]["status"] == "applied"
        assert module.stop(10) == 0

    edge_runtime.hub_down()
    with ModuleProcess(tmp_path / "data", *arguments, environ=edge_runtime.environ) as module:
        deployed = DeployedModule(edge_runtime, module)
        module.until(lambda c: c.get("yard", {}).get("framesAnalysed", 0) >= 1)
        edge_runtime.broker.twin.reported = {}
        edge_runtime.hub_up()
        edge_runtime.wait_until(lambda: "telemetry" in deployed.reported.get("config", {}), 60)
        assert deployed.reported["config"]["telemetry"]["status"] == "rejected"
        assert deployed.reported["config"]["cameras"]["status"] == "applied"
        assert module.stop(10) == 0


def test_the_twin_can_replace_a_model_that_is_missing_at_the_start(
    edge_runtime: EdgeRuntime, tmp_path: Path
) -> None:
    """The module starts with its local document, gets the twin, and reports the missing model."""
    identity = Identity.from_environ(edge_runtime.environ)
    assert identity is not None
    gone: dict[str, Any] = {"model": {"path": str(tmp_path / "gone.onnx")}}
    LastGoodFile(tmp_path / "data" / DESIRED_FILE_NAME, identity.owner).keep(DesiredDocument(1, gone))
    edge_runtime.desire(gone)
    arguments = ("--config", str(write_configuration(tmp_path)))
    with ModuleProcess(tmp_path / "data", *arguments, environ=edge_runtime.environ) as module:
        deployed = DeployedModule(edge_runtime, module)
        module.ready()
        assert "starting without the last good desired properties" in module.log
        edge_runtime.wait_until(lambda: "model" in deployed.reported.get("config", {}), 60)
        assert deployed.reported["config"]["model"]["status"] == "rejected"
        acknowledgement = deployed.desire({"model": None, "telemetry": {"maxPerDay": 5}})
        assert acknowledgement == {
            "telemetry": {"status": "applied", "version": acknowledgement["telemetry"]["version"]}
        }
        assert module.stop(10) == 0
