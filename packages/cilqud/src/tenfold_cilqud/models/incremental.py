"""A backbone with two rows of heads, one head a task: primary (class-balanced, used at test) and auxiliary (random)."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Head = Literal["main", "aux"]


class Normalise(nn.Module):
    """(x - mean) / std by channel, the network's first operation, so that attacks count in pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)):
        super().__init__()
        # Not part of the state: the released checkpoints have no such entries.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalised images."""
        return (x - self.mean) / self.std


class IncrementalNet(nn.Module):
    """The base of every network here: a subclass gives `embed`, images [b, c, h, w] to features [b, width].

    The state's names are the released ones: `linear_main.{k}` is task k's primary head, `linear.{k}` its auxiliary one.
    All heads exist from the start; those of later tasks stay at their initialisation until their task comes.
    """

    normalise: nn.Module
    linear_main: nn.ModuleList
    linear: nn.ModuleList
    decision: nn.Module | None
    """How classes are scored at test, where that is not by the primary head (`tenfold_cilqud.decisions`)."""

    def __init__(
        self, classes_per_task: int, tasks: int, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
    ):
        super().__init__()
        self.classes_per_task, self.tasks = classes_per_task, tasks
        self.normalise = Normalise(mean, std) if (*mean, *std) != (0.0, 1.0) else nn.Identity()
        self.register_module("decision", None)

    def add_heads(self, width: int) -> None:
        """Both rows of heads; called last, since the order of the state is the released one."""
        self.width = width
        self.linear_main = nn.ModuleList(nn.Linear(width, self.classes_per_task) for _ in range(self.tasks))
        self.linear = nn.ModuleList(nn.Linear(width, self.classes_per_task) for _ in range(self.tasks))

    def embed(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Features of normalised images."""
        raise NotImplementedError

    def features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """phi(theta, x): the features of images in pixel units."""
        return self.embed(self.normalise(x))

    def logits(self, features: Float[Tensor, "b d"], tasks: int, head: Head = "main") -> Float[Tensor, "b k"]:
        """Logits of the first `tasks` tasks' classes, side by side. ValueError unless 1 <= tasks <= self.tasks."""
        if not 1 <= tasks <= self.tasks:
            raise ValueError(f"logits of {tasks} tasks are asked of a network with heads for {self.tasks}")
        heads = list(self.linear_main if head == "main" else self.linear)[:tasks]
        return torch.cat([layer(features) for layer in heads], 1)

    def scores(self, x: Float[Tensor, "b c h w"], tasks: int) -> Float[Tensor, "b k"]:
        """What the prediction is the greatest of, over the classes of the first `tasks` tasks."""
        features = self.features(x)
        return self.logits(features, tasks) if self.decision is None else self.decision(self, features, tasks)

    def forward(self, x: Float[Tensor, "b c h w"], tasks: int, head: Head = "main") -> Float[Tensor, "b k"]:
        """Logits of the classes of the first `tasks` tasks."""
        return self.logits(self.features(x), tasks, head)


@contextlib.contextmanager
def counted_twice(model: nn.Module) -> Iterator[None]:
    """Within it, batch norms in training mode move their statistics as if the batch had passed twice.

    The released code sends the same batch through the backbone once for each head. One pass gives the same outputs, and
    r <- r1 + (1 - m)(r1 - r0) after r0 became r1 is what the second would do to the running statistics.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats
    ]
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]  # type: ignore[union-attr]
    yield
    with torch.no_grad():
        for norm, (mean, variance) in zip(norms, before, strict=True):
            keep = 1.0 - (norm.momentum or 0.0)
            # New tensors: the backward pass holds the present ones and would find them changed.
            norm.running_mean = norm.running_mean + keep * (norm.running_mean - mean)  # type: ignore[operator]
            norm.running_var = norm.running_var + keep * (norm.running_var - variance)  # type: ignore[operator]
            norm.num_batches_tracked += 1  # type: ignore[operator,assignment]
