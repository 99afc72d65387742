"""The losses of what CIL-QUD is compared with (section 8), on the primary head alone.

S are scores, K classes are seen, O of them old. Distillation here is at T = 2 without the factor T^2.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from tenfold_cilqud.objective import knowledge_distillation

LWF_WEIGHT = 3.0


def block_distillation(logits: Float[Tensor, "b k"], teacher: Float[Tensor, "b o"]) -> Float[Tensor, " b"]:
    """Distillation on the old block at T = 2, no T^2, a value a sample."""
    return knowledge_distillation(logits[:, : teacher.shape[1]], teacher, 2.0, factor=1.0)


def lwf_loss(
    logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"], teacher: Float[Tensor, "b o"] | None
) -> Float[Tensor, " b"]:
    """LwF: cross entropy within the new block (labels shifted) and 3 x distillation of the old one, on new images."""
    if teacher is None:
        return cross_entropy(logits, labels, reduction="none")
    old = teacher.shape[1]
    new = cross_entropy(logits[:, old:], labels - old, reduction="none")
    return new + LWF_WEIGHT * block_distillation(logits, teacher)


def binary_loss(
    logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"], teacher: Float[Tensor, "b o"] | None
) -> Float[Tensor, " b"]:
    """The binary form of LwF-MC and of the original iCaRL: new classes by one-hot targets, old by the teacher's sigmoids.

    Summed over the classes.
    """
    target = one_hot(labels, logits.shape[1]).to(logits.dtype)
    if teacher is not None:
        target = torch.cat([teacher.sigmoid(), target[:, teacher.shape[1] :]], 1)
    return binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)


def replay_distillation_loss(
    logits: Float[Tensor, "b k"],
    labels: Int[Tensor, " b"],
    teacher: Float[Tensor, "b o"] | None,
    share: float | None = None,
) -> Float[Tensor, " b"]:
    """Cross entropy over all classes plus distillation of the old block (iCaRL, EEIL); with `share` lambda (BiC, WA) the
    mixture (1 - lambda) CE + lambda KD.
    """
    values = cross_entropy(logits, labels, reduction="none")
    if teacher is None:
        return values
    distilled = block_distillation(logits, teacher)
    return values + distilled if share is None else (1 - share) * values + share * distilled


def align_weights(weight: Float[Tensor, "k d"], new: int) -> Float[Tensor, "k d"]:
    """WA: the last `new` rows scaled by mean ||w_old|| / mean ||w_new||."""
    norms = weight.norm(dim=1)
    factor = norms[:-new].mean() / norms[-new:].mean()
    return torch.cat([weight[:-new], weight[-new:] * factor])


def consolidation_loss(
    logits: Float[Tensor, "b k"], old: Float[Tensor, "b o"], new: Float[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """DMC: squared distance of all logits from those of both experts, each centred to mean zero a sample."""
    target = torch.cat([old - old.mean(1, keepdim=True), new - new.mean(1, keepdim=True)], 1)
    return (logits - target.detach()).square().mean(1)


class Walk:
    """RWalk: a running Fisher information F and a score s of how much each parameter lowered the loss along its path.

    The penalty is sum (F + s)(theta - theta_old)^2 over the parameters. Both are kept from task to task; within one,
    `note` is called after every step with the gradients still there.
    """

    DECAY = 0.9
    TINY = 1e-8

    def __init__(self, net: nn.Module):
        self.names = [name for name, _ in net.named_parameters()]
        zeros = [torch.zeros_like(parameter) for _, parameter in net.named_parameters()]
        self.fisher = [value.clone() for value in zeros]
        self.gain, self.kept_fisher, self.kept_score = (
            [value.clone() for value in zeros],
            [value.clone() for value in zeros],
            [value.clone() for value in zeros],
        )
        self.old = [parameter.detach().clone() for parameter in net.parameters()]
        self.before = [parameter.detach().clone() for parameter in net.parameters()]
        self.held = [False] * len(zeros)

    def penalty(self, net: nn.Module) -> Tensor:
        """Sum (F + s)(theta - theta_old)^2, over what has importance alone: a gradient of zero in place of none would let
        weight decay move the heads of later tasks.
        """
        total = self.old[0].new_zeros(())
        for held, parameter, old, fisher, score in zip(
            self.held, net.parameters(), self.old, self.kept_fisher, self.kept_score, strict=True
        ):
            if held:
                total = total + ((fisher + score) * (parameter - old).square()).sum()
        return total

    @torch.no_grad()
    def note(self, net: nn.Module) -> None:
        """After a step: update F by the squared gradients, and s by the loss's fall over the distance in F's metric."""
        for i, parameter in enumerate(net.parameters()):
            if parameter.grad is None:
                continue
            gradient = parameter.grad
            self.fisher[i].mul_(self.DECAY).addcmul_(gradient, gradient, value=1 - self.DECAY)
            moved = parameter - self.before[i]
            fall = -gradient * moved
            distance = 0.5 * self.fisher[i] * moved.square() + self.TINY
            self.gain[i] += (fall / distance).clamp(min=0.0)
            self.before[i].copy_(parameter)

    @torch.no_grad()
    def end_task(self, net: nn.Module) -> None:
        """Keep F and s, both scaled to a maximum of 1; s is averaged with the earlier ones."""
        greatest = max(float(value.max()) for value in self.fisher) or 1.0
        best = max(float(value.max()) for value in self.gain) or 1.0
        for i, parameter in enumerate(net.parameters()):
            self.kept_fisher[i] = self.fisher[i] / greatest
            self.kept_score[i] = 0.5 * (self.kept_score[i] + self.gain[i] / best)
            self.gain[i].zero_()
            self.old[i].copy_(parameter)
            self.before[i].copy_(parameter)
        self._find_held()

    def _find_held(self) -> None:
        """Which parameters have importance; asked once a task, since it waits for the device."""
        self.held = [
            bool((fisher + score).any()) for fisher, score in zip(self.kept_fisher, self.kept_score, strict=True)
        ]

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Everything, for a checkpoint."""
        return {name: getattr(self, name) for name in self._PARTS}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Back to a checkpoint."""
        for name in self._PARTS:
            own = getattr(self, name)
            for mine, saved in zip(own, state[name], strict=True):
                mine.copy_(saved)
        self._find_held()

    _PARTS = ("fisher", "gain", "kept_fisher", "kept_score", "old", "before")
