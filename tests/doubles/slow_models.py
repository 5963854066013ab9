"""Tiny detectors with a variant: one that takes long and has a quick one, and one with real integers."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from tiny_models import TinyDetector, pictures
from visionedge.model.model import Model, load_model
from visionedge.model.parity import Parity, Tolerance
from visionedge.model.quantization.calibration import collect_statistics, fold_constants
from visionedge.model.quantization.int8 import QuantizationRecipe, quantize
from visionedge.model.quantization.variants import make_tolerance_document, make_variant_path, save_variant

_TIMED_ROUNDS = 8


def slow_detector(detector: TinyDetector, rounds: int) -> onnx.ModelProto:
    """The network of a detector, that first goes over its picture so many times for nothing."""
    model = detector.proto()
    kernel = np.random.default_rng(7).normal(0, 0.03, (32, 32, 3, 3)).astype(np.float32)
    first = np.random.default_rng(8).normal(0, 0.1, (32, 3, 3, 3)).astype(np.float32)
    weights = {"slow.kernel": kernel, "slow.first": first, "slow.nothing": np.float32(1e-9)}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()
    )
    nodes = [helper.make_node("Conv", ["image", "slow.first"], ["slow.0"], pads=[1] * 4)]
    for number in range(rounds):
        made, source = f"slow.{number}.made", f"slow.{number}"
        nodes.append(helper.make_node("Conv", [source, "slow.kernel"], [made], pads=[1] * 4))
        nodes.append(helper.make_node("Tanh", [made], [f"slow.{number + 1}"]))
    nodes += [
        helper.make_node("ReduceMean", [f"slow.{rounds}"], ["slow.mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Mul", ["slow.mean", "slow.nothing"], ["slow.small"]),
        helper.make_node("Add", ["image", "slow.small"], ["slow.image"]),
    ]
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "image":
                node.input[place] = "slow.image"
    body = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *body])
    onnx.checker.check_model(model)
    return model


def save_slow(path: Path, rounds: int, detector: TinyDetector | None = None) -> Path:
    """Write it to a file; the path."""
    onnx.save(slow_detector(detector or TinyDetector(), rounds), path)
    return path


def rounds_for(picture_ms: float) -> int:
    """How many rounds make a slow detector need so long for a picture, on one core of this processor.

    Processors differ by more than ten times in how fast they convolve, so no fixed number is slow on all.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    network = slow_detector(TinyDetector(), _TIMED_ROUNDS)
    session = onnxruntime.InferenceSession(
        network.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (source,) = session.get_inputs()
    image = np.zeros([size if isinstance(size, int) else 1 for size in source.shape], np.float32)
    taken_ms = []
    for _ in range(8):  # the shortest is the one that nothing else disturbed
        began_ns = time.perf_counter_ns()
        session.run(None, {source.name: image})
        taken_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    return max(1, math.ceil(picture_ms * _TIMED_ROUNDS / min(taken_ms)))


def save_with_variant(path: Path) -> Path:
    """A `TinyDetector` in a file, and beside it a real int8 variant of it that the report lets be used."""
    model = load_model(TinyDetector().save(path))
    network = fold_constants(TinyDetector().proto())
    values = collect_statistics(network, model.interpretation, list(pictures(8))).values("all")
    save_variant(
        make_variant_path(model, "int8"),
        quantize(network, values, QuantizationRecipe()),
        model,
        "int8",
        _report("everything"),
    )
    return path


def store_fast_variant(model: Model, data: Path, rounds: int = 0) -> None:
    """Put a variant of a slow `TinyDetector` into the data folder; it says int8, and sees the same."""
    network = slow_detector(TinyDetector(), rounds) if rounds else TinyDetector().proto()
    save_variant(make_variant_path(model, "int8", data=data), network, model, "int8", _report("does less"))


def _report(recipe: str) -> dict[str, Any]:
    """What a variant says of itself that sees all that fp32 sees."""
    return {
        "recipe": recipe,
        "parity": Parity(pictures=8, boxes=100, matched=1.0, score_shift=0.0, max_score_shift=0.0).document(),
        "tolerance": make_tolerance_document(Tolerance()),
        "refused": None,
        "made": {"at": "2026-01-01T00:00:00Z"},
    }
