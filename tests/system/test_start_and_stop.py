"""The life of the module as a process: starts that fail, reloads, and stops that are kept to their time."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from camera_doubles import SPEC, FrameRecorder
from model_server import ModelServer, status
from module_process import ModuleProcess
from telemetry_harness import PERSON_BOX, TelemetryHarness
from tiny_models import TinyDetector
from visionedge.app.http_backend import HttpBackend
from visionedge.app.hub_bridge import HubBridge
from visionedge.app.metrics import Metrics
from visionedge.app.scene_host import SceneHost
from visionedge.app.service import STOP_TIMEOUT_S, RunOptions, Service
from visionedge.app.state import AppState
from visionedge.camera.camera import Camera, CameraState, CameraStatus
from visionedge.config.load import parse_config
from visionedge.engine.lanes import LanePool
from visionedge.iothub.client import LinkTask
from visionedge.iothub.desired_properties import ConfigurationSources
from visionedge.iothub.sdk import MethodCall
from visionedge.runtime.threads import ThreadGroup


def _write(folder: Path, **sections: Any) -> Path:
    """A configuration with a small model and one camera."""
    model = folder / "small.onnx"
    if not model.exists():
        TinyDetector().save(model)
    document = {
        "cameras": {"demo": {"uri": "demo:", "fps": 5}},
        "model": {"path": str(model)},
        "inference": {"device": "cpu", "process": False},
        **sections,
    }
    path = folder / "vision.json"
    path.write_text(json.dumps(document))
    return path


def test_a_port_in_use_gives_a_one_line_error_before_slow_steps(tmp_path: Path) -> None:
    """Nothing was started, so no stop is logged."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ("--config", str(_write(tmp_path)), "--http", f"127.0.0.1:{port}")
        with ModuleProcess(tmp_path / "data", *arguments) as module:
            assert module.wait(30) == 3
        lines = module.log.splitlines()
    assert len(lines) == 1
    assert f"cannot listen on 127.0.0.1:{port}: the port is in use" in lines[0]


def test_the_duration_ends_a_module_whose_model_never_arrives(tmp_path: Path) -> None:
    """Counted from when it began to wait."""
    with ModelServer(tmp_path) as server:
        server.answers["/never.onnx"] = status(503)
        model = {"url": server.url("/never.onnx"), "sha256": "0" * 64}
        arguments = ("--config", str(_write(tmp_path, model=model)), "--duration", "1")
        with ModuleProcess(tmp_path / "data", *arguments, environ=server.environ) as module:
            assert module.wait(30) == 0
    assert "the duration is over, and the module was not ready" in module.log


def test_sighup_reloads_the_file_and_a_wrong_one_changes_nothing(tmp_path: Path) -> None:
    path = _write(tmp_path)
    with ModuleProcess(tmp_path / "data", "--config", str(path)) as module:
        module.ready()
        _write(tmp_path, cameras={"other": {"uri": "demo:", "fps": 5}})
        os.kill(module.pid, signal.SIGHUP)
        module.wait_for_log(re.compile("the configuration file is applied: cameras"))
        assert list(module.cameras()) == ["other"]
        path.write_text('{"cameras": {"third": {"uri": "demo:", "fsp": 5}}}')
        os.kill(module.pid, signal.SIGHUP)
        module.wait_for_log(re.compile(r"the configuration file is not used: \d+ problems?"))
        assert "cameras.third.fsp" in module.log
        path.write_text("{")
        os.kill(module.pid, signal.SIGHUP)
        module.wait_for_log(re.compile("is not valid JSON"))
        assert list(module.cameras()) == ["other"]
        assert module.stop(10) == 0


def test_sighup_without_a_file_is_only_logged(tmp_path: Path) -> None:
    TinyDetector().save(tmp_path / "small.onnx")
    arguments = ("--camera", "demo=demo:", "--model", str(tmp_path / "small.onnx"), "--device", "cpu")
    with ModuleProcess(tmp_path / "data", *arguments, environ={"VISIONEDGE_CONFIG": ""}) as module:
        module.ready()
        os.kill(module.pid, signal.SIGHUP)
        module.wait_for_log(re.compile("SIGHUP: there is no configuration file to read again"))
        assert module.stop(10) == 0


