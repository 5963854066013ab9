"""The shapes of the JSON documents, as JSON Schema: what `ModuleView` gives and what clients get."""

from visionedge.web.backend import Document


def _object(required: Document, optional: Document | None = None, *, closed: bool = False) -> Document:
    shape: Document = {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
    }
    return {**shape, "additionalProperties": False} if closed else shape


def _list(items: Document) -> Document:
    return {"type": "array", "items": items}


def _ref(name: str) -> Document:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_NUMBER = {"type": "number"}
_NUMBER_OR_NULL = {"type": ["number", "null"]}
_COUNT = {"type": "integer", "minimum": 0}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_MOMENT = {"type": "string", "format": "date-time"}
_DEVICE_ASKED = {"type": "string", "enum": ["auto", "cuda", "tensorrt", "cpu"]}

_ERROR = _object({"code": {"type": "string", "pattern": "^[a-z_]+$"}, "message": _TEXT}, closed=True)

_CAMERA = _object(
    {
        "name": {"type": "string", "pattern": "^[a-z0-9_-]{1,64}$"},
        "state": {
            "type": "string",
            "description": "disabled, waiting, connecting, live, stale, frozen, black, reconnecting, failed, "
            "ended or stopped.",
        },
        "epoch": {**_COUNT, "description": "Grows by one at each reconnect."},
        "framesRead": {**_COUNT, "description": "Pictures decoded from the source."},
        "framesAnalysed": _COUNT,
        "dropped": {
            "type": "object",
            "additionalProperties": _COUNT,
            "description": "Frames let go, by reason.",
        },
        "fps": {**_NUMBER, "description": "Analysed frames per second, over the last seconds."},
        "ageMs": {
            **_NUMBER_OR_NULL,
            "description": "Age of the newest picture; null before the first one.",
        },
        "lastError": {
            **_TEXT_OR_NULL,
            "description": "The newest error, secrets masked; null without one.",
        },
    },
    {
        "uri": {**_TEXT, "description": "Secrets masked."},
        "since": {**_MOMENT, "description": "When the state began."},
        "width": {"type": ["integer", "null"]},
        "height": {"type": ["integer", "null"]},
        "decoder": _TEXT_OR_NULL,
        "nextTrySeconds": {
            **_NUMBER_OR_NULL,
            "description": "A camera that is reconnecting or failed: when the next try begins, counted from "
            "now; null unless it waits for one.",
        },
        "throttle": {
            **_object({"fps": _NUMBER_OR_NULL, "gate": {"type": "boolean"}}),
            "type": ["object", "null"],
            "description": "What overload holds it to: frames per second, a motion gate; null: nothing.",
        },
    },
)

_ENGINE = _object(
    {
        "requested": _DEVICE_ASKED,
        "effective": {
            **_TEXT_OR_NULL,
            "description": "Where frames are really computed; null before warm-up.",
        },
        "reason": {**_TEXT_OR_NULL, "description": "Why this device, for people."},
    },
    {
        "reasonCode": {**_TEXT_OR_NULL, "description": "Why this device, for programs."},
        "degraded": {
            "type": "boolean",
            "description": "The effective device is less than what was asked for.",
        },
        "since": {**_MOMENT, "description": "When the effective device was taken."},
        "plan": {
            "type": "object",
            "description": "Lanes, batch sizes, why in one line, and the table that was measured.",
        },
        "precision": {"type": "object", "description": "What it computes in, why, and what was measured."},
        "notes": {**_list(_TEXT), "description": "Options that the device or the model refused, and why."},
        "nodesOnCpu": {**_list(_TEXT), "description": "Nodes that fell to the CPU beside a GPU."},
        "process": {
            "type": ["object", "null"],
            "description": "The engine's own process: pid, restarts, and why it is down, null if it is not.",
        },
        "parity": {
            **_list({"type": "object"}),
            "description": "How the device was held against the CPU: on bundled pictures, on frames.",
        },
        "pace": {
            "type": ["object", "null"],
            "description": "Milliseconds for a picture on the device and on one core of the CPU; doubt.",
        },
        "recovery": {
            "type": ["object", "null"],
            "description": "Faults and probes so far, and where the way back to a lost device stands.",
        },
    },
)

_RUNG = _object(
    {
        "rung": {"type": "string", "enum": ["variant", "gate", "fps"]},
        "since": _MOMENT,
        "what": {**_TEXT, "description": "What that means just now."},
    }
)

_CAPACITY = _object(
    {
        "windowSeconds": {**_NUMBER, "description": "All rates are over so long."},
        "demandedPerSecond": {**_NUMBER, "description": "Frames that the configuration asks for."},
        "letInPerSecond": {**_NUMBER, "description": "Frames of these that the overload ladder leaves."},
        "deliveredPerSecond": {**_NUMBER, "description": "Frames that are analysed."},
        "bottleneck": {"type": "string", "enum": ["none", "quota", "decode", "engine", "others", "idle"]},
        "sentence": {**_TEXT, "description": "All of it for people, with the knob to turn."},
        "overload": _object(
            {
                "active": {"type": "boolean", "description": "Something may be given up (`overload.when`)."},
                "exhausted": {"type": "boolean", "description": "Too much still, and nothing is left."},
                "since": {"type": ["string", "null"], "description": "Since when something is given up."},
                "rungs": {**_list(_RUNG), "description": "What is given up, in its order."},
            }
        ),
    },
    {
        "cores": _COUNT,
        "coresUsed": {"type": "object", "additionalProperties": _NUMBER},
        "cameras": {"type": "object", "description": "Demanded, let in and delivered by camera."},
    },
)

