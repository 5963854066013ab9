"""Which precision of a model runs: the one that was asked for, or the faster by measuring here.

What is faster must also see here what fp32 sees (see `agreement`): its report may be of another machine. A
choice that was measured is kept beside the plans, for exactly these graphs on this machine.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import onnx

from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import CameraUri
from visionedge.engine.plan import PlanKey, read_int8_cpu_flags
from visionedge.errors import ModelError, SourceError, UnavailableError
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import Detections, InputSpec, Picture, Placement
from visionedge.model.compiler.build import load_or_compile_with_batch
from visionedge.model.compiler.compile import read_unchanged_network
from visionedge.model.compiler.trial_run import make_test_pictures
from visionedge.model.model import Model
from visionedge.model.parity import MIN_BOXES, SMALL_BOX_MATCH_IOU, Tolerance, compare_detections
from visionedge.model.quantization.int8 import make_distance, run_network
from visionedge.model.quantization.search import CalibrationSample, is_quantized
from visionedge.model.quantization.variants import Variant, find_variants, is_usable
from visionedge.runtime.files import DamagedStateFileError, read_json, set_aside_damaged, write_json
from visionedge.runtime.installation import find_bundled_file
from visionedge.runtime.measurement import PrecisionChoice, choose_fastest

# Whether a variant sees on this very machine what fp32 sees here; asked before `auto` takes it.
#
# Its report was perhaps written on another machine, and integer kernels are not the same everywhere (see
# `arithmetic`). So both look at a few pictures of the bundled clip, and what they see is held against each
# other as in the report. A model that knows nothing of what is there says too little that way; then the
# values that integer kernels give for it are held against those of the same network computed as it is
# written.


@dataclass(frozen=True, slots=True)
class OutputDistance:
    """How far a network's own outputs lie apart, in parts of how much they vary.

    `written`: a network in integers, computed as it is written, from the one in floats, which is what its
    report was judged by. `kernels`: what this processor's integer kernels make of it, from that.
    """

    quantization: float
    kernels: float


@dataclass(frozen=True, slots=True)
class VariantAgreement:
    """What was found, in a clause, and why the variant must not be used here; None where it may."""

    words: str
    refusal: str | None = None


def check_agreement(
    fp32: Sequence[Detections],
    variant: Sequence[Detections],
    tolerance: Tolerance,
    measure_distance: Callable[[], OutputDistance | None],
) -> VariantAgreement:
    """Judge what both saw on the same pictures; where that is too little.

    `apart` is asked (`measure_output_distance`).
    """
    parity = compare_detections(fp32, variant, iou=SMALL_BOX_MATCH_IOU)
    if parity.boxes >= MIN_BOXES:
        words = f"{parity.matched:.0%} of {parity.boxes} boxes agree here"
        return VariantAgreement(words, parity.refusal(tolerance.for_other_pictures()))
    output_distance = measure_distance()
    if output_distance is None:
        return VariantAgreement("floats round alike everywhere, so its report counts")
    if output_distance.kernels <= output_distance.quantization:
        return VariantAgreement(
            f"the kernels here add {output_distance.kernels:.3f} to the "
            f"{output_distance.quantization:.3f} that integers cost"
        )
    return VariantAgreement(
        "",
        f"the integer kernels here add {output_distance.kernels:.2f} to the "
        f"{output_distance.quantization:.2f} that integers cost",
    )


def measure_output_distance(
    fp32: Model, variant: Model, samples: Sequence[CalibrationSample]
) -> OutputDistance | None:
    """How far the integers of a variant, and this CPU's kernels for them, take it away; None without any.

    Raises what onnxruntime raises.
    """
    network, images = read_unchanged_network(variant), [sample.image for sample in samples]
    if not is_quantized(network):
        return None
    exact = run_network(network, variant.interpretation, images, exact=True)
    floats = run_network(read_unchanged_network(fp32), fp32.interpretation, images)
    own = run_network(network, variant.interpretation, images)
    return OutputDistance(make_distance(floats)(exact), make_distance(exact)(own))


# Pictures that a variant of a model is tried on where it is to be used: the same ones everywhere.


log = logging.getLogger(__name__)

_CLIP = "media/demo.mp4"
_CLIP_PICTURES = 9
_CLIP_STEP = 10


def make_sample_pictures(spec: InputSpec) -> list[CalibrationSample]:
    """A few pictures of the bundled clip at a model's input size, and some that were made up."""
    whole = Placement(0.0, 0.0, float(spec.width_px), float(spec.height_px))
    made_up = [CalibrationSample(image, whole) for image in make_test_pictures(spec.height_px, spec.width_px)]
    return [*(CalibrationSample(*fit_to_input(picture, spec)) for picture in _read_clip_pictures()), *made_up]


def _read_clip_pictures() -> list[Picture]:
    """Pictures a second apart, from its beginning; none where it cannot be read."""
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
        log.info("precisions are compared without the bundled clip: %s", error)
    return found


PRECISION_FOLDER = "precision"
_SCHEMA = "visionedge/precision/2"

