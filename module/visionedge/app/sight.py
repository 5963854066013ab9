"""From a reading of the load to what the overload ladder looks at. Pure."""

from visionedge.app.load_meter import Reading, nearly
from visionedge.app.overload_policy import Load
from visionedge.engine.device.devices import Effective

_TOO_MANY = 0.1
_FEW = 0.05
_SOME_PER_S = 0.5
_HARDLY_ANY_PER_S = 0.25
_SPARE = 0.85


def load_of(seen: Reading) -> Load:
    """Whether the device carries what is let in.

    One camera that its own thread cannot decode is no overload: others would be slowed for nothing.
    """
    behind = seen.full and not nearly(seen.offered, seen.let_in)
    if behind or seen.lost > max(_TOO_MANY * seen.offered, _SOME_PER_S):
        return "over"
    return "fine" if seen.lost <= max(_FEW * seen.offered, _HARDLY_ANY_PER_S) else "between"


def has_room(seen: Reading) -> bool:
    """Whether more could be computed; of a GPU that is not known, so it has to be tried."""
    return seen.gpu or seen.used_cores < _SPARE * seen.limit


def rates_in_words(seen: Reading) -> str:
    """``7.4 of 40.0 frames/s``."""
    return f"{seen.delivered:.1f} of {seen.demanded:.1f} frames/s"


def device_in_words(effective: Effective) -> str:
    """The device that computes, for people."""
    return "the CPU" if effective == "cpu" else "the GPU"
