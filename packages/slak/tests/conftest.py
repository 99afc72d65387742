"""Without a GPU, Triton's kernels run in its interpreter; the variable must be set before Triton is imported."""

import os
import random

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm's mixup draws from it
    torch.manual_seed(0)
