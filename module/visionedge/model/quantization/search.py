"""Search for the best network in another precision: recipes are tried, timed and compared with fp32."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from visionedge.errors import ConfigError, ModelError, VisionedgeError
from visionedge.frames.types import Detections, Picture, Placement
from visionedge.model.compiler.compile import read_unchanged_network
from visionedge.model.model import Model
from visionedge.model.parity import (
    MIN_BOXES,
    SMALL_BOX_MATCH_IOU,
    ApComparison,
    Parity,
    Tolerance,
    compare_detections,
)
from visionedge.model.postprocess import Selection
from visionedge.model.quantization.calibration import (
    RANGE_METHODS,
    PictureSession,
    ProgressReporter,
    TensorRanges,
    TensorStatistics,
    collect_statistics,
    fold_constants,
)
from visionedge.model.quantization.fp16 import convert_to_fp16, simulate_fp16
from visionedge.model.quantization.int8 import (
    QuantizationRecipe,
    RangeTuner,
    generate_recipes,
    quantize,
)
from visionedge.runtime.measurement import RelativeSpeed, interleaved_medians

Precision = Literal["fp16", "int8"]

ItemT = TypeVar("ItemT")

_IOU = 0.5
_MIN_SCORE = 0.01
_TIMING_BUDGET_S = 0.8  # for each pair of fp32 and a recipe
_MAX_RECOVERABLE_SHARE = 0.15  # so much of the boxes can be won back by finer ranges
_TUNING_PICTURES = 10  # pictures
_INTEGER_OPERATORS = frozenset(
    {"QuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"}
)


@dataclass(frozen=True, slots=True)
class CalibrationSample:
    """A picture at the model's input size, and where its source lies in it."""

    image: Picture
    placement: Placement


MeasureAp = Callable[[Sequence[Detections]], tuple[float, float]]
"""AP and AP50 of detections on the judged samples, in their order."""


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """Pictures for calibration, others for judging, and how AP is measured on those (None: no labels).

    `labelled` is how many of the judged samples have labels. `common` are the bundled pictures: judging
    only by the calibration images would reward a variant that was calibrated on noise.
    """

    calibration: tuple[CalibrationSample, ...]
    judged: tuple[CalibrationSample, ...]
    measure_ap: MeasureAp | None = None
    labelled: int = 0
    common: tuple[CalibrationSample, ...] = ()


@dataclass(frozen=True, slots=True)
class CandidateResult:
    """One way that was tried. `parity` is None if it was not judged: a faster one was good enough.

    `parity` is of the network computed as it is written, `with_integer_kernels` of the same with the integer
    kernels of this processor; None if it has no integers, or was refused before. `common` is as written on
    the pictures that everybody has; None if fp32 sees too little on them, or it was refused before.
    """

    description: str
    pace: RelativeSpeed
    parity: Parity | None = None
    refusal: str | None = None
    with_integer_kernels: Parity | None = None
    common: Parity | None = None


@dataclass(frozen=True, slots=True)
class QuantizationResult:
    """The result of a search. `chosen` is one of `tried`; `refusal` is set if none is good enough."""

    network: onnx.ModelProto
    tried: tuple[CandidateResult, ...]
    chosen: CandidateResult
    fp32_ms: float

    @property
    def refusal(self) -> str | None:
        """Why the variant must not be used; None if it may."""
        return self.chosen.refusal


def make_variant(
    model: Model,
    precision: Precision,
    data: CalibrationData,
    tolerance: Tolerance,
    *,
    progress: Callable[[str], None],
    only: str | None = None,
    thorough: bool = False,
) -> QuantizationResult:
    """The network of a model in another precision. Takes minutes; `progress` gets lines of text.

    `only` names the one int8 recipe that is judged, independent of its speed here. With `thorough` the
    ranges of the best one are set tensor by tensor in any case, and kept if it is more alike then.

    Raises:
        ConfigError: there is no such recipe for this model; and which there are.
        VisionedgeError: the pictures show too little of what the model knows.
        ModelError: it cannot be rewritten, or computes in integers already.
        UnavailableError: onnxruntime cannot be used.
    """
    network = read_unchanged_network(model)
    if is_quantized(network):
        raise ModelError(f"{model.path}: computes in integers already; start from the model in floats")
    try:
        search = _QuantizationSearch(
            model, network, fold_constants(network), data, tolerance, ProgressReporter(progress)
        )
        return search.make_fp16() if precision == "fp16" else search.make_int8(only, thorough=thorough)
    except ModelError as error:
        raise ModelError(f"{model.path}: {error}") from None


