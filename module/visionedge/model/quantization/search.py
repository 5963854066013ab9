"""A network in another precision: recipes are tried, timed beside fp32, and judged by what they see."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx

from visionedge.errors import ConfigError, ModelError, VisionedgeError
from visionedge.frames.types import Detections, Picture, Placement
from visionedge.model.compiler.compile import checked_network, compile_graph
from visionedge.model.model import Model
from visionedge.model.parity import LEAST_BOXES, SMALL_IOU, Parity, Precisions, Tolerance, compare
from visionedge.model.postprocess import Selection
from visionedge.model.quantization.calibration import METHODS, Observed, Progress, Values, folded, observe
from visionedge.model.quantization.fp16 import halved, rounded
from visionedge.model.quantization.int8 import Recipe, Tuner, open_on_cpu, quantised, recipes
from visionedge.runtime.measurement import Pace, paces

Precision = Literal["fp16", "int8"]

_IOU = 0.5
_FLOOR = 0.01
_SPEED_S = 0.8  # for each pair of fp32 and a recipe
_WITHIN_REACH = 0.15  # so much of the boxes can be won back by finer ranges
_TUNED_BY = 10  # pictures
_INTEGERS = frozenset(
    {"QuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"}
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture at the model's input size, and where its source lies in it."""

    image: Picture
    placement: Placement


MeasureAp = Callable[[Sequence[Detections]], tuple[float, float]]
"""AP and AP50 of detections on the judged samples, in their order."""


@dataclass(frozen=True, slots=True)
class Material:
    """Pictures to set ranges by, others to judge by, and how AP is measured on those (None: no labels).

    `labelled` is how many of the judged have labels. `common` are pictures that everybody has: what is
    judged only by pictures such as its ranges were set by is at its best with noise that was set by noise.
    """

    calibration: tuple[Sample, ...]
    judged: tuple[Sample, ...]
    measure_ap: MeasureAp | None = None
    labelled: int = 0
    common: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True)
class Tried:
    """One way that was tried. `parity` is None where it was not judged: a faster one was good enough.

    `parity` is of the network computed as it is written, `here` of the same with the integer kernels of this
    processor; None where it has no integers, or was refused before. `common` is as written on the pictures
    that everybody has; None where fp32 sees too little on them, or it was refused before.
    """

    words: str
    pace: Pace
    parity: Parity | None = None
    refusal: str | None = None
    here: Parity | None = None
    common: Parity | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """What came of it. `chosen` is among `tried`; where even that was refused, `refusal` says why."""

    network: onnx.ModelProto
    tried: tuple[Tried, ...]
    chosen: Tried
    fp32_ms: float

    @property
    def refusal(self) -> str | None:
        """Why the variant must not be used; None where it may."""
        return self.chosen.refusal


def make(
    model: Model,
    precision: Precision,
    material: Material,
    tolerance: Tolerance,
    *,
    tell: Callable[[str], None],
    only: str | None = None,
    thorough: bool = False,
) -> Made:
    """The network of a model in another precision. Takes a minute or several; `tell` hears of progress.

    `only` names the one recipe for integers that is judged, whatever its pace here. With `thorough` the
    ranges of the best one are set tensor by tensor in any case, and kept if it is more alike then.

    Raises:
        ConfigError: there is no such recipe for this model; and which there are.
        VisionedgeError: the pictures show too little of what the model knows.
        ModelError: it cannot be rewritten, or computes in integers already.
        UnavailableError: onnxruntime cannot be used.
    """
    network = checked_network(model)
    if in_integers(network):
        raise ModelError(f"{model.path}: computes in integers already; start from the model in floats")
    try:
        workshop = _Workshop(model, network, folded(network), material, tolerance, Progress(tell))
        return workshop.half() if precision == "fp16" else workshop.int8(only, thorough=thorough)
    except ModelError as error:
        raise ModelError(f"{model.path}: {error}") from None


def in_integers(network: onnx.ModelProto) -> bool:
    """Whether any of it computes in integers of 8 bits."""
    return bool(_INTEGERS & {node.op_type for node in network.graph.node})


