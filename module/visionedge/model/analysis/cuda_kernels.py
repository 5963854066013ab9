"""Which operators onnxruntime can compute on CUDA, known without a GPU: from its own list of kernels."""

import csv
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources

import onnx
from onnx import defs, helper

# Folded before the graph runs, so they need no kernel.
_FOLDED_OPERATORS = frozenset({"Constant"})

# Operators that had fewer types before a version: (that version, the types before it).
_TYPES_BEFORE_VERSION: Mapping[str, tuple[int, frozenset[str]]] = {
    "Clip": (12, frozenset({"float"})),
    **{
        operator: (14, frozenset({"bfloat16", "double", "float", "float16", "int32", "int64"}))
        for operator in ("Add", "Sub", "Mul", "Div")
    },
}

_VERSION_RANGE = re.compile(r"(\d+)\+|\[(\d+), (\d+)\]|(\d+)")


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """The ranges of operator versions of a kernel, and its types by constraint (see `_constraint_types`)."""

    versions: tuple[tuple[int, int], ...]
    types: Mapping[str, frozenset[str]]

    def supports(self, version: int) -> bool:
        """Whether this version of the operator is among them."""
        return any(low <= version <= high for low, high in self.versions)


@functools.cache
def load_cuda_kernels() -> Mapping[tuple[str, str], CudaKernel]:
    """All kernels by (domain, operator)."""
    text = (
        resources.files("visionedge.model.analysis").joinpath("cuda_kernels.tsv").read_text(encoding="utf-8")
    )
    rows = csv.reader((line for line in text.splitlines() if not line.startswith("#")), delimiter="\t")
    return {
        (domain, operator): CudaKernel(_parse_versions(ranges), _parse_types(types))
        for domain, operator, ranges, types in rows
    }


def _parse_versions(text: str) -> tuple[tuple[int, int], ...]:
    newest = 1 << 30
    return tuple(
        (int(m[1] or m[2] or m[4]), newest if m[1] else int(m[3] or m[4]))
        for m in _VERSION_RANGE.finditer(text)
    )


def _parse_types(text: str) -> dict[str, frozenset[str]]:
    named = [part.rpartition("=") for part in text.split(";") if part]
    return {name: frozenset(types.split(",")) for name, _, types in named}


def explain_missing_kernel(
    node: onnx.NodeProto, opsets: Mapping[str, int], types: Mapping[str, int]
) -> str | None:
    """Why a node would be computed on the CPU; None if CUDA has a kernel for it.

    `opsets` are the versions of the domains that the graph imports, `types` the element types of its tensors;
    a tensor of unknown type counts as supported.
    """
    domain = node.domain or "ai.onnx"
    if domain == "ai.onnx" and node.op_type in _FOLDED_OPERATORS:
        return None
    kernel = load_cuda_kernels().get((domain, node.op_type))
    schema = _schema(node, opsets)
    if kernel is None:
        # onnxruntime replaces such an operator by others if it has no kernel for it.
        return None if _has_function_body(schema) else "there is no CUDA kernel for it"
    if schema is None:
        return None
    version = schema.since_version
    if not kernel.supports(version):
        return f"there is no CUDA kernel for its version {version}"
    for constraint, name in _constraint_types(node, schema, types):
        allowed = kernel.types.get(constraint, frozenset())
        since, fewer = _TYPES_BEFORE_VERSION.get(node.op_type, (0, allowed))
        if allowed and name not in (allowed if version >= since else fewer):
            return f"its CUDA kernel does not take {name}"
    return None


def _has_function_body(schema: defs.OpSchema | None) -> bool:
    flags = ("has_function", "has_context_dependent_function")
    return any(getattr(schema, flag, False) for flag in flags)


def _schema(node: onnx.NodeProto, opsets: Mapping[str, int]) -> defs.OpSchema | None:
    domain = "" if node.domain in ("", "ai.onnx") else node.domain
    try:
        return defs.get_schema(node.op_type, opsets.get(domain, opsets.get("ai.onnx", 1)), domain)
    except defs.SchemaError:
        return None


def _constraint_types(
    node: onnx.NodeProto, schema: defs.OpSchema, types: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """(type constraint, type) of the tensors of a node whose types are known; the last parameter may repeat.

    The constraint of the first input is also yielded as "": the list of kernels can leave its name out.
    """
    first = schema.inputs[0].type_str if schema.inputs else ""
    for names, parameters in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            if name in types and parameters:
                parameter = parameters[min(index, len(parameters) - 1)]
                yield parameter.type_str, _type_name(types[name])
                if parameter.type_str == first:
                    yield "", _type_name(types[name])


def _type_name(code: int) -> str:
    try:
        name = helper.tensor_dtype_to_string(code).removeprefix("TensorProto.").lower()
    except KeyError:
        return f"type {code}"
    return str(name)


def read_opsets(model: onnx.ModelProto) -> dict[str, int]:
    """The version of each domain that a model imports; "" is ONNX itself."""
    return {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
