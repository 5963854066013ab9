"""One child of the engine, from start to end: spawned, listened to, asked, and ended."""

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

from visionedge.engine.device.devices import DeviceVerdict, EffectiveDevice
from visionedge.engine.device.faults import Fault
from visionedge.engine.device.session import EngineError, EngineUnavailableError, PictureBatch
from visionedge.engine.plan import Plan
from visionedge.engine.process import protocol
from visionedge.engine.process.recovery_policy import RecoveryTiming
from visionedge.engine.process.shared_memory import SharedFramePool
from visionedge.errors import VisionedgeError
from visionedge.model.postprocess import Rows
from visionedge.runtime.child_process import start_child
from visionedge.runtime.redaction import redact
from visionedge.runtime.threads import ThreadGroup

# How long the answer to a batch is waited for before its process counts as hung.
#
# About ten times what batches usually take. Time in which this process did not run either (it was stopped, or
# the machine was) is not the child's.


MIN_LIMIT_S = 2.0
"""A busy machine may keep a healthy process from its work for this long."""

_USUAL_FACTOR = 10
_DECAY = 0.98
_MIN_BATCHES = 5
_SLICE_S = 0.25
_MAX_SLICE_S = 2 * _SLICE_S

Readable = Callable[[socket.socket, float], bool]


class AdaptiveTimeout:
    """What a batch usually takes, from the batches of one process: the longest of the last hundred or so.

    Any thread may call; a note that is lost in between does no harm.
    """

    def __init__(self, max_s: float) -> None:
        self._most_s = max_s
        self._count = 0
        self._usual_s = 0.0

    def __repr__(self) -> str:
        return f"<UsualTime {self._usual_s:.3f} s limit={self.limit_s:.3g} s>"

    def note(self, took_s: float) -> None:
        """A batch was answered after this time, its wait for a free lane included."""
        self._count += 1
        self._usual_s = max(took_s, self._usual_s * _DECAY)

    @property
    def limit_s(self) -> float:
        """How long the next batch may take."""
        if self._count < _MIN_BATCHES:
            return self._most_s
        return min(self._most_s, max(MIN_LIMIT_S, _USUAL_FACTOR * self._usual_s))


def wait_for_reply(
    line: socket.socket,
    limit_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    readable: Readable | None = None,
) -> None:
    """Wait until a reply begins to arrive, or the other end is gone.

    Raises:
        TimeoutError: nothing came within the limit, in which this process ran all the time.
    """
    ready = readable or _readable
    waited_s, before_s = 0.0, clock()
    while not ready(line, min(_SLICE_S, max(0.0, limit_s - waited_s))):
        now_s = clock()
        # A slice that took much longer is one in which nobody ran.
        waited_s += min(now_s - before_s, _MAX_SLICE_S)
        before_s = now_s
        if waited_s >= limit_s:
            raise TimeoutError(f"no reply within {limit_s:g} s")


