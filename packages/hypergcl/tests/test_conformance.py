"""How the command behaves: the suite that every package runs."""

from tenfold_shared.testing import Conformance


class TestConformance(Conformance):
    """HyperGCL on digits."""

    package = "tenfold_hypergcl"
    train = ["--config", "digits-setgnn", "--epochs", "20", "--method", "A4"]
    reproduce = ["mini-structure", "--arms", "mlp", "--seeds", "2"]
    needs_data = ["--config", "cora-setgnn"]
    phase = "best"
