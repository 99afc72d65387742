"""Order, slices, resumption and augmentation of batches, each against an obvious reference."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from tenfold_shared.batches import Batches, Flip, RandomCrop, Shift, StreamedBatches, generator
from tenfold_shared.errors import UserError

N = 23
IMAGES = torch.randint(256, (N, 3, 6, 5), dtype=torch.uint8, generator=generator(0))
LABELS = torch.arange(N)
AUGMENT = (RandomCrop(2), Flip(), Shift(1))


def batches(**options):
    defaults = {"seed": 7, "augment": AUGMENT, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    return Batches(IMAGES, LABELS, options.pop("batch_size", 4), **{**defaults, **options})


class Dataset:
    """A set whose transform is random in both of the generators that transforms use."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        noise = torch.rand(2) + random.random() + np.random.rand()  # noqa: NPY002 - as libraries draw
        return torch.cat([IMAGES[index].flatten().float(), noise]), index


def streamed(**options):
    return StreamedBatches(Dataset(), options.pop("batch_size", 4), **{"seed": 7, **options})


def equal(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("make", [batches, streamed])
def test_an_epoch_is_a_pure_function_of_seed_and_epoch(make):
    data = make()
    third = list(data.epoch(3))
    list(data.epoch(0))
    assert equal(data.epoch(3), third)
    assert equal(make().epoch(3), third)
    assert not equal(data.epoch(4), third)
    assert not equal(make(seed=8).epoch(3), third)
    assert sorted(torch.cat([labels for _, labels in third]).tolist()) == list(range(N))


@pytest.mark.parametrize("make", [batches, streamed])
def test_epochs_leave_the_global_generators_alone(make):
    data = make()  # a type checker may draw from Python's generator here
    torch.manual_seed(0)
    expected, state = torch.rand(3), random.getstate()
    torch.manual_seed(0)
    list(data.epoch(0))
    assert torch.equal(torch.rand(3), expected)
    assert random.getstate() == state


@pytest.mark.parametrize("make", [batches, streamed])
@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_resuming_from_a_batch_is_exact(make, start):
    data = make()
    assert len(data) == 6
    assert equal(data.epoch(2, start), list(data.epoch(2))[start:])


@pytest.mark.parametrize("make", [batches, streamed])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_see_the_single_process_batches(make, world):
    ranks = [
        list(make(batch_size=8, rank=rank, world=world, drop_last=make is streamed).epoch(1)) for rank in range(world)
    ]
    single = list(make(batch_size=8, drop_last=make is streamed).epoch(1))
    for step, (images, labels) in enumerate(single):
        assert torch.equal(torch.cat([shares[step][0] for shares in ranks]), images)
        assert torch.equal(torch.cat([shares[step][1] for shares in ranks]), labels)
    sizes = [[len(shares[-1][1]) for shares in ranks]]
    assert max(sizes[0]) - min(sizes[0]) <= 1  # also of the uneven last batch


@pytest.mark.parametrize("make", [batches, streamed])
def test_the_uneven_last_batch(make):
    assert [len(labels) for _, labels in make().epoch(0)] == [4, 4, 4, 4, 4, 3]
    dropped = make(drop_last=True)
    assert len(dropped) == 5
    assert [len(labels) for _, labels in dropped.epoch(0)] == [4] * 5


@pytest.mark.parametrize("make", [batches, streamed])
def test_without_shuffling_the_order_is_the_sets(make):
    assert torch.equal(torch.cat([labels for _, labels in make(shuffle=False).epoch(5)]), LABELS)


def test_workers_change_nothing():
    data = streamed(workers=2)
    assert equal(data.epoch(1), streamed().epoch(1))
    assert equal(data.epoch(1, 3), list(streamed().epoch(1))[3:])


def reference_crop(image, corner, padding):
    _, h, w = image.shape
    out = torch.zeros_like(image)
    for y in range(h):
        for x in range(w):
            row, column = y + int(corner[0]) - padding, x + int(corner[1]) - padding
            if 0 <= row < h and 0 <= column < w:
                out[:, y, x] = image[:, row, column]
    return out


def test_augmentations_against_loops_over_samples():
    n = 200
    images = torch.randint(1, 256, (n, 3, 6, 5), dtype=torch.uint8, generator=generator(1))
    crop, flip, shift = RandomCrop(2), Flip(), Shift(1)
    corners, mirrored, moves = (augmentation.draw(n, generator(2)) for augmentation in (crop, flip, shift))
    cropped, flipped, shifted = crop.apply(images, corners), flip.apply(images, mirrored), shift.apply(images, moves)
    for i in range(n):
        assert torch.equal(cropped[i], reference_crop(images[i], corners[i], 2))
        assert torch.equal(flipped[i], images[i].flip(2) if mirrored[i] else images[i])
        assert torch.equal(shifted[i], images[i].roll(moves[i].tolist(), (1, 2)))
    # every place is drawn, about equally often
    assert corners.unique(dim=0).shape == (25, 2)
    assert moves.unique(dim=0).shape == (9, 2)
    assert 70 < int(mirrored.sum()) < 130  # +-4.2 standard deviations of Binomial(200, 1/2)


@pytest.mark.parametrize("fill", ["black", "mean"])
def test_a_batch_is_the_augmented_and_normalised_images(fill):
    data = batches(augment=(RandomCrop(2), Flip()), fill=fill)
    draws = generator(7, 0)
    order = torch.randperm(N, generator=draws)
    corners, mirrored = RandomCrop(2).draw(N, draws), Flip().draw(N, draws)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    images = torch.cat([images for images, _ in data.epoch(0)])
    for position, index in enumerate(order):
        image = IMAGES[index].float() / 255
        image = (image - mean) / std if fill == "mean" else image
        image = reference_crop(image, corners[position], 2)
        image = image.flip(2) if mirrored[position] else image
        image = image if fill == "mean" else (image - mean) / std
        torch.testing.assert_close(images[position], image, rtol=1e-5, atol=1e-6)


def test_digits_pixels_become_exact_sixteenths():
    images = torch.arange(17, dtype=torch.uint8).view(17, 1, 1, 1)
    data = Batches(images, torch.arange(17), 17, shuffle=False, mean=(8 / 255,), std=(16 / 255,))
    ((batch, _),) = data.epoch(0)
    assert torch.equal(batch, images / 16 - 0.5)


def test_dtype_follows_the_option():
    (images, labels), *_ = batches(dtype=torch.bfloat16).epoch(0)
    assert images.dtype == torch.bfloat16
    assert labels.dtype == torch.int64


def test_padding_uses_no_more_than_the_images():
    """A crop with the corner in the middle is the image itself."""
    images = IMAGES.float()
    assert torch.equal(RandomCrop(3).apply(images, torch.full((N, 2), 3)), images)
    moved = RandomCrop(1).apply(images, torch.zeros(N, 2, dtype=torch.int64))
    assert torch.equal(moved, functional.pad(images, (1, 0, 1, 0))[:, :, :-1, :-1])


class Broken(Dataset):
    def __getitem__(self, index):
        raise UserError(f"{Path('a') / 'b.jpg'} is no readable image: remove it")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_sample_is_one_sentence(workers):
    with pytest.raises(UserError) as caught:
        list(StreamedBatches(Broken(), 4, workers=workers).epoch(0))
    assert str(caught.value) == f"{Path('a') / 'b.jpg'} is no readable image: remove it"


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="multiple of the 3 processes"):
        batches(world=3)
    with pytest.raises(UserError, match="make no batch of 32"):
        batches(batch_size=32, drop_last=True)
    with pytest.raises(ValueError, match="2 and 2 entries for 3 channels"):
        batches(mean=(0.5, 0.5), std=(1.0, 1.0))
    with pytest.raises(ValueError, match="has 6 batches"):
        list(batches().epoch(0, 7))
    with pytest.raises(UserError, match="fewer samples than the 4 processes"):
        streamed(world=4, batch_size=20)
