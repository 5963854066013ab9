"""A model on its way: try after try, on a thread of its own, stopped at any moment from another."""

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from visionedge.config.addresses import shown
from visionedge.errors import FetchError
from visionedge.model.attempt import Order, Progress, attempt
from visionedge.model.faults import Patience
from visionedge.model.hanging_up import ConnectionLoop
from visionedge.model.model_store import Kept
from visionedge.runtime.redaction import keep_secret, secrets_in

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tempo:
    """How long one try may take, and the pauses between them: for what may pass, and for what seldom does."""

    patience: Patience = field(default_factory=Patience)
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    first_lasting_pause_s: float = 60.0
    longest_lasting_pause_s: float = 3600.0
    tell_every_s: float = 5.0


def pause_s(tempo: Tempo, failures: int, *, lasting: bool) -> float:
    """How long to wait after so many failures (1 and more): each time twice as long, up to a limit."""
    first = tempo.first_lasting_pause_s if lasting else tempo.first_pause_s
    longest = tempo.longest_lasting_pause_s if lasting else tempo.longest_pause_s
    return min(longest, first * 2.0 ** min(failures - 1, 30))


class Fetch:
    """One model's way to the disk. `run` belongs to one thread, all else to any.

    `on_trouble` is told, on that thread, why it is tried again, once as long as the reason stays the same.
    With `tries` it gives up after so many, and at once when another would not help; without, it goes on for
    ever: links come back, and files are put where they were missing.
    """

    def __init__(
        self,
        order: Order,
        kept: Kept,
        *,
        tries: int | None = None,
        tempo: Tempo | None = None,
        jitter: Callable[[], float] = random.random,
        on_trouble: Callable[[str], None] = lambda _words: None,
    ) -> None:
        self.order = order
        self._kept = kept
        self._tries = tries
        self._tempo = tempo or Tempo()
        self._jitter = jitter
        self._on_trouble = on_trouble
        self._lock = threading.Lock()
        self._progress = Progress()
        self._error: str | None = None
        self._failed_at_bytes = 0
        self._stopping = False
        self._cancel: Callable[[], None] = lambda: None
        keep_secret(secrets_in([order.url]))

    def __repr__(self) -> str:
        return f"<Fetch {shown(self.order.url)} {self.words}>"

    @property
    def words(self) -> str:
        """How it stands, for people."""
        if self._error is not None and self._progress.done_bytes <= self._failed_at_bytes:
            return f"the model cannot be fetched, and is tried again: {self._error}"
        return f"the model is being fetched: {self._progress.words}"

    def run(self) -> Path | None:
        """Fetch the model, or find it kept from before; None if it was stopped. Blocks, for hours maybe.

        Raises:
            FetchError: it is given up; one line that begins with the address.
        """
        kept = self._kept.find(self.order.sha256)
        if kept is not None:
            return kept
        loop = ConnectionLoop()
        with contextlib.suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(self._whole(loop))
        return None

    def stop(self) -> None:
        """Let `run` return soon."""
        with self._lock:
            self._stopping = True
            cancel = self._cancel
        cancel()

    async def _whole(self, loop: ConnectionLoop) -> Path:
        """Until it is there or given up; whoever stops it cancels the task."""
        task = asyncio.ensure_future(self._tried())

        def cancel() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(task.cancel)

        with self._lock:
            self._cancel = cancel
            stopping = self._stopping
        if stopping:
            task.cancel()
        try:
            return await task
        finally:
            await loop.hang_up()

    async def _tried(self) -> Path:
        log.info("fetching the model %s", shown(self.order.url))
        failures = 0
        while True:
            try:
                return await self._once()
            except FetchError as error:
                failures += 1
                words = f"{shown(self.order.url)}: {error}"
                if self._tries is not None and (error.lasting or failures >= self._tries):
                    raise FetchError(words, lasting=error.lasting) from None
                news = words != self._error
                self._error, self._failed_at_bytes = words, self._progress.done_bytes
                if news:
                    log.warning("the model cannot be fetched, and is tried again: %s", words)
                    self._on_trouble(words)
                pause = pause_s(self._tempo, failures, lasting=error.lasting)
            await asyncio.sleep(pause * (0.5 + 0.5 * self._jitter()))

    async def _once(self) -> Path:
        began_s = time.monotonic()
        teller = asyncio.create_task(self._tell())
        try:
            with self._kept.begin(self.order.sha256) as part:
                await attempt(self.order, part, self._tempo.patience, self._progress)
                path = self._kept.keep(part, self.order.sha256)
        finally:
            teller.cancel()
        log.info("the model is fetched: %.1f MB in %.1f s", part.size_bytes / 1e6, time.monotonic() - began_s)
        return path

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(self._tempo.tell_every_s)
            log.info("the model is being fetched: %s", self._progress.words)
