"""Opening a source on a thread that can be left behind, as a decoder that opens cannot be interrupted."""

import threading
from collections.abc import Callable

from visionedge.capture.decoded import Source


class Attempt:
    """One opening of a source. `start` and `take` belong to one thread, `give_up` may be called by any."""

    def __init__(self, name: str, opener: Callable[[], Source]) -> None:
        self._opener = opener
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._settled = threading.Event()
        self._lock = threading.Lock()
        self._left = False
        self._source: Source | None = None
        self._error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Attempt {self._thread.name} settled={self._settled.is_set()}>"

    def take(self) -> Source | None:
        """Open, and wait for it; None if it was given up, then what opens later is closed again.

        Raises:
            Exception: what the opener raised.
        """
        self._thread.start()
        self._settled.wait()
        with self._lock:
            self._left = True
            source, error = self._source, self._error
        if error is not None:
            raise error
        return source

    def give_up(self) -> None:
        """Let `take` return at once."""
        self._settled.set()

    def _run(self) -> None:
        source: Source | None = None
        error: Exception | None = None
        try:
            source = self._opener()
        except Exception as caught:  # noqa: BLE001 - raised again in the thread that waits
            error = caught
        with self._lock:
            self._source, self._error = source, error
            late = source if self._left else None
        if late is not None:
            late.close()
        self._settled.set()
