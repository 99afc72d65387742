"""SLaK (section 2.3): the ConvNeXt layout around the large-kernel layer, and the variants of the paper (section 3)."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tenfold_slak.layer import DilatedKernel, LargeKernel, SmallKernelStack

SPARSE_WIDTH = 1.3


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """Layer norm over the channels at every position of (B, C, H, W) maps."""

    def forward(
        self, input: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalise over axis 1, with the biased variance."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Drops the residual branch of whole samples and rescales the rest (timm's is not imported: it costs seconds)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Identity in eval mode; otherwise each sample is kept with probability 1 - rate."""
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """`x + DropPath(gamma * Linear(GELU(Linear(LN(LK(x))))))`, the Linears on channels-last maps."""

    def __init__(
        self, channels: int, large_kernel: nn.Module, drop_path_rate: float = 0.0, layer_scale_init: float = 1e-6
    ) -> None:
        super().__init__()
        self.large_kernel = large_kernel
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), float(layer_scale_init))) if layer_scale_init > 0 else None
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """The residual block."""
        h = self.large_kernel(x).permute(0, 2, 3, 1)
        h = self.pwconv2(self.act(self.pwconv1(self.norm(h))))
        if self.gamma is not None:
            h = self.gamma * h
        return x + self.drop_path(h.permute(0, 3, 1, 2))


