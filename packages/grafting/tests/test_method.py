"""The method: grafted activations, scores, the choice of neurons, the objectives, the architectures, attacks."""

import math

import numpy as np
import pytest
import torch
from nets import random_network
from torch import nn
from torch.nn.functional import cross_entropy

from tenfold_grafting.adversarial import certified_loss, grad_align, rs_loss
from tenfold_grafting.attacks import dlr, robust_mask
from tenfold_grafting.bounds import margin_spec
from tenfold_grafting.grafting import GraftedReLU, activation_shapes, graft, graft_activation, grafted_masks
from tenfold_grafting.graph import trace
from tenfold_grafting.intervals import ibp
from tenfold_grafting.networks import architecture, create_network, network_names
from tenfold_grafting.scores import instability, scored_images, significance, unstable_ratio
from tenfold_grafting.selection import (
    decaying_selection,
    keep_masks,
    load_masks,
    overlap,
    random_selection,
    ranked,
    save_masks,
    select_neurons,
)
from tenfold_grafting.specification import pixel_box
from tenfold_shared.errors import UserError

COUNTS = {  # parameters, with batch norm's; ReLU neurons
    "cnn_b": (2_118_856, 16_634),
    "conv_big": (2_466_858, 62_464),
    "conv_big_mnist": (1_974_762, 48_064),
    "conv_big_mnist_bn": (1_977_194, 48_064),
    "mnist_8x200": (400_210, 1_400),
    "mnist_8x200_bn": (403_010, 1_400),
    "resnet4b": (123_734, 14_436),
    "resnet2b": (112_006, 6_244),
    "cnn_17m": (17_190_602, 229_888),
    "cnn_17m_bn": (17_192_650, 229_888),
    "cnn_a": (214_918, 6_244),
    "cnn_a_mnist": (166_406, 4_804),
    "oval_base": (105_966, 3_172),
    "oval_wide": (214_918, 6_244),
    "oval_deep": (54_902, 6_756),
    "digits_cnn": (None, 1_636),
}


def test_every_network_has_its_counts() -> None:
    assert set(COUNTS) == set(network_names())
    for name, (parameters, neurons) in COUNTS.items():
        model = create_network(name)
        if parameters is not None:
            assert sum(p.numel() for p in model.parameters()) == parameters, name
        shapes = activation_shapes(model, architecture(name).input_shape)
        assert sum(math.prod(shape) for shape in shapes.values()) == neurons, name
    with pytest.raises(UserError, match="did you mean 'cnn_b'"):
        create_network("cnnb")


def test_grafted_parameters_are_two_a_neuron() -> None:
    for name, more in (("cnn_b", 33_268), ("mnist_8x200", 2_800), ("resnet4b", 28_872)):
        model = create_network(name)
        shapes = activation_shapes(model, architecture(name).input_shape)
        grafted = graft(model, {layer: torch.zeros(shape) for layer, shape in shapes.items()})
        assert sum(p.numel() for p in grafted.parameters()) - sum(p.numel() for p in model.parameters()) == more
        assert list(grafted_masks(grafted)) == list(shapes)
        x = torch.rand(2, *architecture(name).input_shape)
        torch.testing.assert_close(grafted.eval()(x), model.eval()(x))


def test_activation_gradients_of_first_and_second_order() -> None:
    mask = (torch.rand(3, 2) < 0.5).double()
    z, slope, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 2), (3, 2), (3, 2)))
    call = lambda z, slope, bias: graft_activation(z, mask, slope, bias)  # noqa: E731
    assert torch.autograd.gradcheck(call, (z, slope, bias))
    assert torch.autograd.gradgradcheck(call, (z, slope, bias))


def test_activation_selects() -> None:
    """Nothing infinite leaks from the branch that is not taken; the gradient at zero is the released 1, or torch's 0."""
    z = torch.tensor([[float("inf"), 2.0, 0.0]], requires_grad=True)
    mask, slope, bias = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([float("nan"), 3.0, 1.0]), torch.zeros(3)
    y = graft_activation(z, mask, slope, bias)
    assert y.tolist() == [[float("inf"), 6.0, 0.0]]
    y[0, 1:].sum().backward()
    assert z.grad is not None
    assert z.grad[0, 1:].tolist() == [3.0, 1.0]
    zero = torch.zeros(1, 3, requires_grad=True)
    graft_activation(zero, torch.zeros(3), bias, bias, 0.0).sum().backward()
    assert zero.grad.tolist() == [[0.0, 0.0, 0.0]]


