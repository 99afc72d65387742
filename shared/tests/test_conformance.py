"""The conformance suite, proved on a package in the tenfold pattern that lies beside this file."""

import os
import sys
from pathlib import Path

import pytest

TOY = str(Path(__file__).parent / "toy")
sys.path.insert(0, TOY)

from tenfold_shared.testing import Conformance  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _toy_is_importable() -> None:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TOY, before]))
    yield
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


class TestConformance(Conformance):
    """The toy's arguments."""

    package = "tenfold_toy"
    train = ["--config", "clouds", "--pause", "0.05"]
    reproduce = ["--seeds", "2"]
    needs_data = ["--config", "elsewhere"]

    def test_numerical_failure(self, tmp_path: Path) -> None:
        """A loss that turns NaN stops the run with the step and the term; the last good checkpoint stays."""
        done = self.call(tmp_path, *self.train_arguments("nan", "--nan_at", "15"))
        self.refused(done, 1, "loss became nan", "step 15", "phase train")
        assert (self.checkpoints(tmp_path, "nan") / "state.pt").exists()
