"""The interface of a head: it reads a signature and returns a `ModelInterpretation` for the compiler.

A new head is one file in `heads/` with a tuple `HEADS`; nothing else has to be changed.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

from visionedge.errors import ModelError
from visionedge.frames.types import Anchor, FitMode, InputSpec, Resample, Rounding
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.graph import NodeBuilder

Color = Literal["bgr", "rgb"]
MEAN_EXAMPLE = (
    "input: {scale: 0.00392156863, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}   # your model's",
)
"""Lines for `MODEL.yaml` if only the range of pixel values is unknown."""
Layout = Literal["NCHW", "NHWC"]

CLASSIFIER_HEAD = "classifier"
"""The family whose rows describe the whole picture."""


@dataclass(frozen=True, slots=True)
class NetworkInput:
    """The input that takes the picture. `batch` is None if it takes any number of pictures."""

    name: str
    dtype: str
    layout: Layout
    width_px: int
    height_px: int
    batch: int | None


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How a picture becomes the network's input: (pixel * scale - mean) / std, in the order of `color`.

    `fit`, `anchor`, `pad`, `resample` and `rounding` describe the resizing before it (see
    `frames.InputSpec`).
    """

    color: Color = "bgr"
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    fit: FitMode = "letterbox"
    anchor: Anchor = "center"
    pad: int = 114
    resample: Resample = "bilinear"
    rounding: Rounding = "nearest"


class Decoder(ABC):
    """Writes the nodes behind a network, and those in front of its further inputs.

    Subclasses are frozen dataclasses: their `repr` is a part of the cache key of a compiled graph.
    """

    __slots__ = ()

    def feeds(self, nodes: NodeBuilder, pictures: str) -> Mapping[str, str]:  # noqa: ARG002 - see subclasses
        """By name, the tensors for the inputs beside the picture, if there are any.

        `pictures` is the tensor of the pictures, uint8 [N, H, W, 3].
        """
        return {}

    @abstractmethod
    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """Decode the outputs to the best rows: float32 [N, K, 6], K fixed and at most `limit`.

        A row is left, top, right, bottom (input pixels), score (0-1), class. Scores fall from row to row.
        """


@dataclass(frozen=True, slots=True)
class ModelInterpretation:
    """How a model is used. `needs_nms`: its boxes need non-maximum suppression.

    `class_count` is 0 if the model does not show it. `background`: class 0 is the background, and the
    labels may leave it out. `evidence` lists why this head was chosen, one clause each. `compiled_from`: of
    a compiled graph, the SHA-256 of the original file.
    """

    head: str
    input: NetworkInput
    preprocess: Preprocess
    decoder: Decoder
    class_count: int
    needs_nms: bool
    evidence: tuple[str, ...]
    background: bool = False
    compiled_from: str | None = None

    @property
    def is_classifier(self) -> bool:
        """Whether its rows are classes of the whole picture, and not objects."""
        return self.head == CLASSIFIER_HEAD

    @property
    def input_spec(self) -> InputSpec:
        """How cameras have to resize a picture for this model."""
        preprocess = self.preprocess
        size = self.input.width_px, self.input.height_px
        return InputSpec(
            *size, preprocess.fit, preprocess.anchor, preprocess.pad, preprocess.resample, preprocess.rounding
        )


class DetectionHead(Protocol):
    """A family of detectors, or the classifiers."""

    @property
    def name(self) -> str:
        """Its name in messages and in the metadata key ``visionedge.head``."""

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """The interpretation of a model of this family; None for any other model.

        Raises:
            ModelError: the model's own metadata contradicts itself.
        """


MAX_BATCH = 256
MAX_SIDE_PX = 8192


def find_picture_input(signature: ModelSignature) -> NetworkInput | None:
    """The only input that takes a colour picture of a fixed size; None if there is not exactly one.

    Raises:
        ModelError: its batch is above `MAX_BATCH`, or its sides are above `MAX_SIDE_PX`.
    """
    found = [i for i in (_as_picture(tensor) for tensor in signature.inputs) if i is not None]
    if len(found) != 1:
        return None
    (picture,) = found
    if (picture.batch or 1) > MAX_BATCH:
        raise ModelError(
            f"takes {picture.batch:,} pictures at once; the limit is {MAX_BATCH}; export it with a batch"
            " of 1, or an open one",
            state=(),
        )
    if max(picture.width_px, picture.height_px) > MAX_SIDE_PX:
        raise ModelError(
            f"takes pictures of {picture.width_px} x {picture.height_px}; the limit is {MAX_SIDE_PX} a side;"
            " export it for a smaller size",
            state=(),
        )
    return picture


