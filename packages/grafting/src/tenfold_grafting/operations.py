"""The operations of a network as the bound engine sees them (section 2.6): affine maps and neuron-wise activations.

Every affine operation knows four things: the map itself, the map with absolute weights (for interval radii), the
transpose of its linear part, and what its constant adds to a row of coefficients. Shapes leave the batch out.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, ...]

ROW_WASTE = 3
"""Largest ratio of a map's width to a kernel's at which a dense product over a row, mostly zeros, is still the quicker."""


@dataclasses.dataclass
class Operation:
    """A node of the graph: its name in the model, the nodes it reads, the shape of what it gives."""

    name: str
    inputs: tuple[int, ...]
    shape: Shape

    def to(self, dtype: torch.dtype, device: torch.device) -> "Operation":
        """The operation with its tensors converted."""
        changed: dict[str, Any] = {
            field.name: value.to(device, dtype)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **changed)

    def tensors(self) -> list[Tensor]:
        """Its weights."""
        return [value for f in dataclasses.fields(self) if isinstance(value := getattr(self, f.name), Tensor)]


@dataclasses.dataclass
class Input(Operation):
    """The network's input."""


@dataclasses.dataclass
class Affine(Operation):
    """y = W x + b."""

    in_shape: Shape

    mixes = True
    """Whether an output reads several inputs: interval arithmetic is exact through one such map, not through two."""

    @property
    def length(self) -> int:
        """Most products in an output, or in a coefficient of an input: for rounding errors."""
        return 1

    def forward(self, x: Tensor) -> Tensor:
        """W x + b."""
        raise NotImplementedError

    def absolute(self, x: Tensor) -> Tensor:
        """|W| x."""
        raise NotImplementedError

    def transpose(self, rows: Tensor) -> Tensor:
        """Rows of coefficients [n, *shape] as coefficients of the input [n, *in_shape]."""
        raise NotImplementedError

    def constant(self, rows: Tensor) -> Tensor | None:
        """What b adds to each row, [n]; None where there is no b."""
        return None

    def magnitude(self) -> Tensor | None:
        """|b|, broadcastable to [n, *shape]; None where there is no b."""
        return None

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Exact range of every output when the inputs vary independently."""
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        mid, spread = self.forward(centre), self.absolute(radius)
        return mid - spread, mid + spread


@dataclasses.dataclass
class Linear(Affine):
    """A fully connected layer: weight [out, in], bias [out]."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"]

    @property
    def length(self) -> int:
        """The larger of fan-in and fan-out, and the bias."""
        return max(self.weight.shape) + 1

    def forward(self, x: Tensor) -> Tensor:
        """W x + b."""
        return F.linear(x, self.weight, self.bias)

    def absolute(self, x: Tensor) -> Tensor:
        """|W| x."""
        return F.linear(x, self.weight.abs())

    def transpose(self, rows: Tensor) -> Tensor:
        """A W."""
        return rows @ self.weight

    def constant(self, rows: Tensor) -> Tensor:
        """A b."""
        return rows @ self.bias

    def magnitude(self) -> Tensor:
        """|b|."""
        return self.bias.abs()


