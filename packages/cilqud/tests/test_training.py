"""Every recipe is built and stepped, every method runs and goes on where it was, and CIL-QUD learns."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tenfold_cilqud.methods
import tenfold_cilqud.train
from tenfold_cilqud.data import ClassData, DataConfig
from tenfold_cilqud.evaluate import EvalConfig, Evaluation, evaluate, load_checkpoint, predictions
from tenfold_cilqud.models import create_model
from tenfold_cilqud.objective import Answered, distillation_terms
from tenfold_cilqud.pools import memory_pool
from tenfold_cilqud.protocol import Samples
from tenfold_cilqud.recipe import QueryConfig, Recipe
from tenfold_cilqud.robust import Robust
from tenfold_cilqud.session import Session, frozen_copy
from tenfold_cilqud.streams import Stream, class_weights
from tenfold_cilqud.train import learn, new_network, place, run_recipe
from tenfold_shared.checkpoint import load_weights
from tenfold_shared.claims import load_claims
from tenfold_shared.cli import load_recipe, recipes
from tenfold_shared.errors import UserError
from tenfold_shared.images import Flip, RandomCrop
from tenfold_shared.run import Run, RunOptions

SHAPES = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28)}
CLASSES = {"cifar100": 100}
METHODS = ["cil-qud", "finetune", "joint", "replay", "lwf", "icarl", "eeil", "bic", "wa", "il2m", "dmc", "rwalk"]


def options(folder: Path, **changes: object) -> RunOptions:
    return RunOptions(output=folder, name="x", device="cpu", quiet=True, **changes)


def generated(recipe: Recipe) -> ClassData:
    """Two images of every class in each part, of the recipe's shape."""
    shape, classes = SHAPES.get(recipe.data.name, (3, 32, 32)), CLASSES.get(recipe.data.name, 10)
    draw = torch.Generator().manual_seed(0)
    parts = [
        [torch.randint(256, (2, *shape), generator=draw).to(torch.uint8) for _ in range(classes)] for _ in range(4)
    ]
    names, normal = tuple(str(k) for k in range(classes)), ((0.5,) * shape[0], (0.25,) * shape[0])
    return ClassData(*parts, tuple(range(classes)), names, recipe.data.tasks, *normal, (Flip(), RandomCrop(4)))


@pytest.mark.parametrize("name", list(recipes("tenfold_cilqud")))
def test_every_recipe_is_built_and_stepped(name: str, tmp_path: Path) -> None:
    """The recipe's network at its real size takes a step of the first and of the second task on generated images."""
    recipe = load_recipe("tenfold_cilqud", name, Recipe)
    recipe = dataclasses.replace(
        recipe,
        steps=1,
        batch_size=4,
        sub_batch=2,
        robust=dataclasses.replace(recipe.robust, steps=min(1, recipe.robust.steps)),
        evaluation=dataclasses.replace(recipe.evaluation, attack="none"),
        query=dataclasses.replace(recipe.query, per_anchor=1),
        data=dataclasses.replace(recipe.data, anchors=1),
    )
    data = generated(recipe)
    with Run("cilqud", recipe, options(tmp_path)) as run:
        sizes = (data.classes_per_task, data.tasks, data.shape, data.mean, data.std, 0)
        session = Session(run, recipe, data, place(run, new_network(recipe, *sizes)))
        session.pool = memory_pool(torch.cat(list(data.held_back)), "generated")
        for task in (0, 1):
            learn(session, task)
    assert len(session.matrix) == 2
    assert session.queries[0]["taken"] == data.classes_per_task
    assert all(torch.isfinite(value).all() for value in session.net.state_dict().values())


def test_the_papers_claims_compare_with_what_is_not_the_method() -> None:
    """The same learner without queried data is among the baselines, a variant of RCIL-QUD is not."""
    claims = load_claims("tenfold_cilqud")
    for name in ("c10-final", "c100-final"):
        assert claims[name].arms["replay-balanced"].options == {"distill": "none"}
    robust = [claim for claim in claims.claims if claim.id.startswith("r10-")]
    assert {claim.method for claim in robust} == {"rkd", "rft", "rkd-rtc", "rft-rtc"}
    for claim in robust:
        for arm in claim.baselines:
            settings = load_recipe("tenfold_cilqud", str(arm.recipe), Recipe, **arm.options).robust
            assert (settings.lwf, settings.gamma2) == ("clean", 0.0)


