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
from visionedge.engine.plan import PlanKey, integer_instructions
from visionedge.errors import ModelError, SourceError, UnavailableError
from visionedge.frames.letterbox import fit
from visionedge.frames.types import Detections, InputSpec, Picture, Placement
from visionedge.model.compiler.build import ready
from visionedge.model.compiler.compile import checked_network
from visionedge.model.compiler.trial_run import pictures
from visionedge.model.model import Model
from visionedge.model.parity import LEAST_BOXES, SMALL_IOU, Tolerance, compare
from visionedge.model.quantization.int8 import distance_to, outputs_of
from visionedge.model.quantization.search import Sample, in_integers
from visionedge.model.quantization.variants import Variant, usable, variants
from visionedge.runtime.files import DamagedError, drop_damaged, read_json, write_json
from visionedge.runtime.installation import bundled
from visionedge.runtime.measurement import Choice, choose

# Whether a variant sees on this very machine what fp32 sees here; asked before `auto` takes it.
#
# Its report was perhaps written on another machine, and integer kernels are not the same everywhere (see
# `arithmetic`). So both look at a few pictures of the bundled clip, and what they see is held against each
# other as in the report. A model that knows nothing of what is there says too little that way; then the
# values that integer kernels give for it are held against those of the same network computed as it is
# written.


@dataclass(frozen=True, slots=True)
class Apart:
    """How far a network's own outputs lie apart, in parts of how much they vary.

    `written`: a network in integers, computed as it is written, from the one in floats, which is what its
    report was judged by. `kernels`: what this processor's integer kernels make of it, from that.
    """

    written: float
    kernels: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """What was found, in a clause, and why the variant must not be used here; None where it may."""

    words: str
    refusal: str | None = None


def agreement(
    fp32: Sequence[Detections],
    variant: Sequence[Detections],
    tolerance: Tolerance,
    apart: Callable[[], Apart | None],
) -> Agreement:
    """Judge what both saw on the same pictures; where that is too little, `apart` is asked (`apart_here`)."""
    parity = compare(fp32, variant, iou=SMALL_IOU)
    if parity.boxes >= LEAST_BOXES:
        words = f"{parity.matched:.0%} of {parity.boxes} boxes agree here"
        return Agreement(words, parity.refusal(tolerance.on_other_pictures()))
    away = apart()
    if away is None:
        return Agreement("floats round alike everywhere, so its report counts")
    if away.kernels <= away.written:
        return Agreement(
            f"the kernels here add {away.kernels:.3f} to the {away.written:.3f} that integers cost"
        )
    return Agreement(
        "", f"the integer kernels here add {away.kernels:.2f} to the {away.written:.2f} that integers cost"
    )


def apart_here(fp32: Model, variant: Model, samples: Sequence[Sample]) -> Apart | None:
    """How far the integers of a variant, and this CPU's kernels for them, take it away; None without any.

    Raises what onnxruntime raises.
    """
    network, images = checked_network(variant), [sample.image for sample in samples]
    if not in_integers(network):
        return None
    exact = outputs_of(network, variant.reading, images, exact=True)
    floats = outputs_of(checked_network(fp32), fp32.reading, images)
    own = outputs_of(network, variant.reading, images)
    return Apart(distance_to(floats)(exact), distance_to(exact)(own))


# Pictures that a variant of a model is tried on where it is to be used: the same ones everywhere.


log = logging.getLogger(__name__)

_CLIP = "media/demo.mp4"
_OF_THE_CLIP = 9
_EVERY = 10


def samples_for(spec: InputSpec) -> list[Sample]:
    """A few pictures of the bundled clip at a model's input size, and some that were made up."""
    whole = Placement(0.0, 0.0, float(spec.width_px), float(spec.height_px))
    made_up = [Sample(image, whole) for image in pictures(spec.height_px, spec.width_px)]
    return [*(Sample(*fit(picture, spec)) for picture in _of_the_clip()), *made_up]


def _of_the_clip() -> list[Picture]:
    """Pictures a second apart, from its beginning; none where it cannot be read."""
    found: list[Picture] = []
    try:
        with closing(open_source(CameraUri("file", str(bundled(_CLIP))))) as source:
            for count in range(_OF_THE_CLIP * _EVERY):
                decoded = source.read()
                if decoded is None:
                    break
                if count % _EVERY == 0:
                    found.append(decoded.picture())
    except (SourceError, UnavailableError) as error:
        log.info("precisions are compared without the bundled clip: %s", error)
    return found


FOLDER = "precision"
_SCHEMA = "visionedge/precision/2"

# Where a precision can be faster at all; asked for outright it runs anywhere.
_DEVICES: Mapping[str, tuple[str, ...]] = {"int8": ("cpu",), "fp16": ("cuda", "tensorrt")}


class Closable(Protocol):
    """A session."""

    def close(self) -> None:
        """Let go of it."""


SessionT = TypeVar("SessionT", bound=Closable)


@dataclass(frozen=True, slots=True)
class Candidate(Generic[SessionT]):
    """A model in a precision, compiled and open."""

    model: Model
    graph: bytes
    session: SessionT


def plain(reason: str) -> Choice:
    """fp32, without any contest."""
    return Choice("fp32", reason, {})


@dataclass(frozen=True, slots=True)
class Trials(Generic[SessionT]):
    """What is done with candidates: `open_session` of a graph, `run_of` one batch to be timed, and `judge`.

    `judge` holds what a variant sees here against what fp32 sees (fp32, variant, the variant's tolerance).
    """

    open_session: Callable[[bytes], SessionT]
    run_of: Callable[[Candidate[SessionT]], Callable[[], object]]
    judge: Callable[[Candidate[SessionT], Candidate[SessionT], Tolerance], Agreement]


