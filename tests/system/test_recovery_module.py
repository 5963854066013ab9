"""The whole module with four cameras while its device fails in every way: frames continue, it returns.

The device is simulated: a session on the CPU that claims to be CUDA and fails as scripted.
"""

import json
import re
import threading
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fault_script import FaultScript
from module_process import ModuleProcess, assert_every_frame_is_accounted_for, engine_of, metrics_of
from tiny_models import TinyDetector

CONFIG = """
telemetry: {mode: none}
cameras:
  dock: {uri: 'demo:', fps: 8}
  gate: {uri: 'demo:', fps: 8}
  yard: {uri: 'demo:', fps: 5}
  road: {uri: 'demo:', fps: 5}
"""

# The fault, the reason code of the CPU, the kind that is counted, and whether it is counted once.
LOSSES = {
    "sticky": ("cuda-error", "sticky", True),
    "gone": ("no-device", "device-gone", True),
    "nan": ("wrong-rows", "garbage", True),
    "crashed": ("engine-died", "died", True),
    "hang": ("run-timeout", "hang", True),
    "no-memory": ("out-of-memory", "out-of-memory", False),
    "refused": ("device-failed", "refused", False),
}


class HealthPoller:
    """Asks for the health of a module without a pause; `answers` by their status."""

    def __init__(self, url: str) -> None:
        self.answers: Counter[object] = Counter()
        self._url = f"{url}healthz"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "HealthPoller":
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            try:
                with urllib.request.urlopen(self._url, timeout=15) as answer:  # noqa: S310 - http, of this machine
                    self.answers[answer.status] += 1
            except OSError as error:
                self.answers[str(error)] += 1


def until_back(module: ModuleProcess, count: int) -> dict[str, Any]:
    """Wait, frame by frame, until the device has returned so often; returns the engine in status."""
    for _ in range(400):
        engine = engine_of(module)
        if engine["recovery"]["changeOvers"] == count:
            return engine
        after = module.cameras()["dock"]["sequence"]
        module.get(f"/api/v1/cameras/dock/frame?after={after}&timeout=1")
    raise AssertionError(module.log)


@pytest.mark.timeout(600)  # a dozen processes start, one after the other
@pytest.mark.parametrize("names", [("sticky", "gone", "nan", "crashed"), ("hang", "no-memory", "refused")])
def test_a_device_lost_by_any_fault_returns_while_the_module_runs(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Each loss is reported once in log, events and metrics; no camera reconnects, and all counts add up."""
    faults = FaultScript(tmp_path, run_s=5.0)
    (tmp_path / "vision.yaml").write_text(CONFIG)
    model = TinyDetector().save(tmp_path / "tiny.onnx")
    arguments = ["--config", tmp_path / "vision.yaml", "--model", model, "--messages", tmp_path / "out.jsonl"]
    environ = {"VISIONEDGE_INJECT_FAULTS": "1"}
    words = [str(word) for word in (*arguments, "--inject", faults.path)]
    with ModuleProcess(tmp_path / "data", *words, environ=environ) as module:
        with HealthPoller(module.ready()) as asking:
            module.until(lambda c: all(camera["framesAnalysed"] >= 3 for camera in c.values()))
            assert (engine_of(module)["requested"], engine_of(module)["effective"]) == ("auto", "cuda")
            for number, name in enumerate(names, 1):
                lose_and_return(module, faults, name, number)
            assert {camera["epoch"] for camera in module.cameras().values()} == {1}
            assert_every_frame_is_accounted_for(module)
        assert set(asking.answers) == {200}
        assert module.stop() == 0
    documents = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    codes = Counter(event["code"] for event in documents if event["kind"] == "engine")
    del codes["ok"]
    codes.pop("plan-narrowed", None)  # one or more, before memory does not even suffice for one picture
    assert codes == {"device-lost": len(names), "engine-back": len(names), "device-back": len(names)}
    assert module.log.count("cuda is lost: ") == len(names)
    assert "left behind" not in module.log


def lose_and_return(module: ModuleProcess, faults: FaultScript, name: str, number: int) -> None:
    """One fault: the CPU takes over for its reason, all cameras go on; lifted, the device is used again."""
    code, kind, once = LOSSES[name]
    faults.begin(name, "absent")
    module.wait_for_log(re.compile(rf"INFO .*the engine is back .* effective cpu: .*\({code}\)"), 120)
    seen = module.cameras()
    module.until(lambda c: all(c[n]["framesAnalysed"] >= seen[n]["framesAnalysed"] + 3 for n in c))
    engine = engine_of(module)
    assert (engine["effective"], engine["reasonCode"], engine["degraded"]) == ("cpu", code, True)
    assert module.get("/api/v1/cameras/dock/frame")["device"] == "cpu"
    assert module.get("/readyz")["engine"]["degraded"] is True
    samples = metrics_of(module)
    assert samples["engine_recovering"] == 1
    counted = samples[f'engine_faults_total{{fault="{kind}"}}']
    assert counted == 1 if once else counted >= 1
    faults.end(name, "absent")
    engine = until_back(module, number)
    assert (engine["effective"], engine["reasonCode"]) == ("cuda", "ok")
    on_frames = engine["parity"][-1]
    assert (on_frames["on"], on_frames["pictures"], on_frames["refusal"]) == ("frames", 4, None)
    seen = module.cameras()
    module.until(lambda c: all(c[n]["framesAnalysed"] >= seen[n]["framesAnalysed"] + 3 for n in c))


def test_exit_ends_the_module_with_3_when_its_device_is_lost(tmp_path: Path) -> None:
    """`inference.fallback: exit`, and the event is still written."""
    faults = FaultScript(tmp_path)
    (tmp_path / "vision.yaml").write_text(CONFIG + "inference: {fallback: exit}\n")
    model = TinyDetector().save(tmp_path / "tiny.onnx")
    arguments = ["--config", tmp_path / "vision.yaml", "--model", model, "--messages", tmp_path / "out.jsonl"]
    environ = {"VISIONEDGE_INJECT_FAULTS": "1"}
    words = [str(word) for word in (*arguments, "--inject", faults.path)]
    with ModuleProcess(tmp_path / "data", *words, environ=environ) as module:
        module.until(lambda c: c["dock"]["framesAnalysed"] >= 1)
        faults.begin("sticky")
        assert module.wait(60) == 3
    assert module.log.count("ending with exit code 3") == 1
    events = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [event["code"] for event in events if event["kind"] == "engine"] == ["ok", "device-lost"]


def test_faults_are_injected_only_where_that_is_allowed(tmp_path: Path) -> None:
    """Without the variable the argument does not exist; an invalid script gives a one-line error."""
    with ModuleProcess(tmp_path / "data", "--inject", "x.yaml") as module:
        assert module.wait(60) == 2
    assert "unrecognized arguments: --inject x.yaml" in module.log
    (tmp_path / "x.yaml").write_text("faults: [{at: nowhere}]\n")
    environ = {"VISIONEDGE_INJECT_FAULTS": "1"}
    with ModuleProcess(tmp_path / "data", "--inject", str(tmp_path / "x.yaml"), environ=environ) as module:
        assert module.wait(60) == 2
    assert "faults.0.at: " in module.log
    assert "Traceback" not in module.log
