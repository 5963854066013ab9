"""What the module and the engine's child say to each other, over sockets that only the two have.

The control socket carries the order (once, to the child), the answer to it (once, back), the queue and the
lines; and then, seldom, another plan (back). The queue takes whole requests from any thread and gives each to
the first thread of the child that is free: the next one lies there when a batch is done, and no core waits
for it to come. A line is a socket for each batch that may be asked for at a time; its reply comes there.

    queue     line, count, least score (NaN: all rows), `count` block numbers
    line      to the child: the pixels of pictures in no block (-1)
              back: 0, pictures, rows of each, unplanned shapes, then float32 (pictures, rows, 6)
              or 1, 0, bytes of text, unplanned shapes, then the kind of fault, a line break, the reason
"""

import json
import math
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from visionedge.config.schema import InferenceConfig
from visionedge.engine.device.devices import DeviceAssignment, DeviceState, ReasonCode
from visionedge.engine.device.faults import Fault
from visionedge.engine.device.session import EngineError, NodePlacement
from visionedge.engine.device_parity import DeviceCheck, ParityResult, SpeedCheck
from visionedge.engine.interface import EngineInfo
from visionedge.engine.plan import AutotuneResult, Plan
from visionedge.errors import DeviceError, ModelError, UnavailableError, VisionedgeError
from visionedge.frames.types import Picture
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows
from visionedge.runtime.measurement import PrecisionChoice

_LENGTH = struct.Struct("<I")
_REQUEST = struct.Struct("<IId")
_REPLY = struct.Struct("<IIII")
_ROWS, _FAILED = 0, 1
_MAX_BYTES = 64 << 20
"""Of one message; more can only be a mistake."""

_MAX_REQUEST_BYTES = 64 << 10
"""Ten thousand pictures and more."""


@dataclass(frozen=True, slots=True)
class StartRequest:
    """What a child is asked to open. Pickled: it goes to our own child, nothing comes back this way.

    `plans` are used without measuring, by device: a child that takes over goes on as the last one did. `only`
    names the one device to open. Without `checks_finite` the model itself gives rows that are none. `inject`
    is a script of faults, for tests.
    """

    model: Model
    inference: InferenceConfig
    data: Path | None
    log_level: int
    plans: Mapping[str, Plan] = field(default_factory=dict)
    only: DeviceAssignment | None = None
    measuring: bool = True
    checks_finite: bool = True
    inject: Path | None = None


def send_message(sock: socket.socket, payload: bytes) -> None:
    """Send one message."""
    sock.sendall(_LENGTH.pack(len(payload)) + payload)


def receive_message(sock: socket.socket) -> bytes:
    """Receive one message.

    Raises:
        EOFError: the other side is gone.
        OSError: as sockets raise; TimeoutError when nothing came in time.
    """
    (length,) = _LENGTH.unpack(_receive_exactly(sock, _LENGTH.size))
    if length > _MAX_BYTES:
        raise EOFError(f"a message of {length} bytes")
    return bytes(_receive_exactly(sock, length))


