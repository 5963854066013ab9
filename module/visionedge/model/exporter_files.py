"""`cvexport.manifest`: what Azure Custom Vision puts beside a model that it exports."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visionedge.config.documents import read_file
from visionedge.errors import ConfigError, ModelError
from visionedge.model.analysis.signature import Signature
from visionedge.model.interpretation import NetworkInput, Preprocess, stated_object
from visionedge.runtime.files import read_regular

CUSTOM_VISION_KEY = "cvexport.manifest"
LABELS_JSON = "labels.json"
_LONGEST_BYTES = 1 << 20


def read_export(path: Path) -> Mapping[str, str]:
    """The manifest beside the model at `path` as metadata; nothing where there is none, or that of another.

    Raises:
        ModelError: it cannot be read, or is none.
    """
    beside = path.with_name(CUSTOM_VISION_KEY)
    if not beside.is_file():
        return {}
    try:
        document = json.loads(beside.read_bytes()[:_LONGEST_BYTES].decode("utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{beside}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ModelError(f"{beside}: is no JSON object as Custom Vision writes it; remove it or export again")
    if document.get("ModelFileName", path.name) != path.name:
        return {}
    size = [document.get(key) for key in ("ScaleHeight", "ScaleWidth")]
    return {CUSTOM_VISION_KEY: json.dumps(document)} | (
        {"imgsz": json.dumps(size)} if None not in size else {}
    )


def read_labels_json(path: Path) -> Mapping[str, str]:
    """The list of labels that Azure AutoML puts beside a model, as metadata; nothing where there is none.

    Raises:
        ModelError: it cannot be read.
    """
    beside = path.with_name(LABELS_JSON)
    if not beside.exists():
        return {}
    try:
        names = json.loads(read_regular(beside, most_bytes=_LONGEST_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{beside}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"{beside}: is no JSON list of labels as Azure AutoML writes it; remove it or export again"
        )
    return {"names": json.dumps(names)}


def manifest(signature: Signature) -> Mapping[str, Any] | None:
    """The manifest of a model, None where there is none for it.

    Raises:
        ModelError: the model carries one itself that is none.
    """
    return stated_object(signature, CUSTOM_VISION_KEY) if CUSTOM_VISION_KEY in signature.metadata else None


# `infer_cfg.yml`: what PaddleDetection writes beside each export, and how pictures are prepared by it.
#
#     Preprocess:
#     - {type: Resize, target_size: [640, 640], keep_ratio: false, interp: 2}
#     - {type: NormalizeImage, is_scale: true, norm_type: mean_std, mean: [0.485, …], std: [0.229, …]}
#     - {type: Permute}
#
# Nothing in such a model tells how its pixels were scaled: families that share every shape differ in that,
# and even the weights of the first convolution do not remember it reliably.


PADDLE_KEY = "infer_cfg.yml"
_UNREADABLE = "unreadable"
_STEPS = ("Resize", "NormalizeImage", "Permute")


def read_config(path: Path) -> Mapping[str, str]:
    """The file beside the model at `path` as metadata; nothing where there is none.

    It may be that of another model in the same folder, so what is wrong with it is told when it is asked.
    """
    beside = path.with_name(PADDLE_KEY)
    if not beside.is_file():
        return {}
    try:
        return {PADDLE_KEY: json.dumps(read_file(beside), default=str)}
    except ConfigError as error:
        return {PADDLE_KEY: json.dumps({_UNREADABLE: str(error)})}


def told_preparation(signature: Signature, picture: NetworkInput) -> Preprocess | None:
    """The preparation by the file that lies beside a model; None where there is none.

    Raises:
        ModelError: it is damaged, of another size than the model, or asks for what is not done here.
    """
    if PADDLE_KEY not in signature.metadata:
        return None
    document = stated_object(signature, PADDLE_KEY)
    if (words := document.get(_UNREADABLE)) is not None:
        raise ModelError(str(words))
    steps = {step["type"]: step for step in _steps(document)}
    if unknown := [name for name in steps if name not in _STEPS]:
        raise _not_done(f"the step {unknown[0]}")
    resize, normalize = (steps.get(name, {}) for name in _STEPS[:2])
    if not resize or not normalize:
        raise _not_done("Preprocess without Resize and NormalizeImage")
    if resize.get("keep_ratio") is not False:
        raise _not_done("Resize with keep_ratio")
    if resize.get("target_size") != [picture.height_px, picture.width_px]:
        raise ModelError(
            f"{PADDLE_KEY} beside it is for pictures of {resize.get('target_size')}, but the model takes"
            f" {[picture.height_px, picture.width_px]} (height, width): it is that of another export"
        )
    return _normalization(normalize)


def _steps(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = document.get("Preprocess")
    if not isinstance(steps, list) or not all(
        isinstance(s, dict) and isinstance(s.get("type"), str) for s in steps
    ):
        raise ModelError(
            f"{PADDLE_KEY} beside it is none as PaddleDetection writes it: it has no list of Preprocess"
        )
    return steps


def _normalization(step: Mapping[str, Any]) -> Preprocess:
    """RGB times 1/255 where `is_scale`, less `mean` by `std` unless `norm_type` is none."""
    scale = 1 / 255 if step.get("is_scale", True) is True else 1.0
    kind = step.get("norm_type", "mean_std")
    if kind == "none":
        return Preprocess("rgb", scale, fit="stretch")
    if kind != "mean_std":
        raise _not_done(f"norm_type {kind}")
    mean, std = (_three(step, key) for key in ("mean", "std"))
    if 0 in std:
        raise _not_done("a std of 0")
    return Preprocess("rgb", scale, mean, std, "stretch")


def _three(step: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    values = step.get(key)
    if isinstance(values, list) and len(values) == 3:
        try:
            first, second, third = (float(value) for value in values)
        except (TypeError, ValueError):
            pass
        else:
            return first, second, third
    raise _not_done(f"{key}: {values}")


def _not_done(what: str) -> ModelError:
    return ModelError(
        f"{PADDLE_KEY} beside it wants {what}, which is not done here;"
        " state input in MODEL.yaml if another way fits"
    )
