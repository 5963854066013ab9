"""What cameras ask for, and how far each is throttled for what is given up."""

from collections.abc import Mapping

from visionedge.app.load_meter import Reading
from visionedge.app.overload_policy import Held, Rung
from visionedge.app.shares import Wish, caps
from visionedge.camera.motion_gate import GateSettings
from visionedge.camera.timing import Throttle
from visionedge.config.schema import CameraConfig

_NEWEST = 0.5  # part of a rate that the newest reading makes up
_ALIKE = 0.08
_GATE = GateSettings()


class Asked:
    """The frames per second that cameras are asked for, without the noise of single readings."""

    def __init__(self) -> None:
        self.per_s: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Asked {sum(self.per_s.values()):.1f} frames/s of {len(self.per_s)} cameras>"

    def note(self, seen: Reading) -> None:
        """A newer reading is there."""
        before = self.per_s
        self.per_s = {
            name: _NEWEST * camera.demanded + (1 - _NEWEST) * before.get(name, camera.demanded)
            for name, camera in seen.cameras.items()
        }

    def wishes(self, cameras: Mapping[str, CameraConfig]) -> dict[str, Wish]:
        """By name, what these cameras ask for; one that has not been seen yet asks for nothing."""
        return {
            name: Wish(self.per_s.get(name, 0.0), settings.priority) for name, settings in cameras.items()
        }


def gated(cameras: Mapping[str, CameraConfig]) -> list[str]:
    """The cameras that a motion gate can be put on: one that is switched off was meant to be off."""
    return sorted(name for name, settings in cameras.items() if settings.gate is None)


def limits(
    held: Mapping[Rung, Held], wishes: Mapping[str, Wish], least_per_s: float, before: Mapping[str, float]
) -> Mapping[str, float]:
    """The frames per second of the cameras that are slowed.

    Those `before` stay as they are where what is asked for now would make hardly any difference.
    """
    budget = held["fps"].budget_per_s if "fps" in held else None
    if budget is None:
        return {}
    now = caps(wishes, budget, least_per_s)
    if now.keys() == before.keys() and all(abs(now[n] - before[n]) <= _ALIKE * before[n] for n in now):
        return before
    return now


def throttles(
    held: Mapping[Rung, Held], cameras: Mapping[str, CameraConfig], slowed: Mapping[str, float]
) -> dict[str, Throttle]:
    """By name, what each camera is held to; one that is not throttled is not in it."""
    gates = frozenset(gated(cameras) if "gate" in held else [])
    return {
        name: Throttle(slowed.get(name), _GATE if name in gates else None)
        for name in cameras
        if name in slowed or name in gates
    }
