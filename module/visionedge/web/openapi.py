"""The OpenAPI 3.1 description at ``/openapi.json``.

The paths and their answers are written here; the schemas are made of the models in `documents`.
"""

from functools import cache
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from visionedge import __version__
from visionedge.config.documents import Document
from visionedge.config.schema import CAMERA_NAME_PATTERN
from visionedge.scene.events import EVENT_TYPES
from visionedge.web.documents import DOCUMENTS, schema_name
from visionedge.web.scene_log import DEFAULT_EVENTS, MAX_EVENTS

_INTEGER = {"type": "integer"}
_NUMBER = {"type": "number"}
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
            "schemas": build_schemas(),
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Needed on every path but the health checks when `http.token` is set.",
                }
            },
        },
    }


class _SchemaGenerator(GenerateJsonSchema):
    """Names without "Document", no titles of fields, and no defaults: a key that is not set is left out."""

    def normalize_name(self, name: str) -> str:
        return schema_name(super().normalize_name(name))

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002 - pydantic's
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])


@cache
def build_schemas() -> Document:
    """The JSON Schema of each document that leaves the process, and of each model inside one, by name."""
    _, schemas = models_json_schema(
        [(model, "serialization") for model in DOCUMENTS],
        ref_template="#/components/schemas/{model}",
        schema_generator=_SchemaGenerator,
    )
    found: Document = schemas["$defs"]
    return found


def _paths() -> Document:
    return {**_module_paths(), **_camera_paths(), **_frame_paths(), **_scene_paths(), **_protocol_paths()}


