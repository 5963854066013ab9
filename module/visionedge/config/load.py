"""Loads the configuration: merges its sources, checks the result, and reports every problem at once.

Sources, later ones win: a file (YAML or JSON), the environment (`VISIONEDGE_…`), the command line, the
desired properties of the twin. Each gives a document with the same camelCase keys; `merge` lays one over
another, and `parse_config` checks the result. A document with problems gives no `Config`, so it cannot
replace a working one.
"""

import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from visionedge.config.documents import Document, describe_type, without_extensions
from visionedge.config.schema import MAX_PROBLEMS, CameraDefaults, Config
from visionedge.errors import ConfigError
from visionedge.runtime.redaction import find_secrets, mask_address, redact, register_secrets

_RENAMED_KEYS = {"overload.ladder": "levels"}
"""Keys of version 0.1 and their present names."""

_EXPECTED = {
    "string_type": "a text; quote it (YAML reads on, off, yes and no as booleans)",
    "bool_type": "true or false, without quotes",
}
_REASONS = {
    "missing": "is missing",
    "model_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
}
"""The reasons that need nothing but the type of pydantic's error."""

_MAX_SHOWN_CHARACTERS = 100
_MAX_KEY_CHARACTERS = 40
"""A longer unknown key is not a misspelled one."""

_MAX_SUGGESTED_MODELS = 20
"""Of more models none is suggested: a document may have thousands, and thousands of cameras."""


def parse_config(document: object) -> Config:
    """Check a whole document; its top-level keys that begin with ``x-`` are ignored.

    Raises:
        ConfigError: with every problem, each starting with the path of its key.
    """
    # Registered first, so that secrets are also masked if the document is refused.
    register_secrets(find_secrets(document))
    if not isinstance(document, dict):
        raise ConfigError([f"the configuration is {describe_type(document)}; it must be a mapping of keys"])
    without_nulls = _without_nulls(without_extensions(document))
    given = _with_defaults(without_nulls)
    # Checked here, because pydantic checks a section as a whole only if each of its keys is right.
    whole = [
        *_model_problems("model", given.get("model")),
        *_models_problems(without_nulls),
        *_inference_problems(given.get("inference")),
        *_scene_problems(given),
    ][:MAX_PROBLEMS]
    try:
        config = Config.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False)
        single = [_problem(dict(item)) for item in found[:MAX_PROBLEMS]]
        more = len(found) - len(single)
        rest = [f"configuration: and {more} more problems like these"] if more else []
        raise ConfigError([*single, *whole, *rest]) from None
    if whole:
        raise ConfigError(whole)
    return config


def _with_defaults(document: Document) -> Document:
    """The document with `cameraDefaults` laid under each camera.

    Wrong keys of `cameraDefaults` are left out, so that they are reported once and not for each camera.
    """
    defaults, cameras = document.get("cameraDefaults"), document.get("cameras")
    if not isinstance(defaults, Mapping) or not isinstance(cameras, Mapping):
        return document
    try:
        CameraDefaults.model_validate(defaults)
    except ValidationError as error:
        wrong = {item["loc"][0] for item in error.errors(include_url=False) if item["loc"]}
        defaults = {key: value for key, value in defaults.items() if key not in wrong}
    merged = {
        name: merge(defaults, camera) if isinstance(camera, Mapping) else camera
        for name, camera in cameras.items()
    }
    return {**document, "cameras": merged}


def _model_problems(path: str, model: object) -> list[str]:
    """Problems of keys of a model that do not fit together."""
    if not isinstance(model, Mapping):
        return []
    problems = []
    if "path" in model and "url" in model:
        problems.append(f"{path}: give 'path' or 'url', not both")
    if ("url" in model) != ("sha256" in model):
        problems.append(f"{path}: 'url' and 'sha256' go together")
    return problems


def _models_problems(document: Mapping[str, Any]) -> list[str]:
    """Problems of `models`, and of the keys of cameras and of `cameraDefaults` that name one of them."""
    models = document.get("models", {})
    if not isinstance(models, Mapping):
        return []
    problems = [
        problem for name, model in models.items() for problem in _model_problems(f"models.{name}", model)
    ]
    if models and _mapping(document.get("inference")).get("device") == "remote":
        problems.append("models: servers of 'device: remote' run one model; leave 'models' out")
    defaults = _mapping(document.get("cameraDefaults"))
    problems += _unknown_model_problems("cameraDefaults", defaults, models)
    if "then" in defaults and _is_tracking_off(defaults):
        problems.append("cameraDefaults.then: needs tracking; remove 'tracking: off'")
    for name, given in _mapping(document.get("cameras")).items():
        if len(problems) >= MAX_PROBLEMS:
            break
        base, own = f"cameras.{name}", _mapping(given)
        problems += _unknown_model_problems(base, own, models)
        problems += _second_stage_problems(base, own, defaults, models)
    return [redact(problem) for problem in problems]


