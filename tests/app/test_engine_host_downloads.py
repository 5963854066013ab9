"""Models by address while cameras run: what can be had takes over, what cannot changes nothing."""

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from clips import make_clip
from engine_host_harness import EngineHostHarness, document, results_of, run_scenario
from model_server import Answer, ModelServer, content, cut, endless, hanging, redirect, status
from tiny_models import TinyDetector, classifier
from visionedge.config.load import parse_config
from visionedge.engine.batcher import DropReason
from visionedge.iothub.delivery import Delivery
from visionedge.model.download import MODELS_FOLDER, DownloadRetryPolicy, DownloadTimeouts
from visionedge.runtime.threads import ThreadGroup

pytestmark = pytest.mark.system

IMPATIENT = DownloadRetryPolicy(DownloadTimeouts(connect_s=10, read_s=0.3, total_s=20), 0.0, 0.0, 0.0, 0.0)
CAMERAS = ("dock", "gate", "yard")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    """An https server that this process trusts."""
    with ModelServer(tmp_path) as running:
        monkeypatch.setenv("SSL_CERT_FILE", str(running.authority))
        yield running


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clips") / "long.mp4", pictures=1200, fps=20)


class EventRecorder:
    """A delivery that keeps the events; `first` is set with the first."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, str]] = []
        self.first = asyncio.Event()

    def event(self, kind: str, code: str, message: str, _details: Mapping[str, Any]) -> None:
        """Take an event."""
        self.events.append((kind, code, message))
        self.first.set()


def of_file(make: Any, folder: Path) -> bytes:
    """The bytes that something saves as a model."""
    path = folder / "made.onnx"
    make(path)
    return path.read_bytes()


def with_weights_elsewhere(path: Path) -> None:
    """A detector that wants another file beside it."""
    proto = TinyDetector().proto()
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    onnx.save(proto, path)


def wanted(server: ModelServer, path: str, data: bytes) -> dict[str, Any]:
    """The section `model` for what is behind a path."""
    sha256 = hashlib.sha256(data).hexdigest()
    return {"model": {"url": server.url(path) + "?sig=s3cret-s3cret", "sha256": sha256, "maxMegabytes": 1}}


def bad(folder: Path) -> dict[str, tuple[Answer, bytes, str]]:
    """What may be wrong, each with what was promised and with what is said."""
    right = of_file(TinyDetector(seed=1).save, folder)
    nonsense = b"no model at all" * 100
    poisoned = of_file(TinyDetector(poison=float("nan")).save, folder)
    elsewhere = of_file(with_weights_elsewhere, folder)
    other = of_file(classifier, folder)
    return {
        "/hash": (content(right + b"x"), right, f"not {hashlib.sha256(right).hexdigest()[:12]}…"),
        "/cut": (cut(right, 1000), right, "the connection broke before the file was complete"),
        "/endless": (endless, right, "has more, but model.maxMegabytes is 1"),
        "/hang": (hanging, right, "no data for 0.3 s"),
        "/http": (redirect("http://127.0.0.1/m.onnx"), right, "only https: is followed"),
        "/circle": (redirect("/circle"), right, "is redirected more than 5 times"),
        "/gone": (status(404), right, "the server answers 404 Not Found"),
        "/nonsense": (content(nonsense), nonsense, "is no ONNX file"),
        "/classifier": (content(other), other, "/classifier"),
        "/poisoned": (content(poisoned), poisoned, "NaN or infinity"),
        "/elsewhere": (content(elsewhere), elsewhere, "a downloaded model must be one file"),
    }


def test_an_unavailable_model_changes_nothing_and_a_valid_one_takes_over(
    tmp_path: Path, clip: Path, server: ModelServer
) -> None:
    """Ten ways to fail, each told with its reason, while frames go on; then one that goes well."""
    TinyDetector().save(tmp_path / "small.onnx")
    right = of_file(TinyDetector(width_px=96, height_px=64, seed=1).save, tmp_path)
    events = tmp_path / "events.jsonl"
    cases = bad(tmp_path)

    async def scenario(module: EngineHostHarness) -> None:
        threads = ThreadGroup(lambda *_: None)
        delivery = Delivery.build(parse_config({}).telemetry, None, events, threads, data=tmp_path)
        delivery.start()
        module.state.set_delivery(delivery)
        for path, (answer, expected, words) in cases.items():
            server.answers[path] = answer
            before = len(module.results)
            applied = await module.apply(wanted(server, path, expected))
            assert applied.unapplied.keys() == applied.rejected.keys() == {"model"}, path
            assert words in applied.rejected["model"]
            assert server.url(path) in applied.rejected["model"]
            if path == "/gone":  # tried again, it is refused again, and told once
                assert await module.apply(wanted(server, path, expected)) == applied
            await module.until(lambda r, before=before: len(r) > before)  # type: ignore[misc]
        server.answers["/forklift-v3.onnx"] = content(right)
        assert (await module.apply(wanted(server, "/forklift-v3.onnx", right))).is_complete
        await module.until(lambda r: all(results_of(r, n)[-1].model == "forklift-v3" for n in CAMERAS))
        assert module.state.snapshot().config.model.sha256 == hashlib.sha256(right).hexdigest()
        assert await asyncio.to_thread(delivery.close, 5)

    data = tmp_path / "data"
    module = run_scenario(scenario, document(clip, tmp_path, process=False), data, retry_policy=IMPATIENT)
    for camera, seen in module.state.batcher.statistics().cameras.items():
        assert seen.dropped[DropReason.FAILED] == 0
        assert seen.offered == seen.analysed + sum(seen.dropped.values())
        numbers = [each.frame.sequence for each in results_of(module.results, camera)]
        assert all(before < after for before, after in pairwise(numbers))
        names = [each.model for each in results_of(module.results, camera)]
        assert names == sorted(names, reverse=True)  # small, and from some frame on forklift-v3
    event_documents = [json.loads(line) for line in events.read_text().splitlines()]
    assert [each["code"] for each in event_documents] == ["model-refused"] * len(cases) + ["model-changed"]
    assert event_documents[-1]["details"]["running"]["name"] == "forklift-v3"
    assert event_documents[-1]["details"]["before"]["name"] == event_documents[0]["details"]["running"]["name"] == "small"
    assert "s3cret" not in events.read_text()
    kept = {path.name for path in (data / MODELS_FOLDER).iterdir() if path.stat().st_size}
    assert f"{hashlib.sha256(right).hexdigest()}.onnx" in kept
    assert len(kept) <= 4


def test_a_newer_change_does_not_wait_for_an_older_one(
    tmp_path: Path, clip: Path, server: ModelServer
) -> None:
    """What was being fetched for it is let go."""
    TinyDetector().save(tmp_path / "small.onnx")
    right = of_file(TinyDetector(seed=1).save, tmp_path)
    server.answers |= {"/slow": hanging, "/b.onnx": content(right)}

    async def scenario(module: EngineHostHarness) -> None:
        older = asyncio.ensure_future(module.apply(wanted(server, "/slow", b"x")))
        await asyncio.to_thread(server.wait_for_requests, 1)
        assert module.state.snapshot().fetch_progress == "downloading the model: 0.0 MB"
        assert (await module.apply(wanted(server, "/b.onnx", right))).is_complete
        assert "a newer change" in (await older).rejected["model"]
        loaded_model = module.state.snapshot().loaded_model
        assert loaded_model is not None
        assert loaded_model.name == "b"
        assert module.state.snapshot().fetch_progress is None

    run_scenario(scenario, document(clip, tmp_path, process=False), tmp_path / "data")


def test_a_first_model_that_never_arrives_can_be_replaced(
    tmp_path: Path, clip: Path, server: ModelServer
) -> None:
    """A wrong address in the local file is mended from outside while the module waits for it."""
    right = of_file(TinyDetector().save, tmp_path)
    server.answers |= {"/wrong": status(404), "/a.onnx": content(right)}
    start = document(clip, tmp_path, process=False) | wanted(server, "/wrong", right)

    async def scenario(module: EngineHostHarness) -> None:
        event_documents = EventRecorder()
        module.state.set_delivery(event_documents)  # type: ignore[arg-type]  # as much of it as is used
        await asyncio.wait_for(event_documents.first.wait(), 20)
        assert event_documents.events[0][:2] == ("model", "model-waiting")
        assert "the server answers 404 Not Found" in event_documents.events[0][2]
        (reason,) = module.state.snapshot().readiness()
        assert reason.startswith("cannot download the model, retrying: ")
        assert module.state.snapshot().running_cameras == {}
        assert (await module.apply(wanted(server, "/a.onnx", right))).is_complete
        await module.until(lambda r: all(results_of(r, name) for name in CAMERAS))
        assert module.state.snapshot().readiness() == []

    module = run_scenario(scenario, start, tmp_path / "data", wait_for_start=False)
    assert {each.model for each in module.results} == {"a"}
