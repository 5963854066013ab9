"""Fetched models on disk, and addresses: bounds, disks that fail, names, what may be asked for."""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from repository_paths import REPOSITORY
from visionedge.config.addresses import format_url, model_name_from_url
from visionedge.config.load import find_local_only_problems, parse_config
from visionedge.errors import ConfigError, FetchError
from visionedge.model.download import (
    MAX_BYTES,
    MAX_MODELS,
    MODELS_FOLDER,
    DownloadRetryPolicy,
    DownloadTimeouts,
    ModelStore,
)
from visionedge.model.provider import MAX_CHANGE_TRIES


def put(kept: ModelStore, data: bytes, age_s: int) -> str:
    """Keep a model that was last used so long ago; its sum."""
    sha256 = hashlib.sha256(data).hexdigest()
    with kept.open_partial(sha256) as part:
        part.write(data)
        path = kept.commit(part, sha256)
    os.utime(path, (1e9 - age_s, 1e9 - age_s))
    return sha256


def test_the_least_recently_used_models_are_evicted_and_never_one_in_use(tmp_path: Path) -> None:
    """Not even when it is the oldest; files of others are not touched."""
    kept = ModelStore(tmp_path, max_models=2)
    running, old, newer, newest = (put(kept, bytes([n]), age_s=100 - n) for n in range(4))
    (tmp_path / MODELS_FOLDER / "mine.onnx").write_bytes(b"mine")
    kept.evict([running.upper()])
    assert kept.find(running) is not None
    assert kept.find(newest) is not None
    assert kept.find(old) is None
    assert kept.find(newer) is None
    assert (tmp_path / MODELS_FOLDER / "mine.onnx").exists()


def test_the_size_of_the_store_is_bounded_too(tmp_path: Path) -> None:
    """A few large ones count as much as many."""
    kept = ModelStore(tmp_path, max_bytes=25)
    old, newer, newest = (put(kept, bytes([n]) * 10, age_s=100 - n) for n in range(3))
    kept.evict([])
    assert [kept.find(each) is not None for each in (old, newer, newest)] == [False, True, True]


def test_an_incomplete_download_is_evicted_in_its_turn(tmp_path: Path) -> None:
    """What was interrupted and is not wanted any more does not stay for ever."""
    kept = ModelStore(tmp_path, max_models=1)
    with kept.open_partial("a" * 64) as part:
        part.write(b"half")
    os.utime(part.path, (1, 1))
    model = put(kept, b"model", age_s=0)
    kept.evict([])
    assert not part.path.exists()
    assert kept.find(model) is not None


def test_a_missing_folder_needs_no_eviction(tmp_path: Path) -> None:
    """Before the first model."""
    ModelStore(tmp_path).evict([])
    assert ModelStore(tmp_path).find("a" * 64) is None


class FullDisk:
    """A file on a disk that takes ten bytes more; `truncated` when they were given back."""

    def __init__(self) -> None:
        self.room_bytes = 10
        self.truncated = False

    def write(self, block: bytes) -> int:
        if self.room_bytes == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room_bytes, len(block))
        self.room_bytes -= taken
        return taken

    def seek(self, _offset: int) -> None:
        """Nothing."""

    def truncate(self) -> None:
        self.truncated = True

    def close(self) -> None:
        """Nothing."""


def test_a_full_disk_is_reported_and_its_space_released(tmp_path: Path) -> None:
    """What waits for the hub needs the room more than half a model."""
    with ModelStore(tmp_path).open_partial("a" * 64) as part:
        part._file.close()
        disk = FullDisk()
        part._file = disk  # type: ignore[assignment]  # as much of a file as is used
        with pytest.raises(FetchError, match="the disk is full") as caught:
            part.write(b"x" * 11)
    assert caught.value.permanent
    assert disk.truncated
    assert part.size_bytes == 0


class Usage(NamedTuple):
    """What `shutil.disk_usage` gives."""

    total: int
    used: int
    free: int


def test_space_is_checked_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With some to spare for others."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(200_000_000, 100_000_000, 100_000_000))
    with ModelStore(tmp_path).open_partial("a" * 64) as part:
        part.check_free_space(30_000_000)
        with pytest.raises(FetchError, match=r"too little space: 40 MB are needed.* only 100 MB are free"):
            part.check_free_space(40_000_000)


def test_an_unwritable_folder_is_reported(tmp_path: Path) -> None:
    """With the system's word for it."""
    (tmp_path / MODELS_FOLDER).write_text("a file where the folder should be")
    with pytest.raises(FetchError, match=r"models: cannot be written: "):
        ModelStore(tmp_path).open_partial("a" * 64)
    assert ModelStore(tmp_path).find("a" * 64) is None


