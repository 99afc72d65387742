"""Outputs of the released implementation, one case a file; `TENFOLD_PARITY_DIR` names another folder of files."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tenfold_shared.parity import Fixture, check_parity, parity_files
from tenfold_slak.ema import SparseEMA
from tenfold_slak.erf import contribution_maps, log_scaled, rectangle
from tenfold_slak.layer import LargeKernel, merge_large_kernels
from tenfold_slak.masks import (
    bernoulli_masks,
    erk_densities,
    maskable_parameters,
    snip_densities,
    snip_scores,
    without_dense,
)
from tenfold_slak.models.slak import Block, SLaK
from tenfold_slak.optim import cosine_schedule, layer_id, parameter_groups
from tenfold_slak.sparse import CosinePruneRate, DynamicSparseTraining


@pytest.fixture(autouse=True)
def double():
    """Double precision by default, as the fixtures were made."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(
        ours.detach(), theirs, rtol=tolerance, atol=tolerance, check_dtype=False, msg=lambda text: f"{what}: {text}"
    )


def check_gradients(fixture: Fixture, module: torch.nn.Module, x: torch.Tensor | None, tolerance: float) -> None:
    parameters = dict(module.named_parameters())
    expected = fixture.under("grad/")
    assert set(expected) - {"x"} == {name for name, p in parameters.items() if p.grad is not None}
    for name, gradient in expected.items():
        ours = x.grad if name == "x" else parameters[name].grad
        close(ours, gradient, tolerance, f"gradient of {name}")


def network(cfg: dict) -> SLaK:
    *kernels, small = cfg["kernel_size"]
    return SLaK(
        in_chans=cfg.get("in_chans", 3),
        num_classes=cfg["num_classes"],
        depths=cfg["depths"],
        dims=cfg["dims"],
        width_factor=float(cfg["width_factor"]),
        kernel_sizes=kernels,
        small_kernel=small,
        decomposed=cfg["Decom"],
        bn=cfg.get("bn", True),
        layer_scale_init=float(cfg.get("layer_scale_init_value", 1e-6)),
    ).double()


def large_kernel(cfg: dict, channels: int) -> LargeKernel:
    return LargeKernel(channels, cfg["kernel"], cfg["small"], cfg["decom"], cfg.get("bn", True)).double()


def check_module(fixture: Fixture, module: torch.nn.Module, tolerance: float = 1e-10) -> None:
    module.load_state_dict(fixture.under("state/"))
    x = fixture["in/x"].requires_grad_()
    close(module.eval()(x), fixture["out/eval"], tolerance, "eval")
    for form in ("two", "one"):
        merged = merge_large_kernels(torch.nn.Sequential(copy.deepcopy(module)), form)
        close(merged(x), fixture["out/eval"], tolerance, f"merged, {form} kernels")
    y = module.train()(x)
    close(y, fixture["out/train"], tolerance, "train")
    y.backward(fixture["in/grad_out"])
    check_gradients(fixture, module, x, tolerance)
    state = module.state_dict()
    for name, value in fixture.under("out/after/").items():
        close(state[name], value, tolerance, f"{name} after one step")


def check_layer(fixture: Fixture) -> None:
    layer = large_kernel(fixture.meta, fixture.meta["C"])
    check_module(fixture, layer)
    if "out/eq_kernel" in fixture:
        layer.load_state_dict(fixture.under("state/"))
        kernel, bias = layer.folded_one()
        close(kernel, fixture["out/eq_kernel"], 1e-10, "merged kernel")
        close(bias, fixture["out/eq_bias"], 1e-10, "merged bias")


def check_block(fixture: Fixture) -> None:
    cfg = fixture.meta
    scale = 1.0 if "state/gamma" in fixture else 0.0
    check_module(fixture, Block(cfg["dim"], large_kernel(cfg, cfg["dim"]), layer_scale_init=scale).double())


def check_model(fixture: Fixture) -> None:
    model = network(fixture.meta)
    model.load_state_dict(fixture.under("state/"))
    x, y = fixture["in/x"], fixture["in/y"]
    model.eval()
    ours = {"eval_logits": model(x)}
    ours["eval_features"] = model.forward_head(model.forward_features(x), pre_logits=True)
    model.train()
    ours["train_logits"] = model(x)
    ours["loss"] = F.cross_entropy(ours["train_logits"], y)
    ours["loss"].backward()
    for name, value in fixture.under("out/").items():
        close(ours[name], value, 1e-9, name)
    check_gradients(fixture, model, None, 1e-9)


