"""The JSON Schema of a configuration, for editors and pipelines."""

from typing import Any

from visionedge.config.documents import EXTENSION_PREFIX
from visionedge.config.schema import CAMERA_NAME_PATTERN, RULE_NAME_PATTERN, Config

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration document, the same for a file and for desired properties.

    It describes each key by itself; `load.parse_config` also checks the URIs of cameras.
    """
    schema = _without_titles(Config.model_json_schema(by_alias=True))
    schema["properties"]["cameras"]["propertyNames"] = {"pattern": f"^{CAMERA_NAME_PATTERN.pattern}$"}
    for rules in ("zones", "lines"):
        named = schema["$defs"]["CameraConfig"]["properties"][rules]
        named["propertyNames"] = {"pattern": f"^({RULE_NAME_PATTERN.pattern})$"}
    schema["properties"]["models"]["propertyNames"] = {"pattern": f"^{CAMERA_NAME_PATTERN.pattern}$"}
    for model in ("ModelConfig", "NamedModelConfig"):
        schema["$defs"][model] |= {
            "not": {"required": ["path", "url"]},
            "dependentRequired": {"url": ["sha256"], "sha256": ["url"]},
        }
    # Any value: these keys hold YAML anchors and are ignored.
    schema["patternProperties"] = {f"^{EXTENSION_PREFIX}": {}}
    return {"$schema": SCHEMA_DIALECT, **schema, "title": "visionedge configuration"}


def _without_titles(value: Any) -> Any:
    """Without the titles that pydantic makes of names, which repeat the names."""
    if isinstance(value, dict):
        return {key: _without_titles(item) for key, item in value.items() if key != "title"}
    return [_without_titles(item) for item in value] if isinstance(value, list) else value
