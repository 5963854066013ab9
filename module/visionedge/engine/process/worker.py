"""One worker process of the engine, as the module sees it: spawned, opened, asked for batches, and ended.

`server` is what runs in the process; `protocol` is what the two send to each other.
"""

import contextlib
import logging
import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from visionedge.engine.device.devices import EffectiveDevice
from visionedge.engine.device.faults import EngineError, EngineUnavailableError, Fault
from visionedge.engine.device.session import PictureBatch
from visionedge.engine.interface import EngineInfo
from visionedge.engine.process import protocol
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.errors import VisionedgeError
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows
from visionedge.runtime.child_process import start_child
from visionedge.runtime.redaction import redact
from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)


MIN_LIMIT_S = 2.0
"""A busy machine may keep a healthy process from its work for this long."""

_USUAL_FACTOR = 10
_DECAY = 0.98  # per batch: after a hundred batches a long one counts for an eighth
_MIN_BATCHES = 5
_SLICE_S = 0.25
_MAX_SLICE_S = 2 * _SLICE_S

Readable = Callable[[socket.socket, float], bool]
"""Waits until a socket has data, for at most the given time in seconds; False if none came."""


class AdaptiveTimeout:
    """The longest recent batch of one process, and the limit that follows from it.

    Any thread may call. There is no lock: a batch that is not counted does no harm.
    """

    def __init__(self, max_s: float, min_s: float = MIN_LIMIT_S) -> None:
        self._max_s = max_s
        self._min_s = min_s
        self._count = 0
        self._usual_s = 0.0

    def __repr__(self) -> str:
        return f"<AdaptiveTimeout usual={self._usual_s:.3f} s limit={self.limit_s:.3g} s>"

    def note(self, took_s: float) -> None:
        """Count a batch that was answered after this time, including its wait for a free lane."""
        self._count += 1
        self._usual_s = max(took_s, self._usual_s * _DECAY)

    @property
    def limit_s(self) -> float:
        """How long the next batch may take."""
        if self._count < _MIN_BATCHES:
            return self._max_s
        return min(self._max_s, max(self._min_s, _USUAL_FACTOR * self._usual_s))


def wait_for_reply(
    channel: socket.socket,
    limit_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    readable: Readable | None = None,
) -> None:
    """Wait until a reply begins to arrive, or the other end is closed.

    Raises:
        TimeoutError: nothing arrived within the limit, during which this process ran all the time.
    """
    ready = readable or _readable
    waited_s, before_s = 0.0, clock()
    while not ready(channel, min(_SLICE_S, max(0.0, limit_s - waited_s))):
        now_s = clock()
        # A slice that took much longer is one in which this process did not run.
        waited_s += min(now_s - before_s, _MAX_SLICE_S)
        before_s = now_s
        if waited_s >= limit_s:
            raise TimeoutError(f"no reply within {limit_s:g} s")


