"""`visionedge model compile`: the compiled graph as an ONNX file, and variants in fp16 or int8.

`compile_file` writes the graph that the engine runs. `compile_variant` makes a variant, compares it with fp32
on pictures, and stores it with the report if it agrees; half of the pictures calibrate int8, half check it.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from visionedge import __version__
from visionedge.camera.sources.images import PICTURE_SUFFIXES, natural_sort_key, read_picture
from visionedge.camera.sources.open import open_source
from visionedge.config.addresses import CameraUri
from visionedge.engine.candidate_parity import make_sample_pictures
from visionedge.engine.plan import read_cpu_name
from visionedge.errors import ConfigError, SourceError, VisionedgeError
from visionedge.frames.letterbox import fit_to_input
from visionedge.frames.types import Detections, Picture, format_utc, utc_now
from visionedge.model.compiled_metadata import require_compiled_metadata
from visionedge.model.compiler.build import load_or_compile
from visionedge.model.compiler.compile import MAX_ROWS
from visionedge.model.model import Model, find_bundled_model, load_model
from visionedge.model.parity import Tolerance
from visionedge.model.quantization.search import (
    CalibrationData,
    CalibrationSample,
    CandidateResult,
    MeasureAp,
    Precision,
    QuantizationResult,
    make_variant,
    sample_evenly,
)
from visionedge.model.quantization.variants import (
    make_tolerance_document,
    make_variant_path,
    require_variant,
    save_variant,
)
from visionedge.ops.models.evaluate import (
    Annotations,
    compute_average_precision,
    match_categories,
    read_annotations,
    require_pycocotools,
    to_coco,
)
from visionedge.runtime.files import write_atomically
from visionedge.runtime.installation import find_bundled_file
from visionedge.runtime.ort import installed_wheel
from visionedge.runtime.redaction import redact

MIN_PICTURES = 8
MAX_CALIBRATION_PICTURES = 64
MAX_VALIDATION_PICTURES = 64
"""The limit of unlabelled pictures; all labelled pictures that do not calibrate are used."""

_MAX_FILES = 1024  # of a folder without labels
_MAX_VIDEO_FRAMES = 192  # of a video


def compile_file(path: Path, output: Path, data: Path, rows: int | None = None) -> str:
    """Write the compiled graph of the model at `path` to `output` atomically; returns its description.

    Raises:
        ConfigError: `output` is the model itself.
        ModelError, UnavailableError: see `load_or_compile`.
        VisionedgeError: `output` cannot be written.
    """
    model = load_model(path)
    if output.exists() and output.samefile(path):
        raise ConfigError([f"-o {output}: is the model itself; choose another file"])
    return write_compiled_graph(model, output, data, rows)


def write_compiled_graph(model: Model, output: Path, data: Path, rows: int | None = None) -> str:
    """As `compile_file`, for a loaded model."""
    graph = load_or_compile(model, data, rows=rows or MAX_ROWS)
    _write(output, graph)
    compiled_metadata, spec = require_compiled_metadata(onnx.load_model_from_string(graph)), model.input
    batch = compiled_metadata.batch or "N"
    takes, gives = (
        f"[{batch},{spec.height_px},{spec.width_px},3] BGR",
        f"[{batch},{compiled_metadata.rows},6]",
    )
    return (
        f"{output}: uint8 {takes} -> float32 {gives}, {compiled_metadata.head}; batch "
        f"{compiled_metadata.batch_reason}"
    )


def _write(output: Path, content: bytes) -> None:
    try:
        write_atomically(output, content)
    except OSError as error:
        raise VisionedgeError(f"{output}: cannot be written: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """The arguments. `unmatched` None is the default tolerance; `output` None writes no compiled graph.

    `recipe`: the only int8 recipe to try. `thorough`: tune the int8 ranges tensor by tensor.
    """

    model: Path
    precision: Precision
    data: Path
    calibrate: Path | None = None
    labels: Path | None = None
    unmatched: float | None = None
    into: Path | None = None
    output: Path | None = None
    rows: int | None = None
    recipe: str | None = None
    thorough: bool = False


def compile_variant(request: CompileRequest) -> int:
    """Make, check and store a variant; prints a table to stdout and progress to stderr.

    Raises:
        ConfigError: pictures are missing, `output` is the path of the variant, or the recipe is unknown.
        SourceError, ModelError, UnavailableError: the variant cannot be made.
        VisionedgeError: the variant is refused, or cannot be written; then nothing is stored.
    """
    model = load_model(request.model)
    if request.output is not None and request.output.absolute() in _candidate_paths(request, model):
        raise ConfigError([f"-o {request.output}: is the path of the variant; choose another file"])

    def progress(line: str) -> None:
        sys.stderr.write(f"{redact(line)}\n")
        sys.stderr.flush()

    began_s = time.monotonic()
    material = read_calibration_data(model, request.precision, request.calibrate, request.labels, progress)
    usual = Tolerance()
    tolerance = Tolerance(usual.unmatched if request.unmatched is None else request.unmatched)
    made = make_variant(
        model,
        request.precision,
        material,
        tolerance,
        progress=progress,
        only=request.recipe,
        thorough=request.thorough,
    )
    sys.stdout.write(format_variants(made))
    if made.refusal is not None:
        raise VisionedgeError(
            f"{request.model}: {request.precision} is refused: {made.refusal}; nothing was stored."
            " Use more or better pictures, or a wider --tolerance"
        )
    report = _report(made, material, tolerance, time.monotonic() - began_s)
    progress(f"stored as {_store_variant(request, model, made, report)}; {_advice(made, request.precision)}")
    if request.output is not None:
        folder = None if request.into is not None else request.data
        variant = require_variant(model, request.precision, folder, request.into)
        progress(write_compiled_graph(variant.of(model), request.output, request.data, request.rows))
    return 0


def _advice(made: QuantizationResult, precision: Precision) -> str:
    times = made.chosen.pace.speedup
    if precision == "fp16":
        return "used automatically on a GPU where it is faster"
    if times < 1.1:
        return f"{times:.2f} times as fast as fp32 here: not used on this machine"
    return f"{times:.2f} times as fast as fp32 here: used automatically on machines where it is faster"


# --- storing a variant --------------------------------------------------------------------------------------


def _candidate_paths(request: CompileRequest, model: Model) -> list[Path]:
    """The paths to try, the preferred one first."""
    if request.into is not None:
        return [make_variant_path(model, request.precision, request.into).absolute()]
    in_data = make_variant_path(model, request.precision, data=request.data).absolute()
    if model.path.resolve() == find_bundled_model().resolve() and request.calibrate is None:
        return [in_data]  # a run on the bundled clip alone must not overwrite a shipped variant
    return [make_variant_path(model, request.precision).absolute(), in_data]


def _store_variant(
    request: CompileRequest, model: Model, made: QuantizationResult, report: dict[str, Any]
) -> Path:
    problems = []
    for path in _candidate_paths(request, model):
        try:
            save_variant(path, made.network, model, request.precision, report)
        except OSError as error:
            problems.append(f"{path}: cannot be written: {error.strerror}")
        else:
            return path
    raise VisionedgeError("; ".join(problems))


def _report(
    made: QuantizationResult, material: CalibrationData, tolerance: Tolerance, seconds: float
) -> dict[str, Any]:
    parity, with_integer_kernels, common = (
        made.chosen.parity,
        made.chosen.with_integer_kernels,
        made.chosen.common,
    )
    return {
        "recipe": made.chosen.description,
        "refused": made.refusal,
        "parity": None if parity is None else parity.document(),
        "parityHere": None if with_integer_kernels is None else with_integer_kernels.document(),
        "parityClip": None if common is None else common.document(),
        "tolerance": make_tolerance_document(tolerance),
        "speed": {
            "fp32Ms": round(made.fp32_ms, 2),
            "ms": round(made.chosen.pace.ms, 2),
            "timesAsFast": round(made.chosen.pace.speedup, 3),
        },
        "tried": [_line(tried) for tried in made.tried],
        "made": {
            "at": format_utc(utc_now()),
            "seconds": round(seconds, 1),
            "visionedge": __version__,
            "onnx": onnx.__version__,
            "onnxruntime": installed_wheel() or "unknown",
            "processor": read_cpu_name(),
            "calibrationPictures": len(material.calibration),
        },
    }


def _line(tried: CandidateResult) -> dict[str, Any]:
    return {
        "recipe": tried.description,
        "ms": round(tried.pace.ms, 2),
        "timesAsFast": round(tried.pace.speedup, 3),
        "matched": None if tried.parity is None else round(tried.parity.matched, 4),
        "scoreShift": None if tried.parity is None else round(tried.parity.score_shift, 4),
        "matchedHere": None
        if tried.with_integer_kernels is None
        else round(tried.with_integer_kernels.matched, 4),
        "matchedClip": None if tried.common is None else round(tried.common.matched, 4),
        "refused": tried.refusal,
    }


def format_variants(made: QuantizationResult) -> str:
    """The candidates as a table, the chosen one marked; `here`: with the int8 kernels of this machine."""
    rows = [("fp32", f"{made.fp32_ms:.1f}", "1.00", "", "", "", "", "")]
    for tried in made.tried:
        mark = "" if tried is not made.chosen else ("<- chosen" if tried.refusal is None else "<- refused")
        rows.append(
            (
                tried.description,
                f"{tried.pace.ms:.1f}",
                f"{tried.pace.speedup:.2f}",
                *_format_agreement(tried),
                mark,
            )
        )
    head = ("tried", "ms", "x fp32", "agree", "shift", "AP loss", "here", "")
    wide = max(len(row[0]) for row in rows)
    lines = [
        f"{row[0]:<{wide}}" + "".join(f"  {cell:>7}" for cell in row[1:7]) + f"  {row[7]}"
        for row in (head, *rows)
    ]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _format_agreement(tried: CandidateResult) -> tuple[str, str, str, str]:
    parity, with_integer_kernels = tried.parity, tried.with_integer_kernels
    if parity is None:
        return ("-", "-", "", "")
    loss = "" if parity.ap is None else f"{parity.ap.ap_fp32 - parity.ap.ap:+.4f}"
    return (
        f"{parity.matched:.1%}",
        f"{parity.score_shift:.3f}",
        loss,
        "" if with_integer_kernels is None else f"{with_integer_kernels.matched:.1%}",
    )


# --- the pictures of a variant ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _CalibrationImage:
    """A picture at the model's input size, its original size, and its id in the annotations, if any."""

    sample: CalibrationSample
    width_px: int
    height_px: int
    number: int | None = None


