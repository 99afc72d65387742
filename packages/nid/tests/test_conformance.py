"""How the command behaves: the suite that every package runs."""

from tenfold_shared.testing import Conformance


class TestConformance(Conformance):
    """NID on grey faces."""

    package = "tenfold_nid"
    train = ["--config", "faces-nid", "--schedule.epochs", "10", "--schedule.warmup_epochs", "2"]
    reproduce = ["mini-sdf", "--arms", "siren", "--seeds", "1"]
    needs_data = ["--config", "celeba-nid"]
