"""How the command behaves: the suite that every package runs."""

from pathlib import Path

from tenfold_shared.testing import Conformance

QUICK = ["--evaluation.images", "20", "--evaluation.verify_images", "1", "--evaluation.attack_steps", "2"]


class TestConformance(Conformance):
    """Grafting on digits."""

    package = "tenfold_grafting"
    train = [
        "--config",
        "digits-cnn",
        "--base.epochs",
        "2",
        "--finetune.epochs",
        "1",
        "--selection.criterion",
        "random",
        *QUICK,
    ]
    reproduce = ["mini-prune", "--seeds", "1"]
    needs_data = ["--config", "cifar10-cnn-b"]
    eval_options = QUICK

    def test_an_architecture_that_is_not_the_checkpoints(self, trained: Path, tmp_path: Path) -> None:
        """Refused where the file says what it holds, whatever is done with it."""
        run, onnx = str(self.checkpoints(trained, "whole").parent), str(tmp_path / "exported" / "network.onnx")
        for arguments in (
            ("eval", "--checkpoint", run),
            ("certify", "--model", run),
            ("export", "--model", run),
        ):
            done = self.quick(tmp_path, *arguments, "--arch", "cnn_a")
            self.refused(done, 2, "holds digits_cnn, not cnn_a: give --arch digits_cnn")
        assert self.quick(tmp_path, "export", "--model", run, "--arch", "digits_cnn", "--images", "0").code == 0
        self.refused(self.quick(tmp_path, "certify", "--model", onnx, "--arch", "digits_cnn"), 2, "leave --arch out")
