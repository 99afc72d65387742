"""Without a GPU, Triton's kernels run in its interpreter; the variable must be set before Triton is imported. The helpers
in this folder are importable.
"""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm's mixup draws from it
    torch.manual_seed(0)
