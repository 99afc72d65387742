"""Masks: how they are made, kept, read and refused, each against a slow and obvious reference."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from tenfold_shared.errors import UserError
from tenfold_tost import (
    MaskKeeper,
    apply_masks,
    check_flow,
    check_masks,
    create_model,
    density,
    erk_masks,
    grasp_scores,
    hamming_distance,
    keep_above,
    layerwise_cut,
    load_masks,
    magnitude_cut,
    magnitude_scores,
    masks_from_zeros,
    prunable_weights,
    random_scores,
    relaxed_zero_filters,
    save_masks,
    snip_scores,
    synflow_masks,
    synflow_scores,
    taylor_scores,
    ticket_rounds,
)
from tenfold_tost.maskfiles import mask_report


def tiny() -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers).double()


def data(batches: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (5,))) for _ in range(batches)]


# -- scores ---------------------------------------------------------------------------------------------------------------


def loss_with(model: nn.Module, name: str, weight: torch.Tensor, batch) -> float:
    with torch.no_grad():
        return float(cross_entropy(torch.func.functional_call(model, {name: weight}, (batch[0],)), batch[1]))


def test_snip_and_taylor_are_the_change_of_the_loss_along_each_weight() -> None:
    """|dL/dM| at M = 1 by finite differences, entry by entry; Taylor is the same without normalisation."""
    model, batches, h = tiny(), data(), 1e-5
    slopes = {}
    for name, weight in prunable_weights(model, linear=True).items():
        slope = torch.zeros(weight.numel(), dtype=torch.float64)
        for i in range(weight.numel()):
            for sign in (1, -1):
                mask = torch.ones(weight.numel(), dtype=torch.float64)
                mask[i] += sign * h
                moved = weight.detach() * mask.view(weight.shape)
                slope[i] += sign * sum(loss_with(model, name, moved, batch) for batch in batches) / (2 * h)
        slopes[name] = slope.abs().view(weight.shape)
    total = sum(slope.sum() for slope in slopes.values())
    snip, taylor = snip_scores(model, batches), taylor_scores(model, batches)
    for name, slope in slopes.items():
        torch.testing.assert_close(taylor[name], slope, atol=1e-8, rtol=1e-5)
        torch.testing.assert_close(snip[name], slope / total, atol=1e-8, rtol=1e-5)


def test_grasp_is_theta_times_hessian_times_gradient() -> None:
    model, batches = tiny(), data()
    weights = prunable_weights(model, linear=True)

    def gradient(create_graph: bool) -> torch.Tensor:
        loss = sum(cross_entropy(model(x) / 200.0, y) for x, y in batches)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights.values(), create_graph=create_graph)])

    g = gradient(create_graph=True)
    rows = [torch.autograd.grad(entry, weights.values(), retain_graph=True) for entry in g]
    hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    theta = torch.cat([weight.detach().flatten() for weight in weights.values()])
    expected = theta * (hessian @ g.detach())
    ours = torch.cat([score.flatten() for score in grasp_scores(model, batches).values()])
    torch.testing.assert_close(ours, expected / (expected.sum().abs() + 1e-10))


def test_synflow_is_conserved_between_layers() -> None:
    """The scores of every layer sum to the output's flow, the same for all (without biases)."""
    model = create_model("digits_net").eval()
    nn.init.zeros_(model[-1].bias)
    sums = [float(score.sum()) for score in synflow_scores(model, (1, 8, 8)).values()]
    assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-6)


