"""Ranges chosen tensor by tensor: for each the one that keeps the network's own outputs closest to fp32.

One way to set ranges for all tensors is never the best for each. So one tensor after the other, from the
picture on, is given each of the ranges, with all others as they are by then, and keeps the best.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from visionedge.frames.types import Picture
from visionedge.model.compiler.compile import compile_graph
from visionedge.model.interpretation import Reading
from visionedge.model.quantization.arithmetic import open_on_cpu
from visionedge.model.quantization.calibration import METHODS, Method, Observed, Range, Values
from visionedge.model.quantization.int8 import Recipe, quantised
from visionedge.model.quantization.progress import Progress, silent

MOST_TRIES = 240
"""Each opens the network anew; the tensors next to the picture, which matter most, come first."""

Outputs = list[NDArray[np.float64]]


class Tuner:
    """Sets the ranges of a network's values so that its outputs on some pictures stay near those of fp32."""

    def __init__(
        self,
        simple: onnx.ModelProto,
        reading: Reading,
        observed: Observed,
        pictures: Sequence[Picture],
        progress: Progress | None = None,
    ) -> None:
        self._simple = simple
        self._reading = reading
        self._ways = {method: observed.values(method) for method in METHODS}
        self._pictures = pictures
        self._progress = progress or silent()
        self._distance = distance_to(outputs_of(simple, reading, pictures))

    def one_for_all(self, recipe: Recipe) -> tuple[Method, Values]:
        """The way to set all ranges after which the outputs are nearest."""
        method = min(METHODS, key=lambda way: self._away(recipe, self._ways[way]))
        return method, self._ways[method]

    def each(self, recipe: Recipe, start: Values) -> Values:
        """The range that suits each tensor best, beginning with those of `start`; takes minutes."""
        ranges: dict[str, Range] = dict(start.ranges)
        least, tries = self._away(recipe, start), 0
        names = _tensors(quantised(self._simple, start, recipe), ranges)
        for number, name in enumerate(names):
            self._progress.step(f"{number} of {len(names)} tensors; {least:.4f} away from fp32")
            ways = dict.fromkeys(way.ranges[name] for way in self._ways.values())
            for candidate in [way for way in ways if way != ranges[name]]:
                if tries == MOST_TRIES:
                    return Values(ranges, start.means)
                tries += 1
                before, ranges[name] = ranges[name], candidate
                now = self._away(recipe, Values(ranges, start.means))
                if now < least:
                    least = now
                else:
                    ranges[name] = before
        return Values(ranges, start.means)

    def _away(self, recipe: Recipe, values: Values) -> float:
        # Narrow weights give the same with integer kernels, and sooner.
        network, exact = quantised(self._simple, values, recipe), not recipe.narrow
        pictures = self._progress.over(self._pictures, "comparing ranges, pictures")
        return self._distance(outputs_of(network, self._reading, pictures, exact=exact))


def _tensors(network: onnx.ModelProto, ranges: Mapping[str, Range]) -> list[str]:
    """The tensors that become integers, in the order of the graph."""
    names = [node.input[0] for node in network.graph.node if node.op_type == "QuantizeLinear"]
    return [name for name in names if name in ranges]


def outputs_of(
    network: onnx.ModelProto, reading: Reading, pictures: Iterable[Picture], *, exact: bool = False
) -> list[Outputs]:
    """The network's own outputs for each picture, behind the preparation that the compiler gives it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    own = [
        value for value in network.graph.output if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    ]
    graph = compile_graph(copy, reading)
    graph.graph.output.extend(own)
    session = open_on_cpu(graph.SerializeToString(), exact=exact)
    source, names = session.get_inputs()[0].name, [value.name for value in own]
    batch = reading.input.batch or 1
    return [
        [values.astype(np.float64) for values in session.run(names, {source: np.repeat(p[None], batch, 0)})]
        for p in pictures
    ]


def distance_to(expected: list[Outputs]) -> Callable[[list[Outputs]], float]:
    """Root of the mean square by which outputs differ, each in parts of how much it varies by itself."""
    spreads = [
        max(float(np.mean([values.var() for values in each])), 1e-12) for each in zip(*expected, strict=True)
    ]

    def distance(outputs: list[Outputs]) -> float:
        errors = [
            float(np.mean((values - wanted) ** 2)) / spread
            for some, others in zip(outputs, expected, strict=True)
            for values, wanted, spread in zip(some, others, spreads, strict=True)
        ]
        return float(np.sqrt(np.mean(errors)))

    return distance
