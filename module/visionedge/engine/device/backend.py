"""The one place where an engine touches a device, so that a test can inject a device that fails."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from visionedge.engine.device.devices import PROVIDERS, DeviceVerdict, EffectiveDevice, probe_device
from visionedge.engine.device.session import NodePlacement, PictureBatch, open_session
from visionedge.model.postprocess import Rows
from visionedge.runtime.ort import import_onnxruntime


class RunnableSession(Protocol):
    """A `Session`, as far as an engine uses it."""

    @property
    def rows(self) -> int:
        """K: the number of rows for a picture."""

    @property
    def node_placement(self) -> NodePlacement:
        """How many nodes run on the device, and which on the CPU."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Options that it refused, with the reason."""

    def run(self, pictures: PictureBatch, size: int) -> Rows:
        """Compute pictures as one batch, padded to `size`."""

    def keep_only(self, sizes: Collection[int]) -> None:
        """Free the memory of other batch sizes."""

    def close(self) -> None:
        """Free everything."""


class DeviceSession(RunnableSession, Protocol):
    """A session that knows the device on which it came up."""

    @property
    def device(self) -> EffectiveDevice:
        """The device that computes."""


class SessionOpener(Protocol):
    """The signature of `open_session`."""

    def __call__(
        self, graph: bytes, device: EffectiveDevice, *, max_batch: int, data: Path | None
    ) -> DeviceSession:
        """Open a compiled graph on a device; raises what onnxruntime raises."""


def has_provider(device: EffectiveDevice) -> bool:
    """Whether this onnxruntime was built for a device. True does not mean that the device can be used."""
    return PROVIDERS[device] in import_onnxruntime().get_available_providers()


@dataclass(frozen=True, slots=True)
class DeviceBackend:
    """Whether a device is built in, whether it is usable, and how a session is opened on it."""

    has_provider: Callable[[EffectiveDevice], bool] = has_provider
    probe_device: Callable[[EffectiveDevice], DeviceVerdict] = probe_device
    open: SessionOpener = open_session


ORT_BACKEND = DeviceBackend()
