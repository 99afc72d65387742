"""Masks, their movement, averages, schedules: by loops, and under accumulation, autocast, resume, two processes."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from slak_processes import batch, network, train_as_rank
from torch import Tensor, nn

from tenfold_slak.ema import SparseEMA
from tenfold_slak.masks import (
    bare_name,
    erk_densities,
    initial_masks,
    maskable_parameters,
    snip_densities,
    snip_keep,
    snip_scores,
    without_dense,
)  # fmt: skip
from tenfold_slak.models.slak import SLaK
from tenfold_slak.optim import cosine_schedule, layer_id, parameter_groups, stage_id
from tenfold_slak.sparse import CosinePruneRate, DynamicSparseTraining, grow_by_score, grow_random, prune


def training(
    model: nn.Module, growth: str = "random", frequency: int = 2, optimizer=None, **more
) -> DynamicSparseTraining:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    masks = initial_masks(model, 0.5, "uniform")
    return DynamicSparseTraining(model, masks, optimizer, CosinePruneRate(0.4, 40), frequency, growth, **more)


def nonzero_fits(state: dict[str, Tensor], sparse: DynamicSparseTraining) -> None:
    for name, mask in sparse.masks.items():
        assert not state[name][~mask].any(), name


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 60), density=st.floats(0, 1), rate=st.floats(0, 1))
def test_prune_counts(size: int, density: float, rate: float) -> None:
    generator = torch.Generator().manual_seed(size)
    mask = torch.rand(size, generator=generator) < density
    weight = torch.randn(size, generator=generator) * mask
    pruned = prune(weight, mask, rate)
    active = int(mask.sum())
    assert int(pruned.sum()) == active - math.ceil(rate * active)
    assert not (pruned & ~mask).any()
    if pruned.any() and (mask & ~pruned).any():
        assert weight[pruned].abs().min() >= weight[mask & ~pruned].abs().max()


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 60), data=st.data())
def test_grow_by_score_counts(size: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(size)
    mask = torch.rand(size, generator=generator) < 0.5
    inactive = int((~mask).sum())
    count = data.draw(st.integers(0, inactive))
    score = torch.randint(0, 3, (size,), generator=generator).float()  # many ties, many zeros
    if size > 3:
        score[0], score[1] = float("nan"), float("inf")
    grown = grow_by_score(mask, torch.tensor(count), score)
    assert int(grown.sum()) == int(mask.sum()) + count
    assert (grown | ~mask).all()


def test_grow_random_count_in_expectation() -> None:
    mask = torch.rand(200, 200) < 0.5
    grown = grow_random(mask, torch.tensor(3000), torch.rand(200, 200))
    assert int(grown.sum() - mask.sum()) == pytest.approx(3000, rel=0.1)
    assert (grown | ~mask).all()


def test_prune_rate_follows_the_closed_form() -> None:
    rate = CosinePruneRate(0.5, 100)
    for t in range(1, 101):
        closed = 0.005 + 0.495 * (1 + math.cos(math.pi * t / 100)) / 2
        assert rate.advance() == pytest.approx(closed, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 20), min_size=2, max_size=4), min_size=1, max_size=6),
    density=st.floats(0.05, 1),
)
def test_erk_keeps_the_budget(shapes: list[list[int]], density: float) -> None:
    densities = erk_densities(shapes, density)
    sizes = [math.prod(shape) for shape in shapes]
    assert all(0 <= d <= 1 for d in densities)
    if any(d < 1 for d in densities) and min(densities) > 0:
        kept = sum(d * n for d, n in zip(densities, sizes, strict=True))
        assert kept == pytest.approx(density * sum(sizes))


def test_snip_by_definition() -> None:
    model, (x, y) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    scores = snip_scores(model, x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    F.cross_entropy(model.train()(x), y).backward()
    everything = []
    for name, weight in maskable_parameters(model).items():
        expected = (weight * weight.grad).abs().detach()
        torch.testing.assert_close(scores[name], expected)
        everything.append(expected.flatten())
    flat = torch.cat(everything)
    threshold = flat.sort(descending=True).values[int(flat.numel() * 0.3) - 1]
    for name, kept in snip_keep(scores, 0.3).items():
        assert torch.equal(kept, scores[name] > threshold)
        assert snip_densities(scores, 0.3)[name] == pytest.approx(float(kept.float().mean()))


@pytest.mark.parametrize("init", ["snip", "snip_exact", "erk", "uniform"])
def test_initial_masks_have_the_density(init: str) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(32, 200), nn.ReLU(), nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 3)
    )
    masks = initial_masks(model, 0.6, init, batch())
    kept = sum(float(m.sum()) for m in masks.values())
    kept += sum(p.numel() for n, p in maskable_parameters(model).items() if n not in masks)
    assert kept / sum(p.numel() for p in maskable_parameters(model).values()) == pytest.approx(0.4, abs=0.03)


def test_dense_layers_lose_their_masks() -> None:
    masks = {"a": torch.ones(100, dtype=torch.bool), "b": torch.arange(100) < 98}
    assert list(without_dense(masks)) == ["b"]


def test_only_the_rectangles() -> None:
    model = SLaK(depths=(1, 1, 1, 1), dims=(4, 4, 4, 4), kernel_sizes=(7, 7, 7, 7), num_classes=2, small_kernel=3)
    names = maskable_parameters(model, only_large_kernels=True)
    assert len(names) == 8
    assert all(".LoRA" in name for name in names)
    with pytest.raises(ValueError, match="LoRA1"):
        maskable_parameters(network(), only_large_kernels=True)


@pytest.mark.parametrize("growth", ["random", "random_exact", "gradient", "momentum"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_sparsity_is_kept_while_masks_move(growth: str, kind: str) -> None:
    model = network()
    optimizer = (
        torch.optim.AdamW(model.parameters(), 1e-2)
        if kind == "adamw"
        else torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    )
    sparse = training(model, growth, optimizer=optimizer)
    before = {name: mask.clone() for name, mask in sparse.masks.items()}
    for step in range(1, 7):
        F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()
        assert sparse.step() == (step % 2 == 0)
        optimizer.zero_grad()
        nonzero_fits(model.state_dict(), sparse)
        if kind == "sgd":
            for name, weight in sparse.parameters.items():
                assert not optimizer.state[weight]["momentum_buffer"][~sparse.masks[name]].any()
    for name, mask in sparse.masks.items():
        # SGD's momentum is masked, so what growth by momentum finds outside the mask is what was just pruned.
        if (kind, growth) != ("sgd", "momentum"):
            assert not torch.equal(mask, before[name])
        if growth != "random":
            assert int(mask.sum()) == int(before[name].sum())


def test_adam_moments_of_inactive_weights_keep_evolving() -> None:
    model = network()
    sparse = training(model, frequency=0)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    sparse.optimizer.step()
    sparse.step()
    weight, mask = model[4].weight, sparse.masks["4.weight"]
    assert sparse.optimizer.state[weight]["exp_avg"][~mask].any()


def test_any_seed_draws() -> None:
    """A date, or a derived seed of 63 bits, is a seed like any other."""
    masks = []
    for seed in (20_261_231_235_959, 2**62 + 1, -3):
        model = nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(model.parameters())
        masks_of = initial_masks(model, 0.5, "uniform")
        sparse = DynamicSparseTraining(model, masks_of, optimizer, CosinePruneRate(0.5, 9), 1, seed=seed)
        assert sparse.step()
        masks.append(sparse.masks["weight"])
    assert not torch.equal(masks[0], masks[1])


def test_regrown_weights_start_at_zero() -> None:
    model = network()
    sparse = training(model, "gradient", frequency=1)
    before = {name: mask.clone() for name, mask in sparse.masks.items()}
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    sparse.optimizer.step()
    sparse.step()
    for name, weight in sparse.parameters.items():
        born = sparse.masks[name] & ~before[name]
        assert born.any()
        assert not weight[born].any()


def test_accumulation_counts_optimiser_steps() -> None:
    """Two micro-batches a step give the same run as whole batches."""
    results = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 3)).double()
        sparse = training(model, "gradient")
        for step in range(4):
            x, y = batch(step)
            for xs, ys in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(xs), ys) / parts).backward()
            sparse.optimizer.step()
            sparse.step()
            sparse.optimizer.zero_grad()
        assert sparse.steps == sparse.prune_rate.steps == 4
        results.append((sparse.masks, model.state_dict()))
    (masks, state), (masks2, state2) = results
    assert all(torch.equal(mask, masks2[name]) for name, mask in masks.items())
    for name, value in state.items():
        torch.testing.assert_close(value, state2[name], rtol=1e-9, atol=1e-9)


def test_sparse_under_autocast_and_scaler_with_average() -> None:
    model = network()
    sparse = training(model, frequency=1)
    ema = SparseEMA(model, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        x, y = batch(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(sparse.optimizer)
        scaler.update()
        sparse.step()
        sparse.optimizer.zero_grad()
        ema.update(model, sparse.masks)
    nonzero_fits(model.state_dict(), sparse)
    nonzero_fits(ema.state_dict(), sparse)


def test_average_by_definition() -> None:
    model = nn.Linear(4, 3)
    ema = SparseEMA(model, 0.75)
    mask = torch.rand(3, 4) < 0.6
    old = ema.module.weight.data
    old[0, 0], mask[0, 0], old[0, 1], mask[0, 1] = 0.0, True, 2.0, False  # one newly grown, one just pruned
    start, bias = old.clone(), ema.module.bias.clone()
    model.weight.data.normal_().mul_(mask)
    model.bias.data.normal_()
    ema.update(model, {"weight": mask})
    for i in range(3):
        for j in range(4):
            w, e = float(model.weight[i, j]), float(start[i, j])
            expected = 0.0 if not mask[i, j] else (w if e == 0 else 0.75 * e + 0.25 * w)
            assert float(ema.module.weight[i, j]) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(ema.module.bias, 0.75 * bias + 0.25 * model.bias)


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_resume_is_exact(growth: str, tmp_path: Path) -> None:
    def steps(model, sparse, numbers) -> None:
        for step in numbers:
            x, y = batch(step)
            F.cross_entropy(model(x), y).backward()
            sparse.optimizer.step()
            sparse.step()
            sparse.optimizer.zero_grad()

    torch.manual_seed(3)
    model = network()
    first = copy.deepcopy(model)
    sparse = training(model, growth)
    steps(model, sparse, range(9))

    cut = training(first, growth)
    steps(first, cut, range(4))  # an update has just grown weights that are exactly zero
    saved = {"model": first.state_dict(), "optimizer": cut.optimizer.state_dict(), "sparse": cut.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second = network()
    resumed = training(second, growth)
    second.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["sparse"])
    steps(second, resumed, range(4, 9))
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in sparse.masks.items())
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_share_rank_zeros_masks(tmp_path: Path) -> None:
    mp.spawn(train_as_rank, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert one["masks"].keys() == two["masks"].keys()
    assert all("module" not in name for name in one["masks"])
    for name, mask in one["masks"].items():
        assert torch.equal(mask, two["masks"][name])
        assert torch.equal(one["model"][name], two["model"][name])
        assert not one["model"][name][~mask].any()


def test_resume_from_weights_alone() -> None:
    model = network()
    sparse = training(model)
    found = initial_masks(model, 0.5, "resume")
    assert all(torch.equal(mask, found[name]) for name, mask in sparse.masks.items())


def test_names_without_wrappers() -> None:
    names = {
        "_orig_mod.module.stages.0.weight": "stages.0.weight",
        "module._orig_mod.module.head.weight": "head.weight",
        "stages.0._orig_mod.pwconv1.weight": "stages.0.pwconv1.weight",
        "submodule.weight": "submodule.weight",
        "body.module.weight": "body.module.weight",
        "my_orig_mod.weight": "my_orig_mod.weight",
        "module": "module",
    }
    assert {name: bare_name(name) for name in names} == names


def test_names_that_only_wrappers_tell_apart_are_refused() -> None:
    model = nn.Module()
    model.submodule, model.head = nn.Linear(3, 4), nn.Linear(4, 2)
    assert list(maskable_parameters(model)) == ["submodule.weight", "head.weight"]
    model.module = nn.ModuleDict({"head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"two parameters are called 'head\.weight'.* 'module\.head\.weight'"):
        initial_masks(model, 0.5, "uniform")
    with pytest.raises(ValueError, match="two parameters"):
        SparseEMA(nn.Linear(1, 1)).update(model)


def test_learning_rate_ends() -> None:
    values = cosine_schedule(4e-3, 1e-6, 10, 5, 2)
    assert len(values) == 50
    assert values[0] == 0
    assert values[9] == values[10] == 4e-3
    assert 1e-6 < values[-1] < 5e-5
    with pytest.raises(ValueError, match="warmup"):
        cosine_schedule(1.0, 0.0, 2, 3, 3)


def test_parameter_groups_hold_each_parameter_once() -> None:
    model = SLaK(depths=(1, 1, 4, 1), dims=(4, 4, 4, 4), kernel_sizes=(7, 7, 7, 7), num_classes=2, small_kernel=3)
    groups = parameter_groups(model, 1.0, 0.05, layer_decay=0.5)
    members = [p for group in groups for p in group["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    rate = {p: group["lr"] for group in groups for p in group["params"]}
    assert rate[model.head.weight] == 1
    assert rate[model.downsample_layers[0][0].weight] == 0.5**13
    assert rate[model.stages[2][3].gamma] == 0.5 ** (13 - 4)
    assert all(p.ndim > 1 or group["weight_decay"] == 0 for group in groups for p in group["params"])
    assert len(parameter_groups(model, 1.0)) == 2


def test_layer_decay_that_would_do_something_else_is_refused() -> None:
    """Other names would all be the head's, and layers beyond the last would learn faster than it."""
    deep = SLaK(depths=(1, 1, 27, 1), dims=(2, 2, 2, 2), kernel_sizes=(5, 5, 5, 5), num_classes=2)
    with pytest.raises(ValueError, match="num_layers"):
        parameter_groups(deep, 1.0, 0.0, 0.7, lambda name: layer_id(name, 6), 7)
    assert max(group["lr_scale"] for group in parameter_groups(deep, 1.0, layer_decay=0.7)) == 1.0
    with pytest.raises(ValueError, match="called as in SLaK"):
        parameter_groups(nn.Sequential(nn.Linear(2, 2)), 1.0, layer_decay=0.7)
    with pytest.raises(ValueError, match="above 0"):
        parameter_groups(deep, 1.0, layer_decay=-0.5)
    five = SLaK(depths=[1] * 5, dims=[2] * 5, kernel_sizes=[5] * 5, num_classes=2)
    assert len({group["lr_scale"] for group in parameter_groups(five, 1.0, layer_decay=0.7)}) == 6


