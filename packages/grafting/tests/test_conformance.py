"""How the command behaves: the suite that every package runs."""

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
