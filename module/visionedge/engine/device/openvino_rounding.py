"""What is changed in a graph before OpenVINO computes it in bf16 or fp16, so that rounding costs less.

bf16 has 8 significant bits. OpenVINO's CPU plugin (2026.4) computes layers (convolutions, products of
matrices) in it, and everything between them; what follows the last layer before an output stays in fp32.
Three places need more:

- the expectation over the bins of a box: it is computed by a product of matrices, which counts as a layer;
- positions at which deformable attention samples features, and the boxes of an earlier stage that they come
  from: between layers, their steps would be 1.6 px in a picture of 416 px;
- a constant that attention adds to all keys alike: it cancels out, but while it is there the keys and their
  products lose the digits in which they differ.

The last two halve the shift of DEIMv2-femto's boxes: 0.39 px before, 0.19 px after (median, coco128).

The attribute that forbids a conversion (`DisablePrecisionConversion`) does not help: it can be set only in an
IR file, and the plugin loses it where it turns a MatMul into a layer of its own.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionedge.engine.device.devices import EffectiveDevice
from visionedge.runtime.ov import import_openvino

_MAX_EXPECTATION_NUMBERS = 64
"""A layer with fewer weights is no part of a network: it is the expectation over the bins of a box."""

_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze")


def reduce_rounding(model: Any, device: EffectiveDevice) -> None:
    """Change a graph of fixed shapes, in place; its first outputs stay as they are."""
    keep_decoding_in_fp32(model)
    drop_key_offsets(model)
    if device == "cpu":
        keep_positions_in_fp32(model)


# --- positions of deformable attention ----------------------------------------------------------------------


def keep_positions_in_fp32(model: Any) -> int:
    """Make the positions that GridSample takes outputs of the graph, behind its own; how many there are."""
    found: list[Any] = []
    for operator in _find_operators(model, "GridSample"):
        positions = operator.input_value(1)
        if positions not in found and positions.get_node().get_type_name() not in ("Constant", "Parameter"):
            found.append(positions)
    if found:
        model.add_outputs(found)
    return len(found)


# --- keys of attention --------------------------------------------------------------------------------------
#
# Softmax(Q (K + b)T) = Softmax(Q KT) where b is the same for all keys: Q bT adds one number to a whole row.
# The loss of training does not depend on b, so b can be anything: up to 200 in DEIMv2's last layer.


def drop_key_offsets(model: Any) -> int:
    """Remove constants that are added to all keys of an attention alike, in place; how many there were."""
    done = 0
    for softmax in _find_operators(model, "Softmax"):
        found = _find_key_offset(softmax)
        if found is not None:
            total, keys = found
            for consumer in list(total.get_target_inputs()):
                consumer.replace_source_output(keys)
            done += 1
    if done:
        model.validate_nodes_and_infer_types()
    return done


def _find_key_offset(softmax: Any) -> tuple[Any, Any] | None:
    """(keys with the constant, keys without it) of a Softmax over the products of queries and keys."""
    likeness = _skip_factors(softmax.input_value(0))
    product, last = likeness.get_node(), likeness.get_partial_shape().rank.get_length() - 1
    if product.get_type_name() != "MatMul" or not _has_one_reader(likeness):
        return None
    if softmax.get_attributes()["axis"] not in (-1, last):
        return None
    total, path = _skip_factors(product.input_value(1)), []
    while total.get_node().get_type_name() in ("Transpose", *_RESHAPES) and _has_one_reader(total):
        path.append(total.get_node())
        total = _skip_factors(path[-1].input_value(0))
    if total.get_node().get_type_name() != "Add" or not _has_one_reader(total):
        return None
    terms = [total.get_node().input_value(port) for port in (0, 1)]
    keys, offset = terms if _read_constant(terms[1]) is not None else reversed(terms)
    numbers, shape = _read_constant(offset), total.get_partial_shape()
    if numbers is None or shape.is_dynamic or keys.get_partial_shape() != shape:
        return None
    moved = _follow(np.broadcast_to(numbers, tuple(shape.to_shape())), path)
    axis = -2 if product.get_attributes()["transpose_b"] else -1
    return None if moved is None or np.ptp(moved, axis=axis).any() else (total, keys)


def _skip_factors(value: Any) -> Any:
    """What is multiplied with or divided by single numbers to give a value."""
    while value.get_node().get_type_name() in ("Multiply", "Divide") and _has_one_reader(value):
        factors = [value.get_node().input_value(port) for port in (0, 1)]
        plain = [factor for factor in factors if not _is_single_number(factor)]
        if len(plain) != 1:
            break
        value = plain[0]
    return value


def _follow(numbers: NDArray[Any], path: Sequence[Any]) -> NDArray[Any] | None:
    """Numbers after Transpose and Reshape nodes, the last one first; None where a shape is open."""
    for operator in reversed(path):
        shape = operator.get_output_partial_shape(0)
        if operator.get_type_name() == "Transpose":
            order = _read_constant(operator.input_value(1))
            if order is None:
                return None
            numbers = numbers.transpose(order)
        elif shape.is_static:
            numbers = numbers.reshape(tuple(shape.to_shape()))
        else:
            return None
    return numbers


def _has_one_reader(value: Any) -> bool:
    """Whether one operator takes the numbers of a value; others may ask for its shape."""
    readers = [target.get_node().get_type_name() for target in value.get_target_inputs()]
    return len(readers) - readers.count("ShapeOf") == 1


def _is_single_number(value: Any) -> bool:
    numbers = _read_constant(value)
    return numbers is not None and numbers.size == 1


def _read_constant(value: Any) -> NDArray[Any] | None:
    node = value.get_node()
    return np.array(node.get_data()) if node.get_type_name() == "Constant" else None


def _find_operators(model: Any, kind: str) -> Iterator[Any]:
    return (operator for operator in model.get_ordered_ops() if operator.get_type_name() == kind)


# --- expectations over bins ---------------------------------------------------------------------------------
#
# Boxes with bins (GFL: NanoDet, PicoDet, YOLOv8, D-FINE) end with a MatMul or a convolution over a handful of
# numbers; so the Softmax before it was rounded, which moved PicoDet's boxes by a further 0.07 px (median) on
# 32 pictures. A product and a sum compute the same, and are no layer.


def keep_decoding_in_fp32(model: Any) -> int:
    """Write each expectation over bins as a product and a sum, in place; how many there were."""
    openvino = import_openvino()
    done = 0
    for operator in model.get_ordered_ops():
        found = _read_expectation(operator)
        if found is None:
            continue
        weights, axis, keep = found
        ops = openvino.opset13
        product = ops.multiply(operator.input_value(0), ops.constant(weights))
        total = ops.reduce_sum(product, ops.constant(np.array([axis])), keep)
        for consumer in list(operator.output(0).get_target_inputs()):
            consumer.replace_source_output(total.output(0))
        done += 1
    if done:
        model.validate_nodes_and_infer_types()
    return done


def _read_expectation(operator: Any) -> tuple[NDArray[np.float32], int, bool] | None:
    """The weights, the axis and whether it is kept, if an operator weighs a handful of numbers."""
    kind = operator.get_type_name()
    if kind not in ("MatMul", "Convolution"):
        return None
    source = operator.input_value(1).get_node()
    if source.get_type_name() != "Constant":
        return None
    shape = tuple(source.get_output_shape(0))
    if not shape or math.prod(shape) > _MAX_EXPECTATION_NUMBERS:
        return None
    weights = np.array(source.get_data(), np.float32)
    if kind == "Convolution":
        # [1, bins, 1, 1], as YOLOv8's exports have it
        return (weights, 1, True) if shape[0] == 1 and math.prod(shape[2:]) == 1 else None
    attributes = operator.get_attributes()
    inputs = shape[-1] if len(shape) == 1 or attributes["transpose_b"] else shape[-2]
    if attributes["transpose_a"] or len(shape) > 2 or weights.size != inputs:
        return None
    return weights.reshape(-1), -1, weights.ndim > 1