_STATUS = _object(
    {
        "version": _TEXT,
        "uptimeSeconds": _NUMBER,
        "engine": _ref("Engine"),
        "cameras": _list(_ref("Camera")),
        "hub": _object(
            {"state": {"type": "string", "description": "local, connecting, connected, disconnected …"}},
            {"lastError": _TEXT_OR_NULL},
        ),
    },
    {
        "started": _MOMENT,
        "capacity": {
            **_CAPACITY,
            "type": ["object", "null"],
            "description": "What is delivered of what is asked; null in the first seconds.",
        },
        "model": {
            **_object({"name": _TEXT, "sha256": _TEXT}),
            "type": ["object", "null"],
            "description": "null before the model is loaded.",
        },
        "fetching": {
            **_TEXT_OR_NULL,
            "description": "How far the model is that is being fetched, or why not.",
        },
    },
)

_BOX = _object({"left": _SHARE, "top": _SHARE, "width": _SHARE, "height": _SHARE}, closed=True)

_DETECTION = _object(
    {"label": _TEXT, "classId": _COUNT, "confidence": _SHARE, "box": _ref("Box")}, closed=True
)

_TIMING = _object(
    {
        "waitMs": _NUMBER,
        "inferMs": _NUMBER,
        "totalMs": _NUMBER,
        "batchSize": {"type": "integer", "minimum": 1},
    },
    closed=True,
)

_FRAME = {
    **_object(
        {
            "schema": {"const": "visionedge/frame/1"},
            "sequence": {**_COUNT, "description": "Rises; never repeats for a camera, restarts included."},
            "epoch": _COUNT,
            "capturedAt": _MOMENT,
            "width": _COUNT,
            "height": _COUNT,
            "model": _TEXT,
            "device": {**_TEXT, "description": "Where this frame was really computed."},
            "timing": _ref("Timing"),
            "detections": {**_list(_ref("Detection")), "description": "Sorted by falling confidence."},
        },
        {
            "camera": {"type": "string", "description": "Absent for a picture that was uploaded."},
            "source": {"type": "string", "description": "Instead of `camera`: 'upload'."},
        },
        closed=True,
    ),
    "oneOf": [{"required": ["camera"]}, {"required": ["source"]}],
}


def _condition(good: str, bad: str, more: Document | None = None) -> Document:
    told = {"reasons": _list(_TEXT), "error": _ERROR}
    return _object({"status": {"type": "string", "enum": [good, bad]}}, {**told, **(more or {})})


_FINDING = _object(
    {
        "name": {"type": "string", "pattern": "^[a-z-]+$"},
        "title": _TEXT,
        "state": {"type": "string", "enum": ["ok", "info", "warning", "broken", "skipped"]},
        "found": _TEXT,
        "remedies": _list(_object({"say": _TEXT, "lines": _list(_TEXT)})),
    }
)

_DOCTOR = _object(
    {
        "schema": {"const": "visionedge/doctor/1"},
        "version": _TEXT,
        "at": _MOMENT,
        "system": _TEXT,
        "fulfilled": {"type": "boolean", "description": "The machine does what is asked of it."},
        "device": _object(
            {
                "requested": _DEVICE_ASKED,
                "effective": {"type": "string", "enum": ["cuda", "tensorrt", "cpu"]},
                "reasonCode": _TEXT,
                "reason": _TEXT,
            }
        ),
        "environment": _object(
            {
                "container": {"type": "boolean"},
                "iotEdge": {"type": "string", "enum": ["no", "edge", "simulator", "half"]},
                "kernel": {"type": "string", "enum": ["eflow", "wsl", "hyper-v", "linux"]},
                "release": _TEXT,
                "passthrough": {"type": "string", "enum": ["dda", "gpu-pv", "native", "intel", "none"]},
            }
        ),
        "firstBroken": {**_TEXT_OR_NULL, "description": "The name of the first broken link of the chain."},
        "chain": {**_list(_ref("Finding")), "description": "The way to the GPU, link by link."},
        "surroundings": _list(_ref("Finding")),
    }
)

SCHEMAS: Document = {
    "Error": _object({"error": _ERROR}),
    "ProtocolError": _object({"error": _TEXT}),
    "Health": _condition("ok", "unhealthy"),
    "Readiness": _condition(
        "ready",
        "not_ready",
        {
            "engine": _object(
                {}, {"requested": _DEVICE_ASKED, "effective": _TEXT_OR_NULL, "degraded": {"type": "boolean"}}
            )
        },
    ),
    "Status": _STATUS,
    "Engine": _ENGINE,
    "Camera": _CAMERA,
    "Cameras": _object({"cameras": _list(_ref("Camera"))}),
    "Doctor": _DOCTOR,
    "Finding": _FINDING,
    "Frame": _FRAME,
    "Detection": _DETECTION,
    "Box": _BOX,
    "Timing": _TIMING,
}
"""Components by name; the shapes of frames are closed, others may gain keys."""
