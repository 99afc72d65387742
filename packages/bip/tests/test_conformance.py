"""How the command behaves: the suite that every package runs."""

from tenfold_shared.testing import Conformance


class TestConformance(Conformance):
    """BiP on digits."""

    package = "tenfold_bip"
    train = ["--config", "digits-cnn", "--dense.epochs", "2", "--bilevel.epochs", "3"]
    reproduce = ["mini-keep-5", "--arms", "snip", "--seeds", "1"]
    needs_data = ["--config", "cifar10-resnet18"]
