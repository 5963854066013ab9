"""What a day costs in IoT Hub, counted from real messages: of `run --messages`, or of a running module."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from visionedge.errors import ConfigError, VisionedgeError
from visionedge.outbound.messages import DETECTIONS, MAX_BYTES, Message, parse_message
from visionedge.outbound.metering import BLOCK_BYTES, DAY_S, UNIT_BLOCKS_PER_DAY, count_blocks

_SHORT_S = 600.0
_BUDGET_SPENT = "telemetry-budget-spent"
_STATUS = "/api/v1/status"
_MAX_RESPONSE_BYTES = 4_000_000
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class MeasuredMessages:
    """Real messages of so many seconds, by output; `frames` by camera, empty where they are not known."""

    source: str
    seconds: float
    messages: Mapping[str, int]
    blocks: Mapping[str, float]
    size_bytes: float
    frames: Mapping[str, int] = field(default_factory=dict)

    def blocks_per_day(self, output: str) -> float:
        """The blocks of an output, scaled to a day."""
        return self.blocks.get(output, 0) * DAY_S / self.seconds


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a day comes to; before and after `telemetry.maxPerDay`."""

    measured: MeasuredMessages
    max_per_day: int

    @property
    def blocks_per_day(self) -> float:
        """Blocks a day of all outputs."""
        return sum(self.measured.blocks_per_day(output) for output in self.measured.blocks)

    @property
    def kept(self) -> float:
        """The share of the blocks of detections that the day's budget lets through."""
        limited = self.measured.blocks_per_day(DETECTIONS)
        return min(1.0, self.max_per_day / limited) if limited else 1.0

    @property
    def billed_blocks(self) -> float:
        """Blocks a day that are really sent: the budget does not count events."""
        return self.blocks_per_day - (1 - self.kept) * self.measured.blocks_per_day(DETECTIONS)

    def units(self, tier: str) -> tuple[float, int]:
        """The share of one unit's daily quota, and how many units that takes."""
        share = self.billed_blocks / UNIT_BLOCKS_PER_DAY[tier]
        return share, max(1, -int(-share // 1))

    def document(self) -> dict[str, Any]:
        """One JSON document."""
        measured, scale = self.measured, DAY_S / self.measured.seconds
        units = {tier: self.units(tier) for tier in UNIT_BLOCKS_PER_DAY}
        counted = sum(measured.blocks.values())
        return {
            "source": measured.source,
            "measuredSeconds": round(measured.seconds, 3),
            "measuredMessages": dict(measured.messages),
            "measuredFrames": dict(measured.frames),
            "messagesPerDay": round(sum(measured.messages.values()) * scale),
            "blocksPerDay": round(self.blocks_per_day),
            "bytesPerDay": round(measured.size_bytes * scale),
            "blockFill": round(measured.size_bytes / (counted * BLOCK_BYTES), 3) if counted else 0.0,
            "maxPerDay": self.max_per_day,
            "budgetLastsHours": None if self.kept == 1 else round(24 * self.kept, 1),
            "billedBlocksPerDay": round(self.billed_blocks),
            "units": {
                tier: {"share": round(share, 4), "units": count} for tier, (share, count) in units.items()
            },
        }


def to_text(estimate: Estimate) -> str:
    """The estimate for people."""
    document, measured = estimate.document(), estimate.measured
    frames = "".join(f", {count} frames of {camera}" for camera, count in measured.frames.items())
    lines = [
        f"{measured.source}: {sum(measured.messages.values())} messages in {measured.seconds:.0f} s{frames}",
        f"  a day: {document['messagesPerDay']:,} messages, {document['bytesPerDay'] / 1e6:,.1f} MB,"
        f" {document['blocksPerDay']:,} blocks of 4 KB ({document['blockFill']:.0%} full)",
    ]
    if estimate.kept < 1:
        lines.append(
            f"  telemetry.maxPerDay ({estimate.max_per_day:,}) is spent after "
            f"{document['budgetLastsHours']} h:"
            f" {document['billedBlocksPerDay']:,} blocks are sent"
        )
    for tier, need in document["units"].items():
        units = "1 unit" if need["units"] == 1 else f"{need['units']:,} units"
        digits = 1 if need["share"] >= 0.01 else 2
        lines.append(f"  {tier}: {need['share']:.{digits}%} of a unit's daily quota: {units}")
    if measured.seconds < _SHORT_S:
        lines.append("note: measured for less than 10 minutes; an hour with the usual traffic says more")
    return "\n".join(lines) + "\n"


# --- from a file --------------------------------------------------------------------------------------------


def measure_messages_file(path: Path) -> MeasuredMessages:
    """Count the messages of a file that `run --messages` wrote, from the first frame in it to the last.

    A file that several runs appended to counts each for itself, and a run as far as its daily budget lasted.

    Raises:
        ConfigError: it cannot be read, holds something else, or too little.
    """
    counter = _MessageCounter()
    try:
        with path.open("rb") as file:
            for sequence_number, line in enumerate(_lines(file), 1):
                try:
                    counter.add(line)
                except ValueError as error:
                    raise ConfigError(
                        [f"{path}: line {sequence_number} is no message of this module: {str(error)[:200]}"]
                    ) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    if counter.seconds <= 0:
        raise ConfigError([f"{path}: it holds fewer than two messages with frames, so no time was measured"])
    return MeasuredMessages(
        str(path),
        counter.seconds,
        counter.messages,
        counter.blocks,
        counter.size_bytes,
        dict(sorted(counter.frames.items())),
    )


def _lines(file: BinaryIO) -> Iterable[bytes]:
    """Its whole lines; a last one that is still being written, or was cut by a kill, is left out."""
    while (line := file.readline(MAX_BYTES + 1)).endswith(b"\n"):
        yield line[:-1]
    if len(line) > MAX_BYTES:
        yield line  # too long for a message: the reader reports it


class _MessageCounter:
    """Counts messages and the time in which they were made, run by run."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        self.blocks: Counter[str] = Counter()
        self.frames: Counter[str] = Counter()
        self.size_bytes = 0
        self.seconds = 0.0
        self._numbers: dict[str, int] = {}
        self._last: datetime | None = None
        self._spent = False
        self._events: list[Message] = []

    def add(self, body: bytes) -> None:
        """The next message of the file.

        Raises:
            ValueError: it is none.
        """
        message, document = parse_message(body), json.loads(body)
        now = max((_captured_at(frame) for frame in document.get("frames", ())), default=None)
        if message.sequence_number <= self._numbers.get(message.output, 0):
            # Another run begins; the events after the last frame were those of the end.
            self._numbers, self._last, self._spent, self._events = {}, None, False, []
        self._numbers[message.output] = message.sequence_number
        if now is not None:
            self._pass_time(now, message, document)
        elif document["code"] == _BUDGET_SPENT:
            self._spent = True
        elif self._last is not None:
            self._events.append(message)

    def _pass_time(self, now: datetime, message: Message, document: Mapping[str, Any]) -> None:
        """Time counts between messages with frames, so the first of a run only begins it."""
        before, self._last = self._last, now
        events, self._events = self._events, []
        if before is None or self._spent:
            return
        self.seconds += max(0.0, (now - before).total_seconds())
        for counted in (*events, message):
            self._count(counted)
        self.frames.update(frame["camera"] for frame in document["frames"])

    def _count(self, message: Message) -> None:
        self.messages[message.output] += 1
        self.blocks[message.output] += count_blocks(message.size_bytes)
        self.size_bytes += message.size_bytes


def _captured_at(frame: Mapping[str, Any]) -> datetime:
    """When a frame was captured.

    Raises:
        ValueError: it does not say.
    """
    moment = datetime.fromisoformat(str(frame.get("capturedAt")))
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


# --- from a running module ----------------------------------------------------------------------------------


def measure_running_module(url: str, token: str | None) -> MeasuredMessages:
    """What a running module projects from the last hour of its messages (`hub.bill` of its status).

    Raises:
        ConfigError: it is no address.
        VisionedgeError: the module does not answer, or makes no messages.
    """
    hub = _status(url, token).get("hub")
    bill = hub.get("metering") if isinstance(hub, dict) else None
    if not isinstance(hub, dict) or not isinstance(bill, dict):
        raise VisionedgeError(f"{url}: the module has counted no messages yet; ask again when it is ready")
    if hub.get("state") == "local" and "messagesFile" not in hub:
        raise VisionedgeError(
            f"{url}: the module runs outside IoT Edge and makes no messages; start it with --messages FILE"
        )
    try:
        return _from_projection(url, bill)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError):
        raise VisionedgeError(
            f"{url}: its status cannot be read; is it the same version of visionedge?"
        ) from None


def _from_projection(url: str, bill: Mapping[str, Any]) -> MeasuredMessages:
    """The messages behind the projection of a bill: its blocks, and as many messages to a block as ever."""
    seconds = float(bill["projectedFromSeconds"])
    if seconds < 1:
        raise ValueError("nothing was measured")
    counted = {output: per_day * seconds / DAY_S for output, per_day in bill["blocksPerDayByOutput"].items()}
    messages = {
        output: round(metered * bill["messages"][output] / bill["blocks"][output])
        for output, metered in counted.items()
    }
    size_bytes = sum(counted.values()) * BLOCK_BYTES * float(bill["blockFill"])
    return MeasuredMessages(url, seconds, messages, counted, size_bytes)


def _status(url: str, token: str | None) -> Mapping[str, Any]:
    """The status of a module.

    Raises:
        ConfigError: the address or the token cannot be used.
        VisionedgeError: there is no right answer.
    """
    if token and not (token.isascii() and token.isprintable()):
        raise ConfigError(["--token: it holds characters that an HTTP header cannot carry"])
    code, body = _get(url, {"Authorization": f"Bearer {token}"} if token else {})
    if code in {401, 403}:
        raise VisionedgeError(f"{url}: needs a token: set VISIONEDGE_HTTP_TOKEN, or give --token")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if code != 200 or not isinstance(document, dict):
        raise VisionedgeError(f"{url}: answered with {code} and no status of visionedge")
    return document


def _get(url: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
    """Ask for the status, without a proxy and without redirects: the token goes to this host alone."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError(["--url: is no address, such as http://127.0.0.1:8080"]) from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or parts.query:
        raise ConfigError(["--url: give the address of a module, such as http://127.0.0.1:8080"])
    connection_type = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = connection_type(parts.hostname, port, timeout=_TIMEOUT_S)
    try:
        connection.request(
            "GET", parts.path.rstrip("/").removesuffix(_STATUS) + _STATUS, headers=dict(headers)
        )
        response = connection.getresponse()
        return response.status, response.read(_MAX_RESPONSE_BYTES)
    except (OSError, HTTPException, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise VisionedgeError(f"{url}: does not answer: {reason or type(error).__name__}") from None
    finally:
        connection.close()
