"""Work of a decoder on a thread that can be left behind, because a decoder cannot be interrupted."""

import threading
from collections.abc import Callable


class Attempt:
    """One connection of a camera. `take` belongs to one thread, `give_up` may be called by any.

    Args:
        name: of its thread.
        work: opens and plays a source; it looks at `left` after each step that may have taken long, and then
            closes what it opened and returns.
    """

    def __init__(self, name: str, work: "Callable[[Attempt], None]") -> None:
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._settled = threading.Event()
        self._lock = threading.Lock()
        self._left = False
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Attempt {self._thread.name} settled={self._settled.is_set()}>"

    @property
    def left(self) -> bool:
        """Whether `take` has returned, or is about to, before the work ended."""
        return self._left

    def take(self) -> None:
        """Do the work and wait for its end, or until it is given up.

        Raises:
            Exception: what the work raised, or what it was given up with.
        """
        self._thread.start()
        self._settled.wait()
        if self._error is not None:
            raise self._error

    def give_up(self, error: Exception | None = None) -> None:
        """Let `take` return at once, or raise this; too late where the work has ended."""
        with self._lock:
            if not self._settled.is_set():
                self._left, self._error = True, error
                self._settled.set()

    def linger(self, timeout_s: float) -> None:
        """After it was given up: wait for the work to end, so that a source that answers is closed."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        error: Exception | None = None
        try:
            self._work(self)
        except Exception as caught:  # noqa: BLE001 - raised again in the thread that waits
            error = caught
        with self._lock:
            if not self._left:
                self._error = error
                self._settled.set()
