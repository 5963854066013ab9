"""The choice of the engine: right here, clearly faster here, within its time, and kept for the next start."""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from simulated_engines import BatchMs, HangError, SimulatedEngines, always
from visionedge.engine.engine_choice import (
    CHOICES_FOLDER,
    TIME_BUDGET_S,
    CandidateFigures,
    ChoiceCache,
    ChoiceKey,
    CrashRecord,
    EngineCandidate,
    EngineChoice,
    Progress,
    choose_engine,
    record_crash,
    run_with_limit,
)
from visionedge.engine.plan import OperatingPoint

ORT, ORT_INT8 = EngineCandidate("onnxruntime", "fp32"), EngineCandidate("onnxruntime", "int8")
OV, OV_BF16 = EngineCandidate("openvino", "fp32"), EngineCandidate("openvino", "bf16")
OV_INT8 = EngineCandidate("openvino", "int8")
GRAPHS = EngineCandidate("onnxruntime", "fp32", "CUDA graphs")
POINT = OperatingPoint(2, 1)


def engines(ms: Mapping[EngineCandidate, float | BatchMs]) -> SimulatedEngines:
    return SimulatedEngines(
        {name: always(each) if isinstance(each, (int, float)) else each for name, each in ms.items()}
    )


def choose(simulated: SimulatedEngines, crashes: CrashRecord | None = None) -> EngineChoice:
    return choose_engine(
        list(simulated.batch_ms),
        simulated,
        point=POINT,
        progress=Progress(TIME_BUDGET_S, simulated.clock),
        runner=simulated.runner,
        crashes=crashes,
    )


def figures(choice: EngineChoice, candidate: EngineCandidate) -> CandidateFigures:
    return next(each for each in choice.results if each.candidate == candidate)


# --- the fastest --------------------------------------------------------------------------------------------


def test_the_fastest_candidate_that_agrees_is_chosen_with_the_figures_of_all() -> None:
    choice = choose(engines({ORT: 16.0, OV: 12.6, OV_BF16: 9.0}))
    assert choice.candidate == OV_BF16
    assert choice.reason.startswith("openvino bf16 was measured 1.78 times as fast as onnxruntime fp32 here")
    assert choice.reason.endswith("100% of 40 boxes agree here")
    assert [each.note for each in choice.results] == [
        "openvino bf16 is 1.78 times as fast",
        "1.27 times as fast as onnxruntime fp32",
        "",
    ]
    assert choice.ms == {"fp32": 12.6, "bf16": 9.0}
    assert figures(choice, OV_BF16).frames_per_s == pytest.approx(2000 / 9)


@pytest.mark.parametrize(("openvino_ms", "chosen"), [(10.0, ORT), (9.8, ORT), (9.6, ORT), (9.3, OV)])
def test_on_equality_onnxruntime_wins(openvino_ms: float, chosen: EngineCandidate) -> None:
    choice = choose(engines({ORT: 10.0, OV: openvino_ms}))
    assert choice.candidate == chosen
    if chosen == ORT:
        assert "no clear gain" in figures(choice, OV).note


def test_a_lower_precision_must_gain_more() -> None:
    """It costs accuracy: a tenth at least."""
    assert choose(engines({ORT: 10.0, ORT_INT8: 9.3})).candidate == ORT
    assert choose(engines({ORT: 10.0, ORT_INT8: 9.0})).candidate == ORT_INT8


def test_of_two_that_are_equally_fast_the_first_is_chosen() -> None:
    choice = choose(engines({ORT: 20.0, ORT_INT8: 10.1, OV_INT8: 10.0}))
    assert choice.candidate == ORT_INT8


def test_the_second_measurement_on_all_lanes_decides() -> None:
    """Alone openvino is faster; two lanes of it get in each other's way."""
    choice = choose(engines({ORT: 10.0, OV: lambda point: 8.0 if point.lanes == 1 else 14.0}))
    assert choice.candidate == ORT
    assert figures(choice, OV).note == "0.71 times as fast as onnxruntime fp32: no clear gain"


def test_a_candidate_that_is_a_little_slower_alone_may_win_on_all_lanes() -> None:
    choice = choose(engines({ORT: lambda point: 10.0 * point.lanes, OV: 10.5}))
    assert choice.candidate == OV


