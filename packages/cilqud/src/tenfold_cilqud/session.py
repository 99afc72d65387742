"""What a run carries from task to task, and what a task is made of: its samples, its teacher, its unlabeled images."""

import copy
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_cilqud.anchors import choose_anchors
from tenfold_cilqud.baselines import Walk
from tenfold_cilqud.data import ClassData
from tenfold_cilqud.evaluate import pixels_as
from tenfold_cilqud.models import IncrementalNet
from tenfold_cilqud.objective import Answered, batch_composition
from tenfold_cilqud.pools import Pool
from tenfold_cilqud.protocol import Samples, classes_of, new_samples, saved_samples, seen_samples
from tenfold_cilqud.query import approximate_query, most_confident, query, random_choice
from tenfold_cilqud.recipe import Recipe
from tenfold_cilqud.streams import Stream, augmented, class_weights, joined
from tenfold_shared.run import Run, derived_seed

CHUNK = 1000  # images whose features are computed at a time


@dataclasses.dataclass
class Session:
    """A run's network, data and memory; the anchors are indices into each class's training images."""

    run: Run
    recipe: Recipe
    data: ClassData
    net: IncrementalNet
    pool: Pool | None = None
    anchors: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    """Original class -> remembered training images, in stored order."""
    walk: Walk | None = None
    matrix: list[list[float]] = dataclasses.field(default_factory=list)
    robust_matrix: list[list[float]] = dataclasses.field(default_factory=list)
    auxiliary: list[list[float]] = dataclasses.field(default_factory=list)
    """Accuracy rows of the auxiliary head, for diagnosis."""
    final_row: list[float] = dataclasses.field(default_factory=list)
    """Accuracies under the stronger attack after the last task."""
    queries: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """What each task's query took."""
    taken: list[int] = dataclasses.field(default_factory=list)
    """Pool indices that the latest task took."""

    def anchor_images(self, label: int) -> Tensor:
        """The remembered images of an original class."""
        if self.data.anchors is not None:
            return self.data.anchors[label]
        return self.data.train[label][torch.tensor(self.anchors.get(label, []), dtype=torch.int64)]

    def remembered(self, task: int) -> Samples:
        """A: the anchors of the tasks before one."""
        images = [self.anchor_images(label) for label in range(len(self.data.order))]
        return saved_samples(images, self.data.order, task, self.data.classes_per_task)


@torch.no_grad()
def features_of(net: IncrementalNet, images: Tensor, what: str = "penultimate", tasks: int = 1) -> Float[Tensor, "n d"]:
    """Features (or logits of the primary head) of images, in eval mode; statistics stay as they are."""
    training = net.training
    net.eval()
    parts = []
    for chunk in images.split(CHUNK):
        features = net.features(pixels_as(net, chunk))
        parts.append(net.logits(features, tasks) if what == "logits" else features)
    net.train(training)
    return torch.cat(parts)


def pool_features(net: IncrementalNet, pool: Pool, what: str = "penultimate", tasks: int = 1) -> Float[Tensor, "p d"]:
    """Features of a whole pool, read and computed a chunk at a time; nothing else of the pool is held."""
    found: Tensor | None = None
    for first in range(0, len(pool), CHUNK):
        part = features_of(net, pool[torch.arange(first, min(first + CHUNK, len(pool)))], what, tasks)
        if found is None:
            found = part.new_empty(len(pool), part.shape[1])
        found[first : first + len(part)] = part
    assert found is not None
    return found


def update_anchors(session: Session, task: int) -> None:
    """Remember images of a task's classes, and forget some of the earlier ones where the memory is shared."""
    config, rule = session.recipe.data, session.recipe.anchor_rule
    data, seed = session.data, session.run.options.seed
    seen = (task + 1) * data.classes_per_task
    count = config.anchors_total // seen if config.anchors_total else config.anchors
    for label in classes_of(data.order, task, data.classes_per_task):
        images = data.train[label]
        features = None if rule == "random" else features_of(session.net, images).cpu()
        chosen = choose_anchors(rule, len(images), count, seed, label, features)
        session.anchors[label] = chosen.tolist()
    for label in session.anchors:
        session.anchors[label] = session.anchors[label][:count]


