"""The device `remote`: batches go to servers of the Open Inference Protocol that serve the compiled graph.

    lanes ── run ──▶ RemoteSession ── least busy replica ──▶ remote_client ──▶ servers
                          └─ replica thread: brings replicas back that failed, reports states and counts

A replica that fails leaves the set, and its batch goes to another one within the time limit. Only without any
replica the device is lost, and the recovery policy treats it like every other device.
"""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from visionedge.config.addresses import format_url, remote_host_and_port
from visionedge.engine.device.backend import DeviceBackend
from visionedge.engine.device.devices import USABLE, DeviceVerdict, EffectiveDevice, ReasonCode, Runtime
from visionedge.engine.device.faults import EngineError, Fault
from visionedge.engine.device.remote_client import (
    EventLoopThread,
    ReplicaClient,
    ReplicaError,
    ReplicaFaultKind,
    ServedModel,
    ServerAddress,
    open_client,
)
from visionedge.engine.device.session import (
    DeviceSession,
    NodePlacement,
    PictureBatch,
    open_ort_session,
)
from visionedge.engine.plan import Plan, list_batch_sizes
from visionedge.model.postprocess import Rows
from visionedge.runtime.process_limits import MAX_LANES
from visionedge.runtime.redaction import register_secrets
from visionedge.runtime.retry import RetryPolicy

if TYPE_CHECKING:
    from visionedge.config.schema import RemoteConfig

log = logging.getLogger(__name__)

_RETURN_WAITS = RetryPolicy(1.0, 30.0)
"""The waits before a replica that failed is tried again, in seconds."""

_FIRST_RUN_LIMIT_S = 30.0
"""The first batch of a size may take long: a server on a GPU then chooses its algorithms."""

_BUSY_PAUSE_S = 0.05
_REPORT_INTERVAL_S = 1.0
_CLOSE_TIMEOUT_S = 2.0
_LANES_PER_REPLICA = 2
"""One batch is computed while the next one is on its way."""

_REASONS: dict[ReplicaFaultKind, ReasonCode] = {
    "denied": ReasonCode.REMOTE_REFUSED,
    "answer": ReasonCode.REMOTE_MODEL,
    "batch": ReasonCode.REMOTE_MODEL,
}
"""Without an entry: the server cannot be reached."""


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """See the section `inference.remote` in docs/configuration.md. `token` is a secret."""

    urls: tuple[str, ...]
    model: str
    timeout_s: float
    certificate: str | None = None
    token: str | None = field(default=None, repr=False)

    @staticmethod
    def of(remote: "RemoteConfig") -> "RemoteSettings":
        """The settings in a configuration, whose `url` and `model` are given."""
        return RemoteSettings(
            remote.url or (), remote.model or "", remote.timeout_seconds, remote.certificate, remote.token
        )


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A server: whether it is used, why not, and its batches and failed requests since the start."""

    url: str
    state: Literal["up", "down"]
    reason: str | None = None
    batches: int = 0
    failures: int = 0


def describe_destination(replicas: Sequence[ReplicaStatus]) -> str:
    """What leaves this machine, for log and status."""
    return f"pictures leave this device: {', '.join(replica.url for replica in replicas)}"


def add_replica_counts(
    before: Sequence[ReplicaStatus], now: Sequence[ReplicaStatus]
) -> tuple[ReplicaStatus, ...]:
    """The states of `now` with the counts of both; servers that `now` lacks are down."""
    counted = {each.url: each for each in before}
    total = [
        replace(
            each,
            batches=each.batches + counted[each.url].batches,
            failures=each.failures + counted[each.url].failures,
        )
        if each.url in counted
        else each
        for each in now
    ]
    present = {each.url for each in now}
    gone = [
        replace(each, state="down", reason=each.reason or "the CPU computes")
        for each in before
        if each.url not in present
    ]
    return (*total, *gone)


class RemoteError(EngineError):
    """No replica can be used; `verdict` says why."""

    def __init__(self, verdict: DeviceVerdict) -> None:
        super().__init__(verdict.reason, Fault.UNREACHABLE)
        self.verdict = verdict


@dataclass(frozen=True, slots=True)
class ExpectedModel:
    """What the servers must serve: the input size, K rows, and the SHA-256 of the model file."""

    height_px: int
    width_px: int
    rows: int
    sha256: str

    def __str__(self) -> str:
        return f"UINT8 [n, {self.height_px}, {self.width_px}, 3] -> FP32 [n, {self.rows}, 6]"

    def refusal(self, served: ServedModel) -> str | None:
        """Why a server's model is another one, in one line with both shapes, or None."""
        unlike = f"serves {served}, but the compiled model here is {self}"
        if len(served.inputs) != 1 or len(served.outputs) != 1:
            return unlike
        (given,), (made) = served.inputs, served.outputs[0]
        datatypes_fit = (given.datatype, made.datatype) == ("UINT8", "FP32")
        # -1 is a size that the file does not fix; the first batch then shows it.
        inputs_fit = _fits(given.shape[1:], (self.height_px, self.width_px, 3)) and len(given.shape) == 4
        outputs_fit = _fits(made.shape[1:], (self.rows, 6)) and len(made.shape) == 3
        batches = {size for size in (given.shape[:1] + made.shape[:1]) if size != -1}
        if (
            not (datatypes_fit and inputs_fit and outputs_fit)
            or len(batches) > 1
            or min(batches, default=1) < 1
        ):
            return unlike
        if served.sha256 is not None and served.sha256 != self.sha256:
            return f"serves another model file, SHA-256 {served.sha256}; here it is {self.sha256}"
        return None


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        size in (-1, right) for size, right in zip(shape, wanted, strict=True)
    )


