"""The precision in which a model runs: the requested one, or the fastest on this machine.

A faster variant must also agree with fp32 on this machine: its report may be from another one, and integer
kernels differ between CPUs. Both compute a few pictures of the bundled clip, and their detections are
compared as in the report. A model that detects too little there is judged by its raw outputs. The choice is
cached beside the plans.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import onnx

from visionedge.engine.plan import PlanKey, load_cached, read_int8_cpu_flags
from visionedge.errors import ModelError, SourceError, UnavailableError
from visionedge.frames.types import Detections, InputSpec, Picture, Placement
from visionedge.model.compiler.build import load_or_compile_with_batch
from visionedge.model.compiler.compile import read_unchanged_network
from visionedge.model.compiler.trial_run import make_test_pictures
from visionedge.model.model import Model
from visionedge.model.parity import MIN_BOXES, SMALL_BOX_MATCH_IOU, Tolerance, compare_detections
from visionedge.model.quantization.int8 import make_distance, run_network
from visionedge.model.quantization.search import CalibrationSample, is_quantized
from visionedge.model.quantization.variants import Variant, find_variants, is_usable
from visionedge.runtime.files import write_json
from visionedge.runtime.installation import find_bundled_file
from visionedge.runtime.measurement import PrecisionChoice, choose_fastest

log = logging.getLogger(__name__)

PRECISION_FOLDER = "precision"
_SCHEMA = "visionedge/precision/2"

# The devices on which a precision can be faster; requested explicitly, it runs on any.
_DEVICES: Mapping[str, tuple[str, ...]] = {"int8": ("cpu",), "fp16": ("cuda", "tensorrt")}


@dataclass(frozen=True, slots=True)
class OutputDistance:
    """How much the outputs of a network differ, as a share of their own variation.

    `quantization`: the int8 network, computed exactly, from the fp32 network; its report was judged by this.
    `kernels`: the int8 network, computed by the integer kernels of this CPU, from the exact one.
    """

    quantization: float
    kernels: float


@dataclass(frozen=True, slots=True)
class VariantAgreement:
    """What was found, in a clause; and why the variant must not be used here, or None."""

    message: str
    refusal: str | None = None


class Closable(Protocol):
    """A session."""

    def close(self) -> None:
        """Free it."""


SessionT = TypeVar("SessionT", bound=Closable)


@dataclass(frozen=True, slots=True)
class PrecisionCandidate(Generic[SessionT]):
    """A model in one precision, compiled and open."""

    model: Model
    graph: bytes
    session: SessionT


def choose_fp32(reason: str) -> PrecisionChoice:
    """fp32, without a comparison."""
    return PrecisionChoice("fp32", reason, {})


@dataclass(frozen=True, slots=True)
class PrecisionTrials(Generic[SessionT]):
    """How candidates are tried: `open_session` opens a graph, `run_of` gives a run of one batch to be timed.

    `judge` compares the detections of a variant with those of fp32 (fp32, variant, the variant's tolerance).
    """

    open_session: Callable[[bytes], SessionT]
    run_of: Callable[[PrecisionCandidate[SessionT]], Callable[[], object]]
    judge: Callable[[PrecisionCandidate[SessionT], PrecisionCandidate[SessionT], Tolerance], VariantAgreement]


def list_eligible_variants(original: Model, *, device: str, data: Path | None) -> list[Variant]:
    """The variants of a model that may be faster on a device, and that their reports do not refuse."""
    return [
        variant for variant in find_variants(original, data) if _exclusion_reason(variant, device) is None
    ]


def _exclusion_reason(variant: Variant, device: str) -> str | None:
    """Why a variant is not tried on a device, or None."""
    if device not in _DEVICES[variant.precision]:
        return f"its {variant.precision} variant is not used on {device}"
    if variant.refusal or not is_usable(variant):
        return f"its {variant.precision} variant is refused by its report: {variant.refusal}"
    return None


def _explain_single_candidate(
    graph: bytes, variants_found: Sequence[Variant], device: str
) -> PrecisionChoice:
    """The model's own file, and why it was not compared with any of the variants that were found."""
    found = [
        _exclusion_reason(variant, device) or f"its {variant.precision} variant does not run here"
        for variant in variants_found
    ]
    why = "; ".join(found) or "no variant of it in another precision was found"
    # fp32 means the file as it is; the file itself may be quantized.
    own = " (it computes in 8-bit integers)" if is_quantized(onnx.load_model_from_string(graph)) else ""
    return choose_fp32(f"the model file is used as it is{own}: {why}")


def pick_precision(
    fp32: PrecisionCandidate[SessionT],
    original: Model,
    *,
    device: str,
    data: Path | None,
    trials: PrecisionTrials[SessionT],
    measuring: bool = True,
) -> tuple[PrecisionCandidate[SessionT], PrecisionChoice]:
    """The fastest precision of a model on a device; sessions that are not used are closed.

    `original` is the model as it was loaded. A variant is not used if it cannot be opened or run, if its
    report refuses it, or if it disagrees with fp32 here. Without `measuring`, a cached choice counts, else
    fp32.
    """
    if not measuring and not _has_cached_choice(data):
        return fp32, choose_fp32("nothing was measured")
    variants_found = find_variants(original, data)
    found = [variant for variant in variants_found if _exclusion_reason(variant, device) is None]
    candidates: dict[str, PrecisionCandidate[SessionT]] = {"fp32": fp32}
    for variant in found:
        try:
            model, graph = load_or_compile_with_batch(variant.of(original), data)
            candidates[variant.precision] = PrecisionCandidate(model, graph, trials.open_session(graph))
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no other base
            log.warning("%s: cannot be used here: %s", variant.path, error)
    if len(candidates) == 1:
        return fp32, _explain_single_candidate(fp32.graph, variants_found, device)
    tolerances: dict[str, Tolerance] = {variant.precision: variant.tolerance for variant in found}
    choice = _choose(candidates, tolerances, device, data, trials if measuring else None)
    for name, candidate in candidates.items():
        if name != choice.precision:
            candidate.session.close()
    return candidates[choice.precision], choice


def _has_cached_choice(data: Path | None) -> bool:
    """Whether any choice is cached; its graphs are known only after the variants are compiled."""
    return data is not None and any((data / PRECISION_FOLDER).glob("*.json"))


def _choose(
    candidates: Mapping[str, PrecisionCandidate[SessionT]],
    tolerances: Mapping[str, Tolerance],
    device: str,
    data: Path | None,
    trials: PrecisionTrials[SessionT] | None,
) -> PrecisionChoice:
    entry = None if data is None else data / PRECISION_FOLDER / f"{_key(candidates, device)}.json"
    if entry is not None and (kept := _load(entry, candidates)) is not None:
        return kept
    if trials is None:
        return choose_fp32("nothing was measured")
    names = " and ".join(candidates)
    log.info("measuring which of %s is faster on this machine: about 5 s, once", names)
    try:
        choice = choose_fastest({name: trials.run_of(candidate) for name, candidate in candidates.items()})
        if choice.precision in tolerances:
            fp32, fastest = candidates["fp32"], candidates[choice.precision]
            choice = apply_agreement(choice, trials.judge(fp32, fastest, tolerances[choice.precision]))
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        log.warning("precisions could not be compared (%s); using fp32", error)
        return choose_fp32("another precision failed while it was measured")
    if entry is not None:
        _store(entry, choice)
    return choice


def apply_agreement(choice: PrecisionChoice, agreement: VariantAgreement) -> PrecisionChoice:
    """The fastest choice, if it agrees with fp32; else fp32, and why."""
    if agreement.refusal is None:
        return replace(choice, reason=f"{choice.reason}; {agreement.message}")
    reason = f"{choice.precision} is not used: {agreement.refusal} (it was {choice.reason})"
    return PrecisionChoice("fp32", reason, choice.ms)


def _key(candidates: Mapping[str, PrecisionCandidate[SessionT]], device: str) -> str:
    """A hash of the graphs, the device, the CPU and the versions."""
    digest = hashlib.sha256(" ".join(read_int8_cpu_flags()).encode())
    for name, candidate in candidates.items():
        key = PlanKey.of(candidate.graph, device=device, cores=1, max_batch=1, latency_budget_ms=None)
        digest.update(f"{name} {key.name()}\n".encode())
    return digest.hexdigest()[:32]


def _load(entry: Path, candidates: Mapping[str, object]) -> PrecisionChoice | None:
    def parse(document: Any) -> PrecisionChoice | None:
        choice = PrecisionChoice.from_document(document["choice"])
        return choice if document["schema"] == _SCHEMA and choice.precision in candidates else None

    return load_cached(entry, parse, "precisions")


def _store(entry: Path, choice: PrecisionChoice) -> None:
    try:
        write_json(entry, {"schema": _SCHEMA, "choice": choice.document()})
    except OSError as error:
        log.warning("%s: cannot be saved (%s); the next start measures again", entry, error.strerror)


# --- agreement with fp32 on this machine --------------------------------------------------------------------


def check_agreement(
    fp32: Sequence[Detections],
    variant: Sequence[Detections],
    tolerance: Tolerance,
    measure_distance: Callable[[], OutputDistance | None],
) -> VariantAgreement:
    """Compare the detections of both on the same pictures; the outputs if there are too few detections."""
    parity = compare_detections(fp32, variant, iou=SMALL_BOX_MATCH_IOU)
    if parity.boxes >= MIN_BOXES:
        message = f"{parity.matched:.0%} of {parity.boxes} boxes agree here"
        return VariantAgreement(message, parity.refusal(tolerance.for_other_pictures()))
    output_distance = measure_distance()
    if output_distance is None:
        return VariantAgreement("it has no integers to round differently here, so its report counts")
    if output_distance.kernels <= output_distance.quantization:
        return VariantAgreement(
            f"the integer kernels here add a difference of {output_distance.kernels:.3f} to the "
            f"{output_distance.quantization:.3f} of quantization"
        )
    return VariantAgreement(
        "",
        f"the integer kernels here add a difference of {output_distance.kernels:.2f} to the "
        f"{output_distance.quantization:.2f} of quantization",
    )


def measure_output_distance(
    fp32: Model, variant: Model, samples: Sequence[CalibrationSample]
) -> OutputDistance | None:
    """How much quantization and the integer kernels change the outputs; None for a variant in floats.

    Raises what onnxruntime raises.
    """
    network, images = read_unchanged_network(variant), [sample.image for sample in samples]
    if not is_quantized(network):
        return None
    exact = run_network(network, variant.interpretation, images, exact=True)
    floats = run_network(read_unchanged_network(fp32), fp32.interpretation, images)
    own = run_network(network, variant.interpretation, images)
    return OutputDistance(make_distance(floats)(exact), make_distance(exact)(own))


# --- the pictures that both compute -------------------------------------------------------------------------

_CLIP = "media/demo.mp4"
_CLIP_PICTURES = 9
_CLIP_STEP = 10


def make_sample_pictures(spec: InputSpec) -> list[CalibrationSample]:
    """Nine pictures of the bundled clip at a model's input size, and some synthetic ones."""
    from visionedge.frames.letterbox import fit_to_input  # OpenCV, 8 MiB; not for the engine's process

    whole = Placement(0.0, 0.0, float(spec.width_px), float(spec.height_px))
    synthetic = [
        CalibrationSample(image, whole) for image in make_test_pictures(spec.height_px, spec.width_px)
    ]
    return [
        *(CalibrationSample(*fit_to_input(picture, spec)) for picture in _read_clip_pictures()),
        *synthetic,
    ]


def _read_clip_pictures() -> list[Picture]:
    """Pictures a second apart, from its beginning; none if it cannot be read."""
    from visionedge.camera.sources.open import open_source  # takes 50 ms that other processes do not need
    from visionedge.config.addresses import CameraUri

    found: list[Picture] = []
    try:
        with closing(open_source(CameraUri("file", str(find_bundled_file(_CLIP))))) as source:
            for count in range(_CLIP_PICTURES * _CLIP_STEP):
                decoded = source.read()
                if decoded is None:
                    break
                if count % _CLIP_STEP == 0:
                    found.append(decoded.picture())
    except (SourceError, UnavailableError) as error:
        log.info(
            "the bundled clip cannot be read (%s): precisions are compared on synthetic pictures only", error
        )
    return found
