"""The engine's own process: ``python -m visionedge.engine.process.server CONTROL_FD PICTURES_FD PARENT_PID``.

It opens what it is ordered to, tells what came of that, and computes what comes over its lines, a thread for
each. It lives as long as the module that started it and not a moment longer; `process` starts it again.
"""

import contextlib
import ctypes
import logging
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from visionedge.engine.device.session import REAL, EngineError, Pictures, Seam
from visionedge.engine.local_engine import Engine, open_engine
from visionedge.engine.process import protocol
from visionedge.engine.process.shared_memory import Window
from visionedge.errors import UnavailableError
from visionedge.frames.types import InputSpec
from visionedge.model.postprocess import Rows
from visionedge.runtime.ort import import_onnxruntime
from visionedge.runtime.process_limits import settle_allocator

log = logging.getLogger(__name__)

LOG_FORMAT = "%(levelname)s %(message)s"
"""What the module takes apart again."""

_PR_SET_PDEATHSIG = 1
_FIRST_TO_GO = "500"
_MOST_LINES = 250

_YIELDS = 1
"""By how much it is nicer than the module, whose cameras, lanes and answers over HTTP need a moment each; the
kernel would let a batch that computes all the time go on for milliseconds before it is their turn."""


def main(control_fd: int, pictures_fd: int, parent: int) -> None:
    """Serve until the module is gone; never returns."""
    settle_allocator()
    os.nice(_YIELDS)
    _depend_on(parent)
    control = socket.socket(fileno=control_fd)
    # A spare child waits here until it is needed, with all that is slow to load; what is wrong shows later.
    with contextlib.suppress(UnavailableError):
        import_onnxruntime()
    order: protocol.Order = pickle.loads(protocol.receive(control))  # noqa: S301 - from the module, whose child this is
    logging.basicConfig(format=LOG_FORMAT, level=order.log_level, stream=sys.stderr)
    try:
        engine = _opened(order)
    except Exception as error:  # noqa: BLE001 - told to the module, which raises it again
        protocol.send(control, protocol.refusal_message(error))
        return
    window = Window(pictures_fd, order.model.input)
    protocol.send(control, protocol.facts_message(_facts(engine)))
    engine.checks_numbers &= order.checks_numbers
    engine.on_plan = lambda plan: protocol.send(control, protocol.plan_message(plan))
    _, fds, _, _ = socket.recv_fds(control, 1, _MOST_LINES)
    requests, *lines = [socket.socket(fileno=fd) for fd in fds]
    desk = Desk(requests, lines, engine, window, order.model.input)
    for number in range(engine.plan.lanes):
        threading.Thread(target=desk.serve, name=f"lane:{number}", daemon=True).start()
    control.recv(1)  # nothing more is ever said: this waits for the module's end


def _opened(order: protocol.Order) -> Engine:
    return open_engine(
        order.model,
        order.inference,
        data=order.data,
        plans=order.plans,
        measuring=order.measuring,
        only=order.only,
        seam=_seam(order.inject),
    )


def _seam(script: Path | None) -> Seam:
    if script is None:
        return REAL
    from visionedge.engine.process import fault_injection  # not in the images

    return fault_injection.seam_of(fault_injection.read_script(script))


def _facts(engine: Engine) -> protocol.Facts:
    return protocol.Facts(
        engine.device,
        engine.plan,
        engine.precision,
        engine.places,
        engine.notes,
        engine.rows,
        engine.proof,
    )


def _depend_on(parent: int) -> None:
    """End with the module, end before it when memory is short, and leave Ctrl-C to it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # it was gone before that could be said
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO, encoding="ascii")


class _Computes(Protocol):
    """What the desk asks of an engine."""

    @property
    def unplanned_shapes(self) -> int:
        """Runs with a batch size that was not warmed up."""

    def infer(self, pictures: Pictures, least_score: float | None = None) -> Rows:
        """See `engine.Engine.infer`."""


class Desk:
    """Where requests come and are answered; `serve` is the target of as many threads as the plan has lanes.

    No more than these compute at a time: they would only take each other's caches away.
    """

    def __init__(
        self,
        requests: socket.socket,
        lines: Sequence[socket.socket],
        engine: _Computes,
        window: Window,
        spec: InputSpec,
    ) -> None:
        self._requests = requests
        self._lines = lines
        self._engine = engine
        self._window = window
        self._shape = (spec.height_px, spec.width_px, 3)

    def serve(self) -> None:
        """Compute until the module hangs up."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._answer(protocol.next_request(self._requests))

    def _answer(self, request: protocol.Request) -> None:
        line = self._lines[request.line]
        pictures = [
            self._window.picture(block) if block >= 0 else protocol.receive_picture(line, self._shape)
            for block in request.blocks
        ]
        try:
            rows = self._engine.infer(pictures, request.least_score)
        except EngineError as error:
            protocol.reply_failure(line, error, self._engine.unplanned_shapes)
            return
        protocol.reply_rows(line, rows, self._engine.unplanned_shapes)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:4]))
    logging.shutdown()
    os._exit(0)  # without waiting for a driver that hangs
