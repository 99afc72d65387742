"""Networks by name: `preact18`, `preact50`, `small`, and any classifier of torchvision."""

from collections.abc import Sequence

from tenfold_cilqud.models.incremental import Head, IncrementalNet, Normalise, counted_twice
from tenfold_cilqud.models.preact import PreActResNet
from tenfold_cilqud.models.small import SmallNet, TorchvisionNet

__all__ = [
    "Head",
    "IncrementalNet",
    "Normalise",
    "PreActResNet",
    "SmallNet",
    "TorchvisionNet",
    "counted_twice",
    "create_model",
    "model_names",
]

PREACT = {
    "preact18": ("basic", (2, 2, 2, 2)),
    "preact34": ("basic", (3, 4, 6, 3)),
    "preact50": ("bottleneck", (3, 4, 6, 3)),
}


def model_names() -> tuple[str, ...]:
    """The architectures of this package; `create_model` takes torchvision's names too."""
    return (*PREACT, "small")


def create_model(
    name: str,
    classes_per_task: int,
    tasks: int,
    *,
    shape: tuple[int, ...] = (3, 32, 32),
    width: int = 0,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> IncrementalNet:
    """A new network for images of `shape` with heads for `tasks` tasks of `classes_per_task` classes.

    `width` 0 takes the architecture's own (64 channels for the ResNets, 16 for `small`); torchvision's have none.
    UserError for a name that is neither here nor in torchvision.
    """
    if name in PREACT:
        block, blocks = PREACT[name]
        return PreActResNet(
            classes_per_task,
            tasks,
            width=width or 64,
            block=block,  # type: ignore[arg-type]
            blocks=blocks,
            in_channels=shape[0],
            mean=mean,
            std=std,
        )
    if name == "small":
        return SmallNet(
            classes_per_task, tasks, width=width or 16, in_channels=shape[0], size=shape[1:], mean=mean, std=std
        )
    return TorchvisionNet(name, classes_per_task, tasks, mean, std)