def short(method: str = "cil-qud", **changes: object) -> Recipe:
    """A few steps on digits in two tasks."""
    data = DataConfig(tasks=2, per_class=12, held_back=5, anchors=4)
    common = {"steps": 4, "batch_size": 16, "sub_batch": 8, "sampler": "joined", "lr": 0.05, "width": 4, "data": data}
    given = {"method": method, "query": QueryConfig(per_anchor=2), **common, **changes}
    recipe = Recipe(**given)
    recipe.pool.source = "split+patches:60"
    return recipe


def test_a_batch_that_does_not_go_round_the_tasks_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The new task would get floor(1 / 2) images of it."""
    for sub_batch, told in ((1, True), (2, False)):
        recipe = short(steps=1, sub_batch=sub_batch, sampler="groups")
        with Run("cilqud", recipe, dataclasses.replace(options(tmp_path), name=str(sub_batch), quiet=False)) as run:
            run_recipe(run, recipe)
        assert ("1 images a step do not go round 2 tasks" in capsys.readouterr().err) is told


@pytest.mark.parametrize(("sampler", "parts"), [("joined", [(1.0, 8)]), ("groups", [(0.5, 4), (0.5, 4)])])
def test_joined_groups_make_one_batch_and_the_paper_s_two(
    sampler: str, parts: list[tuple[float, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mean over all of it, or a weighted mean over each group: with groups of equal size the two would train alike."""
    seen: list[list[tuple[float, int]]] = []
    term = tenfold_cilqud.methods.balanced_term

    def watched(net: Any, balanced: Any, *rest: Any) -> Any:
        seen.append([(weight, len(batch.x)) for weight, batch in balanced])
        return term(net, balanced, *rest)

    monkeypatch.setattr(tenfold_cilqud.methods, "balanced_term", watched)
    recipe = short(steps=2, sampler=sampler)
    with Run("cilqud", recipe, options(tmp_path)) as run:
        run_recipe(run, recipe)
    assert seen == [parts, parts]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_its_checkpoint_predicts_the_same(method: str, tmp_path: Path) -> None:
    recipe = short(method)
    with Run("cilqud", recipe, options(tmp_path)) as run:
        result = run_recipe(run, recipe)
    net, about = load_checkpoint(tmp_path / "cilqud" / "x")
    assert about["method"] == method
    assert about["row"] == result.matrix[-1]
    assert [len(row) for row in result.matrix] == [1, 2]
    data = tenfold_cilqud.train.load_data(recipe.data, 0)
    images = torch.cat([data.test[label] for label in data.order[:5]])
    labels = torch.arange(5).repeat_interleave(50)
    right = (predictions(net, images, 2) == labels).double().mean()
    assert 100 * right == pytest.approx(result.matrix[1][0])


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": "random"},
        {"heads": "balanced", "sampler": "class_balanced"},
        {"distill": "kd+ft", "sampler": "groups"},
        {"query": QueryConfig(strategy="confidence", per_anchor=2)},
        {"query": QueryConfig(strategy="all")},
        {"query": QueryConfig(strategy="anchors"), "reaugment": True},
        {"query": QueryConfig(per_anchor=2, feature="logits", metric="cosine", order="round_robin")},
        {"query": QueryConfig(per_anchor=2, approximate=4)},
        {"select": "best", "data": DataConfig(tasks=2, per_class=12, held_back=5, anchors=4, validation=3)},
        {"data": DataConfig(tasks=2, per_class=12, held_back=5, anchors_total=20, anchor_rule="kcenter")},
        {"robust": Robust(adv="madry", lwf="attacked", gamma2=0.5, rkd_attack="per_head", steps=1, eps=0.1)},
        {"robust": Robust(adv="trades", lwf="attacked", steps=1, eps=0.1), "distill": "ft", "sampler": "groups"},
        {"method": "replay", "robust": Robust(adv="madry", steps=1, eps=0.1)},
        {"method": "lwf", "binary": True, "robust": Robust(adv="trades", steps=1, eps=0.1)},
    ],
    ids=lambda changes: "-".join(f"{k}" for k in changes),
)
def test_options_run(changes: dict, tmp_path: Path) -> None:
    evaluation = Evaluation(attack="pgd", eps=0.1, step_size=0.05, steps=1, images=4)
    recipe = short(**{"steps": 2, **changes}, evaluation=evaluation)
    with Run("cilqud", recipe, options(tmp_path)) as run:
        result = run_recipe(run, recipe)
    assert result.robust_last is not None
    assert 0 <= result.robust_last <= 100


