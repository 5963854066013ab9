"""NanoDet and PicoDet: a score map and a distribution map per scale, paired by shape, not by name.

A distribution map holds four rows of bins for each cell: the distances from its centre to the four sides, in
strides, each as the expectation over the bins' indices.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from visionedge.errors import ModelError
from visionedge.model.analysis.output_ops import OutputOps
from visionedge.model.analysis.signature import ModelSignature, TensorInfo
from visionedge.model.decoding import (
    DenseTable,
    compute_grid,
    find_dense_table,
    find_strides,
    select_best_rows,
    slice_axis,
)
from visionedge.model.graph import NodeBuilder
from visionedge.model.interpretation import (
    Decoder,
    ModelInterpretation,
    Preprocess,
    find_only_input,
    find_picture_input,
    read_metadata_object,
)
from visionedge.model.labels import count_class_names
from visionedge.model.preprocessing import interpret

STRIDES_PX = (4, 8, 16, 32, 64, 128)

NANODET_INPUT = Preprocess("bgr", 1.0, (103.53, 116.28, 123.675), (57.375, 57.12, 58.395), "letterbox")
PICODET_INPUT = Preprocess("rgb", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "stretch")


@dataclass(frozen=True, slots=True)
class NanoDetScale:
    """One pair of maps: `scores` [N, n, classes] and `boxes` [N, n, 4 * bins], n = columns * rows."""

    scores: str
    boxes: str
    stride_px: int
    columns: int
    rows: int


@dataclass(frozen=True, slots=True)
class DflDecoder(Decoder):
    """Decodes pairs of maps. `cell_offset` is the position of a centre in its cell, in strides.

    `joined` is the one output with the scores and bins of all scales side by side; "" if each scale has its
    own outputs. `flat`: maps are [n, …], of one picture.
    """

    scales: tuple[NanoDetScale, ...]
    classes: int
    bins: int
    sigmoid: bool
    cell_offset: float = 0.5
    joined: str = ""
    flat: bool = False

    def rows(self, nodes: NodeBuilder, limit: int) -> str:
        """The best rows; boxes are decoded only for the cells that are among them."""
        if self.joined:
            table = nodes.cast(self.joined, "float32")
            scores = slice_axis(nodes, table, 0, self.classes, axis=2)
            distances = slice_axis(nodes, table, self.classes, self.classes + 4 * self.bins, axis=2)
        else:
            scores = self._joined(nodes, [scale.scores for scale in self.scales], self.classes)
            distances = self._joined(nodes, [scale.boxes for scale in self.scales], 4 * self.bins)
        return select_best_rows(
            nodes,
            scores,
            lambda chosen, count: self._boxes(nodes, distances, chosen, count),
            anchors=sum(scale.columns * scale.rows for scale in self.scales),
            classes=self.classes,
            limit=limit,
            activate=(lambda n, values: n.add("Sigmoid", values)) if self.sigmoid else None,
        )

    def _joined(self, nodes: NodeBuilder, maps: list[str], width: int) -> str:
        floats = [nodes.cast(tensor, "float32") for tensor in maps]
        whole = nodes.add("Concat", *floats, axis=0 if self.flat else 1) if len(floats) > 1 else floats[0]
        return nodes.reshape(whole, 1, -1, width) if self.flat else whole

    def _boxes(self, nodes: NodeBuilder, distances: str, chosen: str, count: int) -> str:
        bins = nodes.gather_rows(distances, chosen, count, 4 * self.bins)
        weights = nodes.add("Softmax", nodes.reshape(bins, 0, count, 4, self.bins), axis=-1)
        steps = nodes.constant(np.arange(self.bins, dtype=np.float32).reshape(-1, 1))
        strides = nodes.reshape(nodes.add("MatMul", weights, steps), 0, count, 4)
        table = self._centres()
        away = nodes.add("Mul", strides, nodes.add("Gather", nodes.constant(table[:, 4:]), chosen, axis=0))
        return nodes.add("Add", nodes.add("Gather", nodes.constant(table[:, :4]), chosen, axis=0), away)

    def _centres(self) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """For each cell of all scales: its centre twice, then its stride with the sign of each side."""
        tables = []
        for scale in self.scales:
            row, column = np.mgrid[: scale.rows, : scale.columns].reshape(2, -1)
            x, y = ((axis + self.cell_offset) * scale.stride_px for axis in (column, row))
            side = np.full_like(x, scale.stride_px)
            tables.append(np.stack([x, y, x, y, -side, -side, side, side], axis=1))
        return np.concatenate(tables).astype(np.float32)


@dataclass(frozen=True, slots=True)
class NanoDet:
    """NanoDet: three scales; BGR, letterbox."""

    name: str = "nanodet"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if pairs of maps fit, and the model may not be a PicoDet.

        Raises:
            ModelError: it may be a PicoDet that another tool wrote.
        """
        stated = signature.states_head(self.name)
        decoder = _find_pairs(signature)
        if decoder is None or (not stated and _is_paddle(signature)):
            return None
        # NanoDet-Plus has four scales and other centres, so it needs a stated head.
        if len(decoder.scales) == 4 and not stated and "visionedge.head" not in signature.metadata:
            raise ModelError(
                "outputs scores and bins on four scales, as PicoDet does, but its producer"
                f" ('{signature.producer[:40]}') is not Paddle; if it is a PicoDet, state head: picodet in"
                f" MODEL.yaml beside it. Seen: {signature}",
                state=("head: picodet",),
            )
        if len(decoder.scales) != 3 and not stated:
            return None
        return _interpret(self.name, signature, decoder, NANODET_INPUT)


