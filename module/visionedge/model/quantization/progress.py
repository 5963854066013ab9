"""Progress of work that takes minutes: a line at least every few seconds, but not one for each step."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

EVERY_S = 3.0

Item = TypeVar("Item")


class Progress:
    """Hands every line that it is called with to `tell`, and a step only after `EVERY_S` without a line."""

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._last_s = clock()

    def __call__(self, line: str) -> None:
        """Something has begun or is done."""
        self._tell(line)
        self._last_s = self._clock()

    def step(self, line: str) -> None:
        """A part of it is done, which is worth a line only if there was none for a while."""
        if self._clock() - self._last_s >= EVERY_S:
            self(f"  {line}")

    def over(self, items: Sequence[Item], words: str) -> Iterator[Item]:
        """The items; each is a step: `words`, and how many of them are done."""
        for number, item in enumerate(items, 1):
            yield item
            self.step(f"{words}: {number} of {len(items)}")


def silent() -> Progress:
    """Progress that no line comes from."""
    return Progress(lambda _: None)
