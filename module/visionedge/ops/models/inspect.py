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
from visionedge.model.analysis.cuda_kernels import missing_kernel, opsets_of
from visionedge.model.analysis.shape_inference import infer
from visionedge.model.analysis.signature import Tensor, read_signature, sized
from visionedge.model.compiler.build import imprint_of, ready
from visionedge.model.exporter_files import read_export
from visionedge.model.heads import known_heads
from visionedge.model.interpretation import Preprocess
from visionedge.model.labels import labels_for
from visionedge.model.model import Model, load_model
from visionedge.model.onnx_file import ModelFile, blamed_on, read_model, tensors
from visionedge.model.sidecar import read_sidecar
from visionedge.runtime.child_process import start

# How much there is in a network: its weights, and the multiplications it takes to look at one picture.


_WEIGHTS = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    | {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4}
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Amount:
    """`parameters`: values of weights. `macs`: multiply-and-adds for one picture, of the `counted` nodes.

    `uncounted` nodes multiply too, but their shapes are known only when they run.
    """

    parameters: int
    macs: int
    counted: int
    uncounted: int


def amount(network: onnx.ModelProto, shapes: Shapes) -> Amount:
    """Count a network whose shapes are those for one picture."""
    known, total, missing = 0, 0, 0
    for node in network.graph.node:
        count = _COUNTS.get(node.op_type)
        if count is None:
            continue
        macs = count(node, shapes)
        if macs is None:
            missing += 1
        else:
            known, total = known + 1, total + macs
    weights = sum(math.prod(t.dims) for t in tensors(network) if t.data_type in _WEIGHTS)
    return Amount(weights, total, known, missing)


def operators_of(network: onnx.ModelProto) -> Counter[str]:
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


def _general(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    right, out = _shape(node, 1, shapes), shapes.get(node.output[0])
    if right is None or out is None:
        return None
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    return math.prod(out) * right[1 if turned else 0]


_COUNTS: Mapping[str, Callable[[onnx.NodeProto, Shapes], int | None]] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": lambda node, shapes: _convolution(node, shapes, 3),
    "ConvTranspose": _transposed,
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": lambda node, shapes: _product(node, shapes, 3),
    "Gemm": _general,
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


def inspect(path: Path, data: Path, device: str | None = None) -> Inspection:
    """Look into a model, compile it and run it once; `data` is the folder where compiled models are kept.

    `device` ("cuda", "cpu"): also open it there, and tell where its nodes really lie.

    Raises:
        ModelError: the file cannot even be read.
        UnavailableError: onnxruntime cannot be used.
    """
    file = read_model(path)
    document: Document = {"path": str(path)}
    try:
        document |= _file_facts(file, path)
        model = load_model(path)
        document |= _understood(model, file)
        model, graph = ready(model, data)
        document |= _compiled_facts(model, onnx.load_model_from_string(graph))
        if device is not None:
            document["placed"] = {"asked": device} | _placed(path, device)
    except ModelError as error:
        return Inspection(document | {"refused": str(error), "heads": _heads()}, str(error), error.state)
    return Inspection(document | {"refused": None}, None)


def _heads() -> list[str]:
    return [head.name for head in known_heads() if head.name != "compiled"]


def _file_facts(file: ModelFile, path: Path) -> Document:
    """What can be said of any ONNX file."""
    model = file.proto
    with blamed_on(path):
        signature = read_signature(model, {**read_export(path), **read_sidecar(path).metadata})
        with sized(model, signature.metadata):
            types = infer(model).walked
        count = amount(model, _shapes(types))
    return {
        "name": path.stem,
        "sha256": file.sha256,
        "bytes": path.stat().st_size,
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version.strip("None ")))),
        "opset": opsets_of(model),
        "irVersion": model.ir_version,
        "inputs": [_tensor(tensor) for tensor in signature.inputs],
        "outputs": [_tensor(tensor) for tensor in signature.outputs],
        "parameters": count.parameters,
        "macsPerPicture": count.macs,
        "macsUncountedNodes": count.uncounted,
        "nodes": len(model.graph.node),
        "operators": dict(operators_of(model).most_common()),
    }


