"""How the command behaves: the suite that every package runs."""

from tenfold_shared.testing import Conformance

SMALL = ["--model.num_experts", "32", "--model.num_topk", "8", "--model.hidden_dim", "32", "--model.gate_hidden", "8"]


class TestConformance(Conformance):
    """NID on grey faces."""

    package = "tenfold_nid"
    train = ["--config", "faces-nid", *SMALL, "--schedule.epochs", "40", "--schedule.warmup_epochs", "4"]
    reproduce = ["mini-sdf", "--arms", "siren", "--seeds", "1"]
    needs_data = ["--config", "celeba-nid"]
    eval_options = ["--data.name", "faces"]
