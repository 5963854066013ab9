"""The published schema: other programs can check a configuration with it."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic.alias_generators import to_camel

from visionedge.__main__ import main
from visionedge.config.json_schema import json_schema
from visionedge.config.schema import Config

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "config.schema.json"


def test_the_published_schema_is_that_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/config.schema.json equals the output of `visionedge config schema`, byte for byte."""
    assert main(["config", "schema"]) == 0
    assert capsys.readouterr().out == PUBLISHED.read_text()


def test_every_setting_has_a_description_or_a_section_of_its_own() -> None:
    """An editor with the schema can describe each key."""
    schema = json_schema()

    def check_descriptions(properties: dict[str, Any]) -> None:
        for name, setting in properties.items():
            assert "description" in setting or "$ref" in setting, name

    assert schema["patternProperties"] == {"^x-": {}}
    assert schema["properties"].keys() == {to_camel(name) for name in Config.model_fields}
    check_descriptions(schema["properties"])
    for section in schema["$defs"].values():
        assert section["description"]
        assert section["additionalProperties"] is False
        check_descriptions(section["properties"])


def test_the_schema_describes_camera_names_and_model_locations() -> None:
    """Rules beyond the types of keys."""
    schema = json_schema()
    assert schema["properties"]["cameras"]["propertyNames"] == {"pattern": "^[a-z0-9_-]{1,64}$"}
    model = schema["$defs"]["ModelConfig"]
    assert model["not"] == {"required": ["path", "url"]}
    assert model["dependentRequired"] == {"url": ["sha256"], "sha256": ["url"]}
    assert "$schema" in json.loads(PUBLISHED.read_text())
