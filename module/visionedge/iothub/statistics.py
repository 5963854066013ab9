"""What IoT Hub and other modules have asked of this one, in numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Asked:
    """Counts since the start: wishes by outcome, patches of reported properties, methods by name and status,
    calls that came too many at once, pictures of other modules. `config` is the last acknowledgement.
    """

    wishes: Mapping[str, int] = field(default_factory=dict)
    patches: int = 0
    methods: Mapping[tuple[str, int], int] = field(default_factory=dict)
    calls_dropped: int = 0
    pictures_answered: int = 0
    pictures_dropped: Mapping[str, int] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
