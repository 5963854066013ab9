"""A disk that the spool has filled is usable again when its messages were sent."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spool_harness import SpoolHarness, drain, message, run_round
from visionedge.outbound.disk_reserve import DiskReserve

_FULL_DISK = Path(__file__).parents[1] / "doubles" / "full_disk.py"


def _can_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    tried = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(tried, check=False, capture_output=True, timeout=20).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="needs root and a mount namespace of its own")
def test_a_disk_that_the_spool_has_filled_is_used_again_when_the_messages_are_sent(tmp_path: Path) -> None:
    """A real file system of 14 MB, filled to its last byte, three times."""
    script = (
        f"mount -t tmpfs -o size=14m none {shlex.quote(str(tmp_path))} && exec"
        f" {shlex.quote(sys.executable)} {shlex.quote(str(_FULL_DISK))} {shlex.quote(str(tmp_path))}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(step["step"], step["mode"]) for step in steps] == [
        ("filled", "memory"),
        ("drained", "disk"),
        ("used", "disk"),
    ] * 3
    assert all(step["waiting"] == 0 for step in steps if step["step"] != "filled")


def test_the_reserve_takes_real_space_and_gives_it_back(tmp_path: Path) -> None:
    reserve = DiskReserve(tmp_path / "r", size_bytes=1 << 20)
    assert not reserve.release()
    reserve.hold()
    assert (tmp_path / "r").stat().st_blocks * 512 >= 1 << 20
    assert reserve.release()
    assert not (tmp_path / "r").exists()
    assert not reserve.release()


def test_the_reserve_leaves_as_much_to_others(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    DiskReserve(tmp_path / "r", size_bytes=disk.f_bavail * disk.f_frsize * 2 // 3).hold()
    assert not (tmp_path / "r").exists()


def test_without_a_folder_there_is_no_reserve_and_no_error(tmp_path: Path) -> None:
    reserve = DiskReserve(tmp_path / "none" / "r")
    reserve.hold()
    assert not reserve.release()


def test_a_link_in_the_place_of_the_reserve_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "r").symlink_to(tmp_path / "victim")
    DiskReserve(tmp_path / "r").hold()
    assert not (tmp_path / "victim").exists()


def test_a_full_disk_deletes_what_was_sent_and_goes_on_without_an_event(harness: SpoolHarness) -> None:
    """SQLite reports `full` once, at the first new message; then there is room."""
    spool = harness.spool()
    spool.put(message(1))
    run_round(spool)
    following = spool.peek()
    assert following is not None
    spool.settle(following)
    spool.put(message(2))
    database = harness.databases[-1]
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count={pages}")
    spool.put(message(3, size=3 * 4096))

    def free() -> None:
        database.execute("PRAGMA max_page_count=100000")

    harness.meanwhile("DELETE FROM message", free)
    run_round(spool)
    assert spool.status().mode == "disk"
    assert spool.take_events() == []
    assert [m.sequence_number for m in drain(spool)] == [2, 3]
