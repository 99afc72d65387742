"""What Simple3D-Former is compared with (section 8)."""

from tenfold_simple3dformer.baselines.point_transformer import PointTransformer
from tenfold_simple3dformer.baselines.pointnet import PointNet, PointNet2
from tenfold_simple3dformer.baselines.volumes import OccupancyLogistic, VisionPermutator3D, VoxNet

__all__ = ["OccupancyLogistic", "PointNet", "PointNet2", "PointTransformer", "VisionPermutator3D", "VoxNet"]
