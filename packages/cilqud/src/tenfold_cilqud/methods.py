"""The loss of a step for CIL-QUD, RCIL-QUD and the baselines, and what a baseline does when a task ends."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tenfold_cilqud.anchors import class_means
from tenfold_cilqud.baselines import (
    align_weights,
    binary_loss,
    consolidation_loss,
    lwf_loss,
    replay_distillation_loss,
)
from tenfold_cilqud.decisions import BiasCorrection, NearestMean, Rectified
from tenfold_cilqud.models import Head, IncrementalNet
from tenfold_cilqud.objective import (
    Answered,
    Labelled,
    Terms,
    balanced_term,
    classification,
    consistency,
    distillation_terms,
    first_task_terms,
    random_term,
    transfer_term,
)
from tenfold_cilqud.protocol import Samples
from tenfold_cilqud.robust import attack_labelled, rft_delta, rkd_delta, rtc_delta, rtc_term
from tenfold_cilqud.session import Session, Task, features_of
from tenfold_cilqud.streams import Stream

Loss = Callable[[Task, int], Terms]


# --- CIL-QUD ---------------------------------------------------------------------------------------------------------------


def attacked(task: Task, batch: Labelled, whole: int, stream: Stream, step: int, heads: tuple[Head, ...]) -> Labelled:
    """A labelled batch as the recipe trains on it."""
    settings = task.session.recipe.robust
    if settings.adv == "none":
        return batch
    noise = stream.noise(step, batch.x, whole, "attack")
    return attack_labelled(task.session.net, batch, task.seen, heads, settings, noise)


def cil_qud(task: Task, step: int) -> Terms:
    """L = (L_rs + K_aux) + w (L_cb + K_main) of section 2.2, every term at its worst case where the recipe says so."""
    net, recipe = task.session.net, task.session.recipe
    weights, heads = recipe.weights, recipe.heads
    if task.index == 0:
        batch, whole = task.random[step]
        if heads == "two":
            return first_task_terms(net, attacked(task, batch, whole, task.random, step, ("main", "aux")), weights.trades)[0]
        batch = attacked(task, batch, whole, task.random, step, ("main",))
        return {"main": classification(net, batch, 1, "main", weights.trades)[0]}
    terms: Terms = {}
    if heads != "balanced":
        head: Head = "aux" if heads == "two" else "main"
        batch, whole = task.random[step]
        batch = attacked(task, batch, whole, task.random, step, (head,))
        if heads == "two":
            terms["random"] = random_term(net, batch, task.seen, weights)[0]
        else:
            terms["random"] = classification(net, batch, task.seen, head, weights.trades)[0]
    if heads != "random":
        terms["balanced"] = balanced_term(net, balanced_parts(task, step), task.seen, weights)
    if task.answers is not None:
        terms |= unlabeled_terms(task, step, ("aux", "main") if heads == "two" else ("main",))
    return terms


def balanced_parts(task: Task, step: int) -> list[tuple[float, Labelled]]:
    """The class-balanced batches of a step, attacked as one, with their weights."""
    drawn = [(weight, stream, *stream[step]) for weight, stream in task.balanced]
    if task.session.recipe.robust.adv != "none":
        noise = torch.cat([stream.noise(step, batch.x, whole, "attack") for _, stream, batch, whole in drawn])
        whole = attack_labelled(
            task.session.net, merged([batch for _, _, batch, _ in drawn]), task.seen, ("main",), task.session.recipe.robust, noise
        )
        if task.together:
            return [(1.0, whole)]
        return list(zip([weight for weight, *_ in drawn], parted(whole, [batch for _, _, batch, _ in drawn]), strict=True))
    if task.together:
        return [(1.0, merged([batch for _, _, batch, _ in drawn]))]
    return [(weight, batch) for weight, _, batch, _ in drawn]


def merged(batches: list[Labelled]) -> Labelled:
    """Several batches as one."""
    if len(batches) == 1:
        return batches[0]
    x, y = torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches])
    return Labelled(x, y, sum(batch.count for batch in batches))


def parted(whole: Labelled, batches: list[Labelled]) -> list[Labelled]:
    """A merged batch taken apart again, with the counts that the parts had."""
    sizes = [len(batch.y) for batch in batches]
    images = whole.x.split(sizes)
    worst = [None] * len(sizes) if whole.attacked is None else whole.attacked.split(sizes)
    return [
        batch._replace(x=x, attacked=extreme) for batch, x, extreme in zip(batches, images, worst, strict=True)
    ]


def unlabeled_terms(task: Task, step: int, heads: tuple[Head, ...]) -> Terms:
    """L_LwF by KD and FT on the queried images, RKD and RFT where attacked, and RTC."""
    net, recipe, answers = task.session.net, task.session.recipe, task.answers
    assert answers is not None
    if task.unlabeled is None:
        task.unlabeled = answers.stream()
    weights, settings, old, stream = recipe.weights, recipe.robust, task.index, task.unlabeled
    batch, whole = answers.batch(stream, step)

    def noise(what: str) -> Tensor:
        return stream.noise(step, batch.x, whole, what)

    terms: Terms = {}
    if "kd" in recipe.distill and settings.lwf == "clean":
        terms |= distillation_terms(net, batch, old, weights, heads)
    elif "kd" in recipe.distill:
        # One attack on the primary head serves both heads, or each head has its own, and its own pass.
        rounds = [heads] if settings.rkd_attack == "shared" else [(head,) for head in heads]
        for own in rounds:
            target: Head = "main" if len(own) > 1 else own[0]
            delta = rkd_delta(net, batch, old, weights, settings, noise(f"rkd-{target}"), target)
            terms |= distillation_terms(net, batch._replace(x=batch.x + delta), old, weights, own)
    if "ft" in recipe.distill:
        held = batch
        if settings.lwf == "attacked":
            held = batch._replace(x=batch.x + rft_delta(net, batch, weights, settings, noise("rft")))
        terms["ft"] = transfer_term(net, held, weights)
    if settings.gamma2:
        terms["rtc"] = settings.gamma2 * consistency_term(task, batch, noise("rtc"))
    return terms


def consistency_term(task: Task, batch: Answered, noise: Tensor) -> Tensor:
    """RTC on an unlabeled batch."""
    net, settings = task.session.net, task.session.recipe.robust
    delta = rtc_delta(net, batch.x, task.seen, settings, noise)
    return rtc_term(net, batch.x, batch.x + delta, task.seen, batch.count, detach_clean=settings.rtc_detach_clean)


# --- baselines ---------------------------------------------------------------------------------------------------------------


def baseline(task: Task, step: int) -> Terms:
    """A baseline's loss on its labelled batch, primary head; the teacher sees the clean images."""
    session, recipe = task.session, task.session.recipe
    clean, whole = task.random[step]
    batch = attacked(task, clean, whole, task.random, step, ("main",))
    logits = session.net(batch.x, task.seen, "main")
    answers = None
    if task.teacher is not None and recipe.method in ("lwf", "icarl", "eeil", "bic", "wa"):
        with torch.no_grad():
            answers = teacher_logits(task.teacher, clean.x, task.index)
    values = baseline_values(recipe.method, recipe.binary, logits, batch.y, answers)
    terms = {"loss": values.sum() / batch.count}
    if batch.attacked is not None:
        worst = consistency(logits, session.net(batch.attacked, task.seen, "main"))
        terms["trades"] = recipe.robust.trades_beta * worst.sum() / batch.count
    if session.walk is not None and task.index:
        terms["walk"] = recipe.rwalk_lambda * session.walk.penalty(session.net)
    return terms


