"""How many of the waiting frames make a document that fills its blocks. Pure."""

from collections.abc import Sequence

from visionedge.outbound.messages import MAX_CAMERAS_BYTES, MAX_FRAME_BYTES, MAX_LABELS_BYTES, EncodedFrame
from visionedge.outbound.metering import BLOCK_BYTES, blocks

WELL_FILLED = 0.9
"""A document is well filled when its frames use this much of the blocks it is metered as."""

# What IoT Hub may add to the size of a message on its way: names of device, module and hub.
_MARGIN_BYTES = 96


class Weigher:
    """The size of a batch message while frames are added to it."""

    def __init__(self, envelope_bytes: int) -> None:
        self._bodies = 0
        self._count = 0
        self._envelope = envelope_bytes + _MARGIN_BYTES
        self._cameras: set[str] = set()
        self._labels: set[str] = set()
        self._cameras_bytes = 0
        self._labels_bytes = 0

    def add(self, frame: EncodedFrame) -> None:
        """One more frame."""
        self._bodies += len(frame.body) + 1
        self._count += 1
        if frame.camera not in self._cameras:
            self._cameras.add(frame.camera)
            self._cameras_bytes += len(frame.camera) + 1
        for label in frame.labels - self._labels:
            self._labels.add(label)
            self._labels_bytes += len(label) + 1

    @property
    def size_bytes(self) -> int:
        """What the message would weigh."""
        lists = self._cameras_bytes + min(self._labels_bytes, MAX_LABELS_BYTES)
        return self._envelope + self._bodies + lists

    @property
    def fits(self) -> bool:
        """Whether it may still be one message (a single frame always is)."""
        return self._count <= 1 or (
            self._bodies <= MAX_FRAME_BYTES
            and self._cameras_bytes <= MAX_CAMERAS_BYTES
            and self._labels_bytes <= MAX_LABELS_BYTES
        )

    @property
    def filled(self) -> bool:
        """Whether its blocks are used well enough."""
        return self.size_bytes >= WELL_FILLED * BLOCK_BYTES * blocks(self.size_bytes)


def well_filled(frames: Sequence[EncodedFrame], envelope_bytes: int) -> int:
    """How many of the first frames make the largest well-filled message; 0 when none does yet.

    When they are more than one message can carry, the message ends there, filled or not.
    """
    weigher, best = Weigher(envelope_bytes), 0
    for count, frame in enumerate(frames, 1):
        weigher.add(frame)
        if not weigher.fits:
            return best or count - 1
        if weigher.filled:
            best = count
    return best
