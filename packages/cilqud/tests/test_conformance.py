"""How the command behaves: the suite that every package runs."""

from tenfold_shared.testing import Conformance


class TestConformance(Conformance):
    """CIL-QUD on digits."""

    package = "tenfold_cilqud"
    train = ["--config", "digits-mini", "--steps", "12"]
    reproduce = ["mini-query", "--seeds", "2"]
    needs_data = ["--config", "cifar10-preact18"]
