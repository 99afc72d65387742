"""The worst cases of RCIL-QUD, and how accuracy under attack is counted."""

import copy
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from tenfold_cilqud import (
    Answered,
    Labelled,
    Robust,
    SmallNet,
    labelled_attack,
    rft_attack,
    rkd_attack,
    rtc_attack,
    rtc_term,
    worst_cases,
)
from tenfold_cilqud.ensemble import fab, square, square_share, to_plane, withstands_ensemble, wrong_class
from tenfold_cilqud.evaluate import Evaluation, robust_accuracies, withstood
from tenfold_cilqud.protocol import Samples
from tenfold_shared.attacks import held, input_gradient
from tenfold_shared.errors import UserError

EPS = 0.1
SETTINGS = Robust(adv="madry", lwf="attacked", eps=EPS, step_size=0.04, steps=3)


def net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet(2, 3, width=2, mean=(0.3,), std=(0.4,)).double()


def images(n: int = 5) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def noise(n: int = 5) -> torch.Tensor:
    return 2 * torch.rand(n, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 1


def answered(model: SmallNet) -> Answered:
    teacher = copy.deepcopy(model).eval()
    with torch.no_grad():
        features = teacher.features(images() * 0.9)
        return Answered(images(), teacher.logits(features, 1), teacher.logits(features, 1, "aux"), features, 5)


def attacks(model: SmallNet) -> dict:
    batch = Labelled(images(), torch.tensor([0, 1, 2, 3, 0]), 5)
    asked = answered(model)
    return {
        "at": labelled_attack(model, batch, 2, ("main",), SETTINGS, noise()),
        "rkd": rkd_attack(model, asked, 1, 2.0, noise()),
        "rft": rft_attack(asked, "mse", noise()),
        "rtc": rtc_attack(model, images(), 2, noise()),
    }


def test_every_attack_raises_its_loss_within_the_ball() -> None:
    model = net().eval()
    for name, attack in attacks(model).items():
        (delta,) = worst_cases(model, [attack], SETTINGS)
        assert delta.abs().max() <= EPS + 1e-12
        assert (images() + delta).min() >= 0
        assert (images() + delta).max() <= 1 + 1e-12
        with torch.no_grad():
            clean, worst = (attack.loss(model.features(x)).sum() for x in (images(), images() + delta))
        assert worst > clean, name


def test_attacks_made_together_are_those_made_apart() -> None:
    model = net().train()
    found = attacks(model)
    together = worst_cases(model, list(found.values()), SETTINGS)
    for attack, delta in zip(found.values(), together, strict=True):
        torch.testing.assert_close(delta, worst_cases(model, [attack], SETTINGS)[0])


def test_an_attack_leaves_nothing_behind() -> None:
    model = net().train()
    found = attacks(model)
    before = copy.deepcopy(model.state_dict())
    worst_cases(model, list(found.values()), SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_consistency_cannot_start_from_the_image_itself() -> None:
    """There the gradient vanishes, and with it the attack."""
    model = net().eval()
    attack = rtc_attack(model, images(), 2, noise())
    still, moved = (
        input_gradient(lambda x: attack.loss(model.features(x)), images() + delta).abs().max()
        for delta in (0.0, EPS * noise())
    )
    assert moved > 1e6 * still


def test_consistency_can_hold_its_clean_side_still() -> None:
    model = net().eval()
    delta = EPS * noise()
    gradients = []
    for detach in (False, True):
        model.zero_grad()
        rtc_term(model, images(), images() + delta, 2, 5, detach_clean=detach).backward()
        gradients.append(model.backbone[0].weight.grad.clone())
    assert not torch.allclose(*gradients)


def test_trades_compares_with_the_clean_answer() -> None:
    model = net().eval()
    batch = Labelled(images(), torch.zeros(5, dtype=torch.int64), 5)
    trades = Robust(adv="trades", eps=EPS, step_size=0.04, steps=3)
    attack = labelled_attack(model, batch, 2, ("main",), trades, noise())
    other = labelled_attack(model, batch._replace(y=batch.y + 1), 2, ("main",), trades, noise())
    assert torch.equal(worst_cases(model, [attack], trades)[0], worst_cases(model, [other], trades)[0])


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="negative"):
        Robust(eps=-1.0)
    with pytest.raises(UserError, match="negative"):
        Evaluation(images=-1)
    for name in ("restarts", "batch_size"):
        with pytest.raises(UserError, match="1 or more"):
            Evaluation(**{name: 0})


# -- accuracy under attack ------------------------------------------------------------------------------------------------


SMALL = {"steps": 3, "targets": 2, "queries": 5}


@pytest.mark.parametrize("attack", ["pgd", "ensemble"])
def test_no_room_no_harm(attack) -> None:
    """With eps 0 exactly the images that are right stay right."""
    model, y = net().eval(), torch.tensor([0, 1, 2, 3, 0])
    chosen = Evaluation(attack=attack, eps=0.0, step_size=0.0, **SMALL)
    expected = model.scores(images(), 2).argmax(1) == y
    assert torch.equal(withstood(model, images(), y, 2, chosen, 0), expected)


@pytest.mark.parametrize("option", ["attack", "final"])
def test_autoattack_is_missed_before_training(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "autoattack", None)
    with pytest.raises(UserError, match=f"--evaluation.{option} autoattack needs the package"):
        Evaluation(**{option: "autoattack"})


def test_autoattack_aims_at_the_classes_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """At all wrong ones of a state of few classes; the ensemble takes its place where its losses need more classes."""
    made = []

    class AutoAttack:
        def __init__(self, score, **settings):
            self.apgd_targeted, self.fab = SimpleNamespace(), SimpleNamespace()
            made.append(self)

        def run_standard_evaluation(self, x, y, bs):
            return x

    module = ModuleType("autoattack")
    module.AutoAttack, module.__spec__ = AutoAttack, ModuleSpec("autoattack", None)
    monkeypatch.setitem(sys.modules, "autoattack", module)
    model = net().eval()
    for tasks, targets in ((1, []), (2, [3]), (3, [3, 5])):
        y = model.scores(images(), tasks).argmax(1)
        alive = withstood(model, images(), y, tasks, Evaluation(attack="autoattack", eps=0.0, **SMALL), 0)
        assert alive.all()
        assert [adversary.apgd_targeted.n_target_classes for adversary in made] == targets
        assert [adversary.fab.n_target_classes for adversary in made] == targets


def test_every_class_of_a_task_is_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test sets list their images class after class: the first ones of every class in turn, and all where there are fewer."""
    asked: list[int] = []

    def recorded(net, x, y, *rest):
        asked.extend(y.tolist())
        return torch.ones(len(y), dtype=torch.bool)

    monkeypatch.setattr("tenfold_cilqud.evaluate.withstood", recorded)
    sets = [Samples(images(7), torch.tensor([0, 0, 0, 0, 1, 1, 1])), Samples(images(5), torch.tensor([2, 2, 2, 2, 3]))]
    for count, expected in (
        (4, [0, 0, 1, 1, 2, 2, 2, 3]),
        (5, [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]),
        (9, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3]),
        (0, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3]),
    ):
        asked.clear()
        assert robust_accuracies(net(), sets, 2, Evaluation(images=count, batch_size=3), 0) == [100.0, 100.0]
        assert asked == expected


def undecided(n: int = 40) -> tuple[SmallNet, torch.Tensor]:
    """A network of which no class is ahead on all images, and its predictions, all right without an attack."""
    model = net().eval()
    with torch.no_grad():
        mean = model.scores(images(n), 3).mean(0)
        for task, layer in enumerate(model.linear_main):
            layer.bias -= mean[2 * task : 2 * task + 2]
        return model, model.scores(images(n), 3).argmax(1)


def test_the_ensemble_is_at_least_as_strong_as_pgd() -> None:
    model, y = undecided()
    left = []
    for eps in (0.003, 0.01, 0.03):
        options = {"eps": eps, "step_size": eps / 4, "steps": 10, "targets": 3, "queries": 20}
        pgd = withstood(model, images(40), y, 3, Evaluation(attack="pgd", **options), 0)
        ensemble = withstood(model, images(40), y, 3, Evaluation(attack="ensemble", **options), 0)
        assert ensemble.sum() <= pgd.sum() + 1
        left.append(int(ensemble.sum()))
    assert left[0] > left[2]


def test_square_stays_in_the_ball_and_lowers_the_margin() -> None:
    model, y = undecided()

    def score(x):
        return model.scores(x, 3)

    def margin(x):
        logits = score(x)
        return logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -torch.inf).amax(1)

    few, many = (
        square(score, images(40), y, eps=EPS, queries=n, generator=torch.Generator().manual_seed(0)) for n in (0, 30)
    )
    assert (many - images(40)).abs().max() <= EPS + 1e-9
    assert many.min() >= 0
    assert many.max() <= 1 + 1e-9
    assert (margin(many) <= margin(few)).all()
    assert (margin(many) < margin(few)).any()


def test_the_first_square_covers_its_share_of_the_image() -> None:
    """0.8 of 12 x 20 pixels is higher than the image: 12 x 12 of them; with a hundredth of the queries done 0.2 of it, 7 x 7."""
    calls = []

    def score(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.clone())
        return x.new_zeros(len(x), 2)  # no square is better than another, so the first noise stays

    x = torch.full((64, 3, 12, 20), 0.5)
    square(
        score, x, torch.zeros(64, dtype=torch.long), eps=0.1, queries=100, generator=torch.Generator().manual_seed(0)
    )
    for query, side in ((1, 12), (2, 7)):
        touched = (calls[query] != calls[0]).any(1)
        assert int(touched.any(2).sum(1).max()) == int(touched.any(1).sum(1).max()) == side


def test_squares_shrink_at_the_papers_fractions() -> None:
    assert [square_share(n / 10_000) for n in (0, 10, 11, 51, 8001)] == [0.8, 0.8, 0.4, 0.2, 0.8 / 512]


@given(st.integers(0, 999), st.integers(1, 12), st.floats(0.0, 2.0))
@settings(max_examples=25, deadline=None)
def test_the_way_to_the_plane_is_that_of_a_linear_program(seed, size, scale) -> None:
    """Least t with |delta| <= t, points + delta in [0, 1] and <normal, delta> = -offset; all room where there is none."""
    draw = torch.Generator().manual_seed(seed)
    point, normal = torch.rand(1, size, generator=draw).double(), torch.randn(1, size, generator=draw).double()
    offset = scale * torch.randn(1, generator=draw).double()
    delta = to_plane(point, normal, offset)
    assert (point + delta).min() >= -1e-12
    assert (point + delta).max() <= 1 + 1e-12
    found = linprog(
        [0.0] * size + [1.0],
        A_ub=[[sign * (i == j) for j in range(size)] + [-1.0] for i in range(size) for sign in (1.0, -1.0)],
        b_ub=[0.0] * 2 * size,
        A_eq=[[*normal[0].tolist(), 0.0]],
        b_eq=[-float(offset)],
        bounds=[(-p, 1 - p) for p in point[0].tolist()] + [(0, None)],
    )
    if found.success:
        assert float(delta.abs().max()) == pytest.approx(found.fun, abs=1e-7)
        assert float((normal * delta).sum() + offset) == pytest.approx(0.0, abs=1e-7)
    else:
        toward = -offset.sign() * normal.sign()
        torch.testing.assert_close(delta, torch.where(toward > 0, 1 - point, torch.where(toward < 0, -point, 0.0)))


def test_fab_finds_the_nearest_image_beyond_a_plane() -> None:
    """For a linear classifier that is the margin over the weights' absolute sum, and it is taken if within eps."""
    weights = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).double()
    x = 0.45 + 0.1 * torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(1)).double()

    def score(z):
        return z.flatten(1) @ weights.T

    logits = score(x)
    y = logits.argmax(1)
    difference = weights[0] - weights[1]
    distance = (logits[:, 0] - logits[:, 1]).abs() / difference.abs().sum()
    found = fab(score, x, y, rank=1, steps=10, eps=1.0)
    reached = (found - x).flatten(1).abs().amax(1)
    assert (score(found).argmax(1) != y).all()
    assert (reached >= distance - 1e-9).all()
    assert (reached <= 1.06 * distance).all()
    eps = float(distance.median()) * 1.06
    kept = fab(score, x, y, rank=1, steps=10, eps=eps)
    assert torch.equal((kept != x).flatten(1).any(1), reached <= eps)