class _StatisticsKept(contextlib.AbstractContextManager[None]):
    """Batch norms leave their running statistics as they are: the batch of a recomputation is in them already."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm)]

    def __enter__(self) -> None:
        self.kept = [(norm.momentum, norm.num_batches_tracked) for norm in self.norms]
        for norm in self.norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    contexts = contextlib.nullcontext(), _StatisticsKept(block)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: contexts)


class SLaK(nn.Module):
    """The Sparse Large Kernel Network; parameters carry the released names.

    Args:
        in_chans: channels of the images.
        num_classes: 0 leaves the head out.
        depths: blocks of the stages: four in the paper.
        dims: base widths; stage i has `int(dims[i] * width_factor)` channels (truncated, as in the paper's networks).
        width_factor: 1.3 for the sparse networks.
        kernel_sizes: M of the stages, odd.
        small_kernel: N; at least M in all stages gives the ConvNeXt mode (one kernel, no small branch).
        decomposed: two M x N rectangles for one M x M square.
        layer: what the blocks begin with: the paper's layer, or one that reaches equally far at a like cost by
            dilation (`dilated`) or by depth (`stack`).
        stem_stride: side and stride of the first convolution, pixels; 4 in the paper.
        bn: batch norms in the large-kernel layers.
        drop_path_rate: of the last block; earlier ones rise linearly from 0.
        layer_scale_init: initial gamma; 0 leaves gamma out.
        head_init_scale: multiplies the initial head.
        init_std: of the initial weights; 0 scales them by their fan-in as PyTorch does, which suits narrow networks.
        drop_rate: dropout before the head.
        global_pool: `avg`, or an empty string to keep the map in `forward_head`.
        backend: of `large_kernel_dwconv`.

    Raises:
        ValueError: depths, dims and kernel_sizes differ in number; a kernel is even or smaller than the small one.

    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        width_factor: float = 1.0,
        kernel_sizes: Sequence[int] = (51, 49, 47, 13),
        small_kernel: int = 5,
        decomposed: bool = True,
        layer: Literal["large", "dilated", "stack"] = "large",
        stem_stride: int = 4,
        bn: bool = True,
        drop_path_rate: float = 0.0,
        layer_scale_init: float = 1e-6,
        head_init_scale: float = 1.0,
        init_std: float = 0.02,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 < len(depths) == len(dims) == len(kernel_sizes):
            raise ValueError(
                f"each stage has one entry in depths, dims and kernel_sizes; got {len(depths)}, {len(dims)} and "
                f"{len(kernel_sizes)}"
            )
        if layer not in {"large", "dilated", "stack"}:
            raise ValueError(f"unknown layer {layer!r}: choose large, dilated or stack")
        widths = [int(dim * width_factor) for dim in dims]
        if min(*widths, stem_stride, in_chans) < 1 or min(*depths, num_classes) < 0 or not 0 <= drop_path_rate < 1:
            raise ValueError(
                f"widths, stem_stride and in_chans are 1 or more, depths and num_classes 0 or more, drop_path_rate in "
                f"[0, 1); got {widths}, {stem_stride}, {in_chans}, {list(depths)}, {num_classes}, {drop_path_rate}"
            )
        self.depths, self.widths, self.kernel_sizes = tuple(depths), tuple(widths), tuple(kernel_sizes)
        self.num_classes, self.num_features, self.head_hidden_size = num_classes, widths[-1], widths[-1]
        self.drop_rate, self.global_pool, self.grad_checkpointing = drop_rate, global_pool, False
        self.stem_stride = stem_stride
        self.feature_info = [
            {"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            for i, width in enumerate(widths)
        ]
        patches = nn.Conv2d(in_chans, widths[0], stem_stride, stem_stride)
        stem = nn.Sequential(patches, ChannelsFirstLayerNorm(widths[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in pairwise(widths):
            norm = ChannelsFirstLayerNorm(before, eps=1e-6)
            self.downsample_layers.append(nn.Sequential(norm, nn.Conv2d(before, after, 2, 2)))

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), dtype=torch.float64, device="cpu").tolist())
        self.stages = nn.ModuleList()
        for width, depth, kernel in zip(widths, depths, kernel_sizes, strict=True):
            blocks = []
            for _ in range(depth):
                if layer == "large":
                    first: nn.Module = LargeKernel(width, kernel, small_kernel, decomposed, bn, backend)
                else:
                    first = (DilatedKernel if layer == "dilated" else SmallKernelStack)(width, kernel, small_kernel)
                blocks.append(Block(width, first, next(rates), layer_scale_init))
            self.stages.append(nn.Sequential(*blocks))

        self.norm: nn.Module = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes) if num_classes > 0 else nn.Identity()
        self.init_std = init_std
        self.apply(self._initialise)
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)
                self.head.bias.mul_(head_init_scale)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch *classes"]:
        """Class scores of images of at least 32 x 32 pixels (the last stage needs at least one position)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch features h w"]:
        """The map after the last stage, 1/32 of the image's size.

        Raises:
            ValueError: the image is smaller than one position of the last stage.

        """
        return self._stages(x)[-1]

    def forward_head(
        self, x: Float[Tensor, "batch features h w"], pre_logits: bool = False
    ) -> Float[Tensor, "batch *rest"]:
        """Global mean, layer norm, dropout, head."""
        x = self.norm(x.mean((2, 3)) if self.global_pool else x.permute(0, 2, 3, 1))
        x = F.dropout(x, self.drop_rate, self.training)
        if not pre_logits:
            x = self.head(x)
        return x if self.global_pool else x.permute(0, 3, 1, 2)

    def _initialise(self, module: nn.Module) -> None:
        """Truncated normal (cut at ±2) for convolutions and Linears, zero biases."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            if self.init_std:
                nn.init.trunc_normal_(module.weight, std=self.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def minimum_size(self) -> int:
        """The smallest side of an image that leaves every stage a position, pixels."""
        return self.stem_stride * 2 ** (len(self.stages) - 1)

    def _stages(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        last = len(self.stages) - 1 if last is None else last
        minimum = self.stem_stride * 2**last
        if not torch.jit.is_tracing() and min(x.shape[-2:]) < minimum:
            raise ValueError(f"SLaK needs images of at least {minimum} x {minimum} pixels; got {tuple(x.shape[-2:])}")
        maps = []
        for downsample, stage in zip(self.downsample_layers[: last + 1], self.stages[: last + 1], strict=False):
            x = downsample(x)
            for block in stage.children():
                recompute = self.grad_checkpointing and self.training
                x = _checkpointed(block, x) if recompute else block(x)
            maps.append(x)
        return maps

    # The names below are timm's.

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps after the chosen stages (`indices`: their numbers, or how many of the last ones; all by default), and
        unless `intermediates_only` the last map too.

        Raises:
            ValueError: there is no such stage, or maps in another layout than NCHW are asked for.

        """
        if output_fmt != "NCHW":
            raise ValueError(f"SLaK's feature maps are NCHW; got output_fmt={output_fmt!r}")
        chosen = self._stage_indices(indices)
        maps = self._stages(x, max(chosen) if stop_early or intermediates_only else None)
        if norm and len(maps) == len(self.stages):
            maps[-1] = self.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        picked = [maps[i] for i in chosen]
        return picked if intermediates_only else (maps[-1], picked)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one asked for, and the head."""
        chosen = self._stage_indices(indices)
        self.stages = self.stages[: max(chosen) + 1]
        self.downsample_layers = self.downsample_layers[: max(chosen) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return chosen

    def _stage_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.stages)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            indices = range(-indices, 0)
        if not all(-count <= i < count for i in indices):
            raise ValueError(f"there are {count} stages, 0 to {count - 1}; got indices {list(indices)}")
        return [i % count for i in indices]

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for another number of classes; 0 removes it."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        like = self.downsample_layers[0][0].weight  # type: ignore[index]
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else None
        self.head = nn.Identity() if head is None else head.apply(self._initialise)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their maps."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Nothing beyond the 1-D parameters that the optimiser's groups exclude anyway."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for timm's optimiser factory."""
        stem = r"^downsample_layers\.0\."
        if coarse:
            return {"stem": stem, "blocks": r"^(?:stages|downsample_layers)\.(\d+)"}
        blocks = [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": stem, "blocks": blocks}


@dataclass(frozen=True)
class Variant:
    """One named network: constructor arguments and what it is."""

    arguments: dict[str, Any]
    description: str


_TINY: dict[str, Any] = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}
_SMALL: dict[str, Any] = {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)}
_BASE: dict[str, Any] = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}
_LARGE: dict[str, Any] = {"depths": (3, 3, 27, 3), "dims": (192, 384, 768, 1536)}
_WIDE = {"width_factor": SPARSE_WIDTH}
_CONVNEXT_MODE = {"kernel_sizes": (7, 7, 7, 7), "small_kernel": 100, "decomposed": False}
_KERNELS = {31: (31, 29, 27, 13), 51: (51, 49, 47, 13), 61: (61, 59, 57, 13)}

