"""The large-kernel layer of section 2.1, and its exact merging for inference (section 2.2)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_slak.large_kernel import large_kernel_dwconv, large_kernel_pair

Form = Literal["two", "one"]


class DepthwiseConv2d(nn.Conv2d):
    """A bias-free depthwise convolution of stride 1 whose output has the size of its input.

    Raises:
        ValueError: a kernel size that is even or not positive.

    """

    def __init__(self, channels: int, kernel_size: tuple[int, int], backend: str = "auto") -> None:
        if any(size < 1 or size % 2 == 0 for size in kernel_size):
            raise ValueError(f"large kernels must have odd sizes, so that they have a centre; got {kernel_size}")
        padding = (kernel_size[0] // 2, kernel_size[1] // 2)
        super().__init__(channels, channels, kernel_size, padding=padding, groups=channels, bias=False)
        self.backend = backend

    def forward(
        self, input: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """`large_kernel_dwconv` with this kernel."""
        return large_kernel_dwconv(input, self.weight, self.backend)


class Branch(nn.Module):
    """One depthwise kernel and, unless `bn` is off, its own batch norm. Parameter names: `conv.weight`, `bn.*`."""

    def __init__(self, channels: int, kernel_size: tuple[int, int], bn: bool = True, backend: str = "auto") -> None:
        super().__init__()
        self.conv = DepthwiseConv2d(channels, kernel_size, backend)
        self.bn = nn.BatchNorm2d(channels) if bn else None

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """`BN(dw(x, K))`."""
        y = self.conv(x).contiguous()  # the norm reads a transposed map several times more slowly than it is copied
        return y if self.bn is None else self.bn(y)

    def folded(self) -> tuple[Float[Tensor, "channels 1 kh kw"], Float[Tensor, " channels"]]:
        """Kernel and bias with the batch norm's running statistics folded in: `s K` and `beta - mean s`,
        `s = gamma / sqrt(var + eps)` (section 2.2). Differentiable.
        """
        kernel = self.conv.weight
        if self.bn is None:
            return kernel, kernel.new_zeros(kernel.shape[0])
        mean, variance = self.bn.get_buffer("running_mean"), self.bn.get_buffer("running_var")
        scale = self.bn.weight * torch.rsqrt(variance + self.bn.eps)
        return kernel * scale.view(-1, 1, 1, 1), self.bn.bias - mean * scale


class LargeKernel(nn.Module):
    """The large-kernel layer: parallel depthwise branches, each with its own batch norm, summed (section 2.1).

    - decomposed: `BN1(dw(x, K1[C,1,M,N])) + BN2(dw(x, K2[C,1,N,M])) + BN3(dw(x, K3[C,1,N,N]))`
    - not decomposed: `BN1(dw(x, K[C,1,M,M])) + BN3(dw(x, K3[C,1,N,N]))`

    The N x N branch exists only for N < M. Sub-modules carry the released names: `LoRA1` (tall), `LoRA2` (wide),
    `lkb_origin` (dense), `small_conv`. In eval mode the running statistics are folded into the kernels at each call,
    which saves the norms and one convolution and changes nothing else; `merged` makes that permanent.

    Args:
        channels: C.
        kernel_size: M, odd.
        small_kernel: N, odd; the short side of the decomposed kernels.
        decomposed: two rectangles for one square.
        bn: batch norms after the branches.
        backend: of `large_kernel_dwconv`.

    Raises:
        ValueError: an even size, or a decomposed kernel smaller than its short side.

    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int = 5,
        decomposed: bool = True,
        bn: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if decomposed and kernel_size < small_kernel:
            raise ValueError(
                f"a {kernel_size} kernel cannot be decomposed into rectangles of short side {small_kernel}: "
                "choose a small kernel that is not larger"
            )
        self.kernel_size, self.small_kernel, self.decomposed = kernel_size, small_kernel, decomposed
        if decomposed:
            self.LoRA1 = Branch(channels, (kernel_size, small_kernel), bn, backend)
            self.LoRA2 = Branch(channels, (small_kernel, kernel_size), bn, backend)
        else:
            self.lkb_origin = Branch(channels, (kernel_size, kernel_size), bn, backend)
        if small_kernel < kernel_size:
            self.small_conv = Branch(channels, (small_kernel, small_kernel), bn, backend)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """The sum of the branches."""
        if self.training:
            x = x.contiguous()
            first, *rest = (branch(x) for branch in self._branches())
            for y in rest:
                first = first + y
            return _ContiguousGradient.apply(first)
        if self.decomposed:
            tall, wide, bias = self.folded_two()
            return large_kernel_pair(x, tall, wide, self.LoRA1.conv.backend, bias)
        kernel, bias = self.folded_one()
        return large_kernel_dwconv(x.contiguous(), kernel, self.lkb_origin.conv.backend, bias)

    def _branches(self) -> list[Branch]:
        return [module for module in self.children() if isinstance(module, Branch)]

    def folded_two(
        self,
    ) -> tuple[Float[Tensor, "channels 1 kh kw"], Float[Tensor, "channels 1 kw kh"], Float[Tensor, " channels"]]:
        """Two-kernel form of a decomposed layer: tall kernel with the small one in its centre, wide kernel, bias."""
        tall, bias = self.LoRA1.folded()
        wide, wide_bias = self.LoRA2.folded()
        bias = bias + wide_bias
        if self.small_kernel < self.kernel_size:
            small, small_bias = self.small_conv.folded()
            tall, bias = tall + _centred(small, (self.kernel_size, self.small_kernel)), bias + small_bias
        return tall, wide, bias

    def folded_one(self) -> tuple[Float[Tensor, "channels 1 m m"], Float[Tensor, " channels"]]:
        """One-kernel form: the sum of all folded kernels in the centre of an M x M one, and the bias."""
        folded = [branch.folded() for branch in self._branches()]
        square = (self.kernel_size, self.kernel_size)
        kernel = sum((_centred(kernel, square) for kernel, _ in folded[1:]), _centred(folded[0][0], square))
        return kernel, sum((bias for _, bias in folded[1:]), folded[0][1])

    @torch.no_grad()
    def merged(self, form: Form = "two") -> nn.Module:
        """An inference-only layer with the same eval-mode output.

        Args:
            form: `two` keeps a tall and a wide kernel (fast on CPUs), `one` sums them into a cross-shaped M x M kernel
                (the released `lkb_reparam`). A layer that is not decomposed has only the second.

        """
        if form == "two" and self.decomposed:
            return MergedTwo(*self.folded_two(), backend=self.LoRA1.conv.backend)
        return MergedOne(*self.folded_one(), backend=self._branches()[0].conv.backend)


