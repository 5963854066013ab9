"""Reported properties: patches of differences, at a limited rate, as edgeHub accepts them."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.twin import Twin
from visionedge.app.hub_bridge import (
    COUNTS_INTERVAL_S,
    MAX_CAMERAS_BYTES,
    MAX_COUNTS_BYTES,
    ReportedCounts,
    build_reported_properties,
    fit_camera_states,
)
from visionedge.app.state import AppState, SceneStatistics
from visionedge.config.load import parse_config
from visionedge.iothub.desired_properties import DesiredDocument, build_acknowledgement
from visionedge.iothub.reported_properties import (
    MAX_PATCH_BYTES,
    PATCH_BURST,
    PATCH_INTERVAL_NS,
    PatchRateLimit,
    ReportedProperties,
    compute_merge_patch,
    limit_patch_size,
)

VALUES = st.recursive(
    st.integers(-9, 9) | st.booleans() | st.text("ab", max_size=3) | st.lists(st.integers(0, 3), max_size=3),
    lambda below: st.dictionaries(st.text("xyz", min_size=1, max_size=2), below, max_size=3),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.text("pqr", min_size=1, max_size=2), VALUES, max_size=4)


class FakeEdgeHub:
    """The rules of edgeHub over a connection that can be lost."""

    def __init__(self) -> None:
        self.twin = Twin()
        self.now_ns = 0
        self.reported = ReportedProperties(lambda: self.now_ns)
        self.reported.on_connected({})

    def step(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """Send a patch if one is due; returns it."""
        patch = self.reported.next_patch(wanted)
        if patch is not None:
            self.twin.report(json.dumps(patch).encode())
            self.reported.settle("taken")
        return patch

    def later(self, nanoseconds: int = PATCH_INTERVAL_NS) -> "FakeEdgeHub":
        """Time goes by."""
        self.now_ns += nanoseconds
        return self


def test_only_differences_are_reported_and_removed_keys_are_deleted() -> None:
    """Null removes a key; unchanged keys are not repeated."""
    hub = FakeEdgeHub()
    assert hub.step({"cameras": {"dock": "live", "yard": "failed"}, "x": 1}) is not None
    patch = hub.later().step({"cameras": {"dock": "live", "gate": "live"}})
    assert patch == {"cameras": {"yard": None, "gate": "live"}, "x": None}
    assert hub.later().step({"cameras": {"dock": "live", "gate": "live"}}) is None
    assert hub.twin.reported == {"cameras": {"dock": "live", "gate": "live"}}


def test_three_patches_are_sent_at_once_and_then_one_every_five_seconds() -> None:
    """Changes between two patches go together; a value that changed back does not go at all."""
    hub = FakeEdgeHub()
    sent_ns = []
    for number in range(500):
        if hub.step({"n": number}):
            sent_ns.append(hub.now_ns)
        hub.later(PATCH_INTERVAL_NS // 50)
    assert PATCH_BURST == 3
    tick_ns = PATCH_INTERVAL_NS // 50
    assert sent_ns[:3] == [0, tick_ns, 2 * tick_ns]
    assert sent_ns[3:] == [n * PATCH_INTERVAL_NS for n in range(1, 10)]
    assert hub.twin.reported == {"n": 450}
    hub.later(-PATCH_INTERVAL_NS // 50)
    assert hub.step({"n": 1}) is None
    assert hub.later().step({"n": 450}) is None, "it changed back"
    assert hub.later().step({"n": 1}) == {"n": 1}


def test_an_acknowledgement_right_after_the_first_report_is_sent_at_once() -> None:
    """The start reports everything; the first desired properties are answered without a wait."""
    hub = FakeEdgeHub()
    assert hub.step({"engine": "warming-up"}) is not None
    assert hub.step({"engine": "warming-up", "config": 7}) == {"config": 7}
    assert hub.step({"engine": "ok", "config": 7}) == {"engine": "ok"}
    assert hub.step({"engine": "ok", "config": 8}) is None
    assert hub.later().step({"engine": "ok", "config": 8}) == {"config": 8}


def test_a_quiet_period_allows_a_burst_of_three_at_most() -> None:
    """One token returns every 5 s, up to three."""
    now = [0]
    limit = PatchRateLimit(lambda: now[0])

    def burst() -> int:
        """How many patches may go now."""
        taken = 0
        while limit.available():
            limit.take()
            taken += 1
        return taken

    assert burst() == 3
    now[0] += PATCH_INTERVAL_NS - 1
    assert burst() == 0
    now[0] += 1
    assert burst() == 1
    now[0] += 2 * PATCH_INTERVAL_NS
    assert burst() == 2
    now[0] += 100 * PATCH_INTERVAL_NS
    assert burst() == 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3 * PATCH_INTERVAL_NS), max_size=40))
def test_no_period_has_more_patches_than_a_burst_and_its_share(pauses_ns: list[int]) -> None:
    """In `n` intervals at most `n + 3` patches, for any order of requests."""
    now = [0]
    limit = PatchRateLimit(lambda: now[0])
    sent_ns: list[int] = []
    for pause_ns in pauses_ns:
        now[0] += pause_ns
        if limit.available():
            limit.take()
            sent_ns.append(now[0])
    for first, begin_ns in enumerate(sent_ns):
        for count, end_ns in enumerate(sent_ns[first:], 1):
            assert count <= PATCH_BURST + (end_ns - begin_ns) // PATCH_INTERVAL_NS


def test_a_new_connection_reports_everything_again() -> None:
    """Keys of an older version of the module are removed from the twin."""
    hub = FakeEdgeHub()
    hub.step({"a": {"b": 1}, "c": 2})
    hub.reported.lost()
    assert hub.later().step({"a": {"b": 1}, "c": 2}) is None
    hub.reported.on_connected({"a": {"b": 1, "old": 5}, "c": 2, "older": {"x": 1}, "$version": 4})
    assert hub.step({"a": {"b": 1}, "c": 2}) == {"a": {"b": 1, "old": None}, "c": 2, "older": None}


def test_a_rejected_patch_is_retried_at_growing_intervals() -> None:
    """Up to five minutes; a hub that accepts it again gets it."""
    hub = FakeEdgeHub()
    waits = []
    for _ in range(12):
        began_ns = hub.now_ns
        while hub.reported.next_patch({"a": 1}) is None:
            hub.later(PATCH_INTERVAL_NS // 2)
        hub.reported.settle("refused")
        waits.append(hub.now_ns - began_ns)
    assert waits[1:4] == [2 * PATCH_INTERVAL_NS, 4 * PATCH_INTERVAL_NS, 8 * PATCH_INTERVAL_NS]
    assert max(waits) <= 300_000_000_000
    hub.later(300_000_000_000).step({"a": 1})
    assert hub.twin.reported == {"a": 1}


def test_a_patch_whose_connection_was_lost_is_sent_again_over_the_next_one() -> None:
    """The patch may have arrived or not."""
    hub = FakeEdgeHub()
    assert hub.reported.next_patch({"a": 1}) == {"a": 1}
    hub.reported.settle("lost")
    assert hub.later().step({"a": 1}) is None
    hub.reported.on_connected({})
    assert hub.step({"a": 1}) == {"a": 1}


def test_a_patch_that_is_too_large_is_split_into_parts_that_edgehub_accepts() -> None:
    """Deletions first, so that the twin never becomes too large."""
    hub = FakeEdgeHub()
    first = {"cameras": {f"{n:03}" + "a" * 61: "reconnecting" for n in range(200)}}
    second = {"cameras": {f"{n:03}" + "b" * 61: "reconnecting" for n in range(200)}}
    hub.step(first)
    for _ in range(3):
        patch = hub.later().step(second)
        assert patch is None or len(json.dumps(patch)) <= MAX_PATCH_BYTES + 2000
    assert hub.twin.reported == second


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, DOCUMENTS)
def test_a_difference_applied_to_one_document_gives_the_other(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    """For any documents, merged by the rules of edgeHub."""
    twin = Twin()
    twin.reported = before
    twin.report(json.dumps(compute_merge_patch(before, after)).encode())
    assert twin.reported == after
    assert limit_patch_size(compute_merge_patch(before, after)) == compute_merge_patch(before, after)


def test_all_reported_properties_together_fit_into_the_twin() -> None:
    """As many cameras as fit with the longest names, and a configuration that is as wrong as can be."""
    states = {f"{n:03}" + "c" * 61: "reconnecting" for n in range(300)}
    desired = DesiredDocument(2**31, {f"section-{n}": {} for n in range(100)})
    problems = {key: [f"{key}.{n}: " + "ü" * 200 for n in range(50)] for key in desired.document}
    wanted = {"config": build_acknowledgement(desired, problems, {}), "cameras": fit_camera_states(states)}
    hub = FakeEdgeHub()
    hub.step(wanted)
    assert hub.twin.reported == wanted
    assert len(json.dumps(wanted)) < MAX_PATCH_BYTES - 500


def test_the_states_of_two_hundred_cameras_with_the_longest_names_fit() -> None:
    """And of more than fit the ones in trouble are kept, the others are counted."""
    states = {f"{n:03}" + "c" * 61: "reconnecting" for n in range(200)}
    assert fit_camera_states(states) == states
    many = {**{f"{n:04}" + "c" * 60: "live" for n in range(400)}, "zzz": "failed"}
    cameras = fit_camera_states(many)
    assert cameras["zzz"] == "failed"
    assert cameras["_more"] == f"{401 - (len(cameras) - 1)} cameras more"
    assert len(json.dumps(cameras)) < MAX_CAMERAS_BYTES + 100


def scene(**zones: int) -> dict[str, Any]:
    """A scene as `GET /api/v1/cameras/{name}/scene` gives it, with so many persons in each zone."""
    counts = {
        name: {"since": "x", "inside": {"person": n}, "entered": {"person": n, "car": 1}}
        for name, n in zones.items()
    }
    return {"tracks": [], "zones": counts, "lines": {}}


def test_counts_of_zones_and_lines_are_reported_at_most_once_a_minute(tmp_path: Path) -> None:
    """Over all labels; a camera that comes or goes is reported at once, one without rules never."""
    now_s = [0.0]
    scenes = {"dock": scene(queue=2), "plain": scene()}
    state = AppState.of(parse_config({}), tmp_path, {}, lambda: None)
    state.set_scenes(lambda: SceneStatistics(scenes))
    counts = ReportedCounts(lambda: now_s[0])
    first = {"dock": {"tracks": 0, "zones": {"queue": {"inside": 2, "entered": 3}}}}
    assert counts.read(state.snapshot()) == first
    scenes["dock"] = scene(queue=5)
    now_s[0] += COUNTS_INTERVAL_S - 1
    assert counts.read(state.snapshot()) == first
    now_s[0] += 1
    assert counts.read(state.snapshot())["dock"]["zones"]["queue"]["inside"] == 5
    scenes["yard"] = scene(**{"a.b $c": 1})
    assert counts.read(state.snapshot()).keys() == {"dock", "yard"}
    assert list(counts.read(state.snapshot())["yard"]["zones"]) == ["a_b__c"]
    del scenes["dock"]
    assert counts.read(state.snapshot()).keys() == {"yard"}


def test_zones_whose_names_differ_only_in_what_the_twin_does_not_take_keep_keys_of_their_own(
    tmp_path: Path,
) -> None:
    state = AppState.of(parse_config({}), tmp_path, {}, lambda: None)
    state.set_scenes(lambda: SceneStatistics({"dock": scene(**{"a.b": 1, "a b": 2, "a_b": 3, "a_b_2": 4})}))
    zones = ReportedCounts().read(state.snapshot())["dock"]["zones"]
    inside = {key: zone["inside"] for key, zone in zones.items()}
    assert inside == {"a_b": 3, "a_b_2": 4, "a_b_3": 2, "a_b_4": 1}


@pytest.mark.parametrize(("cameras", "zones"), [(1, 1), (3, 500), (200, 3), (300, 1)])
def test_states_and_counts_together_fit_into_their_part_of_the_twin(
    tmp_path: Path, cameras: int, zones: int
) -> None:
    """The states come first; counts that do not fit are counted, and the twin keeps `cameras` as it was."""
    names = [f"{n:03}" + "c" * 61 for n in range(cameras)]
    config = parse_config({"cameras": {name: {"uri": "demo:"} for name in names}})
    state = AppState.of(config, tmp_path, {}, lambda: None)
    many = {f"zone {number} " + "z" * 50: 99_999 for number in range(zones)}
    state.set_scenes(lambda: SceneStatistics({name: scene(**many) for name in names}))
    wanted = build_reported_properties(
        state.snapshot(), {}, datetime(2026, 11, 30, tzinfo=UTC), ReportedCounts().read(state.snapshot())
    )
    counts = wanted.get("counts", {})
    assert set(wanted["cameras"].values()) - {"disabled"} <= {wanted["cameras"].get("_more")}
    assert len(json.dumps({"cameras": wanted["cameras"], "counts": counts})) <= MAX_CAMERAS_BYTES + 200
    assert len(json.dumps(counts)) <= MAX_COUNTS_BYTES
    shown = [name for name in counts if name != "_more"]
    if "_more" in counts:
        assert counts["_more"] == f"{cameras - len(shown)} cameras more"
    if (cameras, zones) == (1, 1):
        assert shown == names
