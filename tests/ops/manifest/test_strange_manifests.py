"""`visionedge manifest lint` with malformed files: one line, exit 2, never a traceback."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import CommandLine
from manifests import change, fresh_known_secrets, lint, valid_manifest
from repository_paths import REPOSITORY
from visionedge.ops.manifest.lint import lint_manifest

__all__ = ["fresh_known_secrets"]


@pytest.fixture
def visionedge(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """Calls the command line in this process."""
    return CommandLine(capsys)


MALFORMED: list[tuple[bytes, str]] = [
    (b"", "1:1: is not JSON"),
    (b'{"a": 1,\n\n "b" 2}', "3:6: is not JSON"),
    (b"\xff\xfe{\x00}\x00", "UTF-16"),
    (b"\x80", "not UTF-8"),
    (b'{"a": NaN}', "NaN"),
    (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    (b"[" * 100_000, "deep"),
    (b'{"a":' * 200 + b"1" + b"}" * 200, "deep"),
    (b" " * 8_000_001, "larger"),
]


@pytest.mark.parametrize(("data", "word"), MALFORMED, ids=[word for _, word in MALFORMED])
def test_a_file_that_is_not_json_gives_a_one_line_error(
    visionedge: CommandLine, tmp_path: Path, data: bytes, word: str
) -> None:
    """With the line and the column where there is one; exit 2."""
    path = tmp_path / "deployment.json"
    path.write_bytes(data)
    outcome = visionedge("manifest", "lint", path)
    assert outcome.code == 2
    (line,) = outcome.complaints
    assert word in line
    assert outcome.out == ""


@pytest.mark.parametrize("data", [data for data, _ in MALFORMED], ids=[word for _, word in MALFORMED])
def test_json_reports_a_file_that_is_not_json(visionedge: CommandLine, tmp_path: Path, data: bytes) -> None:
    """As one document with one error, for scripts that read stdout; exit 2."""
    path = tmp_path / "deployment.json"
    path.write_bytes(data)
    outcome = visionedge("manifest", "lint", path, "--json")
    assert outcome.code == 2
    assert outcome.err == ""
    document = json.loads(outcome.out)
    assert (document["schema"], document["kind"]) == ("visionedge/manifest-lint/1", "unknown")
    assert (document["errors"], document["warnings"], document["modules"]) == (1, 0, [])
    (finding,) = document["findings"]
    assert (finding["severity"], finding["path"]) == ("error", "$")
    assert finding["line"] in (None, 1, 3)
    assert finding["problem"]
    assert finding["remedy"]


@pytest.mark.parametrize("name", ["absent.json", "folder", "x" * 300, "a\0b"])
def test_an_unreadable_file_gives_a_one_line_error(
    visionedge: CommandLine, tmp_path: Path, name: str
) -> None:
    """Exit 2."""
    (tmp_path / "folder").mkdir()
    outcome = visionedge("manifest", "lint", f"{tmp_path}/{name}")
    assert outcome.code == 2
    assert "cannot be read" in outcome.complaints[0]


def test_lint_reads_stdin(visionedge: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the name '-'; a byte-order mark, as PowerShell writes it, does no harm."""
    data = b"\xef\xbb\xbf" + (REPOSITORY / "deployment.template.json").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    outcome = visionedge("manifest", "lint", "-")
    assert outcome.code == 0
    assert outcome.out.endswith("stdin: no problems\n")


KEYS = st.sampled_from(
    [
        *("modulesContent", "content", "$edgeAgent", "$edgeHub", "vision", "properties.desired", "modules"),
        *(
            "properties.desired.modules.vision",
            "properties.desired.routes.r",
            "properties.desired.",
            "settings",
        ),
        *(
            "systemModules",
            "edgeHub",
            "createOptions",
            "createOptions01",
            "HostConfig",
            "DeviceRequests",
            "env",
        ),
        *("Binds", "Devices", "Mounts", "PortBindings", "routes", "route", "cameras", "uri", "http", "token"),
        *("storeAndForwardConfiguration", "image", "Env", "value", "Capabilities", "Volumes", "startupOrder"),
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(
        [
            "FROM /* INTO $upstream",
            "${A}",
            "/dev/dxg",
            "demo:",
            "\ud800visionedge",
            '{"HostConfig": []}',
            "rtsp://a:b@c",
        ]
    )
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), below, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.sampled_from(["a.json", "a.template.json"]))
def test_any_json_document_is_linted_without_a_crash(document: Any, name: str) -> None:
    """For any JSON, lint prints its findings in printable lines."""
    report = lint_manifest(json.dumps(document).encode(), name)
    assert all(line.isprintable() for line in report.to_text().splitlines())
    assert json.dumps(report.document(), ensure_ascii=False).encode()


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values of a document."""
    below = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    return [
        *([path] if path else []),
        *(found for key, item in below for found in places(item, (*path, key))),
    ]


GPU_PV = json.dumps(
    valid_manifest(
        "gpu-pv-by-hand",
        published=("0.0.0.0", 80),
        document={"http": {"token": "t"}, "cameras": {"usb": {"uri": "v4l2:///dev/video0"}}},
    )
)
PLACES = places(json.loads(GPU_PV))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_valid_manifest_with_a_random_change_is_linted(data: st.DataObject) -> None:
    """A value of any type at any place is reported or accepted, never a traceback."""
    manifest = json.loads(GPU_PV)
    change(manifest, data.draw(st.sampled_from(PLACES)), data.draw(DOCUMENTS))
    for name in ("a.json", "a.template.json"):
        assert lint(manifest, name).to_text()


def test_lint_leaves_no_file_behind(visionedge: CommandLine, tmp_path: Path) -> None:
    """It only reads."""
    path = tmp_path / "deployment.json"
    path.write_text("{}")
    visionedge("manifest", "lint", path)
    assert os.listdir(tmp_path) == ["deployment.json"]  # noqa: PTH208 - the names alone