@dataclass(frozen=True, slots=True)
class PicoDet:
    """PicoDet of PaddleDetection: four scales; RGB, stretched, ImageNet's mean and deviation."""

    name: str = "picodet"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if pairs of maps fit and Paddle exported the model, or the head is stated."""
        stated = signature.states_head(self.name)
        decoder = _find_pairs(signature)
        if decoder is None or not (stated or _is_paddle(signature)):
            return None
        return _interpret(self.name, signature, decoder, PICODET_INPUT)


def _is_paddle(signature: ModelSignature) -> bool:
    return signature.producer.lower().startswith("paddle")


def _interpret(
    name: str, signature: ModelSignature, decoder: DflDecoder, family: Preprocess
) -> ModelInterpretation:
    picture = find_picture_input(signature)
    assert picture is not None  # noqa: S101 - pairs were found for its size
    decoder = _with_stated(signature, decoder)
    strides = ", ".join(str(scale.stride_px) for scale in decoder.scales)
    made_by = (f"made by {signature.producer}",) if _is_paddle(signature) else ()
    return interpret(
        name,
        signature,
        picture,
        decoder,
        family,
        class_count=decoder.classes,
        needs_nms=True,
        evidence=(
            *made_by,
            f"outputs pair up as {decoder.classes} scores and 4 x {decoder.bins} bins at strides {strides}",
            "scores have no sigmoid yet" if decoder.sigmoid else "a sigmoid computed the scores",
        ),
    )


def _with_stated(signature: ModelSignature, decoder: DflDecoder) -> DflDecoder:
    """The decoder with the statements of ``visionedge.decode``, which must agree with its outputs."""
    document = read_metadata_object(signature, "visionedge.decode")
    facts = {"strides": [s.stride_px for s in decoder.scales], "reg_max": decoder.bins - 1}
    for key, seen in facts.items():
        if document.get(key, seen) != seen:
            raise ModelError(
                f"metadata visionedge.decode: {key} is {document[key]}, but its outputs say {seen}"
            )
    offset = document.get("cell_offset", decoder.cell_offset)
    if offset not in (0, 0.5):
        raise ModelError("metadata visionedge.decode: cell_offset must be 0 or 0.5")
    return replace(decoder, cell_offset=float(offset))


def _find_pairs(signature: ModelSignature) -> DflDecoder | None:
    """The outputs as pairs of maps, one per scale; None if the pairs are not unique."""
    picture = find_only_input(signature)
    if picture is None:
        return None
    # Some exporters remove the batch axis from the outputs of a model for one picture.
    ranks = (2, 3) if picture.batch == 1 else (3,)
    outputs = signature.outputs
    if len({t.rank for t in outputs}) != 1 or outputs[0].rank not in ranks:
        return None
    by_cells: dict[int, list[TensorInfo]] = {}
    for tensor in outputs:
        cells = tensor.side(-2)
        if cells is None or tensor.side(-1) is None:
            return None
        by_cells.setdefault(cells, []).append(tensor)
    scales, widths = [], set()
    for cells, tensors in sorted(by_cells.items(), reverse=True):
        pair = _order_pair(signature, tensors)
        grid = _find_grid(cells, picture.width_px, picture.height_px)
        if pair is None or grid is None:
            return None
        scores, boxes = pair
        scales.append(NanoDetScale(scores.name, boxes.name, *grid))
        widths.add((_read_width(scores), _read_width(boxes)))
    if len(widths) != 1:
        return None
    classes, width = widths.pop()
    sigmoid = not _has_sigmoid(signature, scales)
    return DflDecoder(tuple(scales), classes, width // 4, sigmoid=sigmoid, flat=outputs[0].rank == 2)


def _read_width(tensor: TensorInfo) -> int:
    return tensor.side(-1) or 0


def _order_pair(signature: ModelSignature, pair: list[TensorInfo]) -> tuple[TensorInfo, TensorInfo] | None:
    """(scores, boxes) of one scale; None if they cannot be distinguished.

    The width of boxes is a multiple of four, and a sigmoid computes scores, never bins. Else the number of
    classes or bins must be known: from the metadata, or because 80 classes are COCO.
    """
    ways = [
        (scores, boxes)
        for scores, boxes in itertools.permutations(pair, 2)
        if len(pair) == 2 and _read_width(boxes) % 4 == 0 and _read_width(boxes) >= 8
    ]
    named = count_class_names(signature.metadata)
    reg_max = read_metadata_object(signature, "visionedge.decode").get("reg_max")
    clues: tuple[Callable[[TensorInfo, TensorInfo], bool], ...] = (
        lambda scores, _: _passed_sigmoid(signature, scores.name),
        lambda _, boxes: _read_width(boxes) / 4 - 1 == reg_max,
        lambda scores, _: _read_width(scores) == named,
        lambda scores, _: _read_width(scores) == 80,
    )
    for clue in clues:
        ways = [way for way in ways if clue(*way)] or ways
    return ways[0] if len(ways) == 1 else None


def _find_grid(cells: int, width_px: int, height_px: int) -> tuple[int, int, int] | None:
    """(stride, columns, rows) of a map with so many cells over a picture of this size."""
    for stride in STRIDES_PX:
        columns, rows = compute_grid(width_px, height_px, stride)
        if columns * rows == cells:
            return stride, columns, rows
    return None


def _has_sigmoid(signature: ModelSignature, scales: list[NanoDetScale]) -> bool:
    made = {_passed_sigmoid(signature, scale.scores) for scale in scales}
    if len(made) > 1:
        raise ModelError("some of its score maps went through a sigmoid and some did not")
    return made == {True}


def _passed_sigmoid(signature: ModelSignature, name: str) -> bool:
    """Whether a sigmoid is behind the last layer; PicoDet v2 has the square root of a product behind it."""
    operators = signature.output_ops[name].operators if name in signature.output_ops else frozenset()
    return signature.output_operators.get(name) == "Sigmoid" or "Sigmoid" in operators


# --- NanoDet by its own exporter: one table for all scales, [N, cells, classes + 4 * bins] ---------
#
# NanoDet-Plus has four scales, centres at the corner of a cell, and stretched pictures. The first NanoDets
# have three scales, centres in the middle of a cell, and letterboxed pictures.


_STRIDE_SETS_PX = ((8, 16, 32), (8, 16, 32, 64))
_BINS = range(4, 33)
_RAW_OPERATORS = frozenset({"Conv", "Slice", "Split"})


@dataclass(frozen=True, slots=True)
class NanoDetSingleOutput:
    """The first NanoDet and NanoDet-Plus: BGR, mean and deviation."""

    name: str = "nanodet-joined"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if each scale has scores of a sigmoid and then undecoded bins."""
        table = find_dense_table(signature)
        if table is None:
            return None
        strides = find_strides(
            table.rows, table.picture.width_px, table.picture.height_px, stride_sets=_STRIDE_SETS_PX
        )
        classes = _count_classes(signature, table)
        if strides is None or classes is None:
            return None
        if not _has_alternating_parts(table.output_ops, len(strides)):
            return None
        plus = len(strides) == 4
        family = replace(NANODET_INPUT, fit="stretch" if plus else "letterbox")
        bins = (table.width - classes) // 4
        return interpret(
            self.name,
            signature,
            table.picture,
            DflDecoder(
                _make_scales(table, strides),
                classes,
                bins,
                sigmoid=False,
                cell_offset=0.0 if plus else 0.5,
                joined=table.output.name,
            ),
            family,
            class_count=classes,
            needs_nms=True,
            evidence=(
                f"{table.rows} rows are the cells at strides {', '.join(map(str, strides))}",
                f"each has {classes} scores of a sigmoid, then 4 x {bins} bins",
                f"{len(strides)} scales, as in NanoDet{'-Plus' if plus else ''}",
            ),
        )


HEADS = (NanoDet(), PicoDet(), NanoDetSingleOutput())


def _has_alternating_parts(output_ops: OutputOps, scales: int) -> bool:
    """Whether each scale has scores of a sigmoid and then raw values of a weighted layer."""
    scores, boxes = output_ops.parts[::2], output_ops.parts[1::2]
    return scores == ("Sigmoid",) * scales and len(boxes) == scales and set(boxes) <= _RAW_OPERATORS


def _count_classes(signature: ModelSignature, table: DenseTable) -> int | None:
    """The number of its labels, or COCO's 80; None if the remaining columns cannot be bins."""
    classes = count_class_names(signature.metadata) or 80
    bins, rest = divmod(table.width - classes, 4)
    return classes if bins in _BINS and not rest else None


def _make_scales(table: DenseTable, strides: tuple[int, ...]) -> tuple[NanoDetScale, ...]:
    size = (table.picture.width_px, table.picture.height_px)
    return tuple(NanoDetScale("", "", stride, *compute_grid(*size, stride)) for stride in strides)
