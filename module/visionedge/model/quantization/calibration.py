"""Statistics of a network's tensors on calibration images: the ranges that integers have to cover."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from visionedge.errors import ModelError
from visionedge.frames.types import Picture
from visionedge.model.compiler.compile import compile_graph
from visionedge.model.compiler.passes import fold_focus
from visionedge.model.graph import read_opset
from visionedge.model.interpretation import ModelInterpretation
from visionedge.runtime.ort import import_onnxruntime

REPORT_INTERVAL_S = 3.0

Item = TypeVar("Item")


class ProgressReporter:
    """Reports the progress of minutes of work to `report`, one line at a time.

    Steps are reported only after `REPORT_INTERVAL_S` without a line.
    """

    def __init__(self, report: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._clock = clock
        self._last_s = clock()

    def __call__(self, line: str) -> None:
        """Report a line."""
        self._report(line)
        self._last_s = self._clock()

    def step(self, line: str) -> None:
        """Report a line if there was none for `REPORT_INTERVAL_S`."""
        if self._clock() - self._last_s >= REPORT_INTERVAL_S:
            self(f"  {line}")

    def track(self, items: Sequence[Item], words: str) -> Iterator[Item]:
        """Yield the items, and report after each how many are done."""
        for number, item in enumerate(items, 1):
            yield item
            self.step(f"{words}: {number} of {len(items)}")


def make_silent_reporter() -> ProgressReporter:
    """A reporter that reports nothing."""
    return ProgressReporter(lambda _: None)


TARGET_OPSET = 17
"""Older networks are converted to it: before opset 13 a weight cannot have a scale per channel."""

ValueRange = tuple[float, float]
RangeMethod = Literal["p99.99", "p99.999", "mean", "all"]
"""How much of the values a range covers: nearly all, all, or the mean of each picture's extremes."""
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)

_BINS = 2048
_TENSORS_PER_RUN = 48  # all their values are in memory at once
_COVERED_SHARES = {"p99.99": 0.9999, "p99.999": 0.99999}


