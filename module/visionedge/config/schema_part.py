"""The configuration's schema for others: JSON Schema, for editors, pipelines and whoever writes a twin."""

from typing import Any

from visionedge.config.documents import EXTENSION
from visionedge.config.schema import CAMERA_NAME, Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration document, the same for a file and for desired properties.

    It says what can be said of a key by itself; `config.validate` also reads the URIs of cameras.
    """
    schema = _untitled(Config.model_json_schema(by_alias=True))
    schema["properties"]["cameras"]["propertyNames"] = {"pattern": f"^{CAMERA_NAME.pattern}$"}
    schema["$defs"]["ModelConfig"] |= {
        "not": {"required": ["path", "url"]},
        "dependentRequired": {"url": ["sha256"], "sha256": ["url"]},
    }
    # Any value: they are there for YAML anchors and are not read.
    schema["patternProperties"] = {f"^{EXTENSION}": {}}
    return {"$schema": DIALECT, **schema, "title": "visionedge configuration"}


def _untitled(value: Any) -> Any:
    """Without the titles that pydantic makes of the names: they say nothing more than those."""
    if isinstance(value, dict):
        return {key: _untitled(item) for key, item in value.items() if key != "title"}
    return [_untitled(item) for item in value] if isinstance(value, list) else value
