"""The commands of Simple3D-Former."""

from tenfold_shared.cli import Command, run_command

COMMANDS = {
    "reproduce": Command(
        "tenfold_simple3dformer.reproduce:reproduce",
        "measure the paper's claims; alone: the miniature on generated shapes",
    ),
    "train": Command("tenfold_simple3dformer.train:train", "train any task, from image weights or from nothing"),
    "eval": Command("tenfold_simple3dformer.evaluate:evaluate", "metrics of a checkpoint, ours or the authors'"),
    "predict": Command(
        "tenfold_simple3dformer.predict:predict",
        "class, parts, labels or boxes of your own mesh or cloud, with a picture",
    ),
    "rollout": Command("tenfold_simple3dformer.predict:attention", "what the class token looks at, as PNG and PLY"),
    "convert": Command(
        "tenfold_simple3dformer.predict:convert", "a mesh or cloud to voxels (binvox) or points (ply, xyz)"
    ),
    "transfer": Command(
        "tenfold_simple3dformer.predict:show_transfer", "which image tensors a network takes, and which are new"
    ),
    "plan": Command(
        "tenfold_simple3dformer.planner:plan", "tokens, operations and memory of every tokenizer, before training"
    ),
}


def main() -> None:
    """The command ``tenfold-simple3dformer``."""
    run_command("simple3dformer", COMMANDS)
