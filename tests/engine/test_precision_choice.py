"""The choice of the precision: faster here, in agreement with fp32 here, with a one-line reason."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tiny_models import TinyDetector
from visionedge.engine.precision_choice import (
    PRECISION_FOLDER,
    OutputDistance,
    PrecisionCandidate,
    PrecisionTrials,
    VariantAgreement,
    apply_agreement,
    check_agreement,
    pick_precision,
)
from visionedge.frames.types import Detections
from visionedge.model.compiler.build import CACHE_FOLDER as COMPILED
from visionedge.model.compiler.build import load_or_compile_with_batch
from visionedge.model.model import Model, load_model
from visionedge.model.parity import Parity, Tolerance
from visionedge.model.quantization.variants import (
    _list_reports,
    find_variants,
    make_tolerance_document,
    make_variant_path,
    save_variant,
)
from visionedge.runtime.measurement import PrecisionChoice, choose_fastest

GOOD = Parity(pictures=8, boxes=100, matched=0.97, score_shift=0.01, max_score_shift=0.1)
FASTER = PrecisionChoice("int8", "measured 2.00 times as fast as fp32 here (fp32 20.0 ms, int8 10.0 ms)", {})


class FakeClock:
    """A clock that only simulated work advances."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def takes(self, ms: Iterator[float]) -> Callable[[], None]:
        """A run that takes so long each time."""

        def run() -> None:
            self.now_ns += int(next(ms) * 1e6)

        return run


def always(ms: float) -> Iterator[float]:
    while True:
        yield ms


# --- the contest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("int8_ms", "precision", "words"),
    [
        (10.0, "int8", "measured 2.00 times as fast as fp32"),
        (19.0, "fp32", "no gain"),
        (40.0, "fp32", "0.50"),
    ],
)
def test_a_clearly_faster_variant_wins(int8_ms: float, precision: str, words: str) -> None:
    """By a tenth at least; else fp32 stays, with the figures in the reason."""
    clock = FakeClock()
    runs = {"fp32": clock.takes(always(20.0)), "int8": clock.takes(always(int8_ms))}
    choice = choose_fastest(runs, clock=clock)
    assert choice.precision == precision
    assert words in choice.reason
    assert choice.ms == {"fp32": 20.0, "int8": int8_ms}


def test_a_temporarily_slow_machine_does_not_change_the_choice() -> None:
    """Both are slow in the same rounds: they are held against each other round by round."""

    def slow_phases(ms: float) -> Iterator[float]:
        while True:
            yield from [ms, ms * 9, ms, ms * 4, ms * 9]

    clock = FakeClock()
    choice = choose_fastest(
        {"fp32": clock.takes(slow_phases(20.0)), "int8": clock.takes(slow_phases(10.0))},
        clock=clock,
        budget_s=9,
    )
    assert choice.precision == "int8"
    assert "2.00 times" in choice.reason


def test_a_choice_reads_back_as_it_was_written() -> None:
    choice = PrecisionChoice("int8", "because", {"fp32": 2.5, "int8": 1.25})
    assert PrecisionChoice.from_document(json.loads(json.dumps(choice.document()))) == choice


# --- whether it sees the same here --------------------------------------------------------------------------


def seen(count: int, score: float = 0.8, first: int = 0) -> list[Detections]:
    """So many boxes side by side on one picture."""
    left = np.arange(first, first + count)[:, None] * 0.01
    boxes = np.concatenate([left, left * 0, left + 0.009, left * 0 + 0.5], axis=1).astype(np.float32)
    return [Detections(boxes, np.full(count, score, np.float32), np.zeros(count, np.int32))]


def must_not_measure() -> OutputDistance:
    raise AssertionError("there were boxes enough")


def test_agreeing_boxes_admit_the_variant_and_are_reported() -> None:
    found = check_agreement(seen(20), seen(20, 0.79), Tolerance(), must_not_measure)
    assert found == VariantAgreement("100% of 40 boxes agree here")


def test_disagreeing_boxes_reject_the_variant_with_the_figure() -> None:
    """Ten of each side have no partner."""
    found = check_agreement(seen(20), seen(20, first=10), Tolerance(), must_not_measure)
    assert found.refusal == "only 50.0% of the boxes agree, 90.0% are wanted"