def teacher_logits(teacher: IncrementalNet, x: Tensor, tasks: int) -> Tensor:
    """The previous model's logits of the old classes, bias-corrected where it has such a layer."""
    logits = teacher(x, tasks, "main")
    if isinstance(teacher.decision, BiasCorrection):
        return teacher.decision.correct(logits, teacher.classes_per_task)
    return logits


def baseline_values(method: str, binary: bool, logits: Tensor, labels: Tensor, answers: Tensor | None) -> Tensor:
    """A method's loss, a value a sample."""
    if binary and method in ("lwf", "icarl"):
        return binary_loss(logits, labels, answers)
    if method == "lwf":
        return lwf_loss(logits, labels, answers)
    if method in ("icarl", "eeil"):
        return replay_distillation_loss(logits, labels, answers)
    if method in ("bic", "wa"):
        share = None if answers is None else answers.shape[1] / logits.shape[1]
        return replay_distillation_loss(logits, labels, answers, share)
    return cross_entropy(logits, labels, reduction="none")


def consolidation(task: Task, step: int, expert: IncrementalNet) -> Terms:
    """DMC's second stage: both experts' centred logits regressed on unlabeled images."""
    assert task.answers is not None
    if task.unlabeled is None:
        task.unlabeled = task.answers.stream()
    batch, _ = task.answers.batch(task.unlabeled, step)
    with torch.no_grad():
        new = expert(batch.x, task.seen, "main")[:, batch.main.shape[1] :]
    values = consolidation_loss(task.session.net(batch.x, task.seen, "main"), batch.main, new)
    return {"consolidation": values.sum() / batch.count}