def read_calibration_data(
    model: Model,
    precision: Precision,
    folder: Path | None,
    labels: Path | None,
    progress: Callable[[str], None],
) -> CalibrationData:
    """Read the pictures of a folder or a video (None: the bundled clip); every second one is for the check.

    Raises:
        ConfigError: a folder is needed, or the labels are of other pictures or classes.
        SourceError: the folder or video cannot be read, or has too few pictures.
        UnavailableError: labels are given and pycocotools is not installed.
    """
    annotations = None
    if labels is not None:
        require_pycocotools()
        annotations = read_annotations(labels)
        match_categories(model.labels, annotations)
    source = _source(model, precision, folder, progress)
    photos = _photos(source, model, annotations, progress)
    if len(photos) < MIN_PICTURES:
        raise SourceError(
            f"{source}: has {len(photos)} different pictures; calibration needs at least {MIN_PICTURES},"
            " better some dozens"
        )
    # fp16 has no ranges to calibrate, so all pictures check it.
    validation = photos[1::2] if precision == "int8" else photos
    labelled = [photo for photo in validation if photo.number is not None]
    if annotations is not None and not labelled:
        raise ConfigError([f"--labels {labels}: none, or almost none, of its pictures is in {source}"])
    unlabelled = [photo for photo in validation if photo.number is None]
    calibration = sample_evenly(photos[::2], MAX_CALIBRATION_PICTURES)
    return CalibrationData(
        tuple(photo.sample for photo in calibration),
        tuple(photo.sample for photo in (*labelled, *sample_evenly(unlabelled, MAX_VALIDATION_PICTURES))),
        None if annotations is None else _make_ap_measure(annotations, labelled, model),
        len(labelled),
        tuple(make_sample_pictures(model.input)),
    )


