"""Pictures in shared memory: a block is never handed out while anybody can still see what is in it."""

import gc
import os
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionedge.engine.process.shared_memory import Arena, Window, blocks_for
from visionedge.frames.types import InputSpec, Picture

SPEC = InputSpec(20, 10)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(SPEC, 4)
    yield made
    made.close()


def allocated(arena: Arena) -> Picture:
    """A picture that there must be room for."""
    picture = arena.allocate()
    assert picture is not None
    return picture


def test_a_picture_is_a_plain_array_of_the_models_size(arena: Arena) -> None:
    picture = allocated(arena)
    assert picture.shape == (10, 20, 3)
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous
    assert picture.flags.writeable


def test_what_is_written_is_seen_at_the_other_end(arena: Arena) -> None:
    window = Window(arena.fd, SPEC)
    pictures = [allocated(arena) for _ in range(4)]
    for number, picture in enumerate(pictures):
        picture[:] = number
    for number, picture in enumerate(pictures):
        block = arena.block_of(picture)
        assert block is not None
        assert (window.picture(block) == number).all()


def test_the_other_end_cannot_write(arena: Arena) -> None:
    """Neither through its window nor by a mapping of its own, nor can it cut the memory short under us."""
    seen = Window(arena.fd, SPEC).picture(0)
    with pytest.raises(ValueError, match="read-only"):
        seen[0] = 1
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    with pytest.raises(PermissionError):
        os.pwrite(arena.fd, b"x", 0)


@pytest.mark.parametrize("block", [-1, 4, 1 << 30])
def test_a_block_that_there_is_not_is_an_error(arena: Arena, block: int) -> None:
    with pytest.raises(IndexError):
        Window(arena.fd, SPEC).picture(block)


def test_without_a_free_block_there_is_none_and_it_is_counted(arena: Arena) -> None:
    held = [allocated(arena) for _ in range(4)]
    assert arena.allocate() is None
    assert arena.allocate() is None
    assert (arena.dry, arena.free) == (2, 0)
    held.pop()
    assert allocated(arena) is not None


def test_a_view_keeps_its_block(arena: Arena) -> None:
    """Of whatever kind: a slice of a slice, another shape, a bare buffer."""
    kept = [allocated(arena)[2:][1:], allocated(arena).reshape(-1), allocated(arena).data]
    gc.collect()
    assert arena.free == 1
    kept.clear()
    gc.collect()
    assert arena.free == 4


def test_pictures_outlive_their_arena() -> None:
    arena = Arena(SPEC, 1)
    picture = allocated(arena)
    arena.close()
    del arena
    gc.collect()
    picture[:] = 7
    assert int(picture.sum()) == 7 * picture.size


def test_only_whole_pictures_are_in_a_block(arena: Arena) -> None:
    picture = allocated(arena)
    assert arena.block_of(picture) is not None
    assert arena.block_of(picture.copy()) is None
    assert arena.block_of(picture[:, ::-1]) is None
    assert arena.block_of(picture[:5]) is None
    assert arena.block_of(np.zeros((10, 20, 3), np.uint8)) is None
    other = Arena(SPEC, 4)
    assert arena.block_of(allocated(other)) is None
    other.close()


@given(steps=st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=60))
@settings(deadline=None)
def test_held_pictures_are_always_different_blocks(steps: list[int | None]) -> None:
    """Whatever is taken (None) and let go (a number) in which order; and none is lost."""
    arena = Arena(SPEC, 5)
    held: list[Picture] = []
    for step in steps:
        if step is None:
            picture = arena.allocate()
            assert (picture is None) == (len(held) == 5)
            if picture is not None:
                held.append(picture)
            del picture
        elif held:
            held.pop(step % len(held))
        blocks = [arena.block_of(picture) for picture in held]
        assert len(set(blocks)) == len(held)
        assert None not in blocks
        assert arena.free == 5 - len(held)
    arena.close()


def test_threads_never_see_each_others_pictures() -> None:
    """Eight threads write their own number, hold some pictures for a while, and find only it later on."""
    arena = Arena(SPEC, 12)
    wrong: list[int] = []
    dry: list[int] = []

    def camera(number: int) -> None:
        chance = random.Random(number)  # noqa: S311 - of no secret
        held: list[Picture] = []
        for _ in range(2000):
            picture = arena.allocate()
            if picture is None:
                dry.append(number)
            else:
                picture[:] = number
                held.append(picture)
            while len(held) > chance.randrange(3):
                checked = held.pop(0)
                if not (checked == number).all():
                    wrong.append(number)

    threads = [threading.Thread(target=camera, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert arena.dry == len(dry)
    assert arena.free == 12
    arena.close()


def test_there_are_blocks_for_every_camera() -> None:
    assert blocks_for(0) >= 32
    assert blocks_for(50) >= 50 * 4
