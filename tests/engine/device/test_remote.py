"""The remote device on scripted servers, over HTTP and gRPC: rows, faults, replicas, refusals, secrets."""

import logging
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

from scripted_http import ScriptedServer, answer
from scripted_inference import Fault, GrpcInferenceServer, HttpInferenceServer, InferenceModel
from tiny_models import TinyDetector
from visionedge.config.load import parse_config
from visionedge.config.schema import InferenceConfig
from visionedge.engine.autotune import make_noise_pictures
from visionedge.engine.device import faults
from visionedge.engine.device.devices import ReasonCode
from visionedge.engine.device.faults import EngineError
from visionedge.engine.device.remote import (
    ExpectedModel,
    RemoteError,
    ReplicaStatus,
    add_replica_counts,
    describe_destination,
    probe_remote,
)
from visionedge.engine.device.remote import RemoteSettings as Settings
from visionedge.engine.device.remote_client import ServedModel
from visionedge.engine.interface import EngineSettings
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.errors import DeviceError
from visionedge.model.model import Model, load_model

Server = HttpInferenceServer | GrpcInferenceServer
TOKEN = "t0ken-that-nobody-may-see"

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model."""
    return load_model(TinyDetector().save(tmp_path_factory.mktemp("remote") / "tiny.onnx"))


@pytest.fixture
def serve(model: Model) -> Iterator[Callable[..., Server]]:
    """Starts servers of the model, which end with the test."""
    with ExitStack() as stack:

        def start(kind: type[Server] = HttpInferenceServer, **options: Any) -> Server:
            server = kind(InferenceModel(model.path, **options))
            stack.push(server)
            server.start()
            return server

        yield start


def settings_for(*urls: str, **changes: Any) -> InferenceConfig:
    """`device: remote` with these servers."""
    remote = {"url": list(urls), "model": "tiny", "insecure": True, **changes}
    return parse_config({"inference": {"device": "remote", "maxBatch": 4, "remote": remote}}).inference


def open_remote(model: Model, servers: Sequence[Server], /, **changes: Any) -> LocalEngine:
    """An engine on these servers."""
    return open_engine(model, settings_for(*(server.url for server in servers), **changes))


def pictures_of(model: Model, count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Noise."""
    return np.asarray(make_noise_pictures(model.input, count))


