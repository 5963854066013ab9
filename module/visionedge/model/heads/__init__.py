"""The families of models that are supported. A new family is one module here with a tuple `HEADS`."""

import importlib
import pkgutil
from dataclasses import replace

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import ModelSignature
from visionedge.model.heads.classifier import refuse_neighbour
from visionedge.model.interpretation import CLASSIFIER_HEAD, DetectionHead, ModelInterpretation
from visionedge.model.labels import read_class_names
from visionedge.model.preprocessing import scale_boxes_back, skip_resize


def load_heads() -> tuple[DetectionHead, ...]:
    """All heads, in the order of their modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(head for module in modules for head in module.HEADS)


def interpret_model(signature: ModelSignature, label_source: str = "its metadata") -> ModelInterpretation:
    """The only interpretation that fits; the family is never guessed.

    ``visionedge.head`` in its metadata (or `head` in `MODEL.yaml`) states the head; it must still fit the
    shapes. ``visionedge.nms`` states whether boxes need suppression. `label_source` says in errors where the
    labels come from.

    Raises:
        ModelError: no interpretation fits, or several do; the message lists inputs and outputs.
    """
    heads = load_heads()
    stated = signature.metadata.get("visionedge.head")
    if stated is not None:
        heads = tuple(head for head in heads if head.name == stated)
        if not heads:
            raise ModelError(f"the stated head '{stated}' is unknown; {_describe_known_heads()}")
    heads = _for_task(signature, heads)
    fitting = _interpret(signature, heads)
    if len(fitting) == 1:
        return _with_stated(scale_boxes_back(signature, fitting[0]), signature)
    if fitting:
        names = " and ".join(interpretation.head for interpretation in fitting)
        raise ModelError(
            f"several heads fit ({names}); state one as head in MODEL.yaml beside it. Seen: {signature}",
            state=(f"head: {fitting[0].head}   # or {', '.join(r.head for r in fitting[1:])}",),
        )
    _check_labels(signature, heads, label_source)
    _check_channels(signature)
    if stated in (None, CLASSIFIER_HEAD):
        refuse_neighbour(signature)
    if stated is not None:
        raise ModelError(f"the stated head '{stated}' does not fit its shapes. Seen: {signature}", state=())
    raise ModelError(
        f"is not a detector or classifier of a supported family. Seen: {signature}; {_describe_known_heads()}"
    )


def _interpret(signature: ModelSignature, heads: tuple[DetectionHead, ...]) -> list[ModelInterpretation]:
    found = (head.read(skip_resize(signature, head.name)) for head in heads)
    return [interpretation for interpretation in found if interpretation is not None]


def _for_task(signature: ModelSignature, heads: tuple[DetectionHead, ...]) -> tuple[DetectionHead, ...]:
    """The heads for the task in the metadata.

    Raises:
        ModelError: it is neither detection nor classification.
    """
    task = signature.metadata.get("task", "detect")
    if task == "classify":
        return tuple(head for head in heads if head.name == CLASSIFIER_HEAD)
    if task != "detect":
        raise ModelError(
            f"is a model for '{task[:40]}' by its metadata, and not a detector of boxes or a classifier;"
            " export a detection model, for example with: yolo export model=yolo11n.pt format=onnx",
            state=(),
        )
    return heads


def _check_labels(signature: ModelSignature, heads: tuple[DetectionHead, ...], label_source: str) -> None:
    """Refuse a model that some head would accept with another number of labels."""
    names = read_class_names(signature.metadata)
    if names is None:
        return
    unnamed = {key: value for key, value in signature.metadata.items() if key != "names"}
    try:
        fitting = _interpret(replace(signature, metadata=unnamed), heads)
    except ModelError:
        return
    counts = sorted({interpretation.class_count for interpretation in fitting} - {0, len(names)})
    if counts:
        raise ModelError(
            f"it has {' or '.join(map(str, counts))} classes, but {label_source} names {len(names)}", state=()
        )


def _check_channels(signature: ModelSignature) -> None:
    """Refuse a model that takes grey pictures."""
    channels = [(t.side(1), t.side(3)) for t in signature.inputs if t.rank == 4]
    if any(1 in sides for sides in channels) and not any(3 in sides for sides in channels):
        raise ModelError(
            "takes grey pictures (one channel), but only colour pictures (three channels) are supported;"
            f" train and export it with three channels. Seen: {signature}",
            state=(),
        )


def _with_stated(interpretation: ModelInterpretation, signature: ModelSignature) -> ModelInterpretation:
    """The interpretation with the evidence for an open size, and with the statement ``visionedge.nms``."""
    evidence = interpretation.evidence + ((signature.size,) if signature.size else ())
    stated = signature.metadata.get("visionedge.nms")
    if stated is None:
        return replace(interpretation, evidence=evidence)
    if stated not in ("true", "false"):
        raise ModelError("visionedge.nms must be true or false")
    needs_nms = stated == "true"
    clause = f"boxes are {'' if needs_nms else 'not '}suppressed, as stated"
    return replace(interpretation, needs_nms=needs_nms, evidence=(*evidence, clause))


def _describe_known_heads() -> str:
    return f"known heads: {', '.join(head.name for head in load_heads())}"
