"""Tiny classifiers without training: their answer follows the mean colour of the picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from tiny_graphs import Graph

RED_OR_BLUE = ("yes", "no")
"""The first label is the answer to a picture with more red than blue, the second to one with more blue."""

GAIN = 20.0
"""The two logits differ by so much for a picture that is all red or all blue."""


def save_colour_classifier(
    path: Path,
    labels: Sequence[str] = RED_OR_BLUE,
    *,
    side_px: int = 32,
    batch: int | str = "N",
    ends_with: Literal["Softmax", "Sigmoid", ""] = "Softmax",
    states: bool = True,
) -> Path:
    """Write a classifier of two labels by the mean colour to `path`, and return the path.

    The first label has the probability sigmoid(`GAIN` * (red - blue)), where red and blue are means of 0-1:
    near 1 for a red picture, near 0 for a blue one, and 0.5 for a grey one. With `ends_with` "" the network
    outputs logits; with "Sigmoid" there is only the first label. `states`: its metadata are those of an
    Ultralytics export, which name labels, size and task; without them it has no metadata.
    """
    graph = Graph()
    picture = graph.input("images", "float32", batch, 3, side_px, side_px)
    copied = graph.add("Conv", picture, graph.constant(np.eye(3)[:, :, None, None]))
    means = graph.add("Flatten", graph.add("GlobalAveragePool", copied))
    towards = np.array([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]]) * GAIN / 2
    weights = 2 * towards[:1] if ends_with == "Sigmoid" else towards
    scores = graph.add(
        "Gemm", means, graph.constant(weights), graph.constant(np.zeros(len(weights))), transB=1
    )
    if ends_with:
        scores = graph.add(ends_with, scores, **({"axis": 1} if ends_with == "Softmax" else {}))
    graph.output(scores, "output0", "float32", batch, len(weights))
    names = dict(enumerate(labels[: len(weights)]))
    metadata = {
        "author": "Ultralytics",
        "task": "classify",
        "names": str(names),
        "imgsz": json.dumps([side_px, side_px]),
    }
    return graph.save(path, metadata if states else {}, producer="pytorch")
