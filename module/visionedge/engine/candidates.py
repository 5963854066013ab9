"""The engines that may compute a model on a device: which there are, and which one is opened.

A candidate is a runtime, a precision and options, with the graph that it computes: the model's own, or that
of a variant. `EngineSelector` opens the demanded one, the one that was chosen before, or the one that
`engine_choice` measures now.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx

from visionedge.engine.autotune import ThroughputSample, make_cpu_clock, make_noise_pictures, run_trial
from visionedge.engine.candidate_parity import (
    RUNTIME_TOLERANCES,
    check_agreement,
    check_finite,
    check_integers,
    check_rows,
    make_sample_pictures,
    measure_output_distance,
)
from visionedge.engine.device.backend import DEVICE_BACKEND, DeviceBackend
from visionedge.engine.device.devices import EffectiveDevice, RequestedRuntime, Runtime
from visionedge.engine.device.faults import EngineError, describe_error
from visionedge.engine.device.session import PLAIN, DeviceSession, PictureBatch
from visionedge.engine.engine_choice import (
    CandidateAgreement,
    ChoiceCache,
    ChoiceKey,
    EngineCandidate,
    EngineChoice,
    Progress,
    choose_engine,
)
from visionedge.engine.interface import EngineSettings
from visionedge.engine.plan import OperatingPoint, make_default_plan
from visionedge.errors import UnavailableError
from visionedge.frames.types import Detections
from visionedge.model.compiler.build import load_or_compile_with_batch
from visionedge.model.model import Model
from visionedge.model.parity import MATCH_CONFIDENCE, Tolerance
from visionedge.model.postprocess import Rows, Selection
from visionedge.model.quantization.search import CalibrationSample, is_quantized
from visionedge.model.quantization.variants import (
    Variant,
    find_variants,
    is_usable,
    require_variant,
    select_variants,
)

log = logging.getLogger(__name__)

# The devices on which a variant can be faster; requested explicitly, it runs on any.
_VARIANT_DEVICES = {"int8": ("cpu",), "fp16": ("cuda", "tensorrt")}

_CHECK_TIME_S = 2.0
"""Slow models are compared on fewer pictures, so that a check takes no longer."""


@dataclass(frozen=True, slots=True)
class CandidateGraph:
    """A candidate and what it computes: the compiled model and its graph, and the tolerance of the check."""

    candidate: EngineCandidate
    model: Model
    graph: bytes
    tolerance: Tolerance
    is_variant: bool = False
    variant_floats: str = "fp32"
    """What the runtime computes the floats of a variant in."""

    @property
    def computed_precision(self) -> str:
        """What the runtime computes in where the graph leaves it open."""
        return self.variant_floats if self.is_variant else self.candidate.precision

    def describe_device(self, device: str) -> str:
        """The device as a key names it: the graph alone does not tell runtime, precision and options."""
        options = "" if self.candidate.options == PLAIN else self.candidate.options
        words = (self.candidate.runtime, self.computed_precision, options)
        known = ("onnxruntime", "fp32", "")
        return device if words == known else " ".join([device, *filter(None, words)])


@dataclass(frozen=True, slots=True)
class OpenCandidate:
    """A candidate that is open."""

    graph: CandidateGraph
    session: DeviceSession


class CandidateOpener(Protocol):
    """Opens the graph of a candidate on a device."""

    def __call__(self, graph: CandidateGraph) -> DeviceSession:
        """Raises what the runtime raises."""


# --- which there are ----------------------------------------------------------------------------------------


def list_eligible_variants(
    original: Model, *, device: str, data: Path | None, runtimes: Sequence[str] = ("onnxruntime",)
) -> list[Variant]:
    """The variants of a model that may be faster on a device, and that their reports do not refuse."""
    return [
        variant
        for variant in find_variants(original, data)
        if _exclusion_reason(variant, device, runtimes) is None
    ]


def has_candidates(
    original: Model,
    choice: EngineChoice,
    runtime: RequestedRuntime,
    *,
    data: Path | None,
    backend: DeviceBackend = DEVICE_BACKEND,
) -> bool:
    """Whether an engine that was not measured for a choice may be faster on the CPU."""
    measured = {figures.candidate.precision for figures in choice.results}
    runtimes = backend.find_runtimes("cpu")
    variants = list_eligible_variants(original, device="cpu", data=data, runtimes=runtimes)
    if any(variant.precision not in measured for variant in variants):
        return True
    return not measured and runtime == "auto" and len(runtimes) > 1


def _exclusion_reason(variant: Variant, device: str, runtimes: Sequence[str]) -> str | None:
    """Why a variant is not tried on a device with these runtimes, or None."""
    if device not in _VARIANT_DEVICES[variant.precision]:
        return f"its {variant.precision} variant is not used on {device}"
    if variant.refusal or not is_usable(variant):
        return f"its {variant.precision} variant is refused by its report: {variant.refusal}"
    if variant.runtime not in (None, *runtimes):
        return f"its {variant.precision} variant for {variant.runtime} needs that runtime"
    return None


@dataclass(frozen=True, slots=True)
class CandidateSource:
    """What candidates are made of, and for which device; `original` is the model as it was loaded.

    `runtime` is that of the session that is open already: a demanded one, or the first of the device.
    """

    original: Model
    model: Model
    graph: bytes
    device: EffectiveDevice
    runtime: Runtime
    backend: DeviceBackend
    settings: EngineSettings
    data: Path | None

    @property
    def plain(self) -> CandidateGraph:
        """The candidate whose session is open: it computes the model's own graph in fp32."""
        candidate = EngineCandidate(self.runtime, "fp32")
        return CandidateGraph(candidate, self.model, self.graph, Tolerance())

    def list_graphs(self) -> tuple[list[CandidateGraph], list[str]]:
        """The candidates that the settings allow, in order of preference, and why there are no more.

        Raises:
            ModelError: a demanded variant is not there.
            UnavailableError: a demanded precision is not to be had here.
        """
        wanted, found, excluded = self.settings.precision, list[CandidateGraph](), list[str]()
        runtimes = self._runtimes()
        for runtime in runtimes:
            found += self._unchanged(runtime)
        made = self._variants(runtimes, excluded)
        found += [
            self._variant(runtime, made[variant], variant)
            for variant in made
            for runtime in runtimes
            if variant in select_variants(made, runtime)
        ]
        found = [graph for graph in found if wanted in ("auto", graph.candidate.precision)]
        if not found:
            raise UnavailableError(
                f"inference.precision: {wanted} cannot be used: {self._explain_no_precision()}"
            )
        return found, excluded

    def _runtimes(self) -> tuple[Runtime, ...]:
        """The runtimes to compare: one, where it was demanded, or where the demanded one is not used."""
        if self.settings.runtime == "auto" and self.device == "cpu":
            return self.backend.find_runtimes(self.device)
        return (self.runtime,)

    def _explain_no_precision(self) -> str:
        if self.device != "cpu":
            return f"device {self.device} has none"
        if self.settings.runtime == "onnxruntime":
            return "onnxruntime has none on a CPU; inference.runtime: openvino may have it"
        if "openvino" not in self.backend.find_runtimes("cpu"):
            return "only OpenVINO has it on a CPU, and the package openvino is not installed"
        return "this CPU has no instructions for it"

    def _unchanged(self, runtime: Runtime) -> list[CandidateGraph]:
        """The graph of the model as it is, in the precisions and with the options of a runtime."""
        candidates = [
            EngineCandidate(runtime, precision)
            for precision in self.backend.find_precisions(self.device, runtime)
        ]
        candidates += [
            EngineCandidate(runtime, "fp32", options)
            for options in self.backend.find_options(self.device, runtime)
            if options != PLAIN
        ]
        tolerances = RUNTIME_TOLERANCES if self.device == "cpu" else {}
        return [
            CandidateGraph(
                candidate, self.model, self.graph, tolerances.get(candidate.precision, Tolerance())
            )
            for candidate in candidates
        ]

    def _variants(
        self, runtimes: Sequence[Runtime], excluded: list[str]
    ) -> dict[Variant, tuple[Model, bytes]]:
        """The compiled variants that may be faster here, or those that are demanded."""
        wanted = self.settings.precision
        if wanted in ("int8", "fp16") and wanted not in self._computed_precisions():
            demanded = self._list_usable(wanted, runtimes)
            demanded = demanded or [require_variant(self.original, wanted, self.data)]
            return {
                variant: load_or_compile_with_batch(variant.of(self.original), self.data)
                for variant in demanded
            }
        made = dict[Variant, tuple[Model, bytes]]()
        for variant in find_variants(self.original, self.data) if wanted == "auto" else ():
            if (reason := _exclusion_reason(variant, self.device, runtimes)) is not None:
                excluded.append(reason)
                continue
            try:
                made[variant] = load_or_compile_with_batch(variant.of(self.original), self.data)
            except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no other base
                log.warning("%s: cannot be used here: %s", variant.path, error)
                excluded.append(f"its {variant.precision} variant does not run here")
        return made

    def _list_usable(self, precision: str, runtimes: Sequence[Runtime]) -> list[Variant]:
        """The variants of a precision that these runtimes may compute; none that its report refuses."""
        return [
            variant
            for variant in find_variants(self.original, self.data)
            if variant.precision == precision
            and variant.runtime in (None, *runtimes)
            and variant.refusal is None
        ]

    def _computed_precisions(self) -> set[str]:
        """The precisions that runtimes compute the model's own graph in."""
        return {
            precision
            for runtime in self.backend.find_runtimes(self.device)
            for precision in self.backend.find_precisions(self.device, runtime)
        }

    def _variant(self, runtime: Runtime, made: tuple[Model, bytes], variant: Variant) -> CandidateGraph:
        """A variant in a runtime; one that is made for this runtime was judged in bf16, too."""
        model, graph = made
        precisions = self.backend.find_precisions(self.device, runtime) if variant.runtime else ()
        return CandidateGraph(
            EngineCandidate(runtime, variant.precision),
            model,
            graph,
            variant.tolerance.for_other_pictures(),
            is_variant=True,
            variant_floats="bf16" if "bf16" in precisions else "fp32",
        )

    def explain_single(self, excluded: Sequence[str]) -> str:
        """Why the model's own file was not compared with anything."""
        why = "; ".join(excluded) or "no variant of it in another precision was found"
        # fp32 means the file as it is; the file itself may be quantized.
        integers = is_quantized(onnx.load_model_from_string(self.graph))
        own = " (it computes in 8-bit integers)" if integers else ""
        return f"the model file is used as it is{own}: {why}"


