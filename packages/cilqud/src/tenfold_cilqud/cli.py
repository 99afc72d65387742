"""The commands of CIL-QUD."""

from tenfold_shared.cli import Command, run_command

COMMANDS = {
    "reproduce": Command(
        "tenfold_cilqud.reproduce:reproduce", "measure the paper's claims; alone: the miniature on digits"
    ),
    "train": Command("tenfold_cilqud.train:train", "learn the tasks with CIL-QUD, RCIL-QUD or a baseline"),
    "eval": Command("tenfold_cilqud.evaluate:evaluate", "accuracy of a checkpoint by task, clean and under attack"),
    "sweep": Command("tenfold_cilqud.studies:sweep", "one recipe over a grid of its values, judged on validation data"),
    "repeat": Command("tenfold_cilqud.studies:repeat", "one recipe over seeds and class orders: means and intervals"),
    "query": Command("tenfold_cilqud.tools:query", "query a folder of images with anchors and show what is taken"),
    "audit": Command("tenfold_cilqud.tools:audit", "find test images in a pool"),
    "prepare": Command("tenfold_cilqud.data:prepare", "write a data set in the layout of the released bundle"),
}


def main() -> None:
    """The command ``tenfold-cilqud``."""
    run_command("cilqud", COMMANDS)