def test_all_of_a_pool_has_a_limit_too(tmp_path: Path) -> None:
    recipe = short(steps=1, query=QueryConfig(strategy="all", max_total=7))
    with Run("cilqud", recipe, options(tmp_path)) as run:
        assert run_recipe(run, recipe).queries[0]["taken"] == 7


@pytest.mark.parametrize("at", [None, 1])
def test_a_query_is_described(at: int | None, tmp_path: Path) -> None:
    """Distances from the nearest to the farthest, and how much of it the task before took; also where a run went on."""
    data = DataConfig(tasks=5, per_class=12, held_back=5, anchors=4)
    recipe = short(steps=2, data=data, query=QueryConfig(per_anchor=3))
    if at is not None:
        with pytest.raises(Stopped):
            run_until(recipe, tmp_path, "task-2", at)
    with Run("cilqud", recipe, options(tmp_path, checkpoint_every=1, resume=True)) as run:
        queries = run_recipe(run, recipe).queries
    assert all(query["distance_deciles"] == sorted(query["distance_deciles"]) for query in queries)
    assert all(len(query["distance_deciles"]) == 11 for query in queries)
    taken = [
        set(load_weights(tmp_path / "cilqud" / "x" / "checkpoints" / f"task-{k}.safetensors")[1]["taken"])
        for k in range(1, 5)
    ]
    assert "taken_before" not in queries[0]
    for before, now, query in zip(taken, taken[1:], queries[1:], strict=False):
        assert query["taken_before"] == pytest.approx(100 * len(before & now) / len(now))


def test_distillation_may_leave_the_square_of_the_temperature_out() -> None:
    recipe = short(temperature=3.0)
    x, answers = torch.rand(4, 1, 8, 8), torch.randn(4, 2)
    net = create_model("small", 2, 2, shape=(1, 8, 8)).eval()
    batch = Answered(x, answers, answers, torch.zeros(4, 64), 4)
    with_it, without = (
        distillation_terms(net, batch, 1, dataclasses.replace(recipe, kd_T2=kept).weights) for kept in (True, False)
    )
    for name, value in with_it.items():
        torch.testing.assert_close(value, 9 * without[name])


def test_the_stronger_attack_follows_the_last_task_alone(tmp_path: Path) -> None:
    evaluation = Evaluation(final="ensemble", eps=0.1, steps=1, targets=1, queries=2, images=4)
    recipe = short(steps=2, evaluation=evaluation)
    with Run("cilqud", recipe, options(tmp_path)) as run:
        result = run_recipe(run, recipe)
    assert len(result.final_row) == 2
    assert result.final_last == pytest.approx(sum(result.final_row) / 2)
    assert result.robust_matrix == []
    assert all(0 <= attacked <= 100 for attacked in result.final_row)
    # A run that is over is read again, not tested again.
    with Run("cilqud", recipe, options(tmp_path, resume=True)) as run:
        assert run_recipe(run, recipe) == result


@pytest.mark.parametrize(
    ("heads", "terms"),
    [
        ("two", {"random", "balanced", "kd_aux", "kd_main"}),
        ("random", {"random", "kd_main"}),
        ("balanced", {"balanced", "kd_main"}),
    ],
)
def test_a_single_classifier_sees_one_kind_of_batches(heads: str, terms: set[str], tmp_path: Path) -> None:
    recipe = short(steps=1, heads=heads)
    with Run("cilqud", recipe, options(tmp_path)) as run:
        run_recipe(run, recipe)
    lines = [json.loads(line) for line in (tmp_path / "cilqud" / "x" / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[-1]) - {"phase", "step", "seconds", "loss"} == terms


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": 3}, "a quarter of it"),
        ({"lr": 0.0}, "--lr is positive"),
        ({"momentum": 1.0}, "--momentum"),
        ({"width": -1}, "--width"),
        ({"lambda_lwf": -1.0}, "--lambda_lwf"),
        ({"query": QueryConfig(max_total=-1)}, "--query.max_total"),
        ({"query": QueryConfig(approximate=-1)}, "--query.approximate"),
        ({"select": "best"}, "--select best"),
        ({"query": QueryConfig(per_anchor=0)}, "empty query"),
        ({"temperature": 0.0}, "--temperature"),
        ({"milestones": [1.5]}, "--milestones"),
        ({"method": "replay", "robust": Robust(lwf="attacked")}, "unlabeled images"),
    ],
)
def test_recipes_that_cannot_run_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Recipe(**changes)