def check_dst(fixture: Fixture) -> None:
    cfg = fixture.meta
    model = network(cfg["model"])
    model.load_state_dict(fixture.under("state/"))
    xs, ys = fixture["in/xs"], fixture["in/ys"]
    density = 1 - cfg["sparsity"]
    parameters = maskable_parameters(model, cfg["only_L"])
    assert list(parameters) == cfg["names"]
    densities = snip_densities(snip_scores(model, xs[0], ys[0], names=parameters), density)
    ours = torch.tensor([1 - densities[name] for name in parameters], dtype=torch.float64)
    close(ours, fixture["out/snip_layer_sparsity"], 1e-8, "layer sparsity")
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    draws = fixture.under("in/init_uniform/")
    masks = without_dense(bernoulli_masks(shapes, densities, lambda name, _: draws[name]))
    same_masks(masks, fixture.under("out/mask0/"), "mask0")

    groups = parameter_groups(model, float(cfg["lr"]), float(cfg["weight_decay"]))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    rate = CosinePruneRate(float(cfg["prune_rate"]), cfg["T_max"], float(cfg["eta_min"]))
    step = 0
    sparse = DynamicSparseTraining(
        model, masks, optimizer, rate, cfg["update_frequency"], cfg["growth"],
        uniform=lambda name, _: fixture[f"in/grow_uniform/{step - 1}/{name}"],
    )  # fmt: skip
    ema = SparseEMA(model, float(cfg["ema_decay"]))
    losses, rates = [], []
    for step in range(1, len(xs)):
        loss = F.cross_entropy(model.train()(xs[step]), ys[step])
        loss.backward()
        optimizer.step()
        moved = sparse.step()
        optimizer.zero_grad()
        ema.update(model, sparse.masks)
        losses.append(loss.detach())
        rates.append(rate.value)
        if moved:
            same_masks(sparse.masks, fixture.under(f"out/mask_after{step}/"), f"mask after {step}")
    close(torch.stack(losses), fixture["out/loss"], 1e-8, "loss")
    close(torch.tensor(rates, dtype=torch.float64), fixture["out/prune_rate"], 1e-8, "prune rate")
    state = model.state_dict()
    for name, value in fixture.under("out/param/").items():
        close(state[name], value, 1e-8, name)
    average = ema.state_dict()
    for name, value in fixture.under("out/ema/").items():
        close(average[name], value, 1e-8, f"average of {name}")


def same_masks(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys(), what
    for name, mask in theirs.items():
        assert torch.equal(ours[name], mask.bool()), f"{what} of {name}"


def check_schedules(fixture: Fixture) -> None:
    cfg = fixture.meta
    for i, case in enumerate(cfg["cosine_cases"]):
        base, final, epochs, iters, warmup, start, steps = case
        ours = cosine_schedule(float(base), float(final), epochs, iters, warmup, float(start), steps)
        close(ours, fixture[f"out/cosine{i}"], 1e-12, f"cosine case {case}")
    plain = cfg["prune_decay"]
    decay = CosinePruneRate(float(plain["start"]), plain["T_max"], float(plain["eta_min"]))
    values = torch.tensor([decay.advance() for _ in range(plain["steps"])], dtype=torch.float64)
    close(values, fixture["out/prune_decay"], 1e-12, "prune rate")
    resumed = cfg["prune_decay_resumed"]
    decay = CosinePruneRate(float(resumed["start"]), resumed["T_max"], float(resumed.get("eta_min", 0.005)))
    decay.advance(resumed["init_step"])
    values = torch.tensor([decay.advance() for _ in range(resumed["steps"])], dtype=torch.float64)
    close(values, fixture["out/prune_decay_resumed"], 1e-12, "resumed prune rate")
    ids = torch.tensor([layer_id(name) for name in cfg["layer_id_names"]])
    assert torch.equal(ids, fixture["out/layer_id"].to(ids.dtype))


def check_erk(fixture: Fixture) -> None:
    densities = erk_densities(fixture.meta["shapes"], float(fixture.meta["density"]))
    close(torch.tensor(densities, dtype=torch.float64), fixture["out/densities"], 1e-10, "densities")


def check_erf(fixture: Fixture) -> None:
    model = network(fixture.meta["model"])
    model.load_state_dict(fixture.under("state/"))
    maps = contribution_maps(model.eval().forward_features, fixture["in/x"])
    close(maps, fixture["out/maps"], 1e-9, "maps")
    mean = maps.mean(0)
    close(mean, fixture["out/mean"], 1e-9, "mean")
    scaled = log_scaled(mean)
    close(scaled, fixture["out/log_scaled"], 1e-9, "log-scaled map")
    rectangles = [rectangle(scaled, float(share)) for share in fixture.meta["thresholds"]]
    close(torch.tensor(rectangles, dtype=torch.float64), fixture["out/rectangles"], 1e-9, "rectangles")


CHECKS = {
    "layer": check_layer, "block": check_block, "model": check_model, "dst": check_dst,
    "schedules": check_schedules, "erk": check_erk, "erf": check_erf,
}  # fmt: skip


@pytest.mark.parametrize("path", parity_files(__file__), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    check_parity(path, CHECKS)
