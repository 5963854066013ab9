"""`visionedge model inspect`: what a model is, why it is taken for that, and what will become of it where."""

import json
import math
import subprocess
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
from visionedge.model.interpretation import Preprocess
from visionedge.model.labels import choose_labels
from visionedge.model.model import Model, load_model
from visionedge.model.onnx_file import ModelFile, iterate_tensors, read_model_file, wrap_model_errors
from visionedge.model.sidecar import read_sidecar
from visionedge.runtime.child_process import start_child

# How much there is in a network: its weights, and the multiplications it takes to look at one picture.


_WEIGHTS = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    | {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4}
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ModelCost:
    """`parameters`: values of weights. `macs`: multiply-and-adds for one picture, of the `counted` nodes.

    `uncounted` nodes multiply too, but their shapes are known only when they run.
    """

    parameters: int
    macs: int
    counted: int
    uncounted: int


def compute_cost(network: onnx.ModelProto, shapes: Shapes) -> ModelCost:
    """Count a network whose shapes are those for one picture."""
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


def count_operators(network: onnx.ModelProto) -> Counter[str]:
    """How many nodes there are of each operator; those of other domains with theirs in front."""
    return Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        for node in network.graph.node
    )


def _shape(node: onnx.NodeProto, index: int, shapes: Shapes) -> tuple[int, ...] | None:
    return shapes.get(node.input[index]) if len(node.input) > index else None


def _convolution(node: onnx.NodeProto, shapes: Shapes, weight: int = 1) -> int | None:
    """Each value that comes out took one kernel: its weights are for its own group of channels."""
    kernel, out = _shape(node, weight, shapes), shapes.get(node.output[0])
    return None if kernel is None or out is None else math.prod(out) * math.prod(kernel[1:])


def _transposed(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """Each value that goes in is spread by one kernel."""
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

_PLACED_WITHIN_S = 120


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that was found, as a document, and the words of the refusal if it was refused.

    `state` are the lines of `MODEL.yaml` that would help then; None where that is open.
    """

    document: Document
    refused: str | None
    state: tuple[str, ...] | None = None


def inspect_model(path: Path, data: Path, device: str | None = None) -> Inspection:
    """Look into a model, compile it and run it once; `data` is the folder where compiled models are kept.

    `device` ("cuda", "cpu"): also open it there, and tell where its nodes really lie.

    Raises:
        ModelError: the file cannot even be read.
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
        return Inspection(document | {"refused": str(error), "heads": _head_names()}, str(error), error.state)
    return Inspection(document | {"refused": None}, None)


def _head_names() -> list[str]:
    return [head.name for head in load_heads() if head.name != "compiled"]


def _file_facts(file: ModelFile, path: Path) -> Document:
    """What can be said of any ONNX file."""
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
        "operators": dict(count_operators(model).most_common()),
    }


def _tensor(tensor: TensorInfo) -> Document:
    shape = None if tensor.shape is None else list(tensor.shape)
    return {"name": tensor.name, "type": tensor.dtype, "shape": shape}


def _shapes(types: Mapping[str, onnx.TypeProto]) -> dict[str, tuple[int, ...]]:
    """The shapes that are known to the last side."""
    sides = {name: [d.dim_value for d in kind.tensor_type.shape.dim] for name, kind in types.items()}
    return {name: tuple(dims) for name, dims in sides.items() if all(side > 0 for side in dims)}


def _interpretation_facts(model: Model, file: ModelFile) -> Document:
    """What recognition made of it."""
    way, spec, sidecar = model.interpretation.preprocess, model.input, read_sidecar(model.path)
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
            "color": way.color,
            "scale": way.scale,
            "mean": list(way.mean),
            "std": list(way.std),
        },
    }


def _compiled_facts(model: Model, graph: onnx.ModelProto) -> Document:
    """What the compiler makes of it, and which of its nodes CUDA has no kernel for."""
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
            "added": dict(count_operators(_model_of(ours)).most_common()),
        },
        "cuda": {"nodes": len(graph.graph.node), "withoutKernel": _without_kernel(graph, types)},
    }


