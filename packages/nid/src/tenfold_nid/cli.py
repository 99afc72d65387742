"""The commands of NID."""

from tenfold_shared.cli import Command, run_command

COMMANDS = {
    "reproduce": Command(
        "tenfold_nid.reproduce:reproduce", "measure the paper's claims; alone: the miniature on patches of photographs"
    ),
    "train": Command("tenfold_nid.train:train", "learn a dictionary, or what it is compared with"),
    "eval": Command("tenfold_nid.evaluate:evaluate", "quality of a checkpoint, ours or the authors', on new signals"),
    "fit": Command("tenfold_nid.tasks:fit", "code new images: closed form, sparse, robust or by steps"),
    "inpaint": Command(
        "tenfold_nid.tasks:inpaint_images", "fill hidden pixels, or find and replace what does not belong"
    ),
    "separate": Command("tenfold_nid.tasks:separate_video", "take a video apart into background and foreground"),
    "ct": Command("tenfold_nid.tasks:tomography", "reconstruct slices from few views"),
    "sdf": Command("tenfold_nid.tasks:shapes_to_meshes", "fit distance fields from few samples and write meshes"),
    "export": Command("tenfold_nid.tasks:export", "write one signal as a small network of its own (ONNX)"),
}


def main() -> None:
    """The command ``tenfold-nid``."""
    run_command("nid", COMMANDS)