def test_at_most_three_are_measured_again() -> None:
    ms = {ORT: 20.0, ORT_INT8: 15.0, OV: 14.0, OV_BF16: 10.0, OV_INT8: 9.0}
    simulated = engines(ms)
    choice = choose(simulated)
    assert choice.candidate == OV_INT8
    assert [each.candidate for each in choice.results if each.frames_per_s] == [ORT, OV_BF16, OV_INT8]
    assert figures(choice, OV).note == "others are faster alone (1.43 times as fast)"
    assert simulated.count("check", OV) == 0


def test_a_slow_candidate_is_neither_checked_nor_measured_again() -> None:
    simulated = engines({ORT: 10.0, OV: 15.0})
    choice = choose(simulated)
    assert figures(choice, OV).note == "0.67 times as fast as onnxruntime fp32 alone"
    assert simulated.count("check", OV) == 0


def test_a_temporarily_slow_machine_does_not_change_the_choice() -> None:
    """All are slow in the same rounds: they are compared round by round."""
    simulated = engines({ORT: 10.0, OV: 10.0, OV_BF16: 7.0})
    simulated.slower = lambda now_s: 6.0 if int(now_s) % 2 else 1.0
    assert choose(simulated).candidate == OV_BF16


def test_an_option_of_a_device_is_used_only_where_it_is_right_and_faster() -> None:
    assert choose(engines({ORT: 4.0, GRAPHS: 3.0})).candidate == GRAPHS
    assert choose(engines({ORT: 4.0, GRAPHS: 4.0})).candidate == ORT
    wrong = engines({ORT: 4.0, GRAPHS: 3.0})
    wrong.refusals = {GRAPHS: "only 10.0% of the boxes agree"}
    assert choose(wrong).candidate == ORT


@pytest.mark.parametrize(("share", "settled"), [(0.9, True), (0.6, False)])
def test_a_choice_from_a_busy_machine_is_used_and_not_kept(share: float, *, settled: bool) -> None:
    """To stay with onnxruntime, less of the processor suffices."""
    simulated = engines({ORT: 16.0, OV_BF16: 9.0})
    simulated.cpu_share = share
    choice = choose(simulated)
    assert (choice.candidate, choice.settled) == (OV_BF16, settled)
    assert ("other processes left only 60% of the processor" in choice.reason) is not settled
    same = engines({ORT: 16.0, OV: 16.0})
    same.cpu_share = share
    assert choose(same).settled
    same.cpu_share = 0.3
    assert not choose(same).settled


@pytest.mark.parametrize(("share", "settled"), [(0.9, True), (0.3, False)])
def test_candidates_that_give_no_answer_on_a_busy_machine_are_tried_again(
    share: float, *, settled: bool
) -> None:
    """When all of them have failed, the reference alone shows how busy the machine is."""
    simulated = engines({ORT: 16.0, OV_BF16: 9.0})
    simulated.failures = {(OV_BF16, "open"): HangError()}
    simulated.cpu_share = share
    choice = choose(simulated)
    assert (choice.candidate, choice.settled) == (ORT, settled)


# --- candidates that cannot be used -------------------------------------------------------------------------


def test_a_candidate_that_disagrees_is_not_used_at_any_speed_and_the_next_is_checked() -> None:
    simulated = engines({ORT: 20.0, ORT_INT8: 15.0, OV: 14.0, OV_INT8: 2.0})
    simulated.refusals = {OV_INT8: "only 50.0% of the boxes agree, 90.0% are wanted"}
    choice = choose(simulated)
    assert choice.candidate == OV
    assert figures(choice, OV_INT8).note == (
        "its results differ: only 50.0% of the boxes agree, 90.0% are wanted"
    )
    assert simulated.count("check", ORT_INT8) == 1


@pytest.mark.parametrize("step", ["open", "measure", "check"])
@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (RuntimeError("no kernel\nfor it"), "no kernel for it"),
        (MemoryError(), "MemoryError"),
        (HangError(), "gave no answer within"),
    ],
)
def test_a_candidate_that_fails_or_hangs_is_excluded_and_the_others_go_on(
    step: str, failure: Exception, words: str
) -> None:
    simulated = engines({ORT: 16.0, OV: 12.0, OV_BF16: 9.0})
    simulated.failures = {(OV_BF16, step): failure}
    choice = choose(simulated)
    assert choice.candidate == OV
    assert words in figures(choice, OV_BF16).note
    assert simulated.now_s <= TIME_BUDGET_S - 4


def test_an_error_of_the_reference_is_raised() -> None:
    simulated = engines({ORT: 16.0, OV: 12.0})
    simulated.failures = {(ORT, "measure"): RuntimeError("out of memory")}
    with pytest.raises(RuntimeError, match="out of memory"):
        choose(simulated)


