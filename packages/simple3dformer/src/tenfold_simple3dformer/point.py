"""Simple3D-Former on points (section 2.7): classification of clouds, segmentation of parts and scenes."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from tenfold_shared.errors import UserError
from tenfold_simple3dformer.abstraction import LocalOperator, SetAbstraction, TransitionUp, two_layers
from tenfold_simple3dformer.backbone import prefix_length, run_blocks, strip_image_path, width
from tenfold_simple3dformer.heads import create_head
from tenfold_simple3dformer.pointops import check_points

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

RELEASED_PRESETS = {
    "3DViT": {"ratios": (1, 4), "image_path": False},
    "3DViT_LWF": {"ratios": (4, 16), "image_path": True},
    "3DViT_1_layer": {"ratios": (4,), "image_path": True},
    "3DViT_0_layer": {"ratios": (), "image_path": True},
}
"""Released model name -> where its stages sample (N divided by the ratio), and whether it keeps the image path."""


class PointFormer(nn.Module):
    """A ViT whose tokens are neighbourhoods of a point cloud.

    The input level is MLP(point) + MLP(coordinates); each stage halves nothing but the number of points and doubles the
    width, up to the backbone's; the blocks run on the last stage's points; transitions bring them back to all points.

    Args:
        vit: the backbone.
        inputs: channels of a point, coordinates first.
        classes: of the 3D task.
        task: ``cls`` (mean over the points, then the head) or ``seg`` (the head on every point).
        ratios: one entry a stage (none, one or two): N / ratio points remain.
        neighbours: of the set abstraction.
        image_path: keep the backbone's patch embedding, positions and image head for `forward_images`.
        head: ``linear`` or ``cosine``.
        start: where farthest-point sampling begins: ``first`` or ``random`` (as released, in evaluation too).
        points: the release fixes the number of points when it is built; 0 follows the input.
        tokenizer: ``abstraction`` (set abstraction) or ``local_op``, which replaces the only stage.

    """

    def __init__(
        self,
        vit: "VisionTransformer",
        inputs: int,
        classes: int,
        task: Literal["cls", "seg"] = "cls",
        *,
        ratios: Sequence[int] = (1, 4),
        neighbours: int = 16,
        image_path: bool = False,
        head: Literal["linear", "cosine"] = "linear",
        start: Literal["first", "random"] = "first",
        points: int = 0,
        tokenizer: Literal["abstraction", "local_op"] = "abstraction",
    ):
        super().__init__()
        stages, c = len(ratios), width(vit)
        if stages > 2 or c % 2**stages:
            raise UserError(f"{stages} stages and width {c}: 0, 1 or 2 stages, and a width that halves that often")
        if inputs < 3:
            raise UserError(f"a point has at least its 3 coordinates, got {inputs} channels")
        if tokenizer == "local_op" and stages != 1:
            raise UserError("the local operator is one stage: give one ratio (--model.preset 3DViT_1_layer)")
        self.task, self.inputs, self.classes, self.ratios = task, inputs, classes, tuple(ratios)
        self.start, self.points, self.image_path = start, points, image_path
        self.vit = vit if image_path else strip_image_path(vit)
        widths = [c // 2 ** (stages - i) for i in range(stages + 1)]
        e = widths[0]
        self.embed = two_layers(inputs, e)
        self.position = two_layers(3, e)
        self.downs = nn.ModuleList(
            LocalOperator(e, b) if tokenizer == "local_op" else SetAbstraction(0, neighbours, [a + 3, b, b])
            for a, b in itertools.pairwise(widths)
        )
        # From the coarsest: TU(4e, 2e -> 2e) with the first stage's features, then TU(2e, e -> e) with the points'.
        self.ups = nn.ModuleList(TransitionUp(b, a, a) for a, b in reversed(list(itertools.pairwise(widths))))
        self.head = create_head(head, e, classes)

    def tokens(
        self, points: Float[Tensor, "b n d"], starts: Sequence[Int[Tensor, " b"]] | None = None
    ) -> tuple[list[Float[Tensor, "b _s 3"]], list[Float[Tensor, "b _s _c"]]]:
        """Coordinates and features of all levels, the input level first; the last are the tokens.

        Args:
            points: (B, N, inputs).
            starts: the first index of farthest-point sampling, for each stage and cloud.

        Raises:
            UserError: the points do not have the channels, or there are fewer than the stages need.

        """
        if points.shape[-1] != self.inputs:
            raise UserError(f"the network takes points of {self.inputs} channels, got {points.shape[-1]}")
        n = self.points or points.shape[1]
        if points.shape[1] < max([*self.ratios, 1]):
            raise UserError(f"{points.shape[1]} points are too few: the stages keep one in {max(self.ratios)}")
        xyz = points[..., :3].contiguous()
        places, features = [xyz], [self.embed(points) + self.position(xyz)]
        for level, (ratio, down) in enumerate(zip(self.ratios, self.downs, strict=True)):
            count = min(max(1, n // ratio), places[-1].shape[1])
            start = self.start if starts is None else starts[level]
            centres, reduced = down(places[-1], features[-1], start, count)
            places.append(centres)
            features.append(reduced)
        return places, features

    def point_features(
        self, points: Float[Tensor, "b n d"], starts: Sequence[Int[Tensor, " b"]] | None = None
    ) -> Float[Tensor, "b n e"]:
        """Features of every input point, after the blocks and the way back up."""
        places, features = self.tokens(points, starts)
        current = run_blocks(self.vit, features[-1])[:, prefix_length(self.vit) :]
        for level, up in zip(range(len(self.ups) - 1, -1, -1), self.ups, strict=True):
            current = up(places[level + 1], current, places[level], features[level])
        return current

    def forward(
        self,
        points: Float[Tensor, "b n d"],
        images: Float[Tensor, "u ch h w"] | None = None,
        starts: Sequence[Int[Tensor, " b"]] | None = None,
    ) -> Float[Tensor, "b *n k"] | tuple[Float[Tensor, "b *n k"], Float[Tensor, "u m"]]:
        """Logits: (B, classes) of clouds, or (B, N, classes) of points; with images, also theirs."""
        features = self.point_features(points, starts)
        logits = self.head(features.mean(1) if self.task == "cls" else features)
        return logits if images is None else (logits, self.forward_images(images))

    def forward_images(self, images: Float[Tensor, "b ch h w"]) -> Float[Tensor, "b m"]:
        """The 2D network that the blocks came from.

        Raises:
            UserError: the network was built without its image path.

        """
        if not self.image_path:
            raise UserError("this network was built without its image path (image_path), which images need")
        return self.vit(images)


def check_cloud(points: Float[Tensor, "*b n c"], model: PointFormer) -> None:
    """Refuse a cloud that the network cannot take; see `check_points`."""
    check_points(points, least=max([*model.ratios, 1]))
