"""Segmentation and detection on SLaK without the mm-stacks: backbone, UPerNet, torchvision's detectors (section 6)."""

import functools
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_slak.compat import CheckpointError, bare_state, check_state, infer_arguments, read_official, whole_state
from tenfold_slak.models.slak import ChannelsFirstLayerNorm, SLaK


class SLaKBackbone(nn.Module):
    """The four stages' maps at strides 4, 8, 16, 32, each through its own channels-first layer norm `norm0..norm3`.

    Args:
        body: a network; its own last norm and head are not used.
        masks: by parameter name; kept fixed and applied to the weights before each forward, as in the paper's
            fine-tuning.

    """

    def __init__(self, body: SLaK, masks: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.downsample_layers, self.stages = body.downsample_layers, body.stages
        self.widths = body.widths
        for i, width in enumerate(body.widths):
            self.add_module(f"norm{i}", ChannelsFirstLayerNorm(width, eps=1e-6))
        self._masks = dict(masks or {})

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> "OrderedDict[str, Tensor]":
        """Maps by name `0`..`3`, finest first."""
        self.apply_masks()
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = stage(downsample(x))
            maps[str(i)] = self.get_submodule(f"norm{i}")(x)
        return maps

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Zero the masked weights."""
        parameters = dict(self.named_parameters())
        for name in self._masks.keys() & parameters.keys():  # the zeros of a merged layer are in its merged kernels
            parameters[name].mul_(self._masks[name].to(parameters[name].device))

    def load(self, source: Path | str | Mapping[str, Any], sparse: bool = True) -> "SLaKBackbone":
        """Released weights: an ImageNet classifier's (its norm and head are left out) or a downstream backbone's.

        Args:
            source: a file, or what was read from one.
            sparse: keep the zero weights at zero from now on; files do not store masks, so they are read off the zeros.

        Raises:
            CheckpointError: keys do not fit, they are listed.

        """
        state = read_official(source) if isinstance(source, str | Path) else bare_state(source)
        own = self.state_dict()
        heads = ("norm.", "head.", "decode_head.", "auxiliary_head.")
        state = {name: value for name, value in state.items() if not name.startswith(heads)}
        norms = {name: value for name, value in own.items() if name.startswith("norm") and name not in state}
        check_state(own, {**state, **norms})
        self.load_state_dict({**state, **norms})
        if sparse:
            self.keep_zeros()
        return self

    def keep_zeros(self) -> None:
        """Take the zeros of the weights for masks."""
        maskable = {name: p for name, p in self.named_parameters() if p.ndim in {2, 4}}
        self._masks = {name: p.detach() != 0 for name, p in maskable.items() if not bool((p != 0).all())}


def _conv_bn(before: int, after: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True))


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid over all, and a 1x1 classifier on their fusion.

    Args:
        widths: channels of the four maps.
        num_classes: classes.
        channels: of the pyramid; the paper uses 512.
        pools: grid sizes of the pyramid pooling.
        dropout: before the classifier, whole channels.

    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        channels: int = 512,
        pools: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.pools = tuple(pools)
        self.pooled = nn.ModuleList([_conv_bn(widths[-1], channels, 1) for _ in pools])
        self.bottleneck = _conv_bn(widths[-1] + len(pools) * channels, channels, 3)
        self.laterals = nn.ModuleList([_conv_bn(width, channels, 1) for width in widths[:-1]])
        self.smooth = nn.ModuleList([_conv_bn(channels, channels, 3) for _ in widths[:-1]])
        self.fuse = _conv_bn(len(widths) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "batch classes height width"]:
        """Scores at the size of the finest map."""
        coarse = maps[-1]
        pooled = [
            _resize(conv(F.adaptive_avg_pool2d(coarse, pool)), coarse.shape[2:])
            for pool, conv in zip(self.pools, self.pooled, strict=True)
        ]
        pyramid = [self.bottleneck(torch.cat([coarse, *pooled], 1))]
        for feature, lateral in zip(reversed(maps[:-1]), reversed(self.laterals), strict=True):
            pyramid.insert(0, lateral(feature) + _resize(pyramid[0], feature.shape[2:]))
        size = pyramid[0].shape[2:]
        smoothed = [conv(level) for conv, level in zip(self.smooth, pyramid[:-1], strict=True)] + [pyramid[-1]]
        fused = self.fuse(torch.cat([_resize(level, size) for level in smoothed], 1))
        return self.classify(self.dropout(fused))


class UPerNet(nn.Module):
    """A SLaK backbone with a UPerNet head and, in training, an auxiliary convolutional head on the third stage.

    Args:
        backbone: its maps feed both heads.
        num_classes: 150 for ADE20K.
        channels: of the main head.
        auxiliary_channels: of the other.
        auxiliary_weight: of its loss.
        ignore_index: label that counts nowhere.

    """

    def __init__(
        self,
        backbone: SLaKBackbone,
        num_classes: int = 150,
        channels: int = 512,
        auxiliary_channels: int = 256,
        auxiliary_weight: float = 0.4,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = UPerHead(backbone.widths, num_classes, channels)
        self.auxiliary_head = nn.Sequential(
            _conv_bn(backbone.widths[2], auxiliary_channels, 3),
            nn.Dropout2d(0.1),
            nn.Conv2d(auxiliary_channels, num_classes, 1),
        )
        self.num_classes, self.auxiliary_weight, self.ignore_index = num_classes, auxiliary_weight, ignore_index

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes height width"]:
        """Scores at the size of the images."""
        return _resize(self.decode_head(list(self.backbone(x).values())), x.shape[2:])

    def loss(self, x: Float[Tensor, "batch channels height width"], labels: Tensor) -> Float[Tensor, ""]:
        """Cross-entropy of the main head plus the weighted one of the auxiliary head.

        Args:
            x: images.
            labels: (B, H, W) integers, `ignore_index` where nothing is known.

        Returns:
            The mean over the known pixels; 0 where there is none.

        """
        maps = list(self.backbone(x).values())
        main = _resize(self.decode_head(maps), x.shape[2:])
        auxiliary = _resize(self.auxiliary_head(maps[2]), x.shape[2:])
        known = (labels != self.ignore_index).sum().clamp(min=1)  # PyTorch's mean over no pixel is not a number
        main_loss, auxiliary_loss = (
            F.cross_entropy(scores, labels, ignore_index=self.ignore_index, reduction="sum") / known
            for scores in (main, auxiliary)
        )
        return main_loss + self.auxiliary_weight * auxiliary_loss

    @torch.inference_mode()
    def slide(
        self, x: Float[Tensor, "batch channels height width"], window: int = 512, stride: int = 341
    ) -> Float[Tensor, "batch classes height width"]:
        """Mean of the scores of overlapping windows that cover the image, as in the paper's evaluation.

        Raises:
            ValueError: the stride is larger than the window, so that pixels would lie in none.

        """
        if stride > window:
            raise ValueError(
                f"windows of {window} pixels every {stride} leave pixels out: the stride is at most the window"
            )
        height, width = x.shape[2:]
        total = x.new_zeros(x.shape[0], self.num_classes, height, width)
        count = x.new_zeros(1, 1, height, width)
        for top in _starts(height, window, stride):
            for left in _starts(width, window, stride):
                area = (..., slice(top, min(top + window, height)), slice(left, min(left + window, width)))
                total[area] += self(x[area])
                count[area] += 1
        return total / count


#: Names of mmsegmentation's UPerNet and ours; a block is `conv` and `bn` there, a sequence here.
_MMSEG = (
    (r"^decode_head\.psp_modules\.(\d+)\.1\.", r"decode_head.pooled.\1."),
    (r"^decode_head\.lateral_convs\.", "decode_head.laterals."),
    (r"^decode_head\.fpn_convs\.", "decode_head.smooth."),
    (r"^decode_head\.fpn_bottleneck\.", "decode_head.fuse."),
    (r"^decode_head\.conv_seg\.", "decode_head.classify."),
    (r"^auxiliary_head\.convs\.0\.", "auxiliary_head.0."),
    (r"^auxiliary_head\.conv_seg\.", "auxiliary_head.2."),
    (r"^((?:decode|auxiliary)_head\..*)\.conv\.", r"\1.0."),
    (r"^((?:decode|auxiliary)_head\..*)\.bn\.", r"\1.1."),
)


def load_official_segmenter(content: Any, weights: str | None = None) -> UPerNet:
    """A UPerNet with what a released file holds, in mmsegmentation's layout; its sizes are read off the shapes.

    The zeros of its backbone are kept if it is trained on.

    Args:
        content: what was read from the file (`compat.read_content`).
        weights: `model` or `model_ema`; by default those the file has.

    Raises:
        CheckpointError: keys are missing, left over or of another shape; they are listed.

    """
    state = {
        functools.reduce(lambda said, rename: re.sub(rename[0], rename[1], said), _MMSEG, name): value
        for name, value in whole_state(content, weights).items()
    }
    heads = ("decode_head.classify.weight", "auxiliary_head.2.weight")
    if absent := [name for name in heads if name not in state]:
        raise CheckpointError(f"these are not the weights of a UPerNet; missing: {', '.join(absent)}")
    arguments = infer_arguments(bare_state(state))
    (classes, channels), auxiliary = state[heads[0]].shape[:2], state[heads[1]].shape[1]
    model = UPerNet(SLaKBackbone(SLaK(**{**arguments, "num_classes": 0})), classes, channels, auxiliary)
    check_state(model.state_dict(), state)
    model.load_state_dict(state)
    model.backbone.keep_zeros()
    return model


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover the length; the last one ends at its end."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def _fpn(backbone: SLaKBackbone, channels: int) -> nn.Module:
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool  # noqa: PLC0415

    class WithFPN(nn.Module):
        """Five levels, as torchvision's detectors take them."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.out_channels = backbone, channels
            self.fpn = FeaturePyramidNetwork(list(backbone.widths), channels, extra_blocks=LastLevelMaxPool())

        def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
            return self.fpn(self.body(x))

    return WithFPN()


def _in_float32(_: nn.Module, __: Any, output: Any) -> Any:
    """A forward hook: box codes and scores in float32, since torchvision casts boxes to the codes' dtype, and bfloat16
    knows a place near 1000 pixels to 4 only.
    """
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_in_float32(_, __, part) for part in output)


