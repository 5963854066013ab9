"""`visionedge model inspect`: what a model is, how it was recognised, and how it compiles and runs.

`inspect_model` returns the facts as a JSON document; `format_report` makes text of it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from visionedge.errors import ModelError
from visionedge.model.analysis.cuda_kernels import explain_missing_kernel, read_opsets
from visionedge.model.analysis.shape_inference import infer_types
from visionedge.model.analysis.signature import TensorInfo, fix_open_size, read_signature
from visionedge.model.compiled_metadata import require_compiled_metadata
from visionedge.model.compiler.build import load_or_compile_with_batch
from visionedge.model.exporter_files import read_custom_vision_manifest
from visionedge.model.heads import load_heads
from visionedge.model.labels import choose_labels
from visionedge.model.model import Model, load_model
from visionedge.model.onnx_file import ModelFile, iterate_tensors, read_model_file, wrap_model_errors
from visionedge.model.sidecar import read_sidecar
from visionedge.ops.doctor.host import run_probe_child

_WEIGHTS = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    | {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4}
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ModelCost:
    """`parameters`: the number of weights. `macs`: multiply-adds per picture of the `counted` nodes.

    `uncounted` nodes multiply too, but their shapes are only known at run time.
    """

    parameters: int
    macs: int
    counted: int
    uncounted: int


def compute_cost(network: onnx.ModelProto, shapes: Shapes) -> ModelCost:
    """The cost of a network whose shapes are those for one picture."""
    known, total, missing = 0, 0, 0
    for node in network.graph.node:
        count = _MAC_COUNTERS.get(node.op_type)
        if count is None:
            continue
        macs = count(node, shapes)
        if macs is None:
            missing += 1
        else:
            known, total = known + 1, total + macs
    weights = sum(math.prod(t.dims) for t in iterate_tensors(network) if t.data_type in _WEIGHTS)
    return ModelCost(weights, total, known, missing)


def count_operators(nodes: Iterable[onnx.NodeProto]) -> Counter[str]:
    """The number of nodes of each operator; custom operators with their domain."""
    return Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}" for node in nodes
    )


def _shape(node: onnx.NodeProto, index: int, shapes: Shapes) -> tuple[int, ...] | None:
    return shapes.get(node.input[index]) if len(node.input) > index else None


def _convolution(node: onnx.NodeProto, shapes: Shapes, weight: int = 1) -> int | None:
    """Each output value takes one kernel of its own group of channels."""
    kernel, out = _shape(node, weight, shapes), shapes.get(node.output[0])
    return None if kernel is None or out is None else math.prod(out) * math.prod(kernel[1:])


def _transposed(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """Each input value is multiplied by one kernel."""
    kernel, before = _shape(node, 1, shapes), _shape(node, 0, shapes)
    return None if kernel is None or before is None else math.prod(before) * math.prod(kernel[1:])


def _product(node: onnx.NodeProto, shapes: Shapes, second: int = 1) -> int | None:
    left, right = _shape(node, 0, shapes), _shape(node, second, shapes)
    if not left or not right:
        return None
    columns = right[-1] if len(right) > 1 else 1
    batch = math.prod(right[:-2]) if len(right) > len(left) else 1
    return math.prod(left) * columns * batch


def _gemm(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    right, out = _shape(node, 1, shapes), shapes.get(node.output[0])
    if right is None or out is None:
        return None
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    return math.prod(out) * right[1 if turned else 0]


_MAC_COUNTERS: Mapping[str, Callable[[onnx.NodeProto, Shapes], int | None]] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": lambda node, shapes: _convolution(node, shapes, 3),
    "ConvTranspose": _transposed,
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": lambda node, shapes: _product(node, shapes, 3),
    "Gemm": _gemm,
}


Document = dict[str, Any]

_PLACEMENT_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Inspection:
    """The facts as a document, and the reason if the model is refused.

    `state`: the lines of `MODEL.yaml` that would make it acceptable; None if they are not known.
    """

    document: Document
    refused: str | None
    state: tuple[str, ...] | None = None


def inspect_model(path: Path, data: Path, device: str | None = None) -> Inspection:
    """Read a model, compile it and run it once; `data` is the folder of compiled models.

    `device` ("cuda", "cpu"): also open it on that device, and report where its nodes run.

    Raises:
        ModelError: the file cannot be read.
        UnavailableError: onnxruntime cannot be used.
    """
    file = read_model_file(path)
    document: Document = {"path": str(path)}
    try:
        document |= _file_facts(file, path)
        model = load_model(path)
        document |= _interpretation_facts(model, file)
        model, graph = load_or_compile_with_batch(model, data)
        document |= _compiled_facts(model, onnx.load_model_from_string(graph))
        if device is not None:
            document["placed"] = {"asked": device} | _probe_placement(path, device)
    except ModelError as error:
        heads = [head.name for head in load_heads() if head.name != "compiled"]
        return Inspection(document | {"refused": str(error), "heads": heads}, str(error), error.state)
    return Inspection(document | {"refused": None}, None)


def _file_facts(file: ModelFile, path: Path) -> Document:
    """The facts of any ONNX file."""
    model = file.proto
    with wrap_model_errors(path):
        signature = read_signature(
            model, {**read_custom_vision_manifest(path), **read_sidecar(path).metadata}
        )
        with fix_open_size(model, signature.metadata):
            types = infer_types(model).node_by_node
        count = compute_cost(model, _shapes(types))
    return {
        "name": path.stem,
        "sha256": file.sha256,
        "bytes": path.stat().st_size,
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version.strip("None ")))),
        "opset": read_opsets(model),
        "irVersion": model.ir_version,
        "inputs": [_tensor(tensor) for tensor in signature.inputs],
        "outputs": [_tensor(tensor) for tensor in signature.outputs],
        "parameters": count.parameters,
        "macsPerPicture": count.macs,
        "macsUncountedNodes": count.uncounted,
        "nodes": len(model.graph.node),
        "operators": dict(count_operators(model.graph.node).most_common()),
    }


def _tensor(tensor: TensorInfo) -> Document:
    shape = None if tensor.shape is None else list(tensor.shape)
    return {"name": tensor.name, "type": tensor.dtype, "shape": shape}


def _shapes(types: Mapping[str, onnx.TypeProto]) -> dict[str, tuple[int, ...]]:
    """The completely known shapes."""
    sides = {name: [d.dim_value for d in kind.tensor_type.shape.dim] for name, kind in types.items()}
    return {name: tuple(dims) for name, dims in sides.items() if all(side > 0 for side in dims)}


def _interpretation_facts(model: Model, file: ModelFile) -> Document:
    """How the model was recognised."""
    preprocess, spec, sidecar = model.interpretation.preprocess, model.input, read_sidecar(model.path)
    metadata = {entry.key: entry.value for entry in file.proto.metadata_props} | dict(sidecar.metadata)
    label_source = sidecar.name if "names" in sidecar.metadata else "its metadata"
    _, origin = choose_labels(
        model.path,
        metadata,
        model.interpretation.class_count,
        label_source,
        background=model.interpretation.background,
    )
    if sidecar.data_yaml is not None:
        _, origin = sidecar.data_yaml.labels(model.labels, origin)
    return {
        "head": model.head,
        "evidence": list(model.evidence),
        "classes": model.interpretation.class_count,
        "labels": list(model.labels),
        "labelsFrom": origin,
        "suppression": model.interpretation.needs_nms,
        "picture": {
            "width": spec.width_px,
            "height": spec.height_px,
            "fit": spec.fit,
            "anchor": spec.anchor,
            "pad": spec.pad,
            "resample": spec.resample,
            "rounding": spec.rounding,
            "color": preprocess.color,
            "scale": preprocess.scale,
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
        },
    }


def _compiled_facts(model: Model, graph: onnx.ModelProto) -> Document:
    """The compiled graph, and its nodes without a CUDA kernel."""
    types = infer_types(graph).node_by_node
    compiled_metadata = require_compiled_metadata(graph)
    ours = [node for node in graph.graph.node if node.name.lstrip("_").startswith("visionedge.")]
    spec, batch = model.input, model.interpretation.input.batch
    return {
        "batch": {
            "open": batch is None,
            "size": batch,
            "why": compiled_metadata.batch_reason,
        },
        "compiled": {
            "takes": f"uint8 [{batch or 'N'},{spec.height_px},{spec.width_px},3]",
            "gives": f"float32 [{batch or 'N'},{compiled_metadata.rows},6]",
            "rows": compiled_metadata.rows,
            "nodes": len(graph.graph.node),
            "added": dict(count_operators(ours).most_common()),
        },
        "cuda": {"nodes": len(graph.graph.node), "withoutKernel": _without_kernel(graph, types)},
    }


def _without_kernel(graph: onnx.ModelProto, types: Mapping[str, onnx.TypeProto]) -> list[Document]:
    """The nodes that CUDA would leave to the CPU, by operator and reason."""
    opsets = read_opsets(graph)
    kinds = {name: kind.tensor_type.elem_type for name, kind in types.items()}
    found: dict[tuple[str, str], list[str]] = {}
    for node in graph.graph.node:
        why = explain_missing_kernel(node, opsets, kinds)
        if why is not None:
            found.setdefault((node.op_type, why), []).append(node.name or node.output[0])
    return [{"operator": operator, "why": why, "nodes": names} for (operator, why), names in found.items()]


def _probe_placement(path: Path, device: str) -> Document:
    """The placement of a session on the device, opened in another process, because that may crash."""
    arguments = {"device": device, "model": str(path.resolve())}
    result = run_probe_child("placement", arguments, _PLACEMENT_LIMIT_S)
    found = result.step("placement") or {"error": f"the session did not start: {result.reason}"}
    return {key: found[key] for key in ("device", "onDevice", "onCpu", "error") if key in found}


# --- text ---------------------------------------------------------------------------------------------------


def format_report(inspection: Inspection) -> str:
    """The document as text."""
    facts = inspection.document
    lines = [facts["path"]]
    if "name" in facts:
        lines += _format_file(facts)
    if "head" in facts:
        lines += ["", *_format_head(facts)]
    if "compiled" in facts:
        lines += ["", *_format_graph(facts)]
    if inspection.refused is not None:
        lines += ["", *_format_refusal(facts, inspection.state)]
    # Names come from an untrusted file, and may have control characters.
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in "\n".join([*lines, ""]))


def _format_file(facts: Document) -> list[str]:
    megabytes = facts["bytes"] / 1e6
    opset = ", ".join(f"{domain or 'ONNX'} {version}" for domain, version in facts["opset"].items())
    uncounted = facts["macsUncountedNodes"]
    more = f" (without {uncounted} nodes of unknown shape)" if uncounted else ""
    some = [f"{count} {name}" for name, count in list(facts["operators"].items())[:8]]
    rest = len(facts["operators"]) - len(some)
    return [
        f"  file     {megabytes:.1f} MB, sha256 {facts['sha256'][:16]}…, opset {opset},"
        f" producer {facts['producer'] or 'unknown'}",
        *(f"  inputs   {_describe_tensor(tensor)}" for tensor in facts["inputs"]),
        *(f"  outputs  {_describe_tensor(tensor)}" for tensor in facts["outputs"]),
        f"  weights  {_count(facts['parameters'])}",
        f"  work     {_count(facts['macsPerPicture'])} multiply-adds per picture{more}",
        f"  nodes    {facts['nodes']}: {', '.join(some)}{f' and {rest} other operators' if rest > 0 else ''}",
    ]


def _describe_tensor(tensor: Document) -> str:
    dims = "?" if tensor["shape"] is None else ",".join(str(d or "?") for d in tensor["shape"])
    return f"{tensor['name'][:80]} {tensor['type']}[{dims}]"


def _count(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _format_head(facts: Document) -> list[str]:
    labels = facts["labels"]
    shown = ", ".join(label[:40] for label in labels[:6]) + (" …" if len(labels) > 6 else "")
    many = facts["classes"] or "an unknown number of"
    origin = f"labels from {facts['labelsFrom']}" if facts["labelsFrom"] != "nothing" else "no labels"
    after = "Overlapping boxes are suppressed afterwards (NMS)."
    return [
        f"Recognised as {facts['head']}, because",
        *(f"  - {clause}" for clause in facts["evidence"]),
        f"Classes: {many} ({origin}): {shown or 'none'}",
        f"Input picture: {_describe_picture(facts['picture'])}",
        after if facts["suppression"] else "The boxes need no suppression (NMS).",
    ]


def _describe_picture(picture: Document) -> str:
    size = f"{picture['width']} x {picture['height']}"
    if picture["fit"] == "stretch":
        how = f"stretched to {size}"
    else:
        where = "in the middle" if picture["anchor"] == "center" else "at the top left"
        how = f"letterboxed to {size}, {where}, padded with grey {picture['pad']}"
    how += ", with antialiasing" if picture["resample"] == "antialias" else ""
    scale, mean, std = picture["scale"], picture["mean"], picture["std"]
    steps = "pixels of 0-255" if scale == 1 else f"pixels x {scale:.6g}"
    steps += f", minus {'/'.join(f'{value:.5g}' for value in mean)}" if any(mean) else ""
    steps += f", divided by {'/'.join(f'{value:.5g}' for value in std)}" if set(std) != {1.0} else ""
    return f"{how}; {picture['color'].upper()}, {steps}"


def _format_graph(facts: Document) -> list[str]:
    compiled, cuda = facts["compiled"], facts["cuda"]
    added = ", ".join(f"{count} {name}" for name, count in compiled["added"].items())
    lines = [
        f"Compiled graph: {compiled['takes']} -> {compiled['gives']}; a row is left, top, right, bottom,"
        " score, class.",
        f"  added    {sum(compiled['added'].values())} nodes: {added}",
        f"  batch    {facts['batch']['why']}",
    ]
    lines += [_describe_placement(facts["placed"])] if "placed" in facts else []
    if not cuda["withoutKernel"]:
        return [*lines, f"  on CUDA  all {cuda['nodes']} nodes have a kernel"]
    on_cpu_count = sum(len(entry["nodes"]) for entry in cuda["withoutKernel"])
    lines.append(f"  on CUDA  {on_cpu_count} of {cuda['nodes']} nodes would run on the CPU:")
    for entry in cuda["withoutKernel"]:
        names = ", ".join(name[:60] for name in entry["nodes"][:3])
        more = " …" if len(entry["nodes"]) > 3 else ""
        lines.append(f"    {len(entry['nodes'])} {entry['operator']}: {entry['why']} ({names}{more})")
    return lines


def _describe_placement(placed: Document) -> str:
    if "error" in placed:
        return f"  placed   not on {placed['asked']}: {placed['error']}"
    words = f"  placed   requested {placed['asked']}, runs on {placed['device']}: {placed['onDevice']} nodes"
    names = ", ".join(placed["onCpu"][:6]) + (" …" if len(placed["onCpu"]) > 6 else "")
    return f"{words}, {len(placed['onCpu'])} more on the CPU: {names}" if names else words


def _format_refusal(facts: Document, state: tuple[str, ...] | None) -> list[str]:
    name = Path(facts["path"]).stem
    if state == ():
        return ["The model is refused."]
    if state is not None:
        return [
            "The model is refused, because its form is not certain. Add the missing facts to"
            f" {name}.yaml beside it:",
            *(f"  {line}" for line in state),
        ]
    return [
        "The model is refused, because its form is not certain. If you know it, describe it in"
        f" {name}.yaml beside it; leave out what the file states itself:",
        "  head: FAMILY              # one of the families below, if it belongs to one",
        "  input: {color: rgb, scale: 0.00392156863, fit: letterbox, anchor: center, pad: 114}",
        "  labels: [person, car]     # by class number",
        "  nms: true                 # whether overlapping boxes must be suppressed",
        f"Families: {', '.join(facts['heads'])}",
    ]
