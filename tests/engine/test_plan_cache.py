"""Plans on disk: used again for exactly the same, ignored when anything differs or the file is damaged."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from simulated_machines import SimulatedMachine, gpu
from visionedge.engine.autotune import AutotuneRequest, search_plan
from visionedge.engine.plan import AutotuneResult, PlanCache, PlanKey

KEY = PlanKey.of(
    b"a graph", device="cuda", cores=8, max_batch=8, latency_budget_ms=None, hardware="a machine"
)


@pytest.fixture
def measured() -> AutotuneResult:
    machine = SimulatedMachine(gpu)
    return search_plan(machine.trial, AutotuneRequest("cuda", 8, None, 8), clock=machine.clock)


def stored(folder: Path, measured: AutotuneResult) -> Path:
    PlanCache(folder).store(KEY, measured)
    (file,) = folder.iterdir()
    return file


def test_a_saved_plan_is_found_and_marked_as_cached(tmp_path: Path, measured: AutotuneResult) -> None:
    stored(tmp_path / "plans", measured)
    found = PlanCache(tmp_path / "plans").load(KEY)
    assert found is not None
    assert found.reason.startswith("from the cache, of 2")
    assert found.reason.endswith(measured.reason)
    assert found.document() | {"reason": ""} == measured.document() | {"reason": ""}


def test_a_missing_plan_gives_none(tmp_path: Path) -> None:
    assert PlanCache(tmp_path / "nowhere").load(KEY) is None


@pytest.mark.parametrize(
    "change",
    [
        {"graph_sha256": "cd" * 32},
        {"device": "cpu"},
        {"hardware": "another machine"},
        {"versions": ("visionedge 99", "onnxruntime 99")},
        {"cores": 4},
        {"max_batch": 4},
        {"latency_budget_ms": 20.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_plan_for_anything_else_is_not_used(
    tmp_path: Path, measured: AutotuneResult, change: dict[str, Any]
) -> None:
    stored(tmp_path, measured)
    assert PlanCache(tmp_path).load(dataclasses.replace(KEY, **change)) is None


def with_changed_value(document: dict[str, Any], *path: str, value: object) -> str:
    """The document with one value changed, as text."""
    inner: Any = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), "visionedge/plan/99"),
        (("key", "cores"), 4),
        (("measuredAt",), "yesterday"),
        (("measured",), None),
        (("measured", "choice", "lanes"), 0),
        (("measured", "choice", "lanes"), "2"),
        (("measured", "choice"), {}),
        (("measured", "buckets"), []),
        (("measured", "buckets"), [8, 1]),
        (("measured", "buckets"), [1, 2]),
        (("measured", "table"), [{}]),
        (("measured", "fits"), 7),
    ],
    ids=str,
)
def test_a_plan_that_was_tampered_with_is_measured_again(
    tmp_path: Path,
    measured: AutotuneResult,
    path: tuple[str, ...],
    value: object,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file = stored(tmp_path, measured)
    file.write_text(with_changed_value(json.loads(file.read_text()), *path, value=value))
    assert PlanCache(tmp_path).load(KEY) is None
    assert "measuring the plan again" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"[1]", b"\xff\xfe", b"7" * 99])
def test_a_plan_in_a_damaged_file_is_measured_again(tmp_path: Path, measured: AutotuneResult, damage: bytes) -> None:
    stored(tmp_path, measured).write_bytes(damage)
    assert PlanCache(tmp_path).load(KEY) is None


def test_an_unsettled_plan_is_not_saved(tmp_path: Path, measured: AutotuneResult) -> None:
    PlanCache(tmp_path).store(KEY, dataclasses.replace(measured, settled=False))
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_only_reported(
    tmp_path: Path, measured: AutotuneResult, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plans").write_text("a file where a folder should be")
    PlanCache(tmp_path / "plans").store(KEY, measured)
    assert "the plan cannot be saved" in caplog.text
    assert PlanCache(tmp_path / "plans").load(KEY) is None


def test_the_oldest_plans_are_deleted(tmp_path: Path, measured: AutotuneResult) -> None:
    cache = PlanCache(tmp_path)
    keys = [dataclasses.replace(KEY, cores=cores) for cores in range(1, 41)]
    for age, key in enumerate(keys):
        cache.store(key, measured)
        os.utime(tmp_path / f"{key.name()}.json", ns=(age * 10**9, age * 10**9))
    assert len(list(tmp_path.iterdir())) == 32
    assert cache.load(keys[0]) is None
    assert cache.load(keys[-1]) is not None


def test_the_key_of_this_machine_names_its_versions_and_processor() -> None:
    key = PlanKey.of(b"a graph", device="cpu", cores=2, max_batch=8, latency_budget_ms=None)
    assert any(version.startswith("onnxruntime") for version in key.versions)
    assert key.hardware
    assert (
        key.name()
        == PlanKey.of(b"a graph", device="cpu", cores=2, max_batch=8, latency_budget_ms=None).name()
    )
