"""Batches whose content is a pure function of (seed, epoch, position): exact resume, and the same data for any number
of processes.

`Batches` keeps a set on the device as uint8 and augments a batch at a time; `StreamedBatches` reads what does not fit
into memory through worker processes. Both have `epoch(e, start=k)` and `len`.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from tenfold_shared.errors import UserError


def generator(*keys: int) -> torch.Generator:
    """A CPU generator seeded by several integers, such as (seed, epoch): any other keys give an unrelated stream."""
    return torch.Generator().manual_seed(_mixed(*keys))


def _mixed(*keys: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=4).digest(), "little")


# --- augmentation -----------------------------------------------------------------------------------------------------


@runtime_checkable
class Augmentation(Protocol):
    """A random change of images in two parts: what is random about it, and the change itself, a batch at a time."""

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """The random parameters of `n` images, along the first axis."""
        ...

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """The changed images [n, c, h, w], in their dtype. What comes from outside of an image is 0."""
        ...


@dataclass(frozen=True)
class RandomCrop:
    """Pad by `padding` zeros on all sides and cut out the earlier size at a uniformly random place."""

    padding: int

    def draw(self, n: int, generator: torch.Generator) -> Int[Tensor, "n 2"]:
        """Row and column of the cut's corner in the padded image."""
        return torch.randint(2 * self.padding + 1, (n, 2), generator=generator)

    def apply(self, images: Tensor, parameters: Int[Tensor, "n 2"]) -> Tensor:
        """The cuts [n, c, h, w]."""
        return _gather(functional.pad(images, [self.padding] * 4), parameters, *images.shape[2:])


@dataclass(frozen=True)
class Flip:
    """Mirror left and right with probability `p`."""

    p: float = 0.5

    def draw(self, n: int, generator: torch.Generator) -> Bool[Tensor, " n"]:
        """Whether an image is mirrored."""
        return torch.rand(n, generator=generator) < self.p

    def apply(self, images: Tensor, parameters: Bool[Tensor, " n"]) -> Tensor:
        """The images [n, c, h, w], some mirrored."""
        return torch.where(parameters[:, None, None, None], images.flip(3), images)


@dataclass(frozen=True)
class Shift:
    """Roll by at most `by` pixels along both axes: what leaves on one side comes back on the other."""

    by: int

    def draw(self, n: int, generator: torch.Generator) -> Int[Tensor, "n 2"]:
        """By how much rows and columns move down and right."""
        return torch.randint(-self.by, self.by + 1, (n, 2), generator=generator)

    def apply(self, images: Tensor, parameters: Int[Tensor, "n 2"]) -> Tensor:
        """The rolled images [n, c, h, w]."""
        return _gather(images, -parameters, *images.shape[2:])


def _gather(images: Tensor, corners: Int[Tensor, "n 2"], height: int, width: int) -> Tensor:
    """Windows [n, c, height, width] of images that repeat in all directions, each with its own upper left corner."""
    n, channels, rows, columns = images.shape
    y = (corners[:, :1] + torch.arange(height, device=images.device)) % rows
    x = (corners[:, 1:] + torch.arange(width, device=images.device)) % columns
    index = (y[:, :, None] * columns + x[:, None, :]).view(n, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, index).view(n, channels, height, width)


# --- in memory --------------------------------------------------------------------------------------------------------


