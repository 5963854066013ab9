"""The desired document: merged over the local one, validated as a whole, acknowledged by section."""

import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.twin import check_reported
from visionedge.config.load import parse_config
from visionedge.errors import ConfigError
from visionedge.iothub.desired_properties import (
    MAX_ACKNOWLEDGEMENT_BYTES,
    DesiredDocument,
    LastGoodFile,
    build_acknowledgement,
    compute_effective_document,
    group_problems_by_section,
    overlay_desired,
    read_desired_document,
)


def rejected(document: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The acknowledgement of a document that is wrong as a whole."""
    desired = DesiredDocument(7, document)
    with pytest.raises(ConfigError) as caught:
        parse_config(document)
    acknowledgement = build_acknowledgement(
        desired, group_problems_by_section(desired, caught.value.problems), before or {}
    )
    check_reported({"config": acknowledgement})
    return acknowledgement


# --- what is wished ---------------------------------------------------------------------------------------


def test_a_key_that_begins_with_x_dash_is_ignored() -> None:
    """As in a file; it is acknowledged like every key."""
    document = {"x-site": {"any": ["thing"]}, "http": {"port": 1}}
    assert parse_config(overlay_desired({}, document)) == parse_config({"http": {"port": 1}})
    acknowledgement = build_acknowledgement(DesiredDocument(7, document), {}, document)
    assert acknowledgement["x-site"] == {"status": "applied", "version": 7}
    check_reported({"config": acknowledgement})


def test_hub_metadata_is_not_part_of_the_document() -> None:
    """`$version` and `$metadata` are the hub's; the version is kept for the answer."""
    twin = {"desired": {"http": {"port": 1}, "$version": 4, "$metadata": {"x": 1}}, "reported": {}}
    assert read_desired_document(twin) == DesiredDocument(4, {"http": {"port": 1}})
    assert read_desired_document({"desired": {}}) == DesiredDocument(0, {})
    assert read_desired_document({"reported": {}}) is None


def test_a_removed_key_falls_back_to_the_local_document_or_the_default() -> None:
    """Nothing of an earlier document stays."""
    local = {"http": {"port": 1}, "cameras": {"dock": {"uri": "demo:", "fps": 5}}}
    over = overlay_desired(local, {"cameras": {"dock": {"fps": 2}, "yard": {"uri": "demo:"}}})
    assert over["cameras"] == {"dock": {"uri": "demo:", "fps": 2}, "yard": {"uri": "demo:"}}
    assert overlay_desired(local, {}) == local


@pytest.mark.parametrize(
    ("local", "desired", "model"),
    [
        ({"path": "a"}, {"url": "https://h/b", "sha256": "0"}, {"url": "https://h/b", "sha256": "0"}),
        ({"url": "https://h/b", "sha256": "0"}, {"path": "a"}, {"path": "a"}),
        ({"url": "https://h/b", "sha256": "0"}, {"maxMegabytes": 5}, None),
        ({"path": "a"}, {"path": "b", "url": "c"}, {"path": "b", "url": "c"}),
    ],
)
def test_a_model_has_either_a_path_or_an_address(
    local: dict[str, Any], desired: dict[str, Any], model: dict[str, Any] | None
) -> None:
    """An address in the twin replaces a path in the file, and vice versa; both at once stay wrong."""
    expected = {**local, **desired} if model is None else model
    assert overlay_desired({"model": local}, {"model": desired})["model"] == expected
    over = overlay_desired({"models": {"a": local, "b": local}}, {"models": {"a": desired, "c": desired}})
    assert over["models"] == {"a": expected, "b": local, "c": desired}


# --- the acknowledgement ----------------------------------------------------------------------------------


def test_every_section_is_acknowledged_with_the_version() -> None:
    """Applied is applied, without a word more."""
    desired = DesiredDocument(3, {"telemetry": {"mode": "all"}, "http": {"port": 0}})
    assert build_acknowledgement(desired, {}, desired.document) == {
        "http": {"status": "applied", "version": 3},
        "telemetry": {"status": "applied", "version": 3},
    }


def test_a_wrong_document_is_rejected_whole_and_each_section_has_the_reason() -> None:
    """Sections that are right were not taken either, unless they are in force since an earlier version."""
    acknowledgement = rejected(
        {"cameras": {"dock": {"uri": 5}}, "telemetry": {"mode": "all"}, "http": {"port": 1}},
        before={"http": {"port": 1}},
    )
    assert acknowledgement["cameras"]["status"] == "rejected"
    assert acknowledgement["cameras"]["reasons"] == ["cameras.dock.uri: must be a valid string"]
    assert acknowledgement["telemetry"]["reasons"] == ["not applied because of problems in cameras"]
    assert acknowledgement["http"] == {"status": "applied", "version": 7}


def test_forty_problems_are_all_reported() -> None:
    """Each by the path of its key, in the section that it is in."""
    document = {
        "cameras": {
            f"c{n}": {"uri": "gopher://h", "fps": 0, "transport": "smoke", "colour": 1} for n in range(8)
        },
        "inference": {"device": "npu", "iou": 2, "maxBatch": 0, "classes": "person"},
        "telemetry": {"mode": "some", "maxPerDay": -1},
        "telemtry": {},
        "model": {"path": "a", "url": "https://h/m.onnx", "size": 1},
    }
    desired = DesiredDocument(1, document)
    with pytest.raises(ConfigError) as caught:
        parse_config(document)
    assert len(caught.value.problems) >= 40
    acknowledgement = rejected(document)
    reasons = [reason for entry in acknowledgement.values() for reason in entry["reasons"]]
    assert sorted(reasons) == sorted(caught.value.problems)
    assert acknowledgement.keys() == document.keys()
    assert group_problems_by_section(desired, caught.value.problems).keys() == document.keys()
    assert len(json.dumps(acknowledgement)) < MAX_ACKNOWLEDGEMENT_BYTES


def test_problems_beyond_the_size_limit_are_counted_in_every_section() -> None:
    """Limited to the size of a twin: the problems of 200 cameras do not hide the one of a port."""
    cameras = {"c" * 60 + f"{n:03}": {"uri": "gopher://h/" + "x" * 3000, "fps": -1} for n in range(200)}
    acknowledgement = rejected({"cameras": cameras, "http": {"port": -1}})
    assert len(json.dumps({"config": acknowledgement})) < MAX_ACKNOWLEDGEMENT_BYTES + 100
    assert "more; see the event config-rejected" in acknowledgement["cameras"]["reasons"][-1]
    assert acknowledgement["http"]["reasons"] == ["http.port: must be greater than or equal to 0"]


def test_keys_that_edgehub_rejects_are_acknowledged_with_another_spelling() -> None:
    """Neither dots nor control signs, none too long, not too many, and no secret that is a key."""
    wrong: dict[str, Any] = {"a.b c": 1, "x\x01": 1, "k" * 2000: 1, "rtsp://me:hunter2@h/x": 1}
    acknowledgement = rejected({**wrong, **{f"key{n}": 1 for n in range(100)}})
    assert "a_b_c" in acknowledgement
    assert "hunter2" not in json.dumps(acknowledgement)
    assert acknowledgement["_more"]["status"] == "rejected"
    assert len(acknowledgement) == 25


def test_a_section_that_cannot_be_applied_leaves_the_others_in_force() -> None:
    """The parts that were in force before stay so, even after their removal."""
    desired = DesiredDocument(2, {"model": {"path": "new"}, "telemetry": {"mode": "all"}})
    refused = {"model": ["model: new does not exist"], "http": ["http: the port is in use"]}
    effective = compute_effective_document(desired, {"model": {"path": "old"}, "http": {"port": 1}}, refused)
    assert effective == {"model": {"path": "old"}, "http": {"port": 1}, "telemetry": {"mode": "all"}}
    acknowledgement = build_acknowledgement(desired, refused, effective)
    assert {key: entry["status"] for key, entry in acknowledgement.items()} == {
        "model": "rejected",
        "telemetry": "applied",
        "http": "rejected",
    }


# --- the last good one ------------------------------------------------------------------------------------


def test_the_last_good_document_is_readable_only_by_its_owner(tmp_path: Path) -> None:
    """Written as a whole or not at all, readable only for its user, and not used by another module."""
    path = tmp_path / "state" / "desired.json"
    kept = LastGoodFile(path, "hub/press-7/vision")
    assert kept.read() is None
    kept.keep(DesiredDocument(3, {"http": {"token": "s3cret"}}))
    kept.keep(DesiredDocument(4, {"http": {"token": "other"}}))
    assert kept.read() == DesiredDocument(4, {"http": {"token": "other"}})
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["desired.json"]
    assert LastGoodFile(path, "hub/press-8/vision").read() is None


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", '{"schema": "visionedge/desired/1", "owner": "o"}', "\xff"]
)
def test_a_damaged_file_is_not_used_and_not_quoted(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its text may be a password."""
    path = tmp_path / "desired.json"
    path.write_text(text + "hunter2", encoding="latin-1")
    assert LastGoodFile(path, "o").read() is None
    assert "set aside" in caplog.text
    assert "hunter2" not in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["desired.json.aside"]