@dataclass(slots=True, eq=False)
class _Replica:
    """A server and what is known of it. All but `client` and `url` changes with the set's lock held."""

    url: str
    client: ReplicaClient
    served: ServedModel | None = None
    is_up: bool = False
    reason: str | None = "not tried yet"
    outstanding: int = 0
    batches: int = 0
    failures: int = 0
    failed_tries: int = 0
    retry_at_s: float = 0.0
    taken: int = 0

    def status(self) -> ReplicaStatus:
        return ReplicaStatus(
            self.url, "up" if self.is_up else "down", self.reason, self.batches, self.failures
        )


class ReplicaSet:
    """Which replicas are used: the least busy one is next. Any thread may call."""

    def __init__(self, replicas: Sequence[_Replica], clock: Callable[[], float] = time.monotonic) -> None:
        self.changed = threading.Condition()
        self._replicas = tuple(replicas)
        self._clock = clock
        self._turn = 0

    def __repr__(self) -> str:
        return f"<ReplicaSet {self.up_count} of {len(self._replicas)} up>"

    @property
    def up_count(self) -> int:
        """How many are used."""
        return sum(each.is_up for each in self._replicas)

    def statuses(self) -> tuple[ReplicaStatus, ...]:
        """A snapshot."""
        with self.changed:
            return tuple(each.status() for each in self._replicas)

    def members(self) -> tuple[_Replica, ...]:
        """Those that are used."""
        return tuple(each for each in self._replicas if each.is_up)

    def take(self, without: Collection[_Replica] = ()) -> _Replica | None:
        """The least busy replica, and among equals the one that waited longest; None without any."""
        with self.changed:
            usable = [each for each in self._replicas if each.is_up and each not in without]
            if not usable:
                return None
            found = min(usable, key=lambda each: (each.outstanding, each.taken))
            self._turn += 1
            found.outstanding, found.taken = found.outstanding + 1, self._turn
            return found

    def give_back(self, replica: _Replica, *, computed: bool) -> None:
        """A request ended, and the replica stays in use."""
        with self.changed:
            replica.outstanding -= 1
            replica.batches += computed
            replica.failures += not computed

    def remove(self, replica: _Replica, reason: str, *, requested: bool = True) -> None:
        """Use a replica no longer, until it is brought back; `requested`: a request of it ended."""
        with self.changed:
            replica.outstanding -= requested
            replica.failures += 1
            if not replica.is_up:
                return
            replica.is_up, replica.reason, replica.failed_tries = False, reason, 1
            replica.retry_at_s = self._clock() + _RETURN_WAITS.wait_s(1)
            self.changed.notify_all()
        log.warning("replica %s is not used any more: %s", replica.url, reason)

    def add(self, replica: _Replica, served: ServedModel) -> None:
        """Use a replica from now on."""
        with self.changed:
            replica.is_up, replica.reason, replica.served = True, None, served
            self.changed.notify_all()
        log.info("replica %s is used", replica.url)

    def note_failed_try(self, replica: _Replica, reason: str) -> None:
        """A replica could not be brought back."""
        with self.changed:
            if replica.reason != reason:
                log.info("replica %s cannot be used yet: %s", replica.url, reason)
            replica.reason, replica.failed_tries = reason, replica.failed_tries + 1
            replica.retry_at_s = self._clock() + _RETURN_WAITS.wait_s(replica.failed_tries)

    def due(self) -> list[_Replica]:
        """Those that must be tried again now."""
        now_s = self._clock()
        return [each for each in self._replicas if not each.is_up and each.retry_at_s <= now_s]


