"""How the command behaves: the suite that every package runs."""

from tenfold_shared.testing import Conformance

SMALL = ["--data.size", "24", "--data.scenes", "1", "--data.views", "8", "--data.sources", "4"]


class TestConformance(Conformance):
    """GNT on one small table; two targets a step, one for each of two processes."""

    package = "tenfold_gnt"
    train = [
        *("--config", "tabletop-single-gnt", *SMALL, "--network.width", "16"),
        *("--rays.count", "64", "--rays.samples", "8", "--rays.judged_samples", "8"),
        *("--targets", "2", "--steps", "60", "--judge_every", "60"),
    ]
    eval_options = [*SMALL, "--data.unseen", "false", "--samples", "8"]
    reproduce = ["mini-one-table", "--arms", "nearest", "--seeds", "1"]
    needs_data = ["--config", "llff-gnt"]