# --- how they are tried -------------------------------------------------------------------------------------


class SessionTrials:
    """Candidates as sessions that are open; see `engine_choice.CandidateTrials`.

    `plain` is the session of `source.plain`; its owner closes it. The parity check compares with onnxruntime
    in fp32 on the CPU, whose session `open_reference` gives.
    """

    def __init__(
        self,
        graphs: Sequence[CandidateGraph],
        source: CandidateSource,
        plain: DeviceSession,
        *,
        open_session: CandidateOpener,
        open_reference: Callable[[], DeviceSession],
    ) -> None:
        self.sessions: dict[EngineCandidate, DeviceSession] = {source.plain.candidate: plain}
        self._graphs = {graph.candidate: graph for graph in graphs}
        self._source = source
        self._plain = plain
        self._open_session = open_session
        self._open_reference = open_reference
        self._reference: DeviceSession | None = None
        self._samples: list[CalibrationSample] = []
        self._expected: dict[int, Rows] = {}
        self._closed = False
        self._pictures = make_noise_pictures(source.model.input, source.settings.max_batch)

    def open(self, candidate: EngineCandidate) -> None:
        """Open a session and compute one batch."""
        graph = self._graphs[candidate]
        session = self._open_session(graph)
        if self._closed:  # it took too long, and the comparison is over
            session.close()
            return
        self.sessions[candidate] = session
        if session.device != self._source.device:
            raise EngineError(f"its session started on {session.device} only")
        size = graph.model.interpretation.input.batch or 1
        if (refused := check_finite(session.run(self._batch(size), size))) is not None:
            raise EngineError(str(refused.refusal))

    def measure(self, candidate: EngineCandidate, point: OperatingPoint, limit_s: float) -> ThroughputSample:
        """Compute batches of noise."""
        session = self.sessions[candidate]
        cpu_clock = make_cpu_clock(point.lanes, own=session.runtime == "openvino")
        return run_trial(
            lambda size: session.run(self._batch(size), size), point, limit_s, cpu_clock=cpu_clock
        )

    def check(self, candidate: EngineCandidate) -> CandidateAgreement:
        """Compare the detections on pictures of the bundled clip; the outputs if there are too few."""
        graph, session = self._graphs[candidate], self.sessions[candidate]
        reference = self._open_once()
        samples = self._samples = self._samples or make_sample_pictures(self._source.model.input)
        began_s, taken, rows = time.monotonic(), list[int](), list[Rows]()
        stride = 1
        for index in range(len(samples)):
            if index % stride:
                continue
            if index not in self._expected:
                self._expected[index] = self._run(reference, self._source.model, samples[index])
            rows.append(self._run(session, graph.model, samples[index]))
            taken.append(index)
            if index == 0:
                stride = max(1, math.ceil((time.monotonic() - began_s) * len(samples) / _CHECK_TIME_S))
        if (refused := check_finite(np.concatenate(rows))) is not None:
            return refused
        expected = [self._expected[index] for index in taken]
        shown = [samples[index] for index in taken]
        return check_agreement(
            self._detect(self._source.model, expected, shown),
            self._detect(graph.model, rows, shown),
            graph.tolerance,
            lambda: self._check_outputs(graph, np.concatenate(expected), np.concatenate(rows), shown),
        )

    def close(self, but: EngineCandidate | None = None) -> None:
        """Close all sessions but that of one candidate, and the plain one."""
        self._closed = True
        reference = [] if self._reference is None else [self._reference]
        kept = (self._plain, None if but is None else self.sessions[but])
        for session in (*self.sessions.values(), *reference):
            if session not in kept:
                with suppress(Exception):  # a session that failed may fail again
                    session.close()

    def _open_once(self) -> DeviceSession:
        if self._reference is None:
            self._reference = self._open_reference()
        return self._reference

    def _batch(self, size: int) -> PictureBatch:
        if size > len(self._pictures):  # the model fixes its batch
            self._pictures = make_noise_pictures(self._source.model.input, size)
        return self._pictures[:size]

    def _run(self, session: DeviceSession, model: Model, sample: CalibrationSample) -> Rows:
        return session.run(sample.image[None], model.interpretation.input.batch or 1)[:1]

    def _detect(
        self, model: Model, rows: Sequence[Rows], samples: Sequence[CalibrationSample]
    ) -> list[Detections]:
        selection = Selection.of(model, MATCH_CONFIDENCE, self._source.settings.iou)
        return [selection.apply(one[0], sample.placement) for one, sample in zip(rows, samples, strict=True)]

    def _check_outputs(
        self, graph: CandidateGraph, expected: Rows, rows: Rows, samples: Sequence[CalibrationSample]
    ) -> CandidateAgreement:
        if not graph.is_variant:
            return check_rows(self._source.model, expected, rows)
        if graph.candidate.runtime != "onnxruntime":
            return CandidateAgreement("", "too few boxes were detected to judge the variant on this runtime")
        return check_integers(measure_output_distance(self._source.model, graph.model, samples))