def test_the_tolerance_of_the_variant_counts() -> None:
    """As requested when the variant was made."""
    assert check_agreement(seen(20), seen(20, first=4), Tolerance(), must_not_measure).refusal is not None
    assert (
        check_agreement(seen(20), seen(20, first=4), Tolerance(unmatched=0.3), must_not_measure).refusal
        is None
    )


@pytest.mark.parametrize(
    ("apart", "refusal"),
    [
        (OutputDistance(quantization=0.15, kernels=0.05), None),
        (
            OutputDistance(quantization=0.15, kernels=0.4),
            "the integer kernels here add a difference of 0.40 to the 0.15 of quantization",
        ),
        (
            OutputDistance(0.1, float("nan")),
            "the integer kernels here add a difference of nan to the 0.10 of quantization",
        ),
        (None, None),
    ],
)
def test_with_too_few_boxes_the_raw_rows_are_compared(
    apart: OutputDistance | None, refusal: str | None
) -> None:
    """A model for other things than the clip shows; without integers its report has to do."""
    found = check_agreement(seen(2), seen(2), Tolerance(), lambda: apart)
    assert found.refusal == refusal
    assert bool(found.message) == (refusal is None)


def test_the_reason_of_a_choice_has_speed_and_agreement() -> None:
    kept = apply_agreement(FASTER, VariantAgreement("98% of 50 boxes agree here"))
    assert (kept.precision, kept.reason) == ("int8", f"{FASTER.reason}; 98% of 50 boxes agree here")
    refused = apply_agreement(FASTER, VariantAgreement("", "only 50.0% of the boxes agree, 90.0% are wanted"))
    assert refused.precision == "fp32"
    assert refused.reason.startswith("int8 is not used: only 50.0% of the boxes agree")
    assert "2.00 times as fast" in refused.reason


# --- the pick -----------------------------------------------------------------------------------------------


class FakeSession:
    """Knows its graph, and whether it was closed."""

    def __init__(self, graph: bytes) -> None:
        self.graph = graph
        self.closed = False

    def close(self) -> None:
        self.closed = True