def test_stage_ids() -> None:
    names = ["backbone.downsample_layers.3.1.weight", "stages.2.5.gamma", "norm3.weight"]
    assert [stage_id(name, 6) for name in names] == [0, 3, 7]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_refused_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        initial_masks(network(), sparsity, "uniform")


def test_refused_masks_and_options() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rate = CosinePruneRate(0.3, 10)
    with pytest.raises(ValueError, match="no such weight"):
        DynamicSparseTraining(model, {"9.weight": torch.ones(1, dtype=torch.bool)}, optimizer, rate)
    with pytest.raises(ValueError, match=r"\(12, 128\)"):
        DynamicSparseTraining(model, {"4.weight": torch.ones(12, 12, dtype=torch.bool)}, optimizer, rate)
    with pytest.raises(ValueError, match="unknown growth"):
        DynamicSparseTraining(model, {}, optimizer, rate, growth="lottery")
    with pytest.raises(ValueError, match="batch="):
        initial_masks(model, 0.5, "snip")
    with pytest.raises(ValueError, match="unknown mask"):
        initial_masks(model, 0.5, "magnitude")
    with pytest.raises(ValueError, match="prune rate"):
        CosinePruneRate(1.2, 10)
    sparse = DynamicSparseTraining(model, initial_masks(model, 0.5, "uniform"), optimizer, rate, 1, "gradient")
    with pytest.raises(ValueError, match="before zero_grad"):
        sparse.step()
    sparse = DynamicSparseTraining(model, initial_masks(model, 0.5, "uniform"), optimizer, rate, 1, "momentum")
    with pytest.raises(ValueError, match="momentum needs"):
        sparse.step()
