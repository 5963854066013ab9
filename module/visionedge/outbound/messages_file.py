"""The messages file (`--messages`): the body of every outgoing message as one line of a JSON Lines file.

`put` only queues a line; the thread `messages-file` writes it. So a slow disk never delays the asyncio loop.
"""

import contextlib
import logging
import os
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


@dataclass(slots=True)
class MessageLine:
    """A line for the file. `state` changes once: it was written, or it is lost (dropped or failed)."""

    body: bytes
    state: Literal["waiting", "written", "lost"] = "waiting"

    @property
    def is_secured(self) -> bool:
        """Whether it is in the file. May be read by any thread."""
        return self.state == "written"


class MessagesFile:
    """Appends bodies to a file. `put` never blocks: beyond `MAX_WAITING_BYTES` the oldest lines are dropped.

    Raises:
        ConfigError: the file cannot be opened for appending.
    """

    def __init__(self, path: Path, thread_group: ThreadGroup) -> None:
        try:
            self._is_torn = _has_partial_line(path)  # a kill can leave a part of one
            # Unbuffered, so that a reader of the file sees each line at once.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError([f"--messages {path}: cannot be opened: {error.strerror or error}"]) from None
        self._path = path
        self._thread_group = thread_group
        self._wake = threading.Condition()
        self._lines: deque[MessageLine] = deque()
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

    def put(self, message: Message) -> MessageLine:
        """Queue the body of a message; the result says what became of it."""
        line = MessageLine(message.body + b"\n")
        with self._wake:
            self._lines.append(line)
            self._bytes += len(line.body)
            while self._bytes > MAX_WAITING_BYTES:
                oldest = self._lines.popleft()
                oldest.state = "lost"
                self._bytes -= len(oldest.body)
                self._dropped += 1
            self._wake.notify()
        return line

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

    def _take(self) -> list[MessageLine]:
        """Wait for lines and take all of them; an empty list means that the file is closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._lines or self._closing)
            lines = list(self._lines)
            self._lines.clear()
            self._bytes = 0
        return lines

    def _write(self, lines: list[MessageLine]) -> None:
        # After a part of a line, so that it does not spoil the next one.
        begin = b"\n" if self._is_torn else b""
        text = begin + b"".join(line.body for line in lines)
        written = 0
        error: OSError | None = None
        try:
            while written < len(text):
                written += self._file.write(memoryview(text)[written:]) or 0
        except OSError as caught:
            error = caught
        if written:
            self._is_torn = text[written - 1 : written] != b"\n"
        for line in lines:
            line.state = "written" if error is None else "lost"
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


def _has_partial_line(path: Path) -> bool:
    """Whether the last line of a file has no end; False for what is no file or cannot be read."""
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size > 0:
            with path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
    return False