def test_masks_that_do_not_fit_are_refused() -> None:
    model = create_network("digits_cnn")
    with pytest.raises(UserError, match="only on one side"):
        graft(model, {"1": torch.zeros(16, 8, 8)})
    shapes = activation_shapes(model, (1, 8, 8))
    with pytest.raises(UserError, match="other than 0 and 1"):
        graft(model, {name: torch.full(shape, 0.5) for name, shape in shapes.items()})


def test_ranks() -> None:
    scores = torch.tensor([3.0, 1.0, 1.0, 2.0])
    torch.testing.assert_close(ranked(scores, "min"), torch.tensor([1.0, 0.0, 0.0, 2 / 3]).double())
    torch.testing.assert_close(ranked(scores, "dense"), torch.tensor([1.0, 0.0, 0.0, 0.5]).double())
    torch.testing.assert_close(ranked(scores, "norank"), torch.tensor([1.0, 0.0, 0.0, 0.5]).double())
    assert not bool(ranked(torch.ones(3)).any())


def test_decaying_selection_by_hand() -> None:
    """Each round takes the largest gamma u - s of what is left; gamma 0 takes the least significant."""
    u = torch.tensor([1.0, 0.9, 0.0, 0.0]).double()
    s = torch.tensor([1.0, 0.0, 0.1, 0.9]).double()
    assert decaying_selection(u, s, 0.5, (2.0, 0.0)).tolist() == [0, 1, 1, 0]
    assert decaying_selection(u, s, 0.5, (float("inf"),)).tolist() == [1, 1, 0, 0]
    assert decaying_selection(u, s, 0.5, (0.0,)).tolist() == [0, 1, 1, 0]
    for ratio in (0.0, 0.3, 1.0):
        assert int(decaying_selection(u, s, ratio).sum()) == round(4 * ratio)


def test_selection_scopes_and_overlap() -> None:
    scores = {"a": torch.rand(4, 5), "b": torch.rand(10)}
    unstable = {"a": torch.rand(4, 5), "b": torch.rand(10)}
    masks = select_neurons(unstable, scores, 0.5)
    assert sum(int(m.sum()) for m in masks.values()) == 15
    local = select_neurons(unstable, scores, 0.5, scope="local")
    assert [int(m.sum()) for m in local.values()] == [10, 5]
    assert overlap(masks, masks)["all"] == 1.0
    drawn = random_selection({"a": (4, 5), "b": (10,)}, 0.5, torch.Generator().manual_seed(0))
    assert sum(int(m.sum()) for m in drawn.values()) == 15
    kept = keep_masks(scores, 0.3)
    assert sum(int(m.sum()) for m in kept.values()) == 9


def test_mask_files(tmp_path) -> None:
    shapes = {"1": (2, 3), "2": (5,)}
    masks = {name: (torch.rand(shape) < 0.5).float() for name, shape in shapes.items()}
    save_masks(tmp_path / "m.pt", masks)
    again = load_masks(tmp_path / "m.pt", shapes)
    assert all(torch.equal(again[name], masks[name]) for name in shapes)
    packed = {f"mask{i}": np.packbits(m.flatten().numpy().astype(np.uint8)) for i, m in enumerate(masks.values())}
    np.savez(tmp_path / "m.npz", shapes=np.array(["[[2, 3], [5]]"]), **packed)
    again = load_masks(tmp_path / "m.npz", shapes)
    assert all(torch.equal(again[name], masks[name]) for name in shapes)
    with pytest.raises(UserError, match="activations have"):
        load_masks(tmp_path / "m.pt", {"1": (2, 3)})
    for name, message in (("bad.pt", "truncated or corrupted"), ("bad.npz", "no readable mask file")):
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UserError, match=message):
            load_masks(tmp_path / name, shapes)


def test_scores_against_loops() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3).double(), torch.randint(0, 2, (6,))
    found = significance(model, [(x[:4], y[:4]), (x[4:], y[4:])])["1"]
    total = torch.zeros(4).double()
    for image, label in zip(x, y, strict=True):
        z = model[0](image).detach().requires_grad_()
        cross_entropy(model[2](z.relu())[None], label[None]).backward()
        total += z.grad.abs() / 6
    torch.testing.assert_close(found, total)
    variance = significance(model, [(x, y)], "variance")["1"]
    torch.testing.assert_close(variance, model[0](x).detach().var(0, unbiased=False))
    post = significance(model, [(x, y)], "magnitude", post_activation=True)["1"]
    torch.testing.assert_close(post, model[0](x).detach().relu().mean(0))
    x = x.sigmoid()
    pixels = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model(pixels), y), pixels)
    bad = (x + (0.1 * 1.25 * gradient.sign()).clamp(-0.1, 0.1)).clamp(0, 1)
    attacked = significance(model, [(x, y)], "magnitude", fgsm_eps=0.1)["1"]
    torch.testing.assert_close(attacked, model[0](bad).detach().abs().mean(0))


