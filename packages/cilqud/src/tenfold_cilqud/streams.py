"""Batches of an incremental step (section 2.2): which samples, how augmented, which share of them for a process.

Everything is a function of (seed, purpose, step), so a run killed in the middle of a task goes on with the same batches,
and several processes see together what one would.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_cilqud.data import pixels
from tenfold_cilqud.objective import Labelled
from tenfold_cilqud.protocol import Samples
from tenfold_shared.run import Run, derived_seed


class Stream:
    """Batches of `samples`, cycled: a fresh shuffle at every restart, the uneven last batch kept.

    A last batch of one joins the one before it, since batch norm has no statistics of one value.

    Args:
        run: whose seed, device and processes count.
        samples: on the run's device.
        batch_size: over all processes.
        purpose: names the stream's randomness.
        augment: applied to the 8-bit images, in order.
        weights: probability of each sample; with them a batch is drawn with replacement instead.

    """

    def __init__(
        self,
        run: Run,
        samples: Samples,
        batch_size: int,
        purpose: str,
        augment: Sequence[Any] = (),
        weights: Float[Tensor, " n"] | None = None,
    ):
        self.run, self.samples, self.batch_size = run, samples, batch_size
        self.purpose, self.augment, self.weights = purpose, tuple(augment), weights
        size = len(samples.labels)
        full, rest = divmod(size, batch_size)
        self.steps = max(1, full + (rest > 1 or (rest == 1 and full == 0)))
        self._cycle, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Batches in a pass over the samples."""
        return self.steps

    def draws(self, step: int) -> torch.Generator:
        """The generator of a step's augmentation and noise."""
        return torch.Generator().manual_seed(derived_seed(self.run.options.seed, self.purpose, step))

    def indices(self, step: int) -> Int[Tensor, " b"]:
        """The samples of a whole batch."""
        size = len(self.samples.labels)
        if self.weights is not None:
            return torch.multinomial(self.weights, self.batch_size, replacement=True, generator=self.draws(-1 - step))
        cycle, position = divmod(step, self.steps)
        if cycle != self._cycle:
            seed = derived_seed(self.run.options.seed, self.purpose, "order", cycle)
            self._order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
            self._cycle = cycle
        last = size if position + 1 == self.steps else (position + 1) * self.batch_size
        return self._order[position * self.batch_size : last]

    def share(self, count: int) -> slice:
        """The process's part of a batch of `count`."""
        rank, world = self.run.rank, self.run.world
        return slice(rank * count // world, (rank + 1) * count // world)

    def noise(self, step: int, x: Tensor, whole: int, what: str) -> Tensor:
        """The process's part of noise in [-1, 1] for a whole batch, from which an attack starts."""
        seed = derived_seed(self.run.options.seed, self.purpose, what, step)
        drawn = torch.rand((whole, *x.shape[1:]), generator=torch.Generator().manual_seed(seed))
        return (2 * drawn[self.share(whole)] - 1).to(x.device, x.dtype)

    def chosen(self, step: int) -> tuple[Int[Tensor, " b"], Tensor, int]:
        """The process's indices and images in [0, 1] of a step, and the size of the whole batch."""
        indices = self.indices(step)
        own = self.share(len(indices))
        images = self.samples.images[indices[own].to(self.samples.images.device)]
        images = augmented(images, self.augment, len(indices), own, self.draws(step))
        return indices[own], pixels(images), len(indices)

    def __getitem__(self, step: int) -> tuple[Labelled, int]:
        """The process's labelled batch of a step, and the size of the whole."""
        indices, x, whole = self.chosen(step)
        return Labelled(x, self.samples.labels[indices.to(x.device)], whole / self.run.world), whole


def augmented(images: Tensor, augment: Sequence[Any], whole: int, own: slice, generator: torch.Generator) -> Tensor:
    """Images augmented by what is drawn for a whole batch, of which they are the part `own`."""
    for change in augment:
        images = change.apply(images, change.draw(whole, generator)[own].to(images.device))
    return images


def joined(first: Samples, second: Samples) -> Samples:
    """N and A together."""
    return Samples(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]))


def class_weights(labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Probabilities by which every class is equally frequent."""
    counts = torch.bincount(labels)
    return (1.0 / counts[labels]).double().cpu()