def contenders(original: Model, *, device: str, data: Path | None) -> list[Variant]:
    """The variants of a model that may be faster on a device, and that their reports do not refuse."""
    return [variant for variant in variants(original, data) if _hindrance(variant, device) is None]


def _hindrance(variant: Variant, device: str) -> str | None:
    """Why a variant takes no part on a device; None where it does."""
    if device not in _DEVICES[variant.precision]:
        return f"its {variant.precision} variant is not used on {device}"
    if variant.refusal or not usable(variant):
        return f"its {variant.precision} variant is refused by its report: {variant.refusal}"
    return None


def _without_contest(graph: bytes, there: Sequence[Variant], device: str) -> Choice:
    """The model's own file, and why nothing was held against it; `there` are the variants that were found."""
    found = [
        _hindrance(variant, device) or f"its {variant.precision} variant does not run here"
        for variant in there
    ]
    why = "; ".join(found) or "no variant of it in another precision was found"
    # The name fp32 stands for the file as it is, and the file may be one of integers.
    own = " (it computes in 8-bit integers)" if in_integers(onnx.load_model_from_string(graph)) else ""
    return plain(f"the model file is used as it is{own}: {why}")


def pick(
    fp32: Candidate[SessionT],
    original: Model,
    *,
    device: str,
    data: Path | None,
    trials: Trials[SessionT],
    measuring: bool = True,
) -> tuple[Candidate[SessionT], Choice]:
    """The fastest precision of a model on a device; sessions that are not used are closed.

    `original` is the model as it was loaded. What cannot be opened or run, what its report refuses, and what
    sees something else here than fp32 is not used. Without `measuring` a kept choice counts, or fp32.
    """
    if not measuring and not _any_kept(data):
        return fp32, plain("nothing was measured")
    there = variants(original, data)
    found = [variant for variant in there if _hindrance(variant, device) is None]
    candidates: dict[str, Candidate[SessionT]] = {"fp32": fp32}
    for variant in found:
        try:
            model, graph = ready(variant.of(original), data)
            candidates[variant.precision] = Candidate(model, graph, trials.open_session(graph))
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no other base
            log.warning("%s: does not run here and is left out: %s", variant.path, error)
    if len(candidates) == 1:
        return fp32, _without_contest(fp32.graph, there, device)
    tolerances: dict[str, Tolerance] = {variant.precision: variant.tolerance for variant in found}
    choice = _chosen(candidates, tolerances, device, data, trials if measuring else None)
    for name, candidate in candidates.items():
        if name != choice.precision:
            candidate.session.close()
    return candidates[choice.precision], choice


def _any_kept(data: Path | None) -> bool:
    """Whether a choice was kept at all; what it is of is known only when the variants are compiled."""
    return data is not None and any((data / FOLDER).glob("*.json"))


def _chosen(
    candidates: Mapping[str, Candidate[SessionT]],
    tolerances: Mapping[str, Tolerance],
    device: str,
    data: Path | None,
    trials: Trials[SessionT] | None,
) -> Choice:
    entry = None if data is None else data / FOLDER / f"{_key(candidates, device)}.json"
    if entry is not None and (kept := _load(entry, candidates)) is not None:
        return kept
    if trials is None:
        return plain("nothing was measured")
    names = " and ".join(candidates)
    log.info("measuring this machine for the faster one of %s: about 5 s, once", names)
    try:
        choice = choose({name: trials.run_of(candidate) for name, candidate in candidates.items()})
        if choice.precision in tolerances:
            fp32, fastest = candidates["fp32"], candidates[choice.precision]
            choice = judged(choice, trials.judge(fp32, fastest, tolerances[choice.precision]))
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        log.warning("precisions could not be compared, so fp32 it is: %s", error)
        return plain("another precision failed while it was measured")
    if entry is not None:
        _keep(entry, choice)
    return choice


def judged(choice: Choice, agreement: Agreement) -> Choice:
    """The choice that was the fastest, if it sees what fp32 sees; else fp32, and why."""
    if agreement.refusal is None:
        return replace(choice, reason=f"{choice.reason}; {agreement.words}")
    reason = f"{choice.precision} is not used: {agreement.refusal} (it was {choice.reason})"
    return Choice("fp32", reason, choice.ms)


def _key(candidates: Mapping[str, Candidate[SessionT]], device: str) -> str:
    """Differs where a graph, the device, the processor or a version does."""
    digest = hashlib.sha256(" ".join(integer_instructions()).encode())
    for name, candidate in candidates.items():
        key = PlanKey.of(candidate.graph, device=device, cores=1, max_batch=1, latency_budget_ms=None)
        digest.update(f"{name} {key.name()}\n".encode())
    return digest.hexdigest()[:32]


def _load(entry: Path, candidates: Mapping[str, object]) -> Choice | None:
    try:
        document = read_json(entry)
        choice = Choice.of_document(document["choice"])
        fits = document["schema"] == _SCHEMA and choice.precision in candidates
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s: cannot be read (%s): measuring anew", entry, error.strerror)
        return None
    except (DamagedError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s: is damaged (%s) and set aside: measuring anew", entry, error)
        drop_damaged(entry)
        return None
    return choice if fits else None


def _keep(entry: Path, choice: Choice) -> None:
    try:
        write_json(entry, {"schema": _SCHEMA, "choice": choice.document()})
    except OSError as error:
        log.warning("%s: the choice cannot be kept: %s", entry, error.strerror)
