"""The commands of BiP."""

from tenfold_shared.cli import Command, run_command

COMMANDS = {
    "reproduce": Command(
        "tenfold_bip.reproduce:reproduce", "measure the paper's claims; alone: the miniature on digits"
    ),
    "train": Command("tenfold_bip.train:train", "train densely, or prune with BiP or a baseline"),
    "eval": Command(
        "tenfold_bip.evaluate:evaluate", "accuracy, sparsity and cost of a checkpoint, ours or the authors'"
    ),
    "sweep": Command("tenfold_bip.reproduce:sweep", "one recipe over a grid of its values, judged on validation data"),
    "compare-masks": Command("tenfold_bip.evaluate:compare_masks", "overlap of the masks of checkpoints"),
    "shrink": Command("tenfold_bip.evaluate:shrink", "remove pruned filters for good and export the small network"),
}


def main() -> None:
    """The command ``tenfold-bip``."""
    run_command("bip", COMMANDS)
