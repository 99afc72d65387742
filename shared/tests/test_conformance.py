"""The conformance suite, proved on a package in the tenfold pattern that lies beside this file."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

TOY = str(Path(__file__).parent / "toy")
sys.path.insert(0, TOY)

from tenfold_shared.testing import TIMEOUT, Conformance, Finished  # noqa: E402


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

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_stopped_reproduction_leaves_no_process(self, tmp_path: Path, number: signal.Signals) -> None:
        """The runs under way are saved, those that wait are not begun, and idle workers end too."""
        process = self.start(
            tmp_path, "reproduce", "takes-long", "--jobs", "2", "--device", "cpu", "--checkpoint-every", "1"
        )
        runs = tmp_path / "runs" / "toy" / "reproduce-takes-long" / "runs"
        for _ in range(10 * TIMEOUT):
            if len(list(runs.glob("*/checkpoints/state.pt"))) == 2 or process.poll() is not None:
                break
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT)
        self.refused(Finished(process.returncode, out, err), 128 + number, "--resume")
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
        assert len(list(runs.iterdir())) == 2
