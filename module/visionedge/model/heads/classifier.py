"""Classifiers: one score per class for the whole picture, [N, classes] or [N, classes, 1, 1].

A row has the whole input as its box, the probability as its score, and the class. The graph shows whether the
scores are probabilities already. It seldom shows how pictures were scaled in training.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from visionedge.errors import ModelError
from visionedge.model.analysis.input_ops import InputOps
from visionedge.model.analysis.output_ops import OutputOps
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.exporter_files import (
    is_custom_vision,
    parse_custom_vision_manifest,
    parse_custom_vision_preprocess,
)
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    CLASSIFIER_HEAD,
    Decoder,
    ModelInterpretation,
    NetworkInput,
    Preprocess,
    find_only_input,
    read_metadata_object,
    states_scaling,
)
from visionedge.model.labels import LABELS_FILE_KEY, count_class_names
from visionedge.model.preprocessing import describe_exporter, interpret

MAX_CLASSES = 20
"""The most rows per picture. A check of a device compares ten, and similar ones may change their places."""

# The whole picture, although the evaluation of most training tools cuts out its middle: in the tall crop of a
# person the head lies outside the middle. These tools shrink pictures with antialiasing.
PLAIN_INPUT = Preprocess("rgb", 1 / 255, fit="stretch", resample="antialias")
IMAGENET_INPUT = replace(PLAIN_INPUT, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

IMAGENET_CLASSES = (1000, 1001)
"""ImageNet's number of classes, and the same with a background in front, as in older TensorFlow models."""

Activation = Literal["", "Softmax", "Sigmoid"]
"""The operator that turns an output into probabilities; "" for an output of probabilities."""