class Answers:
    """U~ of a task: the queried images, augmented once, with the frozen previous model's answers.

    Filled at the task's first step, and part of the state that a resumed run starts from.
    """

    def __init__(self, session: Session, task: int, teacher: IncrementalNet, anchors: Samples):
        self.session, self.task, self.teacher, self.anchors = session, task, teacher, anchors
        self.indices: Tensor | None = None
        self.images = self.main = self.aux = self.features = torch.empty(0)
        self.about: dict[str, Any] = {}

    @property
    def ready(self) -> bool:
        """Whether the query has been made."""
        return self.indices is not None

    def fill(self) -> None:
        """Query the pool with the previous model's features, and let it answer."""
        self.indices, self.about = choose_unlabeled(self.session, self.teacher, self.task, self.anchors)
        self._read()
        net, old = self.teacher, self.task
        main, aux, features = [], [], []
        with torch.no_grad():
            for chunk in self.images.split(CHUNK):
                found = net.features(pixels_as(net, chunk))
                main.append(net.logits(found, old, "main"))
                aux.append(net.logits(found, old, "aux"))
                features.append(found)
        self.main, self.aux, self.features = torch.cat(main), torch.cat(aux), torch.cat(features)

    def _read(self) -> None:
        assert self.indices is not None
        recipe, data, run = self.session.recipe, self.session.data, self.session.run
        if recipe.query.strategy == "anchors":
            images = self.anchors.images
        else:
            assert self.session.pool is not None
            images = self.session.pool[self.indices]
        images = images.to(run.device)
        if not recipe.reaugment:
            draws = torch.Generator().manual_seed(derived_seed(run.options.seed, "pool augmentation", self.task))
            images = augmented(images, data.augment, len(images), slice(None), draws)
        self.images = images

    def stream(self) -> Stream:
        """The unlabeled images as batches; the labels are their positions."""
        recipe, run = self.session.recipe, self.session.run
        positions = torch.arange(len(self.images), device=self.images.device)
        augment = self.session.data.augment if recipe.reaugment else ()
        size = batch_composition(recipe.batch_size, self.task, recipe.sub_batch).sub_batch
        return Stream(run, Samples(self.images, positions), size, f"unlabeled-{self.task}", augment)

    def batch(self, stream: Stream, step: int) -> tuple[Answered, int]:
        """The process's unlabeled batch of a step, and the size of the whole."""
        indices, x, whole = stream.chosen(step)
        rows = indices.to(x.device)
        answers = (self.main[rows], self.aux[rows], self.features[rows])
        return Answered(x, *answers, whole / self.session.run.world), whole

    def state_dict(self) -> dict[str, Any]:
        """Indices and answers; the images are read again by them."""
        if self.indices is None:
            return {}
        kept = {name: getattr(self, name) for name in ("indices", "main", "aux", "features")}
        return {**kept, "about": self.about}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to a checkpoint."""
        if not state:
            return
        self.indices, self.about = state["indices"], dict(state["about"])
        self._read()
        for name in ("main", "aux", "features"):
            setattr(self, name, state[name].to(self.session.run.device))


def choose_unlabeled(
    session: Session, teacher: IncrementalNet, task: int, anchors: Samples
) -> tuple[Int[Tensor, " n"], dict[str, Any]]:
    """The pool indices that a task uses, ascending, and a report on them (section 9): deciles of their distances from the
    anchors that took them; in per cent, how many the task before took too, and how many are the data set's and of old
    classes.
    """
    config, pool, seed = session.recipe.query, session.pool, session.run.options.seed
    if config.strategy == "anchors":
        return torch.arange(len(anchors)), {"strategy": "anchors", "taken": len(anchors)}
    assert pool is not None
    draws = torch.Generator().manual_seed(derived_seed(seed, "unlabeled", task))
    wanted = config.per_anchor * len(anchors)
    count = min(wanted, config.max_total or wanted, len(pool))
    about: dict[str, Any] = {"strategy": config.strategy, "pool": len(pool)}
    if config.strategy == "all":
        indices = random_choice(len(pool), config.max_total or len(pool), draws)
    elif config.strategy == "random":
        indices = random_choice(len(pool), count, draws)
    elif config.strategy == "confidence":
        indices = most_confident(pool_features(teacher, pool, "logits", task), count)
    else:
        found = features_of(teacher, anchors.images, config.feature, task)
        features = pool_features(teacher, pool, config.feature, task)
        how: Any = {"metric": config.metric, "order": config.order, "max_total": config.max_total}
        if config.approximate:
            taken, about["recall"] = approximate_query(
                found, features, config.per_anchor, dimensions=config.approximate, generator=draws, **how
            )
        else:
            taken = query(found, features, config.per_anchor, **how)
        indices = taken.chosen
        deciles = taken.distance.double().sqrt().quantile(torch.linspace(0, 1, 11, dtype=torch.float64))
        about |= {"seconds": taken.seconds, "distance_deciles": deciles.tolist()}
    about["taken"] = len(indices)
    if session.taken:
        about["taken_before"] = 100.0 * float(torch.isin(indices, torch.tensor(session.taken)).double().mean())
    if pool.labels is not None:
        labels = pool.labels[indices]
        old = torch.tensor(session.data.order[: task * session.data.classes_per_task])
        about["from_data_set"] = 100.0 * float((labels >= 0).double().mean())
        about["of_old_classes"] = 100.0 * float(torch.isin(labels, old).double().mean())
    return indices, about


@dataclasses.dataclass
class Task:
    """One task as the losses see it."""

    index: int
    session: Session
    new: Samples
    anchors: Samples
    teacher: IncrementalNet | None
    random: Stream
    balanced: list[tuple[float, Stream]]
    """Streams of the class-balanced batches with their weights; several are passed one after the other."""
    together: bool
    """Whether the balanced streams make one batch."""
    answers: Answers | None = None
    unlabeled: Stream | None = None
    held_out: Samples | None = None
    """BiC's balanced validation part."""

    @property
    def seen(self) -> int:
        """Tasks seen, this one included."""
        return self.index + 1

    @property
    def steps(self) -> int:
        """Steps of the task."""
        recipe = self.session.recipe
        return recipe.steps or recipe.epochs * len(self.random)


