"""RCIL-QUD (sections 2.4 and 2.5): every term at its worst case in an l-infinity ball, and consistency on unlabeled images.

Images lie in [0, 1] and the network normalises by itself, so eps and step sizes count in pixels. An attack holds the
network in eval mode and leaves no gradient in its parameters (`tenfold_shared.attacks`).
"""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from tenfold_cilqud.models import Head, IncrementalNet
from tenfold_cilqud.objective import (
    Answered,
    Labelled,
    Weights,
    consistency,
    feature_transfer,
    knowledge_distillation,
)
from tenfold_shared.attacks import Loss, held, pgd, project
from tenfold_shared.errors import UserError


@dataclasses.dataclass
class Robust:
    """Which terms are attacked in training, and how."""

    adv: Literal["none", "madry", "trades"] = "none"
    """Labelled terms: on clean images, on the worst case (the paper's formula), or CE(clean) + beta KL (TRADES)."""
    lwf: Literal["clean", "attacked"] = "clean"
    """Unlabeled images: attacked gives RKD and RFT, against the previous model's answers on the clean image."""
    gamma1: float = 1.0
    """Weight of the attacked learning-without-forgetting terms."""
    gamma2: float = 0.0
    """Weight of the consistency term RTC; 0 leaves it out."""
    rtc_detach_clean: bool = False
    """Send no gradient through RTC's clean side."""
    rkd_attack: Literal["shared", "per_head"] = "shared"
    """One attack, on the primary head, for both heads of RKD, or one for each."""
    eps: float = 8 / 255
    """Radius of the ball, in pixels of [0, 1]."""
    step_size: float = 2 / 255
    """Length of an attack's step."""
    steps: int = 10
    """Steps of an attack in training."""
    trades_beta: float = 6.0
    """TRADES' weight of the divergence."""

    def __post_init__(self) -> None:
        """Refuse what is no attack."""
        if self.eps < 0 or self.step_size < 0 or self.steps < 0 or self.gamma1 < 0 or self.gamma2 < 0:
            raise UserError("--robust.eps, step_size, steps, gamma1 and gamma2 cannot be negative")

    @property
    def any(self) -> bool:
        """Whether training attacks anything."""
        return self.adv != "none" or self.lwf == "attacked" or self.gamma2 > 0


def worst_case(net: IncrementalNet, loss: Loss, x: Tensor, settings: Robust, noise: Tensor) -> Tensor:
    """delta [b, c, h, w] from noise in [-1, 1] scaled to the ball; the network stands still meanwhile."""
    start = project(x, settings.eps * noise, settings.eps)
    with held(net):
        return pgd(
            loss, x, eps=settings.eps, step_size=settings.step_size, steps=settings.steps, start=start
        )


def attack_labelled(
    net: IncrementalNet, batch: Labelled, tasks: int, heads: tuple[Head, ...], settings: Robust, noise: Tensor
) -> Labelled:
    """A labelled batch at its worst case for the heads and classes that its loss uses; TRADES keeps both images."""
    if settings.adv == "none" or len(batch.x) == 0:
        return batch
    if settings.adv == "trades":
        with torch.no_grad(), held(net):
            clean = net(batch.x, tasks, heads[0])

        def loss(images: Tensor) -> Tensor:
            return consistency(clean, net(images, tasks, heads[0]))

    else:

        def loss(images: Tensor) -> Tensor:
            features = net.features(images)
            values = [cross_entropy(net.logits(features, tasks, head), batch.y, reduction="none") for head in heads]
            return torch.stack(values).sum(0)

    attacked = batch.x + worst_case(net, loss, batch.x, settings, noise)
    return batch._replace(attacked=attacked) if settings.adv == "trades" else batch._replace(x=attacked)


def rkd_delta(
    net: IncrementalNet, batch: Answered, old_tasks: int, weights: Weights, settings: Robust, noise: Tensor, head: Head
) -> Tensor:
    """RKD: argmax_delta KD(head(x + delta), teacher(x)) over the old classes."""
    answers = batch.main if head == "main" else batch.aux

    def loss(images: Tensor) -> Tensor:
        return knowledge_distillation(net(images, old_tasks, head), answers, weights.temperature)

    return worst_case(net, loss, batch.x, settings, noise)


def rft_delta(net: IncrementalNet, batch: Answered, weights: Weights, settings: Robust, noise: Tensor) -> Tensor:
    """RFT: argmax_delta FT(phi(x + delta), phi_hat(x))."""

    def loss(images: Tensor) -> Tensor:
        return feature_transfer(net.features(images), batch.features, weights.distance)

    return worst_case(net, loss, batch.x, settings, noise)


def rtc_delta(net: IncrementalNet, x: Tensor, tasks: int, settings: Robust, noise: Tensor) -> Tensor:
    """RTC: argmax_delta KL(main(x) || main(x + delta)), the clean side fixed; needs a start other than 0, where the
    gradient vanishes.
    """
    with torch.no_grad(), held(net):
        clean = net(x, tasks, "main")

    def loss(images: Tensor) -> Tensor:
        return consistency(clean, net(images, tasks, "main"))

    return worst_case(net, loss, x, settings, noise)


def rtc_term(
    net: IncrementalNet, clean: Tensor, attacked: Tensor, tasks: int, count: float, *, detach_clean: bool = False
) -> Tensor:
    """RTC in the update: KL(main(x) || main(x + delta)) over all classes seen, both sides with gradient (TRADES)."""
    reference = net(clean, tasks, "main")
    reference = reference.detach() if detach_clean else reference
    return consistency(reference, net(attacked, tasks, "main")).sum() / count


def attack_answered(
    net: IncrementalNet, batch: Answered, old_tasks: int, weights: Weights, settings: Robust, noise: Tensor, head: Head
) -> Float[Tensor, "b c h w"]:
    """Unlabeled images at RKD's worst case for a head."""
    return batch.x + rkd_delta(net, batch, old_tasks, weights, settings, noise, head)
