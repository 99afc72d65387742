"""The commands of linearity grafting and of its verifier."""

from tenfold_shared.cli import Command, run_command

COMMANDS = {
    "reproduce": Command(
        "tenfold_grafting.reproduce:reproduce", "measure the paper's claims; alone: the miniature on digits"
    ),
    "train": Command("tenfold_grafting.train:train", "train a base network, choose neurons, graft or prune, fine-tune"),
    "eval": Command(
        "tenfold_grafting.evaluate:evaluate",
        "standard, robust and verified accuracy of a checkpoint, ours or the authors'",
    ),
    "certify": Command(
        "tenfold_grafting.certify:certify", "verify a checkpoint or ONNX model image by image, one JSON line each"
    ),
    "export": Command("tenfold_grafting.certify:export", "write a network as ONNX and its properties as VNN-LIB"),
    "compare-masks": Command("tenfold_grafting.certify:compare_masks", "overlap of mask files or grafted checkpoints"),
}


def main() -> None:
    """The command ``tenfold-grafting``."""
    run_command("grafting", COMMANDS)
