"""How a picture is prepared: as for the family of the model, unless the model or its owner says otherwise."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from visionedge.errors import ModelError
from visionedge.frames.types import Anchor
from visionedge.model.analysis.input_ops import InputOps, ValueBound
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    CLASSIFIER_HEAD,
    Color,
    Decoder,
    ModelInterpretation,
    NetworkInput,
    Preprocess,
    find_picture_input,
    read_metadata_object,
    read_stated_preprocess,
)
from visionedge.model.labels import read_class_names

_HINT = "state input in MODEL.yaml beside it"
_MODEL_YAML_EXAMPLE = (
    "input: {color: rgb, scale: 0.00392156863, mean: [0, 0, 0], std: [1, 1, 1]}   # your model's own"
)
_MIN_LEVELS = 100
_MAX_CLIP_RATIO = 10
_IMAGENET_MEAN = np.array([123.675, 116.28, 103.53])
_MEAN_TOLERANCE = 1.5


def interpret(
    name: str,
    signature: ModelSignature,
    picture: NetworkInput,
    decoder: Decoder,
    family: Preprocess,
    *,
    class_count: int,
    needs_nms: bool,
    evidence: Iterable[str],
    prepares_bytes_itself: bool = False,
    background: bool = False,
) -> ModelInterpretation:
    """The interpretation of a model by the head `name`, with `evidence` for the head.

    The preprocessing is that of the `family`, unless the model or its owner says otherwise (see
    `choose_preprocess`, and there the errors that are raised).
    """
    preprocess, preprocess_evidence = choose_preprocess(
        signature, picture, family, prepares_bytes_itself=prepares_bytes_itself
    )
    stated = ("the head is stated",) if signature.states_head(name) else ()
    return ModelInterpretation(
        head=name,
        input=picture,
        preprocess=preprocess,
        decoder=decoder,
        class_count=class_count,
        needs_nms=needs_nms,
        evidence=(*stated, *evidence, *preprocess_evidence),
        background=background,
    )


def choose_preprocess(
    signature: ModelSignature,
    picture: NetworkInput,
    family: Preprocess,
    *,
    prepares_bytes_itself: bool = False,
) -> tuple[Preprocess, tuple[str, ...]]:
    """The preprocessing of a model, and the evidence for it.

    Statements (``visionedge.input``, `MODEL.yaml`) come first, then the evidence in the first nodes of the
    network, then `family`. `prepares_bytes_itself`: models of this family with a uint8 input prepare their
    picture themselves.

    Raises:
        ModelError: the first nodes contradict the family and nothing is stated.
    """
    stated = read_metadata_object(signature, "visionedge.input")
    scaled = bool({"scale", "mean", "std"} & set(stated))
    input_ops = signature.input_ops
    prepares_bytes_itself = prepares_bytes_itself and picture.dtype == "uint8"
    if input_ops.unknown and not prepares_bytes_itself and not (scaled and "color" in stated):
        raise ModelError(_describe_unknown(input_ops), state=(_MODEL_YAML_EXAMPLE,))
    preprocess, evidence = family, list[str]()
    if not scaled:
        preprocess, evidence = _adapt_to_input_ops(input_ops, picture, family)
        _check_bounds(input_ops, preprocess)
    if input_ops.swaps_red_blue and "color" not in stated:
        preprocess = replace(preprocess, color="bgr" if preprocess.color == "rgb" else "rgb")
        evidence.append("its first nodes swap red and blue")
    if "color" not in stated and (order := _find_color_order(input_ops)) not in (None, preprocess.color):
        raise ModelError(
            f"its first nodes subtract ImageNet's mean in the order {str(order).upper()}, but models of its"
            f" family take {preprocess.color.upper()}; state input.color in MODEL.yaml beside it",
            state=(f"input: {{color: {order}}}   # or {preprocess.color}",),
        )
    if (
        preprocess.fit == "letterbox"
        and "anchor" not in stated
        and (said := signature.metadata.get("letterbox_pad"))
    ):
        preprocess = replace(preprocess, anchor=_parse_anchor(said))
        evidence.append(f"its metadata 'letterbox_pad' says {said}")
    if stated:
        evidence.append(f"stated outright: {', '.join(sorted(stated))}")
    preprocess = read_stated_preprocess(signature, preprocess)
    evidence.append(f"takes {preprocess.color.upper()}, {preprocess.fit}")
    return preprocess, tuple(evidence)


def _describe_unknown(input_ops: InputOps) -> str:
    behind = f" behind {', '.join(input_ops.seen)}" if input_ops.seen else ""
    return (
        f"its first nodes ({input_ops.unknown}{behind}) change the picture in a way that is not"
        " supported, so its preprocessing is unknown; state input.color and input.scale (and input.mean,"
        " input.std) in MODEL.yaml beside it, or export the model without these nodes"
    )


def _check_bounds(input_ops: InputOps, preprocess: Preprocess) -> None:
    """Check that no Clip and no rounding in the graph would damage a picture that is prepared this way.

    Raises:
        ModelError: a node would damage it, so this preprocessing is wrong.
    """
    ends = [
        (pixel * preprocess.scale - m) / s
        for m, s in zip(preprocess.mean, preprocess.std, strict=True)
        for pixel in (0, 255)
    ]
    low, high = min(ends), max(ends)
    for bound in input_ops.bounds:
        if not _fits(bound, low, high):
            what = (
                "rounds its picture to integers"
                if bound.integer_scale
                else f"clips its picture at {bound.low:.4g} and {bound.high:.4g}"
            )
            raise ModelError(
                f"{what}, which does not fit the pixels of its family, {low:.4g} to {high:.4g};"
                " state input.scale (and input.mean, input.std) in MODEL.yaml beside it",
                state=(_MODEL_YAML_EXAMPLE,),
            )


def _fits(bound: ValueBound, low: float, high: float) -> bool:
    span = high - low
    if bound.integer_scale:
        return bound.integer_scale * span >= _MIN_LEVELS
    # A limit far above all values belongs to another range: 255 does not fit pixels of 0-1.
    far = np.isfinite(bound.high) and bound.high - low > _MAX_CLIP_RATIO * span
    return bool(bound.low <= low + 0.01 * span and bound.high >= high - 0.01 * span and not far)


def _find_color_order(input_ops: InputOps) -> Color | None:
    """The colour order of the input, if the graph subtracts ImageNet's mean; else None."""
    factor, offset = np.array(input_ops.factor), np.array(input_ops.offset)
    if not input_ops.offset[0] or not factor.all():
        return None
    for unit in (1.0, 255.0):
        mean = -offset / factor * unit
        if (np.abs(mean - _IMAGENET_MEAN) < _MEAN_TOLERANCE).all():
            return "rgb"
        if (np.abs(mean[::-1] - _IMAGENET_MEAN) < _MEAN_TOLERANCE).all():
            return "bgr"
    return None


