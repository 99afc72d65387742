"""Soft neurons, ghost skips, smoothing and the recipe around any network."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import one_hot
from torch.optim.swa_utils import update_bn

from tenfold_tost import (
    GhostActivation,
    Ghosts,
    GhostsRemainError,
    Lrsi,
    Skips,
    Smoothing,
    Soft,
    SparseRecipe,
    activation,
    apply_masks,
    create_model,
    erk_masks,
    ghost_skips,
    has_ghosts,
    parse_techniques,
    pswish,
    smoothed_cross_entropy,
)
from tenfold_tost.activations import ACTIVATIONS, SOFT_KINDS, mish
from tenfold_tost.schedules import learning_rate, skip_strength, soft_state
from tenfold_tost.skips import skip_units
from tenfold_tost.smoothing import smoothing_at

GHOSTS = SparseRecipe(smoothing=None, lrsi=None)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def trained_statistics(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Batch norms with statistics and gains that are not their initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.2)
    model.train()(torch.randn(4, *shape))
    return model


# -- activations ----------------------------------------------------------------------------------------------------------


def test_parametric_swish_is_its_formula_twice_differentiable() -> None:
    def formula(v: torch.Tensor, b: float) -> torch.Tensor:
        return v * torch.sigmoid(b * v)

    x = torch.linspace(-3, 3, 31, dtype=torch.float64).requires_grad_()
    for beta in (0.5, 2.0, 10.0):
        torch.testing.assert_close(pswish(x, beta), formula(x, beta))
        assert torch.autograd.gradcheck(lambda v, b=beta: pswish(v, b), (x,))
        # gradgradcheck differentiates whatever the first gradient is: that it is the right one in this mode too is seen here.
        first, plain = (
            torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in (pswish(x, beta), formula(x, beta))
        )
        torch.testing.assert_close(first, plain)
        assert torch.autograd.gradgradcheck(lambda v, b=beta: pswish(v, b), (x,))
    torch.testing.assert_close(pswish(x, 1e-6), x / 2, atol=1e-5, rtol=0)
    assert torch.equal(pswish(x, 0.0), x / 2)
    torch.testing.assert_close(pswish(x, 1e6), x.relu(), atol=1e-6, rtol=0)


def test_mish_neither_overflows_nor_loses_large_inputs() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([15.0, 80.0, 1e4], dtype=dtype)
        assert torch.equal(mish(x), x)


@pytest.mark.parametrize("kind", SOFT_KINDS)
def test_a_hard_ghost_is_exactly_relu(kind: str) -> None:
    neuron, x = GhostActivation(kind), torch.linspace(-4, 4, 101)
    neuron.set(10.0, 1.0)
    assert torch.equal(neuron(x), x.relu())
    neuron.set(1.0, 0.0)
    expected = pswish(x, 1.0) if kind == "pswish" else ACTIVATIONS[kind](x)
    torch.testing.assert_close(neuron(x), expected)
    assert not neuron.state_dict()


def test_unknown_activations_are_named() -> None:
    with pytest.raises(ValueError, match="swoosh"):
        activation("swoosh")
    with pytest.raises(ValueError, match="relu"):
        GhostActivation("relu")
    with pytest.raises(ValueError, match="above 0"):
        GhostActivation("pswish", beta=0.0)


# -- schedules and smoothing ------------------------------------------------------------------------------------------------


@given(u=st.floats(0, 2), curve=st.sampled_from(["linear", "cosine", "step"]))
@settings(max_examples=40, deadline=None)
def test_skips_fade_from_one_to_exactly_zero(u: float, curve: str) -> None:
    assert 0.0 <= skip_strength(u, curve) <= 1.0
    assert skip_strength(0.0, curve) == 1.0
    assert skip_strength(max(u, 1.0), curve) == 0.0
    assert skip_strength(min(u + 0.1, 2.0), curve) <= skip_strength(u, curve)


def test_soft_neurons_harden() -> None:
    assert soft_state(0.0) == (1.0, 0.0)
    assert soft_state(0.5)[0] == pytest.approx(5.5)
    assert soft_state(0.5, curve="geometric")[0] == pytest.approx(10**0.5)
    assert soft_state(0.5, "mish") == (1.0, 0.5)
    assert soft_state(0.9, "mish", curve="switch") == (1.0, 0.0)
    for kind in SOFT_KINDS:
        assert soft_state(1.0, kind)[1] == 1.0


def test_learning_rate_is_a_function_of_the_epoch() -> None:
    rates = [learning_rate(epoch, 0.1, [90, 135]) for epoch in (0, 89, 90, 134, 135, 181)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("classes", [2, 7])
def test_smoothed_targets(classes: int) -> None:
    """Against the definition: 1 - a for the true class and a / (C - 1) for the others."""
    logits = torch.randn(5, classes, dtype=torch.float64)
    labels = torch.arange(5) % classes
    true = one_hot(labels, classes).double()
    for a in (0.0, 0.1, 0.3):
        targets = true * (1 - a) + (1 - true) * a / (classes - 1)
        expected = -(targets * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(smoothed_cross_entropy(logits, labels, a), expected)


def test_labels_are_not_smoothed_past_the_uniform_ones() -> None:
    """With a = 1 - 1 / C every class gets the same; more would make a wrong one likelier."""
    logits, labels = torch.randn(4, 5), torch.arange(4)
    assert smoothed_cross_entropy(logits, labels, 0.8) == pytest.approx(float(-logits.log_softmax(1).mean()))
    with pytest.raises(ValueError, match=r"5 classes .* \[0, 0\.8\]"):
        smoothed_cross_entropy(logits, labels, 0.85)


def test_smoothing_schedule() -> None:
    assert [smoothing_at(p, 0.1, 0.5) for p in (0.0, 0.49, 0.5)] == [0.1, 0.1, 0.0]
    assert smoothing_at(0.25, 0.1, 0.5, "linear") == pytest.approx(0.05)


# -- ghosts in a network ----------------------------------------------------------------------------------------------------

NETWORKS = [
    ("digits_net", (1, 8, 8)),
    ("oresnet20", (3, 16, 16)),
    ("mobilenet", (3, 32, 32)),
    ("vgg16_bn", (3, 32, 32)),
]


@pytest.mark.parametrize(("arch", "shape"), NETWORKS)
def test_the_network_is_the_plain_one_at_the_end(arch: str, shape: tuple[int, ...]) -> None:
    """At the end of the window: identical outputs before and after the ghosts go, then same keys, order and modules, no
    hooks, and the outputs of the network that never had ghosts.
    """
    torch.manual_seed(0)
    model = trained_statistics(create_model(arch), shape)
    masks = erk_masks(model, 0.3)
    apply_masks(model, masks)
    plain, x = copy.deepcopy(model), torch.randn(3, *shape)
    types = [type(module) for module in model.modules()]
    ghosts = Ghosts(model, GHOSTS, x)
    assert ghosts.attached
    assert ghosts.parameters()
    assert not torch.allclose(model.eval()(x), plain.eval()(x), atol=1e-3)
    for neuron in ghosts._soft:  # the ghosts' end, while they are still in
        neuron.set(10.0, 1.0)
    for skip in ghost_skips(model).values():
        skip.alpha.zero_()
    assert torch.equal(model(x), plain(x))
    assert ghosts.advance(0.5) is True
    assert ghosts.advance(0.6) is False
    assert torch.equal(model(x), plain(x))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in model.modules()] == types
    assert hooks(model) == 0
    assert ghosts.finalize(masks) is model
    assert not has_ghosts(model)


def test_alpha_zero_leaves_the_training_gradient_of_the_network_alone() -> None:
    torch.manual_seed(0)
    model = create_model("oresnet20")
    plain, x = copy.deepcopy(model), torch.randn(4, 3, 16, 16)
    Ghosts(model, SparseRecipe(soft=None, smoothing=None, lrsi=None), x)
    for skip in ghost_skips(model).values():
        skip.alpha.zero_()
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(own[name].grad, parameter.grad)


def test_where_the_skips_go() -> None:
    """Both convolutions of a basic block, not its stem, not its projection; in a plain network every unit."""
    names = [unit.name for unit in skip_units(create_model("resnet18"), torch.zeros(1, 3, 32, 32))]
    assert len(names) == 16
    assert all(name.endswith(("conv1", "conv2")) and name.startswith("layer") for name in names)
    assert len(skip_units(create_model("vgg16_bn"), torch.zeros(1, 3, 32, 32))) == 13
    assert len(skip_units(create_model("mobilenet"), torch.zeros(1, 3, 32, 32))) == 27


def test_parameters_with_skips() -> None:
    """The numbers of section 3; deployed, nothing of them is left."""
    for arch, classes, expected in (("resnet18", 100, 12_448_420), ("resnet34", 10, 23_640_138)):
        model = create_model(arch, classes)
        before = sum(p.numel() for p in model.parameters())
        ghosts = Ghosts(model, SparseRecipe(soft=None, smoothing=None, lrsi=None), torch.zeros(1, 3, 32, 32))
        assert sum(p.numel() for p in model.parameters()) == expected
        ghosts.detach()
        assert sum(p.numel() for p in model.parameters()) == before


def test_a_stranger_with_one_relu_in_two_places() -> None:
    """Any module: a shared activation stays shared, in-place or not, and comes back as the same object."""

    class Stranger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
            self.norm = nn.BatchNorm2d(4)
            self.act = nn.ReLU(inplace=True)
            self.again = self.act

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(self.norm(self.second(self.act(self.first(x)))))

    model, x = Stranger(), torch.randn(2, 1, 8, 8)
    relu = model.act
    assert [unit.end for unit in skip_units(model, x)] == [model.first, model.norm]
    ghosts = Ghosts(model, GHOSTS, x)
    assert model.act is model.again
    assert isinstance(model.act, GhostActivation)
    model(x).sum().backward()
    assert all(p.grad is not None for p in ghosts.parameters())
    ghosts.detach()
    assert model.act is model.again is relu


def test_copies_have_ghosts_of_their_own() -> None:
    model, x = create_model("digits_net"), torch.randn(2, 1, 8, 8)
    ghosts = Ghosts(model, GHOSTS, x)
    twin = copy.deepcopy(model)
    before = twin.eval()(x)
    with torch.no_grad():
        for skip in ghost_skips(model).values():
            skip.norm.bias.fill_(5.0)
    assert torch.equal(twin(x), before)
    ghosts.detach()
    assert torch.equal(twin(x), before)


@pytest.mark.parametrize("stride", [1, 2])
def test_identity_skips_have_no_parameters(stride: int) -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 3, stride, 1), nn.BatchNorm2d(5), nn.ReLU())
    x = torch.randn(2, 2, 7, 7)
    recipe = SparseRecipe(soft=None, skips=Skips(kind="identity"), smoothing=None, lrsi=None)
    ghosts = Ghosts(model, recipe, x)
    assert not ghosts.parameters()
    plain = nn.Sequential(*(copy.deepcopy(model[i]) for i in range(2)))
    for module in plain.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    path = nn.functional.avg_pool2d(x, stride, ceil_mode=True) if stride > 1 else x
    expected = plain.eval()(x)
    expected[:, :2] += path
    torch.testing.assert_close(model.eval()(x), expected.relu())


def test_statistics_of_skips_are_averaged_anew() -> None:
    """`update_bn` asks every batch norm for the plain average over its batches; the skips' give it too."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    batches = [torch.randn(4, 2, 6, 6) + i for i in range(3)]
    Ghosts(model, SparseRecipe(soft=None, smoothing=None, lrsi=None), batches[0])
    skip = ghost_skips(model)["0"]
    nn.init.normal_(skip.jump.weight)
    update_bn(batches, model)
    with torch.no_grad():
        expected = torch.stack([skip.jump(x).mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(skip.norm.running_mean, expected)


def test_the_released_ghosts_stay() -> None:
    recipe = SparseRecipe(Soft(beta0=2.0, constant=True), Skips(constant=True), None, None)
    model, x = create_model("digits_net"), torch.randn(2, 1, 8, 8)
    ghosts = Ghosts(model, recipe, x)
    before = model.eval()(x)
    assert not recipe.fades
    assert ghosts.advance(1.0) is False
    assert torch.equal(model(x), before)
    with pytest.raises(GhostsRemainError, match="GhostActivation"):
        ghosts.finalize()


def test_finalize_notices_a_weight_that_woke_up() -> None:
    model, x = create_model("digits_net"), torch.randn(2, 1, 8, 8)
    masks = erk_masks(model, 0.2)
    apply_masks(model, masks)
    ghosts = Ghosts(model, GHOSTS, x)
    ghosts.detach()
    with torch.no_grad():
        model[9].weight[~masks["9.weight"]] = 0.1
    with pytest.raises(GhostsRemainError, match=r"9\.weight"):
        ghosts.finalize(masks)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: create_model("resnet50"), "CifarResNet.*bottleneck"),
        (lambda: create_model("oresnet56"), "ThinResNet.*bottleneck"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), r"Sequential.*0 \(\(16, 16\) -> \(14, 14\)\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 2), nn.ReLU()), "Sequential.*no convolution"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU()), "no nn.ReLU"),
    ],
)
def test_networks_without_a_place_for_ghosts_are_named(build, words: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=words):
        Ghosts(model, GHOSTS, torch.zeros(1, 3, 16, 16))
    assert not has_ghosts(model)
    assert hooks(model) == 0