def _readable(channel: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


_SPARE_CHANNELS = 5
"""Reply channels beside those of the lanes: for two more lanes, for crops, and for pictures over HTTP."""

_LOG_LINE_CHARACTERS = 1000
_LOG_LINES_PER_S = 50
_EXIT_TIMEOUT_S = 0.5
_KILL_TIMEOUT_S = 5.0
_CRASH_SIGNALS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """How long to wait, in seconds.

    `run_s`: for a batch at most; `AdaptiveTimeout` makes it less. `open_s`: until an engine is open, which
    takes minutes where TensorRT builds its own. `worker_wait_s`: for a worker, while none serves.
    """

    run_s: float = 30.0
    open_s: float = 1800.0
    worker_wait_s: float = 1.0


class WorkerStartError(EngineError):
    """A worker ended, or hung, before it had opened its engine: `why` in a few words.

    `crashed`: by itself; `killed`: by a signal from outside, for example by the kernel when memory is short.
    """

    def __init__(self, why: str, *, crashed: bool, killed: bool = False) -> None:
        super().__init__(f"the engine's process {why} while it opened the model")
        self.why = why
        self.crashed = crashed
        self.killed = killed


class WorkerDrainedError(EngineError):
    """Another worker serves now; nothing of the batch was computed here."""


@dataclass(frozen=True, slots=True)
class _ReplyChannel:
    """The socket on which the reply to a request comes, and its number in the worker."""

    number: int
    socket: socket.socket


class Worker:
    """A worker process. Create it on a thread that lives on: the process is killed when that thread ends.

    `send_start_request` comes first, then `wait_until_open` and `wait_until_exit` on one thread; any thread
    may call the others. Call `discard` on a worker that was never started. What the process logs goes to our
    log, on a thread of the group. `fault` is why the worker was lost, once it is.
    """

    def __init__(self, frame_pool: SharedFramePool, limits: WorkerLimits, thread_group: ThreadGroup) -> None:
        self.unplanned_shapes = 0
        self.fault = Fault.DIED
        self.started_s = time.monotonic()
        self.device: EffectiveDevice = "cpu"
        self._frame_pool = frame_pool
        self._limits = limits
        self._timeout = AdaptiveTimeout(limits.run_s)
        self._model: Model | None = None
        self._max_rows = 0
        self._channel_count = 0
        self._kill_reason: str | None = None
        self._closed = False
        self._drained = False
        self._channels: queue.SimpleQueue[_ReplyChannel | None] = queue.SimpleQueue()
        self._requests: socket.socket | None = None
        self._send_lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = _spawn(theirs, frame_pool)
        thread_group.start(f"engine-log:{self.pid}", self._forward_log)

    def __repr__(self) -> str:
        return f"<Worker {self.pid} {'ready' if self._max_rows else 'opening'}>"

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    # --- opening --------------------------------------------------------------------------------------------

    def send_start_request(self, start_request: protocol.StartRequest) -> None:
        """Let the process open an engine; it may have been spawned long before."""
        self.started_s = time.monotonic()
        self._model = start_request.model
        remote = start_request.settings.remote
        if remote is not None:  # a server may take its whole time limit, whatever is usual
            self._timeout = AdaptiveTimeout(self._limits.run_s, remote.timeout_s + MIN_LIMIT_S)
        with contextlib.suppress(OSError):  # the process is gone already: `wait_until_open` finds that out
            protocol.send_message(self._control, pickle.dumps(start_request))

    def wait_until_open(self) -> EngineInfo:
        """Wait until the process has opened its engine, and connect the reply channels.

        Raises:
            WorkerStartError: the process ended, or did not open the engine in time.
            VisionedgeError: the engine cannot be opened; as it was raised in the process.
        """
        assert self._model is not None  # noqa: S101 - `send_start_request` comes first
        self._control.settimeout(self._limits.open_s)
        try:
            info = protocol.decode_start_reply(protocol.receive_message(self._control), self._model)
            self._open_channels(info.plan.lanes + _SPARE_CHANNELS)
        except TimeoutError:
            self.kill(f"did not open its engine within {self._limits.open_s:g} s", Fault.HANG)
            raise self._make_start_error() from None
        except VisionedgeError:
            self._reap()
            raise
        except (EOFError, OSError):
            raise self._make_start_error() from None
        self._control.settimeout(None)
        self.device, self._max_rows = info.device.effective, info.max_rows
        return info

    def _open_channels(self, count: int) -> None:
        self._channel_count = count
        requests, their_requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pairs = [socket.socketpair() for _ in range(count)]
        self._requests = requests
        try:
            theirs = [their_requests.fileno(), *(end.fileno() for _, end in pairs)]
            socket.send_fds(self._control, [b"L"], theirs)
        finally:
            their_requests.close()
            for number, (ours, end) in enumerate(pairs):
                end.close()
                ours.settimeout(self._limits.run_s)
                self._channels.put(_ReplyChannel(number, ours))

    def _make_start_error(self) -> WorkerStartError:
        why = self._reap()
        signal_number = -(self._process.returncode or 0)
        crashed = signal_number in _CRASH_SIGNALS
        killed = signal_number > 0 and not crashed and self._kill_reason is None
        return WorkerStartError(why, crashed=crashed, killed=killed)

    # --- batches --------------------------------------------------------------------------------------------

    def compute(self, pictures: PictureBatch, min_score: float | None) -> Rows:
        """Compute pictures in the process: rows float32 (n, k, 6).

        Raises:
            WorkerDrainedError: another worker serves.
            EngineUnavailableError: the process is gone, or was lost during this batch.
            EngineError: the engine failed on this batch.
        """
        blocks = [self._frame_pool.block_of(picture) for picture in pictures]
        loose = [picture for picture, block in zip(pictures, blocks, strict=True) if block is None]
        numbers = tuple(-1 if block is None else block for block in blocks)
        channel = self._take_channel()
        limit_s, started_s = self._timeout.limit_s, time.monotonic()
        try:
            self._send_request(protocol.InferRequest(channel.number, numbers, min_score))
            protocol.send_pictures(channel.socket, loose)
            wait_for_reply(channel.socket, limit_s)
            rows, unplanned = protocol.receive_rows(channel.socket, len(blocks), self._max_rows)
        except EngineError:
            self._return_channel(channel)
            raise
        except (EOFError, OSError) as error:
            channel.socket.close()
            if isinstance(error, TimeoutError):
                self.kill(f"gave no answer within {limit_s:.3g} s", Fault.HANG)
            else:
                self._disconnect()  # it is dead or dying; `wait_until_exit` finds out why
            raise EngineUnavailableError(
                f"the engine's process {self.pid} was lost during this batch"
            ) from None
        self._return_channel(channel)
        self._timeout.note(time.monotonic() - started_s)
        self.unplanned_shapes = max(self.unplanned_shapes, unplanned)
        return rows

    def _send_request(self, request: protocol.InferRequest) -> None:
        with self._send_lock:
            if self._requests is None:
                raise EOFError("the engine's process is gone")
            self._requests.send(protocol.encode_request(request))

    def _take_channel(self) -> _ReplyChannel:
        try:
            channel = self._channels.get(timeout=self._limits.run_s)
        except queue.Empty:
            raise EngineError("the engine is too busy") from None
        if channel is None or self._drained:
            self._channels.put(channel)  # for the next thread that waits
            if self._drained:
                raise WorkerDrainedError(f"the engine's process {self.pid} computes nothing more")
            raise EngineUnavailableError(f"the engine's process {self.pid} is gone")
        return channel

    def _return_channel(self, channel: _ReplyChannel) -> None:
        self._channels.put(channel)
        if self._closed:
            self._close_channels()

    def _close_channels(self) -> None:
        """Close the channels that are not in use, and wake the threads that wait for one."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                channel = self._channels.get_nowait()
                if channel is not None:
                    channel.socket.close()
        self._channels.put(None)

    # --- the end --------------------------------------------------------------------------------------------

    def wait_until_exit(self, on_update: Callable[[protocol.EngineUpdate], None]) -> str:
        """Wait until the process has ended and report each update until then; the reason of the end."""
        with contextlib.suppress(EOFError, OSError, ValueError, KeyError):
            while True:
                on_update(protocol.decode_update(protocol.receive_message(self._control)))
        return self._reap()

    def drain(self) -> None:
        """Take no more batches, finish those in progress, and end. Blocks for as long as a batch takes."""
        self._drained = True
        with contextlib.suppress(queue.Empty):
            for _ in range(self._channel_count):
                channel = self._channels.get(timeout=self._limits.run_s)
                if channel is None:
                    break  # the process is gone
                channel.socket.close()
        self._channels.put(None)
        self.request_exit()

    def request_exit(self) -> None:
        """Close the connection, so that the process ends by itself; kill it if it does not within 0.5 s."""
        self._disconnect()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_TIMEOUT_S)
            return
        self.kill("was asked to end and did not")

    def kill(self, reason: str, fault: Fault = Fault.DIED) -> None:
        """Kill the process; `wait_until_exit` gives this reason."""
        if self._kill_reason is None:
            self._kill_reason, self.fault = reason, fault
        self._process.kill()

    def discard(self) -> None:
        """Kill and reap a process that was never started with a request."""
        self.kill("was never needed")
        self._reap()

    def _disconnect(self) -> None:
        """Shut the control socket down: the process ends by itself, and `wait_until_exit` returns."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def _reap(self) -> str:
        """Close everything; the reason why the process ended."""
        try:
            code: int | None = self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # Its connection is closed, so it cannot be used even if it lives on.
            self.kill("closed its connection and did not end")
            code = self._wait_killed()
        self._control.close()
        with self._send_lock:
            if self._requests is not None:
                self._requests.close()
                self._requests = None
        self._close_channels()
        return _describe_exit(code, self._kill_reason)

    def _wait_killed(self) -> int | None:
        try:
            return self._process.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None  # it hangs inside a driver and is left behind

    # --- its log --------------------------------------------------------------------------------------------

    def _forward_log(self) -> None:
        """Log what the process writes, line by line; more than 50 lines in a second are counted only."""
        source = self._process.stdout
        assert source is not None  # noqa: S101 - it was started with a pipe
        second, lines = 0, 0
        with source:
            for line in iter(lambda: source.readline(_LOG_LINE_CHARACTERS), ""):
                now = int(time.monotonic())
                if now != second:
                    if lines > _LOG_LINES_PER_S:
                        log.warning("%d lines of the engine's log were dropped", lines - _LOG_LINES_PER_S)
                    second, lines = now, 0
                lines += 1
                if lines <= _LOG_LINES_PER_S:
                    _log_line(line.rstrip())


def _spawn(control: socket.socket, frame_pool: SharedFramePool) -> subprocess.Popen[str]:
    arguments = [str(number) for number in (control.fileno(), frame_pool.fd, os.getpid())]
    fds = (control.fileno(), frame_pool.fd)
    return start_child(
        "visionedge.engine.process.server", *arguments, stderr=subprocess.STDOUT, pass_fds=fds, text=True
    )


def _log_line(line: str) -> None:
    """A line in our own format keeps its level; what native code writes is a warning."""
    word, _, rest = line.partition(" ")
    level = logging.getLevelNamesMapping().get(word)
    if level is None:
        level, rest = logging.WARNING, line
    if rest:
        log.log(level, "%s", redact(rest))


def _describe_exit(code: int | None, kill_reason: str | None) -> str:
    """Why a process ended; our own reason where we killed it."""
    if code is None:
        return f"{kill_reason or 'hangs'}, and cannot be killed"
    if code == -signal.SIGKILL and kill_reason is not None:
        return kill_reason
    if code < 0:
        return f"died of signal {-code} ({signal.Signals(-code).name})"
    return f"ended with code {code}"
