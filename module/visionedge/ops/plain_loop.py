"""The program that people write first: read, resize, float, session.run, decode, suppress; one loop.

It is the yardstick of `bench --baseline`, so it is written well, only plainly: numpy throughout, the original
network, every camera in turn. Heads it cannot decode go through the compiled graph, which flatters it.
"""

import time
from collections.abc import Mapping
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
from visionedge.ops.plain_network import Candidates, Floats, PlainNetwork, can_decode, plain_session
from visionedge.uris import parse_camera_uri, redact


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
        self._network: PlainNetwork | _CompiledNetwork
        if can_decode(model):
            self.decode = "numpy"
            self._network = PlainNetwork(model, threads=threads, device=device)
        else:
            self.decode = "compiled graph"
            self._network = _CompiledNetwork(plain_session(compile_model(model), threads, device))

    def step(self) -> tuple[int, int]:
        """One frame of the camera whose turn it is: the ns in `session.run`, and how many were found."""
        picture = self._read()
        image, _ = fit(picture, self._model.input)
        tensor = self._network.tensor(image)
        began_ns = time.monotonic_ns()
        outputs = self._network.run(tensor)
        infer_ns = time.monotonic_ns() - began_ns
        return infer_ns, len(self._suppressed(*self._network.candidates(outputs, self._selection.confidence)))

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

    def _suppressed(self, boxes: Floats, scores: Floats, ids: NDArray[np.intp]) -> list[int]:
        wanted = self._selection
        corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        iou = 1.0 if wanted.iou is None else wanted.iou
        kept = cv2.dnn.NMSBoxesBatched(
            corners.tolist(), scores.tolist(), ids.tolist(), wanted.confidence, iou
        )
        return [int(index) for index in np.asarray(kept).ravel()]


class _CompiledNetwork:
    """The compiled graph in the place of a `PlainNetwork`."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name

    def tensor(self, image: Picture) -> Any:
        return image[None]

    def run(self, tensor: Any) -> Mapping[str, Floats]:
        return {"rows": self._session.run(None, {self._input: tensor})[0]}

    def candidates(self, outputs: Mapping[str, Floats], confidence: float) -> Candidates:
        rows = outputs["rows"][0]
        rows = rows[rows[:, 4] >= confidence]
        return rows[:, :4], rows[:, 4], rows[:, 5].astype(np.intp)


def _open(source: str) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        raise SourceError(f"{redact(source)} cannot be opened by the plain loop; give a video file")
    return capture