def _source(model: Model, precision: Precision, folder: Path | None, progress: Callable[[str], None]) -> Path:
    if folder is not None:
        return folder
    if precision == "int8" and model.path.resolve() != find_bundled_model().resolve():
        raise ConfigError(
            [
                "--calibrate DIR: int8 needs some dozens of pictures like those of the cameras,"
                " to calibrate the ranges of its values"
            ]
        )
    progress("no --calibrate: using pictures of the bundled clip")
    return find_bundled_file("media/demo.mp4")


def _photos(
    source: Path, model: Model, annotations: Annotations | None, progress: Callable[[str], None]
) -> list[_CalibrationImage]:
    """Each different picture once, in the order of the names."""
    if source.is_dir():
        numbers = {Path(file).name: number for number, file in annotations.photos} if annotations else {}
        pictures = _read_folder(source, numbers, progress)
    else:
        pictures = ((picture, None) for picture in _read_video(source))
    seen: set[bytes] = set()
    photos = []
    for picture, number in pictures:
        sample = CalibrationSample(*fit_to_input(picture, model.input))
        digest = hashlib.sha256(sample.image.tobytes()).digest()
        if digest not in seen:
            seen.add(digest)
            photos.append(_CalibrationImage(sample, picture.shape[1], picture.shape[0], number))
    return photos