def test_scoring_changes_nothing() -> None:
    model = create_model("digits_net").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = torch.randn(8, 1, 8, 8), torch.arange(8)
    for score in (snip_scores, taylor_scores, grasp_scores):
        score(model, [batch])
    synflow_masks(model.eval(), 0.5, (1, 8, 8), iterations=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- cuts -----------------------------------------------------------------------------------------------------------------


@given(n=st.integers(2, 60), keep=st.floats(0.02, 1.0), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_keep_above_counts(n: int, keep: float, seed: int) -> None:
    """Without ties exactly int((1 - density) N) go, and what remains scores above what went."""
    scores = {"a": torch.rand(n, generator=torch.Generator().manual_seed(seed)), "b": torch.rand(7) + 2}
    masks = keep_above(scores, keep)
    flat, kept = torch.cat(list(scores.values())), torch.cat(list(masks.values()))
    assert int((~kept).sum()) == int((1 - keep) * len(flat))
    if bool(kept.all()):
        return
    assert flat[kept].min() > flat[~kept].max()


def test_ties_at_the_threshold_go_and_are_told() -> None:
    with pytest.warns(UserWarning, match="tie"):
        masks = keep_above({"a": torch.tensor([0.0, 0.0, 0.0, 1.0])}, 0.75)
    assert masks["a"].tolist() == [False, False, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bool(keep_above({"a": torch.zeros(3)}, 1.0)["a"].all())


@given(seed=st.integers(0, 1000), percent=st.floats(0.05, 0.9))
@settings(max_examples=30, deadline=None)
def test_a_ticket_round_removes_one_more_than_its_fraction(seed: int, percent: float) -> None:
    draws = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(9, 5, generator=draws), "b": torch.randn(30, generator=draws)}
    weights["a"][0] = 0.0
    alive = 70
    masks, threshold = magnitude_cut(weights, percent)
    assert alive - sum(int(mask.sum()) for mask in masks.values()) == int(alive * percent) + 1
    assert all(bool((weights[name].abs()[mask] > threshold).all()) for name, mask in masks.items())


def test_layerwise_cut_keeps_negative_weights() -> None:
    """Each tensor loses its smallest magnitudes, whatever the sign, measured by numpy's percentile."""
    weight = torch.tensor([-5.0, 0.1, -0.2, 3.0, 0.0, -0.05])
    mask = layerwise_cut({"w": weight}, 0.4)["w"]
    alive = weight[weight != 0].abs().numpy()
    assert mask.tolist() == [abs(w) >= np.percentile(alive, 40) and w != 0 for w in weight.tolist()]


def test_ticket_rounds_come_down_to_the_density() -> None:
    for wanted in (1.0, 0.9, 0.107, 0.0281):
        left = math.prod(1 - percent for percent in ticket_rounds(wanted))
        assert left == pytest.approx(wanted)
    assert ticket_rounds(0.8**3) == pytest.approx([0.2, 0.2, 0.2])


@pytest.mark.parametrize("wanted", [0.02, 0.1, 0.6])
def test_erk_densities(wanted: float) -> None:
    """The whole has the density, small layers keep more, no layer is empty."""
    masks = erk_masks(create_model("oresnet20"), wanted, generator=torch.Generator().manual_seed(0))
    assert density(masks) == pytest.approx(wanted, rel=0.01)
    shares = {name: density({name: mask}) for name, mask in masks.items()}
    assert shares["conv1.weight"] >= shares["layer2.1.conv1.weight"] >= shares["layer3.1.conv1.weight"]
    assert all(bool(mask.any()) for mask in masks.values())


def test_random_masks_are_seeded() -> None:
    model = create_model("digits_net")
    first, second = (random_scores(model, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.1])
def test_densities_are_checked(wrong: float) -> None:
    model = create_model("digits_net")
    for make in (lambda: keep_above(magnitude_scores(model), wrong), lambda: erk_masks(model, wrong)):
        with pytest.raises(ValueError, match="density"):
            make()


# -- training under a mask --------------------------------------------------------------------------------------------------


def test_pruned_weights_stay_exactly_zero() -> None:
    """Momentum, weight decay and label noise: the support is the mask's after every step."""
    torch.manual_seed(0)
    model = create_model("digits_net")
    masks = erk_masks(model, 0.1)
    apply_masks(model, masks)
    keeper = MaskKeeper(model, masks)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-2)
    for _ in range(4):
        loss = cross_entropy(model(torch.randn(16, 1, 8, 8)), torch.randint(0, 10, (16,)))
        optimiser.zero_grad()
        loss.backward()
        keeper.mask_gradients()
        optimiser.step()
        before = [weight.detach().clone() for weight in keeper.weights]
        keeper.mask_weights()
        assert all(torch.equal(b, w) for b, w in zip(before, keeper.weights, strict=True))  # only a guard
        assert all(torch.equal(mask, masks[name]) for name, mask in masks_from_zeros(model).items())


def test_weights_without_a_gradient_are_passed_over() -> None:
    """A frozen layer, or a step without any gradient; the others are masked all the same."""
    model = create_model("digits_net")
    masks = erk_masks(model, 0.2)
    apply_masks(model, masks)
    keeper = MaskKeeper(model, masks)
    keeper.mask_gradients()
    model[0].weight.requires_grad_(False)
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    keeper.mask_gradients()
    assert not bool((model[3].weight.grad * ~masks["3.weight"]).any())


def test_masks_that_do_not_fit_are_refused() -> None:
    model = create_model("digits_net")
    good = erk_masks(model, 0.2)
    with pytest.raises(ValueError, match="no weight strange"):
        check_masks(model, {**good, "strange": torch.ones(2)})
    with pytest.raises(ValueError, match=r"0\.weight has shape"):
        check_masks(model, {**good, "0.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="no weight at all"):
        check_masks(model, {})
    with pytest.raises(ValueError, match="no convolution"):
        prunable_weights(nn.Linear(2, 2))


def test_masks_that_let_nothing_through_are_refused() -> None:
    """An empty layer, or two whose weights do not meet; where a shortcut goes around it, the layer is only named."""
    model, residual = create_model("digits_net"), create_model("oresnet104")
    good, around = erk_masks(model, 0.2), erk_masks(residual, 0.1)
    empty = {**good, "3.weight": torch.zeros_like(good["3.weight"])}
    with pytest.warns(UserWarning, match=r"no weight in 3\.weight"):
        check_masks(model, empty)
    with pytest.raises(ValueError, match=r"no weight in 3\.weight, and nothing of the input"):
        check_flow(model, empty, (1, 8, 8))
    apart = {name: mask.clone() for name, mask in good.items()}
    apart["0.weight"][8:], apart["3.weight"][:, :8] = False, False
    with pytest.raises(ValueError, match="is such that nothing of the input"):
        check_flow(model, apart, (1, 8, 8))
    check_flow(model, good, (1, 8, 8))
    name = "layer1.3.conv2.weight"
    around[name] = torch.zeros_like(around[name])
    check_flow(residual, around, (3, 32, 32))
    with pytest.warns(UserWarning, match=r"no weight in layer1\.3\.conv2\.weight"):
        apply_masks(residual, around)
    with pytest.raises(ValueError, match=r"no weight in conv1\.weight"):
        check_flow(residual, {**around, "conv1.weight": torch.zeros_like(around["conv1.weight"])}, (3, 32, 32))


def test_hamming_distance_and_zero_filters() -> None:
    a, b = {"w": torch.tensor([1, 1, 0, 0])}, {"w": torch.tensor([1, 0, 1, 0])}
    assert hamming_distance(a, b) == 0.5
    with pytest.raises(ValueError, match="v, w"):
        hamming_distance(a, {"v": b["w"]})
    weight = torch.zeros(2, 5, 2, 1)
    weight[0, 0, 0] = 1.0  # nine of ten zeros are not more than 90 %
    assert relaxed_zero_filters([weight]) == (2, 1, 19)


# -- files ------------------------------------------------------------------------------------------------------------------


def test_masks_from_every_layout(tmp_path: Path) -> None:
    model = create_model("digits_net")
    masks = erk_masks(model, 0.3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = {name: tensor * masks[name] if name in masks else tensor for name, tensor in state.items()}
    save_masks(tmp_path / "own.safetensors", masks)
    np.savez(tmp_path / "mask.npz", **{name: mask.numpy() for name, mask in masks.items()})
    torch.save({f"{name}_mask": mask.float() for name, mask in masks.items()}, tmp_path / "init-mask.pt")
    torch.save({"state_dict": {f"module.{n}": t for n, t in pruned.items()}, "epoch": 0}, tmp_path / "pruned.pth.tar")
    pairs = {f"{n}_orig": state[n] for n in masks} | {f"{n}_mask": m.float() for n, m in masks.items()}
    torch.save(pairs, tmp_path / "torch-prune.pt")
    for file in tmp_path.iterdir():
        found = load_masks(file, model)
        assert all(torch.equal(found[name], mask) for name, mask in masks.items()), file
    scores = {name.replace(".weight", ".popup_scores"): torch.randn(mask.shape) for name, mask in masks.items()}
    torch.save(scores, tmp_path / "scores.pt")
    assert density(load_masks(tmp_path / "scores.pt", model, keep=0.25)) == pytest.approx(0.25, abs=1e-3)
    assert any("convolution" in line for line in mask_report(model, masks))


def test_bad_mask_files_are_refused(tmp_path: Path) -> None:
    model = create_model("digits_net")
    np.savez(tmp_path / "other.npz", **{"0.weight_mask": np.ones((2, 2))})
    np.savez(tmp_path / "none.npz", x=np.ones(3))
    np.savez(tmp_path / "words.npz", x=np.array(["a", "b"]))
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.ones(3))
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    torch.save({"0.popup_scores": torch.ones(16, 1, 3, 3)}, tmp_path / "scores.pt")
    for file, words in (("other.npz", r"0\.weight"), ("none.npz", "no mask"), ("broken.npz", "broken"), ("words.npz", "words"), ("array.npz", "array"),
                        ("dense.pt", "masks nothing"), ("scores.pt", "density"), ("absent.pt", "absent")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            load_masks(tmp_path / file, model)


def test_layers_without_a_mask_are_named(tmp_path: Path) -> None:
    """A mask of a shallower network fits a deeper one of the family, of which it leaves half dense."""
    save_masks(tmp_path / "mask.safetensors", erk_masks(create_model("oresnet20"), 0.2))
    with pytest.warns(UserWarning, match=r"no mask for 12 layers of ThinResNet.*layer1\.3\.conv1\.weight"):
        load_masks(tmp_path / "mask.safetensors", create_model("oresnet32"))
