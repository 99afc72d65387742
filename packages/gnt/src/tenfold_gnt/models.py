"""The networks by name: the paper's, its ablations and what it is compared with (section 8)."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_gnt.baselines import IBRNet, NeRF, OneStageTransformer, VolumeRenderedGNT
from tenfold_gnt.features import FeatureMaps, InstanceNorm, ResUNet, join, refuse_small
from tenfold_gnt.network import GNT
from tenfold_gnt.render import Model
from tenfold_shared.errors import UserError

NetworkName = Literal["gnt", "volren", "dot", "one-stage", "ibrnet", "nerf"]


@dataclass
class NetworkConfig:
    """What renders."""

    name: NetworkName = "gnt"
    """gnt; volren: volume rendering in place of the ray transformer; dot: dot-product view attention; one-stage: one
    transformer over all tokens; ibrnet and nerf: earlier methods."""
    width: int = 64
    """Width of the tokens; ibrnet and nerf have their published sizes."""
    depth: int = 4
    """Pairs of view and ray blocks: 4 for single scenes, 8 across scenes; not of ibrnet and nerf."""
    dropout: float = 0.1
    """In all blocks; not of ibrnet and nerf."""
    features: Literal["resunet", "small"] = "resunet"
    """Feature network: the paper's, or the miniature's."""
    channels: int = 32
    """Channels of a feature map."""
    fine: bool = False
    """A second network (and feature map) for the importance pass."""
    position_every: int = 2
    """gnt, volren, dot: positions join the tokens after every n-th view block: 2 as released, 1 as in the paper."""
    double_projection: bool = True
    """gnt, volren: values of the view attention are projected from the keys, as released; otherwise from the features."""

    def __post_init__(self) -> None:
        """Refuse networks that cannot be."""
        if self.width < 8 or self.width % 8 or self.depth < 1:
            raise UserError(
                f"--network.width takes a multiple of 8 and --network.depth 1 or more, got {self.width} and {self.depth}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"--network.dropout lies in [0, 1), got {self.dropout}")
        if self.position_every < 1 or self.channels < 1:
            raise UserError("--network.position_every and --network.channels take 1 or more")


class SmallUNet(nn.Module):
    """The miniature's feature network: 3 -> 16 -> 32 (stride 2) -> 32 -> 64 (stride 2) -> 32, up, joined; half size.

    69,936 parameters with 32 channels.
    """

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        sizes = ((3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 32, 1))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 3, s, 1, bias=False, padding_mode="reflect") for i, o, s in sizes
        )
        self.norms = nn.ModuleList(InstanceNorm(o) for _, o, _ in sizes)
        self.head = nn.Conv2d(64, channels, 3, 1, 1, padding_mode="reflect")

    def forward(self, images: Float[Tensor, "views 3 height width"]) -> FeatureMaps:
        """Maps of half the size; images of sides below 5 are refused."""
        refuse_small(images, 5)
        x, skip = images, images
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.relu(norm(convolution(x)))
            if number == 2:
                skip = x
        up = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = self.head(join(up, skip))
        return FeatureMaps(x, x)


class NoFeatures(nn.Module):
    """Maps without channels, for networks that do not look at the sources' features."""

    def forward(self, images: Float[Tensor, "views 3 height width"]) -> FeatureMaps:
        """The images' first zero channels."""
        return FeatureMaps(images[:, :0], images[:, :0])


def create_model(config: NetworkConfig) -> Model:
    """The network of a configuration with its feature network.

    Raises:
        UserError: a combination that does not exist.

    """
    if config.name == "nerf":
        return Model(NoFeatures(), NeRF(), NeRF() if config.fine else None)
    fine = _network(config) if config.fine else None
    if config.features == "small":
        if config.fine:
            raise UserError("--network.features small has one map: use --network.fine false")
        return Model(SmallUNet(config.channels), _network(config))
    return Model(ResUNet(config.channels, config.channels, single_net=not config.fine), _network(config), fine)


def _network(config: NetworkConfig) -> nn.Module:
    shape = {"width": config.width, "depth": config.depth, "feature_channels": config.channels}
    if config.name == "ibrnet":
        return IBRNet(config.channels)
    if config.name == "one-stage":
        return OneStageTransformer(**shape, dropout=config.dropout)
    kind = VolumeRenderedGNT if config.name == "volren" else GNT
    return kind(
        **shape,
        dropout=config.dropout,
        position_every=config.position_every,
        double_projection=config.double_projection,
        view_attention="dot" if config.name == "dot" else "subtraction",
    )