class RemoteSession:
    """A `DeviceSession` on servers. Any number of threads may call `run`; `close` ends its threads.

    `notes` name the replicas that could not be used at the start. `expected` is what all must serve.
    """

    device: EffectiveDevice = "remote"
    runtime: Runtime = "onnxruntime"
    """Not known: the servers decide."""

    def __init__(self, remote: RemoteSettings, expected: ExpectedModel) -> None:
        """Connect to all replicas.

        Raises:
            RemoteError: none can be used.
            UnavailableError: tritonclient is missing, or the certificate cannot be read.
        """
        self.rows = expected.rows
        self.node_placement = NodePlacement(0)
        self.notes: tuple[str, ...] = ()
        self._remote = remote
        self._expected = expected
        self._warm: set[int] = set()
        self._closing = threading.Event()
        self._requests = EventLoopThread()
        self._replicas: list[_Replica] = []
        self._on_change: Callable[[tuple[ReplicaStatus, ...]], None] = lambda _statuses: None
        self._thread: threading.Thread | None = None
        self._set = ReplicaSet(())
        try:
            for url in remote.urls:
                address = ServerAddress(url, remote.model, remote.certificate, remote.token)
                self._replicas.append(_Replica(format_url(url), open_client(address, self._requests)))
            self._set = ReplicaSet(self._replicas)
            self.notes = self._connect()
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._keep_replicas, name="replicas", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<RemoteSession {self._remote.model} {self._set!r}>"

    # --- what an engine calls -------------------------------------------------------------------------------

    def run(self, pictures: PictureBatch, size: int) -> Rows:
        """Compute pictures as one batch, padded to `size`; their rows float32 (n, K, 6).

        Raises:
            RemoteError: no replica is left.
            EngineError: the batch is refused, or no replica computed it within the time limit.
        """
        if self._closing.is_set():
            raise EngineError("the engine is closed")
        whole = _pad(pictures, size)
        rows = self._run_first(whole) if size not in self._warm else self._run(whole)
        return rows[: len(pictures)]

    def keep_only(self, sizes: Collection[int]) -> None:
        """Warm up replicas that come back with these batch sizes only."""
        self._warm &= set(sizes)

    def close(self) -> None:
        """End the threads and connections; requests in progress may fail."""
        self._closing.set()
        with self._set.changed:
            self._set.changed.notify_all()
        for each in self._replicas:
            with contextlib.suppress(Exception):
                each.client.close()
        self._requests.close()
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)

    def make_plan(self, max_batch: int) -> Plan:
        """Two lanes for each replica; batches that the servers take."""
        served = [each.served for each in self._set.members() if each.served is not None]
        lanes = min(_LANES_PER_REPLICA * len(self._remote.urls), MAX_LANES)
        why = f"remote: {_LANES_PER_REPLICA} lanes for each replica"
        fixed = {_fixed_batch(each) for each in served} - {None}
        limits = [each.max_batch for each in served if each.max_batch is not None]
        if len(fixed) == 1 and (batch := fixed.pop()) is not None:
            return Plan(lanes, (batch,), f"{why}; the server fixes its batch at {batch}")
        return Plan(lanes, list_batch_sizes(min([max_batch, *limits])), f"{why}, batches in buckets")

    def statuses(self) -> tuple[ReplicaStatus, ...]:
        """The replicas now."""
        return self._set.statuses()

    def watch(self, on_change: Callable[[tuple[ReplicaStatus, ...]], None]) -> None:
        """Call this with the replicas when one comes or leaves, and each second while counts change."""
        self._on_change = on_change

    # --- batches --------------------------------------------------------------------------------------------

    def _run(self, whole: NDArray[np.uint8]) -> Rows:
        until_s = time.monotonic() + self._remote.timeout_s
        unusual: dict[_Replica, Rows] = {}
        last = "no replica is left"
        while (left_s := until_s - time.monotonic()) > 0:
            replica = self._set.take(unusual)
            if replica is None:
                break
            try:
                rows = self._compute(replica, whole, left_s)
            except ReplicaError as error:
                last = f"{replica.url} {error}"
                self._handle_failure(replica, error, until_s)
                continue
            self._set.give_back(replica, computed=True)
            if np.isfinite(rows).all():
                for other in unusual:
                    self._set.remove(other, "its rows contain NaN or infinity", requested=False)
                return rows
            unusual[replica] = rows
        if unusual:  # every replica gives them: the model or all servers are the cause
            return next(iter(unusual.values()))
        if self._set.up_count == 0:
            raise RemoteError(DeviceVerdict(ReasonCode.REMOTE_UNREACHABLE, f"no replica is left: {last}"))
        raise EngineError(f"no replica computed the batch in time: {last}", Fault.REPLICA_FAILED)

    def _handle_failure(self, replica: _Replica, error: ReplicaError, until_s: float) -> None:
        """Keep a replica that is only busy, or that refuses the batch; remove one that failed.

        Raises:
            EngineError: the batch is refused.
        """
        if error.kind == "batch":
            self._set.give_back(replica, computed=False)
            raise EngineError(f"{replica.url} {error}", Fault.REFUSED)
        if error.kind == "busy" and until_s - time.monotonic() > _BUSY_PAUSE_S:
            self._set.give_back(replica, computed=False)
            self._closing.wait(_BUSY_PAUSE_S)
            return
        self._set.remove(replica, str(error))

    def _run_first(self, whole: NDArray[np.uint8]) -> Rows:
        """Compute a batch of a new size on every replica, without the usual time limit."""
        rows: Rows | None = None
        last = "no replica is left"
        for replica in self._set.members():
            try:
                rows = self._compute(replica, whole, _FIRST_RUN_LIMIT_S)
            except ReplicaError as error:
                last = f"{replica.url} {error}"
                if error.kind == "batch":
                    raise EngineError(last, Fault.REFUSED) from None
                self._set.remove(replica, str(error), requested=False)
        if rows is None:
            raise RemoteError(DeviceVerdict(ReasonCode.REMOTE_UNREACHABLE, f"no replica is left: {last}"))
        self._warm.add(len(whole))
        return rows

    def _compute(self, replica: _Replica, whole: NDArray[np.uint8], limit_s: float) -> Rows:
        """The rows of a batch, in as many requests as the server's batch size needs.

        Raises:
            ReplicaError: a request failed, or its answer has another shape.
        """
        served = replica.served
        assert served is not None  # noqa: S101 - a replica that is used was described
        until_s = time.monotonic() + limit_s
        fixed = _fixed_batch(served)
        step = fixed or served.max_batch or len(whole)
        parts = []
        for start in range(0, len(whole), step):
            part = whole[start : start + step]
            sent = part if fixed is None else _pad(part, fixed)
            left_s = max(0.001, until_s - time.monotonic())
            rows = replica.client.infer(sent, served, left_s)
            if rows.shape != (len(sent), self.rows, 6):
                wanted = f"{len(sent)}, {self.rows}, 6"
                raise ReplicaError("answer", f"gave rows {list(rows.shape)}, not [{wanted}]")
            parts.append(rows[: len(part)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    # --- replicas that come and go --------------------------------------------------------------------------

    def _connect(self) -> tuple[str, ...]:
        """Bring all replicas into use, at the same time; a note for each one that cannot be used.

        Raises:
            RemoteError: none can be used.
        """
        with ThreadPoolExecutor(len(self._replicas), thread_name_prefix="connect") as pool:
            refused = [found for found in pool.map(self._bring_up, self._replicas) if found is not None]
        if self._set.up_count:
            return tuple(f"a replica is not used: {verdict.reason}" for verdict in refused)
        # A server that answers says more about the configuration than one that does not.
        answered = [found for found in refused if found.code is not ReasonCode.REMOTE_UNREACHABLE]
        first = (answered or refused)[0]
        raise RemoteError(DeviceVerdict(first.code, "; ".join(found.reason for found in refused)))

    def _bring_up(self, replica: _Replica) -> DeviceVerdict | None:
        """Check a replica, warm it up and use it; the reason where it cannot be used."""
        try:
            served = self._examine(replica)
            replica.served = served
            for size in sorted(self._warm) or [_fixed_batch(served) or 1]:
                noise = np.random.default_rng(0).integers(0, 256, self._shape(size), np.uint8)
                self._compute(replica, noise, _FIRST_RUN_LIMIT_S)
        except ReplicaError as error:
            self._set.note_failed_try(replica, str(error))
            code = _REASONS.get(error.kind, ReasonCode.REMOTE_UNREACHABLE)
            return DeviceVerdict(code, f"{replica.url} {error}")
        self._set.add(replica, served)
        return None

    def _examine(self, replica: _Replica) -> ServedModel:
        replica.client.check_ready(self._remote.timeout_s)
        served = replica.client.describe(self._remote.timeout_s)
        refusal = self._expected.refusal(served)
        if refusal is not None:
            raise ReplicaError("answer", refusal)
        return served

    def _shape(self, size: int) -> tuple[int, int, int, int]:
        return size, self._expected.height_px, self._expected.width_px, 3

    def _keep_replicas(self) -> None:
        """The target of the thread: bring replicas back, and report them."""
        reported: tuple[ReplicaStatus, ...] = ()
        while not self._closing.is_set():
            for replica in self._set.due():
                self._bring_up(replica)
            now = self._set.statuses()
            if now != reported:
                with contextlib.suppress(OSError):  # the module closed the connection
                    self._on_change(now)
                reported = now
            with self._set.changed:
                states = [(each.url, each.state) for each in reported]
                self._set.changed.wait_for(partial(self._has_news, states), _REPORT_INTERVAL_S)

    def _has_news(self, states: Sequence[tuple[str, str]]) -> bool:
        return self._closing.is_set() or states != [
            (each.url, "up" if each.is_up else "down") for each in self._replicas
        ]


def _fixed_batch(served: ServedModel) -> int | None:
    size = served.inputs[0].shape[0]
    return None if size == -1 else size


def _pad(pictures: PictureBatch, size: int) -> NDArray[np.uint8]:
    """Pictures as one contiguous array of `size` pictures; those that are missing are black."""
    if isinstance(pictures, np.ndarray) and len(pictures) == size:
        return np.ascontiguousarray(pictures)
    whole = np.zeros((size, *pictures[0].shape), np.uint8)
    for place, picture in zip(whole, pictures, strict=False):
        place[:] = picture
    return whole


# --- how an engine gets it ----------------------------------------------------------------------------------


def open_remote_session(remote: RemoteSettings, graph: bytes, sha256: str) -> RemoteSession:
    """Open a session for a compiled graph. `sha256` is that of the model file.

    Raises what `RemoteSession` raises, and what onnxruntime raises for the graph.
    """
    if remote.token is not None:
        register_secrets([remote.token])
    _, height_px, width_px, _ = (
        dim.dim_value for dim in onnx.ModelProto.FromString(graph).graph.input[0].type.tensor_type.shape.dim
    )
    cpu = open_ort_session(graph, "cpu", max_batch=1)  # K does not stand in every graph
    rows = cpu.rows
    cpu.close()
    return RemoteSession(remote, ExpectedModel(height_px, width_px, rows, sha256))


def add_remote(backend: DeviceBackend, remote: RemoteSettings, sha256: str) -> DeviceBackend:
    """A backend that also opens the device `remote`."""

    def has_provider(device: EffectiveDevice) -> bool:
        return device == "remote" or backend.has_provider(device)

    def probe_device(device: EffectiveDevice) -> DeviceVerdict:
        return probe_remote(remote) if device == "remote" else backend.probe_device(device)

    def open_on(
        graph: bytes,
        device: EffectiveDevice,
        *,
        max_batch: int,
        data: Path | None,
        runtime: Runtime = "onnxruntime",
        precision: str = "fp32",
    ) -> DeviceSession:
        if device == "remote":
            return open_remote_session(remote, graph, sha256)
        return backend.open(
            graph, device, max_batch=max_batch, data=data, runtime=runtime, precision=precision
        )

    return replace(backend, has_provider=has_provider, probe_device=probe_device, open=open_on)


def probe_remote(remote: RemoteSettings) -> DeviceVerdict:
    """Whether any server accepts a connection: cheap, and without a secret. Opening it checks the rest."""
    refused = []
    for url in remote.urls:
        try:
            socket.create_connection(remote_host_and_port(url), remote.timeout_s).close()
        except OSError as error:
            refused.append(f"{format_url(url)}: {error.strerror or error}")
        else:
            return USABLE
    return DeviceVerdict(
        ReasonCode.REMOTE_UNREACHABLE, f"no server accepts a connection: {'; '.join(refused)}"
    )


@dataclass(frozen=True, slots=True)
class ServerExamination:
    """A server as doctor sees it: `found` in one clause, with the shapes and the time of an answer."""

    url: str
    verdict: DeviceVerdict
    found: str


def examine_servers(remote: RemoteSettings) -> tuple[ServerExamination, ...]:
    """Ask each server whether it is ready and what it serves; no picture is sent.

    Raises:
        UnavailableError: tritonclient is missing, or the certificate cannot be read.
    """
    if remote.token is not None:
        register_secrets([remote.token])
    thread = EventLoopThread()
    try:
        return tuple(_examine_server(remote, url, thread) for url in remote.urls)
    finally:
        thread.close()


def _examine_server(remote: RemoteSettings, url: str, thread: EventLoopThread) -> ServerExamination:
    client = open_client(ServerAddress(url, remote.model, remote.certificate, remote.token), thread)
    shown = format_url(url)
    try:
        client.check_ready(remote.timeout_s)
        started_s = time.monotonic()
        served = client.describe(remote.timeout_s)
        answer_ms = (time.monotonic() - started_s) * 1000
    except ReplicaError as error:
        code = _REASONS.get(error.kind, ReasonCode.REMOTE_UNREACHABLE)
        return ServerExamination(shown, DeviceVerdict(code, f"{shown} {error}"), str(error))
    finally:
        client.close()
    found = f"ready, {remote.model} is {served}, answers in {answer_ms:.0f} ms"
    return ServerExamination(shown, USABLE, found)
