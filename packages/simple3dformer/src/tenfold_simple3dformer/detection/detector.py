"""The detector (section 2.8): points -> pre-encoder -> image transformer -> decoder -> boxes; and the 3DETR baselines."""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from tenfold_shared.errors import UserError
from tenfold_simple3dformer.abstraction import SetAbstraction
from tenfold_simple3dformer.backbone import prefix_length, run_blocks, strip_image_path
from tenfold_simple3dformer.backbone import width as _width
from tenfold_simple3dformer.detection.criterion import Prediction, Scene
from tenfold_simple3dformer.detection.transformer import ConvolutionHead, Decoder, Encoder, FourierEmbedding
from tenfold_simple3dformer.pointops import farthest_point_sampling, gather_points

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

MASKED_RADII = (0.16, 0.64, 1.44)
"""3DETR-m: squared radii of the encoder's layers."""


class Detector(nn.Module):
    """Boxes of a scene from the coordinates of its points.

    Args:
        vit: the image transformer as the encoder, or None for the 3DETR baseline's three layers of width 256.
        classes: classes of objects.
        centres: of the pre-encoder.
        queries: boxes predicted.
        layers: of the decoder.
        reduce: a second set abstraction to that many tokens (radius 0.4, 32 samples); 0: none.
        masked: 3DETR-m, attention of the baseline's encoder limited by distance.
        width: of the decoder, and of the baseline's encoder.
        bins: of the angle.
        radius: of the pre-encoder, metres.
        samples: of the pre-encoder.

    """

    def __init__(
        self,
        vit: "VisionTransformer | None",
        classes: int = 10,
        *,
        centres: int = 2048,
        queries: int = 128,
        layers: int = 8,
        reduce: int = 0,
        masked: bool = False,
        width: int = 256,
        bins: int = 12,
        radius: float = 0.2,
        samples: int = 64,
    ):
        super().__init__()
        self.classes, self.queries = classes, queries
        self.vit = None if vit is None else strip_image_path(vit)
        tokens = width if vit is None else _width(vit)
        self.pre = SetAbstraction(centres, samples, [3, 64, 128, tokens], radius=radius)
        self.reduce = SetAbstraction(reduce, 32, [tokens + 3, tokens, tokens], radius=2 * radius) if reduce else None
        if vit is None:
            self.encoder: nn.Module = Encoder(width, 4, 128, 3, radii=MASKED_RADII if masked else ())
        else:
            self.encoder = nn.Linear(tokens, width)
        stages = [
            layer
            for _ in range(3)
            for layer in (nn.Conv1d(width, width, 1, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        ]
        self.projection = nn.Sequential(*stages)
        self.fourier = FourierEmbedding(width)
        self.query = nn.Sequential(nn.Conv1d(width, width, 1), nn.ReLU(), nn.Conv1d(width, width, 1), nn.ReLU())
        self.decoder = Decoder(width, 4, 256, layers)
        self.heads = nn.ModuleDict(
            {
                name: ConvolutionHead(width, out)
                for name, out in {"cls": classes + 1, "center": 3, "size": 3, "angle": bins, "residual": bins}.items()
            }
        )

    def encode(self, xyz: Float[Tensor, "b n 3"]) -> tuple[Float[Tensor, "b s 3"], Float[Tensor, "b s c"]]:
        """Places and features of the encoder's tokens."""
        if self.reduce is not None and self.reduce.count > self.pre.count:
            raise UserError(f"a second stage of {self.reduce.count} tokens needs more than {self.pre.count} before it")
        places, features = self.pre(xyz)
        if self.vit is None:
            return places, self.encoder(features.transpose(0, 1), places).transpose(0, 1)
        if self.reduce is not None:
            places, features = self.reduce(places, features)
        return places, self.encoder(run_blocks(self.vit, features)[:, prefix_length(self.vit) :])

    def forward(self, xyz: Float[Tensor, "b n 3"], scene: Scene | None = None) -> list[Prediction]:
        """Predictions of every decoder layer, the last one last. The scene's bounds are those of its points by default.

        Raises:
            UserError: fewer points than the pre-encoder has centres, or fewer tokens than queries.

        """
        if xyz.shape[1] < self.pre.count:
            raise UserError(f"a scene of {xyz.shape[1]} points is too small: {self.pre.count} centres are sampled")
        scene = scene or bounds(xyz)
        places, features = self.encode(xyz)
        if places.shape[1] < self.queries:
            raise UserError(
                f"{places.shape[1]} tokens are fewer than the {self.queries} queries: lower --model.queries"
            )
        memory = self.projection(features.transpose(1, 2)).permute(2, 0, 1)
        position = self.fourier(places, *scene).permute(2, 0, 1).to(memory.dtype)
        where = gather_points(places, farthest_point_sampling(places, self.queries))
        query = self.query(self.fourier(where, *scene).to(memory.dtype)).permute(2, 0, 1)
        outputs = self.decoder(memory, query, position)
        layers, q, batch, c = outputs.shape
        flat = outputs.permute(0, 2, 3, 1).reshape(layers * batch, c, q)  # the heads are shared over the layers
        raw = {name: head(flat).float().transpose(1, 2).view(layers, batch, q, -1) for name, head in self.heads.items()}
        return [self._decoded({name: values[i] for name, values in raw.items()}, where, scene) for i in range(layers)]

    def _decoded(self, raw: dict[str, Tensor], where: Tensor, scene: Scene) -> Prediction:
        """Centre = query + sigmoid - 0.5 (metres); size = sigmoid x scene extent."""
        centre = where + raw["center"].sigmoid() - 0.5
        size = raw["size"].sigmoid() * scene.extent[:, None]
        return Prediction(raw["cls"], centre, size, raw["angle"], raw["residual"])


def bounds(xyz: Float[Tensor, "b n 3"]) -> Scene:
    """The bounds of the points."""
    return Scene(xyz.amin(1), xyz.amax(1))