@dataclasses.dataclass
class Conv(Affine):
    """A convolution over [channels, height, width] with symmetric zero padding."""

    weight: Float[Tensor, "out in kh kw"]
    bias: Float[Tensor, " out"]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    _row_matrices: dict[tuple[int, int, int], Tensor] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def length(self) -> int:
        """The larger number of channels in a group times the kernel's size, and the bias."""
        return max(self.weight.shape[1], self.weight.shape[0] // self.groups) * math.prod(self.weight.shape[2:]) + 1

    def forward(self, x: Tensor) -> Tensor:
        """The convolution."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def absolute(self, x: Tensor) -> Tensor:
        """The convolution with |W| and no bias."""
        return F.conv2d(x, self.weight.abs(), None, self.stride, self.padding, self.dilation, self.groups)

    def transpose(self, rows: Tensor) -> Tensor:
        """The transposed convolution, with the output padding that gives the input's very size."""
        height, width = self.in_shape[1:]
        return self.transposed(rows, self.padding, (height, width))

    def transposed(self, rows: Tensor, padding: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """The transposed convolution of rows [n, out, h, w] with any map's size: coefficients [n, in, *size]."""
        if self._quicker_by_rows(rows, size[1]):
            return self._transposed_by_rows(rows, padding, size)
        if self._quicker_by_cells(rows):
            return self._transposed_by_cells(rows, padding, size)
        full = self._full(rows.shape[2:])
        extra = (max(0, size[0] + 2 * padding[0] - full[0]), max(0, size[1] + 2 * padding[1] - full[1]))
        options = (self.stride, padding, extra, self.groups, self.dilation)
        return F.conv_transpose2d(rows, self.weight, None, *options)

    def _full(self, out: Sequence[int]) -> tuple[int, int]:
        """Size of the map that outputs of a size reach, padding included."""
        (sy, sx), (dy, dx), (ky, kx) = self.stride, self.dilation, self.weight.shape[2:]
        return (out[0] - 1) * sy + dy * (ky - 1) + 1, (out[1] - 1) * sx + dx * (kx - 1) + 1

    def _quicker_by_rows(self, rows: Tensor, width: int) -> bool:
        """Whether dense products over the rows of a map beat torch's convolution, which is slow in float64 on a CPU."""
        plain = self.groups == 1 and self.dilation == (1, 1) and not self.weight.requires_grad
        return (
            plain
            and rows.device.type == "cpu"
            and rows.dtype == torch.float64
            and width <= ROW_WASTE * self.weight.shape[3]
        )

    def _quicker_by_cells(self, rows: Tensor) -> bool:
        """Whether one product over cells beats torch's convolution in single precision on a CPU: where it strides."""
        plain = self.groups == 1 and self.dilation == (1, 1) and not (self.weight.requires_grad or rows.requires_grad)
        return plain and rows.device.type == "cpu" and rows.dtype == torch.float32 and min(self.stride) > 1

    def _transposed_by_cells(self, rows: Tensor, padding: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Cells of stride x stride pixels, counted from the padding's corner, get their values from as many neighbouring
        outputs each as strides fit into a kernel: the coefficients of all cells are one matrix product.
        """
        count, channels, height, width = rows.shape
        (sy, sx), (ky, kx) = self.stride, self.weight.shape[2:]
        ty, tx = -(-ky // sy), -(-kx // sx)  # outputs that reach a cell
        (top, bottom), (left, right) = (
            (p // s, (p + n - 1) // s) for p, n, s in zip(padding, size, self.stride, strict=True)
        )
        sides = (0, 0, tx - 1 - left, right - width + 1, ty - 1 - top, bottom - height + 1)
        padded = F.pad(rows.permute(0, 2, 3, 1), sides).contiguous()
        down, across = bottom - top + 1, right - left + 1
        line = padded.shape[2] * channels
        strides = (padded.shape[1] * line, line, channels, line, 1)
        reached = padded.as_strided((count, down, across, ty, tx * channels), strides)
        cells = reached.reshape(count * down * across, ty * tx * channels) @ self._cell_matrix(ty, tx)
        pixels = cells.view(count, down, across, sy, sx, -1).transpose(2, 3).reshape(count, down * sy, across * sx, -1)
        y, x = padding[0] - top * sy, padding[1] - left * sx
        return pixels[:, y : y + size[0], x : x + size[1]].permute(0, 3, 1, 2).contiguous()

    def _cell_matrix(self, ty: int, tx: int) -> Tensor:
        """What the outputs around a cell give to its pixels, [ty * tx * out channels, stride * stride * in channels]."""
        key = (0, ty, tx)
        if key not in self._row_matrices:
            (sy, sx), (ky, kx) = self.stride, self.weight.shape[2:]
            whole = F.pad(self.weight, (0, tx * sx - kx, 0, ty * sy - ky))
            parts = whole.unflatten(3, (tx, sx)).unflatten(2, (ty, sy)).flip(2, 4)  # [out, in, ty, sy, tx, sx]
            self._row_matrices[key] = parts.permute(2, 4, 0, 3, 5, 1).reshape(ty * tx * self.shape[0], -1)
        return self._row_matrices[key]

    def _transposed_by_rows(self, rows: Tensor, padding: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Each row of the output's map times one dense matrix gives its part of kh rows of the input's map."""
        count, channels, height, width = rows.shape
        kernel, stride = self.weight.shape[2], self.stride[0]
        matrix = self._row_matrix(width, padding[1], size[1])
        parts = rows.transpose(1, 2).reshape(count * height, channels * width) @ matrix
        parts = parts.view(count, height, kernel, -1)
        span = max(self._full((height, 1))[0], padding[0] + size[0])
        whole = rows.new_zeros(count, span, parts.shape[3])
        for k in range(kernel):
            whole[:, k : k + stride * height : stride] += parts[:, :, k]
        inner = whole[:, padding[0] : padding[0] + size[0]]
        return inner.reshape(count, size[0], self.in_shape[0], size[1]).transpose(1, 2).contiguous()

    def _row_matrix(self, out_width: int, padding: int, width: int) -> Tensor:
        """The convolution along a row, [out channels * out_width, kernel height * in channels * width]."""
        key = (out_width, padding, width)
        if key not in self._row_matrices:
            channels = self.shape[0]
            unit = torch.eye(channels * out_width, dtype=self.weight.dtype, device=self.weight.device)
            extra = max(0, width + 2 * padding - self._full((1, out_width))[1])
            options = ((1, self.stride[1]), (0, padding), (0, extra))
            found = F.conv_transpose2d(unit.view(-1, channels, 1, out_width), self.weight, None, *options)
            self._row_matrices[key] = found[..., :width].transpose(1, 2).reshape(channels * out_width, -1)
        return self._row_matrices[key]

    def constant(self, rows: Tensor) -> Tensor:
        """Each channel's coefficients, summed over the map, times its bias."""
        return rows.flatten(2).sum(2) @ self.bias

    def magnitude(self) -> Tensor:
        """|b|, by channel."""
        return self.bias.abs()[:, None, None]


@dataclasses.dataclass
class Scale(Affine):
    """A factor and a shift by channel: batch norm in evaluation, or the normalisation of the input."""

    factor: Float[Tensor, " channels"]
    shift: Float[Tensor, " channels"]

    mixes = False

    def _wide(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *(1 for _ in self.shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """Factor x + shift."""
        return x * self._wide(self.factor) + self._wide(self.shift)

    def absolute(self, x: Tensor) -> Tensor:
        """|factor| x."""
        return x * self._wide(self.factor.abs())

    def transpose(self, rows: Tensor) -> Tensor:
        """A factor."""
        return rows * self._wide(self.factor)

    def constant(self, rows: Tensor) -> Tensor:
        """Each channel's coefficients, summed, times its shift."""
        return rows.flatten(2).sum(2) @ self.shift if rows.dim() > 2 else rows @ self.shift

    def magnitude(self) -> Tensor:
        """|shift|."""
        return self._wide(self.shift.abs())


@dataclasses.dataclass
class Pad(Affine):
    """Zeros around the map: left, right, top, bottom."""

    sides: tuple[int, int, int, int]

    mixes = False

    def forward(self, x: Tensor) -> Tensor:
        """The padded map."""
        return F.pad(x, self.sides)

    def absolute(self, x: Tensor) -> Tensor:
        """The same: padding has no weights."""
        return F.pad(x, self.sides)

    def transpose(self, rows: Tensor) -> Tensor:
        """The rows without what lies on the padding."""
        left, _, top, _ = self.sides
        return rows[..., top : top + self.in_shape[1], left : left + self.in_shape[2]]


@dataclasses.dataclass
class AvgPool(Affine):
    """Average pooling over kernel x kernel windows without padding."""

    kernel: tuple[int, int]
    stride: tuple[int, int]

    @property
    def length(self) -> int:
        """Terms of an average."""
        return math.prod(self.kernel)

    def forward(self, x: Tensor) -> Tensor:
        """The averages."""
        return F.avg_pool2d(x, self.kernel, self.stride)

    def absolute(self, x: Tensor) -> Tensor:
        """The same: the weights are positive."""
        return F.avg_pool2d(x, self.kernel, self.stride)

    def transpose(self, rows: Tensor) -> Tensor:
        """Each coefficient spread evenly over its window."""
        channels = self.shape[0]
        weight = rows.new_full((channels, 1, *self.kernel), 1 / math.prod(self.kernel))
        extra = tuple(
            size - ((out - 1) * s + k)
            for size, out, s, k in zip(self.in_shape[1:], self.shape[1:], self.stride, self.kernel, strict=True)
        )
        return F.conv_transpose2d(rows, weight, None, self.stride, 0, extra, channels)


@dataclasses.dataclass
class Reshape(Affine):
    """Another shape of the same values."""

    mixes = False

    def forward(self, x: Tensor) -> Tensor:
        """The values in their new shape."""
        return x.reshape(*x.shape[: x.dim() - len(self.in_shape)], *self.shape)

    def absolute(self, x: Tensor) -> Tensor:
        """The same."""
        return self.forward(x)

    def transpose(self, rows: Tensor) -> Tensor:
        """The coefficients in the old shape."""
        return rows.reshape(-1, *self.in_shape)


@dataclasses.dataclass
class Add(Operation):
    """The sum of two nodes: a residual connection."""


@dataclasses.dataclass
class Activation(Operation):
    """max(z, 0), or on grafted neurons (mask 1) the line slope z + intercept; all three [*shape], or None: no graft."""

    mask: Tensor | None = None
    slope: Tensor | None = None
    intercept: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        """Section 2.1."""
        if self.mask is None or self.slope is None or self.intercept is None:
            return z.clamp(min=0)
        return torch.where(self.mask != 0, self.slope * z + self.intercept, z.clamp(min=0))

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Range of the activation; the ends of a line change places where its slope is negative."""
        if self.mask is None or self.slope is None or self.intercept is None:
            return lower.clamp(min=0), upper.clamp(min=0)
        first, second = self.slope * lower + self.intercept, self.slope * upper + self.intercept
        grafted = self.mask != 0
        return (
            torch.where(grafted, torch.minimum(first, second), lower.clamp(min=0)),
            torch.where(grafted, torch.maximum(first, second), upper.clamp(min=0)),
        )

    def unstable(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Which neurons need a relaxation: not grafted, and l < 0 < u."""
        crossing = (lower < 0) & (upper > 0)
        return crossing if self.mask is None else crossing & (self.mask == 0)


def interval_of(
    node: Operation, values: list[tuple[Tensor, Tensor]], lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """The interval of a node, given those of all nodes before it and the box of the input."""
    if isinstance(node, Input):
        return lower, upper
    if isinstance(node, Add):
        (a, b), (c, d) = values[node.inputs[0]], values[node.inputs[1]]
        return a + c, b + d
    assert isinstance(node, Affine | Activation)
    return node.interval(*values[node.inputs[0]])


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """A size as (height, width)."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