def find_only_input(signature: ModelSignature) -> NetworkInput | None:
    """The picture input (see `find_picture_input`) of a model without further inputs; else None."""
    picture = find_picture_input(signature)
    return picture if len(signature.inputs) == 1 else None


def _as_picture(tensor: TensorInfo) -> NetworkInput | None:
    if tensor.shape is None or len(tensor.shape) != 4 or tensor.dtype not in ("float32", "float16", "uint8"):
        return None
    batch, second, third, fourth = tensor.shape
    if second == 3 and third and fourth:
        return NetworkInput(tensor.name, tensor.dtype, "NCHW", fourth, third, batch)
    if fourth == 3 and second and third:
        return NetworkInput(tensor.name, tensor.dtype, "NHWC", third, second, batch)
    return None


Check = Callable[[Any], str | None]
"""Returns what a value must be, as text; None if it is right."""


def is_number(value: Any) -> bool:
    """Whether a value of a JSON or YAML document is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_one_of(*choices: str) -> Check:
    """A check that a value is one of these words."""
    return lambda value: None if value in choices else f"must be {' or '.join(choices)}"


def _check_integer(low: int, high: int, name: str) -> Check:
    def check(value: Any) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"must be a {name}, {low} to {high}"

    return check


def _check_scale(value: Any) -> str | None:
    return None if is_number(value) and value > 0 else "must be a number above 0, such as 0.00392156863"


def _check_mean(value: Any) -> str | None:
    right = isinstance(value, list) and len(value) == 3 and all(map(is_number, value))
    return None if right else "must be three numbers"


def _check_std(value: Any) -> str | None:
    return "must be three numbers, none of them 0" if _check_mean(value) or 0 in value else None


INPUT_CHECKS: Mapping[str, Check] = {
    "color": check_one_of(*get_args(Color)),
    "scale": _check_scale,
    "mean": _check_mean,
    "std": _check_std,
    "fit": check_one_of(*get_args(FitMode)),
    "anchor": check_one_of(*get_args(Anchor)),
    "pad": _check_integer(0, 255, "grey level"),
    "resample": check_one_of(*get_args(Resample)),
    "rounding": check_one_of(*get_args(Rounding)),
    "width": _check_integer(1, MAX_SIDE_PX, "number of pixels"),
    "height": _check_integer(1, MAX_SIDE_PX, "number of pixels"),
}
"""The keys of `input` in `MODEL.yaml` and of the metadata key ``visionedge.input``."""


def read_stated_preprocess(signature: ModelSignature, default: Preprocess) -> Preprocess:
    """The preprocessing by the metadata key ``visionedge.input``; missing keys are those of `default`.

    Raises:
        ModelError: it is not a JSON object of `INPUT_CHECKS`.
    """
    stated = dict[str, Any]()
    for key, value in read_metadata_object(signature, "visionedge.input").items():
        if key not in INPUT_CHECKS:
            known = ", ".join(sorted(INPUT_CHECKS))
            raise ModelError(f"metadata visionedge.input: unknown key '{key}'; known: {known}")
        if (wrong := INPUT_CHECKS[key](value)) is not None:
            raise ModelError(f"metadata visionedge.input: {key} {wrong}")
        stated[key] = tuple(map(float, value)) if isinstance(value, list) else value
    if "scale" in stated:
        stated["scale"] = float(stated["scale"])
    return replace(default, **{key: stated[key] for key in Preprocess.__slots__ if key in stated})


def states_scaling(signature: ModelSignature) -> bool:
    """Whether the metadata key ``visionedge.input`` states the scaling of pixels, or a part of it."""
    return bool({"scale", "mean", "std"} & set(read_metadata_object(signature, "visionedge.input")))


def read_metadata_object(signature: ModelSignature, key: str) -> dict[str, Any]:
    """A metadata value that is a JSON object; empty if the key is absent.

    Raises:
        ModelError: it is something else.
    """
    text = signature.metadata.get(key, "{}")
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ModelError(f"metadata {key} is not a JSON object")
    return document
