"""Compiled graphs on disk: found again, made again when anything differs, never half written."""

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_models import TinyDetector
from visionedge.errors import ModelError
from visionedge.model.compiler import build
from visionedge.model.compiler.build import CACHE_FOLDER, load_or_compile
from visionedge.model.compiler.compile import compile_model
from visionedge.model.model import Model, load_model


@pytest.fixture(autouse=True)
def _no_trial_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built is another matter (see test_inference_building): here the quick half of it will do."""
    monkeypatch.setattr(build, "build_graph", compile_model)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load_model(TinyDetector().save(tmp_path / "tiny.onnx"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder that is not there yet."""
    return tmp_path / "data" / "here"


def entries(data: Path) -> list[Path]:
    """All files in the cache, those that should not be there included."""
    return sorted((data / CACHE_FOLDER).iterdir())


def only(data: Path) -> Path:
    (entry,) = entries(data)
    return entry


def test_a_model_is_compiled_once(model: Model, data: Path) -> None:
    """The second time the file of the model is not even opened."""
    first = load_or_compile(model, data)
    assert first == compile_model(model)
    model.path.unlink()
    assert load_or_compile(model, data) == first
    assert only(data).suffix == ".graph"


def test_without_a_data_folder_nothing_is_cached(model: Model, tmp_path: Path) -> None:
    assert load_or_compile(model, None) == compile_model(model)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.onnx"]


def test_weights_interpretation_and_row_limit_are_part_of_the_key(
    model: Model, data: Path, tmp_path: Path
) -> None:
    """Each of them alone makes another graph, or may."""
    stretched = replace(
        model.interpretation, preprocess=replace(model.interpretation.preprocess, fit="stretch")
    )
    others = [
        load_model(TinyDetector(seed=1).save(tmp_path / "other.onnx")),
        replace(model, interpretation=stretched),
        replace(model, labels=tuple("vwxyz")),
    ]
    graphs = [load_or_compile(each, data) for each in (model, *others)] + [
        load_or_compile(model, data, rows=7)
    ]
    assert len(entries(data)) == 5
    assert graphs[4] == compile_model(model, 7) != graphs[0]


@pytest.mark.parametrize("version", ["__version__", "onnx", "_hash_own_source"])
def test_another_version_compiles_again(
    model: Model, data: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """Of visionedge, of onnx, and of the compiler's own source."""
    load_or_compile(model, data)
    before = build.compute_cache_key(model, 500)
    if version == "onnx":
        monkeypatch.setattr("onnx.__version__", "0.0.1")
    else:
        monkeypatch.setattr(build, version, "0.0.1" if version == "__version__" else lambda: "another")
    assert build.compute_cache_key(model, 500) != before


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "text"])
def test_a_damaged_entry_is_reported_and_compiled_again(
    model: Model, data: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """And what is given is right at once."""
    good = load_or_compile(model, data)
    content = only(data).read_bytes()
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    only(data).write_bytes(
        {"empty": b"", "cut": content[:-9], "changed": bytes(changed), "text": b"hello"}[damage]
    )
    assert load_or_compile(model, data) == good
    assert "compiled again" in caplog.text
    assert only(data).read_bytes() == content


def test_an_entry_under_another_name_is_not_used(model: Model, data: Path, tmp_path: Path) -> None:
    """The graph of one model must never run as another's."""
    other = load_model(TinyDetector(seed=1).save(tmp_path / "other.onnx"))
    load_or_compile(model, data)
    entry = only(data)
    load_or_compile(other, data)
    (stranger,) = set(entries(data)) - {entry}
    stranger.replace(entry)
    assert load_or_compile(model, data) == compile_model(model)


def test_a_model_that_cannot_be_compiled_leaves_no_file(data: Path, tmp_path: Path) -> None:
    model = load_model(TinyDetector(dtype="uint8").save(tmp_path / "bytes.onnx"))
    with pytest.raises(ModelError, match="takes bytes"):
        load_or_compile(model, data)
    assert not data.exists()


def test_a_folder_that_cannot_be_created_is_only_a_warning(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A read-only data folder must not stop the module."""
    (tmp_path / "file").touch()
    assert load_or_compile(model, tmp_path / "file") == compile_model(model)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "cannot be written" in warning.getMessage()


def test_a_full_disk_leaves_no_partial_entry(
    model: Model, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert load_or_compile(model, data) == compile_model(model)
    assert entries(data) == []


def test_the_least_recently_used_entry_is_evicted_first(
    model: Model, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Being read counts as used; what a dead process left half written goes too."""
    monkeypatch.setattr(build, "MAX_CACHE_ENTRIES", 3)
    for age_s, rows in enumerate((3, 2, 1)):
        load_or_compile(model, data, rows=rows)
        (newest,) = [path for path in entries(data) if build.compute_cache_key(model, rows) in path.name]
        os.utime(newest, (1000 - age_s, 1000 - age_s))
    (data / CACHE_FOLDER / "left.part").write_bytes(b"half")
    os.utime(data / CACHE_FOLDER / "left.part", (1, 1))
    load_or_compile(model, data, rows=1)
    load_or_compile(model, data, rows=4)
    kept = {path.name for path in entries(data)}
    assert kept == {f"{build.compute_cache_key(model, rows)}.graph" for rows in (1, 3, 4)}


def test_the_folder_stays_within_its_size_limit(model: Model, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest stays even when it alone is larger."""
    monkeypatch.setattr(build, "MAX_CACHE_BYTES", 10)
    load_or_compile(model, data, rows=1)
    load_or_compile(model, data, rows=2)
    assert only(data).stem == build.compute_cache_key(model, 2)


def test_concurrent_compilations_get_the_same_whole_graph(model: Model, data: Path) -> None:
    """Two modules may share a data folder and start together."""
    graphs: list[bytes] = []
    ready = threading.Barrier(4)

    def compile_together() -> None:
        ready.wait()
        graphs.append(load_or_compile(model, data))

    threads = [threading.Thread(target=compile_together) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graphs == [compile_model(model)] * 4
    assert only(data).suffix == ".graph"
