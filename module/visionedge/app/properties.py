"""The reported properties: what the twin says of the module, cut to what a twin may hold. Pure."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from visionedge import __version__
from visionedge.app.state import Rooms
from visionedge.config.documents import Document
from visionedge.frames.types import utc_text

MAX_CAMERAS_BYTES = 17_000
"""200 cameras with the longest names; with the acknowledgement still below the 32 KB of a twin."""

_CALM = ("live", "disabled", "ended")


def properties(rooms: Rooms, acknowledgement: Mapping[str, Any], started: datetime) -> Document:
    """All that is reported; without nulls, which would take keys away."""
    document: Document = {
        "config": dict(acknowledgement),
        "engine": _engine(rooms),
        "cameras": camera_states(_states(rooms)),
        "module": {"version": __version__, "started": utc_text(started)},
    }
    if rooms.loaded is not None:
        document["model"] = {"name": rooms.loaded.name[:256], "sha256": rooms.loaded.sha256}
    return document


def _engine(rooms: Rooms) -> Document:
    if rooms.engine is None:
        return {"requested": rooms.config.inference.device, "reasonCode": "warming-up"}
    device = rooms.engine.device
    return {
        "requested": device.requested,
        "effective": device.effective,
        "precision": rooms.engine.precision.precision,
        "reasonCode": device.code,
        "since": utc_text(device.since_utc),
    }


def _states(rooms: Rooms) -> dict[str, str]:
    running = rooms.cameras_by_name
    return {
        name: running[name].status().state if name in running else "disabled" for name in rooms.config.cameras
    }


def camera_states(states: Mapping[str, str]) -> Document:
    """The states by name; of more than fit those that are in trouble are kept, and the rest is counted."""
    left_bytes = MAX_CAMERAS_BYTES
    kept: Document = {}
    for name in sorted(states, key=lambda name: (states[name] in _CALM, name)):
        left_bytes -= len(json.dumps({name: states[name]}))
        if left_bytes < 0:
            kept["_more"] = f"{len(states) - len(kept)} cameras more"
            break
        kept[name] = states[name]
    return dict(sorted(kept.items()))