# --- the end of a task -------------------------------------------------------------------------------------------------------


def finish(task: Task, memory: Samples) -> None:
    """What a baseline does once its network is trained; `memory` are the anchors of all classes seen."""
    session, net = task.session, task.session.net
    if session.recipe.method == "wa" and task.index:
        align_heads(net, task.index)
    elif isinstance(net.decision, NearestMean):
        features = features_of(net, memory.images)
        classes = task.seen * net.classes_per_task
        net.decision.means[:classes] = class_means(features, memory.labels.to(features.device), classes)
    elif isinstance(net.decision, BiasCorrection) and task.held_out is not None:
        fit_bias(net, net.decision, task.index, task.held_out)
    elif isinstance(net.decision, Rectified):
        rectify(session, net.decision, task, memory)


@torch.no_grad()
def align_heads(net: IncrementalNet, task: int) -> None:
    """WA on the primary heads: the new head's weights scaled to the old ones' mean norm; biases stay."""
    weights = torch.cat([net.get_submodule(f"linear_main.{k}").weight for k in range(task + 1)])  # type: ignore[misc]
    net.get_submodule(f"linear_main.{task}").weight.copy_(  # type: ignore[operator,union-attr]
        align_weights(weights, net.classes_per_task)[-net.classes_per_task :]
    )


def fit_bias(net: IncrementalNet, decision: BiasCorrection, task: int, samples: Samples, steps: int = 200) -> None:
    """BiC's second stage: the new block's a and b by cross entropy on the held-out part, all else fixed."""
    with torch.no_grad():
        logits = features_of(net, samples.images, "logits", task + 1)
    scale, shift = (torch.tensor(value, device=logits.device, requires_grad=True) for value in (1.0, 0.0))
    optimiser = torch.optim.Adam([scale, shift], lr=0.05)
    old = task * net.classes_per_task
    for _ in range(steps):
        earlier = decision.correct(logits[:, :old], net.classes_per_task).detach()
        corrected = torch.cat([earlier, scale * logits[:, old:] + shift], 1)
        loss = cross_entropy(corrected, samples.labels.to(logits.device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        decision.scale[task], decision.shift[task] = scale, shift


@torch.no_grad()
def rectify(session: Session, decision: Rectified, task: Task, memory: Samples) -> None:
    """IL2M's statistics: scores of new classes over their own images, of old ones over their anchors, and confidence."""
    net, old = session.net, task.index * session.net.classes_per_task

    def scores(samples: Samples) -> Tensor:
        return features_of(net, samples.images, "logits", task.seen).softmax(1)

    own, remembered = scores(task.new), scores(memory)
    for label in range(old, task.seen * net.classes_per_task):
        decision.initial[label] = own[task.new.labels == label, label].mean()
        decision.present[label] = decision.initial[label]
    for label in range(old):
        decision.present[label] = remembered[memory.labels.to(remembered.device) == label, label].mean()
    everything = torch.cat([own, remembered[memory.labels.to(remembered.device) < old]])
    decision.confidence[task.index] = everything.amax(1).mean()
