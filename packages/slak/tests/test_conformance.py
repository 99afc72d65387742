"""How the command behaves: the suite that every package runs."""

from pathlib import Path

from tenfold_shared.testing import Conformance


class TestConformance(Conformance):
    """SLaK on digits."""

    package = "tenfold_slak"
    train = [
        *("--config", "digits-slak", "--optim.steps", "24", "--optim.warmup_steps", "4"),
        *("--sparse.update_frequency", "6", "--mixing.mixup", "0"),
    ]
    reproduce = ["count-slak-t-stored", "--seeds", "2"]
    needs_data = ["--config", "cifar10-dense-7"]
    eval_options = ["--data.name", "digits"]

    def test_networks_and_images_that_do_not_fit(self, trained: Path, tmp_path: Path) -> None:
        """Unknown networks, images smaller than the stem, counts below one, places that cannot be written."""
        (tmp_path / "file").touch()
        run = ("--checkpoint", str(self.checkpoints(trained, "whole").parent))
        for arguments, words in {
            ("profile", "--size", "16"): ("at least 32 x 32 pixels", "16 x 16"),
            ("profile", *run, "--size", "2"): ("at least", "2 x 2"),
            ("profile", "--arch", "nope"): ("--arch", "nope", "slak_tiny"),
            ("profile", "--arch", "test_resnet", "--size", "0"): ("--size", "1 or more"),
            ("profile", "--arch", "convnext_atto", "--size", "2"): ("--size 2", "greater than actual input"),
            ("profile", *run, "--repeats", "0"): ("--repeats",),
            ("profile", *run, "--arch", "slak_tiny"): ("--arch or --checkpoint", "not both"),
            ("export", *run, "--size", "2"): ("at least", "2 x 2"),
            ("export", *run, "--output", "net.txt"): ("net.txt", ".onnx or .pt2"),
            ("export", *run, "--output", "file/net.pt2"): ("file/net.pt2", "cannot be written"),
            ("erf", *run, "--data", "row-cue", "--images", "0"): ("--images", "1 or more"),
            ("erf", *run, "--output", "erf.xyz"): ("erf.xyz", ".png"),
        }.items():
            self.refused(self.quick(tmp_path, *arguments), 2, *words)
