"""The messages file: bodies as lines, written by a thread, with errors that are logged once."""

import io
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from visionedge.errors import ConfigError
from visionedge.outbound.messages import Message
from visionedge.outbound.messages_file import MAX_WAITING_BYTES, MessagesFile
from visionedge.runtime.threads import ThreadGroup


@pytest.fixture
def thread_group() -> Iterator[ThreadGroup]:
    """Threads that must have ended at the end."""
    thread_group = ThreadGroup(lambda name, error: pytest.fail(f"{name}: {error}"))
    yield thread_group
    assert thread_group.join(5) == []


def message(body: bytes) -> Message:
    return Message("detections", body, "id", {}, 1)


def test_each_body_is_appended_as_a_line(thread_group: ThreadGroup, tmp_path: Path) -> None:
    """The file is appended to, in order."""
    path = tmp_path / "messages.jsonl"
    path.write_bytes(b"old\n")
    messages_file = MessagesFile(path, thread_group)
    messages_file.start()
    for number in range(100):
        messages_file.put(message(b"%d" % number))

    assert messages_file.close(5)

    assert path.read_bytes().splitlines() == [b"old", *(b"%d" % number for number in range(100))]
    assert messages_file.status().written == 100


@pytest.mark.parametrize("name", ["missing/messages.jsonl", "."])
def test_a_file_that_cannot_be_opened_gives_a_one_line_error(
    thread_group: ThreadGroup, tmp_path: Path, name: str
) -> None:
    """With the option, the path and the reason."""
    with pytest.raises(ConfigError, match=r"^--messages .* cannot be opened: ") as caught:
        MessagesFile(tmp_path / name, thread_group)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_logged_once_and_counted(
    thread_group: ThreadGroup, caplog: pytest.LogCaptureFixture
) -> None:
    """Each lost line is counted; the log has one line for all of them."""
    messages_file = MessagesFile(Path("/dev/full"), thread_group)
    messages_file.start()
    for _ in range(3):
        messages_file.put(message(b"x"))
    assert messages_file.close(5)
    assert messages_file.status().failed == 3
    assert messages_file.status().written == 0
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1


def test_a_line_that_was_cut_by_a_kill_does_not_spoil_the_next_one(
    thread_group: ThreadGroup, tmp_path: Path
) -> None:
    path = tmp_path / "messages.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a":')
    messages_file = MessagesFile(path, thread_group)
    messages_file.start()
    line = messages_file.put(message(b"{}"))
    assert messages_file.close(5)
    assert line.is_secured
    assert path.read_bytes() == b'{"a": 1}\n{"a":\n{}\n'


class CuttingFile:
    """A file on a disk that has room for a part of a line."""

    def __init__(self) -> None:
        self.content = b""
        self.room = 5

    def write(self, text: bytes | memoryview) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        taken = bytes(text)[: self.room]
        self.content += taken
        self.room -= len(taken)
        return len(taken)

    def close(self) -> None:
        pass


def test_a_line_that_a_full_disk_has_cut_does_not_spoil_the_next_one(
    thread_group: ThreadGroup, tmp_path: Path
) -> None:
    """The cut line counts as failed; the lines of the same write too, as it is not known which are whole."""
    messages_file = MessagesFile(tmp_path / "messages.jsonl", thread_group)
    messages_file._file.close()
    disk = CuttingFile()
    messages_file._file = cast("io.FileIO", disk)
    cut = messages_file.put(message(b"1234567"))
    messages_file._write(messages_file._take())
    assert (cut.state, messages_file.status().failed) == ("lost", 1)
    disk.room = 100
    whole = messages_file.put(message(b"89"))
    messages_file._write(messages_file._take())
    assert whole.is_secured
    assert disk.content == b"12345\n89\n"
    assert messages_file.close(1)


def test_a_slow_disk_never_blocks_and_loses_the_oldest(thread_group: ThreadGroup, tmp_path: Path) -> None:
    """With a blocked disk `put` returns, waiting lines are bounded, and closing keeps its deadline."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    messages_file = MessagesFile(path, thread_group)
    messages_file.start()
    body = b"x" * 1_000_000
    for _ in range(MAX_WAITING_BYTES // len(body) + 5):
        messages_file.put(message(body))

    assert not messages_file.close(0.05)

    assert messages_file.status().waiting * len(body) <= MAX_WAITING_BYTES
    draining = threading.Thread(target=_drain, args=(reader,))
    draining.start()
    draining.join()


def _drain(reader: int) -> None:
    """Read until the writer has closed its end."""
    os.set_blocking(reader, True)
    while os.read(reader, 1 << 20):
        pass
    os.close(reader)
