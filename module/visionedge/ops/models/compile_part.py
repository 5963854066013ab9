"""`visionedge model compile`: the compiled graph as a file that anybody's onnxruntime runs."""

import os
from pathlib import Path

import onnx

from visionedge.errors import ConfigError, VisionedgeError
from visionedge.model.compiler.build import compiled
from visionedge.model.compiler.compile import ROWS
from visionedge.model.compiler.stamp import imprint_of
from visionedge.model.model import Model, load_model


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