def _precise(model: Any) -> nn.Module:
    """A detector that places boxes in float32 under autocast as well."""
    model.rpn.head.register_forward_hook(_in_float32)
    for predictor in (model.roi_heads.box_predictor, *getattr(model.roi_heads, "stages", ())):
        if predictor is not None:
            predictor.register_forward_hook(_in_float32)
    return model


def faster_rcnn(backbone: SLaKBackbone, num_classes: int, channels: int = 256, **options: Any) -> nn.Module:
    """Torchvision's Faster R-CNN on a five-level pyramid of the backbone (PASCAL VOC).

    Args:
        backbone: see `SLaKBackbone`.
        num_classes: with the background.
        channels: of the pyramid.
        options: of `torchvision.models.detection.FasterRCNN`.

    """
    from torchvision.models.detection import FasterRCNN  # noqa: PLC0415

    return _precise(FasterRCNN(_fpn(backbone, channels), num_classes, **options))


def cascade_mask_rcnn(backbone: SLaKBackbone, num_classes: int, channels: int = 256, **options: Any) -> nn.Module:
    """Cascade Mask R-CNN on a five-level pyramid of the backbone (COCO), the paper's detector.

    Args:
        backbone: see `SLaKBackbone`.
        num_classes: with the background.
        channels: of the pyramid.
        options: of `torchvision.models.detection.MaskRCNN`.

    """
    from tenfold_slak.cascade import cascade_mask_rcnn as build  # noqa: PLC0415 - needs torchvision

    return _precise(build(_fpn(backbone, channels), num_classes, channels, **options))


def mask_rcnn(backbone: SLaKBackbone, num_classes: int, channels: int = 256, **options: Any) -> nn.Module:
    """Torchvision's Mask R-CNN on a five-level pyramid of the backbone (COCO), a simpler head than the paper's.

    Args:
        backbone: see `SLaKBackbone`.
        num_classes: with the background.
        channels: of the pyramid.
        options: of `torchvision.models.detection.MaskRCNN`.

    """
    from torchvision.models.detection import MaskRCNN  # noqa: PLC0415

    return _precise(MaskRCNN(_fpn(backbone, channels), num_classes, **options))
