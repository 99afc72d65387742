"""The commands of the toy."""

from tenfold_shared.cli import Command, run_command

COMMANDS = {
    "train": Command("tenfold_toy.train:train", "fit a small network"),
    "eval": Command("tenfold_toy.train:evaluate", "accuracy of a checkpoint"),
    "reproduce": Command("tenfold_toy.train:reproduce", "compare batch norm with none"),
}


def main() -> None:
    """The command ``tenfold-toy``."""
    run_command("toy", COMMANDS)
