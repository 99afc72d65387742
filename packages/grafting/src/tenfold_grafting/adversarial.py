"""The training objectives (sections 2.4 and 8) as functions of a model and a batch.

FAT is a one-step attack with GradAlign; PGD and TRADES are its alternatives; RS, IBP and CROWN-IBP train with bounds.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

from tenfold_grafting.bounds import crown_margins, margin_spec, relaxations
from tenfold_grafting.graph import Graph, trace
from tenfold_grafting.intervals import ibp, ibp_margins
from tenfold_grafting.specification import pixel_box
from tenfold_shared.attacks import held, pgd, uniform_start

Images = Float[Tensor, "batch channels height width"]
Labels = Int[Tensor, " batch"]


def attacked(
    model: nn.Module, x: Images, y: Labels, eps: float, step: float, steps: int, start: Images | None = None
) -> Images:
    """X + delta, a perturbation that raises the cross entropy, found in evaluation mode by signed steps.

    Args:
        model: of pixels.
        x: pixels in [0, 1].
        y: labels.
        eps: radius.
        step: length of a step.
        steps: how many; 1 is FGSM.
        start: initial perturbation, cut so that x + start lies in [0, 1]; default: uniform in the ball.

    """
    first = uniform_start(x, eps) if start is None else (x + start).clamp(0, 1) - x
    with held(model):
        delta = pgd(
            lambda images: cross_entropy(model(images), y), x, eps=eps, step_size=step, steps=steps, start=first
        )
    return x + delta


def adversarial_loss(model: nn.Module, x_attacked: Images, y: Labels) -> Tensor:
    """The cross entropy on attacked images, in the model's present mode."""
    return cross_entropy(model(x_attacked.clamp(0, 1)), y)


def grad_align(model: nn.Module, x: Images, y: Labels, eps: float, noise: Images | None = None) -> Tensor:
    """1 - the mean cosine between the input gradients at x and at x + n, n uniform in the ball (GradAlign).

    The gradient at x is constant; samples with a zero gradient are left out, and without any left the term is 0. x + n
    is not cut to [0, 1].
    """
    noise = (2 * torch.rand_like(x) - 1) * eps if noise is None else noise
    plain = _input_gradient(model, x, y, keep=False).flatten(1)
    noisy = _input_gradient(model, x + noise, y, keep=True).flatten(1)
    lengths = plain.norm(dim=1), noisy.norm(dim=1)
    chosen = (lengths[0] != 0) & (lengths[1] != 0)
    if not bool(chosen.any()):
        return x.new_zeros(())
    cosine = (plain[chosen] * noisy[chosen]).sum(1) / (lengths[0][chosen] * lengths[1][chosen])
    return 1 - cosine.mean()


def _input_gradient(model: nn.Module, x: Tensor, y: Tensor, keep: bool) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model(x), y), x, create_graph=keep)
    return gradient


def trades(
    model: nn.Module,
    x: Images,
    y: Labels,
    *,
    eps: float,
    step: float,
    steps: int,
    beta: float = 6.0,
    noise: Images | None = None,
) -> Tensor:
    """TRADES: CE(clean) + beta KL(clean || attacked), the attack raising the divergence from x + 0.001 noise."""
    noise = torch.randn_like(x) if noise is None else noise
    start = 0.001 * noise
    training = model.training
    model.eval()
    with torch.no_grad():
        clean = softmax(model(x), 1)
    with held(model):
        delta = pgd(
            lambda images: kl_div(log_softmax(model(images), 1), clean, reduction="sum"),
            x,
            eps=eps,
            step_size=step,
            steps=steps,
            start=start,
        )
    model.train(training)
    logits = model(x)
    divergence = kl_div(log_softmax(model((x + delta).clamp(0, 1)), 1), softmax(logits, 1), reduction="batchmean")
    return cross_entropy(logits, y) + beta * divergence


# -- training with bounds -------------------------------------------------------------------------------------------------


def live_graph(model: nn.Module, x: Images) -> Graph:
    """The graph of the model's own parameters, batch norms with their running statistics."""
    return trace(model, x.shape[1:], live=True)


def rs_loss(model: nn.Module, x: Images, eps: float, *, by_layer: bool = True) -> Tensor:
    """Sum over layers of the mean over samples of - sum_i tanh(1 + l_i u_i), with interval bounds: few unstable neurons.

    Args:
        model: of pixels.
        x: pixels.
        eps: radius of the boxes.
        by_layer: divide each layer's term by its number of neurons, so that a weight means the same for all networks.

    """
    graph = live_graph(model, x)
    intervals, _ = ibp(graph, pixel_box(graph, x, eps))
    total = x.new_zeros(())
    for lower, upper in intervals.values():
        term = -torch.tanh(1 + lower * upper).flatten(1)
        total = total + (term.mean() if by_layer else term.sum(1).mean())
    return total


def certified_loss(
    model: nn.Module, x: Images, y: Labels, eps: float, *, kappa: float = 0.5, crown: float = 0.0
) -> Tensor:
    """Kappa CE(clean) + (1 - kappa) CE(worst case), with worst margins of IBP, or mixed with those of CROWN-IBP.

    Args:
        model: of pixels.
        x: pixels.
        y: labels.
        eps: radius of the boxes.
        kappa: weight of the clean loss.
        crown: 1 - the weight of IBP in the margins: 0 is IBP training, above it CROWN-IBP.

    """
    graph = live_graph(model, x)
    clean = cross_entropy(model(x), y)
    if eps == 0:
        return clean
    box = pixel_box(graph, x, eps)
    spec = margin_spec(y, graph.classes).to(x)
    worst = ibp_margins(graph, box, spec)
    if crown > 0:
        intervals, _ = ibp(graph, box)
        worst = (1 - crown) * worst + crown * crown_margins(graph, box, spec, relaxations(graph, intervals))
    logits = torch.cat([worst.new_zeros(len(worst), 1), -worst], 1)
    return kappa * clean + (1 - kappa) * cross_entropy(logits, torch.zeros_like(y))


def two_group_sgd(
    lines: Sequence[nn.Parameter],
    weights: Sequence[nn.Parameter],
    *,
    lr_lines: float = 0.01,
    lr_weights: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
) -> torch.optim.SGD:
    """SGD of the fine-tuning: slopes and intercepts with their own rate and no decay, all else with decay."""
    groups = [
        {"params": list(lines), "lr": lr_lines, "weight_decay": 0.0},
        {"params": list(weights), "lr": lr_weights, "weight_decay": weight_decay},
    ]
    return torch.optim.SGD([group for group in groups if group["params"]], lr_weights, momentum)
