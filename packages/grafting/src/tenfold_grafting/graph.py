"""The computation graph of a network (section 2.6), read off any `nn.Module` made of supported parts with torch.fx.

Nodes are in topological order; node 0 is the input. Batch norms are folded into the layer before them where that layer
has no other reader; a normalisation that comes first is applied to the box instead.
"""

import copy
import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tenfold_grafting.grafting import GraftedReLU
from tenfold_grafting.operations import (
    Activation,
    Add,
    Affine,
    AvgPool,
    Conv,
    Input,
    Linear,
    Operation,
    Pad,
    Reshape,
    Scale,
    Shape,
    pair,
)
from tenfold_shared.errors import UserError


class UnsupportedOperationError(UserError):
    """The network has an operation for which no bounds are known."""


class Normalise(nn.Module):
    """(x - mean) / std by channel, the first layer of a trained network; its numbers are no part of the weights.

    Raises:
        UserError: a standard deviation that is not positive.

    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise UserError(
                f"a normalisation needs as many means as positive standard deviations, got {mean} and {std}"
            )
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised images [batch, channels, ...]."""
        wide = (-1, *(1 for _ in x.shape[2:]))
        return (x - self.mean.to(x.dtype).reshape(wide)) / self.std.to(x.dtype).reshape(wide)


@dataclasses.dataclass
class Graph:
    """A network in evaluation: operations in topological order, and the normalisation that precedes them."""

    nodes: list[Operation]
    input_shape: Shape
    prefix: Scale | None = None

    @property
    def output(self) -> int:
        """The last node."""
        return len(self.nodes) - 1

    @property
    def input_size(self) -> int:
        """How many numbers an input has."""
        return torch.Size(self.input_shape).numel()

    @property
    def classes(self) -> int:
        """How many numbers the network gives."""
        return self.nodes[-1].shape[0]

    @property
    def activations(self) -> list[int]:
        """The activations, in topological order."""
        return [i for i, node in enumerate(self.nodes) if isinstance(node, Activation)]

    @property
    def neurons(self) -> int:
        """All activation neurons, grafted ones included."""
        return sum(int(torch.Size(self.nodes[i].shape).numel()) for i in self.activations)

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic of the weights."""
        return next(t.dtype for node in self.nodes for t in node.tensors())

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(t.device for node in self.nodes for t in node.tensors())

    def activation(self, index: int) -> Activation:
        """The activation at a node."""
        node = self.nodes[index]
        assert isinstance(node, Activation)
        return node

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Graph":
        """The graph in another arithmetic or place; this very one if that is how it is."""
        device = device or self.device
        if (dtype, device) == (self.dtype, self.device):
            return self
        prefix = None if self.prefix is None else self.prefix.to(dtype, device)
        assert prefix is None or isinstance(prefix, Scale)
        return dataclasses.replace(self, nodes=[node.to(dtype, device) for node in self.nodes], prefix=prefix)

    @functools.cached_property
    def single(self) -> "Graph":
        """The graph in single precision."""
        return self.to(torch.float32)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels [batch, *input_shape] as the first node sees them."""
        pixels = pixels.to(self.device, self.dtype)
        return pixels if self.prefix is None else self.prefix.forward(pixels)

    def values(self, x: Float[Tensor, "batch *input"]) -> list[Tensor]:
        """The value of every node on inputs that are normalised already."""
        values: list[Tensor] = []
        for node in self.nodes:
            if isinstance(node, Input):
                values.append(x)
            elif isinstance(node, Add):
                values.append(values[node.inputs[0]] + values[node.inputs[1]])
            else:
                assert isinstance(node, Affine | Activation)
                values.append(node.forward(values[node.inputs[0]]))
        return values

    def __call__(self, pixels: Float[Tensor, "batch *input"]) -> Float[Tensor, "batch classes"]:
        """The network's output on pixels."""
        return self.values(self.normalised(pixels))[-1]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, GraftedReLU | Normalise) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, input_shape: Sequence[int], *, live: bool = False) -> Graph:
    """The graph of a model in its own arithmetic.

    Args:
        model: made of convolutions, linear layers, batch norms, average pools, zero pads, flattening, sums, ReLUs,
            grafted activations and `Normalise`; evaluated in evaluation mode.
        input_shape: of one input, without the batch.
        live: keep the model's own parameters, for losses that are differentiated; otherwise they are copied.

    Raises:
        UnsupportedOperationError: naming the operation and its place in the graph.
        UserError: weights that are not finite, or a shape that does not fit.

    """
    if not live:
        model = copy.deepcopy(model).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"the weights {name} are not finite: nothing can be verified about such a network")
    try:
        traced = _Tracer().trace(model)
    except Exception as error:  # torch.fx raises a different type for every kind of control flow
        raise UnsupportedOperationError(f"the network's forward cannot be traced by torch.fx: {error}") from error
    builder = _Builder(model, tuple(input_shape))
    for node in traced.nodes:
        builder.visit(node)
    if not any(operation.tensors() for operation in builder.nodes):
        raise UserError("the network has no weights")
    graph = absorb_normalisation(builder.graph())
    if len(graph.nodes[-1].shape) != 1:
        raise UserError(f"the network gives {graph.nodes[-1].shape} numbers an input, expected a vector of logits")
    return graph