def test_no_symbolic_link_is_followed_when_a_part_is_written(tmp_path: Path) -> None:
    """Whoever can write to the folder cannot have another file overwritten."""
    (tmp_path / MODELS_FOLDER).mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / MODELS_FOLDER / f"{'a' * 64}.part").symlink_to(tmp_path / "precious")
    with pytest.raises(FetchError):
        ModelStore(tmp_path).open_partial("a" * 64)
    assert (tmp_path / "precious").read_text() == "precious"


def test_the_limits_in_the_docs_are_those_of_the_code() -> None:
    """docs/models.md, where people read what may take how long."""
    docs = " ".join((REPOSITORY / "docs" / "models.md").read_text().split())
    retry_policy, timeouts = DownloadRetryPolicy(), DownloadTimeouts()
    assert (MAX_MODELS, MAX_BYTES, MAX_CHANGE_TRIES) == (4, 4 << 30, 5)
    assert "four models and 4 GB" in docs
    assert "after five tries" in docs
    assert f"{timeouts.connect_s:g} s for a connection, {timeouts.read_s:g} s without a byte" in docs
    assert (timeouts.total_s, "half an hour for a try" in docs) == (1800, True)
    assert (retry_policy.first_wait_s, retry_policy.max_wait_s) == (1, 60)
    assert (retry_policy.first_lasting_wait_s, retry_policy.max_lasting_wait_s) == (60, 3600)
    assert "after 1 s up to a minute" in docs
    assert "after a minute up to an hour" in docs


# --- addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://h/models/forklift-v3.onnx?sig=x", "forklift-v3"),
        ("https://h/my%20model%2Fx.onnx", "x"),
        ("https://h/yolo v8;rm.onnx", "yolo-v8-rm"),
        ("https://h/", "model"),
        ("https://h/...onnx", "model"),
        ("https://h/a/b/", "b"),
        ("https://h/" + "n" * 200 + ".onnx", "n" * 64),
        ("file:///models/Größe.onnx", "Größe"),
    ],
)
def test_a_model_has_the_name_of_its_file(url: str, name: str) -> None:
    """Frames and status show a word, not a sum."""
    assert model_name_from_url(url) == name


def test_an_address_is_shown_shortened_and_without_secrets() -> None:
    """For logs, events and the page."""
    assert format_url("https://me:pw@h/m.onnx?sv=1&sig=abc%2F") == "https://***@h/m.onnx?…"
    assert len(format_url("https://h/" + "x" * 5000)) == 200


SUM = "ab" * 32
WRONG = {
    "http://h/m.onnx": "http: is not secure",
    "file:///m.onnx": "file: is not secure",
    "ftp://h/m.onnx": "must be an https:// address",
    "/models/m.onnx": "must be an https:// address",
    "https:///m.onnx": "has no host",
    "https://h:port/m.onnx": "cannot be read as an address",
    "https://[::1/m.onnx": "cannot be read as an address",
    "https://h/my model.onnx": "has spaces in it",
    "https://h/m\n.onnx": "has spaces in it",
}


@pytest.mark.parametrize(("url", "words"), WRONG.items())
def test_an_invalid_address_is_a_configuration_error(url: str, words: str) -> None:
    """Told with its key before anything is opened."""
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"url": url, "sha256": SUM}})
    (problem,) = caught.value.problems
    assert problem.startswith("model.url: ")
    assert words in problem


@pytest.mark.parametrize(
    "url", ["http://h/m.onnx", "file:///m.onnx", "file://localhost/m.onnx", "https://h/m"]
)
def test_the_local_file_may_allow_more(url: str) -> None:
    """http: and file: for those who know what they do."""
    assert parse_config({"model": {"url": url, "sha256": SUM, "allowInsecure": True}}).model.url == url


@pytest.mark.parametrize("url", ["file://elsewhere/m.onnx", "file:m.onnx", "http:///m.onnx", "rtsp://h/m"])
def test_insecure_addresses_are_limited_even_if_allowed(url: str) -> None:
    """Files of other machines, and other schemes."""
    with pytest.raises(ConfigError):
        parse_config({"model": {"url": url, "sha256": SUM, "allowInsecure": True}})


def test_the_twin_cannot_allow_insecure_addresses() -> None:
    """The key is refused with its path, whatever it says."""
    document = {"model": {"url": "http://h/m.onnx", "sha256": SUM, "allowInsecure": True}}
    assert find_local_only_problems(document) == [
        "model.allowInsecure: can only be set in the local configuration file"
    ]
    assert (
        find_local_only_problems({"model": {"url": "https://h/m.onnx", "sha256": SUM, "allowInsecure": None}})
        == []
    )
    assert find_local_only_problems({"model": "x"}) == find_local_only_problems([]) == []
