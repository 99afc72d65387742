"""Learning rates by epoch, counted from 0 (section 6). Each returns the rate of one optimiser in one epoch."""

import math


def cosine(epoch: int, lr: float, epochs: int, warmup_epochs: int = 0, warmup_lr: float = 0.0) -> float:
    """The released cosine rule lr/2 * (1 + cos((epoch - 1)/epochs * pi)), after a constant warm-up if there is one.

    The shift by one is the release's: epoch 1 is the peak, and epochs 0 and 2 have equal rates. With a warm-up the run
    lasts epochs + warmup_epochs.
    """
    if epoch < warmup_epochs:
        return warmup_lr
    return lr * 0.5 * (1.0 + math.cos((epoch - warmup_epochs - 1) / epochs * math.pi))


def step(epoch: int, lr: float, epochs: int) -> float:
    """The generic step rule: lr, a tenth from half of the epochs on, a hundredth from three quarters on.

    There is no warm-up: the release computes one and then overwrites it.
    """
    if epoch >= 0.75 * epochs:
        return lr * 0.01
    return lr * 0.1 if epoch >= 0.5 * epochs else lr


def mask_step(epoch: int, lr: float, epochs: int) -> float:
    """The step rule written for the mask, which the release never calls: a tenth from 75 %, a hundredth from 90 %."""
    if epoch >= 0.9 * epochs:
        return lr * 0.01
    return lr * 0.1 if epoch >= 0.75 * epochs else lr


SCHEDULES = {"cosine": cosine, "step": step, "mask_step": mask_step}