def test_fab_comes_as_close_as_a_search_by_pgd() -> None:
    """On a network: nearer than or near the least radius at which PGD succeeds, whose attack knows the radius."""
    model, y = undecided()

    def score(x):
        return model.scores(x, 3)

    distance = torch.full((40,), torch.inf, dtype=torch.float64)
    with held(model):
        for rank in (1, 2, 3, 4, 5):
            found = fab(score, images(40), y, rank=rank, steps=20, eps=1.0)
            with torch.no_grad():
                beyond = score(found).argmax(1) != y
            reached = (found - images(40)).flatten(1).abs().amax(1)
            distance = torch.where(beyond, distance.minimum(reached), distance)
        for eps in (0.01, 0.02, 0.04):
            radius = Evaluation(attack="pgd", eps=eps, step_size=eps / 8, steps=20)
            fallen = ~withstood(model, images(40), y, 3, radius, 0)
            assert (distance[fallen] <= 1.25 * eps).double().mean() >= 0.8


def test_the_wrong_class_of_a_rank_is_never_the_label() -> None:
    model, y = undecided()
    with torch.no_grad():
        ranked = torch.stack([wrong_class(lambda x: model.scores(x, 3), images(40), y, rank) for rank in range(1, 6)])
    assert (ranked != y).all()
    assert (ranked.sort(0).values.diff(dim=0) > 0).all()


def test_what_is_wrong_already_is_not_attacked() -> None:
    alive = torch.zeros(5, dtype=torch.bool)
    model = net().eval()
    y = torch.zeros(5, dtype=torch.int64)
    assert not withstands_ensemble(lambda x: model.scores(x, 2), images(), y, alive, eps=EPS, **SMALL, seed=0).any()
