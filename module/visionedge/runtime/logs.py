"""Logging: one line per event on stderr, in UTC, without secrets; the newest lines are kept in memory.

Three formats: `text` for people; `json`, one object per line; `iotedge`, the form by which edgeAgent's
GetModuleLogs and UploadModuleLogs read level and time.
"""

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from visionedge.runtime.redaction import MAX_TEXT_CHARACTERS, redact

LOG_INTERVAL_S = 10.0
"""Interval of log lines that could otherwise be caused a thousand times per second."""

LogFormat = Literal["text", "json", "iotedge"]

_FIRST_LINES, _MAX_LINES = 10, 60
_MAX_RECENT_LINES, _MAX_RECENT_CHARS = 500, 2000

_SYSLOG_LEVELS = ((logging.ERROR, 3, "ERR"), (logging.WARNING, 4, "WRN"), (logging.INFO, 6, "INF"))
"""The least level of logging, its number in syslog, and its name in the logs of IoT Edge's own modules."""


class RedactingFormatter(logging.Formatter):
    """The format `text`; masks secrets in every log line and traceback."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, layout: str = "%(asctime)s %(levelname)-7s %(threadName)s: %(message)s") -> None:
        super().__init__(layout)

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record, without secrets and bounded in length."""
        text = super().format(record)
        if len(text) <= MAX_TEXT_CHARACTERS or not record.exc_text:
            return redact(text)
        # The end of a traceback matters most, so a long one is cut in the middle.
        lines = text.split("\n")
        left_out = len(lines) - _MAX_LINES
        if left_out > 0:
            lines[_FIRST_LINES : _FIRST_LINES + left_out] = [f"… (cut, {left_out} lines)"]
        return "\n".join(redact(line) for line in lines)


class JsonFormatter(RedactingFormatter):
    """The format `json`: one object per line; `exception` only where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one JSON object."""
        document = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "thread": record.threadName,
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            document["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(document, ensure_ascii=False)


class IotEdgeFormatter(RedactingFormatter):
    """The format `iotedge`: ``<3> 2026-11-29 17:01:57.211 +00:00 [ERR] engine: …``, a traceback included."""

    default_time_format = "%Y-%m-%d %H:%M:%S"
    default_msec_format = "%s.%03d +00:00"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is given by logging
        """Return the line without a traceback."""
        found = (each for each in _SYSLOG_LEVELS if record.levelno >= each[0])
        _, number, name = next(found, (logging.DEBUG, 7, "DBG"))
        return f"<{number}> {record.asctime} [{name}] {record.threadName}: {record.message}"

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one line, because edgeAgent reads a level and a time from each line."""
        return " | ".join(super().format(record).splitlines())


_FORMATTERS: dict[LogFormat, type[RedactingFormatter]] = {
    "text": RedactingFormatter,
    "json": JsonFormatter,
    "iotedge": IotEdgeFormatter,
}


class RecentLogHandler(logging.Handler):
    """Keeps the newest log lines for remote diagnosis."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=_MAX_RECENT_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of a record."""
        self._lines.append(self.format(record)[:_MAX_RECENT_CHARS])

    def text(self) -> str:
        """Return the lines, oldest first."""
        return "".join(f"{line}\n" for line in list(self._lines))


def read_recent_log() -> str:
    """Return the newest log lines, secrets masked; empty before `configure_logging`."""
    return "".join(h.text() for h in logging.getLogger().handlers if isinstance(h, RecentLogHandler))


def configure_logging(level: str = "INFO", log_format: LogFormat = "text") -> None:
    """Log to stderr and keep the newest lines; a later call changes level and format and keeps the lines."""
    root = logging.getLogger()
    recent = next((h for h in root.handlers if isinstance(h, RecentLogHandler)), RecentLogHandler())
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(_FORMATTERS[log_format]())
    recent.setFormatter(RedactingFormatter())
    root.handlers[:] = [to_stderr, recent]
    root.setLevel(level.upper())
    # These libraries log internals at INFO; their errors reach us as exceptions.
    for chatty in ("azure", "paho", "aiohttp.access", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


class LogLimiter:
    """Logs one line per `every_s` and counts the others; the next line shows the count. One thread only."""

    def __init__(
        self,
        log: logging.Logger,
        every_s: float = LOG_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._every_s = every_s
        self._clock = clock
        self._next_s: float | None = None
        self._suppressed = 0

    def __repr__(self) -> str:
        return f"<LogLimiter {self._log.name} suppressed={self._suppressed}>"

    def warning(self, text: str, *, error: BaseException | None = None) -> None:
        """Log a line, with the traceback of `error` if given, unless the last one is too recent."""
        now_s = self._clock()
        if self._next_s is not None and now_s < self._next_s:
            self._suppressed += 1
            return
        more = f" ({self._suppressed} more such lines were suppressed)" if self._suppressed else ""
        self._next_s, self._suppressed = now_s + self._every_s, 0
        self._log.warning("%s%s", text, more, exc_info=error)