def test_the_best_epoch_needs_validation_images_of_every_class(tmp_path: Path, monkeypatch) -> None:
    """A bundle may come without them, which is told of before anything is learned."""
    recipe = short(select="best", data=DataConfig(name="official10", anchors=1))
    data = generated(recipe)
    data.validation[3:] = [data.validation[3][:0]]
    monkeypatch.setattr(tenfold_cilqud.train, "load_data", lambda config, seed: data)
    with (
        Run("cilqud", recipe, options(tmp_path)) as run,
        pytest.raises(UserError, match="of which class 3 has none"),
    ):
        run_recipe(run, recipe)


class Stopped(Exception):
    """A run was stopped on purpose."""


def run_until(recipe: Recipe, folder: Path, phase: str, at: int) -> None:
    """Run a recipe until a step of a phase begins."""
    with Run("cilqud", recipe, options(folder, checkpoint_every=1)) as run:
        steps = run.steps

        def stopping(name: str, total: int, **tracked: object):
            for step in steps(name, total, **tracked):
                if name == phase and step == at:
                    raise Stopped
                yield step

        run.steps = stopping
        run_recipe(run, recipe)


@pytest.mark.parametrize("method", ["cil-qud", "dmc", "eeil", "rwalk", "icarl"])
def test_a_run_stopped_between_and_within_tasks_goes_on(method: str, tmp_path: Path) -> None:
    """Stopped after the first task, and in the middle of the second: the same weights, bit for bit, as undisturbed."""
    recipe = short(method)
    with Run("cilqud", recipe, options(tmp_path / "whole")) as run:
        run_recipe(run, recipe)
    whole, _ = load_checkpoint(tmp_path / "whole" / "cilqud" / "x")

    phase = "task-1-train" if method == "eeil" else "task-1"
    for at in (0, 2):
        folder = tmp_path / f"{at}"
        with pytest.raises(Stopped):
            run_until(recipe, folder, phase, at)
        with Run("cilqud", recipe, options(folder, checkpoint_every=1, resume=True)) as run:
            run_recipe(run, recipe)
        again, _ = load_checkpoint(folder / "cilqud" / "x")
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
        shutil.rmtree(folder)


def test_importances_leave_later_heads_alone(tmp_path: Path) -> None:
    """Not even weight decay moves a head before its task comes, whatever the penalty on the others."""
    data = DataConfig(tasks=5, per_class=12, anchors=4)
    recipe = short("rwalk", data=data, weight_decay=0.1)
    with Run("cilqud", recipe, options(tmp_path)) as run:
        run_recipe(run, recipe)
    first, second = (
        load_checkpoint(tmp_path / "cilqud" / "x" / "checkpoints" / f"task-{k}.safetensors")[0] for k in (0, 1)
    )
    for head in ("linear_main.1", "linear_main.2", "linear_main.4", "linear.0"):
        same = torch.equal(first.get_submodule(head).weight, second.get_submodule(head).weight)
        assert same == (head != "linear_main.1")