class _Order:
    """Which samples are in which batch: shared by both kinds of batches."""

    def __init__(
        self, n: int, batch_size: int, seed: int, shuffle: bool, drop_last: bool, rank: int, world: int
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise UserError(f"batch_size is {batch_size}: make it a positive multiple of the {world} processes")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of the {world} processes")
        if n < 1 or (drop_last and n < batch_size):
            raise UserError(f"{n} samples make no batch of {batch_size}: lower batch_size")
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.rank, self.world = rank, world
        self.steps = n // batch_size if drop_last else -(-n // batch_size)

    def permutation(self, generator: torch.Generator) -> Int[Tensor, " n"]:
        return torch.randperm(self.n, generator=generator) if self.shuffle else torch.arange(self.n)

    def bounds(self, step: int) -> tuple[int, int]:
        """Where this process's share of a global batch lies in the epoch's order."""
        first = step * self.batch_size
        size = min(self.batch_size, self.n - first)
        return first + self.rank * size // self.world, first + (self.rank + 1) * size // self.world

    def checked(self, epoch: int, start: int) -> None:
        if epoch < 0 or not 0 <= start <= self.steps:
            raise ValueError(f"epoch {epoch} from batch {start}: an epoch is >= 0 and has {self.steps} batches")


class Batches:
    """Batches of a set that lies on the device as uint8; augmentation and normalisation happen there.

    Each batch is a pair of images, float [b, c, h, w], (x/255 - mean) / std, and labels, int64 [b]. The order and all
    random parameters of epoch e are drawn on the CPU from (seed, e) for the whole epoch and moved to the device at
    once, so a step neither draws nor waits, and `epoch(e, start=k)` gives exactly what `epoch(e)` gives from batch k
    on.

    Process `rank` of `world` gets its contiguous share of every global batch of `batch_size`; together they see what
    one process would. An uneven last batch is kept unless `drop_last`; in it, the shares may differ by one (or be
    empty).

    `fill` says what the augmentation's zeros are: "black" pixels, or the "mean" colour (0 after normalisation).
    """

    def __init__(
        self,
        images: UInt8[Tensor, "n c h w"],
        labels: Int[Tensor, " n"],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        augment: Sequence[Augmentation] = (),
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        fill: Literal["black", "mean"] = "black",
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)} and labels {list(labels.shape)}: uint8 [n, c, h, w] "
                "and [n] are needed"
            )
        if len(mean) not in (1, images.shape[1]) or len(std) != len(mean):
            raise ValueError(f"mean and std have {len(mean)} and {len(std)} entries for {images.shape[1]} channels")
        self._order = _Order(len(images), batch_size, seed, shuffle, drop_last, rank, world)
        self.images, self.labels = images.to(device), labels.to(device)
        self.augment, self.fill, self.dtype = tuple(augment), fill, dtype
        spread = torch.tensor(std, dtype=torch.float64)
        centre = torch.tensor(mean, dtype=torch.float64)
        # One multiplication and one addition, rounded once each: exact for sets whose pixels are few powers of two.
        self._factor = (1 / (255 * spread)).to(self.images.device, dtype).view(-1, 1, 1)
        self._offset = (-centre / spread).to(self.images.device, dtype).view(-1, 1, 1)

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return self._order.steps

    @property
    def samples(self) -> int:
        """How many samples the set has."""
        return self._order.n

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]]]:
        """The batches of one epoch, from batch `start` on."""
        order = self._order
        order.checked(epoch, start)
        device = self.images.device
        draws = generator(order.seed, epoch)
        indices = order.permutation(draws).to(device)
        parameters = [augmentation.draw(order.n, draws).to(device) for augmentation in self.augment]
        for step in range(start, order.steps):
            share = slice(*order.bounds(step))
            chosen = indices[share]
            images = self.images[chosen]
            if self.fill == "mean":
                images = self._normalised(images)
            for augmentation, drawn in zip(self.augment, parameters, strict=True):
                images = augmentation.apply(images, drawn[share])
            yield images if self.fill == "mean" else self._normalised(images), self.labels[chosen]

    def _normalised(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return images.to(self.dtype) * self._factor + self._offset


# --- streamed ---------------------------------------------------------------------------------------------------------


class _Keyed(Dataset[Any]):
    """A data set indexed by (epoch, index), whose random transforms depend on nothing but (seed, epoch, index)."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        mixed = _mixed(self.seed, *key)
        states = random.getstate(), np.random.get_state()  # noqa: NPY002 - libraries draw from the global generator
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed)
            random.seed(mixed)
            np.random.seed(mixed)  # noqa: NPY002
            try:
                return self.dataset[key[1]]
            finally:
                random.setstate(states[0])
                np.random.set_state(states[1])  # noqa: NPY002


class _Keys:
    """Lists of (epoch, index), one a batch; the loader's workers live on while epoch and start are set anew."""

    def __init__(self, order: _Order) -> None:
        self.order, self.epoch, self.start = order, 0, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        indices = self.order.permutation(generator(self.order.seed, self.epoch)).tolist()
        for step in range(self.start, self.order.steps):
            yield [(self.epoch, index) for index in indices[slice(*self.order.bounds(step))]]

    def __len__(self) -> int:
        return self.order.steps - self.start


class StreamedBatches:
    """Batches of a data set too large for memory, read by `workers` processes; otherwise like `Batches`.

    `dataset[i]` gives a transformed image and its label; its random transforms may use torch's, NumPy's and Python's
    global generators, which are seeded from (seed, epoch, i) for each sample, so neither the number of processes or workers
    nor a resume changes what is drawn. `collate` makes a batch of a list of samples.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self._order = _Order(len(dataset), batch_size, seed, shuffle, drop_last, rank, world)
        if not drop_last and 0 < self._order.n % batch_size < world:
            raise UserError(
                f"the last batch has fewer samples than the {world} processes: drop it or change batch_size"
            )
        self._keys = _Keys(self._order)
        self.device = torch.device(device)
        self._loader: DataLoader[Any] = DataLoader(
            _Keyed(dataset, seed),
            batch_sampler=self._keys,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            collate_fn=collate,
            generator=torch.Generator(),  # otherwise an epoch's start draws from the global one, and a resume once more
        )

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return self._order.steps

    @property
    def samples(self) -> int:
        """How many samples the set has."""
        return self._order.n

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, from batch `start` on. Raises UserError naming a file that cannot be read."""
        self._order.checked(epoch, start)
        self._keys.epoch, self._keys.start = epoch, start
        try:
            for images, labels in self._loader:
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except UserError as error:
            # A worker's error arrives with its traceback in the message.
            raise UserError(str(error).rstrip().rpartition("UserError: ")[2]) from error


class Stream:
    """The batches of a training run by its step, counted over the epochs; steps are taken in order, from anywhere."""

    def __init__(self, batches: Batches | StreamedBatches) -> None:
        self.batches = batches
        self._next = -1
        self._iterator: Iterator[tuple[Tensor, Tensor]] = iter(())

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step, this process's share."""
        epoch, position = divmod(step, len(self.batches))
        if step != self._next or position == 0:
            self._iterator = self.batches.epoch(epoch, start=position)
        self._next = step + 1
        return next(self._iterator)