def _unknown_model_problems(base: str, keys: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    """Names of models in the keys of a camera that are not in `models`."""
    used = {f"{base}.model": keys.get("model"), f"{base}.then.model": _mapping(keys.get("then")).get("model")}
    return [
        f"{path}: '{redact(name)[:_MAX_SHOWN_CHARACTERS]}' is not one of 'models'"
        f"{_suggest_model(name, models)}"
        for path, name in used.items()
        if isinstance(name, str) and name not in models
    ]


def _suggest_model(name: str, models: Mapping[str, Any]) -> str:
    if not models:
        return ", which is empty"
    return _suggestion(name, sorted(map(str, models))) if len(models) <= _MAX_SUGGESTED_MODELS else ""


def _second_stage_problems(
    base: str, own: Mapping[str, Any], defaults: Mapping[str, Any], models: Mapping[str, Any]
) -> list[str]:
    """What a camera wants of its second stage and does not get; `own` are the camera's own keys."""
    keys = merge({key: defaults[key] for key in ("then", "tracking") if key in defaults}, own)
    then = keys.get("then")
    problems = []
    if then is not None and _is_tracking_off(keys) and ("then" in own or "tracking" in own):
        problems.append(
            f"{base}.then: needs tracking; remove 'tracking: off'"
            if "then" in own
            else f"{base}.tracking: is off, but 'cameraDefaults.then' needs tracking"
        )
    second = _mapping(then).get("model")
    if then is not None and not (isinstance(second, str) and second in models):
        return problems  # reported, and attributes are judged when it is right
    reason = "this camera has no 'then'" if then is None else f"'then' has the model '{second}'"
    return problems + [
        f"{base}.{kind}.{rule}.attributes.{name}: {reason}"
        for kind in ("zones", "lines")
        for rule, each in _mapping(keys.get(kind)).items()
        for name in _mapping(_mapping(each).get("attributes"))
        if name != second
    ]


def _is_tracking_off(keys: Mapping[str, Any]) -> bool:
    """Whether tracking is off; YAML reads the word as false."""
    tracking = keys.get("tracking")
    return tracking is False or tracking == "off"


def _inference_problems(inference: object) -> list[str]:
    """Problems of keys of `inference` that do not fit together."""
    if not isinstance(inference, Mapping):
        return []
    device, runtime = inference.get("device", "auto"), inference.get("runtime", "auto")
    if device not in ("auto", "cpu"):
        if runtime in ("onnxruntime", "openvino"):
            return [f"inference.runtime: '{runtime}' needs inference.device: auto or cpu, not '{device}'"]
        if inference.get("precision") == "bf16":
            return [f"inference.precision: 'bf16' needs inference.device: auto or cpu, not '{device}'"]
    if device != "remote":
        return []
    remote = inference.get("remote", {})
    if not isinstance(remote, Mapping):
        return []
    missing = [f"'{key}'" for key in ("url", "model") if key not in remote]
    return [f"inference.remote: 'device: remote' needs {' and '.join(missing)}"] if missing else []


def _scene_problems(document: Mapping[str, Any]) -> list[str]:
    """Problems of zones and lines that do not fit together, or not with what their camera reports."""
    problems = []
    for camera, keys in _mapping(document.get("cameras")).items():
        zones, lines = _mapping(_mapping(keys).get("zones")), _mapping(_mapping(keys).get("lines"))
        problems += [
            f"cameras.{camera}.lines.{name}: a zone of this camera has this name, too"
            for name in zones
            if name in lines
        ]
        reported, of = _reported_classes(document, _mapping(keys))
        if not isinstance(reported, list | tuple):
            continue
        users = {f"zones.{name}": rule for name, rule in zones.items()}
        users |= {f"lines.{name}": rule for name, rule in lines.items()} | {
            "then": _mapping(keys).get("then")
        }
        problems += [
            f"cameras.{camera}.{path}.classes: '{label}' is not among {of}"
            for path, user in users.items()
            for label in _texts(_mapping(user).get("classes"))
            if label not in reported
        ]
    return [redact(problem) for problem in problems]


def _reported_classes(document: Mapping[str, Any], camera: Mapping[str, Any]) -> tuple[object, str]:
    """The classes that a camera reports, and where they stand."""
    if camera.get("classes") is not None:
        return camera["classes"], "the 'classes' of the camera"
    name = camera.get("model")
    if isinstance(name, str):
        named = _mapping(_mapping(document.get("models")).get(name)).get("classes")
        if named is not None:
            return named, f"'models.{name}.classes'"
    return _mapping(document.get("inference")).get("classes"), "'inference.classes'"


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _texts(value: object) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple) else []


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Document:
    """`over` laid over `base`, mapping by mapping; a null in `over` removes the key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def find_local_only_problems(document: object) -> list[str]:
    """The problems of desired properties with keys that only the local file may have."""
    keys = _mapping(document)
    models = {f"models.{name}": model for name, model in _mapping(keys.get("models")).items()}
    return [
        f"{path}.allowInsecure: can only be set in the local configuration file"
        for path, model in {"model": keys.get("model"), **models}.items()
        if _mapping(model).get("allowInsecure") is not None
    ]


def read_environment(environ: Mapping[str, str]) -> Document:
    """The document in the environment: the few keys that a container needs.

    VISIONEDGE_MODEL, VISIONEDGE_DEVICE, VISIONEDGE_HTTP (HOST:PORT), VISIONEDGE_HTTP_TOKEN,
    VISIONEDGE_REMOTE_TOKEN and VISIONEDGE_LOG_LEVEL.
    """
    document: Document = {}
    if model := environ.get("VISIONEDGE_MODEL"):
        document["model"] = {"path": model, "url": None, "sha256": None}
    inference: Document = {}
    if device := environ.get("VISIONEDGE_DEVICE"):
        inference["device"] = device
    if token := environ.get("VISIONEDGE_REMOTE_TOKEN"):
        inference["remote"] = {"token": token}
    if inference:
        document["inference"] = inference
    http: Document = {}
    if address := environ.get("VISIONEDGE_HTTP"):
        http |= parse_http_address(address, "VISIONEDGE_HTTP")
    if token := environ.get("VISIONEDGE_HTTP_TOKEN"):
        http["token"] = token
    if http:
        document["http"] = http
    if level := environ.get("VISIONEDGE_LOG_LEVEL"):
        document["log"] = {"level": level.lower()}
    return document


def parse_http_address(text: str, label_source: str) -> Document:
    """``HOST:PORT`` (or ``[::1]:PORT``) as the keys of the section `http`.

    ``PORT`` and ``:PORT`` give only the port. `label_source` names the argument or variable in the error.

    Raises:
        ConfigError: there is no port.
    """
    host, _, port = text.strip().rpartition(":")
    if not port.isascii() or not port.isdigit():
        raise ConfigError(
            [f"{label_source}: '{text}' must be HOST:PORT or PORT, such as 127.0.0.1:8080 or 8080"]
        )
    document: Document = {"port": int(port)}
    if host:
        document["host"] = host.strip("[]")
    return document


def redact_config(config: Config) -> Document:
    """The configuration as a document in which secrets are ``***``."""
    document = config.model_dump(by_alias=True, mode="json", exclude_none=True)
    for camera in document["cameras"].values():
        camera["uri"] = mask_address(camera["uri"])
    for model in (document["model"], *document["models"].values()):
        if "url" in model:
            model["url"] = mask_address(model["url"])
    for section in (document["http"], document["inference"].get("remote", {})):
        if "token" in section:
            section["token"] = "***"  # noqa: S105 - the mask, not a password
    return document


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _problem(item: dict[str, Any]) -> str:
    """One line for an error of pydantic; without the value, which may be a secret."""
    where = tuple(part for part in item["loc"] if part != "[key]")
    path = ".".join(str(part)[:_MAX_SHOWN_CHARACTERS] for part in where) or "configuration"
    context = item.get("ctx", {})
    match item["type"]:
        case "extra_forbidden":
            new = _RENAMED_KEYS.get(path)
            hint = (
                f"; it is called '{new}' now" if new else _suggestion(str(where[-1]), _known_keys(where[:-1]))
            )
            reason = "unknown key" + hint
        case kind if kind in _REASONS:
            reason = _REASONS[kind]
        case "literal_error":
            reason = f"must be {context['expected']}"
        case "string_pattern_mismatch" if where[-1] == "sha256":
            reason = "must be 64 hexadecimal digits"
        case "string_pattern_mismatch":
            reason = "must be 1 to 32 of a-z, 0-9 and '_'"
        case "value_error":
            reason = redact(str(context["error"]))
        case "tuple_type":
            reason = "must be a list" + _list_hint(where, item["input"])
        case "string_type" | "bool_type" if isinstance(item["input"], bool | str):
            reason = f"must be {_EXPECTED[item['type']]}"
        case _:
            reason = str(item["msg"]).replace("Input should be", "must be")
    return redact(f"{path}: {reason}")


def _list_hint(where: tuple[Any, ...], value: object) -> str:
    """How to write a single value as a list; only labels are shown, as other values may be secrets."""
    return f": [{value}]" if where[-1] == "classes" and isinstance(value, str) and len(value) < 100 else ""


def _known_keys(where: tuple[Any, ...]) -> list[str]:
    """The keys of the section at a path."""
    section: Any = Config
    for part in where:
        if isinstance(section, type) and issubclass(section, BaseModel):
            fields = {field.alias: field.annotation for field in section.model_fields.values()}
            section = fields.get(str(part))
        else:
            section = _item_type(section)
        section = _section_in(section)
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return []
    return [str(field.alias) for field in section.model_fields.values()]


def _item_type(annotation: Any) -> Any:
    """The type of the values of a mapping, or of the items of a list."""
    inner = get_args(annotation)
    return inner[-1 if get_origin(annotation) is dict else 0] if inner else None


def _section_in(annotation: Any) -> Any:
    """The section of `SECTION | None`; other types as they are."""
    sections = [
        part for part in get_args(annotation) if isinstance(part, type) and issubclass(part, BaseModel)
    ]
    return sections[0] if sections and get_origin(annotation) is not dict else annotation


def _suggestion(key: str, known: list[str]) -> str:
    if len(key) > _MAX_KEY_CHARACTERS:
        return ""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    close = close or [name for name in known if name.lower().startswith(key.lower())]
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known here: {', '.join(known)}" if known else ""
