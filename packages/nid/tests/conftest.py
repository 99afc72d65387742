"""Where the numeric fixtures lie; the helpers in this folder are importable."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
PARITY_DIR = Path(os.environ.get("TENFOLD_PARITY_DIR", Path(__file__).parent / "parity"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