class ChoiceHarness:
    """A model with an int8 variant beside it; times and judgement are scripted."""

    def __init__(
        self, folder: Path, agreed: VariantAgreement, *, compiled: Path | None = None, unusable: bool = False
    ) -> None:
        self.data = folder / "data"
        self.data.mkdir()
        if compiled is not None:
            (self.data / COMPILED).symlink_to(compiled)
        self.model = load_model(TinyDetector().save(folder / "tiny.onnx"))
        self.agreed = agreed
        self.unusable = unusable
        self.opened: list[FakeSession] = []
        self.judged = 0
        self.timed: list[str] = []

    def keep_variant(self, parity: Parity = GOOD, seed: int = 1) -> None:
        report = {
            "recipe": "a test's",
            "parity": parity.document(),
            "tolerance": make_tolerance_document(Tolerance()),
            "made": {"at": "2026-01-01T00:00:00Z"},
        }
        other = TinyDetector(seed=seed).proto()
        save_variant(make_variant_path(self.model, "int8"), other, self.model, "int8", report)

    def open(self, graph: bytes) -> FakeSession:
        if self.unusable:
            raise RuntimeError("no kernel for it")
        self.opened.append(FakeSession(graph))
        return self.opened[-1]

    def run_of(self, candidate: PrecisionCandidate[FakeSession]) -> Callable[[], object]:
        """fp32 takes much longer: it counts first."""
        name = candidate.model.path.name
        work = 30_000 if name == "tiny.onnx" else 10

        def run() -> int:
            self.timed.append(name)
            return sum(range(work))

        return run

    def judge(
        self,
        fp32: PrecisionCandidate[FakeSession],
        variant: PrecisionCandidate[FakeSession],
        tolerance: Tolerance,
    ) -> VariantAgreement:
        assert (fp32.model.path.name, variant.model.path.name) == ("tiny.onnx", "tiny.int8.onnx")
        assert tolerance == Tolerance()
        self.judged += 1
        return self.agreed

    def picked(
        self, device: str = "cpu", *, measuring: bool = True
    ) -> tuple[PrecisionCandidate[FakeSession], PrecisionChoice]:
        model, graph = load_or_compile_with_batch(self.model, self.data)
        fp32 = PrecisionCandidate(model, graph, FakeSession(graph))
        trials = PrecisionTrials(self.open, self.run_of, self.judge)
        chosen, choice = pick_precision(
            fp32, self.model, device=device, data=self.data, trials=trials, measuring=measuring
        )
        assert chosen.session.closed is False
        assert fp32.session.closed is (chosen is not fp32)
        return chosen, choice


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled graphs are kept: the same few in every test."""
    return tmp_path_factory.mktemp("compiled")


AGREES, DIFFERS = VariantAgreement("all agree"), VariantAgreement("", "only 10.0% of the boxes agree")


def test_a_variant_that_is_faster_and_agrees_is_used(tmp_path: Path, compiled: Path) -> None:
    scene = ChoiceHarness(tmp_path, AGREES, compiled=compiled)
    scene.keep_variant()
    chosen, choice = scene.picked()
    assert choice.precision == "int8"
    assert choice.reason.endswith("; all agree")
    assert chosen.model.path.name == "tiny.int8.onnx"


def test_a_disagreeing_variant_is_not_used_at_any_speed(tmp_path: Path, compiled: Path) -> None:
    """Its report accepts it, which may be correct on the machine of the report."""
    scene = ChoiceHarness(tmp_path, DIFFERS, compiled=compiled)
    scene.keep_variant()
    _, choice = scene.picked()
    assert choice.precision == "fp32"
    assert choice.reason.startswith("int8 is not used: only 10.0% of the boxes agree (it was measured")
    assert all(session.closed for session in scene.opened)


@pytest.mark.parametrize("agreed", [AGREES, DIFFERS])
def test_a_choice_is_saved_and_not_measured_again(
    tmp_path: Path, compiled: Path, agreed: VariantAgreement
) -> None:
    scene = ChoiceHarness(tmp_path, agreed, compiled=compiled)
    scene.keep_variant()
    first = scene.picked()[1]
    timed = len(scene.timed)
    again = scene.picked()[1]
    assert (again.precision, again.reason) == (first.precision, first.reason)
    assert (len(scene.timed), scene.judged) == (timed, 1)


def test_without_measurement_a_saved_choice_is_used(tmp_path: Path, compiled: Path) -> None:
    """And fp32 where nothing was, without as much as opening a variant."""
    scene = ChoiceHarness(tmp_path, AGREES, compiled=compiled)
    scene.keep_variant()
    assert scene.picked(measuring=False)[1] == PrecisionChoice("fp32", "nothing was measured", {})
    assert scene.opened == []
    scene.picked()
    timed = len(scene.timed)
    assert scene.picked(measuring=False)[1].precision == "int8"
    assert (len(scene.timed), scene.judged) == (timed, 1)


def test_another_variant_is_judged_again(tmp_path: Path, compiled: Path) -> None:
    """The choice belongs to exactly these graphs."""
    scene = ChoiceHarness(tmp_path, AGREES, compiled=compiled)
    scene.keep_variant(seed=1)
    scene.picked()
    scene.keep_variant(seed=2)
    scene.picked()
    assert scene.judged == 2


def test_a_choice_from_before_the_comparison_is_ignored(tmp_path: Path, compiled: Path) -> None:
    scene = ChoiceHarness(tmp_path, DIFFERS, compiled=compiled)
    scene.keep_variant()
    scene.picked()
    (entry,) = (scene.data / PRECISION_FOLDER).iterdir()
    old = {"schema": "visionedge/precision/1", "choice": FASTER.document()}
    entry.write_text(json.dumps(old))
    assert scene.picked()[1].precision == "fp32"
    entry.write_text("{")
    assert scene.picked()[1].precision == "fp32"
    assert scene.judged == 3


def test_a_variant_refused_by_its_report_is_excluded(tmp_path: Path, compiled: Path) -> None:
    scene = ChoiceHarness(tmp_path, AGREES, compiled=compiled)
    scene.keep_variant(Parity(pictures=8, boxes=100, matched=0.5, score_shift=0.01, max_score_shift=0.1))
    _, choice = scene.picked()
    assert (choice.precision, scene.opened, scene.judged) == ("fp32", [], 0)
    assert choice.reason.startswith(
        "the model file is used as it is: its int8 variant is refused by its report: "
    )


def test_int8_is_used_only_on_cpus(tmp_path: Path, compiled: Path) -> None:
    """On a GPU they are not even opened."""
    scene = ChoiceHarness(tmp_path, AGREES, compiled=compiled)
    scene.keep_variant()
    _, choice = scene.picked("cuda")
    assert choice.reason == "the model file is used as it is: its int8 variant is not used on cuda"
    assert scene.opened == []


def test_a_variant_that_cannot_be_opened_is_excluded(tmp_path: Path, compiled: Path) -> None:
    scene = ChoiceHarness(tmp_path, AGREES, compiled=compiled, unusable=True)
    scene.keep_variant()
    _, choice = scene.picked()
    assert choice.precision == "fp32"
    assert choice.reason == "the model file is used as it is: its int8 variant does not run here"


def test_the_reason_for_an_int8_model_file_names_it(tmp_path: Path) -> None:
    """The reason does not mention an unsuitable precision if no variant exists."""
    model, network = load_model(TinyDetector().save(tmp_path / "tiny.onnx")), TinyDetector().proto()
    trials = PrecisionTrials(FakeSession, lambda _: lambda: None, lambda *_: AGREES)

    def reason() -> str:
        graph = network.SerializeToString()
        fp32 = PrecisionCandidate(model, graph, FakeSession(graph))
        return pick_precision(fp32, model, device="cpu", data=None, trials=trials)[1].reason

    assert reason() == "the model file is used as it is: no variant of it in another precision was found"
    network.graph.node.add(op_type="QLinearConv")
    assert reason() == (
        "the model file is used as it is (it computes in 8-bit integers): "
        "no variant of it in another precision was found"
    )


# --- the variants that are there ----------------------------------------------------------------------------


def kept(folder: Path) -> tuple[Model, Path]:
    scene = ChoiceHarness(folder, AGREES)
    scene.keep_variant()
    return scene.model, make_variant_path(scene.model, "int8")


def test_a_variant_is_found_beside_its_model(tmp_path: Path) -> None:
    model, path = kept(tmp_path)
    (found,) = find_variants(model)
    assert (found.precision, found.path, found.parity, found.refusal) == ("int8", path, GOOD, None)
    assert found.of(model).interpretation == model.interpretation


@pytest.mark.parametrize("harm", ["network", "report", "size", "gone", "schema", "other model"])
def test_a_damaged_or_foreign_variant_is_excluded(tmp_path: Path, harm: str) -> None:
    """With a word in the log, and without an error: fp32 is always there."""
    model, path = kept(tmp_path)
    report = path.with_suffix(".json")
    document = json.loads(report.read_bytes())
    if harm == "network":
        TinyDetector(seed=9).save(path)
    elif harm == "report":
        report.write_text("{")
    elif harm == "size":
        os.truncate(report, 3 << 30)  # takes no room on the disk
    elif harm == "gone":
        path.unlink()
    elif harm == "schema":
        report.write_text(json.dumps(document | {"schema": "visionedge/parity/0"}))
    else:
        model = load_model(TinyDetector(seed=5).save(model.path))
    assert find_variants(model) == ()


def test_a_variant_with_other_preprocessing_is_excluded(tmp_path: Path) -> None:
    """Its ranges were set by pictures that were prepared as they then were."""
    model, _ = kept(tmp_path)
    model.path.with_suffix(".yaml").write_text(json.dumps({"input": {"color": "rgb"}}))
    assert find_variants(load_model(model.path)) == ()


def test_the_newer_of_two_variants_is_used(tmp_path: Path) -> None:
    """One beside the model, one in the data folder."""
    model, _ = kept(tmp_path)
    report = {
        "recipe": "the newer one",
        "parity": GOOD.document(),
        "tolerance": make_tolerance_document(Tolerance()),
        "made": {"at": "2026-02-01T00:00:00Z"},
    }
    data = tmp_path / "data"
    save_variant(
        make_variant_path(model, "int8", data=data), TinyDetector(seed=3).proto(), model, "int8", report
    )
    assert [variant.recipe for variant in find_variants(model, data)] == ["the newer one"]
    assert [variant.recipe for variant in find_variants(model)] == ["a test's"]


def test_a_data_folder_that_may_not_be_entered_has_no_variants(tmp_path: Path) -> None:
    """Root may enter every folder, so for this moment the process is another user."""
    model, _ = kept(tmp_path)
    closed = tmp_path / "closed"
    (closed / "variants").mkdir(parents=True)
    closed.chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        list(_list_reports(model, "int8", closed, None))
    finally:
        os.seteuid(user)
        closed.chmod(0o700)
