"""How the command behaves: the suite that every package runs."""

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
