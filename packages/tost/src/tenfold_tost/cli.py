"""The commands of ToST."""

from tenfold_shared.cli import Command, run_command

COMMANDS = {
    "reproduce": Command(
        "tenfold_tost.reproduce:reproduce", "measure the paper's claims; alone: the miniature on digits"
    ),
    "train": Command("tenfold_tost.train:train", "train under a mask, with any of the four techniques or none"),
    "eval": Command(
        "tenfold_tost.evaluate:evaluate", "accuracy, weights and cost of a checkpoint, ours or the authors'"
    ),
    "make-mask": Command("tenfold_tost.tools:make_mask", "make a mask and write it to a file"),
    "sweep": Command("tenfold_tost.reproduce:sweep", "one recipe over a grid of its values, judged on held-out images"),
    "ablate": Command("tenfold_tost.reproduce:ablate", "one recipe with each technique, without any, with all"),
    "analyse": Command("tenfold_tost.tools:analyse", "zeros, gradients and curvature of checkpoints; masks compared"),
    "finalize": Command("tenfold_tost.tools:finalize", "write the plain network of a checkpoint, also as the authors'"),
    "export": Command("tenfold_tost.tools:export", "write the sparse network compactly, with its size and speed"),
}


def main() -> None:
    """The command ``tenfold-tost``."""
    run_command("tost", COMMANDS)
