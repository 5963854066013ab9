"""Reported properties: patches of differences, in measure, as edgeHub takes them."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.twin import Twin
from visionedge.app.hub_bridge import MAX_CAMERAS_BYTES, fit_camera_states
from visionedge.iothub.desired_document import DesiredDocument, build_acknowledgement
from visionedge.iothub.reported_properties import (
    MAX_PATCH_BYTES,
    MIN_PATCH_INTERVAL_NS,
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


class Hub:
    """The real rules of edgeHub behind a link that may be lost."""

    def __init__(self) -> None:
        self.twin = Twin()
        self.now_ns = 0
        self.reported = ReportedProperties(lambda: self.now_ns)
        self.reported.on_connected({})

    def step(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """Send what is due; the patch."""
        patch = self.reported.next_patch(wanted)
        if patch is not None:
            self.twin.report(json.dumps(patch).encode())
            self.reported.settle("taken")
        return patch

    def later(self, nanoseconds: int = MIN_PATCH_INTERVAL_NS) -> "Hub":
        """Time goes by."""
        self.now_ns += nanoseconds
        return self


def test_only_differences_are_told_and_what_is_gone_is_deleted() -> None:
    """Null takes a key away; what stays is not repeated."""
    hub = Hub()
    assert hub.step({"cameras": {"dock": "live", "yard": "failed"}, "x": 1}) is not None
    patch = hub.later().step({"cameras": {"dock": "live", "gate": "live"}})
    assert patch == {"cameras": {"yard": None, "gate": "live"}, "x": None}
    assert hub.later().step({"cameras": {"dock": "live", "gate": "live"}}) is None
    assert hub.twin.reported == {"cameras": {"dock": "live", "gate": "live"}}


def test_one_patch_goes_in_five_seconds_however_much_changes() -> None:
    """What changed meanwhile goes together; what changed back does not go at all."""
    hub = Hub()
    sent = [hub.later(MIN_PATCH_INTERVAL_NS // 50).step({"n": number % 10}) for number in range(500)]
    assert len([patch for patch in sent if patch]) <= 10
    hub.later().step({"n": 1})
    assert hub.twin.reported == {"n": 1}


def test_a_new_link_is_told_everything_and_forgets_what_others_told() -> None:
    """What the twin still has of an older version of the module goes."""
    hub = Hub()
    hub.step({"a": {"b": 1}, "c": 2})
    hub.reported.lost()
    assert hub.later().step({"a": {"b": 1}, "c": 2}) is None
    hub.reported.on_connected({"a": {"b": 1, "old": 5}, "c": 2, "older": {"x": 1}, "$version": 4})
    assert hub.step({"a": {"b": 1}, "c": 2}) == {"a": {"b": 1, "old": None}, "c": 2, "older": None}


def test_a_patch_that_was_refused_is_tried_again_ever_more_rarely() -> None:
    """A hub that does not want it is not pestered, and taken up again where it does."""
    hub = Hub()
    waits = []
    for _ in range(12):
        began_ns = hub.now_ns
        while hub.reported.next_patch({"a": 1}) is None:
            hub.later(MIN_PATCH_INTERVAL_NS // 2)
        hub.reported.settle("refused")
        waits.append(hub.now_ns - began_ns)
    assert waits[1:4] == [2 * MIN_PATCH_INTERVAL_NS, 4 * MIN_PATCH_INTERVAL_NS, 8 * MIN_PATCH_INTERVAL_NS]
    assert max(waits) <= 300_000_000_000
    hub.later(300_000_000_000).step({"a": 1})
    assert hub.twin.reported == {"a": 1}


def test_a_patch_whose_link_was_lost_goes_again_over_the_next_one() -> None:
    """Nobody knows whether it arrived."""
    hub = Hub()
    assert hub.reported.next_patch({"a": 1}) == {"a": 1}
    hub.reported.settle("lost")
    assert hub.later().step({"a": 1}) is None
    hub.reported.on_connected({})
    assert hub.step({"a": 1}) == {"a": 1}


def test_many_long_names_replaced_by_others_go_in_parts_that_edgehub_takes() -> None:
    """First what goes away, so that the whole is never too large either."""
    hub = Hub()
    first = {"cameras": {f"{n:03}" + "a" * 61: "reconnecting" for n in range(200)}}
    second = {"cameras": {f"{n:03}" + "b" * 61: "reconnecting" for n in range(200)}}
    hub.step(first)
    for _ in range(3):
        patch = hub.later().step(second)
        assert patch is None or len(json.dumps(patch)) <= MAX_PATCH_BYTES + 2000
    assert hub.twin.reported == second


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, DOCUMENTS)
def test_a_difference_makes_one_document_into_the_other(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    """Whatever they are, laid over by edgeHub's own rules."""
    twin = Twin()
    twin.reported = before
    twin.report(json.dumps(compute_merge_patch(before, after)).encode())
    assert twin.reported == after
    assert limit_patch_size(compute_merge_patch(before, after)) == compute_merge_patch(before, after)


def test_all_together_stays_below_what_a_twin_holds() -> None:
    """As many cameras as fit with the longest names, and a configuration that is as wrong as can be."""
    states = {f"{n:03}" + "c" * 61: "reconnecting" for n in range(300)}
    desired = DesiredDocument(2**31, {f"section-{n}": {} for n in range(100)})
    problems = {key: [f"{key}.{n}: " + "ü" * 200 for n in range(50)] for key in desired.document}
    wanted = {"config": build_acknowledgement(desired, problems, {}), "cameras": fit_camera_states(states)}
    hub = Hub()
    hub.step(wanted)
    assert hub.twin.reported == wanted
    assert len(json.dumps(wanted)) < MAX_PATCH_BYTES - 500


def test_the_states_of_two_hundred_cameras_with_the_longest_names_fit() -> None:
    """And of more than fit the ones in trouble are kept, the others are counted."""
    states = {f"{n:03}" + "c" * 61: "reconnecting" for n in range(200)}
    assert fit_camera_states(states) == states
    many = {**{f"{n:04}" + "c" * 60: "live" for n in range(400)}, "zzz": "failed"}
    told = fit_camera_states(many)
    assert told["zzz"] == "failed"
    assert told["_more"] == f"{401 - (len(told) - 1)} cameras more"
    assert len(json.dumps(told)) < MAX_CAMERAS_BYTES + 100
