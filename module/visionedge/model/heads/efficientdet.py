"""EfficientDet as TensorFlow's automl exports it: one list of seven columns, or four outputs in pixels.

Its graph takes a picture of any size and brings it to its own, keeping its shape: so it is fed a letterbox
with the picture at the top left, as it would make one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from visionedge.errors import ModelError
from visionedge.model.analysis.signature import Signature, Tensor
from visionedge.model.grids import part
from visionedge.model.heads.tensorflow import four_outputs, in_pixels, reading_of_four
from visionedge.model.interpretation import (
    STATE_MEAN,
    NetworkInput,
    Preprocess,
    Reading,
    picture_input,
    stated_object,
)
from visionedge.model.labels import class_names
from visionedge.model.lists import listed_rows
from visionedge.model.nodes import Nodes
from visionedge.model.preprocessing import prepared

BYTES_INPUT = Preprocess("rgb", 1.0, fit="letterbox", anchor="top-left", pad=114)


@dataclass(frozen=True, slots=True)
class SevenColumns:
    """Decodes [N, n, 7]: picture, box, score, class from 1; a box is top, left, bottom, right in pixels.

    With `sizes` it is left, top, width, height.
    """

    output: str
    count: int | None
    sizes: bool

    def feeds(self, nodes: Nodes, pictures: str) -> Mapping[str, str]:  # noqa: ARG002 - one input is all there is
        """Nothing: the picture is the only input."""
        return {}

    def rows(self, nodes: Nodes, limit: int) -> str:
        """The list, by falling score."""
        table = nodes.cast(self.output, "float32")
        if self.sizes:
            corner, size = part(nodes, table, 1, 3, 2), part(nodes, table, 3, 5, 2)
            boxes = nodes.add("Concat", corner, nodes.add("Add", corner, size), axis=2)
        else:
            boxes = nodes.add("Gather", table, nodes.whole(2, 1, 4, 3), axis=2)
        scores, ids = (nodes.reshape(part(nodes, table, column, column + 1, 2), 0, -1) for column in (5, 6))
        ids = nodes.add("Sub", ids, nodes.floats(1.0))
        return listed_rows(nodes, boxes, scores, ids, count=self.count, limit=limit)


@dataclass(frozen=True, slots=True)
class EfficientDet:
    """Both forms of it."""

    name: str = "efficientdet"

    def read(self, signature: Signature) -> Reading | None:
        """A reading where the outputs fit one of them.

        Raises:
            ModelError: it takes floats that nothing in it normalises, so how is not known.
        """
        picture = picture_input(signature)
        if picture is None or len(signature.inputs) != 1:
            return None
        four = four_outputs(signature)
        if four is not None and in_pixels(signature, four):
            _check_range(signature, picture)
            return reading_of_four(
                self.name, signature, picture, four, relative=False, family=BYTES_INPUT, background=False
            )
        found = _seven(signature)
        if found is None:
            return None
        _check_range(signature, picture)
        return _reading(self.name, signature, picture, *found)


HEADS = (EfficientDet(),)


def _reading(name: str, signature: Signature, picture: NetworkInput, output: Tensor, sizes: bool) -> Reading:
    way, ways = prepared(signature, picture, BYTES_INPUT, by_itself=True)
    names = class_names(signature.metadata)
    seen = signature.classes.suppressed or signature.classes.scored
    box = "left, top, width, height" if sizes else "top, left, bottom, right"
    clauses = [f"one list of seven columns: picture, {box} in pixels, score, class from 1", *ways]
    if signature.metadata.get("visionedge.head") == name:
        clauses.insert(0, "the head is stated")
    return Reading(
        head=name,
        input=replace(picture, batch=1) if "NonMaxSuppression" in signature.operators else picture,
        preprocess=way,
        decoder=SevenColumns(output.name, (output.shape or (1, None))[1], sizes),
        class_count=seen or (len(names) if names is not None else 0),
        suppress=False,
        evidence=tuple(clauses),
    )


def _seven(signature: Signature) -> tuple[Tensor, bool] | None:
    """The output of seven columns, and whether its boxes have sizes; only where its nodes show columns."""
    if len(signature.outputs) != 1 or "NonMaxSuppression" not in signature.operators:
        return None
    output = signature.outputs[0]
    if output.shape is None or len(output.shape) != 3 or output.shape[2] != 7:
        return None
    origin = signature.origins.get(output.name)
    parts = origin.parts if origin is not None else ()
    if len(parts) not in (4, 7) and signature.metadata.get("visionedge.head") != "efficientdet":
        return None
    sizes = len(parts) == 7 and parts[3] == parts[4] == "Sub"
    if len(parts) == 7 and not sizes and "Sub" in parts[1:5]:
        return None
    return output, sizes


def _check_range(signature: Signature, picture: NetworkInput) -> None:
    stated = stated_object(signature, "visionedge.input")
    if picture.dtype == "uint8" or signature.opening.scales or {"scale", "mean", "std"} & set(stated):
        return
    raise ModelError(
        "is an EfficientDet that takes floats and normalises nothing itself: whether with ImageNet's mean or "
        "its own is not known; state input.scale, input.mean and input.std in MODEL.yaml beside it",
        state=STATE_MEAN,
    )