def test_importances_end_a_task_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RWalk, stopped when a closed task's state was kept and its weights were not yet."""
    recipe = short("rwalk")
    with Run("cilqud", recipe, options(tmp_path / "whole")) as run:
        run_recipe(run, recipe)

    def stopping(*given: object, **kept: object):
        raise Stopped

    with monkeypatch.context() as patch, Run("cilqud", recipe, options(tmp_path / "again")) as run:
        patch.setattr(Run, "save_weights", stopping)
        with pytest.raises(Stopped):
            run_recipe(run, recipe)
    with Run("cilqud", recipe, options(tmp_path / "again", resume=True)) as run:
        run_recipe(run, recipe)
    whole, again = (load_checkpoint(tmp_path / name / "cilqud" / "x")[0].state_dict() for name in ("whole", "again"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_the_teacher_is_no_live_model() -> None:
    """Also where the backbone was compiled, which leaves a function of the live one on the network."""
    net = create_model("small", 2, 2, shape=(1, 8, 8))
    net.embed = net.embed  # as torch.compile's result is put there
    teacher, x = frozen_copy(net), torch.rand(3, 1, 8, 8)
    before = teacher(x, 1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    assert torch.equal(teacher(x, 1), before)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_untrained_heads_do_not_count(tmp_path: Path) -> None:
    """The accuracy after a task is among the classes seen, whatever the later heads say."""
    recipe = short()
    with Run("cilqud", recipe, options(tmp_path)) as run:
        run_recipe(run, recipe)
    first = tmp_path / "cilqud" / "x" / "checkpoints" / "task-0.safetensors"
    with pytest.raises(UserError, match="later heads are untrained"):
        evaluate(EvalConfig(first, seen=2), options(tmp_path))
    net, _ = load_checkpoint(first)
    x = torch.rand(20, 1, 8, 8)
    before = predictions(net, x, 1)
    with torch.no_grad():
        net.linear_main[1].bias.fill_(100.0)
    assert torch.equal(predictions(net, x, 1), before)


def test_pool_labels_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read to report purity, and for nothing else."""
    weights = []
    for name, shuffle in (("a", False), ("b", True)):
        recipe = short()
        opened = tenfold_cilqud.train.open_pool

        def permuted(*given, opened=opened, shuffle=shuffle, **how):
            pool = opened(*given, **how)
            pool.labels = pool.labels.flip(0) if shuffle else pool.labels
            return pool

        monkeypatch.setattr(tenfold_cilqud.train, "open_pool", permuted)
        with Run("cilqud", recipe, options(tmp_path / name)) as run:
            run_recipe(run, recipe)
        monkeypatch.undo()
        weights.append(load_checkpoint(tmp_path / name / "cilqud" / "x")[0].state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_streams_cycle_with_fresh_shuffles_and_merge_a_last_one(tmp_path: Path) -> None:
    recipe = short()
    with Run("cilqud", recipe, options(tmp_path)) as run:
        samples = Samples(torch.zeros(9, 1, 2, 2), torch.arange(9) % 3)
        stream = Stream(run, samples, 4, "test")
        assert len(stream) == 2
        first, second = stream.indices(0), stream.indices(1)
        assert (len(first), len(second)) == (4, 5)
        assert sorted([*first.tolist(), *second.tolist()]) == list(range(9))
        assert stream.indices(2).tolist() != first.tolist()
        assert stream.indices(0).tolist() == first.tolist()
        halves = []
        for rank in (0, 1):
            run.rank, run.world = rank, 2
            halves.append(Stream(run, samples, 4, "test").chosen(0)[0])
        run.rank, run.world = 0, 1
        assert torch.cat(halves).tolist() == first.tolist()
        labels = torch.tensor([0] * 90 + [1] * 10)
        many = Samples(torch.zeros(100, 1, 2, 2), labels)
        balanced = Stream(run, many, 400, "balanced", (), class_weights(labels))
        assert 120 < int(labels[balanced.indices(0)].sum()) < 280


def test_cil_qud_learns(tmp_path: Path) -> None:
    """Two tasks of digits: far above the chance of a tenth, on the old classes too."""
    data = DataConfig(tasks=2, per_class=60, held_back=30, anchors=4)
    recipe = short(steps=60, sub_batch=32, batch_size=32, width=8, data=data, query=QueryConfig(per_anchor=8))
    recipe.pool.source = "split+patches:300"
    with Run("cilqud", recipe, options(tmp_path)) as run:
        result = run_recipe(run, recipe)
    assert result.last > 60
    assert result.matrix[1][0] > 40
    metrics = [json.loads(line) for line in (tmp_path / "cilqud" / "x" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "random", "balanced", "kd_aux", "kd_main"} <= set(metrics[-1])
