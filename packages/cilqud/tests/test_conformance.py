"""How the command behaves: the suite that every package runs."""

from tenfold_shared.testing import Conformance


class TestConformance(Conformance):
    """CIL-QUD on digits."""

    package = "tenfold_cilqud"
    train = ["--config", "digits-mini", "--data.tasks", "2", "--steps", "20", "--lr", "0.01"]
    reproduce = ["mini-query", "--seeds", "1"]
    needs_data = ["--config", "cifar10-preact18"]
