"""The loss of a step for CIL-QUD, RCIL-QUD and the baselines, and what a baseline does when a task ends."""

from collections.abc import Callable
from typing import NamedTuple

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
from tenfold_cilqud.robust import (
    Attack,
    Robust,
    labelled_attack,
    rft_attack,
    rkd_attack,
    rtc_attack,
    rtc_term,
    with_delta,
    worst_cases,
)
from tenfold_cilqud.session import Session, Task, features_of
from tenfold_cilqud.streams import Stream
from tenfold_shared.attacks import held

Loss = Callable[[Task, int], Terms]


# --- CIL-QUD ---------------------------------------------------------------------------------------------------------------


class Batches(NamedTuple):
    """What a step of CIL-QUD trains on, at its worst case where the recipe says so."""

    random: Labelled | None
    balanced: list[tuple[float, Labelled]]
    answered: Answered | None
    images: dict[str, Tensor]
    """Unlabeled images as each of their terms sees them: `main` and `aux` for KD, `ft`, `rtc`."""


def cil_qud(task: Task, step: int) -> Terms:
    """L = (L_rs + K_aux) + w (L_cb + K_main) of section 2.2, every term at its worst case where the recipe says so."""
    net, recipe = task.session.net, task.session.recipe
    weights, heads = recipe.weights, recipe.heads
    batches = batches_of(task, step)
    if task.index == 0:
        assert batches.random is not None
        if heads == "two":
            return first_task_terms(net, batches.random, weights.trades)[0]
        return {"main": classification(net, batches.random, 1, "main", weights.trades)[0]}
    terms: Terms = {}
    if batches.random is not None and heads == "two":
        terms["random"] = random_term(net, batches.random, task.seen, weights)[0]
    elif batches.random is not None:
        terms["random"] = classification(net, batches.random, task.seen, "main", weights.trades)[0]
    if batches.balanced:
        terms["balanced"] = balanced_term(net, batches.balanced, task.seen, weights)
    if batches.answered is not None:
        terms |= unlabeled_terms(task, batches.answered, batches.images)
    return terms


def unlabeled_terms(task: Task, batch: Answered, images: dict[str, Tensor]) -> Terms:
    """L_LwF by KD and FT on the queried images, RKD and RFT where these are attacked, and RTC."""
    net, recipe = task.session.net, task.session.recipe
    weights, settings = recipe.weights, recipe.robust
    terms: Terms = {}
    if "kd" in recipe.distill:
        heads: tuple[Head, ...] = ("aux", "main") if recipe.heads == "two" else ("main",)
        # Both heads share a pass unless each is attacked on its own.
        apart = settings.lwf == "attacked" and settings.rkd_attack == "per_head"
        for own in [(head,) for head in heads] if apart else [heads]:
            terms |= distillation_terms(net, batch._replace(x=images[own[-1]]), task.index, weights, own)
    if "ft" in recipe.distill:
        terms["ft"] = transfer_term(net, batch._replace(x=images["ft"]), weights)
    if settings.gamma2:
        value = rtc_term(net, batch.x, images["rtc"], task.seen, batch.total, detach_clean=settings.rtc_detach_clean)
        terms["rtc"] = settings.gamma2 * value
    return terms


