"""Requests about past scene events and counts: their parameters, and the answers as JSON or CSV."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from aiohttp import hdrs, web

from visionedge.config.documents import Document
from visionedge.frames.types import format_utc, utc_now
from visionedge.outbound.messages import encode_json
from visionedge.runtime.limits import BoundedExecutor
from visionedge.scene.events import EVENT_TYPES, TOTALS_OF_LINES, TOTALS_OF_ZONES, EventFilter
from visionedge.scene.totals import COUNT_DAYS, CountRow, UnknownEventError
from visionedge.scene.writer import SceneStorageError
from visionedge.web.backend import Backend
from visionedge.web.latest_results import encode_event_fields
from visionedge.web.responses import RequestError, query_integer, query_text, truncate

DEFAULT_EVENTS = 100
MAX_EVENTS = 1000

_FILTERS = ("camera", "type", "rule", "label")
_MAX_LABEL_CHARACTERS = 256
_SHOWN_NAMES = 20

_MAX_COUNT_ROWS = 200_000
"""More would take seconds and hundreds of megabytes."""

_DATE = r"\d{4}-\d\d-\d\d"
_MOMENT = re.compile(rf"{_DATE}[Tt ]\d\d:\d\d:\d\d(\.\d{{1,6}})?([Zz]|[+ -]\d\d:\d\d)")
_CSV_COLUMNS = ("start", "camera", "zone", "line", "label", *TOTALS_OF_ZONES, *TOTALS_OF_LINES)
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


# --- events -------------------------------------------------------------------------------------------------


async def answer_events(request: web.Request, backend: Backend, executor: BoundedExecutor) -> web.Response:
    """The newest events first; written on a thread of `executor`.

    Raises:
        RequestError: 400, a parameter is wrong; 503, the log cannot be read.
    """
    limit = query_integer(request, "limit", minimum=1, maximum=MAX_EVENTS)
    before = query_text(request, "before")
    wanted = await read_event_filter(request, backend, more=("before", "limit"))
    try:
        events = await _read_events(backend, wanted, before=before, limit=limit or DEFAULT_EVENTS)
    except UnknownEventError:
        text = f"'before' must be the id of an event in the log; '{truncate(before or '')}' is not in it"
        raise RequestError(400, text) from None
    body = await executor.run(lambda: encode_json({"events": events}) + b"\n")
    return web.Response(body=body, content_type="application/json")


async def _read_events(backend: Backend, wanted: EventFilter, **bounds: Any) -> list[Document]:
    try:
        return await backend.scene_events(wanted, **bounds)
    except SceneStorageError as error:
        raise _storage_error(error) from None


def _storage_error(error: SceneStorageError) -> RequestError:
    return RequestError(503, str(error), code="storage", headers={"Retry-After": "10"})


async def read_event_filter(request: web.Request, backend: Backend, more: Sequence[str] = ()) -> EventFilter:
    """The filter of a request. A camera, zone or line that is gone is known while the log has its events.

    Raises:
        RequestError: 400, a parameter or its value is not known.
    """
    _refuse_other_parameters(request, (*_FILTERS, *more))
    camera, event_type, rule, label = (query_text(request, name) for name in _FILTERS)
    if event_type is not None and event_type not in EVENT_TYPES:
        raise _unknown_value_error("type", event_type, "type of event", EVENT_TYPES)
    if label is not None and len(label) > _MAX_LABEL_CHARACTERS:
        raise RequestError(400, f"'label' must have at most {_MAX_LABEL_CHARACTERS} characters")
    is_configured = camera is None or backend.has_camera(camera)
    if camera is not None and not is_configured and not await _has_events(backend, EventFilter(camera)):
        names = [str(each["name"]) for each in backend.cameras()]
        raise _unknown_value_error("camera", camera, "camera", names)
    if rule is not None:
        names = backend.rules(camera) if is_configured else []
        if rule not in names and not await _has_events(backend, EventFilter(camera, rule=rule)):
            raise _unknown_value_error("rule", rule, "zone or line", names)
    return EventFilter(camera, event_type, rule, label)


async def _has_events(backend: Backend, wanted: EventFilter) -> bool:
    return bool(await _read_events(backend, wanted, limit=1))


def _refuse_other_parameters(request: web.Request, known: Sequence[str]) -> None:
    """A misspelt filter would otherwise give everything."""
    for name in request.query:
        if name not in known:
            text = f"'{truncate(name)}' is not a parameter; there are: {', '.join(known)}"
            raise RequestError(400, text)


def _unknown_value_error(name: str, value: str, kind: str, known: Sequence[str]) -> RequestError:
    shown = ", ".join(known[:_SHOWN_NAMES]) + (" …" if len(known) > _SHOWN_NAMES else "")
    there_are = f"there are: {shown}" if known else "there is none"
    return RequestError(400, f"'{name}': there is no {kind} '{truncate(value)}'; {there_are}")


async def read_missed_events(
    request: web.Request, backend: Backend, wanted: EventFilter
) -> tuple[list[bytes], str]:
    """The events after the one that the header `Last-Event-ID` names, oldest first, and a comment."""
    last_id = request.headers.get("Last-Event-ID")
    if not last_id:
        return [], "scene events follow"
    try:
        missed = await backend.scene_events(wanted, after=last_id, limit=MAX_EVENTS)
    except UnknownEventError:
        return [], "the log does not have the event of Last-Event-ID; new scene events follow"
    except SceneStorageError:
        return [], "the log cannot be read now; new scene events follow"
    comment = "scene events follow"
    if len(missed) == MAX_EVENTS:
        comment = f"the newest {MAX_EVENTS} missed scene events follow; /api/v1/events has the others"
    return [encode_event_fields(event) for event in reversed(missed)], comment


# --- counts -------------------------------------------------------------------------------------------------


async def answer_counts(request: web.Request, backend: Backend, executor: BoundedExecutor) -> web.Response:
    """What zones and lines of a camera have counted in each hour or day, as JSON or CSV.

    It is written on a thread of `executor`.

    Raises:
        RequestError: 400, a parameter is wrong; 503, the file cannot be read.
    """
    _refuse_other_parameters(request, ("from", "to", "by", "format"))
    camera = request.match_info["name"]
    by = _read_by(request)
    begin, end = _read_period(request, by)
    as_csv = _wants_csv(request)
    try:
        rows = await backend.scene_counts(camera, begin, end, by, limit=_MAX_COUNT_ROWS + 1)
    except SceneStorageError as error:
        raise _storage_error(error) from None
    if len(rows) > _MAX_COUNT_ROWS:
        raise RequestError(400, "'from' and 'to': these are too many counts; ask for less time, or by=day")
    if as_csv:
        body = await executor.run(lambda: _write_csv(camera, _count_documents(rows)).encode())
        headers = {"Content-Disposition": f'attachment; filename="{camera}-counts.csv"'}
        return web.Response(body=body, content_type="text/csv", charset="utf-8", headers=headers)
    head = {"camera": camera, "by": by, "from": format_utc(begin), "to": format_utc(end)}
    body = await executor.run(lambda: encode_json({**head, "counts": _count_documents(rows)}) + b"\n")
    return web.Response(body=body, content_type="application/json")


def _read_by(request: web.Request) -> Literal["hour", "day"]:
    text = query_text(request, "by")
    if text in (None, "hour"):
        return "hour"
    if text == "day":
        return "day"
    raise RequestError(400, "'by' must be hour or day")


def _read_period(request: web.Request, by: Literal["hour", "day"]) -> tuple[datetime, datetime]:
    """The period, whose begin is that of an hour or of a UTC day."""
    end = _read_moment(request, "to") or utc_now()
    length = timedelta(days=1) if by == "hour" else timedelta(days=COUNT_DAYS)
    try:
        begin = _read_moment(request, "from") or end - length
    except OverflowError:
        begin = end
    if begin > end:
        raise RequestError(400, "'from' must not be after 'to'")
    begin = begin.replace(minute=0, second=0, microsecond=0)
    return begin.replace(hour=0) if by == "day" else begin, end


def _read_moment(request: web.Request, name: str) -> datetime | None:
    """A query value as a UTC time; a date is the begin of that UTC day."""
    text = query_text(request, name)
    if text is None:
        return None
    try:
        if re.fullmatch(_DATE, text, re.ASCII):
            return datetime.fromisoformat(text).replace(tzinfo=UTC)
        if _MOMENT.fullmatch(text) and text.isascii():
            # In an address a '+' that is not encoded means a blank.
            return datetime.fromisoformat(f"{text[:19]}{text[19:].replace(' ', '+')}".upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise RequestError(
        400, f"'{name}' must be a date or a time with its offset, such as 2026-11-30 or 2026-11-30T08:00:00Z"
    )


def _count_documents(rows: Iterable[CountRow]) -> list[Document]:
    """One document for each begin, zone or line, and label that counted something."""
    documents: dict[tuple[Any, ...], Document] = {}
    for row in rows:
        key = (row.start, row.shape, row.rule, row.label)
        document = documents.get(key)
        if document is None:
            start = {"start": format_utc(row.start), row.shape: row.rule, "label": row.label}
            totals: Document = dict.fromkeys(TOTALS_OF_ZONES, 0)
            if row.shape == "line":
                totals = {"crossed": dict.fromkeys(TOTALS_OF_LINES, 0)}
            document = documents[key] = {**start, **totals}
        document.get("crossed", document)[row.total] = row.count
    return [*documents.values()]


def _wants_csv(request: web.Request) -> bool:
    """`format` decides; else CSV where `Accept` prefers it to JSON."""
    wanted = query_text(request, "format")
    if wanted not in (None, "csv", "json"):
        raise RequestError(400, "'format' must be csv or json")
    if wanted is not None:
        return wanted == "csv"
    weights = _read_accept(request.headers.get(hdrs.ACCEPT, ""))
    return weights.get("text/csv", 0.0) > weights.get("application/json", 0.0)


def _read_accept(header: str) -> dict[str, float]:
    """The weight of each media type of an `Accept` header; 0 where it cannot be read."""
    weights = {}
    for part in header.split(","):
        kind, *parameters = (each.strip().lower() for each in part.split(";"))
        quality = next((each[2:] for each in parameters if each.startswith("q=")), "1")
        weights[kind] = float(quality) if re.fullmatch(r"[01](\.[0-9]{0,3})?", quality) else 0.0
    return weights


def _write_csv(camera: str, counts: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_CSV_COLUMNS)
    for count in counts:
        values = {"camera": camera, **count, **count.get("crossed", {})}
        writer.writerow([_defuse(values.get(column, "")) for column in _CSV_COLUMNS])
    return text.getvalue()


def _defuse(value: object) -> object:
    """A text that a spreadsheet does not run as a formula; OWASP's "CSV Injection" has the characters."""
    is_formula = isinstance(value, str) and value.startswith(_FORMULA_STARTS)
    return f"'{value}" if is_formula else value
