"""What the HTTP handlers ask of the running module: `Backend`. They know nothing else of it."""

from collections.abc import AsyncIterable, AsyncIterator, Awaitable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from visionedge.config.documents import Document
from visionedge.errors import VisionedgeError
from visionedge.frames.types import FrameResult, InputSpec, Picture
from visionedge.scene.events import EventFilter
from visionedge.scene.totals import CountRow


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


class UnknownModelError(VisionedgeError):
    """No model of this module has the name of a request."""


class ViewerStream(AsyncIterable[bytes], Protocol):
    """The fields of server-sent events for one viewer; `lost`: how many it has missed so far."""

    @property
    def lost(self) -> int: ...
    def __anext__(self) -> Awaitable[bytes]: ...
    def __aiter__(self) -> AsyncIterator[bytes]: ...
    def take_waiting(self) -> list[bytes]:
        """All that can be sent at once."""


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

    def rules(self, camera: str | None) -> list[str]:
        """The names of the zones and lines of a configured camera, or of all (None)."""

    async def scene_events(
        self, wanted: EventFilter, *, before: str | None = None, after: str | None = None, limit: int
    ) -> list[Document]:
        """`SceneEventDocument` of the newest events first, also of cameras, zones and lines that are gone.

        Only those before or after the events with these ids.

        Raises:
            UnknownEventError: there is no event with such an id.
            SceneStorageError: the log cannot be read now.
            BusyError: too many requests read it.
        """

    async def scene_counts(
        self, camera: str, begin: datetime, end: datetime, by: Literal["hour", "day"], *, limit: int
    ) -> list[CountRow]:
        """How often each total of a camera grew by hour or UTC day, from that of `begin` to before `end`.

        At most `limit` of these.

        Raises:
            SceneStorageError, BusyError: as `scene_events`.
        """

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

    def subscribe(
        self, camera: str | None, *, with_events: bool = False
    ) -> AbstractAsyncContextManager[ViewerStream]:
        """Every frame object from now on, of one camera or of all (None), in order; also their scene events.

        Each is the fields of a server-sent event. The viewer's buffer is bounded: a slow viewer loses its own
        oldest ones. The stream ends when the camera is removed or the module stops. Entering raises
        `BusyError` when there are too many viewers.
        """

    def subscribe_events(self, wanted: EventFilter) -> AbstractAsyncContextManager[ViewerStream]:
        """The scene events from now on; as `subscribe`, without frame objects."""

    async def detect(self, picture: Picture, model: str | None = None) -> FrameResult:
        """Analyse one picture with a model of this name; None: that of the section `model`.

        Raises:
            UnknownModelError: no model has this name.
            BusyError: the engine has no capacity now or is not ready yet.
            VisionedgeError: it could not be computed.
        """

    async def doctor(self) -> Document:
        """`DoctorDocument`; made at most once a minute."""

    def log(self) -> str:
        """The newest lines of the log, oldest first."""

    def metrics(self) -> bytes:
        """All metrics in the Prometheus text format 0.0.4."""

    def models(self) -> list[ModelMetadata]:
        """The models with an engine, that of the section `model` first."""

    def model_readiness(self, name: str) -> str | None:
        """Why a model does not answer now; None when it does."""

    async def infer_rows(self, images: NDArray[np.uint8], model: str) -> NDArray[np.float32]:
        """Run a compiled model; shapes as in `ModelMetadata`.

        Raises:
            UnknownModelError: no model has this name any more.
            BusyError: the engine has no capacity now or is not ready yet.
            VisionedgeError: it could not be computed.
        """
