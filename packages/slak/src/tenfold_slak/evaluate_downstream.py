"""What a segmenter or a detector is worth (section 9), from the file that its training wrote or a released segmenter's."""

import json
from pathlib import Path
from typing import Any

from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions
from tenfold_slak.data import found_folder
from tenfold_slak.detect import Detection, check_categories, detector, evaluate_detector
from tenfold_slak.detect import evaluation_images as detection_images
from tenfold_slak.downstream import load_official_segmenter
from tenfold_slak.evaluate import Checkpoint, EvalConfig, costs, fill, refusals
from tenfold_slak.layer import merge_large_kernels
from tenfold_slak.segment import Segmentation, evaluate_segmenter, segmenter
from tenfold_slak.segment import evaluation_images as segmentation_images
from tenfold_slak.train import Recipe

GROUPS: dict[str, tuple[str, type[Any]]] = {
    "segment": ("segmentation", Segmentation),
    "detect": ("detection", Detection),
}


def evaluate_downstream(read: Checkpoint, config: EvalConfig, options: RunOptions) -> None:
    """Print the mean IoU or the average precisions of a checkpoint, and its costs, as one JSON line.

    As at the end of its training: the same windows and sizes, one image at a time, shared by the processes.

    Raises:
        UserError: an option is not read, the data set is not there or of other classes, or the file does not fit.

    """
    _refuse_what_is_not_read(read, config, options)
    with Run.evaluation("slak", options) as run:
        values = (_segmentation if read.task == "segment" else _detection)(read, config, run)
        if run.is_main:
            print(json.dumps({"arch": read.about.get("arch", "released"), **values}))


def _segmentation(read: Checkpoint, config: EvalConfig, run: Run) -> dict[str, Any]:
    if read.about:
        recipe = trained_recipe(read, config.data.root)
        settings = recipe.segmentation
        with refusals(str(read.path)):
            model = segmenter(recipe)
        fill(model, read)
    else:
        model = load_official_segmenter(read.content, read.weights)
        settings = Segmentation(root=found_folder(config.data.root), classes=model.num_classes)
    images = segmentation_images(settings)
    with refusals(f"--checkpoint {config.checkpoint}"):
        counted = costs(model, (3, settings.crop, settings.crop))
    miou = evaluate_segmenter(_placed(model, config, run), images, settings, run)
    return {"data": "ade20k", "miou": miou, **counted}


def _detection(read: Checkpoint, config: EvalConfig, run: Run) -> dict[str, Any]:
    recipe = trained_recipe(read, config.data.root)
    images = detection_images(recipe.detection)
    check_categories(images, read.about["categories"])
    with refusals(str(read.path)):
        model = detector(recipe, images.classes)
    fill(model, read)
    counted = costs(model, None)
    precisions = evaluate_detector(_placed(model, config, run), images, run)
    return {"data": recipe.detection.data, **precisions, **counted}


def _placed(model: Any, config: EvalConfig, run: Run) -> Any:
    """The network on the run's device, bare, as its training evaluates it: each process takes images of its own."""
    return (merge_large_kernels(model) if config.merge else model).to(run.device)


def trained_recipe(read: Checkpoint, root: Path | None) -> Recipe:
    """The part of a training's recipe that builds its network again and evaluates it.

    Args:
        read: a file that a segmenter's or a detector's training wrote.
        root: another folder of its data set; None: the training's.

    Raises:
        UserError: the file does not say enough.

    """
    about = read.about
    if read.task not in GROUPS:
        raise UserError(f"{read.path} holds a network for {read.task}, which is none of {', '.join(GROUPS)}")
    needed = ("arch", "arguments", "settings", *(("categories",) if read.task == "detect" else ()))
    if absent := [name for name in needed if name not in about]:
        raise UserError(
            f"{read.path} does not say how its network is built ({', '.join(absent)} missing), as files of earlier "
            "versions: train it again"
        )
    group, kind = GROUPS[read.task]
    try:
        said = dict(about["settings"])
        trained = said.pop("root", None)
        if root is None and trained is not None:
            root = Path(trained)
        settings = kind(**said, root=found_folder(root))
        return Recipe(task=about["task"], arch=about["arch"], arguments=about["arguments"], **{group: settings})
    except UserError as error:
        raise UserError(f"{read.path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{read.path} was written by another version ({error}): train it again") from error


def _refuse_what_is_not_read(read: Checkpoint, config: EvalConfig, options: RunOptions) -> None:
    """Refuse options that only the evaluation of a classifier reads."""
    plain = EvalConfig(config.checkpoint)
    pairs: list[tuple[str, Any, Any, str]]
    pairs = [(f"data.{name}", config.data, plain.data, name) for name in vars(plain.data) if name != "root"]
    pairs += [("batch_size", config, plain, "batch_size"), ("compile", options, RunOptions(), "compile")]
    for option, given, default, name in pairs:
        if vars(given)[name] != vars(default)[name]:
            raise UserError(
                f"--{option} is not read where the checkpoint holds a network for {read.task}, which takes the images "
                "of its training one at a time, from --data.root if given: leave it out"
            )
