"""What a training step sees: signals and coordinates as a function of (seed, step), the same for any number of processes
(section 2.4).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_shared.batches import generator
from tenfold_shared.errors import UserError

from .coordinates import FourierFeatures, lattice
from .ct import ray_coordinates, sinogram, view_angles
from .dictionary import NeuralDictionary
from .experts import SharedTrunkExperts
from .gates import CodebookGate
from .optimisation import Places, coordinate_chunks
from .recipe import Recipe
from .signals import PROJECTED

KEPT_ENTRIES = 1 << 26
"""An embedding of the lattice with at most as many numbers is kept for the whole run."""


class Batch(NamedTuple):
    """The part of a step that falls to one process."""

    epoch: int
    signal: Tensor
    """images, or ids for a codebook"""
    where: Tensor
    """what ``Sampled`` takes"""
    targets: Float[Tensor, "batch points channels"]
    ids: Int[Tensor, " whole"]
    """signals of the whole batch, over all processes"""
    share: float
    """weight of this process's mean, where shares are uneven"""


class Plan:
    """The steps of a run.

    Args:
        recipe: batch and chunk sizes, the order of the loops, the views of a tomograph.
        signals: to learn from, on the device.
        model: says what places it can be sampled at.
        seed: of the order.
        rank: this process.
        world: number of processes.

    Raises:
        UserError: a batch has fewer signals than there are processes.

    """

    def __init__(
        self,
        recipe: Recipe,
        signals: Float[Tensor, "signals *spatial channels"],
        model: NeuralDictionary,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        schedule = recipe.schedule
        self.signals, self.seed, self.rank, self.world = signals, seed, rank, world
        self.codebook = isinstance(model.gate_generator, CodebookGate)
        self.batch_size = min(schedule.batch_size, len(signals))
        self.batches = -(-len(signals) // self.batch_size)
        last = len(signals) - (self.batches - 1) * self.batch_size
        if last < world:
            raise UserError(f"the last batch has {last} signals for {world} processes: change --schedule.batch_size")
        self.random = schedule.inner_loop == "random"
        self.places, self.coords, self.targets = _places(recipe, signals, model)
        self.experts = model.experts
        points = self.targets.shape[1]
        self.chunk_size = min(schedule.chunk_size, points)
        self.chunks = len(self._chunks(0))
        self.per_epoch = self.batches if self.random else self.batches * self.chunks
        self.steps = schedule.epochs * self.per_epoch
        self._kept: tuple[object, list[Tensor]] = (None, [])
        if self.chunks == 1:  # the whole lattice at every step: its order does not matter
            self.index = coordinate_chunks(points, points, generator(seed), antipodal=self.places == "antipodal")[0]
            self.targets = self.targets[:, self.index.to(signals.device)]
        self.embedded = self._embed()

    def _embed(self) -> Tensor | None:
        """The embedding of the lattice (of the first half, in any order, for antipodal points), when it is kept."""
        if self.places not in {"embedded", "antipodal"}:
            return None
        rows = len(self.coords) // 2 if self.places == "antipodal" else len(self.coords)
        if rows * self.experts.map.out_dim > KEPT_ENTRIES:  # type: ignore[operator]
            return None
        order = self.index[:rows].to(self.coords.device) if self.chunks == 1 else slice(0, rows)
        with torch.no_grad():
            return self.experts.map(self.coords[order])

    def _chunks(self, *key: int) -> list[Tensor]:
        points, antipodal = self.targets.shape[1], self.places == "antipodal"
        return coordinate_chunks(points, self.chunk_size, generator(self.seed, *key), antipodal=antipodal)

    def _remembered(self, *key: int) -> list[Tensor]:
        if self._kept[0] != key:
            self._kept = key, self._chunks(*key)
        return self._kept[1]

    def __getitem__(self, step: int) -> Batch:
        """The part of a step that is this process's."""
        epoch, position = divmod(step, self.per_epoch)
        number, chunk = (position, 0) if self.random else divmod(position, self.chunks)
        order = torch.randperm(len(self.signals), generator=generator(self.seed, epoch))
        whole = order[number * self.batch_size : (number + 1) * self.batch_size]
        own = whole[self.rank * len(whole) // self.world : (self.rank + 1) * len(whole) // self.world]
        ids = own.to(self.signals.device)
        signal = ids if self.codebook else self.signals[ids]
        share = len(own) * self.world / len(whole)
        if self.chunks == 1:
            return Batch(epoch, signal, self._where(None), self.targets[ids], whole, share)
        if self.random:
            cycle, chunk = divmod(step, self.chunks)
            index = self._remembered(1, cycle)[chunk]
        else:
            index = self._remembered(epoch, number)[chunk]
        index = index.to(self.signals.device)
        return Batch(epoch, signal, self._where(index), self.targets[ids[:, None], index], whole, share)

    def _where(self, index: Tensor | None) -> Tensor:
        if index is None:
            if self.embedded is not None:
                return self.embedded
            index = self.index.to(self.coords.device)
        if self.places == "antipodal":  # the first half of a chunk lies in the first half of the lattice
            index = index[: len(index) // 2]
        if self.embedded is not None:
            return self.embedded[index]
        coords = self.coords[index]
        return coords if self.places in {"points", "rays"} else self.experts.map(coords)


def _places(recipe: Recipe, signals: Tensor, model: NeuralDictionary) -> tuple[Places, Tensor, Tensor]:
    """How the dictionary is sampled, where, and what the signals are there."""
    spatial = signals.shape[1:-1]
    if recipe.data.name in PROJECTED:
        rays = ray_coordinates((spatial[0], spatial[1]), view_angles(recipe.data.views, device=signals.device))
        return "rays", rays, sinogram(signals, rays)
    coords, targets = lattice(spatial, device=signals.device), signals.flatten(1, -2)
    fourier = isinstance(model.experts.map, FourierFeatures) and isinstance(model.experts, SharedTrunkExperts)
    if (
        fourier and len(coords) % 2 == 0 and min(spatial) > 1
    ):  # an axis of one sample sits at -1, and so would its mirror image
        return "antipodal", coords, targets
    learned = any(True for _ in model.experts.map.parameters())
    return "points" if learned else "embedded", coords, targets
