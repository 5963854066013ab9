"""What the HTTP handlers ask of the running module: `Backend`. They know nothing else of it."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from visionedge.config.documents import Document
from visionedge.frames.types import FrameResult, InputSpec, Picture


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a client of the Open Inference Protocol has to know of the loaded model.

    One inference takes uint8 (n, input.height_px, input.width_px, 3) BGR with 1 <= n <= `max_batch` and
    returns float32 (n, `rows`, 6): left, top, right, bottom in input pixels, score, class. `sha256` is that
    of the model file; of a compiled graph, that of its original.
    """

    name: str
    sha256: str
    input: InputSpec
    rows: int
    max_batch: int
    labels: tuple[str, ...]


class Backend(Protocol):
    """The running module.

    Every method is called on the event loop and returns at once; those that wait are coroutines. Documents
    are plain JSON values in the shapes of `web.documents`, secrets already masked.
    """

    def health(self) -> list[str]:
        """Why the module is not healthy, one line each; empty when it is."""

    def readiness(self) -> list[str]:
        """Why the module is not ready to answer, one line each; empty when it is."""

    def status(self) -> Document:
        """`StatusDocument`."""

    def cameras(self) -> list[Document]:
        """`CameraDocument` of each configured camera, in the order of the configuration."""

    def camera(self, name: str) -> Document | None:
        """`CameraDocument` of one camera; None where no camera has this name."""

    def scene(self, name: str) -> Document | None:
        """`SceneDocument` of one camera; None where no camera has this name."""

    def has_camera(self, name: str) -> bool:
        """Whether a camera has this name; much cheaper than its document."""

    def latest(self, name: str) -> FrameResult | None:
        """The newest result of a camera; None before its first one."""

    async def wait_for_newer(self, name: str, after: int | None, timeout_s: float) -> FrameResult | None:
        """The newest result with a sequence above `after` (None: any), waiting up to `timeout_s` for it.

        None after `timeout_s`, or when the camera was removed.

        Raises:
            BusyError: too many requests wait.
        """

    def subscribe(self, camera: str | None) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Every frame object from now on as JSON, of one camera or of all (None), in order.

        The viewer's buffer is bounded: a slow viewer loses its own oldest frames. The stream ends when the
        camera is removed or the module stops. Entering raises `BusyError` when there are too many viewers.
        """

    async def detect(self, picture: Picture) -> FrameResult:
        """Analyse one picture.

        Raises:
            BusyError: the engine has no capacity now or is not ready yet.
            VisionedgeError: it could not be computed.
        """

    async def doctor(self) -> Document:
        """`DoctorDocument`; made at most once a minute."""

    def log(self) -> str:
        """The newest lines of the log, oldest first."""

    def metrics(self) -> bytes:
        """All metrics in the Prometheus text format 0.0.4."""

    def model(self) -> ModelMetadata | None:
        """The loaded model; None before it is loaded."""

    async def infer_rows(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Run the compiled model; shapes as in `ModelMetadata`.

        Raises:
            BusyError: the engine has no capacity now or is not ready yet.
            VisionedgeError: it could not be computed.
        """