def test_instability_counts_crossings() -> None:
    model, shape = random_network(0, "conv")
    images = torch.rand(4, *shape).double()
    graph = trace(model, shape)
    found = instability(model, images, 0.05, bounds="ibp")
    intervals, _ = ibp(graph, pixel_box(graph, images, 0.05))
    index = graph.activations[1]
    expected = ((intervals[index][0] < 0) & (intervals[index][1] > 0)).double().mean(0)
    torch.testing.assert_close(found[graph.nodes[index].name].double(), expected)
    crown = unstable_ratio(model, images, 0.05)
    assert (
        0
        <= unstable_ratio(model, images, 0.05, bounds="alpha")
        <= crown
        <= unstable_ratio(model, images, 0.05, bounds="ibp")
    )
    ones = {name: torch.ones(s) for name, s in activation_shapes(model, shape).items()}
    assert unstable_ratio(graft(model, ones), images, 0.05) == 0
    assert scored_images(5000)[:3].tolist() == np.random.RandomState(1).permutation(5000)[:3].tolist()


def test_grad_align_leaves_zero_gradients_out() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    term = grad_align(model, torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]), 0.1)
    assert float(term) == 0
    nn.init.normal_(model[1].weight)
    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
    assert float(grad_align(model, x, y, 0.1, torch.zeros_like(x))) == pytest.approx(0, abs=1e-6)


def test_losses_with_bounds() -> None:
    """The certified loss bounds the loss of every point; both have gradients; fewer unstable neurons lower RS."""
    model, shape = random_network(1, "conv")
    x, y = torch.rand(4, *shape).double(), torch.tensor([0, 1, 2, 0])
    for crown in (0.0, 1.0):
        worst = certified_loss(model, x, y, 0.02, kappa=0.0, crown=crown)
        for _ in range(10):
            point = (x + 0.02 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
            assert float(cross_entropy(model(point), y)) <= float(worst) + 1e-9
        model.zero_grad()
        worst.backward()
        assert float(model[0].weight.grad.abs().sum()) > 0
    assert float(rs_loss(model, x, 0.001)) < float(rs_loss(model, x, 0.2))


def test_attacks_find_what_is_there() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5)).double()
    x, y = torch.rand(8, 1, 2, 2).double(), torch.zeros(8, dtype=torch.int64)
    spec = margin_spec(y, 5)
    weight = (spec @ model[1].weight).detach()
    low, high = (x - 0.1).clamp(0, 1).flatten(1), (x + 0.1).clamp(0, 1).flatten(1)
    worst = torch.where(weight > 0, low[:, None], high[:, None]) * weight
    exact = ((worst.sum(2) + (spec @ model[1].bias)) > 0).all(1)
    assert torch.equal(robust_mask(model, x, y, 0.1, kind="auto", steps=20, restarts=1), exact)
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]])
    assert float(dlr(logits, torch.tensor([0]))) == pytest.approx(-2 / 3)


def test_attacks_of_a_network_with_two_classes() -> None:
    """DLR needs a third logit."""
    model, x = nn.Linear(4, 2).double(), torch.full((3, 4), 0.5, dtype=torch.float64)
    y = model(x).argmax(1)
    assert bool(robust_mask(model, x, y, 1e-9, kind="auto", steps=2, restarts=1).all())
    assert not bool(robust_mask(model, x, y, 0.5, kind="auto", steps=2, restarts=1).any())


def test_graft_of_a_graft_is_refused_by_shape() -> None:
    layer = GraftedReLU((3,))
    assert "0 grafted" in repr(layer)


def test_activations_in_place_and_at_two_places() -> None:
    """An activation in place leaves its scores as they are; one module at two places has neurons of two layers."""
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.rand(6, 4), torch.zeros(6).long()
    scores = {kind: significance(model, [(x, y)], kind)["1"] for kind in ("gradient", "magnitude")}
    model[1].inplace = True
    for kind, score in scores.items():
        torch.testing.assert_close(significance(model, [(x, y)], kind)["1"], score)
    relu = nn.ReLU()
    shared = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)
    with pytest.raises(UserError, match="more than once"):
        activation_shapes(shared, (4,))
    with pytest.raises(UserError, match="several places"):
        graft(shared, {"1": torch.ones(4)})


def test_scores_of_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        ranked(torch.tensor([1.0, float("nan")]))
    with pytest.raises(UserError, match="there are none"):
        instability(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.zeros(0, 2), 0.1)
    with pytest.raises(ValueError, match="share"):
        random_selection({"a": (3,)}, 1.5, torch.Generator())