def _module_paths() -> Document:
    page = {"description": "The page.", "content": {"text/html": {"schema": {"type": "string"}}}}
    text = {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    lines = {**text, "description": "Lines, oldest first."}
    return {
        "/": {"get": _get("page", "The page that shows every camera live.", {"200": page})},
        "/healthz": {
            "get": _get_without_token(
                "health",
                "Whether the module works.",
                _ok("Health"),
                {"503": _json("Health", "The module does not work.")},
            )
        },
        "/readyz": {
            "get": _get_without_token(
                "readiness",
                "Whether a warmed-up engine answers.",
                _ok("Readiness"),
                {"503": _json("Readiness", "No engine answers yet.")},
            )
        },
        "/metrics": {"get": _get("metrics", "All metrics, Prometheus text 0.0.4.", {"200": text})},
        "/openapi.json": {
            "get": _get(
                "openapi",
                "This document.",
                {"200": _content("application/json", {"type": "object"}, "The description.")},
            )
        },
        "/api/v1/status": {"get": _get("status", "The module in one document.", _ok("Status"))},
        "/api/v1/doctor": {
            "get": _get("doctor", "The checks of the chain to the GPU, with remedies.", _ok("Doctor"))
        },
        "/api/v1/config/schema": {
            "get": _get(
                "configSchema",
                "The JSON Schema of the configuration, of files and desired properties alike.",
                {"200": _content("application/json", {"type": "object"}, "The schema.")},
            )
        },
        "/api/v1/log": {"get": _get("log", "The newest lines of the log, secrets masked.", {"200": lines})},
    }


def _camera_paths() -> Document:
    pattern = {"type": "string", "pattern": f"^{CAMERA_NAME_PATTERN.pattern}$"}
    name = _parameter("path", "name", pattern, "The camera's name.")
    unknown = {"404": _error("No camera has this name.")}
    frame = _get("frame", "The newest frame object, or a newer one than `after`.", _ok("Frame"), unknown)
    frame["parameters"] = [
        _parameter("query", "after", _INTEGER, "Wait for a frame with a higher sequence than this."),
        _parameter("query", "timeout", _NUMBER, "The longest wait in seconds: 10 by default, at most 60."),
    ]
    frame["responses"] |= {"204": {"description": "No newer frame came in time."}, "503": _not_yet()}
    snapshot = _get("snapshot", "The picture of the newest frame.", {"200": _jpeg()}, unknown)
    snapshot["parameters"] = [_parameter("query", "annotate", _FLAG, "1 draws the boxes."), _width()]
    snapshot["responses"]["503"] = _not_yet()
    parts = _content("multipart/x-mixed-replace", {"type": "string"}, "JPEG parts; the stream does not end.")
    stream = _get("stream", "Live pictures with boxes, as MJPEG.", {"200": parts}, unknown)
    stream["parameters"] = [_width()]
    stream["responses"]["503"] = _error("Too many viewers.")
    camera = "/api/v1/cameras/{name}"
    return {
        "/api/v1/cameras": {"get": _get("cameras", "All cameras.", _ok("Cameras"))},
        camera: {"parameters": [name], "get": _get("camera", "One camera.", _ok("Camera"), unknown)},
        f"{camera}/scene": {
            "parameters": [name],
            "get": _get("scene", "Tracks, and totals of zones and lines.", _ok("Scene"), unknown),
        },
        f"{camera}/counts": {"parameters": [name], "get": _counts(unknown)},
        f"{camera}/frame": {"parameters": [name], "get": frame},
        f"{camera}/snapshot.jpg": {"parameters": [name], "get": snapshot},
        f"{camera}/stream.mjpg": {"parameters": [name], "get": stream},
    }


def _counts(unknown: Document) -> Document:
    counts = _get("counts", "What zones and lines counted by hour or day.", _ok("SceneCounts"), unknown)
    counts["responses"]["200"]["content"]["text/csv"] = {"schema": {"type": "string"}}
    moment = {"type": "string", "anyOf": [{"format": "date"}, {"format": "date-time"}]}
    counts["parameters"] = [
        _parameter("query", "from", moment, "The begin; by default 24 h, or 31 days, before `to`."),
        _parameter("query", "to", moment, "The end; by default now. A date is the begin of its UTC day."),
        _parameter("query", "by", {"enum": ["hour", "day"]}, "hour by default; days are those of UTC."),
        _parameter("query", "format", {"enum": ["json", "csv"]}, "Instead of the header Accept."),
    ]
    return _with_log_errors(counts)


def _with_log_errors(operation: Document) -> Document:
    operation["responses"] |= {
        "400": _error("A parameter or its value is not known."),
        "503": _error("scene.db cannot be read, or there are too many requests."),
    }
    return operation


def _scene_paths() -> Document:
    text = {"type": "string"}
    filters = [
        _parameter("query", "camera", text, "Only events of this camera."),
        _parameter("query", "type", {"enum": list(EVENT_TYPES)}, "Only events of this type."),
        _parameter("query", "rule", text, "Only events of zones and lines with this name."),
        _parameter("query", "label", text, "Only events of tracks with this label."),
    ]
    events = _with_log_errors(_get("events", "Scene events, the newest first.", _ok("SceneEvents")))
    limit = {"type": "integer", "minimum": 1, "maximum": MAX_EVENTS}
    events["parameters"] = [
        *filters,
        _parameter("query", "before", text, "Only events before the one with this id."),
        _parameter("query", "limit", limit, f"At most so many; {DEFAULT_EVENTS} by default."),
    ]
    live = _content("text/event-stream", text, "One scene event per `data:` line, its id in `id:`.")
    stream = _with_log_errors(_get("eventStream", "Scene events when they happen.", {"200": live}))
    stream["parameters"] = [
        *filters,
        _parameter("header", "Last-Event-ID", text, "First the events of the log after this one."),
    ]
    return {"/api/v1/events": {"get": events}, "/api/v1/events/stream": {"get": stream}}


def _frame_paths() -> Document:
    events = _content("text/event-stream", {"type": "string"}, "One frame object per `data:` line.")
    frames = _get("frames", "Every frame object when it is computed, as server-sent events.", {"200": events})
    frames["parameters"] = [
        _parameter("query", "camera", {"type": "string"}, "Only frame objects of this camera."),
        _parameter("query", "events", _FLAG, "1: also scene events, as events with the name `scene`."),
    ]
    frames["responses"] |= {"404": _error("No camera has this name."), "503": _error("Too many viewers.")}
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}}
    kinds = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
    detect = _get("detect", "Analyse one picture.", _ok("Frame"))
    detect["parameters"] = [
        _parameter("query", "model", {"type": "string"}, "One of `models`; absent: the section `model`.")
    ]
    detect["requestBody"] = {
        "required": True,
        "description": "A JPEG, PNG or WebP, at most 20 MiB and 40 megapixels; the first file of a form.",
        "content": {**dict.fromkeys(kinds, binary), "multipart/form-data": form},
    }
    detect["responses"] |= {
        "400": _error("The body is empty or its picture is damaged."),
        "404": _error("No model has this name."),
        "408": _error("The body did not arrive in time."),
        "403": _error("A page of another site sent the request."),
        "413": _error("The body, or its picture, is too large."),
        "415": _error("The body is not a JPEG, PNG or WebP, or its content coding is not supported."),
        "503": _error("Too many requests at once, or the engine is not ready; see Retry-After."),
    }
    return {"/api/v1/frames": {"get": frames}, "/api/v1/detect": {"post": detect}}


def _protocol_paths() -> Document:
    model = _parameter("path", "model", {"type": "string"}, "The name of a model.")
    version = _parameter("path", "version", {"const": "1"}, "Always 1.")
    return {
        "/v2": {"get": _protocol("v2Server", "The server, in the Open Inference Protocol.")},
        "/v2/health/live": {"get": _protocol("v2Live", "200 when the module works, else 400.")},
        "/v2/health/ready": {"get": _protocol("v2Ready", "200 when the module is ready, else 400.")},
        "/v2/models": {"get": _protocol("v2Models", "All models, and whether they answer.")},
        "/v2/repository/index": {"post": _protocol("v2Index", "The same, as Triton lists its models.")},
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
    good = _content("application/json", {"type": "object"}, "As in the protocol.")
    bad = _json("ProtocolError", "An error.")
    return {"operationId": name, "summary": summary, "responses": {"200": good, "default": bad}}


def _get(name: str, summary: str, good: Document, more: Document | None = None) -> Document:
    """An operation that needs the token where one is set."""
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


def _parameter(location: str, name: str, schema: Document, description: str) -> Document:
    return {
        "name": name,
        "in": location,
        "required": location == "path",
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
    return {"200": _json(schema, "The document.")}


def _error(description: str) -> Document:
    return _json("Error", description)


def _not_yet() -> Document:
    return _error("The camera has no analysed frame yet, or too many requests wait; see Retry-After.")


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
