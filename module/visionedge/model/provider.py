"""Finds the model of a configuration: a file on this machine, or a download."""

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from visionedge.config.addresses import format_url, model_name_from_url
from visionedge.config.schema import ModelConfig
from visionedge.errors import ModelError
from visionedge.model.download import DownloadRequest, DownloadRetryPolicy, ModelDownload
from visionedge.model.model import Model, find_bundled_model, load_model
from visionedge.model.model_store import ModelStore
from visionedge.runtime.threads import ThreadGroup, run_on_thread

MAX_CHANGE_TRIES = 5
"""Attempts of a download before a change of the model is refused."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model file; `url` and `sha256` are set if it was downloaded."""

    path: Path
    url: str | None = None
    sha256: str | None = None

    def load(self) -> Model:
        """Read the model; a downloaded one is named after its address. Blocks.

        Raises:
            ModelError: as `load_model`, but the message has the address instead of the file.
        """
        try:
            model = load_model(self.path)
        except ModelError as error:
            raise ModelError(self.message(error)) from None
        if self.url is None or self.sha256 is None:
            return model
        if model.sha256 != self.sha256.lower():
            raise ModelError(
                f"{format_url(self.url)}: has weights in other files; a downloaded model must be one file"
            )
        return replace(model, name=model_name_from_url(self.url))

    def message(self, error: Exception) -> str:
        """The text of an error with the address instead of the file, which people do not know."""
        text = str(error)
        if self.url is None:
            return text
        hint = "; a downloaded model must be one file" if "external data" in text else ""
        return text.replace(str(self.path), format_url(self.url)) + hint


class ModelProvider:
    """Finds and downloads models.

    For the event loop, except methods that block; `on_failure` is called there too.
    """

    def __init__(
        self,
        data: Path,
        thread_group: ThreadGroup,
        *,
        retry_policy: DownloadRetryPolicy | None = None,
        on_failure: Callable[[str], None] = lambda _words: None,
    ) -> None:
        self._store = ModelStore(data)
        self._thread_group = thread_group
        self._retry_policy = retry_policy
        self._on_failure = on_failure
        self._download: ModelDownload | None = None

    def __repr__(self) -> str:
        return f"<ModelProvider {self._download!r}>"

    @property
    def message(self) -> str | None:
        """The state of the current download; None if there is none."""
        return None if self._download is None else self._download.message

    def local_source(self, model: ModelConfig) -> ModelSource | None:
        """The model if it is on this machine, else None. Blocks.

        Raises:
            UnavailableError: the bundled model is missing.
        """
        if model.url is None or model.sha256 is None:
            return ModelSource(Path(model.path) if model.path is not None else find_bundled_model())
        path = self._store.find(model.sha256)
        return None if path is None else ModelSource(path, model.url, model.sha256)

    async def fetch(self, model: ModelConfig, *, tries: int | None = None) -> ModelSource | None:
        """The model, downloaded if it is not on this machine; None if `stop` was called.

        Raises:
            DownloadError: `tries` attempts failed; without `tries`, never.
            UnavailableError: as `local_source`.
        """
        local_source = await run_on_thread(self._thread_group, "finding", lambda: self.local_source(model))
        if local_source is not None or model.url is None or model.sha256 is None:
            return local_source
        loop = asyncio.get_running_loop()

        def report_failure(message: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed when the module has ended
                loop.call_soon_threadsafe(self._on_failure, message)

        download = self._download = ModelDownload(
            DownloadRequest(model.url, model.sha256, model.max_megabytes * 1_000_000),
            self._store,
            tries=tries,
            retry_policy=self._retry_policy,
            on_failure=report_failure,
        )
        try:
            path = await run_on_thread(self._thread_group, "fetching", download.run)
        finally:
            download.stop()
            self._download = None
        return None if path is None else ModelSource(path, model.url, model.sha256)

    def stop(self) -> None:
        """Stop the current download."""
        if self._download is not None:
            self._download.stop()

    def evict(self, in_use: Collection[str]) -> None:
        """Delete the least recently used downloads, but none of `in_use` (by sha256). Blocks."""
        self._store.evict(in_use)