class _Builder:
    """Turns the nodes of a torch.fx graph into operations."""

    def __init__(self, model: nn.Module, input_shape: Shape):
        self.model, self.input_shape = model, input_shape
        self.nodes: list[Operation] = []
        self.index: dict[fx.Node, int] = {}
        self.sizes: set[fx.Node] = set()
        self.modules = dict(model.named_modules())
        self.last = 0

    def graph(self) -> Graph:
        return Graph(self.nodes[: self.last + 1], self.input_shape)

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if self.nodes:
                raise UnsupportedOperationError(f"{node.name}: the network takes more than one input")
            self.nodes.append(Input("input", (), self.input_shape))
            self.index[node] = 0
        elif node.op == "output":
            (result,) = node.args
            if not isinstance(result, fx.Node):
                raise UnsupportedOperationError("output: the network gives more than one tensor")
            self.last = self.index[result]
        elif node.op == "call_module":
            self._module(node, self.modules[str(node.target)], str(node.target))
        elif node.op in ("call_function", "call_method"):
            self._function(node)
        else:
            self._refuse(node, f"reads {node.target}")

    def _refuse(self, node: fx.Node, what: str) -> None:
        before = ", ".join(str(argument) for argument in node.args if isinstance(argument, fx.Node))
        place = f"after {before}" if before else "at the input"
        raise UnsupportedOperationError(f"{node.name} ({place}) {what}: no bounds are known for it")

    def _source(self, node: fx.Node, position: int = 0) -> int:
        argument = node.args[position]
        if not isinstance(argument, fx.Node):
            self._refuse(node, f"has {argument!r} for an operand")
        assert isinstance(argument, fx.Node)
        if argument not in self.index:
            self._refuse(node, "computes with the size of its input")
        return self.index[argument]

    def _same(self, node: fx.Node) -> None:
        """A node that is its first operand."""
        self.index[node] = self._source(node)

    def _refuse_overwritten(self, node: fx.Node, in_place: bool) -> None:
        """An operation in place changes what later readers of its operand get, which the graph does not show."""
        if not in_place:
            return
        source = self._source(node)
        aliases = {n for n, i in self.index.items() if i == source}
        while isinstance(self.nodes[source], Reshape):  # views of the same memory
            source = self.nodes[source].inputs[0]
            aliases |= {n for n, i in self.index.items() if i == source}
        if any(reader > node for alias in aliases for reader in alias.users):
            self._refuse(node, "overwrites, in place, what is read again later")

    def _append(self, node: fx.Node, operation: Operation) -> None:
        self.nodes.append(operation)
        self.index[node] = len(self.nodes) - 1

    def _affine(self, node: fx.Node, kind: type[Affine], name: str, **options: Any) -> None:
        """Append an affine operation, whose output shape is found by applying it to zeros."""
        source = self._source(node)
        shape = self.nodes[source].shape
        sample = next((t for t in options.values() if isinstance(t, Tensor)), torch.zeros(()))
        operation = kind(name, (source,), options.pop("shape", shape), shape, **options)
        try:
            operation.shape = tuple(operation.forward(sample.new_zeros(1, *shape)).shape[1:])
        except RuntimeError as error:
            raise UserError(f"{name} does not take inputs of shape {shape}: {error}") from error
        self._append(node, operation)

    def _module(self, node: fx.Node, module: nn.Module, name: str) -> None:
        if isinstance(module, nn.Conv2d):
            self._convolution(node, module, name)
        elif isinstance(module, nn.Linear):
            if len(self.nodes[self._source(node)].shape) != 1:
                self._refuse(node, f"is a linear layer on inputs that are no vectors, layer {name!r}")
            own = dict(module.named_parameters(recurse=False))
            bias = own.get("bias", module.weight.new_zeros(module.out_features))
            self._affine(node, Linear, name, weight=module.weight, bias=bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            self._batch_norm(node, module, name)
        elif isinstance(module, Normalise):
            factor = 1 / module.std
            weight = next(self.model.parameters(), factor).detach()
            factor, shift = factor.to(weight), (-module.mean * factor).to(weight)
            self._affine(node, Scale, name, factor=factor, shift=shift)
        elif isinstance(module, nn.AvgPool2d):
            options = {option: getattr(module, option) for option in _POOL}
            self._pool(node, name, **options)
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            self._pool(node, name, self.nodes[self._source(node)].shape[1:])
        elif isinstance(module, nn.ZeroPad2d):
            self._pad(node, name, module.padding)
        elif isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
            self._reshape(node, name)
        elif isinstance(module, nn.ReLU):
            self._refuse_overwritten(node, module.inplace)
            self._activation(node, name)
        elif isinstance(module, GraftedReLU):
            tensors = {"mask": module.mask, "slope": module.slope, "intercept": module.bias}
            self._activation(node, name, **tensors)
        elif isinstance(module, nn.Identity | nn.Dropout | nn.Dropout2d):
            self._same(node)
        else:
            self._refuse(node, f"is {type(module).__name__}, layer {name!r}")

    def _function(self, node: fx.Node) -> None:
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        if node.target in (operator.add, operator.iadd, torch.add) or target in ("add", "add_"):
            if len(node.args) != 2 or node.kwargs:
                self._refuse(node, "is a sum of other than two tensors")
            first, second = self._source(node), self._source(node, 1)
            if self.nodes[first].shape != self.nodes[second].shape:
                self._refuse(node, f"adds shapes {self.nodes[first].shape} and {self.nodes[second].shape}")
            self._refuse_overwritten(node, target in ("iadd", "add_"))
            self._append(node, Add(node.name, (first, second), self.nodes[first].shape))
        elif node.target in (F.relu, torch.relu) or target in ("relu", "relu_"):
            self._refuse_overwritten(node, target == "relu_" or True in (*node.args[1:], node.kwargs.get("inplace")))
            self._activation(node, node.name)
        elif target == "flatten" and _options(node, {"start_dim": 0, "end_dim": -1}) == {"start_dim": 1, "end_dim": -1}:
            self._reshape(node, node.name)
        elif target in ("view", "reshape") and len(node.args) > 1:
            sizes = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
            source = self.nodes[self._source(node)].shape
            wanted = tuple(sizes[1:])
            if not all(isinstance(size, int) for size in wanted):
                self._refuse(node, "takes its shape from the data")
            try:
                shape = torch.zeros(1, *source, device="meta").reshape(1, *wanted).shape[1:]
            except RuntimeError:
                self._refuse(node, f"gives an input of shape {source} the shape {wanted}")
            self._affine(node, Reshape, node.name, shape=tuple(shape))
        elif target == "avg_pool2d":
            self._pool(node, node.name, **_options(node, _POOL))
        elif target == "size" or (target == "getattr" and node.args[1:] == ("shape",)):
            self.sizes.add(node)  # the batch's, for a reshape
        elif target == "getitem" and node.args[0] in self.sizes:
            self.sizes.add(node)
        elif target == "pad":
            options = _options(node, {"pad": (), "mode": "constant", "value": None})
            if options["mode"] != "constant" or options["value"] not in (None, 0):
                self._refuse(node, f"pads with {options['mode']} {options['value']}")
            self._pad(node, node.name, options["pad"])
        else:
            self._refuse(node, f"calls {target}")

    def _convolution(self, node: fx.Node, module: nn.Conv2d, name: str) -> None:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            self._refuse(node, f"pads with {module.padding_mode} ({module.padding}), layer {name!r}")
        bias = module.weight.new_zeros(module.out_channels) if module.bias is None else module.bias
        self._affine(
            node,
            Conv,
            name,
            weight=module.weight,
            bias=bias,
            stride=pair(module.stride),
            padding=pair(module.padding),  # type: ignore[arg-type]
            dilation=pair(module.dilation),
            groups=module.groups,
        )

    def _batch_norm(self, node: fx.Node, module: nn.BatchNorm1d | nn.BatchNorm2d, name: str) -> None:
        """Gamma (x - mu) / sqrt(v + eps) + beta, folded into the layer before it if nobody else reads that."""
        if module.running_mean is None or module.running_var is None:
            self._refuse(node, f"has no running statistics, layer {name!r}")
        assert module.running_mean is not None
        assert module.running_var is not None
        weight = module.weight if module.affine else torch.ones_like(module.running_var)
        bias = module.bias if module.affine else torch.zeros_like(module.running_var)
        factor = weight / (module.running_var + module.eps).sqrt()
        shift = bias - module.running_mean * factor
        source = self._source(node)
        before = self.nodes[source]
        aliases = {n for n, i in self.index.items() if i == source}
        if isinstance(before, Conv | Linear) and {u for n in aliases for u in n.users} - aliases == {node}:
            before.weight = before.weight * factor.reshape(-1, *(1 for _ in before.weight.shape[1:]))
            before.bias = before.bias * factor + shift
            self.index[node] = source
        else:
            self._affine(node, Scale, name, factor=factor, shift=shift)

    def _pool(
        self,
        node: fx.Node,
        name: str,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,  # of no consequence without padding
        divisor_override: int | None = None,
    ) -> None:
        if pair(padding) != (0, 0) or ceil_mode or divisor_override:
            self._refuse(node, "is an average pool with padding, ceil_mode or divisor_override")
        stride = kernel_size if stride is None else stride
        self._affine(node, AvgPool, name, kernel=pair(kernel_size), stride=pair(stride))

    def _pad(self, node: fx.Node, name: str, sides: Any) -> None:
        """Zeros around a map; a negative side would cut the map."""
        if len(sides) != 4 or min(sides) < 0 or len(self.nodes[self._source(node)].shape) != 3:
            self._refuse(node, f"pads by {tuple(sides)}, not left, right, top and bottom of a map")
        self._affine(node, Pad, name, sides=tuple(sides))

    def _reshape(self, node: fx.Node, name: str) -> None:
        shape = self.nodes[self._source(node)].shape
        self._affine(node, Reshape, name, shape=(torch.Size(shape).numel(),))

    def _activation(self, node: fx.Node, name: str, **tensors: Tensor) -> None:
        source = self._source(node)
        shape = self.nodes[source].shape
        for what, tensor in tensors.items():
            if tuple(tensor.shape) != shape:
                raise UserError(f"the {what} of {name} has shape {tuple(tensor.shape)}, its neurons {shape}")
        self._append(node, Activation(name, (source,), shape, **tensors))


_POOL = {
    "kernel_size": None,
    "stride": None,
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}


def _options(node: fx.Node, defaults: dict[str, Any]) -> dict[str, Any]:
    """The operands after the first, by name, given by place or by keyword."""
    return {**defaults, **dict(zip(defaults, node.args[1:], strict=False)), **node.kwargs}


def absorb_normalisation(graph: Graph) -> Graph:
    """The graph without a positive scale that is the input's only reader: the box takes it."""
    readers = [i for i, node in enumerate(graph.nodes) if 0 in node.inputs]
    if readers != [1] or not isinstance(first := graph.nodes[1], Scale) or not bool((first.factor > 0).all()):
        return graph
    nodes = [graph.nodes[0]]
    for node in graph.nodes[2:]:
        nodes.append(dataclasses.replace(node, inputs=tuple(i - 1 for i in node.inputs)))
    return dataclasses.replace(graph, nodes=nodes, prefix=first)
