"""Where the model of a configuration comes from: a file of this machine, or the way to it."""

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from visionedge.config.addresses import model_name, shown
from visionedge.config.schema import ModelConfig
from visionedge.errors import ModelError
from visionedge.model.download import Fetch, Order, Tempo
from visionedge.model.model import Model, bundled_model_path, load_model
from visionedge.model.model_store import Kept
from visionedge.runtime.threads import Crew, on_thread

LIVE_TRIES = 5
"""So often a change of the model tries to fetch it before it is refused."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model's file; `url` and `sha256` where it was fetched."""

    path: Path
    url: str | None = None
    sha256: str | None = None

    def load(self) -> Model:
        """Read the model; one that was fetched is called as its address calls it. Blocks.

        Raises:
            ModelError: as `load_model`, in words that name the address instead of the file.
        """
        try:
            model = load_model(self.path)
        except ModelError as error:
            raise ModelError(self.words(error)) from None
        if self.url is None or self.sha256 is None:
            return model
        if model.sha256 != self.sha256.lower():
            raise ModelError(
                f"{shown(self.url)}: has weights in other files; a fetched model must be one file"
            )
        return replace(model, name=model_name(self.url))

    def words(self, error: Exception) -> str:
        """What an error says, for people who know the address and not the file."""
        text = str(error)
        if self.url is None:
            return text
        hint = "; a fetched model must be one file" if "external data" in text else ""
        return text.replace(str(self.path), shown(self.url)) + hint


class Supply:
    """The models of configurations. Loop only where not said; `on_trouble` is called there, too."""

    def __init__(
        self,
        data: Path,
        crew: Crew,
        *,
        tempo: Tempo | None = None,
        on_trouble: Callable[[str], None] = lambda _words: None,
    ) -> None:
        self._kept = Kept(data)
        self._crew = crew
        self._tempo = tempo
        self._on_trouble = on_trouble
        self._going: Fetch | None = None

    def __repr__(self) -> str:
        return f"<Supply {self._going!r}>"

    @property
    def words(self) -> str | None:
        """How far the model is that is being fetched; None where none is."""
        return None if self._going is None else self._going.words

    def at_hand(self, model: ModelConfig) -> Source | None:
        """The model if it is on this machine. Blocks.

        Raises:
            UnavailableError: it would be the bundled one, and that is missing.
        """
        if model.url is None or model.sha256 is None:
            return Source(Path(model.path) if model.path is not None else bundled_model_path())
        path = self._kept.find(model.sha256)
        return None if path is None else Source(path, model.url, model.sha256)

    async def fetched(self, model: ModelConfig, *, tries: int | None = None) -> Source | None:
        """The model, fetched if need be; None if that was stopped.

        Raises:
            FetchError: it is given up after so many `tries`; without these, never.
            UnavailableError: as `at_hand`.
        """
        at_hand = await on_thread(self._crew, "finding", lambda: self.at_hand(model))
        if at_hand is not None or model.url is None or model.sha256 is None:
            return at_hand
        loop = asyncio.get_running_loop()

        def trouble(words: str) -> None:
            with contextlib.suppress(RuntimeError):  # nobody listens any more when the module has ended
                loop.call_soon_threadsafe(self._on_trouble, words)

        going = self._going = Fetch(
            Order(model.url, model.sha256, model.max_megabytes * 1_000_000),
            self._kept,
            tries=tries,
            tempo=self._tempo,
            on_trouble=trouble,
        )
        try:
            path = await on_thread(self._crew, "fetching", going.run)
        finally:
            going.stop()
            self._going = None
        return None if path is None else Source(path, model.url, model.sha256)

    def stop(self) -> None:
        """Let what is being fetched be."""
        if self._going is not None:
            self._going.stop()

    def tidy(self, in_use: Collection[str]) -> None:
        """Throw away what was fetched long ago, but not these (by sha256). Blocks."""
        self._kept.tidy(in_use)
