"""The worst cases of RCIL-QUD, and how accuracy under attack is counted."""

import copy

import pytest
import torch

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
from tenfold_cilqud.ensemble import apgd, square, withstands_ensemble
from tenfold_cilqud.evaluate import Evaluation, withstood
from tenfold_shared.attacks import input_gradient
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
    settings = Robust(adv="trades", eps=EPS, step_size=0.04, steps=3)
    attack = labelled_attack(model, batch, 2, ("main",), settings, noise())
    other = labelled_attack(model, batch._replace(y=batch.y + 1), 2, ("main",), settings, noise())
    assert torch.equal(worst_cases(model, [attack], settings)[0], worst_cases(model, [other], settings)[0])


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="negative"):
        Robust(eps=-1.0)


# -- accuracy under attack ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["pgd", "ensemble"])
def test_no_room_no_harm(attack) -> None:
    """With eps 0 exactly the images that are right stay right."""
    model, y = net().eval(), torch.tensor([0, 1, 2, 3, 0])
    settings = Evaluation(attack=attack, eps=0.0, step_size=0.0, steps=3)
    expected = model.scores(images(), 2).argmax(1) == y
    assert torch.equal(withstood(model, images(), y, 2, settings, 0), expected)


def test_the_ensemble_is_at_least_as_strong_as_pgd() -> None:
    """On a network's own predictions, all of which are right without an attack."""
    model = net().eval()
    with torch.no_grad():  # no class is ahead on all images
        mean = model.scores(images(40), 3).mean(0)
        for task, layer in enumerate(model.linear_main):
            layer.bias -= mean[2 * task : 2 * task + 2]
        y = model.scores(images(40), 3).argmax(1)
    left = []
    for eps in (0.003, 0.01, 0.03):
        options = {"eps": eps, "step_size": eps / 4, "steps": 10}
        pgd = withstood(model, images(40), y, 3, Evaluation(attack="pgd", **options), 0)
        ensemble = withstood(model, images(40), y, 3, Evaluation(attack="ensemble", **options), 0)
        assert ensemble.sum() <= pgd.sum() + 1
        left.append(int(ensemble.sum()))
    assert left[0] > left[2]


def test_attacks_of_the_ensemble_stay_in_the_ball() -> None:
    model, y = net().eval(), torch.tensor([0, 1, 2, 3, 0])

    def score(x):
        return model.scores(x, 2)

    def loss(logits, labels, clean):
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    draws = torch.Generator().manual_seed(0)
    for found in (
        apgd(score, loss, images(), y, eps=EPS, steps=8, generator=draws),
        square(score, images(), y, eps=EPS, queries=20, generator=draws),
    ):
        assert (found - images()).abs().max() <= EPS + 1e-9
        assert found.min() >= 0
        assert found.max() <= 1 + 1e-9
    with torch.no_grad():
        worst = apgd(score, loss, images(), y, eps=EPS, steps=8, generator=draws)
        assert (loss(score(worst), y, None) >= loss(score(images()), y, None) - 1e-9).float().mean() >= 0.8


def test_what_is_wrong_already_is_not_attacked() -> None:
    alive = torch.zeros(5, dtype=torch.bool)
    model = net().eval()
    y = torch.zeros(5, dtype=torch.int64)
    assert not withstands_ensemble(lambda x: model.scores(x, 2), images(), y, alive, eps=EPS, steps=2, seed=0).any()
