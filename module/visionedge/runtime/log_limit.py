"""Log lines that anybody or anything could cause a thousand times a second, a few of them."""

import logging
import time
from collections.abc import Callable

EVERY_S = 10.0


class LogLimiter:
    """Lets one line through in `every_s`; the next line says how many were left out. One thread only."""

    def __init__(
        self, log: logging.Logger, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic
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
