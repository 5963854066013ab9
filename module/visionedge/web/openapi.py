"""The OpenAPI description at ``/openapi.json``: every route, every answer, every shape."""

from visionedge import __version__
from visionedge.web.backend import Document

# The shapes of the JSON documents, as JSON Schema: what `ModuleView` gives and what clients get.


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
        "speedCheck": {
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
        "level": {"type": "string", "enum": ["variant", "gate", "fps"]},
        "since": _MOMENT,
        "what": {**_TEXT, "description": "What that means just now."},
    }
)

_CAPACITY = _object(
    {
        "windowSeconds": {**_NUMBER, "description": "All rates are over so long."},
        "demandedPerSecond": {**_NUMBER, "description": "Frames that the configuration asks for."},
        "admittedPerSecond": {**_NUMBER, "description": "Frames of these that the overload ladder leaves."},
        "deliveredPerSecond": {**_NUMBER, "description": "Frames that are analysed."},
        "bottleneck": {"type": "string", "enum": ["none", "quota", "decode", "engine", "others", "idle"]},
        "sentence": {**_TEXT, "description": "All of it for people, with the knob to turn."},
        "overload": _object(
            {
                "active": {"type": "boolean", "description": "Something may be given up (`overload.when`)."},
                "exhausted": {"type": "boolean", "description": "Too much still, and nothing is left."},
                "since": {"type": ["string", "null"], "description": "Since when something is given up."},
                "levels": {**_list(_RUNG), "description": "What is given up, in its order."},
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
        "remedies": _list(_object({"instruction": _TEXT, "lines": _list(_TEXT)})),
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
        "systemChecks": _list(_ref("Finding")),
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


_INTEGER = {"type": "integer"}
_FLAG = {"type": "string", "enum": ["0", "1", "true", "false", ""]}


def build_openapi() -> Document:
    """The whole document, OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "visionedge",
            "version": __version__,
            "summary": "Object detection on camera frames, on this device.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}, {}],
        "paths": _paths(),
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Needed everywhere but at the health checks when `http.token` is set.",
                }
            },
        },
    }


def _paths() -> Document:
    return {**_module_paths(), **_camera_paths(), **_frame_paths(), **_protocol_paths()}


def _module_paths() -> Document:
    page = {"description": "The page.", "content": {"text/html": {"schema": {"type": "string"}}}}
    text = {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    lines = {**text, "description": "Lines, oldest first."}
    return {
        "/": {"get": _get("page", "The page that shows every camera live.", {"200": page})},
        "/healthz": {
            "get": _get_without_token(
                "health", "Whether the module works.", _ok("Health"), {"503": _json("Health", "It does not.")}
            )
        },
        "/readyz": {
            "get": _get_without_token(
                "readiness",
                "Whether a warmed-up engine answers.",
                _ok("Readiness"),
                {"503": _json("Readiness", "It does not yet.")},
            )
        },
        "/metrics": {"get": _get("metrics", "All metrics, Prometheus text 0.0.4.", {"200": text})},
        "/openapi.json": {
            "get": _get(
                "openapi", "This document.", {"200": _content("application/json", {"type": "object"}, "It.")}
            )
        },
        "/api/v1/status": {"get": _get("status", "The module in one document.", _ok("Status"))},
        "/api/v1/doctor": {
            "get": _get("doctor", "The way to the GPU, link by link, and the remedy.", _ok("Doctor"))
        },
        "/api/v1/config/schema": {
            "get": _get(
                "configSchema",
                "The JSON Schema of the configuration, of files and desired properties alike.",
                {"200": _content("application/json", {"type": "object"}, "It.")},
            )
        },
        "/api/v1/log": {"get": _get("log", "The newest lines of the log, secrets masked.", {"200": lines})},
    }


def _camera_paths() -> Document:
    name = _parameter(
        "path", "name", {"type": "string", "pattern": "^[a-z0-9_-]{1,64}$"}, "The camera's name."
    )
    unknown = {"404": _error("No camera has this name.")}
    frame = _get("frame", "The newest frame object, or a newer one than `after`.", _ok("Frame"), unknown)
    frame["parameters"] = [
        _parameter("query", "after", _INTEGER, "Wait for a frame with a higher sequence than this."),
        _parameter(
            "query", "timeout", _NUMBER, "Wait so many seconds at most (10 by default, never above 60)."
        ),
    ]
    frame["responses"] |= {"204": {"description": "No newer frame came in time."}, "503": _not_yet()}
    snapshot = _get("snapshot", "The picture of the newest frame.", {"200": _jpeg()}, unknown)
    snapshot["parameters"] = [_parameter("query", "annotate", _FLAG, "1 draws the boxes."), _width()]
    snapshot["responses"]["503"] = _not_yet()
    parts = _content("multipart/x-mixed-replace", {"type": "string"}, "JPEG parts without an end.")
    stream = _get("stream", "Live pictures with boxes, as MJPEG.", {"200": parts}, unknown)
    stream["parameters"] = [_width()]
    stream["responses"]["503"] = _error("Too many viewers.")
    camera = "/api/v1/cameras/{name}"
    return {
        "/api/v1/cameras": {"get": _get("cameras", "All cameras.", _ok("Cameras"))},
        camera: {"parameters": [name], "get": _get("camera", "One camera.", _ok("Camera"), unknown)},
        f"{camera}/frame": {"parameters": [name], "get": frame},
        f"{camera}/snapshot.jpg": {"parameters": [name], "get": snapshot},
        f"{camera}/stream.mjpg": {"parameters": [name], "get": stream},
    }


def _frame_paths() -> Document:
    events = _content("text/event-stream", {"type": "string"}, "One frame object per `data:` line.")
    frames = _get("frames", "Every frame object as it comes, as server-sent events.", {"200": events})
    frames["parameters"] = [_parameter("query", "camera", {"type": "string"}, "Only this camera's.")]
    frames["responses"] |= {"404": _error("No camera has this name."), "503": _error("Too many viewers.")}
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}}
    kinds = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
    detect = _get("detect", "Analyse one picture.", _ok("Frame"))
    detect["requestBody"] = {
        "required": True,
        "description": "A JPEG, PNG or WebP, at most 20 MiB and 40 megapixels; the first file of a form.",
        "content": {**dict.fromkeys(kinds, binary), "multipart/form-data": form},
    }
    detect["responses"] |= {
        "400": _error("The body is empty or its picture is broken."),
        "408": _error("The body did not arrive in time."),
        "403": _error("A page of another site asks."),
        "413": _error("The body, or its picture, is too large."),
        "415": _error("The body is no JPEG, PNG or WebP, or its content coding is not known."),
        "503": _error("Too many at once, or the engine is not ready; see Retry-After."),
    }
    return {"/api/v1/frames": {"get": frames}, "/api/v1/detect": {"post": detect}}


def _protocol_paths() -> Document:
    model = _parameter("path", "model", {"type": "string"}, "The loaded model's name.")
    version = _parameter("path", "version", {"const": "1"}, "Always 1.")
    return {
        "/v2": {"get": _protocol("v2Server", "The server, in the Open Inference Protocol.")},
        "/v2/health/live": {"get": _protocol("v2Live", "200 when the module works, else 400.")},
        "/v2/health/ready": {"get": _protocol("v2Ready", "200 when it is ready, else 400.")},
        **_protocol_model("/v2/models/{model}", "v2Model", [model]),
        **_protocol_model("/v2/models/{model}/versions/{version}", "v2Version", [model, version]),
    }


def _protocol_model(path: str, name: str, parameters: list[Document]) -> Document:
    binary = {"schema": {"type": "string", "format": "binary"}}
    tensors = {"application/json": {"schema": {"type": "object"}}, "application/octet-stream": binary}
    infer = _protocol(f"{name}Infer", "Run the compiled model: `images` in, `detections` out.")
    length = _parameter(
        "header", "Inference-Header-Content-Length", _INTEGER, "Bytes of JSON before the tensors."
    )
    infer["parameters"] = [length]
    infer["requestBody"] = {"required": True, "content": tensors}
    infer["responses"]["200"]["content"] = tensors
    return {
        path: {"parameters": parameters, "get": _protocol(name, "The model's inputs and outputs.")},
        f"{path}/ready": {"parameters": parameters, "get": _protocol(f"{name}Ready", "200 when ready.")},
        f"{path}/infer": {"parameters": parameters, "post": infer},
    }


def _protocol(name: str, summary: str) -> Document:
    """An operation of the Open Inference Protocol, whose errors are ``{"error": "text"}``."""
    good = _content("application/json", {"type": "object"}, "As the protocol has it.")
    bad = _json("ProtocolError", "An error.")
    return {"operationId": name, "summary": summary, "responses": {"200": good, "default": bad}}


def _get(name: str, summary: str, good: Document, more: Document | None = None) -> Document:
    responses = {**good, **(more or {}), "401": _error("The token is missing or wrong.")}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {**responses, "default": _error("An error.")},
    }


def _get_without_token(name: str, summary: str, good: Document, more: Document) -> Document:
    """An operation that never needs the token."""
    responses = {**good, **more, "default": _error("An error.")}
    return {"operationId": name, "summary": summary, "security": [], "responses": responses}


def _parameter(place: str, name: str, schema: Document, description: str) -> Document:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "schema": schema,
        "description": description,
    }


def _width() -> Document:
    schema = {"type": "integer", "minimum": 16, "maximum": 8192}
    return _parameter("query", "width", schema, "Scale down to this width in pixels.")


def _content(kind: str, schema: Document, description: str) -> Document:
    return {"description": description, "content": {kind: {"schema": schema}}}


def _json(schema: str, description: str) -> Document:
    return _content("application/json", {"$ref": f"#/components/schemas/{schema}"}, description)


def _ok(schema: str) -> Document:
    return {"200": _json(schema, "Fine.")}


def _error(description: str) -> Document:
    return _json("Error", description)


def _not_yet() -> Document:
    return _error("The camera has no analysed frame yet, or too many wait; see Retry-After.")


def _jpeg() -> Document:
    answer = _content("image/jpeg", {"type": "string", "format": "binary"}, "The picture.")
    facts = {
        "X-Visionedge-Camera": {"type": "string"},
        "X-Visionedge-Sequence": _INTEGER,
        "X-Visionedge-Epoch": _INTEGER,
        "X-Visionedge-Captured-At": {"type": "string", "format": "date-time"},
    }
    answer["headers"] = {name: {"schema": schema} for name, schema in facts.items()}
    return answer
