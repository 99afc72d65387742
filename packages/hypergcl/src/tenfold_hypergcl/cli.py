"""The commands of HyperGCL."""

from tenfold_shared.cli import Command, run_command

COMMANDS = {
    "reproduce": Command(
        "tenfold_hypergcl.reproduce:reproduce", "measure the paper's claims; alone: the miniature on digits"
    ),
    "train": Command("tenfold_hypergcl.train:train", "train the encoder, with or without contrast, or a baseline"),
    "eval": Command(
        "tenfold_hypergcl.evaluate:evaluate", "accuracy, fairness or AUC of a checkpoint, ours or the authors'"
    ),
}


def main() -> None:
    """The command ``tenfold-hypergcl``."""
    run_command("hypergcl", COMMANDS)
