"""Numbers of the authors' released implementation: every .npz of TENFOLD_PARITY_DIR, by kind."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tenfold_shared.parity import Fixture, check_parity, close, parity_files
from tenfold_tost.activations import ACTIVATIONS, pswish, smooth_grad_relu, smooth_relu, softplus
from tenfold_tost.ghosts import Ghosts, Skips, SparseRecipe
from tenfold_tost.lrsi import Lrsi, ScaleAdam, learn_scales
from tenfold_tost.masking import (
    MaskKeeper,
    mask_gradients_by_zeros,
    masks_from_zeros,
    prunable_weights,
    relaxed_zero_filters,
)
from tenfold_tost.models import create_model
from tenfold_tost.models.resnet import BasicBlock
from tenfold_tost.models.thin import ThinResNet
from tenfold_tost.pruning import (
    grasp_scores,
    keep_above,
    layerwise_cut,
    magnitude_cut,
    magnitude_scores,
    snip_scores,
    synflow_masks,
    synflow_scores,
    taylor_scores,
)
from tenfold_tost.skips import ghost_skips, set_strength
from tenfold_tost.smoothing import smoothed_cross_entropy


@pytest.fixture(autouse=True)
def double():
    """Double precision by default, as the fixtures were made."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def procedural_state(case: Fixture) -> dict[str, torch.Tensor]:
    """The fixtures' deterministic weights, under the released keys."""
    state = {}
    keys = zip(case.decoded("cfg/keys"), case.decoded("cfg/shapes"), strict=True)
    for t, (key, shape) in enumerate(keys):
        v = (np.arange(math.prod(shape)) + 1.0) * 0.6180339887498949 + 0.1 * (t + 1) + 0.37 * case.meta["a"]
        v = (v % 1.0 - 0.5).reshape(shape)
        kind = key.rpartition(".")[2]
        if kind == "num_batches_tracked":
            v = np.zeros(shape, dtype=np.int64)
        elif kind == "running_mean":
            v = 0.2 * v
        elif kind == "running_var":
            v = 1 + 0.5 * v
        elif kind == "weight" and len(shape) > 1:
            v = v * math.sqrt(24 / math.prod(shape[1:]))
        elif kind == "weight":
            v = 1 + 0.4 * v
        elif kind == "bias":
            v = 0.2 * v
        if not key.startswith("normalize."):
            state[key] = torch.as_tensor(v)
    return state


