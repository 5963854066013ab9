"""Make the int8 variant that only OpenVINO computes, MODEL.int8.openvino.onnx, with NNCF (Apache-2.0).

    pip install -r requirements/nncf.in      # an environment of its own, with visionedge[cpu,openvino,eval]
    python tools/nncf_quantize.py nanodet.onnx --calibrate coco128/ --labels instances.json

The pictures are used as by `visionedge model compile --precision int8`: every second one calibrates, the
others judge. The last layers, everything behind them and the first convolutions stay in floats. The variant
is judged in OpenVINO, with these floats in fp32 (`parity`) and in bf16 (`parityHere`), in which OpenVINO
computes them where the CPU can. A refused variant is not written (exit code 1).
"""

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from visionedge import __version__
from visionedge.engine.device.backend import list_cpu_precisions
from visionedge.engine.device.openvino_session import OpenVinoSession
from visionedge.engine.plan import read_cpu_name
from visionedge.errors import ModelError, UnavailableError, VisionedgeError
from visionedge.frames.types import Detections, Picture, format_utc, utc_now
from visionedge.model.compiler.compile import compile_graph, read_unchanged_network
from visionedge.model.model import Model, load_model
from visionedge.model.parity import (
    MIN_BOXES,
    SMALL_BOX_MATCH_IOU,
    ApComparison,
    Parity,
    Tolerance,
    compare_detections,
)
from visionedge.model.postprocess import Selection
from visionedge.model.quantization.calibration import (
    WEIGHTED_OPERATORS,
    PictureSession,
    find_nodes_before_last_weights,
    fold_constants,
)
from visionedge.model.quantization.search import CalibrationData, CalibrationSample
from visionedge.model.quantization.variants import make_tolerance_document, make_variant_path, save_variant
from visionedge.ops.models.compile import read_calibration_data
from visionedge.runtime.measurement import interleaved_medians
from visionedge.runtime.ov import import_openvino, installed_openvino

PRESETS = ("performance", "mixed")
_MIN_SCORE, _IOU = 0.01, 0.5
_TIMING_BUDGET_S = 3.0


def list_float_nodes(graph: onnx.GraphProto, first: int) -> list[str]:
    """The nodes that stay in floats: the last weighted ones, those behind them, and the front.

    The front is the first convolutions and what is computed from them alone.
    """
    inner = find_nodes_before_last_weights(graph)
    convolutions = [node.name for node in graph.node if node.op_type == "Conv"]
    front, computed = set(convolutions[:first]), {name for node in graph.node for name in node.output}
    floats = {name for node in graph.node if node.name in front for name in node.output}
    for node in graph.node:
        sources = computed.intersection(node.input)
        if node.op_type not in WEIGHTED_OPERATORS and sources and sources <= floats:
            front.add(node.name)
            floats.update(node.output)
    return [node.name for node in graph.node if node.name in front or node.name not in inner]


def make_unsigned(network: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose activations are uint8 instead of int8, of the same values.

    OpenVINO 2026.4 computes convolutions that follow each other in int8 wrongly (seen on an EPYC with VNNI):
    NanoDet-g detects nothing then.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(network)
    zeros = {node.input[2] for node in copy.graph.node if node.op_type == "QuantizeLinear"}
    for tensor in copy.graph.initializer:
        if tensor.name in zeros and tensor.data_type == onnx.TensorProto.INT8:
            shifted = numpy_helper.to_array(tensor).astype(np.int16) + 128
            tensor.CopyFrom(numpy_helper.from_array(shifted.astype(np.uint8), tensor.name))
    del copy.graph.value_info[:]  # it says int8
    return copy


def quantize(
    model: Model, network: onnx.ModelProto, pictures: Sequence[Picture], preset: str, first: int
) -> onnx.ModelProto:
    """A folded network in integers, by NNCF's quantization after training.

    Raises:
        ModelError: the network has another input beside the picture.
        UnavailableError: NNCF is not installed.
    """
    import_openvino()  # forbids telemetry, which NNCF sends, too
    try:
        nncf: Any = importlib.import_module("nncf")
    except ImportError:
        raise UnavailableError("nncf is not installed; pip install -r requirements/nncf.in") from None
    if len(network.graph.input) != 1:
        raise ModelError(f"{model.path}: has {len(network.graph.input)} inputs; NNCF's variant needs one")
    logging.getLogger("nncf").setLevel(logging.WARNING)
    name = network.graph.input[0].name
    session = PictureSession(network, model.interpretation, watched=[name], optimized=False)
    items = [{name: session.run(picture, [name])[0]} for picture in pictures]
    made: onnx.ModelProto = nncf.quantize(
        network,
        nncf.Dataset(items),
        preset=nncf.QuantizationPreset(preset),
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(items),
        ignored_scope=nncf.IgnoredScope(names=list_float_nodes(network.graph, first), validate=False),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.DISABLE),
    )
    return make_unsigned(made)


