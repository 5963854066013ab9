"""The messages file (`--messages`): the body of every outgoing message as one line of a JSON Lines file.

`put` only queues a line; the thread `messages-file` writes it. So a slow disk never delays the asyncio loop.
"""

import logging
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from visionedge.errors import ConfigError
from visionedge.outbound.messages import Message
from visionedge.runtime.threads import ThreadGroup

log = logging.getLogger(__name__)

MAX_WAITING_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class MessagesFileStatus:
    """Counts of lines: `dropped` waited too long behind a slow disk, `failed` could not be written."""

    path: str
    written: int
    waiting: int
    dropped: int
    failed: int
    last_error: str | None


class MessagesFile:
    """Appends bodies to a file. `put` never blocks: beyond `MAX_WAITING_BYTES` the oldest lines are dropped.

    Raises:
        ConfigError: the file cannot be opened for appending.
    """

    def __init__(self, path: Path, thread_group: ThreadGroup) -> None:
        try:
            # Unbuffered, so that a reader of the file sees each line at once.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError([f"--messages {path}: cannot be opened: {error.strerror or error}"]) from None
        self._path = path
        self._thread_group = thread_group
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
        """Start the thread that writes; once."""
        self._started = True
        self._thread_group.start("messages-file", self._run, vital=True, may_return=True)

    def put(self, message: Message) -> None:
        """Queue the body of a message."""
        line = message.body + b"\n"
        with self._wake:
            self._lines.append(line)
            self._bytes += len(line)
            while self._bytes > MAX_WAITING_BYTES:
                self._bytes -= len(self._lines.popleft())
                self._dropped += 1
            self._wake.notify()

    def status(self) -> MessagesFileStatus:
        """The counts so far."""
        with self._wake:
            return MessagesFileStatus(
                path=str(self._path),
                written=self._written,
                waiting=len(self._lines),
                dropped=self._dropped,
                failed=self._failed,
                last_error=self._last_error,
            )

    def close(self, deadline_s: float) -> bool:
        """Write queued lines and close the file; False if the disk was too slow for the deadline. Blocks."""
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
        """Wait for lines and take all of them; an empty list means that the file is closing."""
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
            is_first = self._failed == 0
            self._failed += len(lines)
            self._last_error = error.strerror or str(error)
        if is_first:
            log.error(
                "--messages %s: cannot be written: %s; lines are lost until the disk accepts them",
                self._path,
                error.strerror,
            )