_VALUE_PRESERVING = frozenset(
    {"Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
_PLAIN_OPERATORS = _VALUE_PRESERVING | frozenset(
    {"Add", "AveragePool", "Div", "GlobalAveragePool", "Mul", "ReduceMean", "Relu", "Sub"}
)
"""Operators behind the last weights that leave logits what they are: they move, scale or average them."""

_INPUT_EXAMPLES = (
    "input: {scale: 0.00392156863}   # pixels of 0-1, as Ultralytics",
    "input: {scale: 0.00392156863, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}   # ImageNet's",
    "input: {scale: 0.00392156863, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}   # pixels of -1 to 1",
)


@dataclass(frozen=True, slots=True)
class ClassifierDecoder(Decoder):
    """Decodes the scores [N, classes] or [N, classes, 1, 1] of a picture of this size to its best classes."""

    output: str
    classes: int
    activation: Activation
    width_px: int
    height_px: int

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The best classes, at most `MAX_CLASSES`; each box is the whole input."""
        count = min(self.classes, MAX_CLASSES, limit)
        scores = nodes.reshape(nodes.cast(self.output, "float32"), 0, self.classes)
        if self.activation == "Softmax":
            scores = nodes.add("Softmax", scores, axis=1)
        elif self.activation:
            scores = nodes.add(self.activation, scores)
        values, ids = nodes.top_k(scores, count)
        values = nodes.reshape(values, 0, count, 1)
        boxes = nodes.add("Mul", values, nodes.constant(np.zeros((1, 1, 4), np.float32)))
        boxes = nodes.add("Add", boxes, nodes.floats(0, 0, self.width_px, self.height_px))
        return nodes.add(
            "Concat", boxes, values, nodes.reshape(nodes.cast(ids, "float32"), 0, count, 1), axis=2
        )


@dataclass(frozen=True, slots=True)
class Classifier:
    """Networks whose only output is one score per class."""

    name: str = CLASSIFIER_HEAD

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if the output is one score per class.

        Raises:
            ModelError: it is, but its number of classes, its size or the scaling of its pixels is unknown.
        """
        picture, output = find_only_input(signature), _find_vector(signature)
        if picture is None or output is None or not _may_be_classifier(signature):
            return None
        activation = _find_activation(signature, output)
        reason = None if activation is None else _find_reason(signature, output, activation)
        if activation is None or reason is None:
            return None
        classes = output.side(1) or count_class_names(signature.metadata)
        _check_sizes(signature, classes)
        family, clauses = _choose_family_preprocess(signature, picture, activation)
        if "Image.NominalPixelRange" in signature.metadata:
            signature = replace(signature, input_ops=InputOps())  # the metadata describe the input itself
        return interpret(
            self.name,
            signature,
            picture,
            ClassifierDecoder(output.name, classes, activation, picture.width_px, picture.height_px),
            family,
            class_count=classes,
            needs_nms=False,
            evidence=(
                f"one score for each of {classes} classes: {reason}",
                f"its scores become probabilities by a {activation}"
                if activation
                else "they are probabilities",
                *describe_exporter(signature),
                *clauses,
            ),
            background=classes == IMAGENET_CLASSES[1],
        )


HEADS = (Classifier(),)


def refuse_neighbour(signature: ModelSignature) -> None:
    """Refuse a network that outputs a vector per picture, but is not taken for a classifier.

    Raises:
        ModelError: it is one, and the message tells what is missing.
    """
    vectors = [t for t in signature.outputs if _is_vector(t)]
    if find_only_input(signature) is None or not _may_be_classifier(signature):
        return
    if not vectors and "task" in signature.metadata:
        raise _make_neighbour_error(
            signature, "its metadata 'task' says classify, but it has no score per class"
        )
    if not vectors:
        return
    if len(signature.outputs) > 1:
        if any(signature.output_operators.get(t.name) == "Softmax" for t in vectors):
            reason = "it has more outputs than scores of classes; export it with these scores alone"
            raise _make_neighbour_error(signature, reason)
        return
    ops = signature.ops(vectors[0])
    if not ops.has_weights:
        return
    if _find_activation(signature, vectors[0]) is None:
        last = ", ".join(sorted(ops.operators - _VALUE_PRESERVING)[:6])
        reason = (
            f"it ends with {last}, which is neither a plain layer nor a Softmax or Sigmoid alone; if it is a"
            " classifier, export it so that it ends with one of these"
        )
        raise _make_neighbour_error(signature, reason)
    reason = (
        "it has neither a Softmax nor labels, so its output may be an embedding or measurements; if it is one"
        " score per class, put the labels into MODEL.labels.txt beside it, or state head: classifier in"
        " MODEL.yaml"
    )
    raise _make_neighbour_error(signature, reason, f"head: {CLASSIFIER_HEAD}")


def _make_neighbour_error(signature: ModelSignature, reason: str, *state: str) -> ModelError:
    return ModelError(f"is not a detector or classifier: {reason}. Seen: {signature}", state=state)


def _find_vector(signature: ModelSignature) -> TensorInfo | None:
    """The only output, if it is one vector per picture."""
    outputs = signature.outputs
    return outputs[0] if len(outputs) == 1 and _is_vector(outputs[0]) else None


def _is_vector(tensor: TensorInfo) -> bool:
    return tensor.is_float and (
        tensor.rank == 2 or (tensor.rank == 4 and tensor.side(2) == tensor.side(3) == 1)
    )


def _may_be_classifier(signature: ModelSignature) -> bool:
    """Whether its metadata, or the manifest beside it, do not state another task."""
    document = parse_custom_vision_manifest(signature) or {}
    return (
        signature.metadata.get("task", "classify") == "classify"
        and document.get("DomainType", "Classification") == "Classification"
    )


def _find_activation(signature: ModelSignature, output: TensorInfo) -> Activation | None:
    """What turns the output into probabilities; None if its last nodes do not show it."""
    operator, ops = signature.output_operators.get(output.name, ""), signature.ops(output)
    if operator in ("Softmax", "Sigmoid"):
        return ""
    if operator == "LogSoftmax":
        return "Softmax"  # the softmax of logarithms of probabilities are the probabilities
    if not _are_logits(ops):
        return None
    return "Sigmoid" if output.side(1) == 1 else "Softmax"


def _are_logits(ops: OutputOps) -> bool:
    return ops.has_weights and ops.operators <= _PLAIN_OPERATORS


def _find_reason(signature: ModelSignature, output: TensorInfo, activation: Activation) -> str | None:
    """Why the numbers are scores of classes; None if they may be something else, such as an embedding."""
    operator, count = signature.output_operators.get(output.name, ""), output.side(1)
    document, labels_file = parse_custom_vision_manifest(signature), signature.metadata.get(LABELS_FILE_KEY)
    ends = operator in ("Softmax", "LogSoftmax") or (operator == "Sigmoid" and count == 1)
    reasons = (
        (ends, f"it ends with a {operator}"),
        (signature.states_head(CLASSIFIER_HEAD), "as stated"),
        ("task" in signature.metadata, "its metadata 'task' says classify"),
        ("DomainType" in (document or {}), "cvexport.manifest says Classification"),
        (count_class_names(signature.metadata) > 0, "its metadata names them"),
        (labels_file is not None, f"{labels_file} lies beside it"),
        (bool(activation) and count in IMAGENET_CLASSES, "as many as ImageNet has"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def _check_sizes(signature: ModelSignature, classes: int) -> None:
    """Refuse a classifier whose number of classes, or size of pictures, is open."""
    if not classes:
        raise ModelError(
            "is a classifier, but its number of classes is open; state its labels in MODEL.yaml beside it",
            state=('labels: ["yes", "no"]   # your model\'s, by class number',),
        )
    stated = {"width", "height"} & set(read_metadata_object(signature, "visionedge.input"))
    if signature.size and not stated and "imgsz" not in signature.metadata:
        raise ModelError(
            "is a classifier, but the size of its pictures is open; state input.width and input.height in"
            " MODEL.yaml beside it",
            state=("input: {width: 224, height: 224}   # your model's own",),
        )


def _choose_family_preprocess(
    signature: ModelSignature, picture: NetworkInput, activation: Activation
) -> tuple[Preprocess, tuple[str, ...]]:
    """The preprocessing in training, and its evidence.

    Raises:
        ModelError: it is unknown.
    """
    # Keras' image pipelines shrink pictures without antialiasing.
    plain = replace(PLAIN_INPUT, resample="bilinear") if picture.layout == "NHWC" else PLAIN_INPUT
    if is_custom_vision(signature):
        family, clauses = parse_custom_vision_preprocess(signature)
        return replace(family, resample="antialias"), clauses
    if signature.input_ops.changes_values or states_scaling(signature) or picture.dtype == "uint8":
        return plain, ()
    if signature.metadata.get("task") == "classify":
        return plain, ("Ultralytics' classifiers take pixels of 0-1",)
    maker = {"pytorch": "PyTorch", "Paddle": "Paddle"}.get(signature.producer, "")
    if maker == "Paddle" or (maker and activation and picture.layout == "NCHW"):
        clause = f"its scaling is not visible: ImageNet's mean and deviation, the usual ones of {maker}'s"
        return IMAGENET_INPUT, (f"{clause} classifiers, unless MODEL.yaml states input",)
    raise ModelError(
        "is a classifier, but neither its nodes nor its metadata show how its pixels were scaled in training;"
        " state input.scale (and input.mean, input.std) in MODEL.yaml beside it",
        state=_INPUT_EXAMPLES,
    )
