"""A network as people run it by hand: numpy in front of it, the original graph, numpy behind it.

It is a yardstick, so it is written well, only plainly: whole arrays, nothing done that does nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionedge.frames import Picture
from visionedge.inference.dense import DenseDecoder
from visionedge.inference.model import Model
from visionedge.inference.runtime import import_onnxruntime

Floats = NDArray[np.float32]
Candidates = tuple[Floats, Floats, NDArray[np.intp]]
"""boxes (n, 4) in input pixels (corners), scores (n,), classes (n,)."""

Decode = Callable[[Mapping[str, Floats], Model], tuple[Floats, Floats]]
"""Outputs by name → boxes (n, 4) in input pixels (corners), and the scores of all classes (n, C)."""


class PlainNetwork:
    """The original network of a model. `threads` is onnxruntime's intra-op setting; 0 leaves it as it comes.

    Raises:
        KeyError: there is no plain decoder for its head (see `can_decode`).
    """

    def __init__(self, model: Model, *, threads: int, device: str) -> None:
        self._model = model
        self._decode = _DECODERS[model.head]
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
            tensor *= np.float32(way.scale)
        if any(way.mean):
            tensor -= np.array(way.mean, np.float32)
        if way.std != (1.0, 1.0, 1.0):
            tensor /= np.array(way.std, np.float32)
        return np.ascontiguousarray(tensor.transpose(2, 0, 1)[None])

    def run(self, tensor: Floats) -> dict[str, Floats]:
        """The network itself."""
        outputs = self._session.run(None, {self._input: tensor})
        return dict(zip(self._outputs, outputs, strict=True))

    def candidates(self, outputs: Mapping[str, Floats], confidence: float) -> Candidates:
        """The outputs decoded: what is sure enough, before overlapping boxes are joined."""
        boxes, every = self._decode(outputs, self._model)
        ids, scores = every.argmax(1), every.max(1)
        keep = scores >= confidence
        return boxes[keep], scores[keep], ids[keep]


def can_decode(model: Model) -> bool:
    """Whether a model can be run by hand here."""
    target = model.reading.input
    plain = target.dtype == "float32" and target.layout == "NCHW" and target.batch in (None, 1)
    return plain and model.head in _DECODERS


def plain_session(graph: str | bytes, threads: int, device: str) -> Any:
    """A session as it comes, on the device or else the CPU. Raises what onnxruntime raises."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    if device != "cpu":
        providers.insert(0, "CUDAExecutionProvider")
    return onnxruntime.InferenceSession(graph, options, providers=providers)


def _nanodet(outputs: Mapping[str, Floats], _: Model) -> tuple[Floats, Floats]:
    """Score maps [1, n, C] beside box maps [1, n, 4 * bins]: distances from the cell's centre, by scale."""
    arrays = sorted((a[0] for a in outputs.values()), key=lambda a: (-a.shape[0], -a.shape[1]))
    boxes, scores = [], []
    side_px = 8 * round(float(np.sqrt(arrays[0].shape[0])))
    for scored, boxed in zip(arrays[::2], arrays[1::2], strict=True):
        cells = round(float(np.sqrt(scored.shape[0])))
        stride = side_px / cells
        weights = boxed.reshape(len(boxed), 4, -1)
        weights = np.exp(weights - weights.max(2, keepdims=True))
        weights /= weights.sum(2, keepdims=True)
        distance = weights @ np.arange(weights.shape[2], dtype=np.float32) * stride
        rows, columns = np.divmod(np.arange(len(boxed)), cells)
        x, y = (columns + 0.5) * stride, (rows + 0.5) * stride
        near, far = distance[:, :2], distance[:, 2:]
        boxes.append(np.stack([x - near[:, 0], y - near[:, 1], x + far[:, 0], y + far[:, 1]], axis=1))
        scores.append(scored)
    return np.concatenate(boxes).astype(np.float32), np.concatenate(scores)


def _yolox(outputs: Mapping[str, Floats], model: Model) -> tuple[Floats, Floats]:
    """One table [1, n, 5 + C]: centre, size, objectness, classes; raw ones in strides from their cell."""
    (table,) = (output[0] for output in outputs.values())
    centre, size = table[:, :2], table[:, 2:4]
    decoder = model.reading.decoder
    if isinstance(decoder, DenseDecoder) and decoder.cells is not None:
        grids, strides = [], []
        for stride in decoder.cells.strides_px:
            columns, rows = model.input.width_px // stride, model.input.height_px // stride
            y, x = np.divmod(np.arange(rows * columns), columns)
            grids.append(np.stack([x, y], axis=1))
            strides.append(np.full((rows * columns, 1), stride))
        grid, stride_px = np.concatenate(grids), np.concatenate(strides)
        centre, size = (centre + grid) * stride_px, np.exp(size) * stride_px
    boxes = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
    return boxes.astype(np.float32), table[:, 5:] * table[:, 4:5]


_DECODERS: Mapping[str, Decode] = {"nanodet": _nanodet, "yolox": _yolox}
