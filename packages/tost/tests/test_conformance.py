"""How the command behaves: the suite that every package runs."""

from tenfold_shared.testing import Conformance


class TestConformance(Conformance):
    """The whole recipe on digits: few steps at a small rate, since rounding grows with the steps."""

    package = "tenfold_tost"
    train = ["--config", "digits-net", "--epochs", "3", "--lr", "0.02", "--lrsi.iters", "2", "--mask.density", "0.3"]
    reproduce = ["mini-erk-95-ls", "--seeds", "2"]
    needs_data = ["--config", "cifar10-resnet18"]