#: Every network by its timm name (table of section 3).
VARIANTS: dict[str, Variant] = {
    "slak_tiny": Variant({**_TINY, **_WIDE}, "SLaK-T, 51x51 decomposed, 1.3x wide (train it 40 % sparse)"),
    "slak_small": Variant({**_SMALL, **_WIDE}, "SLaK-S, 51x51 decomposed, 1.3x wide (train it 40 % sparse)"),
    "slak_base": Variant({**_BASE, **_WIDE}, "SLaK-B, 51x51 decomposed, 1.3x wide (train it 40 % sparse)"),
    "slak_large": Variant({**_LARGE, **_WIDE}, "SLaK-L, named in the released code without results"),
    "slak_tiny_31": Variant({**_TINY, **_WIDE, "kernel_sizes": _KERNELS[31]}, "SLaK-T with 31x31 kernels"),
    "slak_tiny_61": Variant({**_TINY, **_WIDE, "kernel_sizes": _KERNELS[61]}, "SLaK-T with 61x61 kernels"),
    "slak_tiny_narrow": Variant(_TINY, "SLaK-T at 1.0x width: decomposed 51x51, meant dense"),
    "slak_tiny_narrow_31": Variant({**_TINY, "kernel_sizes": _KERNELS[31]}, "the same with 31x31 kernels"),
    "slak_tiny_narrow_61": Variant({**_TINY, "kernel_sizes": _KERNELS[61]}, "the same with 61x61 kernels"),
    "replknet_tiny_31": Variant(
        {**_TINY, "kernel_sizes": _KERNELS[31], "decomposed": False}, "RepLKNet style: dense 31x31 + 5x5, 1.0x"
    ),
    "replknet_tiny_51": Variant({**_TINY, "decomposed": False}, "RepLKNet style: dense 51x51 + 5x5, 1.0x"),
    "replknet_tiny_61": Variant(
        {**_TINY, "kernel_sizes": _KERNELS[61], "decomposed": False}, "RepLKNet style: dense 61x61 + 5x5, 1.0x"
    ),
    "slak_tiny_convnext": Variant({**_TINY, **_CONVNEXT_MODE}, "ConvNeXt mode, tiny: dense 7x7 + batch norm"),
    "slak_small_convnext": Variant({**_SMALL, **_CONVNEXT_MODE}, "ConvNeXt mode, small: dense 7x7 + batch norm"),
    "slak_base_convnext": Variant({**_BASE, **_CONVNEXT_MODE}, "ConvNeXt mode, base: dense 7x7 + batch norm"),
}


def create(name: str, **overrides: Any) -> SLaK:
    """Build a network of `VARIANTS` without timm; keyword arguments replace those of the variant.

    Raises:
        ValueError: the name is unknown, or an argument is.

    """
    if name not in VARIANTS:
        raise ValueError(f"unknown SLaK variant {name!r}: choose one of {', '.join(VARIANTS)}")
    try:
        return SLaK(**{**VARIANTS[name].arguments, **overrides})
    except TypeError as error:
        raise ValueError(f"{name} does not take these arguments ({error})") from error
