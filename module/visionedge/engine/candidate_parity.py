"""Whether a candidate detects the same as onnxruntime in fp32 on the CPU.

A variant has a report, but it may be from another machine, and integer kernels differ between CPUs; another
runtime, precision or option has none. So every candidate computes some pictures of the bundled clip, and its
detections are compared with those of the reference. A model that detects too little there is judged by its
raw outputs.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from visionedge.engine.device_parity import compare_rows
from visionedge.engine.engine_choice import CandidateAgreement
from visionedge.errors import SourceError, UnavailableError
from visionedge.frames.types import Detections, InputSpec, Picture, Placement
from visionedge.model.compiler.compile import read_unchanged_network
from visionedge.model.compiler.trial_run import make_test_pictures
from visionedge.model.model import Model
from visionedge.model.parity import MIN_BOXES, SMALL_BOX_MATCH_IOU, Tolerance, compare_detections
from visionedge.model.postprocess import Rows
from visionedge.model.quantization.int8 import make_distance, run_network
from visionedge.model.quantization.search import CalibrationSample, is_quantized
from visionedge.runtime.installation import find_bundled_file

log = logging.getLogger(__name__)

RUNTIME_TOLERANCES: Mapping[str, Tolerance] = {
    # Another runtime in fp32 only rounds in another order: what differs more is an error of its kernels.
    "fp32": Tolerance(unmatched=0.03, score_shift=0.005),
    # bf16 has 8 significant bits, and fp32 has 24. Scores moved by 0.002 to 0.006; by 0.016 for DEIMv2
    # (OpenVINO 2026.4, the bundled pictures).
    "bf16": Tolerance(unmatched=0.05, score_shift=0.05),
}
"""Limits on the CPU by precision, for candidates without a report. A GPU has those of the device check."""


@dataclass(frozen=True, slots=True)
class OutputDistance:
    """How much the outputs of a network differ, as a share of their own variation.

    `quantization`: the int8 network, computed exactly, from the fp32 network; its report was judged by this.
    `kernels`: the int8 network, computed by the integer kernels of this CPU, from the exact one.
    """

    quantization: float
    kernels: float


def check_agreement(
    reference: Sequence[Detections],
    candidate: Sequence[Detections],
    tolerance: Tolerance,
    check_outputs: Callable[[], CandidateAgreement],
) -> CandidateAgreement:
    """Compare the detections of both on the same pictures; the outputs if there are too few detections."""
    parity = compare_detections(reference, candidate, iou=SMALL_BOX_MATCH_IOU)
    if parity.boxes < MIN_BOXES:
        return check_outputs()
    message = (
        f"{parity.matched:.0%} of {parity.boxes} boxes agree here, scores differ by {parity.score_shift:.4f}"
    )
    return CandidateAgreement(message, parity.refusal(tolerance))


def check_finite(rows: Rows) -> CandidateAgreement | None:
    """The refusal of a candidate whose rows hold NaN or infinity; else None."""
    if np.isfinite(rows).all():
        return None
    return CandidateAgreement("", "its output contains NaN or infinity")


def check_rows(model: Model, reference: Rows, candidate: Rows) -> CandidateAgreement:
    """Compare the strongest rows (n, K, 6): for a graph without integers, on any runtime."""
    found = compare_rows(model, reference, candidate, "pictures")
    return CandidateAgreement(found.message, found.refusal)


def check_integers(distance: OutputDistance | None) -> CandidateAgreement:
    """Whether the integer kernels of this CPU change the outputs less than quantization does."""
    if distance is None:
        return CandidateAgreement("it has no integers to round differently here, so its report counts")
    found = (
        f"the integer kernels here add a difference of {distance.kernels:.3f} to the"
        f" {distance.quantization:.3f} of quantization"
    )
    if distance.kernels <= distance.quantization:
        return CandidateAgreement(found)
    return CandidateAgreement("", found)


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
            "the bundled clip cannot be read (%s): engines are compared on synthetic pictures only", error
        )
    return found