def is_quantized(network: onnx.ModelProto) -> bool:
    """Whether any of it computes in integers of 8 bits."""
    return bool(_INTEGER_OPERATORS & {node.op_type for node in network.graph.node})


class _CompiledNetwork:
    """A network compiled and opened on the CPU."""

    def __init__(
        self, model: Model, network: onnx.ModelProto, *, threads: int = 0, exact: bool = False
    ) -> None:
        try:
            self._session = PictureSession(network, model.interpretation, exact=exact, threads=threads)
        except VisionedgeError:
            raise
        except Exception as error:
            description = " ".join(str(error).split())[:200]
            raise ModelError(f"cannot be run in another precision: {description}") from error
        self._selection = Selection.of(model, _MIN_SCORE, _IOU)

    def detect(self, sample: CalibrationSample) -> Detections:
        """The detections on a picture."""
        return self._selection.apply(self._rows(sample.image), sample.placement)

    def make_timed_run(self, image: Picture) -> Callable[[], object]:
        """A function that runs the network once, for timing."""
        return lambda: self._rows(image)

    def _rows(self, image: Picture) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self._session.run(image)[0][0]
        return rows


@dataclass(slots=True)
class _QuantizationSearch:
    """The search for one model. `simple` is its network with folded constants."""

    model: Model
    network: onnx.ModelProto
    simple: onnx.ModelProto
    data: CalibrationData
    tolerance: Tolerance
    progress: ProgressReporter

    def make_fp16(self) -> QuantizationResult:
        """In float16."""
        network = convert_to_fp16(self.simple)
        reference = self._reference()
        pace, fp32 = self._measure_speed(network)
        way = CandidateResult("float16 where CUDA has it, float32 at the ends", pace)
        tried = self._evaluate(way, simulate_fp16(self.simple), reference)
        return QuantizationResult(network, (tried,), tried, fp32.ms)

    def make_int8(self, only: str | None, *, thorough: bool = False) -> QuantizationResult:
        """In integers: all recipes are timed, and judged from the fastest on until one is good enough."""
        reference = self._reference()
        pictures = [sample.image for sample in self.data.calibration]
        self.progress(f"measuring the ranges of values on {len(pictures)} pictures")
        statistics = collect_statistics(self.simple, self.model.interpretation, pictures, self.progress)
        ways, fp32_ms = self._time_recipes(statistics)
        wanted = _select_recipes(only, ways)
        tuner = RangeTuner(
            self.simple,
            self.model.interpretation,
            statistics,
            sample_evenly(pictures, _TUNING_PICTURES),
            self.progress,
        )
        attempts: list[_Trial] = []
        while wanted and not (attempts and attempts[-1].tried.refusal is None):
            ways.remove(wanted[0])
            attempts += self._try_weight_ranges(*wanted.pop(0), tuner, reference)
        if not attempts:
            raise ModelError("has no convolutions that integers could compute")
        best = max(attempts, key=_ranking_key)
        if (thorough or best.tried.refusal is not None) and self._is_within_reach(best.tried):
            attempts.append(self._tune_ranges(best, tuner, reference))
        best = max(attempts, key=_ranking_key)
        tried = [attempt.tried for attempt in attempts]
        tried += [CandidateResult(str(recipe), pace) for recipe, pace in ways]
        return QuantizationResult(best.network, tuple(tried), best.tried, fp32_ms)

    def _try_weight_ranges(
        self,
        recipe: QuantizationRecipe,
        pace: RelativeSpeed,
        tuner: RangeTuner,
        reference: Sequence[Detections],
    ) -> Iterator["_Trial"]:
        """A recipe in narrow weights; where that is nearly good enough, in wide ones, of the same pace."""
        reduced_range = self._attempt(recipe, pace, tuner, reference)
        yield reduced_range
        if reduced_range.tried.refusal is not None and self._is_within_reach(reduced_range.tried):
            yield self._attempt(replace(recipe, reduced_range=False), pace, tuner, reference)

    def _is_within_reach(self, way: CandidateResult) -> bool:
        """Whether finer ranges or weights may win back what is missing."""
        parities = [
            parity for parity in (way.parity, way.with_integer_kernels, way.common) if parity is not None
        ]
        least = 1 - self.tolerance.unmatched - _MAX_RECOVERABLE_SHARE
        return bool(parities) and min(parity.matched for parity in parities) >= least

    def _attempt(
        self,
        recipe: QuantizationRecipe,
        pace: RelativeSpeed,
        tuner: RangeTuner,
        reference: Sequence[Detections],
    ) -> "_Trial":
        """A recipe with the one way to set all ranges that suits it best."""
        method, values = tuner.choose_method(recipe)
        network = quantize(self.simple, values, recipe)
        way = self._evaluate(CandidateResult(f"{recipe}; ranges {method}", pace), network, reference)
        return _Trial(way, network, recipe, values)

    def _tune_ranges(self, attempt: "_Trial", tuner: RangeTuner, reference: Sequence[Detections]) -> "_Trial":
        """With ranges set tensor by tensor, which takes minutes."""
        self.progress(f"setting the ranges of '{attempt.recipe}' tensor by tensor")
        values = tuner.tune_each(attempt.recipe, attempt.values)
        network = quantize(self.simple, values, attempt.recipe)
        way = CandidateResult(f"{attempt.recipe}; ranges tensor by tensor", attempt.tried.pace)
        return replace(attempt, tried=self._evaluate(way, network, reference), network=network, values=values)

    def _reference(self) -> list[Detections]:
        """The detections of fp32.

        Raises:
            VisionedgeError: too few for a comparison.
        """
        self.progress(f"fp32 on {len(self.data.judged)} pictures, to compare with")
        seen = self._detect_all(self.network)
        description = compare_detections(seen, seen).refusal(Tolerance())
        if description is not None:
            raise VisionedgeError(
                f"{self.model.path}: {description}; give pictures that show what the model knows"
            )
        return seen

    def _detect_all(
        self,
        network: onnx.ModelProto,
        *,
        exact: bool = False,
        samples: Sequence[CalibrationSample] | None = None,
    ) -> list[Detections]:
        """The detections of a network on the judged pictures, or on `samples`."""
        runner = _CompiledNetwork(self.model, network, exact=exact)
        samples = self.data.judged if samples is None else samples
        return [
            runner.detect(sample) for sample in self.progress.track(samples, "comparing detections, pictures")
        ]

    def _measure_speed(self, network: onnx.ModelProto) -> tuple[RelativeSpeed, RelativeSpeed]:
        """The pace of a network, and that of fp32 in the same rounds; one thread each, as lanes have."""
        image = self.data.judged[0].image
        runs = {
            "fp32": _CompiledNetwork(self.model, self.network, threads=1).make_timed_run(image),
            "other": _CompiledNetwork(self.model, network, threads=1).make_timed_run(image),
        }
        measured = interleaved_medians(runs, budget_s=_TIMING_BUDGET_S, clock=time.monotonic_ns)
        return measured["other"], measured["fp32"]

    def _time_recipes(
        self, statistics: TensorStatistics
    ) -> tuple[list[tuple[QuantizationRecipe, RelativeSpeed]], float]:
        """The recipes with their pace, fastest first, and the milliseconds of fp32."""
        values = statistics.values(RANGE_METHODS[0])
        ways, fp32_ms = [], []
        for recipe in generate_recipes(self.simple, values):
            pace, fp32 = self._measure_speed(quantize(self.simple, values, recipe))
            self.progress(f"{recipe}: {pace.ms:.1f} ms, {pace.speedup:.2f} times as fast as fp32")
            ways.append((recipe, pace))
            fp32_ms.append(fp32.ms)
        ways.sort(key=lambda way: -way[1].speedup)
        return ways, float(np.median(fp32_ms)) if fp32_ms else 0.0

    def _evaluate(
        self, way: CandidateResult, network: onnx.ModelProto, reference: Sequence[Detections]
    ) -> CandidateResult:
        """What it sees as it is written; in integers also what this processor makes of it."""
        parity = self._compare_with_fp32(reference, self._detect_all(network, exact=True))
        refusal, with_integer_kernels, common = parity.refusal(self.tolerance), None, None
        if refusal is None and is_quantized(network):
            with_integer_kernels = self._compare_with_fp32(reference, self._detect_all(network))
            description = with_integer_kernels.refusal(self.tolerance)
            refusal = description and f"with the integer kernels of this processor {description}"
        if refusal is None and (common := self._evaluate_on_common(network)) is not None:
            description = common.refusal(self.tolerance.for_other_pictures())
            refusal = (
                description
                and f"on the bundled clip {description}: its ranges were set by pictures unlike it"
            )
        verdict = "good enough" if refusal is None else refusal
        self.progress(f"{way.description}: {parity.matched:.1%} of {parity.boxes} boxes agree; {verdict}")
        return CandidateResult(way.description, way.pace, parity, refusal, with_integer_kernels, common)

    def _evaluate_on_common(self, network: onnx.ModelProto) -> Parity | None:
        """The comparison on the common pictures; None if fp32 detects too little on them."""
        seen = self._detect_all(self.network, samples=self.data.common)
        if compare_detections(seen, seen).boxes < MIN_BOXES:
            return None
        others = self._detect_all(network, exact=True, samples=self.data.common)
        return compare_detections(seen, others, iou=SMALL_BOX_MATCH_IOU)

    def _compare_with_fp32(self, reference: Sequence[Detections], seen: Sequence[Detections]) -> Parity:
        return compare_detections(reference, seen, self._measure_ap(reference, seen))

    def _measure_ap(self, reference: Sequence[Detections], seen: Sequence[Detections]) -> ApComparison | None:
        if self.data.measure_ap is None:
            return None
        before, after = self.data.measure_ap(reference), self.data.measure_ap(seen)
        return ApComparison(self.data.labelled, before[0], after[0], before[1], after[1])


