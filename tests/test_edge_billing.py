"""What messages cost: blocks, the meter, documents that fill their blocks, and the estimate."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test_edge_telemetry import MAN, World, documents
from visionedge.__main__ import main
from visionedge.config import Config, validate
from visionedge.edge.billing import BLOCK_BYTES, Meter, blocks
from visionedge.edge.messages import EncodedFrame, Sender, batch_messages, envelope_bytes
from visionedge.edge.packing import WELL_FILLED, Weigher, well_filled
from visionedge.errors import ConfigError
from visionedge.ops.estimate import Assumed, estimate

SENDER = Sender("press-7", "vision", "a1b2c3")
MINUTE_NS = 60_000_000_000


def frame(size: int, camera: str = "dock", labels: tuple[str, ...] = ("person",)) -> EncodedFrame:
    """A frame of so many bytes."""
    return EncodedFrame(b'"' + b"x" * (size - 2) + b'"', camera, 0.5, frozenset(labels))


# --- blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(0, 1), (1, 1), (4096, 1), (4097, 2), (200_000, 49)])
def test_a_message_is_metered_in_blocks_of_4_kb(size: int, count: int) -> None:
    """Begun blocks count whole."""
    assert blocks(size) == count


def test_the_meter_projects_the_last_hour_to_a_day() -> None:
    """One block a second is 86,400 a day, a good fifth of an S1 unit; what is older than an hour is past."""
    now = [0]
    meter = Meter(lambda: now[0])
    for _ in range(3600):
        now[0] += 1_000_000_000
        meter.count("detections", 4000)
    bill = meter.bill()
    assert bill.blocks_per_day == pytest.approx(86_400, rel=0.02)
    assert bill.shares["S1"] == pytest.approx(0.216, rel=0.02)
    assert bill.shares["S2"] == pytest.approx(0.0144, rel=0.02)
    assert (bill.messages, bill.blocks) == ({"detections": 3600}, {"detections": 3600})
    assert bill.fill == pytest.approx(4000 / 4096)

    now[0] += 61 * MINUTE_NS
    assert meter.bill().blocks_per_day == 0
    assert meter.bill().blocks == {"detections": 3600}


def test_the_first_seconds_project_nothing_wild() -> None:
    """Ten messages at the start are ten in a minute, not ten in a second."""
    meter = Meter(lambda: 1)
    for _ in range(10):
        meter.count("events", 300)
    assert meter.bill().blocks_per_day == 14_400


# --- packing ----------------------------------------------------------------------------------------------

FRAMES = st.lists(
    st.builds(
        frame,
        st.integers(200, 9000),
        st.sampled_from(["dock", "gate", "yard-with-a-long-name"]),
        st.sampled_from([("person",), ("person", "car"), ()]),
    ),
    max_size=80,
)


@given(FRAMES)
@settings(max_examples=150, deadline=None)
def test_the_weigher_never_says_less_than_the_message_weighs(frames: list[EncodedFrame]) -> None:
    """And hardly more: a block that it calls full is not split in two by IoT Hub."""
    weigher = Weigher(envelope_bytes(SENDER, 7))
    for each in frames:
        weigher.add(each)
    if frames and weigher.fits:
        [message] = batch_messages(SENDER, 7, frames)
        assert message.size_bytes <= weigher.size_bytes <= message.size_bytes + 200


@given(FRAMES)
@settings(max_examples=150, deadline=None)
def test_frames_go_only_when_their_blocks_are_well_used(frames: list[EncodedFrame]) -> None:
    """What is not sent yet would not fill its blocks, however it were cut."""
    envelope = envelope_bytes(SENDER, 7)
    count = well_filled(frames, envelope)
    if count:
        [message] = batch_messages(SENDER, 7, frames[:count])
        assert message.size_bytes + 200 >= WELL_FILLED * BLOCK_BYTES * blocks(message.size_bytes)
    longer = Weigher(envelope)
    for number, each in enumerate(frames, 1):
        longer.add(each)
        assert number <= count or not longer.fits or not longer.filled


def test_a_message_that_is_as_large_as_one_may_be_goes_whatever_its_blocks() -> None:
    """The limit of 200 KB comes first."""
    frames = [frame(60_000) for _ in range(5)]
    assert 0 < well_filled(frames, envelope_bytes(SENDER, 1)) <= 3


def test_after_the_interval_frames_wait_for_their_block_to_fill_but_not_for_ever() -> None:
    """`fillSeconds` later the last ones go, full or not."""
    world = World()
    telemetry = world.telemetry(mode="all", intervalSeconds=1, fillSeconds=4)
    telemetry.offer(world.result([MAN]))
    assert telemetry.due(world.pass_s(4.9)) == []
    telemetry.offer(world.result([MAN]))
    [document] = documents(telemetry.due(world.pass_s(0.1)))
    assert len(document["frames"]) == 2


def test_a_block_that_is_full_goes_at_the_end_of_the_interval_and_the_rest_waits() -> None:
    """Whole blocks now, the begun one with the next."""
    world = World()
    telemetry = world.telemetry(mode="all", intervalSeconds=1, fillSeconds=60)
    for _ in range(20):
        telemetry.offer(world.result([MAN] * 2))
        world.pass_s(0.05)
    [message] = telemetry.due(world.now_ns)
    assert 0 < telemetry.statistics().waiting < 20
    assert message.size_bytes >= WELL_FILLED * BLOCK_BYTES * blocks(message.size_bytes)
    assert telemetry.statistics().bill.blocks == {"detections": blocks(message.size_bytes)}


def test_in_a_steady_stream_hardly_any_block_is_wasted() -> None:
    """Four cameras at five frames a second, for ten minutes."""
    made = estimate(config(mode="all"), Assumed())
    assert made.document()["blockFill"] > 0.9
    assert made.messages_per_day < 90_000


# --- the estimate -----------------------------------------------------------------------------------------


def config(**telemetry: object) -> Config:
    """Four cameras at five frames a second."""
    cameras = {f"cam-{n}": {"uri": f"rtsp://192.0.2.{n}/s", "fps": 5} for n in range(1, 5)}
    return validate({"cameras": cameras, "telemetry": telemetry})


def test_the_estimate_counts_what_the_policy_would_send() -> None:
    """`all` costs more than `changes`, that more than `none`; the heartbeat alone is one a minute."""
    everything = estimate(config(mode="all"), Assumed())
    changes = estimate(config(mode="changes"), Assumed())
    quiet = estimate(config(mode="changes"), Assumed(changes_per_minute=0))
    silent = estimate(config(mode="none"), Assumed())
    assert everything.blocks_per_day > changes.blocks_per_day > quiet.blocks_per_day
    assert quiet.messages_per_day == pytest.approx(1440, rel=0.1)
    assert silent.blocks_per_day == 0
    assert everything.units("S1")[1] == 1
    assert everything.units("S1")[0] > everything.units("S2")[0]


def test_the_estimate_says_when_the_budget_is_spent() -> None:
    """And bills only what goes out."""
    made = estimate(config(mode="all", maxPerDay=7200, intervalSeconds=1), Assumed())
    document = made.document()
    assert document["budgetLastsHours"] == pytest.approx(24 * 7200 / made.messages_per_day, abs=0.1)
    assert document["billedBlocksPerDay"] < document["blocksPerDay"] / 5


def test_many_cameras_take_many_units() -> None:
    """Units are whole ones."""
    cameras = {f"cam-{n}": {"uri": "demo:", "fps": 25} for n in range(24)}
    made = estimate(
        validate({"cameras": cameras, "telemetry": {"mode": "all", "maxPerDay": 10**9}}), Assumed()
    )
    share, units = made.units("S1")
    assert units == int(share) + 1 > 10


def test_without_a_camera_there_is_nothing_to_estimate() -> None:
    """The remedy is named."""
    with pytest.raises(ConfigError, match="--config"):
        estimate(validate({}), Assumed())


def test_the_verb_prints_words_or_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`manifest estimate --config FILE [--json]`."""
    path = tmp_path / "vision.yaml"
    path.write_text("cameras: {dock: {uri: 'demo:', fps: 2}}\ntelemetry: {mode: all}\n")
    assert main(["manifest", "estimate", "--config", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cameras"] == 1
    assert document["units"]["S1"]["units"] == 1
    assert main(["manifest", "estimate", "--config", str(path), "--detections", "0"]) == 0
    assert "of a unit's day" in capsys.readouterr().out
