"""The commands of Aug-NeRF."""

from tenfold_shared.cli import Command, run_command

COMMANDS = {
    "reproduce": Command(
        "tenfold_augnerf.reproduce:reproduce", "measure the paper's claims; alone: a slice of the miniature on blocks"
    ),
    "train": Command("tenfold_augnerf.train:train", "train NeRF, Aug-NeRF, mip-NeRF or a rival"),
    "eval": Command("tenfold_augnerf.evaluate:evaluate", "scores of a checkpoint, ours or of the released layouts"),
    "render": Command("tenfold_augnerf.export:render", "pictures and depth of a split's views, or a path's frames"),
    "export": Command("tenfold_augnerf.export:export", "density grid, mesh and released checkpoint of a run"),
    "sharpness": Command("tenfold_augnerf.sharpness:sharpness", "rise of the error under perturbations, by radius"),
    "prepare": Command("tenfold_augnerf.export:prepare", "write a data set as prepared rays, Blender or LLFF folders"),
    "sweep": Command(
        "tenfold_augnerf.reproduce:sweep", "one recipe over a grid of its values, judged on validation views"
    ),
}


def main() -> None:
    """The command ``tenfold-augnerf``."""
    run_command("augnerf", COMMANDS)