def _parse_anchor(said: str) -> Anchor:
    """The position of a letterboxed picture by the key that LibreYOLO's exporters write."""
    anchors: dict[str, Anchor] = {"topleft": "top-left", "center": "center"}
    if said not in anchors:
        raise ModelError(
            f"its metadata 'letterbox_pad' says {said[:40]!r}, which is not a known position; {_HINT}"
        )
    return anchors[said]


def _adapt_to_input_ops(
    input_ops: InputOps, picture: NetworkInput, family: Preprocess
) -> tuple[Preprocess, list[str]]:
    if not input_ops.changes_values:
        if picture.dtype == "uint8":
            return _without_mean(family, 255), ["takes bytes"]
        return family, ["colour and scaling of its family"]
    top = _find_pixel_range(input_ops)
    if top is None or (top == 1 and picture.dtype == "uint8"):
        raise ModelError(
            f"its first nodes scale the picture by {_format_values(input_ops.factor)} and add"
            f" {_format_values(input_ops.offset)}, which fits neither pixels of 0-255 nor of 0-1; {_HINT}",
            state=(_MODEL_YAML_EXAMPLE,),
        )
    if any(family.mean) and not any(input_ops.offset):
        raise ModelError(
            f"its first nodes scale the picture by {_format_values(input_ops.factor)}, but do not subtract"
            f" the mean that its family needs; {_HINT}",
            state=(_MODEL_YAML_EXAMPLE,),
        )
    return _without_mean(family, top), [f"normalises by itself: takes pixels of 0-{top}"]


