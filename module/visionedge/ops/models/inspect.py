"""`visionedge model inspect`: what a model is, why it is taken for that, and what will become of it where."""

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from visionedge.errors import ModelError
from visionedge.model.analysis.cuda_kernels import missing_kernel, opsets_of
from visionedge.model.analysis.shape_inference import infer
from visionedge.model.analysis.signature import Tensor, read_signature, sized
from visionedge.model.compiler.build import ready
from visionedge.model.compiler.stamp import imprint_of
from visionedge.model.exporter_files import read_export
from visionedge.model.heads import known_heads
from visionedge.model.interpretation import Preprocess
from visionedge.model.labels import labels_for
from visionedge.model.model import Model, load_model
from visionedge.model.onnx_file import ModelFile, blamed_on, read_model
from visionedge.model.sidecar import read_sidecar
from visionedge.ops.models.counting import amount, operators_of
from visionedge.runtime.child_process import start

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
    with start("visionedge.engine.device.placement", "placement", asked) as child:
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
