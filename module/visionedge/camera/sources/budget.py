"""Decoder threads, counted for the whole module: a camera that needs more than its own asks here."""

import threading


class ThreadBudget:
    """So many threads beside the cameras' own, for whoever comes first. Thread-safe."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<ThreadBudget left={self._left}>"

    @property
    def left(self) -> int:
        """How many nobody has."""
        return self._left

    def take(self, wanted: int) -> int:
        """As many of the wanted as there are; the caller owes them back."""
        with self._lock:
            given = max(0, min(wanted, self._left))
            self._left -= given
            return given

    def give_back(self, count: int) -> None:
        """Return what was taken."""
        with self._lock:
            self._left += count
