"""NanoDet and PicoDet: a score map and a distribution map per scale, paired by shape, not by name.

A distribution map holds four rows of bins for each cell: the distances from its centre to the four sides, in
strides, each as the expectation over the bins' indices.
"""

import itertools
import math
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
    find_picture_input,
    read_metadata_object,
)
from visionedge.model.labels import read_class_names
from visionedge.model.preprocessing import choose_preprocess

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

    `joined` is the output that has both side by side for all scales, scores first; "" if each has its own.
    `flat`: maps are [n, …], of one picture.
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
        """An interpretation if pairs of maps fit and nothing speaks for PicoDet.

        Raises:
            ModelError: it may be a PicoDet that another tool wrote.
        """
        stated = signature.metadata.get("visionedge.head") == self.name
        decoder = _find_pairs(signature)
        if decoder is None or (not stated and _is_paddle(signature)):
            return None
        # NanoDet-Plus has four scales and other centres, so it needs a stated head.
        if len(decoder.scales) == 4 and not stated and "visionedge.head" not in signature.metadata:
            raise ModelError(
                "gives scores and bins on four scales, as PicoDet does, but its producer"
                f" ('{signature.producer[:40]}') is not Paddle, and there is no other sign; if it is one,"
                f" state head: picodet in MODEL.yaml beside it. Seen: {signature}",
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
        """An interpretation if pairs of maps fit and the model comes from Paddle (or says that it is one)."""
        stated = signature.metadata.get("visionedge.head") == self.name
        decoder = _find_pairs(signature)
        if decoder is None or not (stated or _is_paddle(signature)):
            return None
        return _interpret(self.name, signature, decoder, PICODET_INPUT)


def _is_paddle(signature: ModelSignature) -> bool:
    return signature.producer.lower().startswith("paddle")


def _interpret(
    name: str, signature: ModelSignature, decoder: DflDecoder, default: Preprocess
) -> ModelInterpretation:
    picture = find_picture_input(signature)
    assert picture is not None  # noqa: S101 - pairs were found for its size
    decoder = _with_stated(signature, decoder)
    preprocess, preprocess_evidence = choose_preprocess(signature, picture, default)
    strides = ", ".join(str(scale.stride_px) for scale in decoder.scales)
    evidence = [
        f"outputs pair up as {decoder.classes} scores and 4 x {decoder.bins} bins at strides {strides}",
        "scores have no sigmoid yet" if decoder.sigmoid else "a sigmoid made the scores",
        *preprocess_evidence,
    ]
    if signature.metadata.get("visionedge.head") == name:
        evidence.insert(0, "the head is stated")
    elif _is_paddle(signature):
        evidence.insert(0, f"made by {signature.producer}")
    return ModelInterpretation(
        head=name,
        input=picture,
        preprocess=preprocess,
        decoder=decoder,
        class_count=decoder.classes,
        needs_nms=True,
        evidence=tuple(evidence),
    )


def _with_stated(signature: ModelSignature, decoder: DflDecoder) -> DflDecoder:
    """The decoder with the statements of ``visionedge.decode``, which must agree with the shapes."""
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
    picture = find_picture_input(signature)
    if picture is None or len(signature.inputs) != 1:
        return None
    # Some exporters remove the batch axis from the outputs of a model for one picture.
    ranks = (2, 3) if picture.batch == 1 else (3,)
    maps = [
        t
        for t in signature.outputs
        if t.shape is not None and len(t.shape) in ranks and None not in t.shape[-2:]
    ]
    flat = {len(t.shape or ()) for t in maps} == {2}
    if not maps or len(maps) != len(signature.outputs) or len({len(t.shape or ()) for t in maps}) != 1:
        return None
    by_cells: dict[int, list[TensorInfo]] = {}
    for tensor in maps:
        by_cells.setdefault(_read_cells(tensor), []).append(tensor)
    parted = [_order_pair(signature, by_cells[cells]) for cells in sorted(by_cells, reverse=True)]
    grids = [
        _find_grid(cells, picture.width_px, picture.height_px) for cells in sorted(by_cells, reverse=True)
    ]
    scales = [
        NanoDetScale(pair[0].name, pair[1].name, *grid)
        for pair, grid in zip(parted, grids, strict=True)
        if pair is not None and grid is not None
    ]
    widths = {(_read_width(pair[0]), _read_width(pair[1])) for pair in parted if pair is not None}
    if len(scales) != len(by_cells) or len(widths) != 1:
        return None
    classes, width = widths.pop()
    sigmoid = not _has_sigmoid(signature, scales)
    return DflDecoder(tuple(scales), classes, width // 4, sigmoid=sigmoid, flat=flat)


def _read_cells(tensor: TensorInfo) -> int:
    return (tensor.shape or (0, 0))[-2] or 0


def _read_width(tensor: TensorInfo) -> int:
    return (tensor.shape or (0, 0))[-1] or 0


def _order_pair(signature: ModelSignature, pair: list[TensorInfo]) -> tuple[TensorInfo, TensorInfo] | None:
    """(scores, boxes) of one scale; None if they cannot be distinguished.

    A width that is no multiple of four is that of scores; a sigmoid makes scores, never bins; else
    the number of classes or bins has to be known: from metadata, or because 80 classes are COCO.
    """
    ways = [
        (scores, boxes)
        for scores, boxes in itertools.permutations(pair, 2)
        if len(pair) == 2 and _read_width(boxes) % 4 == 0 and _read_width(boxes) >= 8
    ]
    names = read_class_names(signature.metadata)
    reg_max = read_metadata_object(signature, "visionedge.decode").get("reg_max")
    clues: tuple[Callable[[TensorInfo, TensorInfo], bool], ...] = (
        lambda scores, _: _passed_sigmoid(signature, scores.name),
        lambda _, boxes: _read_width(boxes) / 4 - 1 == reg_max,
        lambda scores, _: names is not None and _read_width(scores) == len(names),
        lambda scores, _: _read_width(scores) == 80,
    )
    for clue in clues:
        ways = [way for way in ways if clue(*way)] or ways
    return ways[0] if len(ways) == 1 else None


def _find_grid(cells: int, width_px: int, height_px: int) -> tuple[int, int, int] | None:
    """(stride, columns, rows) of a map with so many cells over a picture of this size."""
    for stride in STRIDES_PX:
        columns, rows = math.ceil(width_px / stride), math.ceil(height_px / stride)
        if columns * rows == cells:
            return stride, columns, rows
    return None


def _has_sigmoid(signature: ModelSignature, scales: list[NanoDetScale]) -> bool:
    made = {_passed_sigmoid(signature, scale.scores) for scale in scales}
    if len(made) > 1:
        raise ModelError("some of its score maps went through a sigmoid and some did not")
    return made == {True}


def _passed_sigmoid(signature: ModelSignature, name: str) -> bool:
    """Whether a sigmoid is among an output's last nodes; PicoDet v2 takes the root of the product of two."""
    output_ops = signature.output_ops.get(name, OutputOps())
    return signature.output_operators.get(name) == "Sigmoid" or "Sigmoid" in output_ops.operators


# --- NanoDet by its own exporter: one table for all scales, [N, cells, classes + 4 * bins] ---------
#
# NanoDet-Plus has four scales, centres at the corner of a cell, and stretched pictures. The first NanoDets
# have three scales, centres in the middle of a cell, and letterboxed pictures.


_STRIDE_SETS_PX = ((8, 16, 32), (8, 16, 32, 64))
_BINS = range(4, 33)
_RAW_OPERATORS = frozenset({"Conv", "Slice", "Split"})


@dataclass(frozen=True, slots=True)
class NanoDetSingleOutput:
    """NanoDet, first and Plus: BGR, the mean taken off."""

    name: str = "nanodet-joined"

    def read(self, signature: ModelSignature) -> ModelInterpretation | None:
        """An interpretation if scores of a sigmoid and bins follow each other for each scale, undecoded."""
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
        preprocess, preprocess_evidence = choose_preprocess(signature, table.picture, family)
        bins = (table.width - classes) // 4
        return ModelInterpretation(
            head=self.name,
            input=table.picture,
            preprocess=preprocess,
            decoder=DflDecoder(
                _make_scales(table, strides),
                classes,
                bins,
                sigmoid=False,
                cell_offset=0.0 if plus else 0.5,
                joined=table.output.name,
            ),
            class_count=classes,
            needs_nms=True,
            evidence=(
                f"{table.rows} rows are the cells at strides {', '.join(map(str, strides))}",
                f"each has {classes} scores of a sigmoid, then 4 x {bins} bins",
                f"{len(strides)} scales, as NanoDet{'-Plus' if plus else ''} has them",
                *preprocess_evidence,
            ),
        )


HEADS = (NanoDet(), PicoDet(), NanoDetSingleOutput())


def _has_alternating_parts(output_ops: OutputOps, scales: int) -> bool:
    """Whether each scale has scores of a sigmoid and then raw values of a weighted layer."""
    scores, boxes = output_ops.parts[::2], output_ops.parts[1::2]
    return scores == ("Sigmoid",) * scales and len(boxes) == scales and set(boxes) <= _RAW_OPERATORS


def _count_classes(signature: ModelSignature, table: DenseTable) -> int | None:
    """The number of its names, or COCO's 80; None if the remaining columns cannot be bins."""
    names = read_class_names(signature.metadata)
    classes = 80 if names is None else len(names)
    bins, rest = divmod(table.width - classes, 4)
    return classes if bins in _BINS and not rest else None


def _make_scales(table: DenseTable, strides: tuple[int, ...]) -> tuple[NanoDetScale, ...]:
    size = (table.picture.width_px, table.picture.height_px)
    return tuple(NanoDetScale("", "", stride, *compute_grid(*size, stride)) for stride in strides)
