"""The commands of SLaK."""

from tenfold_shared.cli import Command, run_command

COMMANDS = {
    "reproduce": Command(
        "tenfold_slak.reproduce:reproduce", "measure the paper's claims; alone: the miniature, long-range digits"
    ),
    "train": Command("tenfold_slak.train:train", "train SLaK or a baseline: classify, segment or detect"),
    "eval": Command(
        "tenfold_slak.evaluate:evaluate",
        "accuracy, mean IoU or average precision of a checkpoint, ours or the authors', and its costs",
    ),
    "erf": Command("tenfold_slak.evaluate:erf", "draw the effective receptive field of a checkpoint"),
    "export": Command(
        "tenfold_slak.evaluate:export", "merge a checkpoint for inference and write ONNX or torch.export"
    ),
    "profile": Command("tenfold_slak.evaluate:profile", "multiply-adds and time of a network, layer by layer"),
}


def main() -> None:
    """The command ``tenfold-slak``."""
    run_command("slak", COMMANDS)