def _read_folder(
    folder: Path, numbers: dict[str, int], progress: Callable[[str], None]
) -> Iterator[tuple[Picture, int | None]]:
    """Pictures with their id in the annotations; an unreadable one is reported and left out."""
    try:
        entries = [entry for entry in folder.iterdir() if entry.suffix.lower() in PICTURE_SUFFIXES]
    except OSError as error:
        raise SourceError(f"{folder} cannot be listed: {error.strerror}") from None
    files = sorted(entries, key=lambda entry: natural_sort_key(entry.name))
    if not numbers and len(files) > _MAX_FILES:
        files = [files[index * len(files) // _MAX_FILES] for index in range(_MAX_FILES)]
    for file in files:
        try:
            yield read_picture(file), numbers.get(file.name)
        except SourceError as error:
            progress(str(error))


def _read_video(path: Path) -> list[Picture]:
    """At most `_MAX_VIDEO_FRAMES` pictures at equal distances, and at least half as many of a long video.

    Raises:
        SourceError: the video cannot be opened or decoded.
    """
    if not path.exists():
        raise SourceError(f"{path}: there is no such folder or video")
    source, every, count = open_source(CameraUri("file", str(path))), 1, 0
    kept: list[Picture] = []
    try:
        while (decoded := source.read()) is not None:
            if count % every == 0:
                kept.append(decoded.picture())
            count += 1
            if len(kept) > _MAX_VIDEO_FRAMES:
                # The length is unknown in advance: keep every second picture, and halve the sampling rate.
                kept, every = kept[::2], every * 2
    finally:
        source.close()
    return kept


def _make_ap_measure(
    annotations: Annotations, labelled: Sequence[_CalibrationImage], model: Model
) -> MeasureAp:
    """A function that computes AP and AP50 from the detections; the labelled pictures are the first ones."""
    categories = match_categories(model.labels, annotations)
    numbers = [photo.number for photo in labelled if photo.number is not None]

    def measured(seen: Sequence[Detections]) -> tuple[float, float]:
        found = [
            one
            for photo, detections in zip(labelled, seen, strict=False)
            for one in to_coco(photo.number or 0, photo.width_px, photo.height_px, detections, categories)
        ]
        figures = compute_average_precision(annotations, numbers, found)
        return figures["ap"] or 0.0, figures["ap50"] or 0.0

    return measured
