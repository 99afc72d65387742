"""Projections and the parametrisation, against obvious references."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tenfold_bip import (
    bake_masks,
    check_no_empty_layer,
    create_model,
    expected_iou,
    fix_masks,
    freeze_masks,
    get_masks,
    keep_ratio,
    kept_per_layer,
    mask_iou,
    prune_parametrize,
    set_keep,
    set_masks,
    sparsity,
    split_parameters,
)
from tenfold_bip.masking import masked_layers, pack_mask, prunable_weights, reaches_output, unpack_mask
from tenfold_bip.projections import (
    SAMPLE,
    Projection,
    _sampled_mask,
    drop_count,
    keep_count,
    project_channel,
    project_filter,
    project_global,
    project_n_m,
    top_mask,
)

KEEPS = st.floats(0.001, 1.0)


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))


# -- projections ------------------------------------------------------------------------------------------------------


def test_keep_is_what_remains() -> None:
    mask = project_global([torch.rand(1000)], 0.1)[0]
    assert int(mask.sum()) == 100


def test_truncation_of_the_double_product() -> None:
    assert drop_count(0.9, 10) == 0  # 1 - 0.9 is a little less than 0.1
    assert drop_count(0.7, 10) == 3
    assert keep_count(0.1, 257) == 26
    assert drop_count(1.0, 257) == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.data())
def test_exact_count_whatever_the_ties(values: list[int], data) -> None:
    importance = torch.tensor(values, dtype=torch.float32)
    kept = data.draw(st.integers(0, len(values)))
    mask = top_mask(importance, kept)
    assert int(mask.sum()) == kept
    if 0 < kept < len(values):  # nothing dropped is larger than anything kept
        assert importance[mask == 0].max() <= importance[mask == 1].min()


@pytest.mark.parametrize("order", ["drawn", "layers of other sizes", "ascending", "tied", "constant"])
@pytest.mark.parametrize("keep", [0.0, 1e-4, 0.05, 0.5, 0.97, 1.0])
def test_sampled_thresholds_select_as_a_whole_selection_does(order: str, keep: float) -> None:
    values = torch.rand(SAMPLE * 16 + 7, generator=torch.Generator().manual_seed(0))
    if order == "layers of other sizes":
        values[SAMPLE * 2 : SAMPLE * 9] *= 1e-3
    elif order == "ascending":
        values = values.sort().values
    elif order == "tied":
        values = (8 * values).floor()
    elif order == "constant":
        values = torch.ones_like(values)
    kept = int(keep * len(values))
    mask = top_mask(values, kept)
    assert int(mask.sum()) == kept
    if 0 < kept < len(values):
        assert values[mask == 0].max() <= values[mask == 1].min()
    if order != "constant" and 0 < kept < len(values) / 2:
        assert _sampled_mask(values, kept) is not None


@settings(deadline=None, max_examples=40)
@given(KEEPS, st.integers(0, 2**16))
def test_global_projection_against_sorting(keep: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(shape, generator=generator) for shape in ((5, 3), (7,), (2, 3, 4))]
    flat = sorted(((float(v), i) for i, v in enumerate(torch.cat([p.flatten() for p in parts]))), reverse=True)
    expected = torch.zeros(len(flat), dtype=torch.uint8)
    for _, i in flat[: len(flat) - int((1 - keep) * len(flat))]:
        expected[i] = 1
    masks = project_global(parts, keep)
    assert torch.equal(torch.cat([m.flatten() for m in masks]), expected)
    assert [m.shape for m in masks] == [p.shape for p in parts]


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_filters_and_channels_against_loops(p: float) -> None:
    scores = torch.randn(7, 5, 3, 3, dtype=torch.float64)
    filters = sorted(range(7), key=lambda o: float((scores[o].abs() ** p).sum()))
    channels = sorted(range(5), key=lambda c: float((scores[:, c].abs() ** p).sum()))
    by_filter, by_channel = project_filter(scores.abs(), 0.4, p), project_channel(scores.abs(), 0.4, p)
    for rank, o in enumerate(filters):
        assert (by_filter[o] == int(rank >= int(0.6 * 7))).all()
    for rank, c in enumerate(channels):
        assert (by_channel[:, c] == int(rank >= int(0.6 * 5))).all()


def test_the_only_channel_is_never_removed() -> None:
    assert project_channel(torch.rand(6, 1, 3, 3), 0.01).all()


def test_n_of_m_against_loops() -> None:
    scores = torch.rand(3, 8, 2, 2)
    mask = project_n_m(scores, 2, 4)
    for o, i, y, x in ((o, i, y, x) for o in range(3) for i in (0, 4) for y in range(2) for x in range(2)):
        group = scores[o, i : i + 4, y, x]
        assert set(mask[o, i : i + 4, y, x].nonzero().flatten().tolist()) == set(group.topk(2).indices.tolist())
    assert project_n_m(torch.rand(4, 3, 3, 3), 2, 4).all()  # three inputs stay dense


def test_minimum_per_layer() -> None:
    importances = [torch.rand(100) + 10.0, torch.rand(20), torch.rand(2)]
    masks = project_global(importances, 0.5, 5)
    assert sum(int(m.sum()) for m in masks) == keep_count(0.5, 122)
    assert [int(m.sum()) for m in masks[1:]] == [5, 2]
    assert torch.equal(masks[1], top_mask(importances[1], 5))
    with pytest.raises(ValueError, match="min_keep=50"):
        project_global(importances, 0.5, 50)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5, float("nan")])
def test_keep_outside_its_range(keep: float) -> None:
    with pytest.raises(ValueError, match="fraction of weights that remains"):
        Projection(keep=keep)


def test_refused_structures() -> None:
    with pytest.raises(ValueError, match="Unknown structure 'filters'"):
        Projection("filters")
    with pytest.raises(ValueError, match="0 < n <= m"):
        Projection("4:2")
    with pytest.raises(ValueError, match="min_keep"):
        Projection("filter", min_keep=2)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_packing_round_trip(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.uint8)
    packed = pack_mask(mask)
    assert packed.numel() == -(-len(bits) // 8)
    assert torch.equal(unpack_mask(packed, (len(bits),)), mask)


# -- the parametrisation ----------------------------------------------------------------------------------------------


def test_one_backward_gives_both_gradients() -> None:
    torch.manual_seed(0)
    model = prune_parametrize(nn.Linear(6, 4).double(), 0.5, scores_init="random")
    (layer,) = masked_layers(model)
    x = torch.randn(3, 6, dtype=torch.float64)
    z = (layer.theta * layer.masking.mask).detach().requires_grad_()
    loss = (x @ z.T + model.bias).square().sum()
    (g,) = torch.autograd.grad(loss, z)
    model(x).square().sum().backward()
    torch.testing.assert_close(layer.theta.grad, layer.masking.mask * g)
    torch.testing.assert_close(layer.masking.scores.grad, layer.masking.scores.sign() * layer.theta * g)
    pruned = layer.masking.mask == 0
    assert (layer.masking.scores.grad[pruned] != 0).all()  # straight-through is dense
    assert (layer.theta.grad[pruned] == 0).all()
    assert (layer.masking.scores < 0).any()


@pytest.mark.parametrize("structure", ["global", "layer", "filter", "channel", "2:4"])
def test_every_structure_on_a_foreign_module(structure: str) -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    prune_parametrize(model, 0.5, structure)
    assert set(get_masks(model)) == ({"0.weight"} if structure in ("filter", "channel") else {"0.weight", "3.weight"})
    assert keep_ratio(model) == pytest.approx(0.5)
    assert model(torch.randn(2, 4, 4)).shape == (2, 4)


def test_attention_projections_are_masked() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    x = torch.randn(2, 3, 8)
    prune_parametrize(model, 0.5)
    assert {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"} <= set(get_masks(model))
    model(x).sum().backward()
    assert all(layer.masking.scores.grad is not None for layer in masked_layers(model))
    model.eval()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(bake_masks(model)(x), expected)


def test_scores_are_cloned_unless_tied() -> None:
    for layer in masked_layers(prune_parametrize(small_net(), 0.5)):
        assert layer.masking.scores.data_ptr() != layer.theta.data_ptr()
        assert torch.equal(layer.masking.scores, layer.theta)
    tied = prune_parametrize(small_net(), 0.5, tie_scores=True)
    copied = copy.deepcopy(tied)  # copying separates memory; the next projection shares it again
    set_masks(copied)
    for layer in masked_layers(tied) + masked_layers(copied):
        assert layer.masking.scores.data_ptr() == layer.theta.data_ptr()


def test_masks_change_only_when_set() -> None:
    model = prune_parametrize(small_net(), 0.3)
    before = get_masks(model)
    with torch.no_grad():
        for layer in masked_layers(model):
            layer.masking.scores.uniform_()
    assert mask_iou(get_masks(model), before) == 1.0
    set_masks(model)
    assert mask_iou(get_masks(model), before) < 1.0
    assert sparsity(model) == pytest.approx(0.7, abs=0.01)


def test_baking_a_copy_leaves_the_original() -> None:
    model = prune_parametrize(small_net(), 0.3).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    baked = bake_masks(copy.deepcopy(model))
    torch.testing.assert_close(baked(x), expected)
    torch.testing.assert_close(model(x), expected)
    assert list(baked.state_dict()) == list(small_net().state_dict())
    assert type(baked[0]) is nn.Conv2d


def test_fixed_masks_keep_theta() -> None:
    model = small_net()
    theta = model[0].weight.detach().clone()
    optimised = model[0].weight
    masks = get_masks(prune_parametrize(copy.deepcopy(model), 0.4))
    fix_masks(model, masks)
    assert torch.equal(model[0].weight, theta * masks["0.weight"])
    assert model[0].parametrizations["weight"].original is optimised  # an optimiser made before still holds it
    assert torch.equal(masked_layers(model)[0].theta, theta)
    with pytest.raises(ValueError, match="fixed"):
        set_masks(model)
    with pytest.raises(ValueError, match="no such prunable weight"):
        fix_masks(model, {"9.weight": masks["0.weight"]})
    with pytest.raises(ValueError, match="has shape"):
        fix_masks(model, {"0.weight": masks["0.weight"][:2]})


def test_freezing_drops_the_scores_only() -> None:
    model = prune_parametrize(small_net(), 0.4)
    masks = get_masks(model)
    freeze_masks(model)
    assert mask_iou(get_masks(model), masks) == 1.0
    assert split_parameters(model)[1] == []


def test_state_dict_round_trip() -> None:
    model, other = (prune_parametrize(small_net(), 0.4) for _ in range(2))
    other.load_state_dict(model.state_dict())
    assert mask_iou(get_masks(model), get_masks(other)) == 1.0


def test_changing_the_ratio() -> None:
    model = prune_parametrize(create_model("digits_cnn"), 0.5)
    set_keep(model, 0.1)
    assert sum(k for k, _ in kept_per_layer(model).values()) == keep_count(0.1, 14288)
    everything = sum(p.numel() for p in create_model("digits_cnn").parameters())
    pruned = drop_count(0.1, 14288)
    assert keep_ratio(model, "all") == pytest.approx(1 - pruned / everything)


def test_the_ratio_of_a_mask_gives_its_count() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in torch.randint(2, 3000, (200,), generator=generator).tolist():
        kept = int(torch.randint(1, n + 1, (), generator=generator))
        ratio = keep_ratio(fix_masks(nn.Linear(n, 1), {"weight": torch.arange(n)[None] < kept}))
        assert keep_count(ratio, n) == kept
        assert ratio == pytest.approx(kept / n, abs=0.51 / n)


def test_overlap() -> None:
    a, b = {"w": torch.tensor([1, 1, 0, 0])}, {"w": torch.tensor([1, 0, 1, 0])}
    assert mask_iou(a, b) == pytest.approx(1 / 3)
    assert expected_iou(1.0) == 1.0
    masks = [{"w": top_mask(torch.rand(200_000), 60_000)} for _ in range(2)]
    assert mask_iou(*masks) == pytest.approx(expected_iou(0.3), abs=0.01)
    few = {"w": top_mask(torch.rand(200_000), 4_000)}
    assert mask_iou(masks[0], few) == pytest.approx(expected_iou(0.3, 0.02), abs=0.002)
    with pytest.raises(ValueError, match="different layers"):
        mask_iou(a, {"v": b["w"]})


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no prunable layer"):
        prune_parametrize(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), 0.5)
    with pytest.raises(ValueError, match="needs at least one convolution"):
        prune_parametrize(nn.Linear(4, 4), 0.5, "filter")
    with pytest.raises(ValueError, match="a layer would be empty"):
        prune_parametrize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0.03)
    with pytest.raises(ValueError, match="masks or other parametrisations already"):
        prune_parametrize(prune_parametrize(small_net(), 0.5), 0.5)
    with pytest.raises(ValueError, match="Tied"):
        prune_parametrize(small_net(), 0.5, tie_scores=True, scores_init="random")
    with pytest.raises(ValueError, match="no masked layer"):
        set_masks(small_net())


def test_empty_layers_are_named() -> None:
    model = small_net()
    with torch.no_grad():
        model[4].weight.mul_(1e-6)
    prune_parametrize(model, 0.3)
    with pytest.raises(ValueError, match=r"no weight in 4\.weight"):
        check_no_empty_layer(model)
    check_no_empty_layer(prune_parametrize(bake_masks(model), 0.3, min_keep=3))


@pytest.mark.parametrize(
    ("arch", "shape", "layer", "reaches"),
    [
        ("resnet20s", (3, 32, 32), "conv1", False),
        ("resnet20s", (3, 32, 32), "layer2.1.conv1", True),
        ("ResNet18", (3, 64, 64), "layer3.0.conv2", True),
        ("vgg16", (3, 32, 32), "features.17", False),
        ("wrn_28_1", (3, 32, 32), "block2.layer.1.conv1", True),
    ],
)
def test_whether_anything_reaches_the_output(arch: str, shape: tuple, layer: str, reaches: bool) -> None:
    """An empty layer cuts a network apart only where nothing goes around it: then all its outputs are the same."""
    torch.manual_seed(0)
    model = create_model(arch)
    assert reaches_output(model, shape)
    masks = {name: torch.ones_like(getattr(m, a), dtype=torch.uint8) for name, m, a in prunable_weights(model)}
    masks[f"{layer}.weight"].zero_()
    fix_masks(model, masks).eval()
    assert reaches_output(model, shape) is reaches
    with torch.no_grad():
        first, second = model(torch.randn(2, *shape))
    assert torch.allclose(first, second, rtol=0, atol=1e-7) is not reaches
