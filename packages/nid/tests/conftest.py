"""Where the numeric fixtures lie."""

import os
from pathlib import Path

import pytest
import torch

PARITY_DIR = Path(os.environ.get("TENFOLD_PARITY_DIR", Path(__file__).parent / "parity"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
