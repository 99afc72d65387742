"""The baselines' losses and decisions, each against its formula."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tenfold_cilqud import SmallNet
from tenfold_cilqud.anchors import choose_anchors
from tenfold_cilqud.baselines import (
    Walk,
    align_weights,
    binary_loss,
    block_distillation,
    consolidation_loss,
    lwf_loss,
    replay_distillation_loss,
)
from tenfold_cilqud.data import DataConfig, load_data
from tenfold_cilqud.decisions import BiasCorrection, Rectified, add_decision, decision_of
from tenfold_cilqud.methods import align_heads, at_worst, baseline, fit_bias
from tenfold_cilqud.protocol import Samples
from tenfold_cilqud.recipe import Recipe
from tenfold_cilqud.robust import Robust, worst_cases
from tenfold_cilqud.session import Session, features_of, make_task, update_anchors
from tenfold_cilqud.train import new_network, run_recipe, validation_accuracy
from tenfold_shared.errors import UserError
from tenfold_shared.run import Run, RunOptions

LOGITS = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TEACHER = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
NEW = torch.tensor([4, 5, 4, 5, 5])


def distilled() -> torch.Tensor:
    return -((TEACHER / 2).softmax(1) * (LOGITS[:, :4] / 2).log_softmax(1)).sum(1)


def test_lwf_classifies_within_the_new_block() -> None:
    torch.testing.assert_close(block_distillation(LOGITS, TEACHER), distilled())
    expected = cross_entropy(LOGITS[:, 4:], NEW - 4, reduction="none") + 3 * distilled()
    torch.testing.assert_close(lwf_loss(LOGITS, NEW, TEACHER), expected)
    torch.testing.assert_close(lwf_loss(LOGITS, NEW, None), cross_entropy(LOGITS, NEW, reduction="none"))


def test_replay_with_distillation() -> None:
    plain = cross_entropy(LOGITS, NEW, reduction="none")
    torch.testing.assert_close(replay_distillation_loss(LOGITS, NEW, TEACHER), plain + distilled())
    mixed = replay_distillation_loss(LOGITS, NEW, TEACHER, share=0.25)
    torch.testing.assert_close(mixed, 0.75 * plain + 0.25 * distilled())


def test_the_binary_form() -> None:
    p = LOGITS.sigmoid()
    target = torch.cat([TEACHER.sigmoid(), torch.eye(6, dtype=torch.float64)[NEW][:, 4:]], 1)
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1)
    torch.testing.assert_close(binary_loss(LOGITS, NEW, TEACHER), expected)


def test_aligned_rows_have_the_same_mean_norm() -> None:
    aligned = align_weights(LOGITS, 2)
    assert torch.equal(aligned[:3], LOGITS[:3])
    torch.testing.assert_close(aligned[-2:].norm(dim=1).mean(), LOGITS[:3].norm(dim=1).mean())


def test_alignment_of_a_network_touches_the_new_head_alone() -> None:
    net = SmallNet(2, 3, width=2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    align_heads(net, 1)
    changed = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["linear_main.1.weight"]


def test_consolidation_ignores_what_experts_agree_on_up_to_a_shift() -> None:
    old, new = TEACHER, LOGITS[:, :2]
    target = torch.cat([old - old.mean(1, keepdim=True), new - new.mean(1, keepdim=True)], 1)
    assert consolidation_loss(target, old + 7, new - 3).max() < 1e-20
    torch.testing.assert_close(consolidation_loss(LOGITS, old, new), (LOGITS - target).square().mean(1))


def balanced_network(x: torch.Tensor) -> SmallNet:
    """A network for which a new class is on top on half of the images."""
    torch.manual_seed(0)
    net = SmallNet(2, 2, width=2).eval()
    with torch.no_grad():
        for layer in net.linear_main:  # logits that differ from image to image by about 1
            layer.weight /= net.logits(net.features(x), 2).std(0).mean()
        logits = net.scores(x, 2)
        net.linear_main[1].bias -= (logits[:, 2:].amax(1) - logits[:, :2].amax(1)).median()
    return net


def test_bias_correction_finds_a_bias() -> None:
    """A network whose new logits are shifted up is corrected by a shift down."""
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    net = balanced_network(x)
    add_decision(net, "bic")
    with torch.no_grad():
        labels = net.scores(x, 2).argmax(1)
        net.linear_main[1].bias.add_(5.0)
        worse = (net.scores(x, 2).argmax(1) == labels).double().mean()
    fit_bias(net, net.decision, 1, Samples(x, labels))
    with torch.no_grad():
        assert (net.scores(x, 2).argmax(1) == labels).double().mean() > worse
    assert isinstance(net.decision, BiasCorrection)
    assert net.decision.shift[0] == 0
    assert net.decision.shift[1] < 0


def test_bias_correction_needs_old_images_beside_new_ones() -> None:
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    net = balanced_network(x)
    add_decision(net, "bic")
    fit_bias(net, net.decision, 1, Samples(x, torch.tensor([2, 3] * 3)))
    assert net.decision.scale.tolist() == [1, 1]
    assert net.decision.shift.tolist() == [0, 0]


def session_of(recipe: Recipe, tmp_path: Path) -> Session:
    """A run on digits before its first task."""
    run = Run("cilqud", recipe, RunOptions(output=tmp_path, name="x", device="cpu", quiet=True))
    data = load_data(recipe.data, 0)
    net = new_network(recipe, data.classes_per_task, data.tasks, data.shape, data.mean, data.std, 0)
    return Session(run, recipe, data, net)


@pytest.mark.parametrize(
    ("method", "asked", "rule"),
    [("icarl", None, "herding"), ("icarl", "random", "random"), ("replay", None, "random")],
)
def test_anchors_are_chosen_as_the_method_does(method, asked, rule, tmp_path: Path) -> None:
    """Herding is iCaRL's own, unless the data say otherwise."""
    data = DataConfig(per_class=10, anchors=3, anchor_rule=asked)
    session = session_of(Recipe(method=method, batch_size=8, width=2, data=data), tmp_path)
    update_anchors(session, 0)
    for label in session.data.order[:2]:
        features = features_of(session.net, session.data.train[label])
        assert session.anchors[label] == choose_anchors(rule, 10, 3, 0, label, features).tolist()