def _model_of(nodes: Iterable[onnx.NodeProto]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.graph.node.extend(nodes)
    return model


def _without_kernel(graph: onnx.ModelProto, types: Mapping[str, onnx.TypeProto]) -> list[Document]:
    """The nodes that would be computed on the CPU, by operator and reason."""
    opsets = read_opsets(graph)
    kinds = {name: kind.tensor_type.elem_type for name, kind in types.items()}
    found: dict[tuple[str, str], list[str]] = {}
    for node in graph.graph.node:
        why = explain_missing_kernel(node, opsets, kinds)
        if why is not None:
            found.setdefault((node.op_type, why), []).append(node.name or node.output[0])
    return [{"operator": operator, "why": why, "nodes": names} for (operator, why), names in found.items()]


def _probe_placement(path: Path, device: str) -> Document:
    """What a session on the device says of itself; it is opened in another process, which may be lost."""
    asked = json.dumps({"device": device, "model": str(path.resolve())})
    with start_child("visionedge.engine.placement", "placement", asked) as child:
        try:
            stdout, _ = child.communicate(timeout=_PLACED_WITHIN_S)
        except subprocess.TimeoutExpired:
            return {"error": f"its session did not start within {_PLACED_WITHIN_S} s"}
        finally:
            child.kill()
    try:
        placement = json.loads(stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"its session ended with code {child.returncode} and no answer"}
    return {key: placement[key] for key in ("device", "onDevice", "onCpu", "error") if key in placement}


# --- words --------------------------------------------------------------------------------------------------


def format_report(inspection: Inspection) -> str:
    """The document for people."""
    facts = inspection.document
    lines = [facts["path"]]
    if "name" in facts:
        lines += _about_the_file(facts)
    if "head" in facts:
        lines += ["", *_about_the_head(facts)]
    if "compiled" in facts:
        lines += ["", *_about_the_graph(facts)]
    if inspection.refused is not None:
        lines += ["", *_about_the_refusal(facts, inspection.state)]
    return "\n".join(_plain(line) for line in lines) + "\n"


def _plain(line: str) -> str:
    """Names come out of the file: nothing of theirs may drive a terminal."""
    return "".join(c if c.isprintable() else "?" for c in line)


def _about_the_file(facts: Document) -> list[str]:
    megabytes = facts["bytes"] / 1e6
    opset = ", ".join(f"{domain or 'ONNX'} {version}" for domain, version in facts["opset"].items())
    uncounted = facts["macsUncountedNodes"]
    more = f" (and those of {uncounted} nodes whose shapes only a run tells)" if uncounted else ""
    some = [f"{count} {name}" for name, count in list(facts["operators"].items())[:8]]
    rest = len(facts["operators"]) - len(some)
    return [
        f"  file     {megabytes:.1f} MB, sha256 {facts['sha256'][:16]}…, opset {opset},"
        f" made by {facts['producer'] or 'nobody it names'}",
        *(f"  takes    {_words_of_tensor(tensor)}" for tensor in facts["inputs"]),
        *(f"  gives    {_words_of_tensor(tensor)}" for tensor in facts["outputs"]),
        f"  weights  {_count(facts['parameters'])}",
        f"  work     {_count(facts['macsPerPicture'])} multiply-adds for one picture{more}",
        f"  nodes    {facts['nodes']}: {', '.join(some)}{f' and {rest} other operators' if rest > 0 else ''}",
    ]


def _words_of_tensor(tensor: Document) -> str:
    dims = "?" if tensor["shape"] is None else ",".join(str(d or "?") for d in tensor["shape"])
    return f"{tensor['name'][:80]} {tensor['type']}[{dims}]"


def _count(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _about_the_head(facts: Document) -> list[str]:
    labels = facts["labels"]
    shown = ", ".join(label[:40] for label in labels[:6]) + (" …" if len(labels) > 6 else "")
    many = facts["classes"] or "an unknown number of"
    origin = f"named by {facts['labelsFrom']}" if facts["labelsFrom"] != "nothing" else "nothing names them"
    after = "Overlapping boxes are suppressed afterwards."
    return [
        f"It is read as {facts['head']}, because",
        *(f"  - {clause}" for clause in facts["evidence"]),
        f"It knows {many} classes ({origin}): {shown or 'none'}",
        f"Its picture: {_words_of_picture(facts['picture'])}",
        after if facts["suppression"] else "Its boxes need no suppression.",
    ]


def _words_of_picture(picture: Document) -> str:
    size = f"{picture['width']} x {picture['height']}"
    if picture["fit"] == "stretch":
        how = f"stretched to {size}"
    else:
        where = "in the middle" if picture["anchor"] == "center" else "at the top left"
        how = f"letterboxed to {size}, {where}, the rest grey {picture['pad']}"
    how += ", with antialiasing" if picture["resample"] == "antialias" else ""
    way = Preprocess(scale=picture["scale"], mean=tuple(picture["mean"]), std=tuple(picture["std"]))
    steps = "pixels of 0-255" if way.scale == 1 else f"pixels x {way.scale:.6g}"
    steps += f", less {_three(way.mean)}" if any(way.mean) else ""
    steps += f", by {_three(way.std)}" if set(way.std) != {1.0} else ""
    return f"{how}; {picture['color'].upper()}, {steps}"


def _three(values: tuple[float, float, float]) -> str:
    return "/".join(f"{value:.5g}" for value in values)


def _about_the_graph(facts: Document) -> list[str]:
    compiled, cuda = facts["compiled"], facts["cuda"]
    added = ", ".join(f"{count} {name}" for name, count in compiled["added"].items())
    lines = [
        f"Compiled it is one graph, {compiled['takes']} -> {compiled['gives']}, a row being left, top, right,"
        " bottom, score, class.",
        f"  added    {sum(compiled['added'].values())} nodes: {added}",
        f"  batch    {facts['batch']['why']}",
    ]
    lines += [_words_of_placement(facts["placed"])] if "placed" in facts else []
    if not cuda["withoutKernel"]:
        return [*lines, f"  on CUDA  each of its {cuda['nodes']} nodes has a kernel"]
    on_cpu_count = sum(len(entry["nodes"]) for entry in cuda["withoutKernel"])
    lines.append(f"  on CUDA  {on_cpu_count} of its {cuda['nodes']} nodes would be computed on the CPU:")
    for entry in cuda["withoutKernel"]:
        names = ", ".join(name[:60] for name in entry["nodes"][:3])
        more = " …" if len(entry["nodes"]) > 3 else ""
        lines.append(f"    {len(entry['nodes'])} {entry['operator']}: {entry['why']} ({names}{more})")
    return lines


def _words_of_placement(placed: Document) -> str:
    if "error" in placed:
        return f"  placed   not on {placed['asked']}: {placed['error']}"
    words = (
        f"  placed   asked for {placed['asked']}, came up on {placed['device']}: {placed['onDevice']} nodes"
    )
    names = ", ".join(placed["onCpu"][:6]) + (" …" if len(placed["onCpu"]) > 6 else "")
    return f"{words}, {len(placed['onCpu'])} more on the CPU: {names}" if names else words


def _about_the_refusal(facts: Document, state: tuple[str, ...] | None) -> list[str]:
    name = Path(facts["path"]).stem
    if state == ():
        return ["It is refused: a model is never guessed at."]
    if state is not None:
        return [
            f"It is refused: a model is never guessed at. State what is missing in {name}.yaml beside it:",
            *(f"  {line}" for line in state),
        ]
    return [
        "It is refused: a model is never guessed at. If you know what it is, say so in a file"
        f" {name}.yaml beside it; leave out what it says itself:",
        "  head: FAMILY              # one of those below, if it is one",
        "  input: {color: rgb, scale: 0.00392156863, fit: letterbox, anchor: center, pad: 114}",
        "  labels: [person, car]     # by class number",
        "  nms: true                 # whether overlapping boxes are still to be suppressed",
        f"Families: {', '.join(facts['heads'])}",
    ]