class Judge:
    """Compares a variant in OpenVINO with fp32 in onnxruntime."""

    def __init__(self, model: Model, data: CalibrationData) -> None:
        self.model, self.data = model, data
        self._selection = Selection.of(model, _MIN_SCORE, _IOU)
        self._fp32 = PictureSession(read_unchanged_network(model), model.interpretation, threads=1)
        self._judged, self._common = (
            [self._apply(self._fp32.run(sample.image)[0], sample) for sample in samples]
            for samples in (data.judged, data.common)
        )

    def compare(self, session: OpenVinoSession) -> tuple[Parity, Parity | None]:
        """On the judged pictures, and on the bundled ones if fp32 detects enough there."""
        seen = self._detect(session, self.data.judged)
        ap = None
        if self.data.measure_ap is not None:
            before, after = self.data.measure_ap(self._judged), self.data.measure_ap(seen)
            ap = ApComparison(self.data.labelled, before[0], after[0], before[1], after[1])
        parity = compare_detections(self._judged, seen, ap)
        if compare_detections(self._common, self._common).boxes < MIN_BOXES:
            return parity, None
        others = self._detect(session, self.data.common)
        return parity, compare_detections(self._common, others, iou=SMALL_BOX_MATCH_IOU)

    def measure_speed(self, session: OpenVinoSession) -> dict[str, float]:
        """Of a picture on one thread, beside fp32 in turns."""
        image = self.data.judged[0].image
        runs = {"fp32": lambda: self._fp32.run(image), "int8": lambda: self._run(session, image)}
        found = interleaved_medians(runs, budget_s=_TIMING_BUDGET_S)
        return {
            "fp32Ms": round(found["fp32"].ms, 2),
            "ms": round(found["int8"].ms, 2),
            "timesAsFast": round(found["int8"].speedup, 3),
        }

    def _detect(self, session: OpenVinoSession, samples: Sequence[CalibrationSample]) -> list[Detections]:
        return [self._apply(self._run(session, sample.image), sample) for sample in samples]

    def _run(self, session: OpenVinoSession, image: Picture) -> Any:
        return session.run(image[None], self.model.interpretation.input.batch or 1)

    def _apply(self, rows: Any, sample: CalibrationSample) -> Detections:
        return self._selection.apply(rows[0], sample.placement)


def judge(model: Model, data: CalibrationData, made: onnx.ModelProto) -> dict[str, Any]:
    """Parities and speed of a variant, as its report has them; `refused` says why it must not be used."""
    network = onnx.ModelProto()
    network.CopyFrom(made)
    graph, judging = compile_graph(network, model.interpretation).SerializeToString(), Judge(model, data)
    sessions = [OpenVinoSession(graph, "cpu", precision=floats) for floats in ("fp32", "bf16")]
    found = [judging.compare(session) for session in sessions]
    tolerance = Tolerance()
    refusals = [parity.refusal(tolerance) for parity, _ in found]
    refusals += [common.refusal(tolerance.for_other_pictures()) for _, common in found if common is not None]
    (parity, common), (in_bf16, _) = found
    used = sessions["bf16" in list_cpu_precisions()]
    return {
        "refused": next((refusal for refusal in refusals if refusal is not None), None),
        "parity": parity.document(),
        "parityHere": in_bf16.document(),
        "parityClip": None if common is None else common.document(),
        "tolerance": make_tolerance_document(tolerance),
        "speed": judging.measure_speed(used),
    }


def make(arguments: argparse.Namespace) -> Path:
    """Make, judge and store the variant; returns its path.

    Raises:
        VisionedgeError: it is refused, or cannot be made; nothing is written then.
    """
    model = load_model(arguments.model)
    data = read_calibration_data(model, "int8", arguments.calibrate, arguments.labels, _say)
    began_s = time.monotonic()
    network = fold_constants(read_unchanged_network(model))
    pictures = [sample.image for sample in data.calibration]
    made = quantize(model, network, pictures, arguments.preset, arguments.first)
    del made.metadata_props[:]
    made.metadata_props.extend(network.metadata_props)
    report = judge(model, data, made)
    _say(_describe(report))
    if report["refused"] is not None:
        raise VisionedgeError(
            f"{model.path}: the variant is refused: {report['refused']}; nothing was stored"
        )
    nncf = importlib.import_module("nncf")
    report |= {
        "recipe": f"NNCF {nncf.__version__}, {arguments.preset}, behind the first {arguments.first}",
        "tried": [],
        "made": {
            "at": format_utc(utc_now()),
            "seconds": round(time.monotonic() - began_s, 1),
            "visionedge": __version__,
            "onnx": onnx.__version__,
            "openvino": installed_openvino(),
            "processor": read_cpu_name(),
            "calibrationPictures": len(pictures),
        },
    }
    path = make_variant_path(model, "int8", arguments.into, runtime="openvino")
    save_variant(path, made, model, "int8", report, runtime="openvino")
    return path


def _describe(report: Mapping[str, Any]) -> str:
    words = []
    for name, floats in (("parity", "fp32"), ("parityHere", "bf16")):
        parity = report[name]
        ap = "" if parity["ap"] is None else f", AP {parity['ap']['variant']} ({parity['ap']['fp32']})"
        words.append(f"floats in {floats}: {parity['matched']:.1%} agree, shift {parity['scoreShift']}{ap}")
    return f"{'; '.join(words)}; here {report['speed']['timesAsFast']} times as fast as onnxruntime fp32"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--calibrate", type=Path, required=True, metavar="DIR", help="pictures")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="their annotations, in COCO's format")
    parser.add_argument("--preset", choices=PRESETS, default="mixed", help="default: mixed")
    parser.add_argument(
        "--first", type=int, default=2, metavar="N", help="convolutions that stay in floats (default: 2)"
    )
    parser.add_argument("--into", type=Path, metavar="DIR", help="default: the folder of the model")
    try:
        print(make(parser.parse_args(words)))
    except VisionedgeError as error:
        print(f"nncf_quantize: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