# Where a precision can be faster at all; asked for outright it runs anywhere.
_DEVICES: Mapping[str, tuple[str, ...]] = {"int8": ("cpu",), "fp16": ("cuda", "tensorrt")}


class Closable(Protocol):
    """A session."""

    def close(self) -> None:
        """Let go of it."""


SessionT = TypeVar("SessionT", bound=Closable)


@dataclass(frozen=True, slots=True)
class PrecisionCandidate(Generic[SessionT]):
    """A model in a precision, compiled and open."""

    model: Model
    graph: bytes
    session: SessionT


def choose_fp32(reason: str) -> PrecisionChoice:
    """fp32, without any contest."""
    return PrecisionChoice("fp32", reason, {})


@dataclass(frozen=True, slots=True)
class PrecisionTrials(Generic[SessionT]):
    """What is done with candidates: `open_session` of a graph, `run_of` one batch to be timed, and `judge`.

    `judge` holds what a variant sees here against what fp32 sees (fp32, variant, the variant's tolerance).
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
    """Why a variant takes no part on a device; None where it does."""
    if device not in _DEVICES[variant.precision]:
        return f"its {variant.precision} variant is not used on {device}"
    if variant.refusal or not is_usable(variant):
        return f"its {variant.precision} variant is refused by its report: {variant.refusal}"
    return None


def _explain_single_candidate(
    graph: bytes, variants_found: Sequence[Variant], device: str
) -> PrecisionChoice:
    """The model's own file, and why nothing was held against it; `there` are the variants that were found."""
    found = [
        _exclusion_reason(variant, device) or f"its {variant.precision} variant does not run here"
        for variant in variants_found
    ]
    why = "; ".join(found) or "no variant of it in another precision was found"
    # The name fp32 stands for the file as it is, and the file may be one of integers.
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

    `original` is the model as it was loaded. What cannot be opened or run, what its report refuses, and what
    sees something else here than fp32 is not used. Without `measuring` a kept choice counts, or fp32.
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
            log.warning("%s: does not run here and is left out: %s", variant.path, error)
    if len(candidates) == 1:
        return fp32, _explain_single_candidate(fp32.graph, variants_found, device)
    tolerances: dict[str, Tolerance] = {variant.precision: variant.tolerance for variant in found}
    choice = _choose(candidates, tolerances, device, data, trials if measuring else None)
    for name, candidate in candidates.items():
        if name != choice.precision:
            candidate.session.close()
    return candidates[choice.precision], choice


def _has_cached_choice(data: Path | None) -> bool:
    """Whether a choice was kept at all; what it is of is known only when the variants are compiled."""
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
    log.info("measuring this machine for the faster one of %s: about 5 s, once", names)
    try:
        choice = choose_fastest({name: trials.run_of(candidate) for name, candidate in candidates.items()})
        if choice.precision in tolerances:
            fp32, fastest = candidates["fp32"], candidates[choice.precision]
            choice = apply_agreement(choice, trials.judge(fp32, fastest, tolerances[choice.precision]))
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        log.warning("precisions could not be compared, so fp32 it is: %s", error)
        return choose_fp32("another precision failed while it was measured")
    if entry is not None:
        _store(entry, choice)
    return choice


def apply_agreement(choice: PrecisionChoice, agreement: VariantAgreement) -> PrecisionChoice:
    """The choice that was the fastest, if it sees what fp32 sees; else fp32, and why."""
    if agreement.refusal is None:
        return replace(choice, reason=f"{choice.reason}; {agreement.words}")
    reason = f"{choice.precision} is not used: {agreement.refusal} (it was {choice.reason})"
    return PrecisionChoice("fp32", reason, choice.ms)


def _key(candidates: Mapping[str, PrecisionCandidate[SessionT]], device: str) -> str:
    """Differs where a graph, the device, the processor or a version does."""
    digest = hashlib.sha256(" ".join(read_int8_cpu_flags()).encode())
    for name, candidate in candidates.items():
        key = PlanKey.of(candidate.graph, device=device, cores=1, max_batch=1, latency_budget_ms=None)
        digest.update(f"{name} {key.name()}\n".encode())
    return digest.hexdigest()[:32]


def _load(entry: Path, candidates: Mapping[str, object]) -> PrecisionChoice | None:
    try:
        document = read_json(entry)
        choice = PrecisionChoice.from_document(document["choice"])
        fits = document["schema"] == _SCHEMA and choice.precision in candidates
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s: cannot be read (%s): measuring anew", entry, error.strerror)
        return None
    except (
        DamagedStateFileError,
        ArithmeticError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        log.warning("%s: is damaged (%s) and set aside: measuring anew", entry, error)
        set_aside_damaged(entry)
        return None
    return choice if fits else None


def _store(entry: Path, choice: PrecisionChoice) -> None:
    try:
        write_json(entry, {"schema": _SCHEMA, "choice": choice.document()})
    except OSError as error:
        log.warning("%s: the choice cannot be kept: %s", entry, error.strerror)
