"""Physical removal of pruned filters and channels: a smaller dense network with the masked one's outputs.

The network is traced with torch.fx and read in evaluation mode, channel by channel:

1. Forward: which channels are *constant*, i.e. the same number at every position for every input? A filter without
   weights emits its bias; batch normalisation and activations map constants to constants. So a zeroed filter is in
   general a constant after BN and ReLU, not zero, and may not simply be dropped.
2. Backward: which channels does anybody *read*? A convolution does not read an input channel of zero weights.
3. A channel is kept if it varies and is read. Convolutions and linear layers are sliced to what is kept.

Constants that a removed channel carried are kept exactly. A linear layer, or a convolution without zero padding, takes
them into its bias. Under zero padding a constant differs between border and interior, which no bias can express; there
the map that all constants together give is added to the convolution's (`ConstantMap`). A channel kept for them instead
would leave one more than a round number, and kernels work in blocks of 8 or 16 channels. Where shapes must agree (residual additions), the kept channels are scattered into the wider stream and its
constants filled in. Where a layer reads few channels of a wide stream, they are gathered first.
"""

import copy
import math
import operator
from typing import Any

import jaxtyping
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn import functional as F

from tenfold_bip.masking import MaskedWeight, bake_masks
from tenfold_bip.projections import CONVOLUTIONS
from tenfold_shared.errors import UserError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus),
    *(nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
ADAPTIVE_POOLS = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),  # padded with minus infinity, so constants stay
)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
FLATTENINGS = ("flatten", "view", "reshape")
ADDITIONS = ("add", "iadd", "add_")
ELEMENTWISE = (
    "relu",
    "relu_",
    "relu6",
    "leaky_relu",
    "elu",
    "gelu",
    "silu",
    "sigmoid",
    "tanh",
    "dropout",
    "contiguous",
)
POOLINGS = ("max_pool2d", "boolean_dispatch", "adaptive_avg_pool2d", "adaptive_max_pool2d")
WORTH_A_COPY = 0.75  # gather or scatter when at most this fraction of the channels is left, else keep zero channels


class UnsupportedOperationError(UserError):
    """An operation through which channels cannot be followed; the message names it."""


class Gather(nn.Module):
    """The named channels of a tensor."""

    index: Tensor

    def __init__(self, index: Int64[Tensor, " kept"]) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch kept *space"]:
        """Copy the channels."""
        return x.index_select(1, self.index)


class ConstantMap(nn.Module):
    """A zero-padded convolution, and what the constant channels gave that are no longer among its inputs.

    Their map is the same for every image: the kernels, each times its constant, summed and run over a picture of ones.
    It is kept for pictures of the size that the network was shrunk with.
    """

    kernel: Tensor
    constant: Tensor

    def __init__(self, convolution: nn.Module, kernel: Float[Tensor, "out 1 *kernel"], size: tuple[int, ...]) -> None:
        super().__init__()
        self.convolution, self.size = convolution, size
        self.register_buffer("kernel", kernel)
        self.register_buffer("constant", self._map(size))

    def forward(self, x: Float[Tensor, "batch kept *space"]) -> Float[Tensor, "batch out *out_space"]:
        """The convolution, with the map added."""
        size = tuple(x.shape[2:])
        maps: Tensor = self.convolution(x)
        return maps.add_(self.constant if size == self.size else self._map(size))

    def _map(self, size: tuple[int, ...]) -> Float[Tensor, "1 out *out_space"]:
        own: Any = self.convolution
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
        return convolve(self.kernel.new_ones(1, 1, *size), self.kernel, None, own.stride, own.padding, own.dilation)


class Scatter(nn.Module):
    """A wider tensor with the given channels at their places and constants elsewhere."""

    index: Tensor
    fill: Tensor

    def __init__(self, index: Int64[Tensor, " kept"], fill: Float[Tensor, " channels"]) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.register_buffer("fill", fill)

    def forward(self, x: Float[Tensor, "batch kept *space"]) -> Float[Tensor, "batch channels *space"]:
        """Fill, then copy."""
        fill = self.fill.view(1, -1, *[1] * (x.dim() - 2))
        wide = fill.expand(x.shape[0], -1, *x.shape[2:])
        return wide.index_copy(1, self.index, x)