def released_skips(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Released names of the skips -> ours."""
    renamed = {}
    for key, value in state.items():
        block, _, rest = key.rpartition("conv_jump")
        if "conv_jump" in key:
            number, _, name = rest.partition(".")
            part = "norm" if number.endswith("_bn") else "jump"
            renamed[f"{block}conv{number.removesuffix('_bn')}.ghost_skip.{part}.{name}"] = value
        else:
            renamed[key] = value
    return renamed


def small_net(case: Fixture, state: dict[str, torch.Tensor]) -> nn.Module:
    """The fixtures' network S."""
    c, classes = case.meta.get("width", 6), case.meta.get("num_classes", 5)
    model = nn.Sequential(
        nn.Conv2d(3, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(),
        nn.Conv2d(c, 2 * c, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * c), nn.ReLU(),
        nn.Conv2d(2 * c, 2 * c, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * c, classes),
    )  # fmt: skip
    model.load_state_dict({name: value for name, value in state.items() if not name.endswith("_mask")})
    return model


def batches(case: Fixture) -> list[tuple[torch.Tensor, torch.Tensor]]:
    count = len(case.under("in/x_"))
    return [(case[f"in/x_{i}"].double(), case[f"in/y_{i}"]) for i in range(count)]


def released_activation(name: str):
    """The activation under a fixture's name, whose ending may state a parameter: smoothrelu_a200, softplus_t10."""
    kind, _, parameter = name.partition("_")
    if kind == "smoothrelu":
        return lambda x: smooth_relu(x, float(parameter.removeprefix("a") or 200))
    if kind == "softplus":
        return lambda x: softplus(x, float(parameter.removeprefix("t") or 1))
    return smooth_grad_relu if kind == "smoothgradrelu" else ACTIVATIONS[name]


def check_activations(case: Fixture) -> None:
    for name, expected in case.under("out/").items():
        x = case["in/x"].requires_grad_()
        if name == "pswish_default":
            y = pswish(x, float(case.meta["pswish_default_beta"]))
            close(pswish(x), expected, 1e-12)
        elif name == "pswish_beta":
            y = pswish(x, float(case.meta["beta"]))
        else:
            y = released_activation(name)(x)
        y.sum().backward()
        close(y, expected, 1e-12)
        close(x.grad, case[f"grad/{name}"], 1e-12)


def check_logits(case: Fixture, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Logits in evaluation, then in training mode, and the parameter counts."""
    normalisation = {name: v for name, v in model.state_dict().items() if name.startswith("normalize.")}
    model.load_state_dict({**state, **normalisation})
    assert sum(p.numel() for p in model.parameters()) == case.meta["params"]
    convolutions = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(convolutions) == case.meta["conv_params"]
    x = case["in/x"]
    with torch.no_grad():
        close(model.eval()(x), case["out/logits_eval"])
        close(model.train()(x), case["out/logits_train"])


def check_soft(case: Fixture) -> None:
    model = create_model(case.meta["arch"], case.meta["num_classes"], activation=case.meta["activation"])
    check_logits(case, model, procedural_state(case))


def check_oresnet(case: Fixture) -> None:
    model = ThinResNet(case.meta["depth"], case.meta["num_classes"], case.meta["activation"])
    check_logits(case, model, procedural_state(case))


def check_maskzoo(case: Fixture) -> None:
    arch = case.meta["arch"]
    model = create_model("zoo_resnet18" if arch == "resnet18" else arch, case.meta["num_classes"])
    check_logits(case, model, procedural_state(case))


def check_ghostskip(case: Fixture) -> None:
    model = create_model(case.meta["arch"], case.meta["num_classes"], activation=case.meta["activation"])
    recipe = SparseRecipe(soft=None, skips=Skips(constant=True), smoothing=None, lrsi=None)
    Ghosts(model, recipe, torch.zeros(1, 3, 32, 32))
    set_strength(model, case.meta["alpha"])
    check_logits(case, model, released_skips(procedural_state(case)))


def check_ghostskip_block(case: Fixture) -> None:
    meta, x = case.meta, case["in/x"]
    recipe = SparseRecipe(soft=None, skips=Skips(), smoothing=None, lrsi=None)
    for alpha in meta["alphas"]:
        block = BasicBlock(meta["in_planes"], meta["planes"], meta["stride"], meta["activation"])
        Ghosts(block, recipe, x)
        for number, skip in enumerate(ghost_skips(block).values(), 1):
            assert torch.equal(skip.jump.weight.unique(), case[f"out/init_unique_conv_jump{number}.weight"])
        assert sum(p.numel() for p in block.parameters()) == meta["params"]
        block.load_state_dict(released_skips(procedural_state(case)))
        set_strength(block, alpha)
        inputs = x.clone().requires_grad_()
        y = block(inputs)
        close(y, case[f"out/y_train_{alpha}"])
        y.square().mean().backward()
        close(inputs.grad, case[f"grad/x_{alpha}"])
        close(block.conv1.weight.grad, case[f"grad/conv1.weight_{alpha}"])
        close(block.conv1.ghost_skip.jump.weight.grad, case[f"grad/conv_jump1.weight_{alpha}"])
        set_strength(block, 1.0)  # the release evaluates at full strength, whatever it trained at
        with torch.no_grad():
            close(block.eval()(x), case[f"out/y_eval_{alpha}"])


def check_label_smoothing(case: Fixture) -> None:
    logits = case["in/logits"].requires_grad_()
    loss = smoothed_cross_entropy(logits, case["in/labels"], case.meta["alpha"])
    loss.backward()
    close(loss, case["out/loss"], 1e-12)
    close(logits.grad, case["grad/logits"], 1e-12)


def check_lrsi(case: Fixture) -> None:
    meta = case.meta
    model = small_net(case, case.under("state/"))
    settings = Lrsi(
        iters=meta["iters"],
        lr=meta["lr"],
        eta=meta["eta"],
        gamma=meta["gamma"],
        normalize=meta["normalize_grad"],
        min_scale=meta["min_scale"],
        clip=meta["grad_clip"],
        target=meta["alg"],
        no_overlap=meta["batch_no_overlap"],
        mask_lookahead=False,
    )
    report = learn_scales(model, itertools.cycle(batches(case)), settings)  # the loader begins anew at its end
    assert report.constrained == case["out/constraint_flags"].tolist()
    for name, expected in case.under("out/alpha/").items():
        close(torch.tensor(report.scales[name]), expected, 1e-8)
    for name, parameter in model.named_parameters():
        close(parameter, case[f"out/{name}"], 1e-8)


def check_scale_adam(case: Fixture) -> None:
    meta = case.meta
    start = [case["in/p1"], case["in/p2"], torch.zeros_like(case["in/g_p3_0"])]
    rate, floor = (torch.tensor([float(v) for v in meta[key]]) for key in ("lr", "min_scale"))
    both = [torch.cat([values, values[-1:]])[:3] for values in (rate, floor)]
    alive = torch.tensor([True, True, False])
    adam = ScaleAdam(alive, *both, clip=meta["grad_clip"], betas=tuple(meta["betas"]), eps=meta["eps"])
    for i, is_constraint in enumerate(case["in/is_constraint"].tolist()):
        given = [case[f"in/g_p{j}_{i}"] for j in (1, 2, 3)]
        adam.step(torch.stack([(g * p).sum() for g, p in zip(given, start, strict=True)]), is_constraint)
        close(adam.alpha[:2], case[f"out/alpha_{i}"], 1e-12)
        for j in (1, 2):
            close(adam.alpha[j - 1] * start[j - 1], case[f"out/p{j}_{i}"], 1e-12)


def check_masked_steps(case: Fixture) -> None:
    meta = case.meta
    for keeps_the_mask in (True, False):
        model = small_net(case, case.under("state/"))
        keeper = MaskKeeper(model, masks_from_zeros(model)) if keeps_the_mask else None
        optimiser = torch.optim.SGD(model.parameters(), meta["lr"], meta["momentum"], weight_decay=meta["weight_decay"])
        for i, (x, y) in enumerate(batches(case)[: meta["steps"]]):
            loss = smoothed_cross_entropy(model(x), y, meta["label_smoothing"])
            close(loss, case[f"out/loss_{i}"])
            optimiser.zero_grad()
            loss.backward()
            if keeper is None:
                mask_gradients_by_zeros(model)
            else:
                keeper.mask_gradients()
            optimiser.step()
            if keeper is not None:
                keeper.mask_weights()
        for name, value in model.state_dict().items():
            close(value, case[f"out/{name}"])


def check_imp_global(case: Fixture) -> None:
    weights = case.under("state/")
    assert sum(w.numel() for w in weights.values()) == case.meta["total"]
    for i in range(case.meta["rounds"]):
        masks, threshold = magnitude_cut(weights, case.meta["percent"])
        assert threshold == float(case[f"out/threshold_{i}"])
        for name, mask in masks.items():
            assert torch.equal(mask, case[f"out/mask_{i}/{name}"])
        remaining = sum(int(mask.sum()) for mask in masks.values())
        assert remaining == int(case[f"out/remaining_{i}"])
        assert case.meta["total"] - remaining == int(case[f"out/pruned_{i}"])
        weights = {name: w * masks[name] for name, w in weights.items()}


def check_lth_layerwise(case: Fixture) -> None:
    weights = case.under("state/")
    for i in range(case.meta["rounds"]):
        masks = layerwise_cut(weights, case.meta["percent"] / 100)
        for name, mask in masks.items():
            assert torch.equal(mask, case[f"out/mask_{i}/{name}"]), name
        weights = {name: w * masks[name] for name, w in weights.items()}


def check_mask_scores(case: Fixture) -> None:
    meta, given = case.meta, case.under("state/")
    model = small_net(case, given).train(meta["train_mode"])
    shape = tuple(case["in/x_0"].shape[1:])
    in_force = {name.removesuffix("_mask"): value for name, value in given.items() if name.endswith("_mask")}
    makers = {
        "mag": lambda: magnitude_scores(model),
        "snip": lambda: snip_scores(model, batches(case), in_force),
        "grasp": lambda: grasp_scores(model, batches(case), in_force, temperature=meta["grasp_temperature"]),
        "taylor1": lambda: taylor_scores(model, batches(case), in_force),
        "synflow": lambda: synflow_scores(model, shape, in_force),
        "synflow1": lambda: synflow_scores(model, shape, in_force),
    }
    for method in {name.split("/")[2] for name in case.arrays if name.startswith("out/score/")}:
        scores = makers[method]()
        for name, expected in case.under(f"out/score/{method}/").items():
            close(scores[name] / expected.abs().max(), expected / expected.abs().max(), 1e-8)
        for scope, ours in (("global", "global"), ("local", "layer")):
            if method == "synflow":
                masks = synflow_masks(model, meta["density"], shape, scope=ours, iterations=meta["synflow_iterations"])
            else:
                masks = keep_above(scores, meta["density"], ours)
            for name, expected in case.under(f"out/mask/{method}/{scope}/").items():
                assert torch.equal(masks[name.removesuffix("_mask")], expected), (method, scope, name)


def check_zero_filters(case: Fixture) -> None:
    counts = relaxed_zero_filters(case.under("state/").values(), case.meta["eps"], case.meta["threshold"])
    assert counts == tuple(int(case[f"out/{name}"]) for name in ("total", "zero", "zero_params"))


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
del CHECKS["logits"]


@pytest.mark.parametrize("path", parity_files(__file__), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    check_parity(path, CHECKS)


def test_only_needed_weights_are_pruned() -> None:
    """Batch norm, biases and, by default, the classifier are never masked; skips neither."""
    model = create_model("resnet18")
    Ghosts(model, SparseRecipe(soft=None, smoothing=None, lrsi=None), torch.zeros(1, 3, 32, 32))
    assert all("ghost" not in name and "bn" not in name for name in prunable_weights(model))
    assert "fc.weight" in prunable_weights(model, linear=True)
    assert "fc.weight" not in prunable_weights(model)
