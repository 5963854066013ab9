"""How much memory is left: in the machine, and in the control groups of versions 1 and 2."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from visionedge.runtime.process_limits import MemoryRoom, read_memory_room

MIB = 2**20
UNLIMITED = "9223372036854771712\n"
"""What version 1 shows without a limit."""


class FakeSystem:
    """The files of a machine with 8000 MiB, of which 5000 are available."""

    def __init__(self, folder: Path, swap_mib: int = 0) -> None:
        self._folder = folder
        self.write("meminfo", f"MemTotal: {8000 << 10} kB\nMemFree: 1 kB\nMemAvailable: {5000 << 10} kB\n")
        self.write("meminfo", f"{self.read('meminfo')}SwapFree: {swap_mib << 10} kB\nHugePages_Total: 0\n")

    def read(self, name: str) -> str:
        return (self._folder / name).read_text()

    def write(self, name: str, text: str) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def group(self, name: str, files: Mapping[str, object]) -> None:
        """A control group; numbers are MiB."""
        for file, value in files.items():
            text = f"{value * MIB}\n" if isinstance(value, int) else str(value)
            self.write(f"cgroup/{name}/memory.{file}", text)

    def room(self) -> MemoryRoom | None:
        folder = self._folder
        return read_memory_room(folder / "cgroup", folder / "membership", folder / "meminfo")


def version_2(limit: int | str, used: int, **more: object) -> dict[str, object]:
    kinds = {"anon": 1, "file": 300, "active_file": 100, "inactive_file": 50, "slab_reclaimable": 1}
    stat = "".join(f"{kind} {count * MIB}\n" for kind, count in kinds.items())
    return {"max": limit, "current": used, "stat": stat, **more}


def version_1(limit: int | str, used: int, **more: object) -> dict[str, object]:
    stat = f"active_file 0\ntotal_active_file {100 * MIB}\ntotal_inactive_file {51 * MIB}\n"
    return {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat, **more}


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


def test_without_a_limit_the_machine_counts(system: FakeSystem) -> None:
    room = MemoryRoom(5000 * MIB, 8000 * MIB, is_limited=False)
    assert system.room() == room
    system.group("", version_2("max\n", 600))
    system.group("memory", version_1(UNLIMITED, 600))
    assert system.room() == room


@pytest.mark.parametrize(("folder", "files"), [("", version_2(768, 700)), ("memory", version_1(768, 700))])
def test_in_a_container_files_in_memory_count_as_free(
    system: FakeSystem, folder: str, files: Mapping[str, object]
) -> None:
    """A file in /dev/shm is not among them: it cannot be dropped."""
    system.group(folder, files)
    assert system.room() == MemoryRoom((768 - 700 + 151) * MIB, 768 * MIB, is_limited=True)


def test_the_group_with_the_least_room_counts(system: FakeSystem) -> None:
    """As for a service of systemd, whose slice has a limit, too."""
    system.write("membership", "3:cpu:/other\n0::/slice/service\n")
    system.group("other", version_2(10, 9))
    system.group("slice", version_2(2000, 1900))
    system.group("slice/service", version_2(3000, 200))
    assert system.room() == MemoryRoom((2000 - 1900 + 151) * MIB, 2000 * MIB, is_limited=True)


def test_a_machine_that_is_short_itself_counts_more_than_the_limit(system: FakeSystem) -> None:
    system.group("", version_2(7000, 100))
    assert system.room() == MemoryRoom(5000 * MIB, 8000 * MIB, is_limited=False)


@pytest.mark.parametrize(
    ("folder", "files", "swap"),
    [
        ("", version_2(768, 768), 500),
        ("", version_2(768, 768, **{"swap.max": "max\n", "swap.current": 10}), 500),
        ("", version_2(768, 768, **{"swap.max": 100, "swap.current": 40}), 60),
        ("", version_2(768, 768, **{"swap.max": 0, "swap.current": 0}), 0),
        ("memory", version_1(768, 768), 500),
        ("memory", version_1(768, 768, **{"memsw.limit_in_bytes": 1000}), 232),
        ("memory", version_1(768, 768, **{"memsw.limit_in_bytes": 768}), 0),
    ],
)
def test_swap_counts_as_far_as_the_group_may_use_it(
    tmp_path: Path, folder: str, files: Mapping[str, object], swap: int
) -> None:
    system = FakeSystem(tmp_path, swap_mib=500)
    system.group(folder, files)
    assert system.room() == MemoryRoom((151 + swap) * MIB, 768 * MIB, is_limited=True)


def test_a_group_above_its_limit_has_no_room(system: FakeSystem) -> None:
    system.group("", version_2(100, 600))
    assert system.room() == MemoryRoom(0, 100 * MIB, is_limited=True)


@pytest.mark.parametrize("text", ["", "nonsense\n", "MemTotal: much kB\n"])
def test_what_cannot_be_read_is_unknown(system: FakeSystem, text: str) -> None:
    system.write("meminfo", text)
    system.group("", version_2(768, 700))
    assert system.room() is None


def test_this_machine_has_room() -> None:
    room = read_memory_room()
    assert room is None or room.left_bytes > 0