# --- the time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("picture_ms", [2.0, 15.0, 100.0, 400.0])
@pytest.mark.parametrize("open_s", [0.1, 1.0, 3.0, 5.5])
def test_the_budget_is_kept_whatever_the_model_costs(picture_ms: float, open_s: float) -> None:
    """Five seconds stay for the plan; one step may overrun."""
    factors = {ORT: 1.0, ORT_INT8: 0.7, OV: 0.9, OV_BF16: 0.6, OV_INT8: 0.5}
    simulated = engines({name: factor * picture_ms for name, factor in factors.items()})
    simulated.open_s = open_s
    simulated.check_s = min(3.0, 0.03 * picture_ms)
    choice = choose(simulated)
    assert simulated.now_s <= TIME_BUDGET_S - 3
    assert len(choice.results) == 5
    if open_s <= 1.0 and picture_ms <= 100:
        assert choice.candidate == OV_INT8


def test_what_there_was_no_time_for_is_named() -> None:
    simulated = engines({ORT: 10.0, OV: 9.0, OV_BF16: 5.0})
    simulated.open_s = 8.0
    choice = choose(simulated)
    assert choice.candidate == ORT
    assert figures(choice, OV_BF16).note == "there was no time to try it"
    assert figures(choice, OV).note == "there was no time to measure it"


def test_progress_is_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    simulated = engines({ORT: 16.0, OV: 12.0, OV_BF16: 9.0})
    choose(simulated)
    first, *lines = [record.message for record in caplog.records]
    assert first == "measuring which of 3 engines is the fastest on this machine: at most 15 s, once"
    seconds = [line.split(" s", 1)[0] for line in lines]
    assert len(lines) == len(set(seconds))
    assert abs(len(lines) - int(simulated.now_s)) <= 1
    assert lines[0].startswith("measuring, 1 of at most 15 s: ")


def test_a_step_that_hangs_is_left_behind_on_its_thread() -> None:
    release, seconds = threading.Event(), list[int]()
    with pytest.raises(TimeoutError, match="gave no answer within 0 s"):
        run_with_limit(release.wait, 0.0, lambda: seconds.append(1))
    assert seconds == [1]
    release.set()
    for thread in threading.enumerate():
        if thread.name == "engine-trial":
            thread.join()


def test_a_step_gives_its_result_or_raises_its_error() -> None:
    assert run_with_limit(lambda: 7, 5.0, lambda: None) == 7

    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        run_with_limit(fail, 5.0, lambda: None)


# --- candidates that end the process ------------------------------------------------------------------------


def choose_and_die(folder: Path, key: ChoiceKey) -> None:
    """The process ends while openvino bf16 is opened."""
    record = ChoiceCache(folder).crash_record(key)
    record.begin(OV_BF16)


def test_a_candidate_that_crashed_the_process_is_not_tried_again(tmp_path: Path) -> None:
    choose_and_die(tmp_path, KEY)
    assert record_crash(tmp_path)
    simulated = engines({ORT: 16.0, OV: 12.0, OV_BF16: 9.0})
    record = ChoiceCache(tmp_path).crash_record(KEY)
    choice = choose(simulated, record)
    assert choice.candidate == OV
    assert figures(choice, OV_BF16).note == "ended the engine's process when it was tried"
    assert simulated.count("open", OV_BF16) == 0
    record.clear()
    assert list((tmp_path / CHOICES_FOLDER).iterdir()) == []


def test_a_process_that_was_ended_from_outside_excludes_nothing_at_first(tmp_path: Path) -> None:
    """It may happen at any time; the second time at the same candidate is no accident."""
    choose_and_die(tmp_path, KEY)
    assert choose(engines({ORT: 16.0, OV_BF16: 9.0}), ChoiceCache(tmp_path).crash_record(KEY)).candidate == (
        OV_BF16
    )
    choose_and_die(tmp_path, KEY)
    assert (
        choose(engines({ORT: 16.0, OV_BF16: 9.0}), ChoiceCache(tmp_path).crash_record(KEY)).candidate == ORT
    )


def test_a_crash_at_another_time_says_nothing_about_candidates(tmp_path: Path) -> None:
    assert not record_crash(tmp_path)
    assert not record_crash(None)
    record = ChoiceCache(tmp_path).crash_record(KEY)
    choose(engines({ORT: 16.0, OV_BF16: 9.0}), record)
    assert not record_crash(tmp_path)


# --- the cache ----------------------------------------------------------------------------------------------

