"""The program that people write first: read, resize, float, session.run, decode, suppress; one loop.

It is the yardstick of `bench --baseline`, so it is written well, only plainly: numpy throughout, the original
network, every camera in turn. Heads it cannot decode go through the compiled graph, which flatters it.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visionedge.bundled import bundled
from visionedge.capture.fitting import fit
from visionedge.capture.source import DEMO_CLIP
from visionedge.errors import SourceError
from visionedge.frames import Picture
from visionedge.inference.detections import Selection
from visionedge.inference.graph import compile_model
from visionedge.inference.model import Model
from visionedge.inference.runtime import import_onnxruntime
from visionedge.uris import parse_camera_uri, redact

Floats = NDArray[np.float32]
Decode = Callable[[Mapping[str, Floats], Selection], tuple[Floats, Floats]]
"""Outputs by name → boxes (n, 4) in input pixels (corners), and the scores of all classes (n, C)."""


class PlainLoop:
    """`threads` is onnxruntime's intra-op setting; 0 leaves it as it comes."""

    def __init__(
        self, model: Model, selection: Selection, *, source: str, cameras: int, threads: int, device: str
    ) -> None:
        self.threads = threads
        self._model = model
        self._selection = selection
        uri = parse_camera_uri(source)
        self._source = str(bundled(DEMO_CLIP)) if uri.kind == "demo" else uri.target
        self._captures = [_open(self._source) for _ in range(cameras)]
        self._turn = 0
        decode = _DECODERS.get(model.head)
        self.decode = "numpy" if decode is not None else "compiled graph"
        self._decode = decode
        graph: str | bytes = str(model.path) if decode is not None else compile_model(model)
        self._session = _session(graph, threads, device)
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]

    def step(self) -> tuple[int, int]:
        """One frame of the camera whose turn it is: the ns in `session.run`, and how many were found."""
        picture = self._read()
        image, _ = fit(picture, self._model.input)
        began_ns = time.monotonic_ns()
        outputs = self._session.run(None, {self._input: self._tensor(image)})
        infer_ns = time.monotonic_ns() - began_ns
        named = dict(zip(self._outputs, outputs, strict=True))
        return infer_ns, len(self._suppressed(named))

    def close(self) -> None:
        """Give the files back."""
        for capture in self._captures:
            capture.release()

    def _read(self) -> Picture:
        index, self._turn = self._turn, (self._turn + 1) % len(self._captures)
        good, picture = self._captures[index].read()
        if not good:
            self._captures[index].release()
            self._captures[index] = _open(self._source)
            good, picture = self._captures[index].read()
            if not good:
                raise SourceError(f"{redact(self._source)} gives no picture")
        return np.asarray(picture, np.uint8)

    def _tensor(self, image: Picture) -> NDArray[Any]:
        if self._decode is None:
            return image[None]
        way = self._model.reading.preprocess
        if way.color == "rgb":
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.uint8)
        mean, std = np.array(way.mean, np.float32), np.array(way.std, np.float32)
        tensor = (image.astype(np.float32) * np.float32(way.scale) - mean) / std
        return np.ascontiguousarray(tensor.transpose(2, 0, 1)[None])

    def _suppressed(self, outputs: Mapping[str, Floats]) -> list[int]:
        wanted = self._selection
        if self._decode is None:
            rows = next(iter(outputs.values()))[0]
            boxes, scores, ids = rows[:, :4], rows[:, 4], rows[:, 5]
        else:
            boxes, every = self._decode(outputs, wanted)
            ids, scores = every.argmax(1).astype(np.float32), every.max(1)
        keep = scores >= wanted.confidence
        boxes, scores, ids = boxes[keep], scores[keep], ids[keep]
        corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        iou = 1.0 if wanted.iou is None else wanted.iou
        kept = cv2.dnn.NMSBoxesBatched(
            corners.tolist(), scores.tolist(), ids.astype(int).tolist(), wanted.confidence, iou
        )
        return [int(index) for index in np.asarray(kept).ravel()]


def _open(source: str) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        raise SourceError(f"{redact(source)} cannot be opened by the plain loop; give a video file")
    return capture


def _session(graph: str | bytes, threads: int, device: str) -> Any:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    providers = ["CPUExecutionProvider"]
    if device != "cpu":
        providers.insert(0, "CUDAExecutionProvider")
    return onnxruntime.InferenceSession(graph, options, providers=providers)


def _nanodet(outputs: Mapping[str, Floats], _: Selection) -> tuple[Floats, Floats]:
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


_DECODERS: Mapping[str, Decode] = {"nanodet": _nanodet}