@pytest.mark.parametrize("fraction", [0.07, 0.14, 0.5, 1.0])
def test_the_window_ends_where_the_ghosts_go(fraction: float) -> None:
    """0.07 * 300 is a little more than 21 as the computer multiplies."""
    recipe = SparseRecipe(soft=None, smoothing=None, lrsi=None, ghost_fraction=fraction)
    ghosts = Ghosts(create_model("digits_net"), recipe, torch.zeros(1, 1, 8, 8))
    window = recipe.window(300)
    assert window == round(300 * fraction)
    assert not any(ghosts.advance(step / 300) for step in range(window))
    assert ghosts.advance(window / 300)


def test_finalize_notices_a_hook_that_is_left() -> None:
    model = create_model("digits_net")
    ghosts = Ghosts(model, SparseRecipe(soft=None, smoothing=None, lrsi=None), torch.zeros(1, 1, 8, 8))
    for module in list(model.modules()):
        if hasattr(module, "ghost_skip"):
            del module.ghost_skip
    with pytest.raises(GhostsRemainError, match="hook"):
        ghosts.finalize()


def test_bad_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match="longer than training"):
        SparseRecipe(ghost_fraction=1.5)
    with pytest.raises(ValueError, match="ghost_fraction"):
        SparseRecipe(ghost_fraction=0.0)
    with pytest.raises(ValueError, match="beta0"):
        Soft(beta0=0.0)
    with pytest.raises(ValueError, match="until"):
        Smoothing(until=2.0)
    for wrong in (lambda: Skips(kind="convolution"), lambda: Skips(curve="cosin"), lambda: Soft(curve="expo"),
                  lambda: Smoothing(curve="expo"), lambda: Lrsi(target="sgdm")):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=r"convolution|cosin|expo|sgdm"):  # types are checked first
            wrong()
    with pytest.raises(ValueError, match="lsri"):
        parse_techniques("soft+lsri")
    with pytest.raises(ValueError, match="example"):
        Ghosts(create_model("digits_net"), GHOSTS)
    model, x = create_model("digits_net"), torch.zeros(1, 1, 8, 8)
    Ghosts(model, GHOSTS, x)
    with pytest.raises(ValueError, match="already"):
        Ghosts(model, GHOSTS, x)


def test_technique_names() -> None:
    assert parse_techniques("vanilla") == frozenset()
    assert parse_techniques("tost") == {"soft", "skip", "ls", "lrsi"}
    assert parse_techniques("ls+soft") == {"soft", "ls"}