def _tensor(tensor: Tensor) -> Document:
    shape = None if tensor.shape is None else list(tensor.shape)
    return {"name": tensor.name, "type": tensor.dtype, "shape": shape}


def _shapes(types: Mapping[str, onnx.TypeProto]) -> dict[str, tuple[int, ...]]:
    """The shapes that are known to the last side."""
    sides = {name: [d.dim_value for d in kind.tensor_type.shape.dim] for name, kind in types.items()}
    return {name: tuple(dims) for name, dims in sides.items() if all(side > 0 for side in dims)}


def _understood(model: Model, file: ModelFile) -> Document:
    """What recognition made of it."""
    way, spec, sidecar = model.reading.preprocess, model.input, read_sidecar(model.path)
    metadata = {entry.key: entry.value for entry in file.proto.metadata_props} | dict(sidecar.metadata)
    carrier = sidecar.name if "names" in sidecar.metadata else "its metadata"
    _, origin = labels_for(
        model.path, metadata, model.reading.class_count, carrier, background=model.reading.background
    )
    if sidecar.data_set is not None:
        _, origin = sidecar.data_set.labels(model.labels, origin)
    return {
        "head": model.head,
        "evidence": list(model.evidence),
        "classes": model.reading.class_count,
        "labels": list(model.labels),
        "labelsFrom": origin,
        "suppression": model.reading.suppress,
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
    types = infer(graph).walked
    imprint = imprint_of(graph)
    ours = [node for node in graph.graph.node if node.name.lstrip("_").startswith("visionedge.")]
    spec, batch = model.input, model.reading.input.batch
    return {
        "batch": {
            "open": batch is None,
            "size": batch,
            "why": imprint.batch_words,
        },
        "compiled": {
            "takes": f"uint8 [{batch or 'N'},{spec.height_px},{spec.width_px},3]",
            "gives": f"float32 [{batch or 'N'},{imprint.rows},6]",
            "rows": imprint.rows,
            "nodes": len(graph.graph.node),
            "added": dict(operators_of(_only(ours)).most_common()),
        },
        "cuda": {"nodes": len(graph.graph.node), "withoutKernel": _without_kernel(graph, types)},
    }


def _only(nodes: Iterable[onnx.NodeProto]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.graph.node.extend(nodes)
    return model


def _without_kernel(graph: onnx.ModelProto, types: Mapping[str, onnx.TypeProto]) -> list[Document]:
    """The nodes that would be computed on the CPU, by operator and reason."""
    opsets = opsets_of(graph)
    kinds = {name: kind.tensor_type.elem_type for name, kind in types.items()}
    found: dict[tuple[str, str], list[str]] = {}
    for node in graph.graph.node:
        why = missing_kernel(node, opsets, kinds)
        if why is not None:
            found.setdefault((node.op_type, why), []).append(node.name or node.output[0])
    return [{"operator": operator, "why": why, "nodes": names} for (operator, why), names in found.items()]


def _placed(path: Path, device: str) -> Document:
    """What a session on the device says of itself; it is opened in another process, which may be lost."""
    asked = json.dumps({"device": device, "model": str(path.resolve())})
    with start("visionedge.engine.placement", "placement", asked) as child:
        try:
            said, _ = child.communicate(timeout=_PLACED_WITHIN_S)
        except subprocess.TimeoutExpired:
            return {"error": f"its session did not start within {_PLACED_WITHIN_S} s"}
        finally:
            child.kill()
    try:
        told = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"its session ended with code {child.returncode} and no answer"}
    return {key: told[key] for key in ("device", "onDevice", "onCpu", "error") if key in told}


# --- words --------------------------------------------------------------------------------------------------


def words(inspection: Inspection) -> str:
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
    fallen = sum(len(entry["nodes"]) for entry in cuda["withoutKernel"])
    lines.append(f"  on CUDA  {fallen} of its {cuda['nodes']} nodes would be computed on the CPU:")
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
