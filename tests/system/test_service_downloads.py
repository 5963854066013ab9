"""The whole module with a model by address, as a process: waiting for it, having it, keeping it."""

import hashlib
import json
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from model_server import ModelServer, content, hanging, in_turn, status
from module_process import ModuleProcess
from tiny_models import TinyDetector

_LISTENS = re.compile(r"model is downloaded first; (http://\S+/)readyz")
SECRET = "s3cret-signature"


def configuration(folder: Path, url: str, data: bytes) -> tuple[str, ...]:
    """Arguments for a module with one camera and this model."""
    document = {
        "cameras": {"demo": {"uri": "demo:", "fps": 5}},
        "model": {"url": f"{url}?sig={SECRET}", "sha256": hashlib.sha256(data).hexdigest()},
        "inference": {"device": "cpu", "process": False},
    }
    path = folder / "vision.json"
    path.write_text(json.dumps(document))
    return ("--config", str(path), "--messages", str(folder / "messages.jsonl"))


def ask(address: str) -> tuple[int, Any]:
    """The status and the document that a path answers."""
    try:
        with urllib.request.urlopen(address, timeout=15) as answer:  # noqa: S310 - http, of the module's own log
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_module_waits_for_its_model_and_keeps_it(tmp_path: Path) -> None:
    """HTTP answers meanwhile and says what is missing; the next start needs no network."""
    TinyDetector().save(tmp_path / "made.onnx")
    data = (tmp_path / "made.onnx").read_bytes()
    arrived = threading.Event()
    with ModelServer(tmp_path) as server:
        server.answers["/dock-doors.onnx"] = in_turn(
            status(503), lambda request: (arrived.wait(60), content(data)(request))[1]
        )
        arguments = configuration(tmp_path, server.url("/dock-doors.onnx"), data)
        with ModuleProcess(tmp_path / "data", *arguments, environ=server.environ) as module:
            address = module.wait_for_log(_LISTENS)[1]
            server.wait_for_requests(2)  # the first one is refused
            code, ready = ask(f"{address}readyz")
            assert (code, ready["status"]) == (503, "not_ready")
            assert ready["reasons"] == [
                "cannot download the model, retrying: "
                f"{server.url('/dock-doors.onnx')}?…: the server answers 503 Service Unavailable"
            ]
            assert ask(f"{address}healthz")[0] == 200
            seen = ask(f"{address}api/v1/status")[1]
            assert seen["model"] is None
            assert seen["fetching"] == ready["reasons"][0]
            assert seen["cameras"][0]["state"] == "waiting"
            arrived.set()
            module.until(lambda c: c["demo"]["framesAnalysed"] >= 2)
            assert module.get("/api/v1/cameras/demo/frame")["model"] == "dock-doors"
            assert module.get("/api/v1/status")["fetching"] is None
            assert module.stop(20) == 0
        assert SECRET not in module.log
    told = (tmp_path / "messages.jsonl").read_text()
    assert '"model-waiting"' in told
    assert SECRET not in told
    with ModuleProcess(tmp_path / "data", *arguments) as module:
        module.until(lambda c: c["demo"]["framesAnalysed"] >= 1)
        assert module.stop(20) == 0


def test_a_waiting_module_can_be_stopped_and_refuses_an_invalid_model(tmp_path: Path) -> None:
    """SIGTERM needs no model; a file that has the right sum and is no model is a wrong configuration."""
    data = b"no model" * 100
    with ModelServer(tmp_path) as server:
        server.answers["/m.onnx"] = hanging
        arguments = configuration(tmp_path, server.url("/m.onnx"), data)
        with ModuleProcess(tmp_path / "data", *arguments, environ=server.environ) as module:
            server.wait_for_requests(1)
            assert module.stop(20) == 0
            assert "left behind" not in module.log
        server.answers["/m.onnx"] = content(data)
        with ModuleProcess(tmp_path / "data", *arguments, environ=server.environ) as module:
            assert module.wait(60) == 2
            last = module.log.splitlines()[-1]
    assert f"{server.url('/m.onnx')}?…: is no ONNX file" in last
    assert SECRET not in module.log


def test_the_first_line_of_run_is_its_address_before_the_model_arrives(tmp_path: Path) -> None:
    """The server of the model takes the request and never answers, so nothing is loaded yet."""
    with ModelServer(tmp_path) as server:
        server.answers["/m.onnx"] = hanging
        arguments = configuration(tmp_path, server.url("/m.onnx"), b"never sent")
        with ModuleProcess(tmp_path / "data", *arguments, environ=server.environ) as module:
            server.wait_for_requests(1)
            address = module.wait_for_log(re.compile(r"\bopen (http://\S+/)"))[1]
            assert f"open {address} (warming up" in module.log.splitlines()[0]
            assert ask(f"{address}healthz")[0] == 200
            assert ask(f"{address}readyz")[0] == 503
            assert module.stop(20) == 0
    assert "ready: open" not in module.log
