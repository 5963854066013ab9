"""The last help against a module that hangs: it ends the process, so that its supervisor starts a new one.

IoT Edge restarts a module that exits, and never one that only stops answering.
"""

import asyncio
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

log = logging.getLogger(__name__)

EXIT_HUNG = 75
"""Exit code of a module of which a part hung (EX_TEMPFAIL): the main loop, or the SDK of IoT Hub."""

_INTERVAL_S = 5.0
_LOG_TIMEOUT_S = 2.0


class LoopWatchdog:
    """Watches that an asyncio loop runs; without a heartbeat for `limit_s`, `on_hang` is called once.

    The loop beats every five seconds; a daemon thread looks. While the whole process is stopped (SIGSTOP,
    `docker pause`), no time counts. If native code holds the interpreter lock, no Python thread can look:
    then a thread of faulthandler writes all stacks to stderr after twice the limit and exits with code 1.
    """

    def __init__(
        self,
        limit_s: float = 60.0,
        on_hang: Callable[[float], None] | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit_s = limit_s
        self._on_hang = on_hang or end_hung_process
        self._clock_s = clock_s
        self._beat_s = self._look_s = clock_s()
        self._stopped = threading.Event()

    def __repr__(self) -> str:
        return f"<LoopWatchdog limit={self._limit_s:g} s>"

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to watch `loop`; called on it."""
        self._beat_on(loop)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """The loop runs."""
        self._beat_s = self._clock_s()

    def look(self) -> float | None:
        """How long the loop has not run, in seconds, if that is longer than the limit; called regularly."""
        now_s = self._clock_s()
        if now_s - self._look_s > self._limit_s / 2:
            self._beat_s = now_s  # this thread did not run either: the process was stopped
        self._look_s = now_s
        silent_s = now_s - self._beat_s
        return silent_s if silent_s > self._limit_s else None

    def _beat_on(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._stopped.is_set():
            return
        self.beat()
        faulthandler.dump_traceback_later(2 * self._limit_s, exit=True, file=sys.__stderr__ or sys.stderr)
        loop.call_later(min(_INTERVAL_S, self._limit_s / 4), self._beat_on, loop)

    def _watch(self) -> None:
        while not self._stopped.wait(min(_INTERVAL_S, self._limit_s / 4)):
            if (silent_s := self.look()) is not None:
                self._on_hang(silent_s)
                return


def end_hung_process(silent_s: float) -> None:
    """Log the stacks of all threads, then end the process with `EXIT_HUNG`."""
    faulthandler.cancel_dump_traceback_later()
    text = (
        f"the main loop has not run for {silent_s:.0f} s: ending with exit code {EXIT_HUNG}, to be started"
        f" again; all threads:\n{format_all_stacks()}"
    )
    # On another thread: the one that hangs may hold the lock of the log.
    logging_thread = threading.Thread(target=lambda: log.critical("%s", text), name="last-words", daemon=True)
    logging_thread.start()
    logging_thread.join(_LOG_TIMEOUT_S)
    if logging_thread.is_alive():
        faulthandler.dump_traceback(all_threads=True)
    os._exit(EXIT_HUNG)


def format_all_stacks() -> str:
    """The stack of each thread, without the values of variables."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for ident, frame in sys._current_frames().items()  # noqa: SLF001 - public in spite of its name
    )
