"""`visionedge model compile --precision`: a variant of a model, judged on pictures, kept with its report."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import onnx

from visionedge import __version__
from visionedge.engine.plan import processor
from visionedge.errors import ConfigError, VisionedgeError
from visionedge.frames.types import utc_now, utc_text
from visionedge.model.compiler.build import compiled, imprint_of
from visionedge.model.compiler.compile import ROWS
from visionedge.model.model import Model, bundled_model_path, load_model
from visionedge.model.parity import Tolerance
from visionedge.model.quantization.search import Made, Material, Precision, Tried, make
from visionedge.model.quantization.variants import demanded, place_of, store, tolerance_document
from visionedge.ops.models.calibration_data import gather
from visionedge.runtime.ort import wheel
from visionedge.runtime.redaction import redact

# `visionedge model compile`: the compiled graph as a file that anybody's onnxruntime runs.


def compile_to(path: Path, output: Path, data: Path, rows: int | None = None) -> str:
    """Write the compiled graph of the model at `path` to `output`, whole or not at all; what it is, in words.

    Raises:
        ConfigError: `output` is the model itself.
        ModelError, UnavailableError: see `building.build`.
        VisionedgeError: `output` cannot be written.
    """
    model = load_model(path)
    if output.exists() and output.samefile(path):
        raise ConfigError([f"-o {output}: is the model itself; name another file"])
    return write_compiled(model, output, data, rows)


def write_compiled(model: Model, output: Path, data: Path, rows: int | None = None) -> str:
    """As `compile_to`, for a model that is loaded."""
    graph = compiled(model, data, rows=rows or ROWS)
    _write(output, graph)
    imprint, spec = imprint_of(onnx.load_model_from_string(graph)), model.input
    batch = imprint.batch or "N"
    takes, gives = f"[{batch},{spec.height_px},{spec.width_px},3] BGR", f"[{batch},{imprint.rows},6]"
    return f"{output}: uint8 {takes} -> float32 {gives}, {imprint.head}; batch {imprint.batch_words}"


def _write(output: Path, content: bytes) -> None:
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        try:
            part.write_bytes(content)
            part.replace(output)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise VisionedgeError(f"{output}: cannot be written: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for. `unmatched` None is the usual tolerance, `output` None writes no compiled graph.

    `recipe` names the only one to try for integers, `thorough` sets their ranges tensor by tensor.
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


def compile_variant(request: Request, out: TextIO | None = None, tell: TextIO | None = None) -> int:
    """Make, judge and keep a variant; the table goes to `out` (stdout), progress to `tell` (stderr).

    Raises:
        ConfigError: pictures are missing, `output` is where the variant goes, or there is no such recipe.
        SourceError, ModelError, UnavailableError: it cannot be made.
        VisionedgeError: it is refused, or cannot be written; nothing was kept then.
    """
    out, tell = out or sys.stdout, tell or sys.stderr
    model = load_model(request.model)
    if request.output is not None and request.output.absolute() in _places(request, model):
        raise ConfigError([f"-o {request.output}: is where the variant itself goes; name another file"])

    def progress(line: str) -> None:
        tell.write(f"{redact(line)}\n")
        tell.flush()

    began_s = time.monotonic()
    material = gather(model, request.precision, request.calibrate, request.labels, progress)
    usual = Tolerance()
    tolerance = Tolerance(usual.unmatched if request.unmatched is None else request.unmatched)
    made = make(
        model,
        request.precision,
        material,
        tolerance,
        tell=progress,
        only=request.recipe,
        thorough=request.thorough,
    )
    out.write(table(made))
    if made.refusal is not None:
        raise VisionedgeError(
            f"{request.model}: {request.precision} is refused: {made.refusal}; nothing was kept."
            " Give more and better pictures, or a wider --tolerance"
        )
    report = _report(made, material, tolerance, time.monotonic() - began_s)
    progress(f"kept as {_keep(request, model, made, report)}; {_advice(made, request.precision)}")
    if request.output is not None:
        folder = None if request.into is not None else request.data
        variant = demanded(model, request.precision, folder, request.into)
        progress(write_compiled(variant.of(model), request.output, request.data, request.rows))
    return 0


def _advice(made: Made, precision: Precision) -> str:
    times = made.chosen.pace.times_as_fast
    if precision == "fp16":
        return "a GPU that is faster with it will use it"
    if times < 1.1:
        return f"at {times:.2f} times the speed of fp32 it is no gain on this machine, and not used here"
    return f"{times:.2f} times as fast as fp32 here: used automatically where that holds"


# --- where it goes ------------------------------------------------------------------------------------------


def _places(request: Request, model: Model) -> list[Path]:
    """The places to try, the best first."""
    if request.into is not None:
        return [place_of(model, request.precision, request.into).absolute()]
    in_data = place_of(model, request.precision, data=request.data).absolute()
    if model.path.resolve() == bundled_model_path().resolve() and request.calibrate is None:
        return [in_data]  # what comes along is not overwritten by a run with nothing but the clip
    return [place_of(model, request.precision).absolute(), in_data]


def _keep(request: Request, model: Model, made: Made, report: dict[str, Any]) -> Path:
    problems = []
    for path in _places(request, model):
        try:
            store(path, made.network, model, request.precision, report)
        except OSError as error:
            problems.append(f"{path}: cannot be written: {error.strerror}")
        else:
            return path
    raise VisionedgeError("; ".join(problems))


def _report(made: Made, material: Material, tolerance: Tolerance, seconds: float) -> dict[str, Any]:
    parity, here, common = made.chosen.parity, made.chosen.here, made.chosen.common
    return {
        "recipe": made.chosen.words,
        "refused": made.refusal,
        "parity": None if parity is None else parity.document(),
        "parityHere": None if here is None else here.document(),
        "parityClip": None if common is None else common.document(),
        "tolerance": tolerance_document(tolerance),
        "speed": {
            "fp32Ms": round(made.fp32_ms, 2),
            "ms": round(made.chosen.pace.ms, 2),
            "timesAsFast": round(made.chosen.pace.times_as_fast, 3),
        },
        "tried": [_line(tried) for tried in made.tried],
        "made": {
            "at": utc_text(utc_now()),
            "seconds": round(seconds, 1),
            "visionedge": __version__,
            "onnx": onnx.__version__,
            "onnxruntime": wheel() or "unknown",
            "processor": processor(),
            "calibrationPictures": len(material.calibration),
        },
    }


def _line(tried: Tried) -> dict[str, Any]:
    return {
        "recipe": tried.words,
        "ms": round(tried.pace.ms, 2),
        "timesAsFast": round(tried.pace.times_as_fast, 3),
        "matched": None if tried.parity is None else round(tried.parity.matched, 4),
        "scoreShift": None if tried.parity is None else round(tried.parity.shift, 4),
        "matchedHere": None if tried.here is None else round(tried.here.matched, 4),
        "matchedClip": None if tried.common is None else round(tried.common.matched, 4),
        "refused": tried.refusal,
    }


def table(made: Made) -> str:
    """What was tried, for people, the chosen one marked; `here` is with the kernels of this machine."""
    rows = [("fp32", f"{made.fp32_ms:.1f}", "1.00", "", "", "", "", "")]
    for tried in made.tried:
        mark = "" if tried is not made.chosen else ("<- chosen" if tried.refusal is None else "<- refused")
        rows.append(
            (tried.words, f"{tried.pace.ms:.1f}", f"{tried.pace.times_as_fast:.2f}", *_seen(tried), mark)
        )
    head = ("tried", "ms", "x fp32", "agree", "shift", "AP loss", "here", "")
    wide = max(len(row[0]) for row in rows)
    lines = [
        f"{row[0]:<{wide}}" + "".join(f"  {cell:>7}" for cell in row[1:7]) + f"  {row[7]}"
        for row in (head, *rows)
    ]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _seen(tried: Tried) -> tuple[str, str, str, str]:
    parity, here = tried.parity, tried.here
    if parity is None:
        return ("-", "-", "", "")
    loss = "" if parity.ap is None else f"{parity.ap.ap_fp32 - parity.ap.ap:+.4f}"
    return (
        f"{parity.matched:.1%}",
        f"{parity.shift:.3f}",
        loss,
        "" if here is None else f"{here.matched:.1%}",
    )