class ScatterAdd(nn.Module):
    """The sum of a tensor and a scattered one (`Scatter`), which is never made."""

    index: Tensor
    fill: Tensor

    def __init__(self, scatter: Scatter) -> None:
        super().__init__()
        self.register_buffer("index", scatter.index)
        self.register_buffer("fill", scatter.fill.index_fill(0, scatter.index, 0))

    def forward(
        self, wide: Float[Tensor, "batch channels *space"], x: Float[Tensor, "batch kept *space"]
    ) -> Float[Tensor, "batch channels *space"]:
        """Add the constants, then the channels at their places."""
        return (wide + self.fill.view(1, -1, *[1] * (x.dim() - 2))).index_add_(1, self.index, x)


class _Shrinker:
    """One shrinking: annotations of every node of a traced network. See the module's description for the three passes.

    const: value of each channel, NaN where it varies. root: node whose channels a node shares. repeat: features a
    channel has become by flattening. keep: channels kept, by root.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.modules = dict(graph.named_modules())
        self.kinds: dict[fx.Node, str] = {}
        self.sources: dict[fx.Node, list[fx.Node]] = {}
        self.const: dict[fx.Node, Tensor] = {}
        self.root: dict[fx.Node, fx.Node] = {}
        self.repeat: dict[fx.Node, int] = {}
        self.keep: dict[fx.Node, Tensor] = {}

    # -- reading the graph -------------------------------------------------------------------------------------------

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def kind(self, node: fx.Node) -> str:
        """Role of a node: input, output, layer, norm, act, pool, average, flatten, crop, pad, add, or other."""
        if node not in self.kinds:
            self.kinds[node] = self._find_kind(node)
        return self.kinds[node]

    def _find_kind(self, node: fx.Node) -> str:
        if node.op in ("placeholder", "output"):
            return "input" if node.op == "placeholder" else "output"
        if not isinstance(node.meta.get("tensor_meta"), TensorMetadata):
            return "other"  # sizes and other numbers
        module = self.module(node)
        if module is not None:
            return self._module_kind(module, node)
        tensors = [a for a in node.all_input_nodes if a in self.const]
        before, after = (self.shape(tensors[0]) if tensors else ()), self.shape(node)
        target: Any = node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        crops = target is operator.getitem and isinstance(node.args[1], tuple) and len(node.args[1]) > 1
        rules = {
            "flatten": name in FLATTENINGS and after == (before[0], math.prod(before[1:])),
            "add": name in ADDITIONS and len(tensors) == 2 and before == self.shape(tensors[1]),
            "act": name in ELEMENTWISE or (name in ADDITIONS and len(tensors) == 1),
            "pool": name in POOLINGS or (name == "mean" and before[:2] == after[:2]),
            "crop": crops and all(i == slice(None) for i in node.args[1][:2]),  # type: ignore[index, union-attr]
            "pad": name == "pad" and before[2:] == after[2:],
        }
        for kind, applies in rules.items():
            if applies and before:
                return kind
        raise UnsupportedOperationError(self._cannot(node))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["tensor_meta"].shape)

    def _module_kind(self, module: nn.Module, node: fx.Node) -> str:
        if isinstance(module, CONVOLUTIONS) and module.groups == 1:
            return "layer"
        if isinstance(module, nn.Linear) and len(node.meta["tensor_meta"].shape) == 2:
            return "layer"
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
            return "norm"
        kinds = ((ACTIVATIONS, "act"), (ADAPTIVE_POOLS, "pool"), (AVERAGE_POOLS, "average"))
        for classes, kind in kinds:
            if isinstance(module, classes):
                return kind
        if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
            return "flatten"
        raise UnsupportedOperationError(self._cannot(node))

    def _cannot(self, node: fx.Node) -> str:
        module = self.module(node)
        what = f"{node.target} ({module})" if module is not None else f"{node.op} {node.target}"
        return (
            f"Channels cannot be followed through {what} at node {node.name}: shrinking supports convolutions without "
            "groups, linear layers on vectors, batch norm, activations, pooling, additions, flattening and global mean."
        )

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The tensors whose channels a node works on; an addition may name the same one twice."""
        if node not in self.sources:
            found = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node) and a in self.const]
            self.sources[node] = found[: 2 if self.kind(node) == "add" else 1]
        return self.sources[node]

    # -- 1. constants ------------------------------------------------------------------------------------------------

    def propagate_constants(self) -> None:
        """Annotate every tensor with its channels' constants, in order of execution."""
        for node in self.graph.graph.nodes:
            kind = self.kind(node)
            if kind in ("output", "other"):
                continue
            self.root[node], self.repeat[node] = node, 1
            if kind not in ("input", "layer", "add", "pad"):
                (source,) = self.operands(node)
                self.root[node], self.repeat[node] = self.root[source], self.repeat[source]
                if kind == "flatten":
                    self.repeat[node] *= math.prod(self.shape(source)[2:])
            if kind in ("norm", "add", "pad") and any(self.repeat[source] > 1 for source in self.operands(node)):
                raise UnsupportedOperationError(self._cannot(node) + " This one comes after flattening a picture.")
            self.const[node] = self._constants(node, kind)

    def _constants(self, node: fx.Node, kind: str) -> Tensor:
        if kind == "input":
            example = next(self.graph.parameters())
            return example.new_full((self.shape(node)[1],), torch.nan).detach()
        before = self.const[self.operands(node)[0]]
        if kind == "layer":
            return self._layer_constants(node, before)
        if kind == "norm":
            return self.modules[str(node.target)](before.view(1, -1, *[1] * (len(self.shape(node)) - 2))).flatten()
        if kind == "act":
            return self._apply(node, before)
        if kind == "add":
            return before + self.const[self.operands(node)[1]]
        if kind == "pad":
            return F.pad(before, self._padding(node), value=self._pad_value(node))
        if kind == "average":
            module: Any = self.module(node)
            padded = module.padding if isinstance(module.padding, int) else any(module.padding)
            if padded and module.count_include_pad:
                return torch.where(before == 0, before, torch.nan)
        return before

    def _apply(self, node: fx.Node, value: Tensor) -> Tensor:
        """An elementwise node on the constants."""
        (source,) = self.operands(node)
        value = value.clone()  # it may work in place
        if node.op == "call_module":
            return self.modules[str(node.target)](value)
        args = [value if a is source else a for a in node.args]
        kwargs = {k: value if a is source else a for k, a in node.kwargs.items()}
        if node.op == "call_method":
            return getattr(value, str(node.target))(*args[1:], **kwargs)
        if getattr(node.target, "__name__", "") == "dropout":
            return value
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _kernel(self, node: fx.Node) -> Tensor:
        """Weight of a layer as [out, in channel, positions]; flattened features count as positions of their channel."""
        weight: Tensor = self.module(node).weight.detach()  # type: ignore[union-attr, operator]
        return weight.reshape(weight.shape[0], len(self.const[self.operands(node)[0]]), -1)

    def _pads_zeros(self, node: fx.Node) -> bool:
        module = self.module(node)
        if not isinstance(module, CONVOLUTIONS) or module.padding_mode != "zeros":
            return False
        return module.padding == "same" or (module.padding != "valid" and any(module.padding))

    def _layer_constants(self, node: fx.Node, before: Tensor) -> Tensor:
        kernel, bias = self._kernel(node), self._bias(node)
        absorbed = before == 0 if self._pads_zeros(node) else ~before.isnan()
        silent = ((kernel == 0).all(2) | absorbed).all(1)
        value = bias + kernel.sum(2) @ before.nan_to_num()
        return torch.where(silent, value, torch.nan)

    def _bias(self, node: fx.Node) -> Tensor:
        module = self.module(node)
        weight: Tensor = module.weight  # type: ignore[union-attr, assignment]
        bias: Tensor | None = module.bias  # type: ignore[union-attr, assignment]
        return weight.new_zeros(weight.shape[0]).detach() if bias is None else bias.detach()

    def _padding(self, node: fx.Node) -> tuple[int, int]:
        amounts: Any = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
        return int(amounts[-2]), int(amounts[-1])

    def _pad_value(self, node: fx.Node) -> float:
        value: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        return 0.0 if value is None else float(value)

    # -- 2. which channels are read ----------------------------------------------------------------------------------

    def choose_channels(self) -> None:
        """Decide what every root keeps, consumers before producers."""
        self.keep = {root: torch.zeros_like(self.const[root], dtype=torch.bool) for root in set(self.root.values())}
        for node in reversed(list(self.graph.graph.nodes)):
            if node.op == "placeholder":
                self.keep[node][:] = True
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self.keep[self.root[source]][:] = True
            elif node in self.root and self.root[node] is node:
                if not self.keep[node].any():
                    self.keep[node][0] = True  # a tensor keeps at least one channel
                self._read(node)

    def _read(self, node: fx.Node) -> None:
        """Mark what the producer of a root reads from its operands."""
        kept = self.keep[node]
        for source in self.operands(node):
            const, wanted = self.const[source], self.keep[self.root[source]]
            if self.kind(node) == "add":
                varying = kept & const.isnan()
                wanted |= varying if varying.sum() <= WORTH_A_COPY * kept.sum() else kept
            elif self.kind(node) == "pad":
                left, _ = self._padding(node)
                wanted |= kept[left : left + len(const)] & const.isnan()
            else:
                wanted |= (self._kernel(node)[kept] != 0).flatten(2).any(2).any(0) & const.isnan()

    # -- 3. the smaller network --------------------------------------------------------------------------------------

    def rewrite(self) -> fx.GraphModule:
        """Slice layers and norms, insert gathers and scatters."""
        for node in list(self.graph.graph.nodes):
            kind = self.kind(node)
            if kind == "layer":
                self._slice_layer(node)
            elif kind == "norm":
                self._slice_norm(node)
            elif kind in ("add", "pad"):
                aligned = [self._align(node, source) for source in self.operands(node)]
                node.args, node.kwargs = tuple(aligned), {}
                if kind == "pad":
                    node.op, node.target = "call_method", "contiguous"
                else:
                    self._fuse(node, aligned)
            elif kind == "flatten":  # sizes may be written into a view
                node.op, node.target = "call_function", torch.flatten
                node.args, node.kwargs = (node.all_input_nodes[0], 1), {}
        self.graph.graph.eliminate_dead_code()
        self.graph.recompile()
        self.graph.delete_all_unused_submodules()
        return self.graph

    def _insert(self, module: nn.Module, source: fx.Node, before: fx.Node) -> fx.Node:
        name = f"{before.name}_{type(module).__name__.lower()}_{source.name}"
        self.graph.add_submodule(name, module)
        with self.graph.graph.inserting_before(before):
            return self.graph.graph.call_module(name, (source,))

    def _replace(self, node: fx.Node, module: nn.Module) -> None:
        if sum(other.op == "call_module" and other.target == node.target for other in self.graph.graph.nodes) > 1:
            raise UnsupportedOperationError(
                f"{node.target} is called more than once, so it cannot be cut to one shape."
            )
        self.graph.set_submodule(str(node.target), module)

    def _slice_layer(self, node: fx.Node) -> None:
        module: Any = self.module(node)
        (source,) = self.operands(node)
        const, kept, held = self.const[source], self.keep[node], self.keep[self.root[source]]
        kernel, bias = self._kernel(node).clone(), self._bias(node).clone()
        constant, value = ~const.isnan(), const.nan_to_num()
        absorbed = torch.einsum("oip,i->op", kernel, value)[kept]
        kernel[:, constant] = 0
        kernel, bias = kernel[kept], bias[kept]
        if not self._pads_zeros(node):
            bias += absorbed.sum(1)
        gets = self._gather(source, node, held & (kernel != 0).any(2).any(0))
        weight = kernel[:, gets].reshape(len(bias), -1, *module.weight.shape[2:])
        small = copy.deepcopy(module)
        small.weight = nn.Parameter(weight)
        small.bias = nn.Parameter(bias) if module.bias is not None or bias.any() else None
        names = ("in_features", "out_features") if isinstance(module, nn.Linear) else ("in_channels", "out_channels")
        setattr(small, names[0], weight.shape[1])
        setattr(small, names[1], weight.shape[0])
        if self._pads_zeros(node) and absorbed.any():
            kernel = absorbed.reshape(len(bias), 1, *module.weight.shape[2:])
            small = ConstantMap(small, kernel, self.shape(source)[2:])
        self._replace(node, small)

    def _gather(self, source: fx.Node, node: fx.Node, reads: Bool[Tensor, " channels"]) -> Bool[Tensor, " channels"]:
        """Narrow a wide operand to what a layer reads, if that pays; returns the channels that the layer gets."""
        held = self.keep[self.root[source]]
        if self.repeat[source] > 1 or not 0 < reads.sum() <= WORTH_A_COPY * held.sum():
            return held
        node.replace_input_with(source, self._insert(Gather((held.cumsum(0) - 1)[reads]), source, node))
        return reads

    def _slice_norm(self, node: fx.Node) -> None:
        module: Any = self.module(node)
        kept = self.keep[self.root[node]]
        small = copy.deepcopy(module)
        small.num_features = int(kept.sum())
        small.running_mean, small.running_var = module.running_mean[kept], module.running_var[kept]
        if module.affine:
            small.weight = nn.Parameter(module.weight.detach()[kept])
            small.bias = nn.Parameter(module.bias.detach()[kept])
        self._replace(node, small)

    def _fuse(self, node: fx.Node, operands: list[fx.Node]) -> None:
        """Let an addition scatter its narrow operand, if it has one."""
        for wide, narrow in (operands, operands[::-1]):
            scatter = self.graph.get_submodule(str(narrow.target)) if narrow.op == "call_module" else None
            if isinstance(scatter, Scatter):
                name = f"{node.name}_scatteradd"
                self.graph.add_submodule(name, ScatterAdd(scatter))
                node.op, node.target, node.args = "call_module", name, (wide, *narrow.args)
                return

    def _align(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """Bring an operand of an addition, or the input of a channel padding, to the channels that the node keeps."""
        kept, const, held = self.keep[node], self.const[source], self.keep[self.root[source]]
        if self.kind(node) == "pad":
            const = F.pad(const, self._padding(node), value=self._pad_value(node))
            held = F.pad(held, self._padding(node))
        useful = held & kept
        if not torch.equal(useful, held):
            source = self._insert(Gather((held.cumsum(0) - 1)[useful]), source, node)
        if not torch.equal(useful, kept):
            source = self._insert(Scatter((kept.cumsum(0) - 1)[useful], const.nan_to_num()[kept]), source, node)
        return source


@torch.no_grad()
def shrink(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Remove the pruned filters and channels of a network for good.

    Args:
        model: with masks, or baked. It is not changed. Any network of convolutions without groups, linear layers, batch
            norm, activations, pooling, residual additions, flattening, channel padding; torch.fx must trace it.
        example: an input batch; channels and spatial size are read from it, its values do not matter.

    Returns:
        A plain network in evaluation mode, with the same outputs as `model.eval()` up to rounding. It can be saved,
        exported and fine-tuned. Unstructured masks remove only filters and channels that are zero altogether.

    Raises:
        UnsupportedOperationError: an operation through which channels cannot be followed, named; or a layer called
            twice.

    """
    model = copy.deepcopy(model).eval()
    if any(isinstance(module, MaskedWeight) for module in model.modules()):
        bake_masks(model)
    checked = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)  # what a trace sends through the network are no tensors
    try:
        graph = fx.symbolic_trace(model)
    finally:
        jaxtyping.config.update("jaxtyping_disable", checked)
    ShapeProp(graph).propagate(example)
    shrinker = _Shrinker(graph)
    shrinker.propagate_constants()
    shrinker.choose_channels()
    return shrinker.rewrite()
