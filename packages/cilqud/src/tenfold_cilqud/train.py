"""Training (section 2.2): one loop over tasks and steps for CIL-QUD, RCIL-QUD and every baseline.

A run is a sequence of phases (`Run.steps`), one a task, `task-0`, `task-1`, ..., with a second one where a method has
two stages. Every task's weights and accuracies are kept, so a resumed run goes on in the middle of any of them.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tenfold_cilqud.baselines import Walk
from tenfold_cilqud.data import load_data
from tenfold_cilqud.decisions import NearestMean, Rectified, add_decision
from tenfold_cilqud.evaluate import robust_accuracies, task_accuracies
from tenfold_cilqud.methods import baseline, cil_qud, consolidation, expert_loss, finish
from tenfold_cilqud.models import IncrementalNet, create_model
from tenfold_cilqud.objective import Terms
from tenfold_cilqud.pools import open_pool
from tenfold_cilqud.protocol import Summary, new_samples, summarise_matrix
from tenfold_cilqud.recipe import Recipe
from tenfold_cilqud.session import Session, Task, make_task, update_anchors
from tenfold_cilqud.streams import Stream, class_weights
from tenfold_shared.batch_norm import synchronise_batch_norm
from tenfold_shared.checkpoint import load_weights, save_weights
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions, derived_seed, seed_everything

EEIL_SHARE, EEIL_RATE = 0.3, 0.1  # EEIL's balanced stage: its length and its learning rate, of the first stage's


@dataclasses.dataclass
class Result:
    """What a run ends with; accuracies in per cent."""

    last: float
    """Mean over the tasks after the last one."""
    average: float
    """Mean over the states of their means."""
    forgetting: float
    backward_transfer: float
    matrix: list[list[float]]
    """a[t][j]: on task j after task t."""
    auxiliary: list[list[float]]
    """The same of the auxiliary head, where there is one."""
    robust_last: float | None
    robust_average: float | None
    robust_forgetting: float | None
    robust_matrix: list[list[float]]
    final_row: list[float]
    """Accuracy on each task under the stronger attack after the last one, where it was asked for."""
    final_last: float | None
    """Its mean."""
    queries: list[dict[str, Any]]
    """What each task's query took."""
    pool: str
    """Where the unlabeled images come from."""


def train(recipe: Recipe, options: RunOptions) -> None:
    """Run a recipe and keep its networks, one a task."""
    with Run("cilqud", recipe, options) as run:
        result = run_recipe(run, recipe)
        if run.is_main:
            robust = "" if result.robust_last is None else f", {result.robust_last:.2f} % under attack"
            print(
                f"{recipe.method} {recipe.arch} on {recipe.data.name}: {result.last:.2f} % after the last task{robust}, "
                f"{result.average:.2f} % on average, {result.forgetting:.2f} points forgotten; {run.directory}"
            )


def run_recipe(run: Run, recipe: Recipe) -> Result:
    """Learn all tasks of a recipe, one after the other.

    Raises:
        UserError: the recipe does not fit the data, or the data are not there.
        RunFailure: the loss is no longer finite.

    """
    seed = run.options.seed
    data = load_data(recipe.data, seed)
    validated = {label for label, images in enumerate(data.validation) if len(images)}
    if recipe.select == "best" and len(validated) < len(data.names):
        label = min(set(range(len(data.names))) - validated)
        raise UserError(
            f"--select best chooses by validation images, of which class {data.names[label]} has none: take --select last, "
            "or write the data set with some"
        )
    pool = None
    if recipe.uses_pool and recipe.query.strategy != "anchors":
        pool = open_pool(recipe.pool, data, seed, download=recipe.data.download)
    net = place(run, new_network(recipe, data.classes_per_task, data.tasks, data.shape, data.mean, data.std, seed))
    session = Session(run, recipe, data, net, pool)
    if recipe.method == "rwalk":
        session.walk = Walk(net)
    for index in range(data.tasks):
        learn(session, index)
    run.save_weights("last", net, **describe(session, data.tasks, session.matrix[-1]))
    return result_of(session)