class DilatedKernel(nn.Module):
    """A baseline of the same extent and about as many taps: one square kernel whose taps lie d apart, and a batch norm.

    Of the odd squares of n x n taps that reach at most M, the one is taken whose n^2 is nearest to the 2 M N + N^2 of
    the decomposed layer.
    """

    def __init__(self, channels: int, kernel_size: int, small_kernel: int = 5) -> None:
        super().__init__()
        wanted = 2 * kernel_size * small_kernel + small_kernel**2
        sides = {d: (kernel_size - 1) // (2 * d) * 2 + 1 for d in range(1, kernel_size)} or {1: 1}
        spacing = min(sides, key=lambda d: abs(sides[d] ** 2 - wanted))
        side = sides[spacing]
        padding = spacing * (side // 2)
        self.conv = nn.Conv2d(channels, channels, side, padding=padding, dilation=spacing, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """`BN(dw(x, K))`."""
        return self.bn(self.conv(x))


class SmallKernelStack(nn.Sequential):
    """A baseline of the same multiply-adds: N x N depthwise convolutions one after the other, each with a batch norm.

    There are as many as fit into the 2 M N + N^2 taps of the decomposed layer.
    """

    def __init__(self, channels: int, kernel_size: int, small_kernel: int = 5) -> None:
        count = max(1, (2 * kernel_size * small_kernel + small_kernel**2) // small_kernel**2)
        super().__init__(*(Branch(channels, (small_kernel, small_kernel)) for _ in range(count)))


class MergedTwo(nn.Module):
    """A merged layer in two-kernel form: `dw(x, tall) + dw(x, wide) + bias`."""

    def __init__(self, tall: Tensor, wide: Tensor, bias: Tensor, backend: str = "auto") -> None:
        super().__init__()
        self.tall, self.wide, self.bias = nn.Parameter(tall), nn.Parameter(wide), nn.Parameter(bias)
        self.backend = backend

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Two convolutions and their sum."""
        return large_kernel_pair(x, self.tall, self.wide, self.backend, self.bias)


class MergedOne(nn.Module):
    """A merged layer in one-kernel form, under the released names `lkb_reparam.{weight,bias}`."""

    def __init__(self, kernel: Tensor, bias: Tensor, backend: str = "auto") -> None:
        super().__init__()
        channels, _, kh, kw = kernel.shape
        padding = (kh // 2, kw // 2)
        self.lkb_reparam = nn.Conv2d(channels, channels, (kh, kw), padding=padding, groups=channels, device="meta")
        self.lkb_reparam.weight, self.lkb_reparam.bias = nn.Parameter(kernel), nn.Parameter(bias)
        self.backend = backend

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """One convolution."""
        return large_kernel_dwconv(x.contiguous(), self.lkb_reparam.weight, self.backend, self.lkb_reparam.bias)


class _ContiguousGradient(torch.autograd.Function):
    """The identity. Blocks go on in channels-last, so their gradient comes back transposed, and each batch norm would
    read it so, several times more slowly than it is copied once.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.contiguous()


def _centred(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The kernel in the centre of a larger one of zeros."""
    rows, columns = (size[0] - kernel.shape[2]) // 2, (size[1] - kernel.shape[3]) // 2
    return F.pad(kernel, (columns, columns, rows, rows))


def merge_large_kernels(model: nn.Module, form: Form = "two") -> nn.Module:
    """Replace every `LargeKernel` inside the model, in place, by its merged form, and put the model in eval mode.

    Exact in eval mode (section 2.2); training cannot go on afterwards. Copy the model first to keep it.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, LargeKernel):
                setattr(module, name, child.merged(form))
    return model.eval()
