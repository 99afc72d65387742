"""stub"""
import dataclasses
@dataclasses.dataclass
class Segmentation:
    """Seg."""
    crop: int = 512
    """c"""
def run_segmentation(run, recipe): ...
