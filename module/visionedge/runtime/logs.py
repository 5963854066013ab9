"""Logging: one line an event on stderr, UTC, and never a secret."""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable

from visionedge.runtime.redaction import MAX_TEXT_CHARACTERS, redact

_FIRST_LINES, _MAX_LINES = 10, 60


class RedactingFormatter(logging.Formatter):
    """Masks secrets in whatever is logged, tracebacks included: the last edge before people read it."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        """The finished text of a record, without its secrets and not without end."""
        text = super().format(record)
        if len(text) <= MAX_TEXT_CHARACTERS or not record.exc_text:
            return redact(text)
        # The end of a long traceback is what matters: it is cut in the middle.
        lines = text.split("\n")
        left_out = len(lines) - _MAX_LINES
        if left_out > 0:
            lines[_FIRST_LINES : _FIRST_LINES + left_out] = [f"… (cut, {left_out} lines)"]
        return "\n".join(redact(line) for line in lines)


class RecentLogHandler(logging.Handler):
    """Keeps the newest lines of the log, for a colleague who looks at a module from outside."""

    def __init__(self, max_lines: int = 500, max_chars: int = 2000) -> None:
        super().__init__()
        self._max_chars = max_chars
        self._lines: deque[str] = deque(maxlen=max_lines)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's text."""
        self._lines.append(self.format(record)[: self._max_chars])

    def text(self) -> str:
        """The lines, oldest first."""
        return "".join(f"{line}\n" for line in list(self._lines))


def read_recent_log() -> str:
    """The newest lines of the log, secrets masked; empty before `configure_logging`."""
    return "".join(h.text() for h in logging.getLogger().handlers if isinstance(h, RecentLogHandler))


def configure_logging(level: str = "INFO") -> None:
    """Send the log to stderr, and keep its newest lines. Called once, by the command line."""
    root = logging.getLogger()
    root.handlers[:] = [logging.StreamHandler(sys.stderr), RecentLogHandler()]
    for handler in root.handlers:
        handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(threadName)s: %(message)s"))
    root.setLevel(level.upper())
    # These tell of their own insides at INFO; their errors reach us as exceptions.
    for chatty in ("azure", "paho", "aiohttp.access", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


# Log lines that anybody or anything could cause a thousand times a second, a few of them.


LOG_INTERVAL_S = 10.0


class LogLimiter:
    """Lets one line through in `every_s`; the next line says how many were left out. One thread only."""

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
        self._left_out = 0

    def __repr__(self) -> str:
        return f"<LogLimiter {self._log.name} left_out={self._left_out}>"

    def warning(self, text: str, *, error: BaseException | None = None) -> None:
        """Log this line, with the traceback of `error` where one is given, unless it is too soon."""
        now_s = self._clock()
        if self._next_s is not None and now_s < self._next_s:
            self._left_out += 1
            return
        more = f" ({self._left_out} more such lines were left out)" if self._left_out else ""
        self._next_s, self._left_out = now_s + self._every_s, 0
        self._log.warning("%s%s", text, more, exc_info=error)
