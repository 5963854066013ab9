"""The messages between the module and a worker process, over sockets that only these two have.

The control socket carries the start request (once, to the worker), the reply (once, back), the other sockets,
and updates: a smaller plan, the replicas of a remote device (rarely, back). The request queue takes whole
requests from any thread and gives each to the first free thread of the worker: the next request is there
already when a batch is done. A reply channel is a socket for each batch that may be in progress at a time.

    queue     channel, count, least score (NaN: all rows), `count` block numbers
    channel   to the worker: the pixels of pictures in no block (-1)
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

from visionedge.engine.device.devices import DeviceAssignment, DeviceState, ReasonCode
from visionedge.engine.device.faults import EngineError, Fault
from visionedge.engine.device.remote import ReplicaStatus
from visionedge.engine.device.session import NodePlacement
from visionedge.engine.device_parity import DeviceCheck, ParityResult, SpeedCheck
from visionedge.engine.engine_choice import EngineChoice
from visionedge.engine.interface import EngineInfo, EngineSettings
from visionedge.engine.plan import AutotuneResult, Plan
from visionedge.errors import DeviceError, ModelError, UnavailableError, VisionedgeError
from visionedge.frames.types import Picture
from visionedge.model.model import Model
from visionedge.model.postprocess import Rows

_LENGTH = struct.Struct("<I")
_REQUEST = struct.Struct("<IId")
_REPLY = struct.Struct("<IIII")
_ROWS, _FAILED = 0, 1
_MAX_BYTES = 64 << 20
"""The largest message; more can only be an error."""

_MAX_REQUEST_BYTES = 64 << 10
"""More than ten thousand pictures."""


@dataclass(frozen=True, slots=True)
class StartRequest:
    """The engine that a worker opens. Sent with pickle, to our own process only; replies never are.

    `plans` and `choices` are used without measuring, by device: a worker that takes over uses those of the
    one before. `only` is the one device to open. `checks_finite=False`: do not treat NaN or infinity in the
    output as a fault (the model yields it by itself). `inject` is a script of faults, for tests.
    """

    model: Model
    settings: EngineSettings
    data: Path | None
    log_level: int
    plans: Mapping[str, Plan] = field(default_factory=dict)
    choices: Mapping[str, EngineChoice] = field(default_factory=dict)
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
        EOFError: the other side closed the connection.
        OSError: as sockets raise; TimeoutError if nothing arrived in time.
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
            raise EOFError("the other side closed the connection")
        got += read


# --- the reply to the start request -------------------------------------------------------------------------


def encode_info(info: EngineInfo) -> bytes:
    """The engine that is open; without the model, which the module has."""
    document = {
        "device": asdict(info.device) | {"since_utc": info.device.since_utc.isoformat()},
        "plan": _plan_document(info.plan),
        "choice": info.choice.document(),
        "nodes": asdict(info.node_placement),
        "notes": info.notes,
        "rows": info.max_rows,
        "runtime": info.runtime,
        "parity": [parity_result.document() for parity_result in info.device_check.parity_results],
        "speedCheck": info.device_check.speed_check and asdict(info.device_check.speed_check),
        "replicas": [asdict(replica) for replica in info.replicas],
    }
    return json.dumps(document).encode()


def _plan_document(plan: Plan) -> dict[str, Any]:
    return {
        "lanes": plan.lanes,
        "buckets": plan.buckets,
        "reason": plan.reason,
        "measured": plan.measured.document() if plan.measured else None,
    }


EngineUpdate = Plan | tuple[ReplicaStatus, ...]
"""What changes while the engine runs: a smaller plan, as larger batches did not fit into memory; replicas."""


def encode_update(update: EngineUpdate) -> bytes:
    """An update, sent while the engine runs."""
    if isinstance(update, Plan):
        return json.dumps({"plan": _plan_document(update)}).encode()
    return json.dumps({"replicas": [asdict(replica) for replica in update]}).encode()


def decode_update(payload: bytes) -> EngineUpdate:
    """The update in such a message."""
    document = json.loads(payload)
    if "plan" in document:
        return _parse_plan(document["plan"])
    return _parse_replicas(document["replicas"])


def _parse_replicas(documents: Sequence[Mapping[str, Any]]) -> tuple[ReplicaStatus, ...]:
    return tuple(ReplicaStatus(**document) for document in documents)


def encode_start_error(error: BaseException) -> bytes:
    """The error that prevented the start: its class, its text, its code."""
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
    """The engine for this model in the reply to a start request.

    Raises:
        VisionedgeError: the engine could not be opened; of the class that was raised in the worker.
    """
    document = json.loads(payload)
    if "error" in document:
        kind, message = document["error"], document["message"]
        if kind == "DeviceError":
            raise DeviceError(message, document["code"])
        raise _ERROR_TYPES.get(kind, VisionedgeError)(message)
    device, nodes, speed_check = document["device"], document["nodes"], document["speedCheck"]
    typed = {
        "code": ReasonCode(device["code"]),
        "since_utc": datetime.fromisoformat(device["since_utc"]),
    }
    return EngineInfo(
        model,
        DeviceState(**device | typed),
        EngineChoice.from_document(document["choice"]),
        _parse_plan(document["plan"]),
        NodePlacement(nodes["on_device"], tuple(nodes["on_cpu"])),
        DeviceCheck(
            tuple(ParityResult.from_document(parity_result) for parity_result in document["parity"]),
            None if speed_check is None else SpeedCheck(**speed_check),
        ),
        tuple(document["notes"]),
        document["rows"],
        runtime=document["runtime"],
        replicas=_parse_replicas(document["replicas"]),
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
    """Pictures to compute, by their blocks; pictures in no block (-1) follow on the channel, in order."""

    channel: int
    blocks: tuple[int, ...]
    min_score: float | None


def encode_request(request: InferRequest) -> bytes:
    """The message for the request queue."""
    count = len(request.blocks)
    least = math.nan if request.min_score is None else request.min_score
    return _REQUEST.pack(request.channel, count, least) + struct.pack(f"<{count}i", *request.blocks)


def receive_request(queue: socket.socket) -> InferRequest:
    """Wait for a request; for any number of threads.

    Raises:
        EOFError, OSError: the module closed the connection.
    """
    message = queue.recv(_MAX_REQUEST_BYTES)
    if not message:
        raise EOFError("the module closed the connection")
    channel, count, least = _REQUEST.unpack_from(message)
    blocks = struct.unpack_from(f"<{count}i", message, _REQUEST.size)
    return InferRequest(channel, blocks, None if math.isnan(least) else least)


def send_pictures(channel: socket.socket, loose: Sequence[Picture]) -> None:
    """Send the pictures of a request that are in no block."""
    for picture in loose:
        channel.sendall(np.ascontiguousarray(picture).reshape(-1).data)


def receive_rows(channel: socket.socket, count: int, most_rows: int) -> tuple[Rows, int]:
    """Wait for the reply to a request of `count` pictures: the rows, and the worker's unplanned shapes.

    Raises:
        EngineError: the worker could not compute them.
        EOFError, OSError: the worker closed the connection or sent malformed data.
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
    """Receive the next picture of a request that is in no block."""
    return np.frombuffer(_receive_exactly(sock, math.prod(shape)), np.uint8).reshape(shape)


def send_rows(sock: socket.socket, rows: Rows, unplanned: int) -> None:
    """Reply to a request with rows (n, k, 6)."""
    head = _REPLY.pack(_ROWS, len(rows), rows.shape[1], unplanned)
    sock.sendall(head + np.ascontiguousarray(rows, "<f4").tobytes())


def send_error(sock: socket.socket, error: EngineError, unplanned: int) -> None:
    """Reply to a request with the reason why it failed."""
    text = f"{error.fault or ''}\n{error}".encode()
    sock.sendall(_REPLY.pack(_FAILED, 0, len(text), unplanned) + text)