def _readable(line: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(line, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


log = logging.getLogger(__name__)

_SPARE_CHANNELS = 3
"""Beside those of the plan's lanes: for one lane more, and for pictures that come over HTTP."""

_LOG_LINE_CHARACTERS = 1000
_LOG_LINES_PER_S = 50
_EXIT_TIMEOUT_S = 0.5
_KILL_TIMEOUT_S = 5.0
_CRASH_SIGNALS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """How long to wait: for a batch, for a child to open (TensorRT builds for minutes), for one to come.

    `run_s` is the most for a batch; how long batches usually take makes it less (`hang_watch`).
    """

    run_s: float = 30.0
    open_s: float = 1800.0
    worker_wait_s: float = 1.0


@dataclass(frozen=True, slots=True)
class SupervisionTuning:
    """How long to wait for what, and how a device is probed where that is not the usual way."""

    limits: WorkerLimits
    timing: RecoveryTiming | None = None
    prober: Callable[[EffectiveDevice], DeviceVerdict] | None = None


class WorkerStartError(EngineError):
    """A child ended, or hung, before it had opened its engine: `why` in a few words.

    `crashed`: by itself; `killed`: by a signal that somebody sent, such as the kernel for want of memory.
    """

    def __init__(self, why: str, *, crashed: bool, killed: bool = False) -> None:
        super().__init__(f"the engine's process {why} while it opened the model")
        self.why = why
        self.crashed = crashed
        self.killed = killed


class WorkerDrainedError(EngineError):
    """Another child serves now; nothing of the batch was computed here."""


@dataclass(frozen=True, slots=True)
class _ReplyChannel:
    """Where the reply to a request comes, and its number in the child."""

    number: int
    socket: socket.socket


class Worker:
    """A child process. Make it on a thread that lives on: the child is killed when that thread ends.

    `begin` comes first. `opened` and `wait` belong to one thread, in this order; any may call the others. One
    never begun is to be buried. What the child logs goes to our log, on a thread of the crew. `fault` is why
    it was lost, once it is.
    """

    def __init__(self, frame_pool: SharedFramePool, limits: WorkerLimits, thread_group: ThreadGroup) -> None:
        self.unplanned_shapes = 0
        self.fault = Fault.DIED
        self.began_s = time.monotonic()
        self._arena = frame_pool
        self._limits = limits
        self._usual = AdaptiveTimeout(limits.run_s)
        self._rows = 0
        self._count = 0
        self._verdict: str | None = None
        self._closed = False
        self._drained = False
        self._channels: queue.SimpleQueue[_ReplyChannel | None] = queue.SimpleQueue()
        self._queue: socket.socket | None = None
        self._send_lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = _spawn(theirs, frame_pool)
        thread_group.start(f"engine-log:{self.pid}", self._forward_log)

    def begin(self, start_request: protocol.StartRequest) -> None:
        """Order the child to open an engine; it may have been started long before."""
        self.began_s = time.monotonic()
        with contextlib.suppress(OSError):  # that it is gone already shows when it is waited for
            protocol.send_message(self._control, pickle.dumps(start_request))

    def __repr__(self) -> str:
        return f"<Worker {self.pid} {'ready' if self._rows else 'opening'}>"

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def opened(self) -> protocol.EngineInfo:
        """Wait until the child has opened its engine, and connect the lines.

        Raises:
            StillbornError: it died over it, or did not end in time.
            VisionedgeError: it could not, as it was raised there.
        """
        self._control.settimeout(self._limits.open_s)
        try:
            info = protocol.decode_start_reply(protocol.receive_message(self._control))
            self._open_channels(info.plan.lanes + _SPARE_CHANNELS)
        except TimeoutError:
            self.end(f"did not open its engine within {self._limits.open_s:g} s", Fault.HANG)
            raise self._make_start_error() from None
        except VisionedgeError:
            self._reap()
            raise
        except (EOFError, OSError):
            raise self._make_start_error() from None
        self._control.settimeout(None)
        self._rows = info.rows
        return info

    def _open_channels(self, count: int) -> None:
        self._count = count
        requests, their_requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pairs = [socket.socketpair() for _ in range(count)]
        self._queue = requests
        try:
            theirs = [their_requests.fileno(), *(end.fileno() for _, end in pairs)]
            socket.send_fds(self._control, [b"L"], theirs)
        finally:
            their_requests.close()
            for number, (ours, end) in enumerate(pairs):
                end.close()
                ours.settimeout(self._limits.run_s)
                self._channels.put(_ReplyChannel(number, ours))

    def compute(self, pictures: PictureBatch, min_score: float | None) -> Rows:
        """Let the child compute pictures: rows float32 (n, k, 6).

        Raises:
            RetiredError: another one serves.
            EngineAwayError: it is gone, or was lost over this batch.
            EngineError: it could not.
        """
        blocks = [self._arena.block_of(picture) for picture in pictures]
        loose = [picture for picture, block in zip(pictures, blocks, strict=True) if block is None]
        line = self._take_channel()
        numbers = tuple(-1 if block is None else block for block in blocks)
        limit_s, began_s = self._usual.limit_s, time.monotonic()
        try:
            self._send_request(protocol.InferRequest(line.number, numbers, min_score))
            protocol.send_pictures(line.socket, loose)
            wait_for_reply(line.socket, limit_s)
            rows, unplanned = protocol.receive_rows(line.socket, len(blocks), self._rows)
        except EngineError:
            self._return_channel(line)
            raise
        except (EOFError, OSError) as error:
            line.socket.close()
            if isinstance(error, TimeoutError):
                self.end(f"gave no answer within {limit_s:.3g} s", Fault.HANG)
            else:
                self._disconnect()  # it is dead or dying, and its own exit code says of what
            raise EngineUnavailableError(
                f"the engine's process {self.pid} was lost over this batch"
            ) from None
        self._return_channel(line)
        self._usual.note(time.monotonic() - began_s)
        self.unplanned_shapes = max(self.unplanned_shapes, unplanned)
        return rows

    def _send_request(self, request: protocol.InferRequest) -> None:
        with self._send_lock:
            if self._queue is None:
                raise EOFError("it is gone")
            self._queue.send(protocol.encode_request(request))

    def _take_channel(self) -> _ReplyChannel:
        try:
            line = self._channels.get(timeout=self._limits.run_s)
        except queue.Empty:
            raise EngineError("the engine is too busy") from None
        if line is None or self._drained:
            self._channels.put(line)  # for the next who waits
            if self._drained:
                raise WorkerDrainedError(f"the engine's process {self.pid} computes nothing more")
            raise EngineUnavailableError(f"the engine's process {self.pid} is gone")
        return line

    def _return_channel(self, line: _ReplyChannel) -> None:
        self._channels.put(line)
        if self._closed:
            self._close_channels()

    def _close_channels(self) -> None:
        """Close the lines that nobody uses, and let nobody wait for one."""
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._channels.get_nowait()
                if line is not None:
                    line.socket.close()
        self._channels.put(None)

    def wait(self, on_plan_reduced: Callable[[Plan], None]) -> str:
        """Wait until the child is gone, and hand on what it says of its plan meanwhile; why it went."""
        with contextlib.suppress(EOFError, OSError, ValueError, KeyError):
            while True:
                on_plan_reduced(protocol.decode_plan(protocol.receive_message(self._control)))
        return self._reap()

    def drain(self) -> None:
        """Take no more batches, finish those that are computed, and end. Blocks as long as one may take."""
        self._drained = True
        with contextlib.suppress(queue.Empty):
            for _ in range(self._count):
                line = self._channels.get(timeout=self._limits.run_s)
                if line is None:
                    break  # it is gone
                line.socket.close()
        self._channels.put(None)
        self.leave()

    def end(self, verdict: str, fault: Fault = Fault.DIED) -> None:
        """Kill it, because of `verdict`; `wait` tells it."""
        if self._verdict is None:
            self._verdict, self.fault = verdict, fault
        self._process.kill()

    def leave(self) -> None:
        """Hang up, so that it ends by itself; soon after it is killed."""
        self._disconnect()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_TIMEOUT_S)
            return
        self.end("was asked to end and did not")

    def discard(self) -> None:
        """Kill it and forget it, before it was ever begun."""
        self.end("was never needed")
        self._reap()

    def _disconnect(self) -> None:
        """Nothing is said any more: the child ends by itself, and `wait` comes to its end."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def _reap(self) -> str:
        """Everything of it closed; why it went."""
        try:
            # It hung up; should it live on nevertheless, it is of no use any more.
            code: int | None = self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.end("hung up and did not end")
            code = self._wait_killed()
        self._control.close()
        with self._send_lock:
            if self._queue is not None:
                self._queue.close()
                self._queue = None
        self._close_channels()
        return _describe_exit(code, self._verdict)

    def _wait_killed(self) -> int | None:
        try:
            return self._process.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None  # it hangs inside a driver; it is left behind

    def _make_start_error(self) -> WorkerStartError:
        why = self._reap()
        signal_number = -(self._process.returncode or 0)
        crashed = signal_number in _CRASH_SIGNALS
        killed = signal_number > 0 and not crashed and self._verdict is None
        return WorkerStartError(why, crashed=crashed, killed=killed)

    def _forward_log(self) -> None:
        """Hand on what the child writes, line by line; a flood is cut, and said to be."""
        source = self._process.stdout
        assert source is not None  # noqa: S101 - it was started with a pipe
        second, lines = 0, 0
        with source:
            for line in iter(lambda: source.readline(_LOG_LINE_CHARACTERS), ""):
                now = int(time.monotonic())
                if now != second:
                    if lines > _LOG_LINES_PER_S:
                        log.warning("%d lines of the engine's log were left out", lines - _LOG_LINES_PER_S)
                    second, lines = now, 0
                lines += 1
                if lines <= _LOG_LINES_PER_S:
                    _log_line(line.rstrip())


def _spawn(control: socket.socket, frame_pool: SharedFramePool) -> subprocess.Popen[str]:
    message = [str(number) for number in (control.fileno(), frame_pool.fd, os.getpid())]
    fds = (control.fileno(), frame_pool.fd)
    return start_child(
        "visionedge.engine.process.server", *message, stderr=subprocess.STDOUT, pass_fds=fds, text=True
    )


def _log_line(line: str) -> None:
    """A line of our own format keeps its level; what native code writes is a warning."""
    word, _, rest = line.partition(" ")
    level = logging.getLevelNamesMapping().get(word)
    if level is None:
        level, rest = logging.WARNING, line
    if rest:
        log.log(level, "%s", redact(rest))


def _describe_exit(code: int | None, verdict: str | None) -> str:
    """Why a child ended; our verdict counts where we killed it."""
    if code is None:
        return f"{verdict or 'hangs'}, and does not even die"
    if code == -signal.SIGKILL and verdict is not None:
        return verdict
    if code < 0:
        return f"died of signal {-code} ({signal.Signals(-code).name})"
    return f"ended with code {code}"
