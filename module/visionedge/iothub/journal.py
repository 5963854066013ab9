"""The messages file: every outgoing message's body as one line of a JSON Lines file, written off the loop."""

import logging
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from visionedge.errors import ConfigError
from visionedge.outbound.messages import Message
from visionedge.runtime.threads import Crew

log = logging.getLogger(__name__)

MAX_WAITING_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class JournalStatus:
    """Lines written; `dropped` = those that waited too long behind a slow disk; `failed` = write errors."""

    path: str
    written: int
    waiting: int
    dropped: int
    failed: int
    last_error: str | None


class MessagesFile:
    """Appends bodies to a file from its own thread; `put` never blocks, it drops the oldest if many wait.

    Raises:
        ConfigError: the file cannot be opened for appending.
    """

    def __init__(self, path: Path, crew: Crew) -> None:
        try:
            # Unbuffered: a line is in the file as soon as it is written, for whoever follows it.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError([f"--messages {path}: cannot be opened: {error.strerror or error}"]) from None
        self._path = path
        self._crew = crew
        self._wake = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._closing = False
        self._written = 0
        self._dropped = 0
        self._failed = 0
        self._last_error: str | None = None
        self._finished = threading.Event()
        self._started = False

    def __repr__(self) -> str:
        return f"<MessagesFile {self._path} written={self._written} waiting={len(self._lines)}>"

    def start(self) -> None:
        """Begin to write; once."""
        self._started = True
        self._crew.start("messages-file", self._run, vital=True, may_return=True)

    def put(self, message: Message) -> None:
        """Have a message's body written."""
        line = message.body + b"\n"
        with self._wake:
            self._lines.append(line)
            self._bytes += len(line)
            while self._bytes > MAX_WAITING_BYTES:
                self._bytes -= len(self._lines.popleft())
                self._dropped += 1
            self._wake.notify()

    def status(self) -> JournalStatus:
        """What was written so far."""
        with self._wake:
            return JournalStatus(
                path=str(self._path),
                written=self._written,
                waiting=len(self._lines),
                dropped=self._dropped,
                failed=self._failed,
                last_error=self._last_error,
            )

    def close(self, deadline_s: float) -> bool:
        """Write what waits and close the file; False when the disk did not take it in time. Blocks."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if not self._started:
            self._file.close()
            return True
        return self._finished.wait(deadline_s)

    def _run(self) -> None:
        try:
            while lines := self._take():
                self._write(lines)
        finally:
            self._file.close()
            self._finished.set()

    def _take(self) -> list[bytes]:
        """All lines that wait; empty only when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._lines or self._closing)
            lines = list(self._lines)
            self._lines.clear()
            self._bytes = 0
        return lines

    def _write(self, lines: list[bytes]) -> None:
        text = memoryview(b"".join(lines))
        error: OSError | None = None
        try:
            while text:
                text = text[self._file.write(text) or 0 :]
        except OSError as caught:
            error = caught
        with self._wake:
            if error is None:
                self._written += len(lines)
                return
            first = self._failed == 0
            self._failed += len(lines)
            self._last_error = error.strerror or str(error)
        if first:
            log.error(
                "--messages %s: cannot be written: %s; lines are lost until it can be",
                self._path,
                error.strerror,
            )
