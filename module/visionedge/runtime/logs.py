"""Logging: one line per event on stderr, in UTC, without secrets; the newest lines are kept in memory."""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable

from visionedge.runtime.redaction import MAX_TEXT_CHARACTERS, redact

LOG_INTERVAL_S = 10.0
"""Interval of log lines that could otherwise be caused a thousand times per second."""

_FIRST_LINES, _MAX_LINES = 10, 60
_MAX_RECENT_LINES, _MAX_RECENT_CHARS = 500, 2000


class RedactingFormatter(logging.Formatter):
    """Masks secrets in every log line and traceback."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

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


def configure_logging(level: str = "INFO") -> None:
    """Log to stderr and keep the newest lines; called once, by the command line."""
    root = logging.getLogger()
    root.handlers[:] = [logging.StreamHandler(sys.stderr), RecentLogHandler()]
    for handler in root.handlers:
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(threadName)s: %(message)s"))
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