@pytest.mark.parametrize("damage", ["[", '{"dock": 1e999}', "[" * 5000, "\0"])
def test_damaged_state_files_are_reported_and_the_module_runs(tmp_path: Path, damage: str) -> None:
    """The event names the file; its content is kept beside it."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "sequences.json").write_text(damage)
    leftovers = [data / "half.new", data / ".half.json.0f0f0f0f.part"]
    for leftover in leftovers:
        leftover.touch()
    events = tmp_path / "events.jsonl"
    arguments = ("--config", str(_write(tmp_path)), "--messages", str(events))
    with ModuleProcess(data, *arguments) as module:
        module.ready()
        assert module.stop(10) == 0
    event_documents = [json.loads(line) for line in events.read_text().splitlines()]
    lost = [each for each in event_documents if each.get("code") == "state-lost"]
    assert [each["details"]["file"] for each in lost] == ["sequences.json"]
    assert (data / "sequences.json.aside").read_text() == damage
    assert not [leftover for leftover in leftovers if leftover.exists()]
    assert "Traceback" not in module.log


HANGING = """
    import asyncio, sys, threading
    from pathlib import Path
    import visionedge.app.service as service
    from visionedge.iothub.desired_properties import ConfigurationSources

    class Hanging(service.Service):
        async def _start_cameras_and_engines(self, *_):
            if sys.argv[2] == "executor":
                asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
            else:
                self._thread_group.start("hangs", threading.Event().wait)
                self._sequences.remember = lambda _last: threading.Event().wait()
            await asyncio.sleep(0.1)
            self._exit_code = 7
            self._stop()

    service.Service = Hanging
    service.STOP_TIMEOUT_S = 4.0
    document = {"inference": {"process": False, "device": "cpu"}, "http": {"port": 0}}
    options = service.RunOptions(ConfigurationSources.read(document), Path(sys.argv[1]), environ={})
    sys.exit(service.run(options))
"""


@pytest.mark.parametrize("what", ["executor", "thread"])
def test_a_stop_does_not_wait_for_hanging_parts(tmp_path: Path, what: str) -> None:
    """It ends by itself, with its normal exit code."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANGING), str(tmp_path), what],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "module")},
        timeout=60,
        check=False,
    )
    assert done.returncode == 7
    assert STOP_TIMEOUT_S == 10


def test_a_thousand_concurrent_calls_are_all_answered(tmp_path: Path) -> None:
    """Calls beyond the limit are refused at once; none is lost."""
    statuses: list[int] = []

    class StubLink:
        def answer(self, _request: str, status_code: int, _document: Any) -> None:
            statuses.append(status_code)

    class StubHubBridge(HubBridge):
        def _submit_link_task(self, link_task: LinkTask) -> None:
            link_task.do(StubLink())  # type: ignore[arg-type]  # the half of a link that answers
            link_task.done("taken")

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        state = AppState.of(parse_config({}), tmp_path, {}, lambda: None)
        lanes = LanePool(state.batcher, ThreadGroup(lambda *_: None), lambda _item: None)

        def call_soon(work: Callable[[], None]) -> None:
            loop.call_soon_threadsafe(work)

        remote = StubHubBridge(
            state,
            HttpBackend(
                state.snapshot,
                lanes,
                Metrics(lambda: ()),
                SceneHost(state.snapshot, tmp_path, ThreadGroup(lambda *_: None), deliver=lambda _: None),
            ),
            call_soon,
            ConfigurationSources.read({}),
            cancel_pending_model=lambda: None,
            first_sequence=1,
        )

        def call_all() -> None:
            for number in range(1000):
                remote.on_method_call(MethodCall("ping", None, str(number), 1))

        calling = threading.Thread(target=call_all)
        calling.start()
        async with asyncio.timeout(30):
            while len(statuses) < 1000:  # noqa: ASYNC110 - they come by callbacks, one by one
                await asyncio.sleep(0.001)
        calling.join()
        assert remote.statistics().calls_dropped == 0
        await remote.close()

    asyncio.run(scenario())
    assert len(statuses) == 1000
    assert set(statuses) <= {200, 503}
    assert 200 in statuses


def test_the_metric_series_of_a_removed_camera_end() -> None:
    """The series of its metrics end; a camera without series is no error."""
    harness = TelemetryHarness()
    metrics = Metrics(lambda: ())
    for name in ("dock", "yard"):
        metrics.observe(harness.result([PERSON_BOX], camera=name))
    metrics.forget("dock")
    metrics.forget("never")
    text = metrics.render().decode()
    assert 'camera="yard"' in text
    assert 'camera="dock"' not in text


def test_a_result_that_cannot_be_handled_does_not_stop_later_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repeated error ends the module."""

    class FailingMetrics:
        def __init__(self) -> None:
            self.taken: list[str] = []

        def event(self, _kind: str, code: str, _text: str, _details: Any) -> None:
            if code == "stale":
                raise TypeError("no such thing")
            self.taken.append(code)

    document = {"inference": {"process": False, "device": "cpu"}, "http": {"port": 0}}
    service = Service(RunOptions(ConfigurationSources.read(document), tmp_path, environ={}))
    monkeypatch.setattr(service, "_call_soon", lambda _call: None)  # there is no loop
    delivery = FailingMetrics()
    service.state.set_delivery(delivery)  # type: ignore[arg-type]  # the half that is used
    for state in ("live", "stale", "frozen"):
        service.state.loop_queue.put(_status(state))
    service.drain_queue()
    assert delivery.taken == ["live", "frozen"]
    assert not service.state.snapshot().failed
    for _ in range(60):
        service.state.loop_queue.put(_status("stale"))
    service.drain_queue()
    assert service.state.snapshot().failed


def _status(state: CameraState) -> CameraStatus:
    camera = Camera("dock", "demo:", SPEC, FrameRecorder())
    return replace(camera.status(), state=state)
