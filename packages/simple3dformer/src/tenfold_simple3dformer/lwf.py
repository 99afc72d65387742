"""Learning without forgetting (section 2.5): a frozen image teacher keeps the 2D knowledge of the shared blocks."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Mode = Literal["hard", "kl"]


@torch.no_grad()
def teach(teacher: nn.Module, images: Float[Tensor, "b ch h w"]) -> Float[Tensor, "b m"]:
    """The teacher's logits, in evaluation mode and without gradients; ground-truth labels are never used."""
    teacher.eval()
    return teacher(images)


def distillation(
    student: Float[Tensor, "b m"], teacher: Float[Tensor, "b m"], mode: Mode = "hard", temperature: float = 1.0
) -> Float[Tensor, ""]:
    """What ties the image head to the teacher.

    ``hard``: CE(student, argmax teacher), the released term. ``kl``: the symmetric Kullback-Leibler divergence at a
    temperature, times its square so that gradients keep their size.
    """
    if mode == "hard":
        return F.cross_entropy(student, teacher.argmax(1))
    p, q = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    forward = F.kl_div(p, q, reduction="batchmean", log_target=True)
    backward = F.kl_div(q, p, reduction="batchmean", log_target=True)
    return 0.5 * temperature**2 * (forward + backward)


def lwf_loss(
    logits: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    image_logits: Float[Tensor, "b m"],
    teacher_logits: Float[Tensor, "b m"],
    *,
    lam: float = 0.1,
    mode: Mode = "hard",
    temperature: float = 1.0,
    weight: Float[Tensor, " k"] | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """CE(head3d(x), y) + lambda * distillation(head2d(u), teacher(u)), and the two terms."""
    loss_3d = F.cross_entropy(logits, labels, weight)
    loss_2d = distillation(image_logits, teacher_logits, mode, temperature)
    return loss_3d + lam * loss_2d, {"loss_3d": loss_3d.detach(), "loss_2d": loss_2d.detach()}


def retention(student: Float[Tensor, "b m"], teacher: Float[Tensor, "b m"]) -> Float[Tensor, ""]:
    """Fraction of images on which the image head agrees with the teacher's decision."""
    return (student.argmax(1) == teacher.argmax(1)).float().mean()
