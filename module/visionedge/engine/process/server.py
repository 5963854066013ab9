"""The engine's own process: ``python -m visionedge.engine.process.server CONTROL_FD PICTURES_FD PARENT_PID``.

It opens the engine of the start request, reports the result, and computes requests, with one thread for each
lane. It ends together with the module that started it; the supervisor in the module restarts it.
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

from visionedge.engine.device.backend import DEVICE_BACKEND, DeviceBackend
from visionedge.engine.device.faults import EngineError
from visionedge.engine.interface import Engine
from visionedge.engine.local_engine import LocalEngine, open_engine
from visionedge.engine.process import protocol
from visionedge.engine.process.shared_memory import FrameView
from visionedge.errors import UnavailableError
from visionedge.frames.types import InputSpec
from visionedge.runtime.ort import import_onnxruntime
from visionedge.runtime.process_limits import configure_malloc

log = logging.getLogger(__name__)

LOG_FORMAT = "%(levelname)s %(message)s"
"""`worker.py` in the module parses this."""

_PR_SET_PDEATHSIG = 1
_OOM_SCORE_ADJ = "500"
_MAX_CHANNELS = 250

_NICE_INCREMENT = 1
"""Added to the niceness of the module. Its cameras, lanes and HTTP replies need the CPU only briefly; with
equal niceness the kernel would run a batch for some milliseconds before them."""


def main(control_fd: int, pictures_fd: int, parent: int) -> None:
    """Serve until the module closes the connection."""
    configure_malloc()
    os.nice(_NICE_INCREMENT)
    _tie_to_parent(parent)
    control = socket.socket(fileno=control_fd)
    # A spare process waits below, with the slow imports done; an import error is reported when it opens.
    with contextlib.suppress(UnavailableError):
        import_onnxruntime()
    start_request: protocol.StartRequest = pickle.loads(protocol.receive_message(control))  # noqa: S301 - from the module that started this process
    logging.basicConfig(format=LOG_FORMAT, level=start_request.log_level, stream=sys.stderr)
    try:
        engine = _open_engine(start_request)
    except Exception as error:  # noqa: BLE001 - sent to the module, which raises it again
        protocol.send_message(control, protocol.encode_start_error(error))
        return
    frame_view = FrameView(pictures_fd, start_request.model.input)
    protocol.send_message(control, protocol.encode_info(engine.info()))
    engine.checks_finite &= start_request.checks_finite
    updates = UpdateSender(control)
    engine.on_plan_reduced = updates.send
    engine.watch_replicas(updates.send)
    _, fds, _, _ = socket.recv_fds(control, 1, _MAX_CHANNELS)
    requests, *channels = [socket.socket(fileno=fd) for fd in fds]
    request_loop = RequestLoop(requests, channels, engine, frame_view, start_request.model.input)
    for number in range(engine.info().plan.lanes):
        threading.Thread(target=request_loop.serve, name=f"lane:{number}", daemon=True).start()
    control.recv(1)  # nothing is ever sent: this waits until the module closes the connection


def _open_engine(start_request: protocol.StartRequest) -> LocalEngine:
    return open_engine(
        start_request.model,
        start_request.settings,
        data=start_request.data,
        plans=start_request.plans,
        measuring=start_request.measuring,
        only=start_request.only,
        backend=_select_backend(start_request.inject),
    )


def _select_backend(script: Path | None) -> DeviceBackend:
    if script is None:
        return DEVICE_BACKEND
    from visionedge.engine.process import fault_injection  # not in the images

    return fault_injection.make_device_backend(fault_injection.read_fault_script(script))


def _tie_to_parent(parent: int) -> None:
    """End with the module, be killed before it when memory is short, and ignore Ctrl-C."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # the module ended before this call
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJ, encoding="ascii")


class UpdateSender:
    """Sends updates of the engine to the module; any thread may call."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lock = threading.Lock()

    def send(self, update: protocol.EngineUpdate) -> None:
        """Send one update."""
        with self._lock:
            protocol.send_message(self._control, protocol.encode_update(update))


class RequestLoop:
    """Receives requests and replies to them; `serve` is the target of as many threads as the plan has lanes.

    No more threads compute at a time: they would only evict each other's CPU caches.
    """

    def __init__(
        self,
        requests: socket.socket,
        channels: Sequence[socket.socket],
        engine: Engine,
        frame_view: FrameView,
        spec: InputSpec,
    ) -> None:
        self._requests = requests
        self._channels = channels
        self._engine = engine
        self._frame_view = frame_view
        self._shape = (spec.height_px, spec.width_px, 3)

    def serve(self) -> None:
        """Compute until the module closes the connection."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._answer(protocol.receive_request(self._requests))

    def _answer(self, request: protocol.InferRequest) -> None:
        channel = self._channels[request.channel]
        pictures = [
            self._frame_view.picture(block) if block >= 0 else protocol.receive_picture(channel, self._shape)
            for block in request.blocks
        ]
        try:
            rows = self._engine.infer(pictures, request.min_score).rows
        except EngineError as error:
            protocol.send_error(channel, error, self._engine.info().unplanned_shapes)
            return
        protocol.send_rows(channel, rows, self._engine.info().unplanned_shapes)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:4]))
    logging.shutdown()
    os._exit(0)  # without waiting for a driver that hangs