def frozen_copy(net: IncrementalNet) -> IncrementalNet:
    """The previous model: its own weights, eval mode, no gradients."""
    teacher = copy.deepcopy(net)
    teacher.__dict__.pop("embed", None)  # a compiled one would go on with the live network's weights
    return teacher.eval().requires_grad_(False)


BIC_SHARE = 0.1  # of the memory, for the bias correction


def make_task(session: Session, index: int) -> Task:
    """A task with everything on the device; the teacher is a frozen copy of the network as it is now."""
    recipe, data, run, net = session.recipe, session.data, session.run, session.net
    per_task, device = data.classes_per_task, run.device

    def placed(samples: Samples) -> Samples:
        return Samples(samples.images.to(device), samples.labels.to(device))

    new = placed(new_samples(data.train, data.order, index, per_task))
    anchors = placed(session.remembered(index)) if index else Samples(new.images[:0], new.labels[:0])
    teacher = frozen_copy(net) if index else None
    held_out = None
    if recipe.method == "bic" and index:
        new, anchors, held_out = split_for_bias(new, anchors)
    if recipe.method == "joint":
        labelled = placed(seen_samples(data.train, data.order, index, per_task))
    elif recipe.method in ("finetune", "lwf", "dmc") or not index:
        labelled = new
    else:
        labelled = joined(new, anchors)
    sizes = batch_composition(recipe.batch_size, max(index, 1), recipe.sub_batch)
    random = Stream(run, labelled, sizes.sub_batch if index else recipe.batch_size, f"random-{index}", data.augment)
    task = Task(index, session, new, anchors, teacher, random, [], recipe.sampler != "groups", held_out=held_out)
    if index and recipe.method == "cil-qud" and recipe.heads != "random":
        task.balanced = balanced_streams(session, index, new, anchors)
    if index and recipe.uses_pool:
        assert teacher is not None
        task.answers = Answers(session, index, teacher, anchors)
    return task


def balanced_streams(session: Session, index: int, new: Samples, anchors: Samples) -> list[tuple[float, Stream]]:
    """The class-balanced batches of a task by the recipe's sampler."""
    recipe, augment, run = session.recipe, session.data.augment, session.run
    sizes = batch_composition(recipe.batch_size, index, recipe.sub_batch)
    if sizes.sub_batch <= index and run.is_main and not run.options.quiet:
        print(
            f"note: {sizes.sub_batch} images a step do not go round {index + 1} tasks: the new one gets one all the same; "
            "raise --batch_size or --sub_batch",
            file=sys.stderr,
        )
    if recipe.sampler == "class_balanced":
        both = joined(new, anchors)
        stream = Stream(run, both, sizes.sub_batch, f"balanced-{index}", augment, class_weights(both.labels))
        return [(1.0, stream)]
    parts = ((sizes.weight_new, sizes.new, new, "new"), (sizes.weight_old, sizes.old, anchors, "old"))
    return [
        (
            weight,
            Stream(
                run,
                samples,
                size,
                f"{name}-{index}",
                augment,
                torch.ones(len(samples)) if recipe.sampler == "joined" else None,
            ),
        )
        for weight, size, samples, name in parts
    ]


def split_for_bias(new: Samples, anchors: Samples) -> tuple[Samples, Samples, Samples]:
    """New data, anchors, and a balanced part held out from both: a tenth of each old class's anchors, as many of each
    new class.
    """
    counts = torch.bincount(anchors.labels)
    number = max(1, int(BIC_SHARE * int(counts.max())))

    def parted(samples: Samples) -> tuple[Samples, Samples]:
        keep = torch.ones(len(samples), dtype=torch.bool, device=samples.labels.device)
        for label in samples.labels.unique().tolist():
            own = (samples.labels == label).nonzero().squeeze(1)
            keep[own[len(own) - min(number, len(own) - 1) :]] = False
        return Samples(samples.images[keep], samples.labels[keep]), Samples(
            samples.images[~keep], samples.labels[~keep]
        )

    kept_new, out_new = parted(new)
    kept_old, out_old = parted(anchors)
    return kept_new, kept_old, joined(out_new, out_old)