# --- which one is opened ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineSelector:
    """Selects the engine of a device and opens it.

    `plain` is the session of `source.plain`, which is open already; it is closed if another one is selected.
    `known` is a choice that is used without measuring: that of a process which was restarted. Without
    `measuring`, a choice in the cache counts, else the first candidate.
    """

    source: CandidateSource
    plain: DeviceSession
    open_session: CandidateOpener
    open_reference: Callable[[], DeviceSession]
    cores: int
    measuring: bool
    known: EngineChoice | None
    progress: Progress

    def select(self) -> tuple[OpenCandidate, EngineChoice]:
        """The selected engine, and why.

        Raises:
            ModelError: a demanded variant is not there.
            UnavailableError: a demanded precision is not to be had here.
        """
        opened, choice = self._select()
        if opened.session is not self.plain:
            self.plain.close()
        return opened, choice

    def use_plain(self, reason: str) -> tuple[OpenCandidate, EngineChoice]:
        """The candidate that runs wherever the device works."""
        graph = self.source.plain
        return OpenCandidate(graph, self.plain), EngineChoice(graph.candidate, reason)

    def _select(self) -> tuple[OpenCandidate, EngineChoice]:
        settings, data = self.source.settings, self.source.data
        demanded: list[str] = [settings.runtime] if settings.runtime == self.source.runtime else []
        demanded += [settings.precision] if settings.precision != "auto" else []
        cache = None if data is None else ChoiceCache(data)
        is_kept = self.known is not None or (cache is not None and not cache.is_empty())
        if not demanded and not is_kept and (data is None or not self.measuring):
            return self.use_plain("nothing was measured")
        graphs, excluded = self.source.list_graphs()
        if self.known is not None and (opened := self._open_chosen(graphs, self.known)) is not None:
            return opened, self.known
        if len(graphs) > 1 and cache is not None:
            return self._choose(graphs, cache)
        reason = self.source.explain_single(excluded)
        if demanded:
            reason = "; ".join([f"{' and '.join(demanded)} was requested", *excluded])
        return self._open_first(graphs, reason)

    def _open_first(
        self, graphs: Sequence[CandidateGraph], reason: str
    ) -> tuple[OpenCandidate, EngineChoice]:
        """The first candidate, without a comparison."""
        first = graphs[0]
        if first.candidate == self.source.plain.candidate:
            return self.use_plain(reason)
        return OpenCandidate(first, self.open_session(first)), EngineChoice(first.candidate, reason)

    def _choose(
        self, graphs: Sequence[CandidateGraph], cache: ChoiceCache
    ) -> tuple[OpenCandidate, EngineChoice]:
        """The engine that was measured on this machine, now or earlier."""
        batch = self.source.model.interpretation.input.batch
        plan = make_default_plan(self.source.device, self.source.settings.max_batch, batch, self.cores)
        point = OperatingPoint(plan.lanes, plan.max_batch)
        key = ChoiceKey.of(
            {graph.candidate: graph.graph for graph in graphs},
            device=self.source.device,
            cores=self.cores,
            point=point,
        )
        if (kept := cache.load(key)) is not None and (opened := self._open_chosen(graphs, kept)) is not None:
            return opened, kept
        if kept is not None or not self.measuring:
            return self._open_first(graphs, "nothing was measured")
        trials = self._trials(graphs)
        first = graphs[0].candidate
        if first not in trials.sessions:
            trials.open(first)
        crashes = cache.crash_record(key)
        try:
            choice = choose_engine(
                [graph.candidate for graph in graphs],
                trials,
                point=point,
                progress=self.progress,
                crashes=crashes,
                limited=self.source.device != "tensorrt",
                computes_on_cpu=self.source.device == "cpu",
            )
        except Exception as error:  # noqa: BLE001 - the errors of runtimes have no common base
            log.warning("engines could not be compared (%s); using %s", describe_error(error), first)
            choice = EngineChoice(first, "another engine failed while it was measured")
        else:
            if choice.settled:
                cache.store(key, choice)
        crashes.clear()
        trials.close(but=choice.candidate)
        chosen = next(graph for graph in graphs if graph.candidate == choice.candidate)
        return OpenCandidate(chosen, trials.sessions[choice.candidate]), choice

    def _trials(self, graphs: Sequence[CandidateGraph]) -> SessionTrials:
        return SessionTrials(
            graphs,
            self.source,
            self.plain,
            open_session=self.open_session,
            open_reference=self.open_reference,
        )

    def _open_chosen(self, graphs: Sequence[CandidateGraph], choice: EngineChoice) -> OpenCandidate | None:
        """The engine of a choice; None where it cannot be opened any more."""
        graph = next((graph for graph in graphs if graph.candidate == choice.candidate), None)
        if graph is None:
            return None
        if graph.candidate == self.source.plain.candidate:
            return OpenCandidate(graph, self.plain)
        try:
            return OpenCandidate(graph, self.open_session(graph))
        except Exception as error:  # noqa: BLE001 - the errors of runtimes have no common base
            log.warning("%s, which was chosen before, cannot be opened: %s", choice.candidate, error)
            return None