def test_bias_corrections_are_applied_once(tmp_path: Path) -> None:
    """The student's old logits are compared with the teacher's behind the same corrections, which it keeps at test."""
    session = session_of(Recipe(method="bic", batch_size=8, width=2, data=DataConfig(per_class=10)), tmp_path)
    for k in (0, 1):
        update_anchors(session, k)
    net = session.net.eval()
    net.decision.scale[1], net.decision.shift[1] = 0.5, -2.0
    task = make_task(session, 2)
    batch, _ = task.random[0]
    logits = net.decision(net, net.features(batch.x), 3)
    torch.testing.assert_close(logits[:, 4:], net(batch.x, 3)[:, 4:])
    expected = replay_distillation_loss(logits, batch.y, logits[:, :4], 4 / 6).mean()
    torch.testing.assert_close(baseline(task, 0)["classification"], expected)
    expected.backward()
    assert net.decision.scale.grad is None


def test_the_best_weights_are_chosen_without_what_a_tasks_end_tells(tmp_path: Path) -> None:
    """While iCaRL learns its classes have no means yet: the primary head is asked, here one that tells them apart."""
    data = DataConfig(per_class=10, validation=10)
    session = session_of(Recipe(method="icarl", select="best", batch_size=8, data=data), tmp_path)
    net, task = session.net, make_task(session, 0)
    with torch.no_grad():
        features = net.eval().features(task.new.images)
        means = torch.stack([features[task.new.labels == label].mean(0) for label in (0, 1)])
        net.linear_main[0].weight.copy_(1e3 * means)
        net.linear_main[0].bias.copy_(-500 * means.square().sum(1))
    assert validation_accuracy(session, task) > 60
    assert net.decision is not None


@pytest.mark.parametrize(("method", "passes"), [("lwf", 2 + 2), ("eeil", 2 + 2 + 1), ("dmc", 2 + 2)])
@pytest.mark.parametrize("adv", ["madry", "trades"])
def test_every_stage_on_labels_is_attacked(method: str, passes: int, adv, tmp_path: Path, monkeypatch) -> None:
    """Two steps of each of two tasks, EEIL's balanced stage, and DMC's expert (its second stage has no labels)."""
    made = []

    def counted(*given):
        made.append(given)
        return worst_cases(*given)

    monkeypatch.setattr("tenfold_cilqud.methods.worst_cases", counted)
    data = DataConfig(tasks=2, per_class=6, held_back=2, anchors=2)
    recipe = Recipe(method=method, steps=2, batch_size=8, width=2, data=data, robust=Robust(adv=adv, steps=1))
    recipe.pool.source, recipe.query.per_anchor = "split", 1
    with Run("cilqud", recipe, RunOptions(output=tmp_path, name="x", device="cpu", quiet=True)) as run:
        run_recipe(run, recipe)
    assert len(made) == passes


