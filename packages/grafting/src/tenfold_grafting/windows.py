"""Rows of coefficients that touch a window of a map only, as those of a convolution's neurons do.

A neuron of an early convolution depends on a small part of every map before it. Its row of coefficients is kept as that
window, [batch, rows, channels, k, k], whose corner is origin + step * (the neuron's position): a fraction of the memory
and work of the whole map. What lies outside of the map has coefficient zero.
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from tenfold_grafting.operations import Conv


@dataclasses.dataclass
class Windows:
    """Coefficients [batch, rows, channels, kh, kw] at a node with maps of ``shape``.

    The window of a row at position (i, j) of the start layer has its upper left corner at
    (origin[0] + step[0] i, origin[1] + step[1] j).
    """

    values: Float[Tensor, "batch rows channels kh kw"]
    places: Int[Tensor, "batch rows 2"]
    grid: tuple[int, int]
    origin: tuple[int, int]
    step: tuple[int, int]
    shape: tuple[int, int, int]

    @property
    def covers(self) -> float:
        """Which part of the map a window is."""
        return self.values.shape[3] * self.values.shape[4] / (self.shape[1] * self.shape[2])

    def blocks(self, numbers: int) -> Iterator["Windows"]:
        """The rows in parts of about as many numbers, on a CPU."""
        count = -(-self.values.numel() // numbers) if self.values.device.type == "cpu" else 1
        pairs = (x.tensor_split(min(count, x.shape[1]), 1) for x in (self.values, self.places))
        for values, places in zip(*pairs, strict=True):
            yield dataclasses.replace(self, values=values, places=places)

    def gather(self, maps: Float[Tensor, "boxes mapped height width"]) -> Float[Tensor, "batch rows mapped kh kw"]:
        """What each row's window shows of maps; zero outside of them."""
        size = self.values.shape[3:]
        before = [max(0, -o) for o in self.origin]
        after = [
            max(0, o + s * (g - 1) + k - n)
            for o, s, g, k, n in zip(self.origin, self.step, self.grid, size, self.shape[1:], strict=True)
        ]
        padded = F.pad(maps, (before[1], after[1], before[0], after[0]))
        start = [o + b for o, b in zip(self.origin, before, strict=True)]
        views = padded[:, :, start[0] :, start[1] :].unfold(2, size[0], self.step[0]).unfold(3, size[1], self.step[1])
        # [batch, channels, gh, gw, kh, kw] -> one contiguous block a position, then one read a row
        blocks = views[:, :, : self.grid[0], : self.grid[1]].permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        position = self.places[..., 0] * self.grid[1] + self.places[..., 1]
        if blocks.shape[0] == 1:
            return (
                blocks[0]
                .reshape(blocks.shape[1], -1)
                .index_select(0, position.flatten())
                .view(*position.shape, *blocks.shape[2:])
            )
        base = torch.arange(len(position), device=position.device)[:, None] * blocks.shape[1]
        flat = blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)
        return flat.index_select(0, (position + base).flatten()).view(*position.shape, *blocks.shape[2:])

    def inside(self) -> Float[Tensor, "batch rows 1 kh kw"]:
        """1 inside of the map, 0 outside, for every row."""
        ones = self.values.new_ones(len(self.places), 1, *self.shape[1:])
        return self.gather(ones)

    @property
    def overhangs(self) -> bool:
        """Whether any window reaches beyond the map."""
        return any(
            o < 0 or o + s * (g - 1) + k > n
            for o, s, g, k, n in zip(
                self.origin, self.step, self.grid, self.values.shape[3:], self.shape[1:], strict=True
            )
        )

    def masked(self) -> "Windows":
        """The same with zeros outside of the map."""
        return dataclasses.replace(self, values=self.values * self.inside()) if self.overhangs else self

    def dense(self) -> Float[Tensor, "batch rows channels height width"]:
        """The rows over the whole map."""
        batch, rows, channels, kh, kw = self.values.shape
        _, height, width = self.shape
        corner = self.places * self.places.new_tensor(self.step) + self.places.new_tensor(self.origin)
        y = corner[..., 0, None] + torch.arange(kh, device=corner.device)
        x = corner[..., 1, None] + torch.arange(kw, device=corner.device)
        # outside of the map: a row and a column more, cut off in the end
        y = torch.where((y < 0) | (y >= height), height, y)
        x = torch.where((x < 0) | (x >= width), width, x)
        index = (y[..., :, None] * (width + 1) + x[..., None, :]).flatten(2)
        full = self.values.new_zeros(batch, rows, channels, (height + 1) * (width + 1))
        full.scatter_(3, index[:, :, None].expand(-1, -1, channels, -1), self.values.flatten(3))
        return full.view(batch, rows, channels, height + 1, width + 1)[..., :height, :width]

    def through(self, conv: Conv) -> "Windows":
        """The coefficients of a convolution's input."""
        flat = self.values.flatten(0, 1)
        height, width = (
            (n - 1) * s + d * (k - 1) + 1
            for n, s, d, k in zip(flat.shape[2:], conv.stride, conv.dilation, conv.weight.shape[2:], strict=True)
        )
        values = conv.transposed(flat, (0, 0), (height, width))
        return self.moved(conv, values.view(*self.values.shape[:2], *values.shape[1:]))

    def moved(self, conv: Conv, values: Tensor) -> "Windows":
        """Given coefficients of a convolution's input, in the place that these windows have there."""
        channels, height, width = conv.in_shape
        (oy, ox), (sy, sx), (py, px) = self.origin, conv.stride, conv.padding
        return dataclasses.replace(
            self,
            values=values,
            origin=(oy * sy - py, ox * sx - px),
            step=(self.step[0] * sy, self.step[1] * sx),
            shape=(channels, height, width),
        )

    def padded_away(self, sides: tuple[int, int, int, int], in_shape: tuple[int, int, int]) -> "Windows":
        """The coefficients of a zero pad's input."""
        left, _, top, _ = sides
        return dataclasses.replace(self, origin=(self.origin[0] - top, self.origin[1] - left), shape=in_shape)

    def plus(self, other: "Windows") -> "Windows":
        """The sum of two rows of windows at one node that start at the same neurons and move by the same step.

        With another step, as after two ways of unlike strides, no one origin aligns the windows of all neurons.
        """
        corner = [min(a, b) for a, b in zip(self.origin, other.origin, strict=True)]
        end = [
            max(a + m, b + n)
            for a, m, b, n in zip(self.origin, self.values.shape[3:], other.origin, other.values.shape[3:], strict=True)
        ]
        summed = None
        for part in (self, other):
            top, left = (o - c for o, c in zip(part.origin, corner, strict=True))
            bottom, right = (e - o - n for e, o, n in zip(end, part.origin, part.values.shape[3:], strict=True))
            wide = F.pad(part.values, (left, right, top, bottom))
            summed = wide if summed is None else summed + wide
        assert summed is not None
        return dataclasses.replace(self, values=summed, origin=(corner[0], corner[1]))


def unit_windows(
    shape: tuple[int, int, int], neurons: Int[Tensor, "batch rows"], signs: Float[Tensor, "batch rows"]
) -> Windows:
    """Rows for neurons of a map, numbered as in its flattened form: the neuron itself, times a sign."""
    channels, height, width = shape
    channel = neurons // (height * width)
    places = torch.stack([neurons // width % height, neurons % width], 2)
    unit = F.one_hot(channel, channels).to(signs.dtype) * signs[..., None]
    return Windows(unit[..., None, None], places, (height, width), (0, 0), (1, 1), shape)


def filter_windows(
    conv: Conv, units: Windows, neurons: Int[Tensor, "batch rows"], signs: Float[Tensor, "batch rows"]
) -> Windows:
    """What `units`, single neurons of a convolution's output, are at its input: the filters themselves."""
    if conv.groups != 1 or conv.dilation != (1, 1):
        return units.through(conv)
    channel = neurons // (conv.shape[1] * conv.shape[2])
    return units.moved(conv, conv.weight[channel] * signs[..., None, None, None])
