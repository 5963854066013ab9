"""What the service offers to HTTP: `Backend`, and nothing else of the module is known in this room."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from visionedge.errors import VisionedgeError
from visionedge.frames.types import FrameResult, InputSpec, Picture

Document = dict[str, Any]


class BusyError(VisionedgeError):
    """No room for this request now; the caller may try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a client of the Open Inference Protocol must know of the loaded model.

    One inference takes uint8 (n, input.height_px, input.width_px, 3) BGR with 1 <= n <= `max_batch` and gives
    float32 (n, `rows`, 6): left, top, right, bottom in input pixels, score, class.
    """

    name: str
    sha256: str
    input: InputSpec
    rows: int
    max_batch: int
    labels: tuple[str, ...]


class Backend(Protocol):
    """The running module as HTTP sees it.

    Every method is called on the event loop and returns at once; those that wait are coroutines. Documents
    are plain JSON values in the shapes of ``/openapi.json`` (see `schemas`), secrets already masked.
    """

    def health(self) -> list[str]:
        """Why the module is not healthy, one line each; empty when it is."""
        ...

    def readiness(self) -> list[str]:
        """Why the module is not ready to answer, one line each; empty when it is."""
        ...

    def status(self) -> Document:
        """The `Status` object: version, uptime, engine, model, cameras, hub."""
        ...

    def cameras(self) -> list[Document]:
        """One `Camera` object per configured camera, in the order people should see them."""
        ...

    def camera(self, name: str) -> Document | None:
        """One `Camera` object; None where no camera has this name."""
        ...

    def has_camera(self, name: str) -> bool:
        """Whether a camera has this name; costs nothing, unlike its object."""
        ...

    def latest(self, name: str) -> FrameResult | None:
        """The newest result of a camera; None before its first one."""
        ...

    async def wait_for_newer(self, name: str, after: int | None, timeout_s: float) -> FrameResult | None:
        """The newest result with a sequence above `after` (None: any), waiting up to `timeout_s` for it.

        None when the time is up or the camera was removed.

        Raises:
            Busy: too many wait already.
        """
        ...

    def subscribe(self, camera: str | None) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Every frame object from now on as JSON, of one camera or of all (None), in order.

        The viewer's buffer is bounded: a slow one loses its own oldest frames. Ends when the camera is
        removed or the module stops. Entering raises `BusyError` when there are too many viewers.
        """
        ...

    async def detect(self, picture: Picture) -> FrameResult:
        """Analyse one picture.

        Raises:
            Busy: the engine has no room for it, or is not ready yet.
            VisionedgeError: it could not be computed.
        """
        ...

    async def doctor(self) -> Document:
        """The `Doctor` object: the way to the GPU examined, at most once a minute."""
        ...

    def log(self) -> str:
        """The newest lines of the log, oldest first."""
        ...

    def metrics(self) -> bytes:
        """All metrics in the Prometheus text format 0.0.4."""
        ...

    def model(self) -> ModelMetadata | None:
        """The loaded model; None before it is loaded."""
        ...

    async def infer_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the compiled model; shapes as in `ModelMetadata`.

        Raises:
            Busy: the engine has no room for it, or is not ready yet.
            VisionedgeError: it could not be computed.
        """
        ...
