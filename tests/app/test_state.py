"""The state of the module: an `Applied` names only sections that the writers have put in force as applied."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visionedge.app.service import RunOptions, Service
from visionedge.app.state import AppState
from visionedge.config.applied import Applied, SectionOutcome
from visionedge.config.load import parse_config
from visionedge.config.schema import SECTIONS, Config
from visionedge.iothub.desired_properties import ConfigurationSources

OTHER: dict[str, Any] = {
    "cameras": {"yard": {"uri": "demo:"}},
    "cameraDefaults": {"fps": 3},
    "model": {"path": "other.onnx"},
    "models": {"small": {"path": "small.onnx"}},
    "inference": {"confidence": 0.9},
    "overload": {"when": "always"},
    "telemetry": {"mode": "all"},
    "http": {"port": 1},
    "events": {"keep": {"days": 7}},
    "log": {"format": "json"},
}
"""A value for each section that differs from the default."""


class StubSectionWriter:
    """Writes sections with a scripted behaviour: adopt, ignore, reject, fail, or adopt and stay pending."""

    def __init__(self, state: AppState, behaviour: str, *sections: str) -> None:
        self.behaviour, self.names = behaviour, sections
        self.pending = behaviour == "pending"
        self.handle = state.register(*sections, apply=self.apply, pending=self.pending_reason)

    async def apply(self, wanted: Config) -> Mapping[str, str]:
        """Apply with the scripted behaviour."""
        if self.behaviour == "fail":
            raise RuntimeError("broken")
        if self.behaviour in ("adopt", "pending"):
            self.handle.adopt(wanted)
        return dict.fromkeys(self.names, "not possible") if self.behaviour == "reject" else {}

    def pending_reason(self) -> str | None:
        """Why nothing runs yet."""
        return "not in use yet" if self.pending else None


def state_of(document: dict[str, Any] | None = None) -> AppState:
    return AppState.of(parse_config(document or {}), Path("data"), {}, lambda: None)


def test_the_sections_of_this_test_are_those_of_the_schema() -> None:
    assert OTHER.keys() == SECTIONS.keys()


@given(
    st.fixed_dictionaries(
        {name: st.sampled_from(["adopt", "ignore", "reject", "pending"]) for name in OTHER}
    ),
    st.sets(st.sampled_from(sorted(OTHER))),
)
def test_a_section_is_applied_only_if_it_is_in_force_and_in_use(
    behaviours: dict[str, str], changed: set[str]
) -> None:
    """With any behaviour of its writer, changed or not."""
    state = state_of()
    for name, behaviour in behaviours.items():
        StubSectionWriter(state, behaviour, name)
    wanted = parse_config({key: value for key, value in OTHER.items() if key in changed})
    applied = asyncio.run(state.apply(wanted))
    for name, outcome in applied.outcomes.items():
        in_force = getattr(state.snapshot().config, SECTIONS[name]) == getattr(wanted, SECTIONS[name])
        expected = {"reject": "rejected", "pending": "pending"}.get(behaviours[name])
        assert outcome.status == (expected or ("applied" if in_force else "rejected"))
        assert in_force == (behaviours[name] in {"adopt", "pending"} or name not in changed)
        assert (outcome.reason == "") == (outcome.status == "applied")


def test_a_section_without_a_writer_is_never_applied_when_it_changes() -> None:
    """As when a new section is added to the schema and nothing applies it yet."""
    state = state_of()
    applied = asyncio.run(state.apply(parse_config({"telemetry": OTHER["telemetry"]})))
    assert applied.rejected == {"telemetry": "it is not in force"}


def test_a_writer_that_fails_leaves_its_section_rejected_until_it_has_applied_one() -> None:
    """Also if the configuration before is wanted again: the change may have been done by half."""
    state = state_of()
    writer = StubSectionWriter(state, "fail", "telemetry")
    with pytest.raises(RuntimeError):
        asyncio.run(state.apply(parse_config({"telemetry": OTHER["telemetry"]})))
    assert state.compare(parse_config({})).rejected == {"telemetry": "its last change failed halfway"}
    writer.behaviour = "adopt"
    assert asyncio.run(state.apply(parse_config({}))).is_complete
    assert state.compare(parse_config({})).is_complete


def test_a_pending_section_is_applied_when_its_writer_says_so() -> None:
    state = state_of()
    writer = StubSectionWriter(state, "pending", "model", "inference")
    wanted = parse_config({"inference": OTHER["inference"]})
    assert asyncio.run(state.apply(wanted)).pending.keys() == {"model", "inference"}
    writer.pending = False
    assert state.compare(wanted).is_complete


def test_a_section_has_one_writer() -> None:
    state = state_of()
    StubSectionWriter(state, "adopt", "http")
    for section in ("http", "no-such-section"):
        with pytest.raises(ValueError, match="does not exist or has a writer"):
            StubSectionWriter(state, "adopt", section)


def test_the_running_module_has_a_writer_for_every_section(tmp_path: Path) -> None:
    """So a section that is added to the schema needs one before it can be acknowledged."""
    service = Service(RunOptions(ConfigurationSources.read({}, None), tmp_path, environ={}))
    for section in SECTIONS:
        with pytest.raises(ValueError, match="has a writer"):
            StubSectionWriter(service.state, "adopt", section)
    service.executor.shutdown(wait=True)


def test_a_writer_cannot_change_the_sections_of_another() -> None:
    state = state_of()
    writer = StubSectionWriter(state, "adopt", "http")
    writer.handle.adopt(parse_config(OTHER))
    assert state.compare(parse_config({"http": OTHER["http"]})).is_complete


def test_an_outcome_for_each_section_is_required() -> None:
    with pytest.raises(ValueError, match="without an outcome"):
        Applied({"http": SectionOutcome("applied")})


def test_a_snapshot_does_not_change() -> None:
    state = state_of()
    writer = StubSectionWriter(state, "adopt", "http")
    before = state.snapshot()
    writer.handle.adopt(parse_config(OTHER))
    state.mark_stopping()
    assert before.config == parse_config({})
    assert before.readiness() == ["the engine is warming up"]
    assert state.snapshot().readiness() == ["stopping"]
