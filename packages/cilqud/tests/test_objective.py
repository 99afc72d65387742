"""The objective: each term against a slow reference, the batch norms' statistics, the pitfalls of section 13."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_cilqud import (
    Answered,
    Labelled,
    SmallNet,
    Weights,
    balanced_term,
    batch_composition,
    consistency,
    distillation_terms,
    feature_transfer,
    first_task_terms,
    knowledge_distillation,
    random_term,
    transfer_term,
)
from tenfold_cilqud.models import counted_twice


def net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet(2, 3, width=2).double()


def labelled(n: int = 6, classes: int = 4, seed: int = 0) -> Labelled:
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, dtype=torch.float64, generator=draw)
    return Labelled(x, torch.randint(classes, (n,), generator=draw), n)


def answered(n: int = 5, classes: int = 2) -> Answered:
    x, _, count, _ = labelled(n, seed=7)
    draw = torch.Generator().manual_seed(3)
    answers = [torch.randn(n, k, dtype=torch.float64, generator=draw) for k in (classes, classes, 8)]
    return Answered(x, *answers, count)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.floats(0.5, 4.0), st.integers(0, 99))
def test_distillation_is_the_padded_cross_entropy(n, k, more, temperature, seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(n, k + more, dtype=torch.float64, generator=draw)
    teacher = torch.randn(n, k, dtype=torch.float64, generator=draw)
    found = knowledge_distillation(student, teacher, temperature)
    for i in range(n):
        weights = [math.exp(v / temperature) for v in teacher[i].tolist()]
        target = [w / sum(weights) for w in weights] + [0.0] * more
        total = math.log(sum(math.exp(v / temperature) for v in student[i].tolist()))
        value = -sum(p * (s / temperature - total) for p, s in zip(target, student[i].tolist(), strict=True))
        assert found[i].item() == pytest.approx(temperature**2 * value, rel=1e-9)


def test_distillation_is_least_at_the_teacher_where_it_is_the_entropy() -> None:
    teacher = torch.randn(4, 3, dtype=torch.float64)
    p = (teacher / 2).softmax(1)
    torch.testing.assert_close(knowledge_distillation(teacher, teacher), -4 * (p * p.log()).sum(1))
    assert (
        knowledge_distillation(teacher + torch.randn(4, 3), teacher) >= knowledge_distillation(teacher, teacher)
    ).all()


def test_teacher_gets_no_gradient() -> None:
    teacher = torch.randn(4, 3, requires_grad=True)
    student = torch.randn(4, 3, requires_grad=True)
    (knowledge_distillation(student, teacher).sum() + feature_transfer(student, teacher).sum()).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize(
    ("distance", "reference"),
    [
        ("l2", lambda a, b: sum((x - y) ** 2 for x, y in zip(a, b, strict=True))),
        ("mse", lambda a, b: sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)),
        ("l1", lambda a, b: sum(abs(x - y) for x, y in zip(a, b, strict=True))),
        (
            "cosine",
            lambda a, b: 1 - sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b)),
        ),
    ],
)
def test_feature_transfer(distance, reference) -> None:
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    expected = [reference(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert feature_transfer(a, b, distance).tolist() == pytest.approx(expected)


def test_consistency_is_a_divergence() -> None:
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    expected = torch.nn.functional.kl_div(b.log_softmax(1), a.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(consistency(a, b), expected)
    assert consistency(a, a).abs().max() < 1e-12


def test_one_pass_counts_as_two() -> None:
    twice, once = net().train(), net().train()
    x = labelled().x
    twice(x, 1)
    twice(x, 1)
    with counted_twice(once):
        once(x, 1)
    for name, value in twice.state_dict().items():
        torch.testing.assert_close(once.state_dict()[name], value)


def test_an_incremental_step_counts_five_passes() -> None:
    model = net().train()
    weights = Weights()
    random_term(model, labelled(), 2, weights)
    balanced_term(model, [(0.5, labelled(4)), (0.5, labelled(4, 2))], 2, weights)
    distillation_terms(model, answered(), 1, weights)
    assert {int(v) for n, v in model.state_dict().items() if n.endswith("num_batches_tracked")} == {5}
    model = net().train()
    first_task_terms(model, labelled(classes=2))
    assert {int(v) for n, v in model.state_dict().items() if n.endswith("num_batches_tracked")} == {2}


def test_distillation_leaves_the_new_heads_alone() -> None:
    """The student's logits are cut to the old classes before the softmax."""
    model = net().train()
    sum(distillation_terms(model, answered(), 1, Weights()).values()).backward()
    assert model.linear_main[0].weight.grad.abs().sum() > 0
    assert model.linear_main[1].weight.grad is None
    assert model.linear[1].weight.grad is None


def test_feature_transfer_moves_no_head() -> None:
    model = net().train()
    transfer_term(model, answered(), Weights()).backward()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name.startswith("linear"))
    assert model.backbone[0].weight.grad.abs().sum() > 0


def test_the_primary_head_does_not_hear_of_the_random_batch() -> None:
    """Inference uses the balanced head; with it frozen, predictions do not depend on the auxiliary one."""
    model = net().train()
    random_term(model, labelled(), 2, Weights())[0].backward()
    assert all(layer.weight.grad is None for layer in model.linear_main)
    model.eval()
    before = model.scores(labelled().x, 2)
    with torch.no_grad():
        for layer in model.linear:
            layer.weight.mul_(9)
    torch.testing.assert_close(model.scores(labelled().x, 2), before)


def test_terms_of_two_processes_average_to_those_of_one() -> None:
    """Losses divide by the whole batch over the processes, so uneven shares add up (in eval mode, sample by sample)."""
    model = net().eval()
    whole = labelled(5)
    parts = [Labelled(whole.x[:2], whole.y[:2], 2.5), Labelled(whole.x[2:], whole.y[2:], 2.5)]
    mean = sum(random_term(model, part, 2, Weights())[0] for part in parts) / 2
    torch.testing.assert_close(mean, random_term(model, whole, 2, Weights())[0])


def test_trades_compares_both_heads_in_the_first_task() -> None:
    model, batch = net().eval(), labelled(classes=2)
    worst = batch._replace(attacked=(batch.x + 0.1).clamp(max=1.0))
    plain, trades = (first_task_terms(model, given, 6.0)[0] for given in (batch, worst))
    for head in ("main", "aux"):
        gap = consistency(model(batch.x, 1, head), model(worst.attacked, 1, head)).mean()
        torch.testing.assert_close(trades[head], plain[head] + 6.0 * gap)


def test_a_step_of_no_images_is_none() -> None:
    with pytest.raises(ValueError, match="no image"):
        batch_composition(3, 1)


@given(st.integers(4, 600), st.integers(1, 30), st.integers(0, 64))
def test_composition(batch_size, old_tasks, sub_batch) -> None:
    found = batch_composition(batch_size, old_tasks, sub_batch)
    assert found.sub_batch == (sub_batch or batch_size // 4)
    assert min(found.new, found.old) >= 1
    assert found.new == max(1, math.floor(found.sub_batch / (1 + old_tasks)))
    if found.sub_batch > old_tasks:
        assert found.weight_new + found.weight_old <= 1 + 1e-12


def test_frozen_copy_answers_the_same_after_steps() -> None:
    model = net()
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    before = teacher(labelled().x, 1)
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        random_term(model, labelled(), 2, Weights())[0].backward()
        optimiser.step()
    assert torch.equal(teacher(labelled().x, 1), before)
