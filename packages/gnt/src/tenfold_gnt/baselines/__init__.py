"""What GNT is compared with (section 8): volume rendering, one-stage attention, IBRNet, NeRF, floors."""

from tenfold_gnt.baselines.floors import mean_view, nearest_view
from tenfold_gnt.baselines.ibrnet import IBRNet
from tenfold_gnt.baselines.nerf import NeRF
from tenfold_gnt.baselines.one_stage import OneStageTransformer
from tenfold_gnt.baselines.volume import VolumeRenderedGNT, composite

__all__ = ["IBRNet", "NeRF", "OneStageTransformer", "VolumeRenderedGNT", "composite", "mean_view", "nearest_view"]
