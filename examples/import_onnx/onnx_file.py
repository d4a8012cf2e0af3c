"""The layers of an ONNX file as a `state_dict`, for `jaxbn.torch.from_state_dict`.

The nodes of the graph tell which tensors belong to a layer. The tensors' names often do not.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]

# The inputs of a node after the first, by torch's names.
ENTRIES = {
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
    "Conv": ("weight", "bias"),
    "ConvTranspose": ("weight", "bias"),
    "Gemm": ("weight", "bias"),
    "MatMul": ("weight",),
}


class Layers(NamedTuple):
    """The layers of a graph, in the order of their calls."""

    state_dict: dict[str, Array]
    transposed: list[str]  # the names of transposed convolutions
    attributes: dict[str, dict[str, Any]]  # of each layer: strides, pads, group, epsilon, momentum


def layers(model: Any) -> Layers:
    """The layers of the kinds in `ENTRIES` in a model that `onnx.load` returns.

    A layer has its module's name in torch, if the file tells it, or the name of its node. A layer
    that is called several times is listed once. A product of two activations is no layer.
    """
    graph, found = model.graph, Layers({}, [], {})
    constants, seen = _constants(model), set()
    matrices = {name for name, array in constants.items() if array.ndim == 2}
    for node in graph.node:
        tensors = tuple(name for name in node.input[1:] if name)
        if node.op_type not in ENTRIES or tensors in seen:
            continue
        if node.op_type in ("Gemm", "MatMul") and tensors[0] not in matrices:
            continue
        if not constants.keys() >= {*tensors}:
            raise ValueError(
                f"The weights of the {node.op_type} {node.name!r} must not depend on inputs of the "
                f"graph; got {tensors}."
            )
        seen.add(tensors)
        values = dict(
            zip(ENTRIES[node.op_type], (constants[name] for name in tensors), strict=False)
        )
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Gemm":
            values = _of_gemm(values, **attributes)
        elif node.op_type == "MatMul":
            values = {"weight": values["weight"].T} | _bias_behind(node, graph, constants)
        name = _name(node, tensors[0])
        name = node.output[0] if name in found.attributes else name
        found.attributes[name] = attributes
        found.state_dict.update({f"{name}.{entry}": value for entry, value in values.items()})
        found.transposed.extend([name] if node.op_type == "ConvTranspose" else [])
    return found


def _constants(model: Any) -> dict[str, Array]:
    """The tensors that do not depend on an input, also transposed, renamed and dequantized ones."""
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    for node in model.graph.node:
        if not node.domain and arrays.keys() >= {*node.input}:
            feeds = {name: arrays[name] for name in node.input}
            values = ReferenceEvaluator(node, opsets=opsets).run(None, feeds)
            arrays |= dict(zip(node.output, values, strict=True))
    return arrays


def _of_gemm(
    values: Mapping[str, Array],
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> dict[str, Array]:
    """y = alpha·x·B + beta·C as y = x·weightᵀ + bias; with `transB`, B is the weight."""
    if transA:
        raise ValueError("A Gemm with transA=1 takes features first and is not a dense layer.")
    weight = values["weight"] if transB else values["weight"].T
    entries = {"weight": weight if alpha == 1 else (alpha * weight).astype(weight.dtype)}
    if "bias" in values:
        bias = values["bias"] if beta == 1 else (beta * values["bias"]).astype(weight.dtype)
        entries["bias"] = np.broadcast_to(bias.ravel(), weight.shape[:1])
    return entries


def _bias_behind(node: Any, graph: Any, constants: Mapping[str, Array]) -> dict[str, Array]:
    """The vector that the only node behind a product adds."""
    behind = [other for other in graph.node if node.output[0] in other.input]
    if len(behind) == 1 and behind[0].op_type == "Add":
        for name in behind[0].input:
            if name in constants and constants[name].ndim == 1:
                return {"bias": constants[name]}
    return {}


def _name(node: Any, weight: str) -> str:
    """`layer1.0.conv1`, from tensor layer1.0.conv1.weight or node /layer1/layer1.0/conv1/Conv."""
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    if not node.name.startswith("/"):
        return str(node.name or node.output[0])
    name = before = ""
    for scope in node.name.split("/")[1:-1]:
        # torch repeats the name of a list or Sequential before that of its element.
        inner = scope[len(before) :] if before and scope.startswith(before + ".") else "." + scope
        name, before = name + inner, scope
    return name.removeprefix(".") or str(node.output[0])