def _without_mean(family: Preprocess, top: int) -> Preprocess:
    """Scaling of pixels to 0 … `top`, without mean and deviation."""
    return replace(family, scale=top / 255, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def _find_pixel_range(input_ops: InputOps) -> int | None:
    """The range of pixels, 255 or 1, that the first nodes scale to the usual range of networks."""
    factor, offset = np.array(input_ops.factor), np.array(input_ops.offset)
    if (np.abs(factor - 1) < 0.1).all() and (offset < -20).all():
        return 255  # only a mean is subtracted from pixels
    for top in (255, 1):
        width = factor * top
        if (width >= 0.5).all() and (width <= 12).all() and (np.abs(offset) <= 6).all():
            return top
    return None


def _format_values(values: tuple[float, float, float]) -> str:
    return "/".join(f"{value:.4g}" for value in values)


# --- Ultralytics and related YOLOs --------------------------------------------------------------------------


YOLO_INPUT = Preprocess("rgb", 1 / 255, fit="letterbox", anchor="center", pad=114)
"""YOLOv5 to YOLOv12, YOLO26, YOLOv6: RGB from 0 to 1 in the middle of a grey letterbox."""


def is_detector(signature: ModelSignature, classes: int | None = None) -> bool:
    """Whether its metadata allow a detector with so many classes.

    A model for poses or masks has columns that look like classes; its task or its class names show it.
    """
    if signature.metadata.get("task", "detect") != "detect":
        return False
    if classes is None:
        return True
    names = read_class_names(signature.metadata)
    return classes > 0 and (names is None or len(names) == classes)


def describe_class_count(count: int) -> str:
    """The number of classes as evidence; 0 is an unknown number."""
    return f"{count} classes are visible in it" if count else "it does not show the number of classes"


def describe_exporter(signature: ModelSignature) -> tuple[str, ...]:
    """The exporter by its metadata, as evidence; empty if there is none."""
    author, text = (signature.metadata.get(key, "") for key in ("author", "description"))
    if not author and not text:
        return ()
    return (f"its metadata: {' '.join(f'{text} {author}'.split())[:80]}",)


# --- graphs that resize their picture: boxes are in pixels of the resized one, and are scaled back ----------


# Their boxes are relative, or pixels of the input, also if the graph resizes its picture.
_HEADS_WITH_OWN_RESIZE = frozenset(
    {CLASSIFIER_HEAD, "compiled", "detectron2", "efficientdet", "mmdeploy", "tfod", "torchvision"}
)
_RATIO_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class ResizedDecoder(Decoder):
    """Multiplies the boxes of `decoder` by `factors` (x, y)."""

    decoder: Decoder
    factors: tuple[float, float]

    def feeds(self, nodes: NodeBuilder, pictures: str) -> Mapping[str, str]:
        """The feeds of `decoder`."""
        return self.decoder.feeds(nodes, pictures)

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The rows of `decoder`, in pixels of the input."""
        return nodes.add("Mul", self.decoder.rows(nodes, limit), nodes.floats(*self.factors * 2, 1.0, 1.0))


def skip_resize(signature: ModelSignature, head: str) -> ModelSignature:
    """The signature of the network behind the Resize; unchanged if there is none."""
    size_px, picture = signature.input_ops.size_px, find_picture_input(signature)
    if size_px is None or picture is None or head in _HEADS_WITH_OWN_RESIZE:
        return signature
    sides = (size_px[1], size_px[0])
    dims = (3, *sides) if picture.layout == "NCHW" else (*sides, 3)
    inputs = tuple(
        TensorInfo(t.name, t.dtype, (*(t.shape or ())[:1], *dims)) if t.name == picture.name else t
        for t in signature.inputs
    )
    return replace(signature, inputs=inputs)


def scale_boxes_back(signature: ModelSignature, interpretation: ModelInterpretation) -> ModelInterpretation:
    """Turn the interpretation of the network behind a Resize into one of the whole graph.

    Raises:
        ModelError: its last nodes multiply by such a ratio, so the boxes may have been scaled back already.
    """
    picture = find_picture_input(signature)
    inner = interpretation.input
    if picture is None or (picture.width_px, picture.height_px) == (inner.width_px, inner.height_px):
        return interpretation
    factors = (picture.width_px / inner.width_px, picture.height_px / inner.height_px)
    ratios = [ratio for factor in factors for ratio in (factor, 1 / factor) if ratio != 1]
    seen = {factor for output_ops in signature.output_ops.values() for factor in output_ops.factors}
    shaped = any("Shape" in output_ops.operators for output_ops in signature.output_ops.values())
    if shaped or any(abs(a - b) <= _RATIO_TOLERANCE * b for a in seen for b in ratios):
        raise ModelError(
            f"its first nodes resize the picture from {picture.width_px} x {picture.height_px} to"
            f" {inner.width_px} x {inner.height_px}, and its last nodes may or may not scale the boxes back;"
            f" export it without the Resize, for pictures of {inner.width_px} x {inner.height_px}",
            state=(),
        )
    clause = f"its graph resizes the picture to {inner.width_px} x {inner.height_px}; boxes are scaled back"
    return replace(
        interpretation,
        input=replace(inner, width_px=picture.width_px, height_px=picture.height_px),
        decoder=ResizedDecoder(interpretation.decoder, factors),
        evidence=(*interpretation.evidence, clause),
    )
