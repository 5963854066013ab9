"""A network as people run it by hand: numpy in front of it, the original graph, numpy behind it.

It is a yardstick, so it is written well, only plainly: whole arrays, nothing done that does nothing.
"""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionedge.frames.types import Picture
from visionedge.model.decoding import DenseDecoder
from visionedge.model.heads.nanodet import DflDecoder, Scale
from visionedge.model.model import Model
from visionedge.runtime.ort import import_onnxruntime

Floats = NDArray[np.float32]
Candidates = tuple[Floats, Floats, NDArray[np.intp]]
"""boxes (n, 4) in input pixels (corners), scores (n,), classes (n,)."""

Outputs = Mapping[str, Floats]


class PlainNetwork:
    """The original network of a model. `threads` is onnxruntime's intra-op setting; 0 leaves it as it comes.

    Only for models that `can_decode` says yes to.
    """

    def __init__(self, model: Model, *, threads: int, device: str) -> None:
        self._model = model
        self._session = plain_session(str(model.path), threads, device)
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def tensor(self, image: Picture) -> Floats:
        """A picture at the model's input size as the network wants it: float32 (1, 3, H, W)."""
        way = self._model.reading.preprocess
        if way.color == "rgb":
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
        tensor = image.astype(np.float32)
        if way.scale != 1:
            tensor = np.multiply(tensor, np.float32(way.scale))
        if any(way.mean):
            tensor = np.subtract(tensor, np.array(way.mean, np.float32))
        if way.std != (1.0, 1.0, 1.0):
            tensor = np.divide(tensor, np.array(way.std, np.float32))
        return np.ascontiguousarray(tensor.transpose(2, 0, 1)[None])

    def run(self, tensor: Floats) -> dict[str, Floats]:
        """The network itself."""
        outputs = self._session.run(None, {self._input: tensor})
        return dict(zip(self._outputs, outputs, strict=True))

    def candidates(self, outputs: Outputs, confidence: float) -> Candidates:
        """The outputs decoded: what is sure enough, before overlapping boxes are joined."""
        boxes, every, _ = self._decoded(outputs)
        ids, scores = every.argmax(1), every.max(1)
        keep = scores >= confidence
        return boxes[keep], scores[keep], ids[keep]

    def rows(self, outputs: Outputs, limit: int) -> Floats:
        """The outputs decoded to what the compiled graph gives: the best rows (K, 6) by falling score."""
        boxes, every, one_class = self._decoded(outputs)
        if one_class:
            ids, scores = every.argmax(1), every.max(1)
            anchors = np.argsort(-scores)[:limit]
            return np.column_stack([boxes[anchors], scores[anchors], ids[anchors]]).astype(np.float32)
        flat = every.ravel()
        best = np.argpartition(flat, -limit)[-limit:] if len(flat) > limit else np.arange(len(flat))
        best = best[np.argsort(-flat[best])]
        anchors, ids = np.divmod(best, every.shape[1])
        return np.column_stack([boxes[anchors], flat[best], ids]).astype(np.float32)

    def _decoded(self, outputs: Outputs) -> tuple[Floats, Floats, bool]:
        """Boxes (n, 4), the scores of all classes (n, C), and whether an anchor counts once."""
        decoder = self._model.reading.decoder
        if isinstance(decoder, DflDecoder):
            return *_dfl(outputs, decoder), False
        if isinstance(decoder, DenseDecoder):
            return *_table(outputs, decoder), True
        raise TypeError(f"there is no plain decoder for {self._model.head}")


def can_decode(model: Model) -> bool:
    """Whether a model can be run by hand here."""
    target = model.reading.input
    plain = target.dtype == "float32" and target.layout == "NCHW" and target.batch in (None, 1)
    return plain and isinstance(model.reading.decoder, DflDecoder | DenseDecoder)


def plain_session(graph: str | bytes, threads: int, device: str) -> Any:
    """A session as it comes, on the device or else the CPU. Raises what onnxruntime raises."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    if device != "cpu":
        providers.insert(0, "CUDAExecutionProvider")
    return onnxruntime.InferenceSession(graph, options, providers=providers)


def _dfl(outputs: Outputs, decoder: DflDecoder) -> tuple[Floats, Floats]:
    """Boxes (n, 4) and the scores of all classes (n, C): pairs of maps [1, n, C] and [1, n, 4 * bins]."""
    scores = np.concatenate([outputs[scale.scores][0] for scale in decoder.scales])
    boxes = np.concatenate([_distances(outputs[s.boxes][0], s, decoder.cell_offset) for s in decoder.scales])
    return boxes.astype(np.float32), 1 / (1 + np.exp(-scores)) if decoder.sigmoid else scores


def _distances(bins: Floats, scale: Scale, cell_offset: float) -> Floats:
    """Boxes of one scale: to each side of the cell's centre the mean bin of a softmax, in strides."""
    weights = bins.reshape(len(bins), 4, -1)
    weights = np.exp(weights - weights.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    distance = weights @ np.arange(weights.shape[2], dtype=np.float32) * scale.stride_px
    row, column = np.divmod(np.arange(len(bins)), scale.columns)
    centre = (np.stack([column, row], axis=1) + cell_offset) * scale.stride_px
    return np.concatenate([centre - distance[:, :2], centre + distance[:, 2:]], axis=1)


def _table(outputs: Outputs, decoder: DenseDecoder) -> tuple[Floats, Floats]:
    """Boxes (n, 4) and the scores of all classes (n, C): centre, size, perhaps objectness, classes."""
    table = outputs[decoder.output][0]
    if decoder.columns:
        table = table.T
    centre, size = table[:, :2], table[:, 2:4]
    if (cells := decoder.cells) is not None:
        grids, strides = [], []
        for stride_px in cells.strides_px:
            columns, rows = -(-cells.width_px // stride_px), -(-cells.height_px // stride_px)
            y, x = np.divmod(np.arange(rows * columns), columns)
            grids.append(np.stack([x, y], axis=1))
            strides.append(np.full((rows * columns, 1), stride_px))
        spans_px = np.concatenate(strides)
        centre, size = (centre + np.concatenate(grids)) * spans_px, np.exp(size) * spans_px
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1).astype(np.float32)
    return boxes, table[:, 5:] * table[:, 4:5] if decoder.objectness else table[:, 4:]