def test_an_attack_stays_within_the_classes_of_its_loss(tmp_path: Path) -> None:
    """LwF's cross entropy is over the new block, so the old heads have no say in its worst case."""
    settings = Robust(adv="madry", eps=0.1, step_size=0.05, steps=2)
    session = session_of(Recipe(method="lwf", batch_size=8, width=2, data=DataConfig(per_class=10)), tmp_path)
    update_anchors(session, 0)
    stream = make_task(session, 1).random
    batch, whole = stream[0]
    found = []
    for within in (range(1, 2), range(2)):
        for bias in (0.0, 100.0):
            with torch.no_grad():
                session.net.linear_main[0].bias[0] = bias
            found.append(at_worst(session.net, stream, 0, batch, whole, within, settings).x)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[2], found[3])


def test_rectified_scores_change_only_where_a_new_class_is_on_top() -> None:
    x = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    net = balanced_network(x)
    decision = Rectified(net.width, 2, 2)
    decision.initial[:2], decision.present[:2] = 0.8, 0.4
    decision.confidence[:] = torch.tensor([0.9, 0.6])
    with torch.no_grad():
        features = net.features(x)
        plain = net.logits(features, 2).softmax(1)
        found = decision(net, features, 2)
    on_top = plain.argmax(1) >= 2
    assert 0 < on_top.sum() < len(x)
    torch.testing.assert_close(found[~on_top], plain[~on_top])
    torch.testing.assert_close(found[on_top][:, :2], plain[on_top][:, :2] * 0.8 / 0.4 * 0.6 / 0.9)
    torch.testing.assert_close(found[:, 2:], plain[:, 2:])


def test_decisions_are_told_by_their_entries() -> None:
    for method in ("icarl", "bic", "il2m"):
        net = SmallNet(2, 2, width=2)
        add_decision(net, method)
        assert decision_of(net.state_dict()) == method
    assert decision_of(SmallNet(2, 2).state_dict()) == ""
    with pytest.raises(UserError, match="no method"):
        decision_of({"decision.odd": torch.zeros(1)})


def test_the_walk_s_sums_are_those_of_a_loop() -> None:
    """F decays by 0.9; every step adds -g d / (F d^2 / 2) to a score, where positive; both end at a maximum of 1, s halved."""
    net = nn.Linear(2, 1, bias=False)
    walk, fisher, score = Walk(net), [0.0, 0.0], [0.0, 0.0]
    for gradient, moved in (((2.0, 1.0), (-0.1, -0.2)), ((1.0, 3.0), (-0.3, 0.1)), ((0.5, 2.0), (-0.2, -0.1))):
        net.weight.grad = torch.tensor([gradient])
        with torch.no_grad():
            net.weight += torch.tensor([moved])
        walk.note(net)
        for i, (g, d) in enumerate(zip(gradient, moved, strict=True)):
            fisher[i] = 0.9 * fisher[i] + 0.1 * g**2
            score[i] += max(0.0, -g * d / (0.5 * fisher[i] * d**2))
    walk.end_task(net)
    torch.testing.assert_close(walk.kept_fisher[0][0], torch.tensor(fisher) / max(fisher))
    torch.testing.assert_close(walk.kept_score[0][0], 0.5 * torch.tensor(score) / max(score), rtol=1e-4, atol=0)


def test_the_walk_holds_what_mattered() -> None:
    """Two parameters, one of which lowers the loss: its score is the greater, and the penalty pulls it back."""
    net = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(net.weight)
    walk = Walk(net)
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(20):
        optimiser.zero_grad()
        (net(torch.tensor([[1.0, 0.0]])) - 1).square().sum().backward()
        optimiser.step()
        walk.note(net)
    assert walk.penalty(net) == 0
    walk.end_task(net)
    assert walk.kept_score[0][0, 0] > walk.kept_score[0][0, 1] == 0
    with torch.no_grad():
        net.weight.zero_()
    assert walk.penalty(net) > 0
    other = Walk(net)
    other.load_state_dict({name: [v.clone() for v in values] for name, values in walk.state_dict().items()})
    torch.testing.assert_close(other.penalty(net), walk.penalty(net))