def _receive_exactly(sock: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    _fill(sock, memoryview(data))
    return data


def _fill(sock: socket.socket, view: memoryview) -> None:
    got = 0
    while got < len(view):
        read = sock.recv_into(view[got:])
        if read == 0:
            raise EOFError("the other side is gone")
        got += read


# --- the answer to the order --------------------------------------------------------------------------------


def encode_info(info: EngineInfo) -> bytes:
    """An engine that is open, told."""
    device = info.device
    document = {
        "device": {
            "requested": device.requested,
            "effective": device.effective,
            "code": device.code,
            "reason": device.reason,
            "since": device.since_utc.isoformat(),
        },
        "plan": _plan_document(info.plan),
        "precision": info.precision.document(),
        "places": {"onDevice": info.node_placement.on_device, "onCpu": info.node_placement.on_cpu},
        "notes": info.notes,
        "rows": info.max_rows,
        "parity": [parity_result.document() for parity_result in info.device_check.parity_results],
        "speedCheck": info.device_check.speed_check and asdict(info.device_check.speed_check),
    }
    return json.dumps(document).encode()


def _plan_document(plan: Plan) -> dict[str, Any]:
    return {
        "lanes": plan.lanes,
        "buckets": plan.buckets,
        "reason": plan.reason,
        "measured": plan.measured.document() if plan.measured else None,
    }


def encode_plan(plan: Plan) -> bytes:
    """Another plan, told while the engine runs: larger batches did not fit into memory."""
    return json.dumps(_plan_document(plan)).encode()


def decode_plan(payload: bytes) -> Plan:
    """The plan in such a message."""
    return _parse_plan(json.loads(payload))


def encode_start_error(error: BaseException) -> bytes:
    """An engine that could not be opened, told: the kind of the error, its words, its code."""
    message = str(error)
    if not isinstance(error, VisionedgeError):
        message = f"the engine could not be opened: {type(error).__name__}: {message}"
    code = error.code if isinstance(error, DeviceError) else ""
    return json.dumps({"error": type(error).__name__, "message": message, "code": code}).encode()


_ERROR_TYPES: Mapping[str, type[VisionedgeError]] = {
    "ModelError": ModelError,
    "UnavailableError": UnavailableError,
    "EngineError": EngineError,
}


def decode_start_reply(payload: bytes, model: Model) -> EngineInfo:
    """The engine for this model in the answer to a start request.

    Raises:
        VisionedgeError: the engine could not be opened; of the class that was raised in the worker.
    """
    document = json.loads(payload)
    if "error" in document:
        kind, message = document["error"], document["message"]
        if kind == "DeviceError":
            raise DeviceError(message, document["code"])
        raise _ERROR_TYPES.get(kind, VisionedgeError)(message)
    device, placement, speed_check = document["device"], document["places"], document["speedCheck"]
    return EngineInfo(
        model,
        DeviceState(
            device["requested"],
            device["effective"],
            ReasonCode(device["code"]),
            device["reason"],
            datetime.fromisoformat(device["since"]),
        ),
        PrecisionChoice.from_document(document["precision"]),
        _parse_plan(document["plan"]),
        NodePlacement(placement["onDevice"], tuple(placement["onCpu"])),
        DeviceCheck(
            tuple(ParityResult.from_document(parity_result) for parity_result in document["parity"]),
            None if speed_check is None else SpeedCheck(**speed_check),
        ),
        tuple(document["notes"]),
        document["rows"],
    )


def _parse_plan(document: Mapping[str, Any]) -> Plan:
    measured = document["measured"]
    return Plan(
        document["lanes"],
        tuple(document["buckets"]),
        document["reason"],
        AutotuneResult.from_document(measured) if measured else None,
    )


# --- requests and replies -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class InferRequest:
    """Pictures to compute, by the block that they lie in; those in none (-1) follow on the line, in order."""

    channel: int
    blocks: tuple[int, ...]
    min_score: float | None


def encode_request(request: InferRequest) -> bytes:
    """What goes into the queue, in one piece."""
    count = len(request.blocks)
    least = math.nan if request.min_score is None else request.min_score
    return _REQUEST.pack(request.channel, count, least) + struct.pack(f"<{count}i", *request.blocks)


def receive_request(queue: socket.socket) -> InferRequest:
    """Wait for a request; any number of threads may.

    Raises:
        EOFError, OSError: the module is gone.
    """
    message = queue.recv(_MAX_REQUEST_BYTES)
    if not message:
        raise EOFError("the module is gone")
    channel, count, least = _REQUEST.unpack_from(message)
    blocks = struct.unpack_from(f"<{count}i", message, _REQUEST.size)
    return InferRequest(channel, blocks, None if math.isnan(least) else least)


def send_pictures(channel: socket.socket, loose: Sequence[Picture]) -> None:
    """Send the pictures of a request that lie in no block."""
    for picture in loose:
        channel.sendall(np.ascontiguousarray(picture).reshape(-1).data)


def receive_rows(channel: socket.socket, count: int, most_rows: int) -> tuple[Rows, int]:
    """Wait for the answer to a request of `count` pictures: the rows, and the child's unplanned shapes.

    Raises:
        EngineError: the child could not compute them.
        EOFError, OSError: the child is gone, or out of its mind.
    """
    kind, pictures, size, unplanned = _REPLY.unpack(_receive_exactly(channel, _REPLY.size))
    if kind == _FAILED:
        fault, _, message = (
            bytes(_receive_exactly(channel, min(size, _MAX_BYTES))).decode(errors="replace").partition("\n")
        )
        raise EngineError(message, Fault(fault) if fault in set(Fault) else None)
    if kind != _ROWS or pictures != count or size > most_rows:
        raise EOFError(f"a reply of {pictures} x {size} rows for {count} pictures")
    rows: Rows = np.empty((pictures, size, 6), np.float32)
    if rows.size:
        _fill(channel, rows.data.cast("B"))
    return rows, unplanned


def receive_picture(sock: socket.socket, shape: tuple[int, int, int]) -> Picture:
    """The next loose picture of a request."""
    return np.frombuffer(_receive_exactly(sock, math.prod(shape)), np.uint8).reshape(shape)


def send_rows(sock: socket.socket, rows: Rows, unplanned: int) -> None:
    """Answer a request with rows (n, k, 6)."""
    head = _REPLY.pack(_ROWS, len(rows), rows.shape[1], unplanned)
    sock.sendall(head + np.ascontiguousarray(rows, "<f4").tobytes())


def send_error(sock: socket.socket, error: EngineError, unplanned: int) -> None:
    """Answer a request with the reason why it failed."""
    text = f"{error.fault or ''}\n{error}".encode()
    sock.sendall(_REPLY.pack(_FAILED, 0, len(text), unplanned) + text)
