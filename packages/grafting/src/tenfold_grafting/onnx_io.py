"""Networks as ONNX (section 11): written from a graph, so that any verifier can check ours, and read into one.

The input of the model is pixels; the normalisation is part of it. Writing and reading need the extra ``onnx``.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold_grafting.graph import Graph, UnsupportedOperationError, absorb_normalisation
from tenfold_grafting.operations import (
    Activation,
    Add,
    AvgPool,
    Conv,
    Input,
    Linear,
    Operation,
    Pad,
    Reshape,
    Scale,
)
from tenfold_shared.errors import UserError

OPSET = 17


def _onnx() -> Any:
    try:
        import onnx  # noqa: PLC0415 - part of the extra
    except ImportError as error:
        raise UserError("ONNX files need the package onnx: install tenfold-grafting[onnx]") from error
    return onnx


def write_onnx(graph: Graph, path: Path) -> None:
    """Write a network in its arithmetic, with a batch dimension that is free; a graft is a sum of two masked branches."""
    onnx = _onnx()
    writer = _Writer(onnx, graph.dtype)
    names = {0: "input"}
    if graph.prefix is not None:
        names[0] = writer.scale("normalise", "input", graph.prefix)
    for index, node in enumerate(graph.nodes):
        if not isinstance(node, Input):
            names[index] = writer.operation(f"node{index}", node, [names[i] for i in node.inputs])
    kind = onnx.TensorProto.DOUBLE if graph.dtype == torch.float64 else onnx.TensorProto.FLOAT
    inputs = onnx.helper.make_tensor_value_info("input", kind, ["batch", *graph.input_shape])
    outputs = onnx.helper.make_tensor_value_info(names[graph.output], kind, ["batch", graph.classes])
    body = onnx.helper.make_graph(writer.nodes, "network", [inputs], [outputs], writer.weights)
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


class _Writer:
    def __init__(self, onnx: Any, dtype: torch.dtype):
        self.onnx, self.dtype = onnx, dtype
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, name: str, values: Tensor | list[int]) -> str:
        array = np.asarray(values, np.int64) if isinstance(values, list) else values.detach().cpu().numpy()
        self.weights.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def call(self, kind: str, name: str, inputs: list[str], **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def scale(self, name: str, source: str, node: Scale) -> str:
        wide = (-1, *(1 for _ in node.shape[1:]))
        scaled = self.call("Mul", f"{name}_scaled", [source, self.weight(f"{name}_f", node.factor.reshape(wide))])
        return self.call("Add", name, [scaled, self.weight(f"{name}_s", node.shift.reshape(wide))])

    def operation(self, name: str, node: Operation, sources: list[str]) -> str:
        if isinstance(node, Add):
            return self.call("Add", name, sources)
        (source,) = sources
        if isinstance(node, Linear):
            inputs = [source, self.weight(f"{name}_w", node.weight), self.weight(f"{name}_b", node.bias)]
            return self.call("Gemm", name, inputs, transB=1)
        if isinstance(node, Conv):
            inputs = [source, self.weight(f"{name}_w", node.weight), self.weight(f"{name}_b", node.bias)]
            return self.call(
                "Conv",
                name,
                inputs,
                strides=node.stride,
                pads=[*node.padding, *node.padding],
                dilations=node.dilation,
                group=node.groups,
            )
        if isinstance(node, Scale):
            return self.scale(name, source, node)
        if isinstance(node, Pad):
            left, right, top, bottom = node.sides
            return self.call("Pad", name, [source, self.weight(f"{name}_p", [0, 0, top, left, 0, 0, bottom, right])])
        if isinstance(node, AvgPool):
            return self.call("AveragePool", name, [source], kernel_shape=node.kernel, strides=node.stride)
        if isinstance(node, Reshape):
            if len(node.shape) == 1:
                return self.call("Flatten", name, [source], axis=1)
            return self.call("Reshape", name, [source, self.weight(f"{name}_shape", [-1, *node.shape])])
        assert isinstance(node, Activation)
        relu = self.call("Relu", name if node.mask is None else f"{name}_relu", [source])
        if node.mask is None or node.slope is None or node.intercept is None:
            return relu
        mask = (node.mask != 0).to(self.dtype)
        kept = self.call("Mul", f"{name}_kept", [relu, self.weight(f"{name}_keep", 1 - mask)])
        slope = self.weight(f"{name}_slope", torch.where(mask > 0, node.slope, 0.0))
        line = self.call("Mul", f"{name}_line", [source, slope])
        shift = self.weight(f"{name}_shift", torch.where(mask > 0, node.intercept, 0.0))
        return self.call("Add", name, [self.call("Add", f"{name}_sum", [kept, line]), shift])


def read_onnx(path: Path) -> Graph:
    """The graph of an ONNX network of pixels made of Conv, Gemm, MatMul, BatchNormalization, AveragePool, Pad, Flatten,
    Reshape, Add, Sub, Mul, Div and Relu.

    Raises:
        UserError: not an ONNX file, or onnx is not installed.
        UnsupportedOperationError: naming the operation and its node.

    """
    onnx = _onnx()
    if not path.is_file():
        raise UserError(f"no ONNX model at {path}: check the path")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise types of their own
        raise UserError(f"{path} is no valid ONNX model ({' '.join(str(error).split())[:160]})") from error
    return _Reader(onnx, model).graph()


class _Reader:
    """Builds operations from the nodes of an ONNX graph, which are in topological order."""

    def __init__(self, onnx: Any, model: Any):
        self.onnx, self.body = onnx, model.graph
        self.constants = {w.name: torch.from_numpy(onnx.numpy_helper.to_array(w).copy()) for w in self.body.initializer}
        inputs = [value for value in self.body.input if value.name not in self.constants]
        if len(inputs) != 1 or len(self.body.output) != 1:
            raise UnsupportedOperationError("the ONNX model has more than one input or output")
        shape = tuple(d.dim_value for d in inputs[0].type.tensor_type.shape.dim[1:])
        if not shape or min(shape) < 1:
            raise UserError(
                f"the ONNX model's input has the shape {shape}: its sizes must be fixed, apart from the batch"
            )
        self.nodes: list[Operation] = [Input("input", (), shape)]
        self.index = {inputs[0].name: 0}

    def graph(self) -> Graph:
        for node in self.body.node:
            attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
            try:
                self._visit(node, attributes)
            except (IndexError, KeyError, RuntimeError) as error:  # an operand that is missing, or of an odd shape
                raise self._refuse(node, " with operands that do not fit") from error
        last = self.index[self.body.output[0].name]
        graph = Graph(self.nodes[: last + 1], self.nodes[0].shape)
        if not any(node.tensors() for node in graph.nodes):
            raise UserError("the ONNX model has no weights")
        for operation in graph.nodes:
            if not all(bool(torch.isfinite(t).all()) for t in operation.tensors() if t.is_floating_point()):
                raise UserError(f"the weights of {operation.name} are not finite")
        if len(graph.nodes[-1].shape) != 1:
            raise UserError(
                f"the ONNX model gives {graph.nodes[-1].shape} numbers an input, expected a vector of logits"
            )
        return absorb_normalisation(graph)

    def _append(self, output: str, operation: Operation) -> None:
        if not isinstance(operation, Add | Activation):
            probe = next((t for n in [operation, *self.nodes] for t in n.tensors()), torch.zeros(()))
            zero = torch.zeros(1, *self.nodes[operation.inputs[0]].shape, dtype=probe.dtype)
            operation.shape = tuple(operation.forward(zero).shape[1:])  # type: ignore[attr-defined]
        self.nodes.append(operation)
        self.index[output] = len(self.nodes) - 1

    def _refuse(self, node: Any, why: str = "") -> UnsupportedOperationError:
        return UnsupportedOperationError(
            f"{node.name or node.output[0]} is {node.op_type}{why}: no bounds are known for it"
        )

    def _visit(self, node: Any, attributes: dict[str, Any]) -> None:
        name, output = node.name or node.output[0], node.output[0]
        kind = node.op_type
        if kind == "Constant":
            self.constants[output] = torch.from_numpy(self.onnx.numpy_helper.to_array(attributes["value"]).copy())
            return
        if kind == "Identity" and node.input[0] in self.constants:
            self.constants[output] = self.constants[node.input[0]]
            return
        if kind in ("Identity", "Dropout"):
            self.index[output] = self.index[node.input[0]]
            return
        known = [i for i in node.input if i in self.index]
        if not known:
            raise self._refuse(node, " of constants")
        if len(known) > 1 and kind != "Add":
            raise self._refuse(node, " of several inputs")
        source = self.index[known[0]]
        shape = self.nodes[source].shape
        other = [self.constants[i] for i in node.input if i in self.constants]
        place = (source,)
        if kind == "Relu":
            self._append(output, Activation(name, place, shape))
        elif kind == "Add" and len(known) == 2:
            if self.nodes[self.index[known[1]]].shape != shape:
                raise self._refuse(node, " of two shapes")
            self._append(output, Add(name, (source, self.index[known[1]]), shape))
        elif kind in ("Add", "Mul") or (kind in ("Sub", "Div") and node.input[0] == known[0]):
            self._append(output, self._scale(node, name, place, shape, other[0]))
        elif kind == "Flatten" and attributes.get("axis", 1) == 1:
            self._append(output, Reshape(name, place, (torch.Size(shape).numel(),), shape))
        elif kind == "Reshape":
            wanted = torch.zeros(1, *shape, device="meta").reshape(1, *other[0].tolist()[1:]).shape[1:]
            self._append(output, Reshape(name, place, tuple(wanted), shape))
        elif (
            kind in ("Gemm", "MatMul")
            and len(shape) == 1
            and node.input[0] == known[0]
            and not attributes.get("transA")
        ):
            transposed = bool(attributes.get("transB", 0))
            weight = other[0] if transposed else other[0].T.contiguous()
            weight = weight * attributes.get("alpha", 1.0)
            bias = other[1] * attributes.get("beta", 1.0) if len(other) > 1 else weight.new_zeros(len(weight))
            self._append(
                output, Linear(name, place, (), shape, weight, bias.reshape(-1).expand(len(weight)).contiguous())
            )
        elif kind == "Conv":
            self._convolution(node, name, place, shape, other, attributes)
        elif kind == "BatchNormalization":
            gain, shift, mean, variance = other
            factor = gain / (variance + attributes.get("epsilon", 1e-5)).sqrt()
            self._append(output, Scale(name, place, shape, shape, factor, shift - mean * factor))
        elif kind == "AveragePool" and not _unusual_pool(attributes):
            kernel = tuple(attributes["kernel_shape"])
            self._append(output, AvgPool(name, place, (), shape, kernel, tuple(attributes.get("strides", (1, 1)))))
        elif kind == "GlobalAveragePool":
            self._append(output, AvgPool(name, place, (), shape, (shape[1], shape[2]), (1, 1)))
        elif kind == "Pad" and other and attributes.get("mode", b"constant") == b"constant":
            pads = other[0].tolist()
            if (
                len(pads) != 8
                or any(pads[i] for i in (0, 1, 4, 5))
                or min(pads) < 0
                or bool(other[1:] and other[1].any())
            ):
                raise self._refuse(node, " by other than zeros around a map")
            self._append(output, Pad(name, place, (), shape, (pads[3], pads[7], pads[2], pads[6])))
        else:
            raise self._refuse(node)

    def _scale(self, node: Any, name: str, place: tuple[int], shape: tuple[int, ...], constant: Tensor) -> Operation:
        values = constant.flatten()
        channelwise = constant.numel() in (1, shape[0]) and (
            constant.dim() <= 1
            if len(shape) == 1
            else max(constant.shape[-2:], default=1) == 1 or constant.numel() == 1
        )
        if not channelwise and node.op_type in ("Mul", "Add", "Sub"):
            return self._neuronwise(node, name, place, shape, constant)
        if not channelwise:
            raise self._refuse(node, " with a constant for every position")
        values = values.expand(shape[0]).contiguous()
        one, zero = torch.ones_like(values), torch.zeros_like(values)
        factor, shift = {
            "Add": (one, values),
            "Sub": (one, -values),
            "Mul": (values, zero),
            "Div": (one / values, zero),
        }[node.op_type]
        return Scale(name, place, shape, shape, factor, shift)

    def _neuronwise(
        self, node: Any, name: str, place: tuple[int], shape: tuple[int, ...], constant: Tensor
    ) -> Operation:
        """A factor or shift for every neuron: a line on all of them, which a fully grafted activation is."""
        values = constant.reshape(-1).expand(torch.Size(shape).numel()).reshape(shape).contiguous()
        one, zero = torch.ones_like(values), torch.zeros_like(values)
        slope, shift = {"Mul": (values, zero), "Add": (one, values), "Sub": (one, -values)}[node.op_type]
        return Activation(name, place, shape, one, slope, shift)

    def _convolution(
        self, node: Any, name: str, place: tuple[int], shape: tuple[int, ...], other: list[Tensor], attributes: dict
    ) -> None:
        pads = tuple(attributes.get("pads", (0, 0, 0, 0)))
        if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b""):
            raise self._refuse(node, " with auto_pad")
        if len(pads) != 4:
            raise self._refuse(node, f" over {len(pads) // 2} dimensions")
        if pads[:2] != pads[2:]:
            sides = (pads[1], pads[3], pads[0], pads[2])
            self._append(f"{name} padding", Pad(f"{name} padding", place, (), shape, sides))
            place, shape, pads = (len(self.nodes) - 1,), self.nodes[-1].shape, (0, 0, 0, 0)
        bias = other[1] if len(other) > 1 else other[0].new_zeros(len(other[0]))
        options = [tuple(attributes.get(key, (1, 1))) for key in ("strides", "dilations")]
        self._append(
            node.output[0],
            Conv(name, place, (), shape, other[0], bias, options[0], pads[:2], options[1], attributes.get("group", 1)),
        )


def _unusual_pool(attributes: dict[str, Any]) -> bool:
    """Whether an average pool is more than windows side by side or with a stride."""
    spread = any(d != 1 for d in attributes.get("dilations", [1]))
    named = attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID", b"")
    return spread or named or any(attributes.get("pads", [0])) or bool(attributes.get("ceil_mode", 0))
