"""RCIL-QUD (sections 2.4 and 2.5): every term at its worst case in an l-infinity ball, and consistency on unlabeled images.

Images lie in [0, 1] and the network normalises by itself, so eps and step sizes count in pixels. An attack holds the
network in eval mode and leaves no gradient in its parameters (`tenfold_shared.attacks`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from tenfold_cilqud.models import Head, IncrementalNet
from tenfold_cilqud.objective import (
    Answered,
    Distance,
    Labelled,
    consistency,
    feature_transfer,
    knowledge_distillation,
)
from tenfold_shared.attacks import held, pgd, project
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
        if min(self.eps, self.step_size, self.steps, self.gamma1, self.gamma2, self.trades_beta) < 0:
            raise UserError("--robust.eps, step_size, steps, gamma1, gamma2 and trades_beta cannot be negative")


class Attack(NamedTuple):
    """One inner maximisation: images, noise in [-1, 1] to start from, and what is raised, as a function of features.

    Every term of the objective depends on the images through their features alone, so all attacks of a step share one
    pass through the backbone.
    """

    x: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    loss: Callable[[Tensor], Tensor]


def worst_cases(net: IncrementalNet, attacks: Sequence[Attack], settings: Robust) -> list[Tensor]:
    """Delta of each attack. The network stands still in eval mode, where samples do not see one another, so that one
    batch of all images gives what the attacks would give apart.
    """
    x = torch.cat([attack.x for attack in attacks])
    sizes = [len(attack.x) for attack in attacks]
    start = project(x, settings.eps * torch.cat([attack.noise for attack in attacks]), settings.eps)

    def loss(images: Tensor) -> Tensor:
        parts = net.features(images).split(sizes)
        return torch.cat([attack.loss(features) for attack, features in zip(attacks, parts, strict=True)])

    with held(net):
        delta = pgd(loss, x, eps=settings.eps, step_size=settings.step_size, steps=settings.steps, start=start)
    return list(delta.split(sizes))


def labelled_attack(
    net: IncrementalNet, batch: Labelled, tasks: int, heads: tuple[Head, ...], settings: Robust, noise: Tensor
) -> Attack:
    """The worst case of labelled images for the heads and classes that their loss uses: of the cross entropy, or of the
    divergence from the clean answer (TRADES, first head).
    """
    if settings.adv == "trades":
        return rtc_attack(net, batch.x, tasks, noise, heads[0])

    def loss(features: Tensor) -> Tensor:
        values = [cross_entropy(net.logits(features, tasks, head), batch.y, reduction="none") for head in heads]
        return torch.stack(values).sum(0)

    return Attack(batch.x, noise, loss)


def with_delta(batch: Labelled, delta: Tensor, settings: Robust) -> Labelled:
    """A labelled batch at its worst case; TRADES keeps both images."""
    attacked = batch.x + delta
    return batch._replace(attacked=attacked) if settings.adv == "trades" else batch._replace(x=attacked)


def rkd_attack(
    net: IncrementalNet, batch: Answered, old_tasks: int, temperature: float, noise: Tensor, head: Head = "main"
) -> Attack:
    """RKD: max over delta of KD(head(x + delta), teacher(x)) over the old classes."""
    answers = batch.main if head == "main" else batch.aux

    def loss(features: Tensor) -> Tensor:
        return knowledge_distillation(net.logits(features, old_tasks, head), answers, temperature)

    return Attack(batch.x, noise, loss)


def rft_attack(batch: Answered, distance: Distance, noise: Tensor) -> Attack:
    """RFT: max over delta of FT(phi(x + delta), phi_hat(x))."""
    return Attack(batch.x, noise, lambda features: feature_transfer(features, batch.features, distance))


def rtc_attack(net: IncrementalNet, x: Tensor, tasks: int, noise: Tensor, head: Head = "main") -> Attack:
    """RTC: max over delta of KL(head(x) || head(x + delta)), the clean side fixed; needs a start other than 0, where the
    gradient vanishes.
    """
    with torch.no_grad(), held(net):
        clean = net(x, tasks, head)
    return Attack(x, noise, lambda features: consistency(clean, net.logits(features, tasks, head)))


def rtc_term(
    net: IncrementalNet, clean: Tensor, attacked: Tensor, tasks: int, count: float, *, detach_clean: bool = False
) -> Tensor:
    """RTC in the update: KL(main(x) || main(x + delta)) over all classes seen, both sides with gradient (TRADES)."""
    reference = net(clean, tasks, "main")
    reference = reference.detach() if detach_clean else reference
    return consistency(reference, net(attacked, tasks, "main")).sum() / count
