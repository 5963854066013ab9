"""Twins of Spatial Analysis for tests: one with all events but the distance, and changes of it."""

import copy
import json
from typing import Any

OPERATION = "cognitiveservices.vision.spatialanalysis"

ZONE: dict[str, Any] = {
    "name": "queue",
    "polygon": [[0.3, 0.3], [0.3, 0.9], [0.6, 0.9], [0.6, 0.3], [0.3, 0.3]],
    "events": [
        {"type": "count", "config": {"trigger": "event", "focus": "footprint"}},
        {"type": "zonecrossing", "config": {"focus": "footprint"}},
        {"type": "zonedwelltime", "config": {"focus": "footprint"}},
    ],
}
LINE: dict[str, Any] = {
    "name": "door",
    "line": {"start": {"x": 0, "y": 0.5}, "end": {"x": 1, "y": 0.5}},
    "events": [{"type": "linecrossing", "config": {"focus": "footprint"}}],
}


def make_space(zones: Any = (), lines: Any = ()) -> str:
    """A SPACEANALYTICS_CONFIG: JSON in a text."""
    return json.dumps({"zones": [*zones], "lines": [*lines]})


def make_graph(operation: str = "", instances: Any = None, **parameters: Any) -> dict[str, Any]:
    """A graph with a camera, a zone and a line; `parameters` win."""
    graph: dict[str, Any] = {
        "operationId": f"{OPERATION}{operation}",
        "version": 1,
        "enabled": True,
        "parameters": {
            "VIDEO_URL": "rtsp://192.0.2.5/stream1",
            "VIDEO_SOURCE_ID": "dock",
            "VIDEO_IS_LIVE": True,
            "SPACEANALYTICS_CONFIG": make_space([ZONE], [LINE]),
            **parameters,
        },
    }
    return graph if instances is None else {**graph, "instances": instances}


def make_twin(urls: tuple[str, str] = ("rtsp://192.0.2.5/stream1", "rtsp://192.0.2.6/")) -> dict[str, Any]:
    """Two cameras with all events but the distance; one trigger is `interval`, with a frequency."""
    zone = copy.deepcopy(ZONE)
    zone["events"][0]["config"] |= {"trigger": "interval", "output_frequency": 2}
    instances = {
        str(number): {"parameters": {"VIDEO_URL": url, "VIDEO_SOURCE_ID": source_id}}
        for number, (url, source_id) in enumerate(zip(urls, ("Lobby Camera 1", "dock"), strict=True), 1)
    }
    graph = make_graph(instances=instances, SPACEANALYTICS_CONFIG=make_space([zone], [LINE]))
    for key in ("VIDEO_URL", "VIDEO_SOURCE_ID"):
        del graph["parameters"][key]
    return {"graphs": {"shop": graph}}


def change(where: str, key: str, value: object, twin: Any = None) -> tuple[dict[str, Any], str]:
    """A twin with one other value, and the path of its key.

    `where`: graph, parameters, zone, line, event or config. A place that an earlier change removed stays so.
    """
    twin = copy.deepcopy(twin or {"graphs": {"a": make_graph()}})
    graph = twin["graphs"]["a"]
    path = {"graph": "graphs.a", "parameters": "graphs.a.parameters"}
    if where in path:
        keys = graph if where == "graph" else graph["parameters"]
        if isinstance(keys, dict):
            keys[key] = value
        return twin, f"{path[where]}.{key}"
    base = "graphs.a.parameters.SPACEANALYTICS_CONFIG"
    if not isinstance(graph["parameters"], dict) or "SPACEANALYTICS_CONFIG" not in graph["parameters"]:
        return twin, base
    space = json.loads(graph["parameters"]["SPACEANALYTICS_CONFIG"])
    event = {"event": ("events", 0), "config": ("events", 0, "config")}.get(where, ())
    keys, place = space, ("lines" if where == "line" else "zones", 0, *event)
    for step in place:
        is_there = isinstance(keys, dict) if isinstance(step, str) else isinstance(keys, list) and keys
        keys = (keys.get(step) if isinstance(step, str) else keys[step]) if is_there else None
    if isinstance(keys, dict):
        keys[key] = value
    graph["parameters"]["SPACEANALYTICS_CONFIG"] = json.dumps(space)
    return twin, ".".join([base, *map(str, place), key])
