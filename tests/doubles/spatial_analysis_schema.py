"""The JSON Schema of Spatial Analysis's messages as a check, and what a schema cannot say."""

import json
from functools import cache
from typing import Any

import pytest

from repository_paths import REPOSITORY

SCHEMA = REPOSITORY / "tests" / "data" / "spatial-analysis-2.0.schema.json"


@cache
def _validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def find_problems(document: Any) -> list[str]:
    """What is wrong with a message; empty if nothing is."""
    problems = [error.message for error in _validator().iter_errors(document)]
    if problems:
        return problems
    detected = [detection["id"] for detection in document["detections"]]
    named = {each for event in document["events"] for each in event["detectionIds"]}
    if named != set(detected) or len(set(detected)) < len(detected):
        problems.append("the detections are not those of the events")
    ids = [event["id"] for event in document["events"]]
    if len(set(ids)) < len(ids):
        problems.append("two events have one id")
    for event in document["events"]:
        count = event["properties"].get("personCount")
        if count not in (None, len(event["detectionIds"])):
            problems.append("the count is not that of the detections")
    return problems
