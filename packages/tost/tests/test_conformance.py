"""How the command behaves: the suite that every package runs."""

from pathlib import Path

from tenfold_shared.testing import Conformance
from tenfold_tost.cli import COMMANDS


class TestConformance(Conformance):
    """The whole recipe on digits: few steps at a small rate, since rounding grows with the steps."""

    package = "tenfold_tost"
    train = ["--config", "digits-net", "--epochs", "2", "--lr", "0.002", "--lrsi.iters", "2", "--mask.density", "0.3"]
    reproduce = ["mini-erk-95-ls", "--arms", "ls", "--seeds", "1"]
    needs_data = ["--config", "cifar10-resnet18"]

    def test_help_of_every_verb(self, tmp_path: Path) -> None:
        """The options of each verb can be listed."""
        for verb in COMMANDS:
            done = self.quick(tmp_path, verb, "--help")
            assert done.code == 0, done.err

    def test_windows_longer_than_training_are_refused(self, tmp_path: Path) -> None:
        """One sentence, before anything is written."""
        done = self.quick(tmp_path, "train", *self.train, "--ghost_fraction", "1.5")
        self.refused(done, 2, "ghost_fraction", "longer than training")
        assert not (tmp_path / "runs").exists()
