"""stub"""
import dataclasses
@dataclasses.dataclass
class Detection:
    """Seg."""
    crop: int = 512
    """c"""
def run_detection(run, recipe): ...