def fold_constants(network: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with its constants computed and at an opset that integers can be written in.

    Raises:
        ModelError: onnx or onnxruntime cannot rewrite it.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    weights = {tensor.name for tensor in copy.graph.initializer}
    kept = [value for value in copy.graph.input if value.name not in weights]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    try:
        if read_opset(copy) < 13:
            copy = onnx.version_converter.convert_version(copy, TARGET_OPSET)
        simple = _simplify(copy)
        fold_focus(simple.graph)  # as the compiler does, so that nothing is looked at that will not be there
        simple = onnx.shape_inference.infer_shapes(simple)
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        raise ModelError(f"cannot be rewritten for another precision: {words}") from error
    _restore_metadata(simple, network)
    return simple


def _simplify(network: onnx.ModelProto) -> onnx.ModelProto:
    """As onnxruntime writes it after its plainest optimisations, which use no operators of its own."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="visionedge-") as folder:
        path = Path(folder) / "simple.onnx"
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)


def _restore_metadata(simple: onnx.ModelProto, network: onnx.ModelProto) -> None:
    """What onnxruntime adds goes, and what it forgets comes back."""
    used = {node.domain for node in simple.graph.node}
    kept = [o for o in simple.opset_import if o.domain in used | {"", "ai.onnx"}]
    del simple.opset_import[:]
    simple.opset_import.extend(kept)
    del simple.metadata_props[:]
    simple.metadata_props.extend(network.metadata_props)
    simple.producer_name, simple.producer_version = network.producer_name, network.producer_version
    simple.ir_version = max(simple.ir_version, 8)
    for index, node in enumerate(simple.graph.node):
        node.name = node.name or f"{node.op_type}.{index}"


def list_float_tensors(graph: onnx.GraphProto) -> set[str]:
    """The names of all computed tensors of float32, inputs included."""
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    names = [value.name for value in graph.input]
    names += [name for node in graph.node for name in node.output if name]
    return {name for name in names if kinds.get(name) == TensorProto.FLOAT}


WEIGHTED_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def find_nodes_before_last_weights(graph: onnx.GraphProto) -> set[str]:
    """The names of the nodes with a weighted node behind them: all but the ends of the network."""
    wanted = set[str]()  # tensors from which a weighted node is computed
    found = set[str]()
    for node in reversed(graph.node):
        leads_on = not wanted.isdisjoint(node.output)
        if leads_on:
            found.add(node.name)
        if leads_on or node.op_type in WEIGHTED_OPERATORS:
            wanted.update(node.input)
    wanted.discard("")
    return found


@dataclass(frozen=True, slots=True)
class TensorRanges:
    """What is known of tensors: the range of each, and for [N, C, H, W] the mean of each channel."""

    ranges: Mapping[str, ValueRange]
    means: Mapping[str, NDArray[np.float64]]


class TensorStatistics:
    """The values of tensors over some pictures, summed up: extremes of each picture, means, a histogram."""

    def __init__(self) -> None:
        self.lows: dict[str, list[float]] = {}
        self.highs: dict[str, list[float]] = {}
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}

    def __repr__(self) -> str:
        pictures = len(next(iter(self.lows.values()), []))
        return f"<TensorStatistics tensors={len(self.lows)} pictures={pictures}>"

    def values(self, method: RangeMethod) -> "TensorRanges":
        """The range of each tensor; 0 is always in it, as padding needs it."""
        return TensorRanges({name: self._range(name, method) for name in self.lows}, self._means())

    def add_extremes(self, name: str, values: NDArray[np.float32]) -> None:
        """One picture's lowest and highest value, and the means of its channels (axis 1)."""
        self.lows.setdefault(name, []).append(float(values.min(initial=0.0)))
        self.highs.setdefault(name, []).append(float(values.max(initial=0.0)))
        if values.ndim == 4:
            means = values.mean(axis=(0, 2, 3), dtype=np.float64)
            self._sums[name] = self._sums.get(name, 0) + means

    def _means(self) -> Mapping[str, NDArray[np.float64]]:
        return {name: sums / len(self.lows[name]) for name, sums in self._sums.items()}

    def add_counts(self, name: str, values: NDArray[np.float32]) -> None:
        """One picture's histogram; the extremes of all pictures must be known."""
        low, high = min(self.lows[name]), max(self.highs[name])
        if high <= low:
            return
        places = ((values.ravel() - low) * ((_BINS - 1) / (high - low))).astype(np.int32)
        counts = np.bincount(places, minlength=_BINS)
        self._counts[name] = self._counts.get(name, 0) + counts

    def _range(self, name: str, method: RangeMethod) -> ValueRange:
        low, high = min(self.lows[name]), max(self.highs[name])
        if method == "mean":
            low, high = float(np.mean(self.lows[name])), float(np.mean(self.highs[name]))
        elif method in _COVERED_SHARES and name in self._counts:
            counts = self._counts[name]
            below = np.cumsum(counts) / counts.sum()
            share, width = _COVERED_SHARES[method], (high - low) / (_BINS - 1)
            first, last = np.searchsorted(below, 1 - share), np.searchsorted(below, share)
            low, high = low + float(first) * width, low + float(last + 1) * width
        return min(low, 0.0), max(high, 0.0)


class PictureSession:
    """A network on the CPU with the compiler's preprocessing and decoding; it computes one picture at a time.

    `watched` are float tensors that `run` can return, with the values that they have in the network itself.
    """

    def __init__(
        self,
        network: onnx.ModelProto,
        interpretation: ModelInterpretation,
        *,
        watched: Sequence[str] = (),
        optimized: bool = True,
        exact: bool = False,
        threads: int = 0,
    ) -> None:
        """`optimized` as in normal operation; the other arguments are those of `open_cpu_session`.

        Raises what onnxruntime raises.
        """
        copy = onnx.ModelProto()
        copy.CopyFrom(network)
        graph = compile_graph(copy, interpretation, watched=watched).SerializeToString()
        self._session = open_cpu_session(graph, optimized=optimized, exact=exact, threads=threads)
        self._source = self._session.get_inputs()[0].name
        self._batch = interpretation.input.batch or 1

    def run(self, picture: Picture, names: Sequence[str] | None = None) -> list[NDArray[np.float32]]:
        """The watched tensors `names` for a picture, or, without names, the rows and all watched tensors."""
        images = np.repeat(picture[None], self._batch, axis=0)
        tensors: list[NDArray[np.float32]] = self._session.run(names, {self._source: images})
        return tensors


def open_cpu_session(graph: bytes, *, optimized: bool = True, exact: bool = False, threads: int = 0) -> Any:
    """A session of a graph on the CPU. `threads` 0 is as many as there are cores.

    onnxruntime replaces a node between QDQ pairs by one integer kernel. These kernels differ between
    processors: x86 without VNNI adds products in 16 bits and saturates. With `exact`, nodes compute in floats
    and only the pairs round: the same on every machine, slower than floats, and equal to an integer kernel
    that keeps all bits.

    Raises what onnxruntime raises.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others may need the cores
    if exact:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def collect_statistics(
    network: onnx.ModelProto,
    interpretation: ModelInterpretation,
    pictures: Sequence[Picture],
    progress: ProgressReporter | None = None,
) -> TensorStatistics:
    """Run a network on pictures at its input size and take down every float tensor's values.

    Raises:
        ModelError: a tensor contains NaN or infinity, or it cannot be run.
    """
    statistics = TensorStatistics()
    names = sorted(list_float_tensors(network.graph))
    # Optimisations would remove or change the watched tensors.
    session = PictureSession(network, interpretation, watched=names, optimized=False)
    groups = [names[start : start + _TENSORS_PER_RUN] for start in range(0, len(names), _TENSORS_PER_RUN)]
    progress, passes = progress or make_silent_reporter(), 2 * len(groups)
    for number, group in enumerate(groups):
        first, second = (
            progress.track(pictures, f"pass {2 * number + each} of {passes}, pictures") for each in (1, 2)
        )
        for picture in first:
            for name, values in zip(group, session.run(picture, group), strict=True):
                if not np.isfinite(values).all():
                    raise ModelError(f"tensor '{name}' contains NaN or infinity")
                statistics.add_extremes(name, values)
        for picture in second:
            for name, values in zip(group, session.run(picture, group), strict=True):
                statistics.add_counts(name, values)
    return statistics