KEY = ChoiceKey(
    (("onnxruntime fp32", "ab" * 32), ("openvino bf16", "ab" * 32)),
    "cpu",
    "Example CPU",
    ("avx2", "avx512_bf16"),
    ("visionedge 0.2.0", "onnxruntime 1.31.1", "openvino 2026.4.1"),
    2,
    POINT,
)
CHOICE = EngineChoice(
    OV_BF16,
    "because",
    (
        CandidateFigures(ORT, 16.0, 120.0, 1.0, note="openvino bf16 is 1.80 times as fast"),
        CandidateFigures(OV_BF16, 9.0, 220.0, 1.8, "all agree"),
    ),
)


def test_a_choice_is_kept_for_its_key(tmp_path: Path) -> None:
    cache = ChoiceCache(tmp_path)
    assert cache.is_empty()
    cache.store(KEY, CHOICE)
    assert not cache.is_empty()
    assert cache.load(KEY) == CHOICE


@pytest.mark.parametrize(
    "change",
    [
        lambda key: replace(key, candidates=(*key.candidates, ("openvino int8", "cd" * 32))),
        lambda key: replace(key, candidates=(key.candidates[0], ("openvino bf16", "cd" * 32))),
        lambda key: replace(key, device="cuda"),
        lambda key: replace(key, hardware="Another CPU"),
        lambda key: replace(key, cpu_flags=("avx2",)),
        lambda key: replace(key, versions=(*key.versions[:2], "openvino 2026.5.0")),
        lambda key: replace(key, cores=4),
        lambda key: replace(key, point=OperatingPoint(4, 1)),
    ],
)
def test_a_change_of_any_part_of_the_key_is_measured_again(
    tmp_path: Path, change: Callable[[ChoiceKey], ChoiceKey]
) -> None:
    cache = ChoiceCache(tmp_path)
    cache.store(KEY, CHOICE)
    assert cache.load(change(KEY)) is None


def test_a_key_names_this_machine_and_its_versions() -> None:
    key = ChoiceKey.of({ORT: b"graph", OV_BF16: b"graph"}, device="cpu", cores=2, point=POINT)
    assert [name for name, _ in key.candidates] == ["onnxruntime fp32", "openvino bf16"]
    assert key.versions[0].startswith("visionedge ")
    assert any(version.startswith("onnxruntime") for version in key.versions)
    assert key.hardware


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "{",
        lambda _: "[]",
        lambda document: json.dumps(document | {"schema": "visionedge/precision/2"}),
        lambda document: json.dumps(document | {"choice": {}}),
        lambda document: json.dumps({**document, "choice": document["choice"] | {"runtime": "tflite"}}),
        lambda document: json.dumps({**document, "choice": document["choice"] | {"precision": "fp8"}}),
        lambda document: json.dumps({**document, "choice": document["choice"] | {"candidates": [1]}}),
    ],
)
def test_a_damaged_choice_is_set_aside_and_measured_again(
    tmp_path: Path, damage: Callable[[dict[str, object]], str], caplog: pytest.LogCaptureFixture
) -> None:
    cache = ChoiceCache(tmp_path)
    cache.store(KEY, CHOICE)
    (entry,) = cache.folder.glob("*.json")
    entry.write_text(damage(json.loads(entry.read_text())))
    assert cache.load(KEY) is None
    assert "measuring the engines again" in caplog.text
    assert not entry.exists()


def test_a_choice_that_cannot_be_saved_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / CHOICES_FOLDER).write_text("a file, where the folder should be")
    ChoiceCache(tmp_path).store(KEY, CHOICE)
    assert "the next start measures again" in caplog.text


def test_a_data_folder_that_cannot_be_reached_keeps_nothing_and_stops_nothing(tmp_path: Path) -> None:
    """Its name is too long, an error that root meets, too, as other users do without permission."""
    data = tmp_path / ("n" * 300)
    cache = ChoiceCache(data)
    assert cache.is_empty()
    assert cache.load(KEY) is None
    assert choose(engines({ORT: 16.0, OV_BF16: 9.0}), cache.crash_record(KEY)).candidate == OV_BF16
    cache.store(KEY, CHOICE)
    assert not record_crash(data)


def test_only_the_newest_choices_are_kept(tmp_path: Path) -> None:
    cache = ChoiceCache(tmp_path)
    for cores in range(1, 40):
        cache.store(replace(KEY, cores=cores), CHOICE)
    assert len(list(cache.folder.glob("*.json"))) == 32
    assert cache.load(replace(KEY, cores=39)) == CHOICE
