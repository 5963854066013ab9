"""The commit of a checkout, read from the files below `.git`.

An image is built in a stage without the program git, so this module reads the files itself: HEAD, refs,
packed-refs, and one commit object, loose or in a pack. Formats: gitrepository-layout(5), gitformat-pack(5).
Standard library only, as the build of the wheel imports it too.
"""

import itertools
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HASH = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_COMMITTER = re.compile(rb"^committer .*> (\d+) [+-]\d{4}$", re.MULTILINE)
_MAX_OBJECT_BYTES = 1 << 20
_MAX_DELTAS = 64
_PACK_COMMIT, _PACK_OFFSET_DELTA, _PACK_REF_DELTA = 1, 6, 7


class GitError(Exception):
    """The commit cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit: its hash in hexadecimal, and its time in seconds since 1970, None if it cannot be read."""

    hash: str
    time_s: int | None


def read_head_commit(git: Path) -> Commit:
    """The commit that is checked out. `git`: the folder `.git`, or the file `.git` of a worktree.

    Raises:
        GitError: there is no such commit, or the files have another form.
    """
    try:
        folder, common = _find_folders(git)
        commit = _read_head(folder, common)
    except (OSError, ValueError) as error:
        raise GitError(f"{git.name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return Commit(commit, _read_commit_time_s(common, commit))


def _find_folders(git: Path) -> tuple[Path, Path]:
    """The folder with HEAD, and the one with refs and objects; they differ in a worktree."""
    if not git.is_file():
        return git, git
    text = git.read_text(encoding="utf-8")
    if not text.startswith("gitdir: "):
        raise GitError(f"{git.name} is a file that names no folder")
    folder = git.parent / text.removeprefix("gitdir: ").strip()
    shared = folder / "commondir"
    return folder, folder / shared.read_text(encoding="utf-8").strip() if shared.is_file() else folder


def _read_head(folder: Path, common: Path) -> str:
    text = (folder / "HEAD").read_text(encoding="ascii").strip()
    if text.startswith("ref: "):
        text = _resolve(common, text.removeprefix("ref: "))
    if not _HASH.fullmatch(text):
        raise GitError("HEAD names no commit")
    return text


def _resolve(common: Path, name: str) -> str:
    loose = common / name
    if loose.is_file():
        return loose.read_text(encoding="ascii").strip()
    packed = common / "packed-refs"
    for line in packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else ():
        commit, _, found = line.partition(" ")
        if found == name:
            return commit
    raise GitError(f"{name} has no commit")


def _read_commit_time_s(common: Path, commit: str) -> int | None:
    try:
        content = _read_loose(common, commit) or _read_packed(common, bytes.fromhex(commit))
        found = None if content is None else _COMMITTER.search(content.partition(b"\n\n")[0])
    except (OSError, ValueError, IndexError, struct.error, zlib.error):
        return None
    return None if found is None else int(found[1])


def _read_loose(common: Path, commit: str) -> bytes | None:
    path = common / "objects" / commit[:2] / commit[2:]
    if not path.is_file():
        return None
    return _inflate(path.read_bytes()).partition(b"\0")[2]


def _inflate(data: bytes) -> bytes:
    return zlib.decompressobj().decompress(data, _MAX_OBJECT_BYTES)


def _read_packed(common: Path, commit: bytes) -> bytes | None:
    for index in sorted((common / "objects" / "pack").glob("*.idx")):
        content = index.read_bytes()
        if (offset := _find_in_index(content, commit)) is not None:
            return _Pack(index.with_suffix(".pack"), content, len(commit)).read_commit(offset)
    return None


def _find_in_index(index: bytes, commit: bytes) -> int | None:
    """The offset of an object in the pack of an index of version 2; None if it is not in it."""
    if index[:8] != b"\xfftOc\0\0\0\2":
        return None
    first = commit[0]
    begin = struct.unpack_from(">I", index, 8 + 4 * (first - 1))[0] if first else 0
    end, total = (struct.unpack_from(">I", index, 8 + 4 * at)[0] for at in (first, 255))
    names, size = 8 + 4 * 256, len(commit)
    for at in range(begin, end):
        if index[names + at * size : names + (at + 1) * size] == commit:
            offsets = names + total * (size + 4)  # behind the names come the checksums of 4 bytes
            offset: int = struct.unpack_from(">I", index, offsets + 4 * at)[0]
            if offset < 1 << 31:
                return offset
            large: int = struct.unpack_from(">Q", index, offsets + 4 * total + 8 * (offset - (1 << 31)))[0]
            return large
    return None


class _Pack:
    """A pack, of which single objects are read, with the content of its index and the bytes of a hash."""

    def __init__(self, path: Path, index: bytes, hash_bytes: int) -> None:
        self._path = path
        self._index = index
        self._hash_bytes = hash_bytes

    def read_commit(self, offset: int, deltas_left: int = _MAX_DELTAS) -> bytes:
        """The commit at an offset, deltas applied.

        Raises:
            ValueError: the object is no commit, or has another form.
        """
        data = self._read_at(offset)
        kind, at = _parse_entry_head(data)
        if kind == _PACK_COMMIT:
            return _inflate(data[at:])
        if kind not in (_PACK_OFFSET_DELTA, _PACK_REF_DELTA) or not deltas_left:
            raise ValueError("not a commit")
        if kind == _PACK_OFFSET_DELTA:
            distance, at = _parse_offset(data, at)
            base = offset - distance
        else:
            found = _find_in_index(self._index, data[at : at + self._hash_bytes])
            if found is None:
                raise ValueError("the base is in another pack")
            base, at = found, at + self._hash_bytes
        return _apply_delta(self.read_commit(base, deltas_left - 1), _inflate(data[at:]))

    def _read_at(self, offset: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(_MAX_OBJECT_BYTES)


def _parse_entry_head(data: bytes) -> tuple[int, int]:
    """The type of an entry, and where the rest begins: 3 bits of type and the size, 7 bits a byte."""
    at = next(at for at in itertools.count() if not data[at] & 0x80)
    return data[0] >> 4 & 7, at + 1


def _parse_offset(data: bytes, at: int) -> tuple[int, int]:
    """The distance to the base of a delta; each further byte adds 1, so that no value has two forms."""
    value = data[at] & 0x7F
    while data[at] & 0x80:
        at += 1
        value = (value + 1) << 7 | data[at] & 0x7F
    return value, at + 1


def _apply_delta(base: bytes, delta: bytes) -> bytes:
    commands = iter(delta)
    _skip_size(commands)
    _skip_size(commands)
    result = bytearray()
    for command in commands:
        if command & 0x80:
            offset, size = (_read_bytes(commands, command, bits) for bits in (range(4), range(4, 7)))
            result += base[offset : offset + (size or 0x10000)]
        elif command:
            result += bytes(itertools.islice(commands, command))
        else:
            raise ValueError("a reserved command")
    return bytes(result)


def _skip_size(commands: Iterator[int]) -> None:
    while next(commands, 0) & 0x80:
        pass


def _read_bytes(commands: Iterator[int], command: int, bits: range) -> int:
    """A number of which the command says which bytes follow, the lowest first."""
    return sum(next(commands, 0) << 8 * place for place, bit in enumerate(bits) if command & 1 << bit)