class _Runner:
    """A network compiled and opened on the CPU."""

    def __init__(
        self, model: Model, network: onnx.ModelProto, *, threads: int = 0, exact: bool = False
    ) -> None:
        copy = onnx.ModelProto()
        copy.CopyFrom(network)
        graph = compile_graph(copy, model.reading).SerializeToString()
        try:
            self._session = open_on_cpu(graph, exact=exact, threads=threads)
        except VisionedgeError:
            raise
        except Exception as error:
            words = " ".join(str(error).split())[:200]
            raise ModelError(f"cannot be run in another precision: {words}") from error
        self._source = self._session.get_inputs()[0].name
        self._batch = model.reading.input.batch or 1
        self._selection = Selection.of(model, _FLOOR, _IOU)

    def sees(self, sample: Sample) -> Detections:
        """What is detected on a picture."""
        return self._selection.apply(self._rows(sample.image), sample.placement)

    def paced(self, image: Picture) -> Callable[[], object]:
        """A run to time."""
        return lambda: self._rows(image)

    def _rows(self, image: Picture) -> Any:
        images = np.repeat(image[None], self._batch, axis=0)
        return self._session.run(None, {self._source: images})[0][0]


@dataclass(slots=True)
class _Workshop:
    """One model being made into something else. `simple` is its network, folded."""

    model: Model
    network: onnx.ModelProto
    simple: onnx.ModelProto
    material: Material
    tolerance: Tolerance
    tell: Progress

    def half(self) -> Made:
        """In float16."""
        network = halved(self.simple)
        reference = self._reference()
        pace, fp32 = self._pace(network)
        way = Tried("float16 where CUDA has it, float32 at the ends", pace)
        tried = self._judged(way, rounded(self.simple), reference)
        return Made(network, (tried,), tried, fp32.ms)

    def int8(self, only: str | None, *, thorough: bool = False) -> Made:
        """In integers: all recipes are timed, and judged from the fastest on until one is good enough."""
        reference = self._reference()
        pictures = [sample.image for sample in self.material.calibration]
        self.tell(f"measuring the ranges of values on {len(pictures)} pictures")
        observed = observe(self.simple, self.model.reading, pictures, self.tell)
        ways, fp32_ms = self._timed(observed)
        wanted = _named(only, ways)
        tuner = Tuner(self.simple, self.model.reading, observed, _spread(pictures, _TUNED_BY), self.tell)
        attempts: list[_Attempt] = []
        while wanted and not (attempts and attempts[-1].tried.refusal is None):
            ways.remove(wanted[0])
            attempts += self._both_widths(*wanted.pop(0), tuner, reference)
        if not attempts:
            raise ModelError("has no convolutions that integers could compute")
        best = max(attempts, key=_likeness)
        if (thorough or best.tried.refusal is not None) and self._within_reach(best.tried):
            attempts.append(self._tuned(best, tuner, reference))
        best = max(attempts, key=_likeness)
        tried = [attempt.tried for attempt in attempts]
        tried += [Tried(str(recipe), pace) for recipe, pace in ways]
        return Made(best.network, tuple(tried), best.tried, fp32_ms)

    def _both_widths(
        self, recipe: Recipe, pace: Pace, tuner: Tuner, reference: Sequence[Detections]
    ) -> Iterator["_Attempt"]:
        """A recipe in narrow weights; where that is nearly good enough, in wide ones, of the same pace."""
        narrow = self._attempt(recipe, pace, tuner, reference)
        yield narrow
        if narrow.tried.refusal is not None and self._within_reach(narrow.tried):
            yield self._attempt(replace(recipe, narrow=False), pace, tuner, reference)

    def _within_reach(self, way: Tried) -> bool:
        """Whether finer ranges or weights may win back what is missing."""
        parities = [parity for parity in (way.parity, way.here, way.common) if parity is not None]
        least = 1 - self.tolerance.unmatched - _WITHIN_REACH
        return bool(parities) and min(parity.matched for parity in parities) >= least

    def _attempt(
        self, recipe: Recipe, pace: Pace, tuner: Tuner, reference: Sequence[Detections]
    ) -> "_Attempt":
        """A recipe with the one way to set all ranges that suits it best."""
        method, values = tuner.one_for_all(recipe)
        network = quantised(self.simple, values, recipe)
        way = self._judged(Tried(f"{recipe}; ranges {method}", pace), network, reference)
        return _Attempt(way, network, recipe, values)

    def _tuned(self, attempt: "_Attempt", tuner: Tuner, reference: Sequence[Detections]) -> "_Attempt":
        """With ranges set tensor by tensor, which takes minutes."""
        self.tell(f"setting the ranges of '{attempt.recipe}' tensor by tensor")
        values = tuner.each(attempt.recipe, attempt.values)
        network = quantised(self.simple, values, attempt.recipe)
        way = Tried(f"{attempt.recipe}; ranges tensor by tensor", attempt.tried.pace)
        return replace(attempt, tried=self._judged(way, network, reference), network=network, values=values)

    def _reference(self) -> list[Detections]:
        """What fp32 sees.

        Raises:
            VisionedgeError: too little to judge anything by.
        """
        self.tell(f"fp32 on {len(self.material.judged)} pictures, to compare with")
        seen = self._look(self.network)
        words = compare(seen, seen).refusal(Tolerance())
        if words is not None:
            raise VisionedgeError(f"{self.model.path}: {words}; give pictures that show what the model knows")
        return seen

    def _look(
        self, network: onnx.ModelProto, *, exact: bool = False, samples: Sequence[Sample] | None = None
    ) -> list[Detections]:
        """What a network sees: on the judged pictures unless others are given."""
        runner = _Runner(self.model, network, exact=exact)
        samples = self.material.judged if samples is None else samples
        return [runner.sees(sample) for sample in self.tell.over(samples, "comparing detections, pictures")]

    def _pace(self, network: onnx.ModelProto) -> tuple[Pace, Pace]:
        """The pace of a network, and that of fp32 in the same rounds; one thread each, as lanes have."""
        image = self.material.judged[0].image
        runs = {
            "fp32": _Runner(self.model, self.network, threads=1).paced(image),
            "other": _Runner(self.model, network, threads=1).paced(image),
        }
        measured = paces(runs, budget_s=_SPEED_S, clock=time.monotonic_ns)
        return measured["other"], measured["fp32"]

    def _timed(self, observed: Observed) -> tuple[list[tuple[Recipe, Pace]], float]:
        """The recipes with their pace, fastest first, and the milliseconds of fp32."""
        values = observed.values(METHODS[0])
        ways, fp32_ms = [], []
        for recipe in recipes(self.simple, values):
            pace, fp32 = self._pace(quantised(self.simple, values, recipe))
            self.tell(f"{recipe}: {pace.ms:.1f} ms, {pace.times_as_fast:.2f} times as fast as fp32")
            ways.append((recipe, pace))
            fp32_ms.append(fp32.ms)
        ways.sort(key=lambda way: -way[1].times_as_fast)
        return ways, float(np.median(fp32_ms)) if fp32_ms else 0.0

    def _judged(self, way: Tried, network: onnx.ModelProto, reference: Sequence[Detections]) -> Tried:
        """What it sees as it is written; in integers also what this processor makes of it."""
        parity = self._beside(reference, self._look(network, exact=True))
        refusal, here, common = parity.refusal(self.tolerance), None, None
        if refusal is None and in_integers(network):
            here = self._beside(reference, self._look(network))
            words = here.refusal(self.tolerance)
            refusal = words and f"with the integer kernels of this processor {words}"
        if refusal is None and (common := self._in_common(network)) is not None:
            words = common.refusal(self.tolerance.on_other_pictures())
            refusal = words and f"on the bundled clip {words}: its ranges were set by pictures unlike it"
        verdict = "good enough" if refusal is None else refusal
        self.tell(f"{way.words}: {parity.matched:.1%} of {parity.boxes} boxes agree; {verdict}")
        return Tried(way.words, way.pace, parity, refusal, here, common)

    def _in_common(self, network: onnx.ModelProto) -> Parity | None:
        """On the pictures that everybody has; None where fp32 sees too little on them to judge by."""
        seen = self._look(self.network, samples=self.material.common)
        if compare(seen, seen).boxes < LEAST_BOXES:
            return None
        others = self._look(network, exact=True, samples=self.material.common)
        return compare(seen, others, iou=SMALL_IOU)

    def _beside(self, reference: Sequence[Detections], seen: Sequence[Detections]) -> Parity:
        return compare(reference, seen, self._ap(reference, seen))

    def _ap(self, reference: Sequence[Detections], seen: Sequence[Detections]) -> Precisions | None:
        if self.material.measure_ap is None:
            return None
        before, after = self.material.measure_ap(reference), self.material.measure_ap(seen)
        return Precisions(self.material.labelled, before[0], after[0], before[1], after[1])


def _named(only: str | None, ways: list[tuple[Recipe, Pace]]) -> list[tuple[Recipe, Pace]]:
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


def _spread(pictures: Sequence[Picture], most: int) -> list[Picture]:
    """At most so many, from all over the list."""
    if len(pictures) <= most:
        return list(pictures)
    return [pictures[index * len(pictures) // most] for index in range(most)]


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A recipe carried out with ranges, and what came of it."""

    tried: Tried
    network: onnx.ModelProto
    recipe: Recipe
    values: Values


def _likeness(attempt: _Attempt) -> tuple[bool, float]:
    """For comparing: what is not refused goes first, then what is more alike."""
    parity = attempt.tried.parity
    if parity is None:
        return False, 0.0
    lost = 0.0 if parity.ap is None else parity.ap.ap_fp32 - parity.ap.ap
    return attempt.tried.refusal is None, parity.matched - parity.shift - lost