def _select_recipes(
    only: str | None, ways: list[tuple[QuantizationRecipe, RelativeSpeed]]
) -> list[tuple[QuantizationRecipe, RelativeSpeed]]:
    """The recipe of that name, as `nodes` gives it; all of them where none is named.

    Raises:
        ConfigError: there is none such; and which there are.
    """
    names = [recipe.nodes for recipe, _ in ways]
    if only is None:
        return list(ways)
    if only not in names:
        known = "; ".join(names) or "none"
        raise ConfigError([f"--recipe: this model has no '{only}'; it has: {known}"])
    return [ways[names.index(only)]]


def sample_evenly(items: Sequence[ItemT], most: int) -> list[ItemT]:
    """At most `most` of the items, at equal distances."""
    if len(items) <= most:
        return list(items)
    return [items[index * len(items) // most] for index in range(most)]


@dataclass(frozen=True, slots=True)
class _Trial:
    """A recipe with its ranges, and its result."""

    tried: CandidateResult
    network: onnx.ModelProto
    recipe: QuantizationRecipe
    values: TensorRanges


def _ranking_key(attempt: _Trial) -> tuple[bool, float]:
    """A sort key: accepted before refused, then by agreement with fp32."""
    parity = attempt.tried.parity
    if parity is None:
        return False, 0.0
    lost = 0.0 if parity.ap is None else parity.ap.ap_fp32 - parity.ap.ap
    return attempt.tried.refusal is None, parity.matched - parity.score_shift - lost
