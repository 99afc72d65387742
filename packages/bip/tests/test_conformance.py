"""How the command behaves: the suite that every package runs."""

from tenfold_shared.testing import Conformance


class TestConformance(Conformance):
    """BiP on digits."""

    package = "tenfold_bip"
    # One epoch of masks: in more of them rounding, which differs between processors and numbers of processes, soon takes
    # some weight across the cut, and from there on two runs part.
    train = ["--config", "digits-cnn", "--dense.epochs", "2", "--bilevel.epochs", "1"]
    reproduce = ["mini-keep-5", "--arms", "snip", "--seeds", "1"]
    needs_data = ["--config", "cifar10-resnet18"]