class ReplicaWatcher:
    """Waits for states of the replicas."""

    def __init__(self, engine: LocalEngine) -> None:
        self._changed = threading.Condition()
        self._states: tuple[str, ...] = ()
        engine.watch_replicas(self._note)

    def _note(self, replicas: tuple[ReplicaStatus, ...]) -> None:
        with self._changed:
            self._states = tuple(replica.state for replica in replicas)
            self._changed.notify_all()

    def wait_for(self, *states: str) -> None:
        """Wait until the replicas have these states."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._states == states, 30), self._states


@pytest.mark.parametrize("kind", [HttpInferenceServer, GrpcInferenceServer])
def test_a_remote_device_gives_the_rows_of_the_cpu(
    model: Model, serve: Callable[..., Server], kind: type[Server]
) -> None:
    """Any number of pictures; frames name the device `remote`, and it was compared with the CPU."""
    with (
        closing(open_remote(model, [serve(kind)])) as engine,
        closing(open_engine(model, InferenceConfig(device="cpu"))) as local,
    ):
        for count in (1, 3, 4, 9):
            pictures = pictures_of(model, count)
            rows, device = engine.infer(pictures)
            assert device == "remote"
            assert np.array_equal(rows, local.infer(pictures).rows)
        info = engine.info()
        assert (info.device.requested, info.device.effective, info.device.code) == ("remote", "remote", "ok")
        assert info.device_check.parity_results[0].refusal is None
        assert info.plan.buckets == (1, 2, 4)


FAILURES: dict[Fault, str] = {
    "error": "answered 500: broken",
    "cut": "",
    "garbage": "its answer cannot be read",
    "wrong-count": "gave rows [2, 320, 6], not [1, 320, 6]",
    "wrong-rows": "gave rows [1, 1, 6], not [1, 320, 6]",
    "wrong-type": "its rows are float64, not float32",
    "nan": "its rows contain NaN or infinity",
}


@pytest.mark.parametrize("fault", FAILURES)
def test_the_batch_of_a_replica_that_fails_is_computed_by_another_one(
    model: Model, serve: Callable[..., Server], fault: Fault
) -> None:
    """It leaves the set with its reason, is tried again, and comes back."""
    bad, good = serve(), serve()
    with closing(open_remote(model, [bad, good])) as engine:
        watcher = ReplicaWatcher(engine)
        expected = engine.infer(pictures_of(model, 1)).rows
        bad.model.fault = fault
        for _ in range(3):
            assert np.array_equal(engine.infer(pictures_of(model, 1)).rows, expected)
        first, second = engine.info().replicas
        assert (first.state, second.state) == ("down", "up")
        assert FAILURES[fault] in (first.reason or "")
        assert (first.failures, second.failures) == (1, 0)
        bad.model.fault = None
        watcher.wait_for("up", "up")


@pytest.mark.parametrize("fault", ["error", "wrong-count", "wrong-type"])
def test_the_same_holds_for_grpc(model: Model, serve: Callable[..., Server], fault: Fault) -> None:
    bad, good = serve(GrpcInferenceServer), serve(HttpInferenceServer)
    with closing(open_remote(model, [bad, good])) as engine:
        watcher = ReplicaWatcher(engine)
        bad.model.fault = fault
        for _ in range(3):
            engine.infer(pictures_of(model, 1))
        assert [replica.state for replica in engine.info().replicas] == ["down", "up"]
        bad.model.fault = None
        watcher.wait_for("up", "up")


@pytest.mark.parametrize("kind", [HttpInferenceServer, GrpcInferenceServer])
def test_a_server_that_hangs_ends_its_batch_after_the_time_limit(
    model: Model, serve: Callable[..., Server], kind: type[Server]
) -> None:
    """Its pictures may be computed again; the next batch goes to the other replica at once."""
    bad, good = serve(kind), serve()
    with closing(open_remote(model, [bad, good], timeoutSeconds=0.2)) as engine:
        bad.model.fault = "hang"
        good.model.fault = "hang"
        with pytest.raises(EngineError, match=r"no replica .*gave no answer within") as caught:
            engine.infer(pictures_of(model, 1))
        assert caught.value.fault in faults.RETRIED_FAULTS
        assert "down" in {replica.state for replica in engine.info().replicas}


@pytest.mark.parametrize("kind", [HttpInferenceServer, GrpcInferenceServer])
def test_without_any_replica_the_device_is_lost(
    model: Model, serve: Callable[..., Server], kind: type[Server]
) -> None:
    server = serve(kind)
    with closing(open_remote(model, [server])) as engine:
        server.stop()
        with pytest.raises(RemoteError, match="no replica is left") as caught:
            engine.infer(pictures_of(model, 1))
        assert caught.value.fault is faults.Fault.UNREACHABLE
        assert caught.value.verdict.code is ReasonCode.REMOTE_UNREACHABLE


@pytest.mark.parametrize("kind", [HttpInferenceServer, GrpcInferenceServer])
def test_a_server_that_was_restarted_is_used_again(
    model: Model, serve: Callable[..., Server], kind: type[Server]
) -> None:
    restarted, other = serve(kind), serve()
    with closing(open_remote(model, [restarted, other])) as engine:
        watcher = ReplicaWatcher(engine)
        restarted.stop()
        for _ in range(2):
            engine.infer(pictures_of(model, 1))
        watcher.wait_for("down", "up")
        restarted.start()
        watcher.wait_for("up", "up")


@pytest.mark.parametrize("kind", [HttpInferenceServer, GrpcInferenceServer])
def test_closing_ends_a_batch_that_waits_for_a_server(
    model: Model, serve: Callable[..., Server], kind: type[Server]
) -> None:
    """A lane must not wait for an answer that nobody reads any more."""
    server = serve(kind)
    engine = open_remote(model, [server], timeoutSeconds=20)
    failed: list[EngineError] = []

    def infer() -> None:
        with pytest.raises(EngineError) as caught:
            engine.infer(pictures_of(model, 1))
        failed.append(caught.value)

    server.model.fault = "hang"
    thread = threading.Thread(target=infer)
    thread.start()
    assert server.model.asked.wait(20)
    engine.close()
    thread.join(10)
    assert len(failed) == 1
    with pytest.raises(EngineError, match="closed"):
        engine.infer(pictures_of(model, 1))


def test_a_busy_server_is_asked_again_and_stays_in_use(model: Model, serve: Callable[..., Server]) -> None:
    server = serve()
    with closing(open_remote(model, [server], timeoutSeconds=20)) as engine:
        server.model.fault = "busy"
        computed: list[Any] = []
        thread = threading.Thread(target=lambda: computed.append(engine.infer(pictures_of(model, 1))))
        thread.start()
        assert server.model.asked.wait(20)
        server.model.fault = None
        thread.join()
        assert len(computed) == 1
        (replica,) = engine.info().replicas
        assert replica.state == "up"
        assert replica.failures >= 1


def test_a_refused_batch_is_not_the_fault_of_the_server(model: Model, serve: Callable[..., Server]) -> None:
    server = serve()
    with closing(open_remote(model, [server])) as engine:
        server.model.fault = "refuse"
        with pytest.raises(EngineError, match="answered 400: no such batch") as caught:
            engine.infer(pictures_of(model, 1))
        assert caught.value.fault is faults.Fault.REFUSED
        assert engine.info().replicas[0].state == "up"


def test_nan_of_every_replica_is_invalid_output_like_that_of_any_device(
    model: Model, serve: Callable[..., Server]
) -> None:
    """The supervisor then finds out whether the model itself yields it."""
    servers = [serve(), serve()]
    with closing(open_remote(model, servers)) as engine:
        for server in servers:
            server.model.fault = "nan"
        with pytest.raises(EngineError, match="NaN") as caught:
            engine.infer(pictures_of(model, 1))
        assert caught.value.fault is faults.Fault.INVALID_OUTPUT


def test_a_server_with_a_fixed_batch_gets_batches_of_that_size(
    model: Model, serve: Callable[..., Server]
) -> None:
    server = serve(batch=2)
    with closing(open_remote(model, [server])) as engine:
        assert engine.info().plan.buckets == (2,)
        assert engine.infer(pictures_of(model, 3)).rows.shape == (3, 320, 6)
    assert set(server.model.batches) == {2}


def test_a_server_gets_no_larger_batch_than_it_says(model: Model, serve: Callable[..., Server]) -> None:
    """Of two servers the lower limit counts for the plan."""
    small, large = serve(), serve()
    small.model.metadata["parameters"] = {"max_batch_size": 2}
    with closing(open_remote(model, [small, large])) as engine:
        assert engine.info().plan.buckets == (1, 2)
        assert engine.infer(pictures_of(model, 5)).rows.shape == (5, 320, 6)
    assert max(small.model.batches) == 2


# --- what is refused ----------------------------------------------------------------------------------------

EXPECTED = ExpectedModel(48, 64, 320, "ab" * 32)
RIGHT_INPUT = {"name": "images", "datatype": "UINT8", "shape": [-1, 48, 64, 3]}
RIGHT_OUTPUT = {"name": "rows", "datatype": "FP32", "shape": [-1, 320, 6]}


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([{**RIGHT_INPUT, "shape": [-1, 640, 640, 3]}], [RIGHT_OUTPUT]),
        ([{**RIGHT_INPUT, "shape": [-1, 3, 48, 64]}], [RIGHT_OUTPUT]),
        ([{**RIGHT_INPUT, "shape": [48, 64, 3]}], [RIGHT_OUTPUT]),
        ([{**RIGHT_INPUT, "shape": []}], [RIGHT_OUTPUT]),
        ([{**RIGHT_INPUT, "shape": [0, 48, 64, 3]}], [RIGHT_OUTPUT]),
        ([{**RIGHT_INPUT, "datatype": "FP32"}], [RIGHT_OUTPUT]),
        ([RIGHT_INPUT, RIGHT_INPUT], [RIGHT_OUTPUT]),
        ([], [RIGHT_OUTPUT]),
        ([RIGHT_INPUT], []),
        ([RIGHT_INPUT], [RIGHT_OUTPUT, RIGHT_OUTPUT]),
        ([RIGHT_INPUT], [{**RIGHT_OUTPUT, "shape": [-1, 84, 8400]}]),
        ([RIGHT_INPUT], [{**RIGHT_OUTPUT, "shape": [-1, 300, 6]}]),
        ([RIGHT_INPUT], [{**RIGHT_OUTPUT, "shape": [-1, 320]}]),
        ([RIGHT_INPUT], [{**RIGHT_OUTPUT, "datatype": "FP16"}]),
        ([{**RIGHT_INPUT, "shape": [2, 48, 64, 3]}], [{**RIGHT_OUTPUT, "shape": [4, 320, 6]}]),
    ],
)
def test_another_model_is_refused_in_one_line_with_both_shapes(inputs: Any, outputs: Any) -> None:
    served = ServedModel.of({"inputs": inputs, "outputs": outputs})
    refusal = EXPECTED.refusal(served)
    assert refusal == f"serves {served}, but the compiled model here is {EXPECTED}"
    assert "\n" not in refusal


@pytest.mark.parametrize("batch", [-1, 1, 8])
@pytest.mark.parametrize("rows", [-1, 320])
def test_the_compiled_model_is_accepted_with_any_batch(batch: int, rows: int) -> None:
    served = ServedModel.of(
        {
            "inputs": [{**RIGHT_INPUT, "shape": [batch, 48, 64, 3]}],
            "outputs": [{**RIGHT_OUTPUT, "shape": [batch, rows, 6]}],
            "parameters": {"sha256": "ab" * 32},
        }
    )
    assert EXPECTED.refusal(served) is None


def test_a_server_that_tells_another_digest_is_refused(model: Model, serve: Callable[..., Server]) -> None:
    """Equal shapes may be another training; `compile` keeps the digest of the original file."""
    server = serve()
    server.model.metadata["parameters"] = {"sha256": "cd" * 32}
    with pytest.raises(DeviceError, match=f"another model file, SHA-256 {'cd' * 32}; here it is") as caught:
        open_engine(model, settings_for(server.url).model_copy(update={"fallback": "exit"}))
    assert caught.value.code == "remote-model"


def test_without_its_model_the_cpu_computes_and_the_reason_has_both_shapes(
    model: Model, serve: Callable[..., Server]
) -> None:
    server = serve()
    server.model.metadata["inputs"][0]["shape"] = [-1, 640, 640, 3]
    with closing(open_remote(model, [server])) as engine:
        device = engine.info().device
    assert (device.requested, device.effective, device.code) == ("remote", "cpu", "remote-model")
    assert "UINT8 [-1, 640, 640, 3] -> FP32 [-1, 320, 6]" in device.reason
    assert "UINT8 [n, 48, 64, 3] -> FP32 [n, 320, 6]" in device.reason


def test_rows_that_differ_from_the_cpu_are_refused_by_parity(
    tmp_path: Path, serve: Callable[..., Server]
) -> None:
    """A server with the same shapes and other weights, which tells no digest."""
    other = load_model(TinyDetector(seed=7).save(tmp_path / "tiny.onnx"))
    with closing(open_remote(other, [serve()])) as engine:
        assert (engine.info().device.effective, engine.info().device.code) == ("cpu", "parity-refused")


def test_without_fallback_an_absent_server_is_an_error_with_a_remedy(model: Model) -> None:
    inference = settings_for("http://127.0.0.1:9").model_copy(update={"fallback": "exit"})
    with pytest.raises(DeviceError, match=r"Connection refused .*check inference.remote.url") as caught:
        open_engine(model, inference)
    assert caught.value.code == "remote-unreachable"


def test_an_unready_server_is_not_used(model: Model, serve: Callable[..., Server]) -> None:
    server = serve()
    server.model.ready = False
    with closing(open_remote(model, [server])) as engine:
        assert engine.info().device.code is ReasonCode.REMOTE_UNREACHABLE
        assert "the server is not ready" in engine.info().device.reason


@pytest.mark.parametrize("kind", [HttpInferenceServer, GrpcInferenceServer])
def test_an_unknown_model_is_named_by_the_server(
    model: Model, serve: Callable[..., Server], kind: type[Server]
) -> None:
    with closing(open_remote(model, [serve(kind)], model="other")) as engine:
        assert engine.info().device.code is ReasonCode.REMOTE_REFUSED
        assert "unknown model" in engine.info().device.reason


def test_one_of_two_replicas_is_enough_and_the_other_one_is_noted(
    model: Model, serve: Callable[..., Server]
) -> None:
    good = serve()
    with closing(open_engine(model, settings_for("http://127.0.0.1:9", good.url))) as engine:
        assert engine.info().device.effective == "remote"
        (note,) = engine.info().notes
        assert note.startswith("a replica is not used: http://127.0.0.1:9 ")


# --- token and TLS ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [HttpInferenceServer, GrpcInferenceServer])
def test_the_token_is_sent_and_shown_nowhere(
    model: Model, serve: Callable[..., Server], kind: type[Server], caplog: pytest.LogCaptureFixture
) -> None:
    """Not in logs, snapshots, errors or representations; a wrong one is refused with a remedy."""
    caplog.set_level(logging.DEBUG)
    server = serve(kind, token=TOKEN)
    with closing(open_remote(model, [server], token=TOKEN)) as engine:
        engine.infer(pictures_of(model, 1))
        assert set(server.model.tokens) == {f"Bearer {TOKEN}"}
        shown = [repr(engine), str(engine.info()), caplog.text]
        server.model.token = "another"
        with pytest.raises(RemoteError) as caught:
            engine.infer(pictures_of(model, 1))
        shown.append(str(caught.value))
    with closing(open_remote(model, [server], token=TOKEN)) as engine:
        assert engine.info().device.code is ReasonCode.REMOTE_REFUSED
        shown += [engine.info().device.reason, repr(EngineSettings.of(settings_for(server.url, token=TOKEN)))]
    assert not [text for text in shown if TOKEN in text]


def test_https_is_checked_against_the_given_authority(model: Model, tmp_path: Path) -> None:
    """With the authority of another, or with the system's, the server is refused."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    right, wrong = tmp_path / "right.pem", tmp_path / "wrong.pem"
    authority.cert_pem.write_to_path(str(right))
    trustme.CA().cert_pem.write_to_path(str(wrong))
    with HttpInferenceServer(InferenceModel(model.path), tls=context) as server:
        opened = partial(open_remote, model, [server], insecure=False)
        with closing(opened(certificate=str(right))) as engine:
            assert engine.infer(pictures_of(model, 1)).device == "remote"
        for certificate in (str(wrong), None):
            with closing(opened(certificate=certificate)) as engine:
                assert engine.info().device.code is ReasonCode.REMOTE_REFUSED
                assert "certificate" in engine.info().device.reason.lower()


