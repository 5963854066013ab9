"""The seam: the one place where an engine touches a device, so that a test can put a failing one there."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from visionedge.engine.device.devices import PROVIDERS, Effective, Verdict, probe
from visionedge.engine.device.session import NodePlaces, Pictures, open_session
from visionedge.model.postprocess import Rows
from visionedge.runtime.ort import import_onnxruntime


class Runs(Protocol):
    """What an engine asks of a session (`session.Session`)."""

    @property
    def rows(self) -> int:
        """K: the rows that a picture gives."""

    @property
    def places(self) -> NodePlaces:
        """Where its nodes lie."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that it refused."""

    def run(self, pictures: Pictures, size: int) -> Rows:
        """Compute pictures as one batch, padded to `size`."""

    def keep(self, sizes: Collection[int]) -> None:
        """Let go of the memory of other batch sizes."""

    def close(self) -> None:
        """Let go of it."""


class OnDevice(Runs, Protocol):
    """A session that says where it really came up."""

    @property
    def device(self) -> Effective:
        """Its device."""


class Opens(Protocol):
    """`session.open_session`."""

    def __call__(self, graph: bytes, device: Effective, *, max_batch: int, data: Path | None) -> OnDevice:
        """Open a compiled graph on a device; raises what onnxruntime raises."""


def built_in(device: Effective) -> bool:
    """Whether this onnxruntime was built for a device: absence is the truth, presence is not."""
    return PROVIDERS[device] in import_onnxruntime().get_available_providers()


@dataclass(frozen=True, slots=True)
class Seam:
    """Whether a device was built in, whether it is usable, and how a session is opened on it."""

    built_in: Callable[[Effective], bool] = built_in
    probe: Callable[[Effective], Verdict] = probe
    open: Opens = open_session


REAL = Seam()