def new_network(
    recipe: Recipe,
    classes_per_task: int,
    tasks: int,
    shape: tuple[int, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
    what: str = "init",
) -> IncrementalNet:
    """The recipe's network at its initialisation."""
    seed_everything(seed, what)
    net = create_model(recipe.arch, classes_per_task, tasks, shape=shape, width=recipe.width, mean=mean, std=std)
    add_decision(net, recipe.method)
    return net


def place(run: Run, net: IncrementalNet) -> IncrementalNet:
    """A network on the run's device, its batch norms over all processes, its backbone compiled where asked for."""
    net = synchronise_batch_norm(net, run.world, run.device).to(run.device)  # type: ignore[assignment]
    if run.device.type == "cuda":
        net = net.to(memory_format=torch.channels_last)
    if run.options.compile:
        net.embed = torch.compile(net.embed)  # type: ignore[method-assign]
    return net


def describe(session: Session, seen: int, row: list[float]) -> dict[str, Any]:
    """What a checkpoint needs to be used without its recipe."""
    recipe, data = session.recipe, session.data
    return {
        "method": recipe.method,
        "arch": recipe.arch,
        "width": recipe.width,
        "shape": list(data.shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "classes_per_task": data.classes_per_task,
        "tasks": data.tasks,
        "seen": seen,
        "seed": session.run.options.seed,
        "class_order": list(data.order),
        "class_names": [data.names[label] for label in data.order],
        "row": row,
    }


def result_of(session: Session) -> Result:
    """The figures of a finished run."""
    summary = summarise_matrix(session.matrix)
    robust: Summary | None = summarise_matrix(session.robust_matrix) if session.robust_matrix else None
    return Result(
        **summary._asdict(),
        matrix=session.matrix,
        auxiliary=session.auxiliary,
        robust_last=robust.last if robust else None,
        robust_average=robust.average if robust else None,
        robust_forgetting=robust.forgetting if robust else None,
        robust_matrix=session.robust_matrix,
        final_row=session.final_row,
        final_last=sum(session.final_row) / len(session.final_row) if session.final_row else None,
        queries=session.queries,
        pool=session.pool.provenance if session.pool is not None else "",
    )


# -- a task -----------------------------------------------------------------------------------------------------------------


def learn(session: Session, index: int) -> None:
    """Learn a task, remember its anchors, test on all tasks seen; a task that an earlier life closed is read again."""
    run, phase = session.run, f"task-{index}"
    outcome: dict[str, Any] = {}
    if not run.completed(phase):
        task = make_task(session, index)
        train_task(task, phase)
        if session.walk is not None and run.is_main:
            save_walk(session, phase)
        update_anchors(session, index)
        finish(task, session.remembered(index + 1))
        outcome = test(session, index)
        outcome |= {"anchors": {str(label): chosen for label, chosen in session.anchors.items()}}
        outcome |= {"query": {}, "taken": []}
        if task.answers is not None:
            assert task.answers.indices is not None
            outcome |= {"query": task.answers.about, "taken": task.answers.indices.tolist()}
        outcome |= describe(session, index + 1, outcome["row"])
    outcome = run.complete(phase, session.net, **outcome)
    session.anchors = {int(label): list(chosen) for label, chosen in outcome["anchors"].items()}
    session.matrix.append(outcome["row"])
    if outcome["robust_row"]:
        session.robust_matrix.append(outcome["robust_row"])
    session.final_row = outcome["final_row"]
    if outcome["auxiliary_row"]:
        session.auxiliary.append(outcome["auxiliary_row"])
    if outcome["query"]:
        session.queries.append(outcome["query"])
        session.taken = outcome["taken"]
    if session.walk is not None:
        load_walk(session, phase)


def test(session: Session, index: int) -> dict[str, Any]:
    """Accuracy rows on all tasks seen: the prediction, the auxiliary head, under attack, and under the final one."""
    recipe, data, net = session.recipe, session.data, session.net
    split = data.test if recipe.data.evaluate_on == "test" else data.validation
    sets = [new_samples(split, data.order, task, data.classes_per_task) for task in range(index + 1)]
    batch, seen = recipe.evaluation.batch_size, index + 1
    outcome: dict[str, Any] = {"auxiliary_row": [], "robust_row": [], "final_row": []}
    outcome["row"] = task_accuracies(net, sets, seen, batch)
    if recipe.method == "cil-qud" and recipe.heads == "two":
        with auxiliary_decision(net):
            outcome["auxiliary_row"] = task_accuracies(net, sets, seen, batch)
    if recipe.evaluation.attack != "none":
        seed = derived_seed(session.run.options.seed, "test attack")
        outcome["robust_row"] = robust_accuracies(net, sets, seen, recipe.evaluation, seed)
    if recipe.evaluation.final != "none" and seen == data.tasks:
        stronger = dataclasses.replace(recipe.evaluation, attack=recipe.evaluation.final)
        seed = derived_seed(session.run.options.seed, "final attack")
        outcome["final_row"] = robust_accuracies(net, sets, seen, stronger, seed)
    return outcome


@contextlib.contextmanager
def auxiliary_decision(net: IncrementalNet):
    """Within it the auxiliary head predicts."""
    net.linear_main, net.linear = net.linear, net.linear_main
    try:
        yield
    finally:
        net.linear_main, net.linear = net.linear, net.linear_main


def train_task(task: Task, phase: str) -> None:
    """The stages of a method."""
    session, method = task.session, task.session.recipe.method
    if method == "cil-qud":
        fit(task, phase, task.steps, cil_qud)
    elif method == "dmc" and task.index:
        data = session.data
        sizes = (data.classes_per_task, data.tasks, data.shape, data.mean, data.std, session.run.options.seed)
        expert = place(session.run, new_network(session.recipe, *sizes, f"expert-{task.index}"))
        if not session.run.completed(f"{phase}-expert"):
            fit(task, f"{phase}-expert", task.steps, partial(expert_loss, expert), net=expert, unlabeled=False)
        session.run.complete(f"{phase}-expert", expert)
        expert.eval().requires_grad_(False)
        fit(task, phase, task.steps, partial(consolidation, expert=expert))
    elif method == "eeil" and task.index:
        if not session.run.completed(f"{phase}-train"):
            fit(task, f"{phase}-train", task.steps, baseline)
        session.run.complete(f"{phase}-train", session.net)
        steps = max(1, round(EEIL_SHARE * task.steps))
        fit(task, phase, steps, partial(baseline, stream=balanced_stream(task)), rate=EEIL_RATE)
    else:
        fit(task, phase, task.steps, baseline)


def balanced_stream(task: Task) -> Stream:
    """EEIL's second stage: as many samples of every class, the anchors' number."""
    session = task.session
    update_anchors(session, task.index)
    memory = session.remembered(task.seen)
    device, size = session.run.device, task.random.batch_size
    memory = type(memory)(memory.images.to(device), memory.labels.to(device))
    weights = class_weights(memory.labels)
    return Stream(session.run, memory, size, f"eeil-{task.index}", session.data.augment, weights)


# -- a stage ----------------------------------------------------------------------------------------------------------------


class Best:
    """The weights that were best on validation images so far; part of a run's state."""

    def __init__(self) -> None:
        self.accuracy = -1.0
        self.weights: dict[str, Tensor] = {}

    def consider(self, net: IncrementalNet, accuracy: float) -> None:
        """Keep the weights if they are better than all before."""
        if accuracy > self.accuracy:
            self.accuracy = accuracy
            self.weights = {name: value.detach().clone() for name, value in net.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"accuracy": self.accuracy, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to a checkpoint."""
        self.accuracy, self.weights = state["accuracy"], state["weights"]


def fit(
    task: Task,
    phase: str,
    total: int,
    loss: Callable[[Task, int], Terms],
    *,
    net: IncrementalNet | None = None,
    rate: float = 1.0,
    unlabeled: bool = True,
) -> None:
    """SGD over a stage, with a new optimiser and schedule (their buffers are cleared at every task)."""
    session = task.session
    run, recipe = session.run, session.recipe
    chosen = session.net if net is None else net
    chosen.train()
    sgd = torch.optim.SGD(chosen.parameters(), recipe.lr * rate, recipe.momentum, weight_decay=recipe.weight_decay)
    optimiser: Any = run.prepare(sgd)
    tracked: dict[str, Any] = {"model": chosen, "optimiser": optimiser}
    answers = task.answers if unlabeled else None
    best = Best() if recipe.select == "best" and net is None else None
    tracked |= {"answers": answers} if answers is not None else {}
    tracked |= {"walk": session.walk} if session.walk is not None else {}
    tracked |= {"best": best} if best is not None else {}
    bounds = [round(fraction * total) for fraction in recipe.milestones]
    for step in run.steps(phase, total, **tracked):
        if answers is not None and not answers.ready:
            answers.fill()
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr * rate * 0.1 ** sum(step >= bound for bound in bounds)
        with run.accelerator.autocast():
            terms = loss(task, step)
            value = torch.stack([term.float() for term in terms.values()]).sum()
        optimiser.zero_grad()
        run.backward(value)
        average_gradients(run, chosen)
        optimiser.step()
        if session.walk is not None:
            session.walk.note(chosen)
        run.log(
            loss=run.reduce(value.detach()) / run.world,
            **{k: run.reduce(v.detach()) / run.world for k, v in terms.items()},
        )
        if best is not None and ((step + 1) % len(task.random) == 0 or step + 1 == total):
            best.consider(chosen, validation_accuracy(session, task))
    if best is not None:
        chosen.load_state_dict(best.weights)


def average_gradients(run: Run, net: IncrementalNet) -> None:
    """Gradients averaged over the processes. The heads of later tasks have none, which is why no wrapper does it."""
    if run.world == 1:
        return
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    flat = run.reduce(torch.cat([gradient.flatten() for gradient in gradients])) / run.world
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def validation_accuracy(session: Session, task: Task) -> float:
    """Mean accuracy on the validation images of the tasks seen; of the primary head where a decision is made from what is
    only known when the task ends, class means or mean scores.
    """
    data, net = session.data, session.net
    sets = [new_samples(data.validation, data.order, k, data.classes_per_task) for k in range(task.seen)]
    decision = net.decision
    if isinstance(decision, NearestMean | Rectified):
        net.decision = None
    rows = task_accuracies(net, sets, task.seen, session.recipe.evaluation.batch_size)
    net.decision = decision
    return sum(rows) / len(rows)


def save_walk(session: Session, phase: str) -> None:
    """RWalk's importances after a task, beside its weights. They end the task in a copy: the run's own, which a checkpoint
    may still take, ends it when the phase is closed and `load_walk` reads them.
    """
    ended = copy.deepcopy(session.walk)
    assert ended is not None
    ended.end_task(session.net)
    parts = {f"{name}.{i}": value for name, values in ended.state_dict().items() for i, value in enumerate(values)}
    save_weights(session.run.directory / "checkpoints" / f"walk-{phase}.safetensors", parts)


def load_walk(session: Session, phase: str) -> None:
    """RWalk's importances as `save_walk` kept them."""
    assert session.walk is not None
    path = session.run.directory / "checkpoints" / f"walk-{phase}.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing: RWalk cannot go on without it, start again under another --name")
    tensors, _ = load_weights(path)
    names = session.walk.state_dict()
    session.walk.load_state_dict({name: [tensors[f"{name}.{i}"] for i in range(len(v))] for name, v in names.items()})