def test_a_redirect_is_not_followed(model: Model, serve: Callable[..., Server]) -> None:
    """Pictures and token would go to a server that the configuration does not name."""
    elsewhere = serve()

    def redirect(_server: ScriptedServer, connection: Any, head: str) -> None:
        path = head.split()[1]
        location = f"Location: {elsewhere.url}{path}\r\n"
        connection.sendall(answer(b"", "", status="307 Temporary Redirect", more=location))

    with (
        ScriptedServer(redirect) as server,
        closing(open_engine(model, settings_for(server.url("").rstrip("/"), token=TOKEN))) as engine,
    ):
        assert engine.info().device.code is ReasonCode.REMOTE_REFUSED
        assert "redirects are not followed" in engine.info().device.reason
    assert elsewhere.model.tokens == []


# --- pure parts ---------------------------------------------------------------------------------------------


def test_a_probe_only_connects(serve: Callable[..., Server]) -> None:
    server = serve()
    usable = Settings(("http://127.0.0.1:9", server.url), "tiny", 1.0, token=TOKEN)
    assert probe_remote(usable).code is ReasonCode.OK
    assert server.model.tokens == []
    absent = probe_remote(Settings(("http://127.0.0.1:9",), "tiny", 1.0))
    assert absent.code is ReasonCode.REMOTE_UNREACHABLE
    assert "http://127.0.0.1:9: Connection refused" in absent.reason


def test_counts_of_replicas_go_on_over_a_change_of_the_process() -> None:
    before = (ReplicaStatus("a", "up", None, 5, 1), ReplicaStatus("b", "down", "why", 2, 2))
    now = (ReplicaStatus("a", "down", "gone", 3, 1),)
    assert add_replica_counts(before, now) == (
        ReplicaStatus("a", "down", "gone", 8, 2),
        ReplicaStatus("b", "down", "why", 2, 2),
    )
    assert add_replica_counts(before[:1], ()) == (ReplicaStatus("a", "down", "the CPU computes", 5, 1),)


def test_the_sentence_names_every_server_that_gets_pictures() -> None:
    replicas = (ReplicaStatus("https://a.example:8443/v", "up"), ReplicaStatus("grpcs://b.example", "down"))
    sentence = "pictures leave this device: https://a.example:8443/v, grpcs://b.example"
    assert describe_destination(replicas) == sentence
