"""The lines of `SourceFault`: every place that raises one gives the values of its placeholders."""

import ast
import string

import pytest

from repository_paths import REPOSITORY
from visionedge.camera.sources.diagnosis import SourceFault

CAMERA = REPOSITORY / "module" / "visionedge" / "camera"


def given_values() -> list[tuple[str, set[str | None]]]:
    """The member and the names of the values of each call of `describe` and `error`."""
    found = []
    for path in CAMERA.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(ast.Attribute(ast.Name("SourceFault"), member), _)):
                    found.append((member, {keyword.arg for keyword in node.keywords}))
    return found


@pytest.mark.parametrize("fault", SourceFault)
def test_every_fault_is_raised_with_all_its_values(fault: SourceFault) -> None:
    placeholders = {field for _, field, _, _ in string.Formatter().parse(fault.value) if field}
    uses = [values for member, values in given_values() if member == fault.name]
    assert uses
    assert all(values == placeholders for values in uses)


def test_a_value_from_outside_shows_no_secret() -> None:
    line = SourceFault.READ_FAILED.describe("cam", error="rtsp://user:hunter2@192.0.2.5/")
    assert line.startswith("cam: reading failed: ")
    assert "hunter2" not in line