def batches_of(task: Task, step: int) -> Batches:
    """The batches of a step, all attacks on them made at once."""
    session, recipe = task.session, task.session.recipe
    net, settings = session.net, recipe.robust
    queue: dict[str, Attack] = {}
    random: Labelled | None = None
    if task.index == 0 or recipe.heads != "balanced":
        random, whole = task.random[step]
        own: tuple[Head, ...] = ("aux",) if recipe.heads == "two" else ("main",)
        heads: tuple[Head, ...] = ("main", "aux") if task.index == 0 and recipe.heads == "two" else own
        if settings.adv != "none":
            noise = task.random.noise(step, random.x, whole, "attack")
            queue["random"] = labelled_attack(net, random, task.seen, heads, settings, noise)
    drawn = [(weight, stream, *stream[step]) for weight, stream in task.balanced]
    balanced = [batch for _, _, batch, _ in drawn]
    if settings.adv != "none":
        for k, (_, stream, batch, whole) in enumerate(drawn):
            noise = stream.noise(step, batch.x, whole, "attack")
            queue[f"balanced-{k}"] = labelled_attack(net, batch, task.seen, ("main",), settings, noise)
    answered, images = None, {}
    if task.answers is not None:
        if task.unlabeled is None:
            task.unlabeled = task.answers.stream()
        answered, whole = task.answers.batch(task.unlabeled, step)
        images = dict.fromkeys(("main", "aux", "ft", "rtc"), answered.x)
        queue |= unlabeled_attacks(task, answered, whole, step)
    if queue:
        deltas = dict(zip(queue, worst_cases(net, list(queue.values()), settings), strict=True))
        if random is not None and "random" in deltas:
            random = with_delta(random, deltas["random"], settings)
        if settings.adv != "none":
            balanced = [with_delta(batch, deltas[f"balanced-{k}"], settings) for k, batch in enumerate(balanced)]
        images |= {name: images[name] + deltas[name] for name in images if name in deltas}
    if task.together and balanced:
        parts = [(1.0, merged(balanced))]
    else:
        parts = [(weight, batch) for (weight, *_), batch in zip(drawn, balanced, strict=True)]
    return Batches(random, parts, answered, images)


def unlabeled_attacks(task: Task, batch: Answered, whole: int, step: int) -> dict[str, Attack]:
    """The attacks on unlabeled images by the term that they are for; one on the primary head serves both heads of KD
    unless each has its own.
    """
    net, recipe, stream = task.session.net, task.session.recipe, task.unlabeled
    assert stream is not None
    settings, attacks = recipe.robust, {}
    if settings.lwf == "attacked" and "kd" in recipe.distill:
        both = settings.rkd_attack == "per_head" and recipe.heads == "two"
        for head in ("main", "aux") if both else ("main",):
            noise = stream.noise(step, batch.x, whole, f"rkd-{head}")
            attacks[head] = rkd_attack(net, batch, task.index, recipe.temperature, noise, head)
    if settings.lwf == "attacked" and "ft" in recipe.distill:
        attacks["ft"] = rft_attack(batch, recipe.distance, stream.noise(step, batch.x, whole, "rft"))
    if settings.gamma2:
        attacks["rtc"] = rtc_attack(net, batch.x, task.seen, stream.noise(step, batch.x, whole, "rtc"))
    return attacks


def merged(batches: list[Labelled]) -> Labelled:
    """Several batches as one."""
    if len(batches) == 1:
        return batches[0]
    x, y = torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches])
    worst = [batch.attacked for batch in batches if batch.attacked is not None]
    return Labelled(x, y, sum(batch.total for batch in batches), torch.cat(worst) if worst else None)


# --- baselines ---------------------------------------------------------------------------------------------------------------


def baseline(task: Task, step: int, stream: Stream | None = None) -> Terms:
    """A baseline's loss on its labelled batch (of `stream`, where a stage has its own), primary head; the teacher sees
    the clean images.
    """
    session, recipe = task.session, task.session.recipe
    stream = task.random if stream is None else stream
    clean, whole = stream[step]
    # LwF classifies within the new block alone, and so does the attack on it.
    within = task.index if recipe.method == "lwf" and not recipe.binary and recipe.robust.adv == "madry" else 0
    batch = at_worst(session.net, stream, step, clean, whole, range(within, task.seen), recipe.robust)
    logits = corrected(session.net, session.net(batch.x, task.seen, "main"))
    answers = None
    if task.teacher is not None and recipe.method in ("lwf", "icarl", "eeil", "bic", "wa"):
        with torch.no_grad():
            answers = corrected(task.teacher, task.teacher(clean.x, task.index, "main"))
    values = baseline_values(recipe.method, recipe.binary, logits, batch.y, answers)
    terms = {"classification": values.sum() / batch.total}
    if batch.attacked is not None:
        worst = consistency(logits, corrected(session.net, session.net(batch.attacked, task.seen, "main")))
        terms["trades"] = recipe.robust.trades_beta * worst.sum() / batch.total
    if session.walk is not None and task.index:
        terms["walk"] = recipe.rwalk_lambda * session.walk.penalty(session.net)
    return terms


