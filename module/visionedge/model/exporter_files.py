"""Files that exporters write beside a model: how pictures are prepared, and the names of classes.

    cvexport.manifest   Azure Custom Vision
    labels.json         Azure AutoML
    infer_cfg.yml       PaddleDetection

`read_…` returns a file as metadata of the model; `parse_…` interprets it for a head.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionedge.config.documents import read_document
from visionedge.errors import ConfigError, ModelError
from visionedge.model.analysis.signature import ModelSignature
from visionedge.model.interpretation import (
    MEAN_EXAMPLE,
    Color,
    NetworkInput,
    Preprocess,
    read_metadata_object,
    states_scaling,
)
from visionedge.runtime.files import read_regular_file

CUSTOM_VISION_KEY = "cvexport.manifest"
LABELS_JSON = "labels.json"
_MAX_BYTES = 1 << 20


def read_custom_vision_manifest(path: Path) -> Mapping[str, str]:
    """The manifest beside the model at `path` as metadata; empty if there is none, or it names another model.

    Raises:
        ModelError: it cannot be read, or is not a manifest.
    """
    beside = path.with_name(CUSTOM_VISION_KEY)
    if not beside.is_file():
        return {}
    document = _read_json(beside)
    if not isinstance(document, dict):
        raise ModelError(
            f"{beside}: is not a JSON object as Custom Vision writes it; remove it or export again"
        )
    if document.get("ModelFileName", path.name) != path.name:
        return {}
    size = [document.get(key) for key in ("ScaleHeight", "ScaleWidth")]
    return {CUSTOM_VISION_KEY: json.dumps(document)} | (
        {"imgsz": json.dumps(size)} if None not in size else {}
    )


def read_labels_json(path: Path) -> Mapping[str, str]:
    """The labels that Azure AutoML writes beside a model, as metadata; empty if there are none.

    Raises:
        ModelError: it cannot be read.
    """
    beside = path.with_name(LABELS_JSON)
    if not beside.exists():
        return {}
    names = _read_json(beside)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{beside}: is not a JSON list of labels as Azure AutoML writes it; remove it or export again"
        )
    return {"names": json.dumps(names)}


def _read_json(path: Path) -> Any:
    """The content of a JSON file; None if it is not JSON. Raises ModelError: it cannot be read."""
    try:
        return json.loads(read_regular_file(path, max_bytes=_MAX_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        return None


def parse_custom_vision_manifest(signature: ModelSignature) -> Mapping[str, Any] | None:
    """The manifest of a model; None if there is none.

    Raises:
        ModelError: the model has a metadata key of this name that is not a manifest.
    """
    return (
        read_metadata_object(signature, CUSTOM_VISION_KEY)
        if CUSTOM_VISION_KEY in signature.metadata
        else None
    )


def is_custom_vision(signature: ModelSignature) -> bool:
    """Whether Custom Vision exported the model."""
    return (
        parse_custom_vision_manifest(signature) is not None
        or any(key.startswith("CustomVision.") for key in signature.metadata)
        # Windows ML's TinyYOLOv2 has this key too, but it scales its pixels itself, which no export does.
        or ("Image.BitmapPixelFormat" in signature.metadata and not signature.input_ops.changes_values)
    )


_PIXEL_RANGES: Mapping[str, tuple[float, float, float]] = {
    # name in the metadata: scale, mean, std
    "NominalRange_0_255": (1.0, 0.0, 1.0),
    "Normalized_0_1": (1 / 255, 0.0, 1.0),
    "Normalized_1_1": (1 / 255, 0.5, 0.5),
}
_COLOR_NAMES: Mapping[str, Color] = {"bgr8": "bgr", "rgb8": "rgb", "bgr": "bgr", "rgb": "rgb"}


def parse_custom_vision_preprocess(signature: ModelSignature) -> tuple[Preprocess, tuple[str, ...]]:
    """The preprocessing by Custom Vision's metadata (stretched pictures), and the evidence for it.

    Raises:
        ModelError: order or range is not supported, contradicts the manifest, or is missing.
    """
    stated = read_metadata_object(signature, "visionedge.input")
    said = signature.metadata.get("Image.BitmapPixelFormat")
    written = (parse_custom_vision_manifest(signature) or {}).get("InputFormat")
    orders = {_COLOR_NAMES.get(str(word).lower(), "") for word in (said, written) if word is not None}
    if (len(orders) > 1 or "" in orders) and "color" not in stated:
        raise ModelError(
            f"its colour order is {said} in its metadata and {written} in cvexport.manifest; state"
            " input.color in MODEL.yaml beside it",
            state=("input: {color: rgb}   # or bgr",),
        )
    spread = signature.metadata.get("Image.NominalPixelRange")
    if (
        spread not in _PIXEL_RANGES
        and not states_scaling(signature)
        and not signature.input_ops.changes_values
    ):
        raise ModelError(
            f"its metadata states {spread or 'nothing'} as the range of pixels (Image.NominalPixelRange);"
            " state input.scale in MODEL.yaml beside it",
            state=("input: {scale: 1}   # pixels of 0-255; 0.00392156863: of 0-1",),
        )
    scale, mean, std = _PIXEL_RANGES.get(spread or "", (1.0, 0.0, 1.0))
    color: Color = "bgr" if orders == {"bgr"} else "rgb"
    evidence = (f"pixels are {said or written or 'RGB'}, {spread or 'as stated'}",)
    return Preprocess(color, scale, (mean,) * 3, (std,) * 3, "stretch"), evidence


# `infer_cfg.yml`: what PaddleDetection writes beside each export, and how pictures are prepared by it.
#
#     Preprocess:
#     - {type: Resize, target_size: [640, 640], keep_ratio: false, interp: 2}
#     - {type: NormalizeImage, is_scale: true, norm_type: mean_std, mean: [0.485, …], std: [0.229, …]}
#     - {type: Permute}
#
# The graph of such a model does not show the scaling of pixels: families with the same shapes differ in it,
# and the weights of the first convolution are no reliable sign.

PADDLE_KEY = "infer_cfg.yml"
_ERROR_KEY = "unreadable"
_KNOWN_STEPS = ("Resize", "NormalizeImage", "Permute")


def read_paddle_config(path: Path) -> Mapping[str, str]:
    """The file beside the model at `path` as metadata; nothing if there is none.

    It can belong to another model in the same folder, so an error in it is raised only if a head needs it.
    """
    beside = path.with_name(PADDLE_KEY)
    if not beside.is_file():
        return {}
    try:
        return {PADDLE_KEY: json.dumps(read_document(beside), default=str)}
    except ConfigError as error:
        return {PADDLE_KEY: json.dumps({_ERROR_KEY: str(error)})}


def parse_paddle_preprocess(signature: ModelSignature, picture: NetworkInput) -> Preprocess | None:
    """The preprocessing by `infer_cfg.yml` beside a model; None if there is no such file.

    Raises:
        ModelError: it is damaged, for another input size, or has an unsupported step.
    """
    if PADDLE_KEY not in signature.metadata:
        return None
    document = read_metadata_object(signature, PADDLE_KEY)
    if (reason := document.get(_ERROR_KEY)) is not None:
        raise ModelError(str(reason))
    steps = {step["type"]: step for step in _read_steps(document)}
    if unknown := [name for name in steps if name not in _KNOWN_STEPS]:
        raise _unsupported(f"the step {unknown[0]}")
    resize, normalize = (steps.get(name, {}) for name in _KNOWN_STEPS[:2])
    if not resize or not normalize:
        raise _unsupported("Preprocess without Resize and NormalizeImage")
    if resize.get("keep_ratio") is not False:
        raise _unsupported("Resize with keep_ratio")
    if resize.get("target_size") != [picture.height_px, picture.width_px]:
        raise ModelError(
            f"{PADDLE_KEY} beside it is for pictures of {resize.get('target_size')}, but the model takes"
            f" {[picture.height_px, picture.width_px]} (height, width), so the file belongs to another export"
        )
    return _read_normalization(normalize)


def make_paddle_preprocess_error() -> ModelError:
    """The error for a Paddle model whose preprocessing is shown neither by the graph nor by a file."""
    return ModelError(
        "is a Paddle model, but nothing in it shows whether ImageNet's mean is subtracted from its pixels"
        f" (as for PP-YOLOE and PicoDet) or not (PP-YOLOE+); put the {PADDLE_KEY} of its export beside it, or"
        " state input.scale, input.mean and input.std in MODEL.yaml",
        state=MEAN_EXAMPLE,
    )


def _read_steps(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = document.get("Preprocess")
    if not isinstance(steps, list) or not all(
        isinstance(s, dict) and isinstance(s.get("type"), str) for s in steps
    ):
        raise ModelError(
            f"{PADDLE_KEY} beside it is not as PaddleDetection writes it: the list Preprocess is missing"
        )
    return steps


def _read_normalization(step: Mapping[str, Any]) -> Preprocess:
    """RGB, scaled by 1/255 if `is_scale`; minus `mean`, divided by `std` unless `norm_type` is none."""
    scale = 1 / 255 if step.get("is_scale", True) is True else 1.0
    kind = step.get("norm_type", "mean_std")
    if kind == "none":
        return Preprocess("rgb", scale, fit="stretch")
    if kind != "mean_std":
        raise _unsupported(f"norm_type {kind}")
    mean, std = (_read_three_numbers(step, key) for key in ("mean", "std"))
    if 0 in std:
        raise _unsupported("a std of 0")
    return Preprocess("rgb", scale, mean, std, "stretch")


def _read_three_numbers(step: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    values = step.get(key)
    if isinstance(values, list) and len(values) == 3:
        try:
            first, second, third = (float(value) for value in values)
        except (TypeError, ValueError):
            pass
        else:
            return first, second, third
    raise _unsupported(f"{key}: {values}")


def _unsupported(what: str) -> ModelError:
    return ModelError(
        f"{PADDLE_KEY} beside it asks for {what}, which is not supported;"
        " state input in MODEL.yaml if another preprocessing fits"
    )
