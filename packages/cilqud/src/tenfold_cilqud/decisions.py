"""How the baselines score classes at test: nearest mean (iCaRL), bias correction (BiC), rectified scores (IL2M)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tenfold_cilqud.anchors import nearest_mean
from tenfold_cilqud.models import IncrementalNet
from tenfold_shared.errors import UserError


class NearestMean(nn.Module):
    """iCaRL: the class whose exemplars' mean feature is nearest."""

    means: Tensor

    def __init__(self, width: int, classes_per_task: int, tasks: int):
        super().__init__()
        self.register_buffer("means", torch.zeros(classes_per_task * tasks, width))

    def forward(self, net: IncrementalNet, features: Float[Tensor, "b d"], tasks: int) -> Float[Tensor, "b k"]:
        """Minus squared distances."""
        return nearest_mean(features, self.means[: tasks * net.classes_per_task].to(features.dtype))


class BiasCorrection(nn.Module):
    """BiC: the logits of each task's block are scaled and shifted, a * logit + b; every task keeps its pair."""

    def __init__(self, width: int, classes_per_task: int, tasks: int):
        super().__init__()
        # Fitted on their own when a task ends; while a network learns they stand still.
        self.scale = nn.Parameter(torch.ones(tasks), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(tasks), requires_grad=False)

    def forward(self, net: IncrementalNet, features: Float[Tensor, "b d"], tasks: int) -> Float[Tensor, "b k"]:
        """Corrected logits."""
        return self.correct(net.logits(features, tasks), net.classes_per_task)

    def correct(self, logits: Float[Tensor, "b k"], classes_per_task: int) -> Float[Tensor, "b k"]:
        """Logits of whole blocks, corrected."""
        tasks = logits.shape[1] // classes_per_task
        return logits * self.scale[:tasks].repeat_interleave(classes_per_task) + self.shift[:tasks].repeat_interleave(
            classes_per_task
        )


class Rectified(nn.Module):
    """IL2M: where the top class is a new one, an old class i's softmax score is multiplied by
    (mu_init(i) / mu_now(i)) (conf_now / conf_then(i)).

    mu_init(i) is the mean score of class i over its own images when it was first learned, mu_now(i) the same now, over
    its anchors; conf is the mean top score over all training images of a state.
    """

    initial: Tensor
    present: Tensor
    confidence: Tensor

    def __init__(self, width: int, classes_per_task: int, tasks: int):
        super().__init__()
        self.register_buffer("initial", torch.ones(classes_per_task * tasks))
        self.register_buffer("present", torch.ones(classes_per_task * tasks))
        self.register_buffer("confidence", torch.ones(tasks))

    def forward(self, net: IncrementalNet, features: Float[Tensor, "b d"], tasks: int) -> Float[Tensor, "b k"]:
        """Rectified softmax scores."""
        scores = net.logits(features, tasks).softmax(1)
        old = (tasks - 1) * net.classes_per_task
        if old == 0:
            return scores
        then = self.confidence[: tasks - 1].repeat_interleave(net.classes_per_task)
        factor = self.initial[:old] / self.present[:old].clamp(min=1e-8) * self.confidence[tasks - 1] / then
        rectified = torch.cat([scores[:, :old] * factor, scores[:, old:]], 1)
        return torch.where((scores.argmax(1) >= old)[:, None], rectified, scores)


DECISIONS: dict[str, type[NearestMean] | type[BiasCorrection] | type[Rectified]] = {
    "icarl": NearestMean,
    "bic": BiasCorrection,
    "il2m": Rectified,
}


def add_decision(net: IncrementalNet, method: str) -> None:
    """Give a network the decision that its method needs, if any."""
    if method in DECISIONS:
        net.decision = DECISIONS[method](net.width, net.classes_per_task, net.tasks)


def decision_of(state: dict[str, Tensor]) -> str:
    """The method whose decision a saved state holds; empty for the plain primary head."""
    entries = {name.removeprefix("decision.") for name in state if name.startswith("decision.")}
    for method, kind in DECISIONS.items():
        if entries and entries == set(kind(1, 1, 1).state_dict()):
            return method
    if entries:
        raise UserError(f"the checkpoint's decision has the entries {sorted(entries)}, which no method here has")
    return ""
