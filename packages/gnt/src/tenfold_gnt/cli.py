"""The commands of GNT."""

from tenfold_shared.cli import Command, run_command

COMMANDS = {
    "reproduce": Command(
        "tenfold_gnt.reproduce:reproduce", "measure the paper's claims; alone: the miniature on tables never seen"
    ),
    "train": Command("tenfold_gnt.train:train", "train on a scene, across scenes, or fine-tune a checkpoint"),
    "sweep": Command("tenfold_gnt.reproduce:sweep", "run a recipe with several values, judged on validation views"),
    "eval": Command("tenfold_gnt.evaluate:evaluate", "scores of a checkpoint on held-out views, ours or the authors'"),
    "render": Command("tenfold_gnt.video:render", "pictures, depth, confidence, occlusion, points and video of a path"),
}


def main() -> None:
    """The command ``tenfold-gnt``."""
    run_command("gnt", COMMANDS)
