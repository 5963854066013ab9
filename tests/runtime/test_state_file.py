"""A state file under changing versions of the module."""

import json
from pathlib import Path
from typing import Any

import pytest

from visionedge.camera import registry
from visionedge.camera.registry import SequencePosition, SequenceStore
from visionedge.iothub import desired_properties
from visionedge.iothub.desired_properties import DesiredDocument, LastGoodFile
from visionedge.runtime.files import DamagedStateFileError, set_aside
from visionedge.runtime.state_file import StateFile


def parse(document: Any) -> str:
    """The text in a document."""
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise DamagedStateFileError("no text in it")
    return str(document["text"])


def run(path: Path, version: int, text: str) -> list[str]:
    """What a version reads at its start; then it writes a text."""
    file = StateFile(path, f"visionedge/thing/{version}")
    found = file.read(parse)
    file.write({"text": text})
    assert file.lost is None
    return found


def names(path: Path) -> set[str]:
    """The files in the folder."""
    return {each.name for each in path.parent.iterdir()}


def test_a_version_reads_what_it_wrote_and_what_the_version_before_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert run(path, 1, "one") == []
    assert run(path, 1, "two") == ["one"]
    assert run(path, 2, "three") == ["two"]
    assert json.loads(path.read_text()) == {"schema": "visionedge/thing/2", "text": "three"}
    assert names(path) == {"a.json"}


def test_an_older_version_writes_beside_a_newer_file_and_the_newest_text_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    run(path, 3, "of 3")
    assert run(path, 2, "of 2") == ["of 3"]
    assert run(path, 1, "of 1") == ["of 2", "of 3"]
    assert names(path) == {"a.json", "a.1.json", "a.2.json"}
    assert run(path, 1, "of 1 again") == ["of 1", "of 2", "of 3"]
    assert run(path, 2, "of 2 again") == ["of 1 again", "of 2", "of 3"]
    assert names(path) == {"a.json", "a.2.json"}
    assert run(path, 3, "of 3 again") == ["of 2 again", "of 3"]
    assert names(path) == {"a.json"}
    assert run(path, 3, "") == ["of 3 again"]


def test_a_newer_file_is_reported_with_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"schema": "visionedge/thing/7", "other": 1}')
    file = StateFile(path, "visionedge/thing/2")
    assert file.read(parse) == []
    assert file.lost is None
    assert file.newer == (
        "a.json was written by a newer version of visionedge (schema 7, this version reads up to 2): it stays"
        " as it is, and this version uses a.2.json; install the newer version again to use it"
    )
    assert file.newer in caplog.text
    file.set_aside("its content is wrong")
    assert json.loads(path.read_text())["other"] == 1


@pytest.mark.parametrize("schema", ["visionedge/other/2", "visionedge/thing/0", "visionedge/thing/99999", 2])
def test_a_file_with_another_schema_is_set_aside(tmp_path: Path, schema: object) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"schema": schema, "text": "x"}))
    file = StateFile(path, "visionedge/thing/2")
    assert file.read(parse) == []
    assert file.lost == "its schema is unknown"
    assert names(path) == {"a.json.aside"}


def test_a_damaged_file_beside_is_set_aside_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    run(path, 3, "of 3")
    run(path, 2, "of 2")
    (tmp_path / "a.2.json").write_text("{")
    file = StateFile(path, "visionedge/thing/2")
    assert file.read(parse) == ["of 3"]
    assert names(path) == {"a.json", "a.2.json.aside"}


@pytest.mark.parametrize("place", ["a.json.aside", "a.json.aside.1", "a.json.aside.2"])
@pytest.mark.parametrize("holds", [True, False])
def test_a_folder_with_the_name_of_a_set_aside_file_does_not_stop_the_next(
    tmp_path: Path, place: str, holds: bool
) -> None:
    path, folder = tmp_path / "a.json", tmp_path / place
    folder.mkdir()
    if holds:
        (folder / "other").touch()
    for text in "1234":
        path.write_text(text)
        set_aside(path)
    kept = [each.read_text() for each in sorted(tmp_path.iterdir()) if each.is_file()]
    assert kept == (["4", "3"] if holds else ["4", "3", "2"])
    assert folder.is_dir() == holds


def test_a_folder_is_set_aside_under_the_only_free_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for name in ("a.json.aside", "a.json.aside.2", "a.json"):
        (tmp_path / name / "other").mkdir(parents=True)
    (tmp_path / "a.json.aside.1").touch()
    set_aside(path)
    assert not path.exists()
    assert (tmp_path / "a.json.aside.1" / "other").is_dir()
    path.touch()
    with pytest.raises(OSError, match="not empty"):
        set_aside(path)


# --- the files of the module --------------------------------------------------------------------------------


def test_frame_numbers_rise_over_an_update_a_roll_back_and_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that stands still, so that only the files know the numbers."""
    path = tmp_path / "sequences.json"
    numbers: list[int] = []
    for schema in ("visionedge/sequences/2", "visionedge/sequences/3") * 3:
        monkeypatch.setattr(registry, "SEQUENCES_SCHEMA", schema)
        store = SequenceStore(path, lambda: 1_000.0)
        numbers += [first := store.first("dock"), first + 50]
        assert store.last_epoch("dock") == len(numbers) // 2 - 1
        store.remember({"dock": SequencePosition(first + 51, len(numbers) // 2)})
        assert store.file.lost is None
    assert numbers == sorted(set(numbers))
    assert names(path) == {"sequences.json"}


def test_desired_properties_survive_an_update_a_roll_back_and_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = tmp_path / "desired.json", None
    for version, schema in enumerate(("visionedge/desired/1", "visionedge/desired/2") * 3):
        monkeypatch.setattr(desired_properties, "DESIRED_SCHEMA", schema)
        file = LastGoodFile(path, "owner")
        assert file.read() == before
        before = DesiredDocument(version, {"cameras": {}})
        file.keep(before)
        assert file.file.lost is None
    assert names(path) == {"desired.json"}