def corrected(net: IncrementalNet, logits: Tensor) -> Tensor:
    """A network's logits of whole blocks as its bias correction leaves them, where it has one (BiC)."""
    if isinstance(net.decision, BiasCorrection):
        return net.decision.correct(logits, net.classes_per_task)
    return logits


def at_worst(
    net: IncrementalNet, stream: Stream, step: int, batch: Labelled, whole: int, tasks: range, settings: Robust
) -> Labelled:
    """A labelled batch of a stream at its worst case for the primary head among the classes of `tasks`, where training
    attacks it.
    """
    if settings.adv == "none":
        return batch
    first = tasks.start * net.classes_per_task

    def scores(features: Tensor) -> Tensor:
        return corrected(net, net.logits(features, tasks.stop))[:, first:]

    def loss(features: Tensor) -> Tensor:
        if clean is not None:
            return consistency(clean, scores(features))
        return cross_entropy(scores(features), batch.y - first, reduction="none")

    clean = None
    if settings.adv == "trades":
        with torch.no_grad(), held(net):
            clean = scores(net.features(batch.x))
    attack = Attack(batch.x, stream.noise(step, batch.x, whole, "attack"), loss)
    return with_delta(batch, worst_cases(net, [attack], settings)[0], settings)


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


def expert_loss(expert: IncrementalNet, task: Task, step: int) -> Terms:
    """DMC's first stage: a second network on the new data alone, within the new block."""
    clean, whole = task.random[step]
    settings, old = task.session.recipe.robust, task.index * expert.classes_per_task
    batch = at_worst(expert, task.random, step, clean, whole, range(task.index, task.seen), settings)
    logits = expert(batch.x, task.seen, "main")[:, old:]
    terms = {"expert": cross_entropy(logits, batch.y - old, reduction="sum") / batch.total}
    if batch.attacked is not None:
        worst = consistency(logits, expert(batch.attacked, task.seen, "main")[:, old:])
        terms["trades"] = settings.trades_beta * worst.sum() / batch.total
    return terms


def consolidation(task: Task, step: int, expert: IncrementalNet) -> Terms:
    """DMC's second stage: both experts' centred logits regressed on unlabeled images."""
    assert task.answers is not None
    if task.unlabeled is None:
        task.unlabeled = task.answers.stream()
    batch, _ = task.answers.batch(task.unlabeled, step)
    with torch.no_grad():
        new = expert(batch.x, task.seen, "main")[:, batch.main.shape[1] :]
    values = consolidation_loss(task.session.net(batch.x, task.seen, "main"), batch.main, new)
    return {"consolidation": values.sum() / batch.total}


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
    net.get_submodule(f"linear_main.{task}").weight.copy_(  # type: ignore[operator]
        align_weights(weights, net.classes_per_task)[-net.classes_per_task :]
    )


def fit_bias(net: IncrementalNet, decision: BiasCorrection, task: int, samples: Samples, steps: int = 200) -> None:
    """BiC's second stage: the new block's a and b by cross entropy on the held-out part, all else fixed. They stay 1 and 0
    where no old class has an image to hold out, since new images alone would only drive the new scores up.
    """
    old = task * net.classes_per_task
    if not bool((samples.labels < old).any()):
        return
    with torch.no_grad():
        logits = features_of(net, samples.images, "logits", task + 1)
    scale, shift = (torch.tensor(value, device=logits.device, requires_grad=True) for value in (1.0, 0.0))
    optimiser = torch.optim.Adam([scale, shift], lr=0.05)
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
