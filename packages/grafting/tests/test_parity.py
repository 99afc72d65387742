"""Numbers of the reference engine and of the released training code: every .npz of TENFOLD_PARITY_DIR, by kind."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tenfold_grafting.adversarial import adversarial_loss, attacked, grad_align, trades, two_group_sgd
from tenfold_grafting.bounds import bound_margins, crown_intervals, margin_spec
from tenfold_grafting.grafting import GraftedReLU, graft_activation, graft_parameters
from tenfold_grafting.graph import trace
from tenfold_grafting.intervals import Box, ibp
from tenfold_grafting.optimise import AlphaSettings, alpha_crown_joint
from tenfold_grafting.scores import significance
from tenfold_grafting.selection import keep_masks
from tenfold_grafting.specification import pixel_box
from tenfold_grafting.zoo import load_network
from tenfold_shared.parity import Fixture, check_parity, parity_files

METHODS = ("ibp", "crown-ibp", "crown")


def close(actual, expected, tolerance: float, relative: float = 0.0) -> None:
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=relative, atol=tolerance)


# -- networks of the fixtures ---------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """The fixtures' residual block: c1, b1, r1, c2, b2, and sc where it has a shortcut."""

    def __init__(self, parts: dict[str, nn.Module]):
        super().__init__()
        shortcut = [part for name, part in parts.items() if name.startswith("sc.")]
        for name, part in parts.items():
            if not name.startswith("sc."):
                self.add_module(name, part)
        self.sc = nn.Sequential(*shortcut)

    def forward(self, x):
        return self.r2(self.b2(self.c2(self.r1(self.b1(self.c1(x))))) + self.sc(x))


def layer(kind: str, sizes: list, state: dict[str, Tensor], name: str) -> nn.Module:
    if kind == "conv":
        inputs, outputs, kernel, stride, padding, bias = sizes
        return nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bool(bias))
    if kind == "zeropad_lrtb":
        return nn.ZeroPad2d(tuple(sizes[0]))
    if kind == "grafted":
        return GraftedReLU(state[f"{name}.mask"].shape)
    if kind == "linear":
        return nn.Linear(*sizes[:2], bias=f"{name}.bias" in state)
    simple = {"bn": nn.BatchNorm2d, "relu": nn.ReLU, "avgpool": nn.AvgPool2d, "flatten": nn.Flatten}
    return simple[kind](*sizes)


def network(case: Fixture) -> nn.Module:
    state = case.under("state/")
    layers = case.meta["layers"]
    parts = {}
    for name, kind, *sizes in layers:
        if "." in name:
            continue
        if kind.startswith("residual"):
            inner = {n.partition(".")[2]: layer(k, s, state, n) for n, k, *s in layers if n.startswith(f"{name}.")}
            parts[name] = ResidualBlock(inner)
        else:
            parts[name] = layer(kind, sizes, state, name)
    model = nn.Sequential(*(parts[name] for name in sorted(parts, key=int))).double()
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys), missing.missing_keys
    return model.eval()


def described(text: str, state: dict[str, Tensor], shape: tuple[int, ...]) -> nn.Module:
    """A network such as ``conv(2,4,3,s2,p1) graft flatten linear(64,12) graft linear(12,4)``; relu may be given too."""
    layers: list[nn.Module] = []
    x = torch.zeros(1, *shape)
    for word in re.findall(r"conv\([^)]*\)|linear\([^)]*\)|graft|flatten|relu", text):
        kind, _, inner = word.rstrip(")").partition("(")
        numbers = inner.split(",") if inner else []
        if kind == "conv":
            plain = [int(n) for n in numbers if n.isdigit()]
            options = {n[0]: int(n[1:]) for n in numbers if not n.isdigit()}
            made: nn.Module = nn.Conv2d(*plain, options.get("s", 1), options.get("p", 0))
        elif kind == "linear":
            made = nn.Linear(*map(int, numbers))
        else:
            made = GraftedReLU(x.shape[1:]) if kind == "graft" else {"flatten": nn.Flatten, "relu": nn.ReLU}[kind]()
        layers.append(made)
        x = made(x).detach()
    model = nn.Sequential(*layers).double()
    if state:
        model.load_state_dict(state)
    return model


# -- checks ---------------------------------------------------------------------------------------------------------------


def check_graft_op(case: Fixture) -> None:
    x, slope, bias = (case[f"in/{name}"].requires_grad_() for name in ("x", "slope", "bias"))
    y = graft_activation(x, case["in/mask"], slope, bias)
    close(y.detach(), case["out/y"], 1e-12)
    y.backward(case["in/grad_output"])
    for name, value in (("x", x), ("slope", slope), ("bias", bias)):
        close(value.grad, case[f"grad/{name}"], 1e-12)


def check_alpha(lower: Tensor, crown: Tensor, reference: Tensor, limit: Tensor) -> None:
    assert bool((lower >= crown - 1e-9).all())
    assert bool((lower >= reference - 0.02 * (reference - crown) - 1e-4).all()), (lower - reference).min()
    assert bool((lower <= limit + 1e-9).all())


def check_net(case: Fixture) -> None:
    model = network(case)
    graph = trace(model, case["in/x"].shape[1:])
    close(model(case["in/x"]).detach(), case["out/logits"], 1e-8)
    close(graph(case["in/x"]), case["out/logits"], 1e-8)
    box = Box(case["in/lo"], case["in/hi"])
    spec = case["in/C"]
    close(margin_spec(case["in/y"], spec.shape[2]), spec, 0)
    eye = torch.eye(spec.shape[2], dtype=torch.float64).expand(len(spec), -1, -1)
    for method in METHODS:
        name = method.replace("-", "_")
        close(bound_margins(graph, box, eye, method, intersect=False), case[f"out/{name}_lb"], 1e-8)
        close(-bound_margins(graph, box, -eye, method, intersect=False), case[f"out/{name}_ub"], 1e-8)
        close(bound_margins(graph, box, spec, method, intersect=False), case[f"out/{name}_margin_lb"], 1e-8)
    intervals, _ = crown_intervals(graph, box, intersect=False)
    for number, (lower, upper) in enumerate(intervals.values()):
        close(lower, case[f"out/pre{number}_lower"], 1e-8)
        close(upper, case[f"out/pre{number}_upper"], 1e-8)
    if "out/alpha_margin_lb" in case:
        a = case.meta["alpha"]
        settings = AlphaSettings(a["iterations"], a["lr"], a["decay"])
        found = alpha_crown_joint(graph, box, spec, intervals, settings).lower
        reference, crown = case["out/alpha_margin_lb"], case["out/crown_margin_lb"]
        check_alpha(found, crown, reference, case["out/sampled_margin_min"])


def model_folder(name: str) -> Path:
    folders = [Path(__file__).parents[4] / "shared" / "data" / "verification"]
    if "TENFOLD_PARITY_DIR" in os.environ:
        here = Path(os.environ["TENFOLD_PARITY_DIR"]).resolve()
        folders = [here / "models", here.parents[1] / "data" / "verification", *folders]
    for folder in folders:
        if (folder / f"{name}.npz").is_file():
            return folder
    pytest.fail(f"the network {name}.npz is in none of {', '.join(map(str, folders))}")


def check_bounds(case: Fixture) -> None:
    meta = case.meta
    model, about = load_network(model_folder(meta["model"]) / f"{meta['model']}.npz")
    graph = trace(model.double(), about["input_shape"])
    x = case["in/x_uint8"].double() / 255
    eps, labels = float(case["in/eps"]), case["in/y"]
    close(graph(x), case["out/logits"], 1e-6, 1e-6)
    box = pixel_box(graph, x, eps)
    spec = margin_spec(labels, graph.classes)
    limit = case["out/attack_margin_ub"]
    for method in METHODS:
        pure = bound_margins(graph, box, spec, method, intersect=False)
        close(pure, case[f"out/{method}_lb"], 1e-6, 1e-6)
        assert bool((bound_margins(graph, box, spec, method) <= limit).all())
    crown, _ = crown_intervals(graph, box, intersect=False)
    for method, intervals in (("ibp", ibp(graph, box)[0]), ("crown", crown)):
        for number, interval in enumerate(intervals.values()):
            for end, value in zip(("lower", "upper"), interval, strict=True):
                entry = f"out/{method}_pre{number}_{end}"
                if entry in case:
                    close(value[0], case[entry], 1e-6, 1e-6)
    if "out/alpha_lb" in case:
        settings = AlphaSettings(meta["iters"], meta["lr_alpha"], meta["lr_decay"])
        found = alpha_crown_joint(graph, box, spec, crown, settings).lower
        check_alpha(found, case["out/crown_lb"], case["out/alpha_lb"], limit)


def check_train_step(case: Fixture) -> None:
    cfg = case.meta
    state = case.under("state/")
    model = described(cfg["arch"], state, case["in/x"].shape[2:])
    lines, weights = graft_parameters(model)
    optimiser = two_group_sgd(
        lines,
        weights,
        lr_lines=cfg["lr_graft"],
        lr_weights=cfg["lr_weight"],
        momentum=cfg["momentum"],
        weight_decay=cfg["wd"],
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, cfg["T_max"])
    for i in range(cfg["steps"]):
        x, y = case["in/x"][i], case["in/y"][i]
        noise = case["in/noise_attack"][i]
        model.train()
        bad = attacked(model, x, y, cfg["eps"], cfg["alpha"], cfg["attack_steps"], noise)
        assert model.training
        close(bad - x, case[f"out/delta{i}"], 1e-9)
        loss = adversarial_loss(model, bad, y)
        if cfg["grad_align"]:
            term = grad_align(model, x, y, cfg["eps"], case["in/noise_align"][i])
            weighted = cfg["grad_align"] * term
            reference = case["out/reg"][i]
            known = min(abs(float(term.detach() - reference)), abs(float(weighted.detach() - reference)))
            assert known < 1e-9
            loss = loss + weighted
        close(loss.detach(), case["out/loss"][i], 1e-9)
        optimiser.zero_grad()
        loss.backward()
        if i == 0:
            for name, parameter in model.named_parameters():
                close(parameter.grad, case[f"grad/{name}"], 1e-9)
        optimiser.step()
        schedule.step()
    for name, value in model.state_dict().items():
        close(value, case[f"out/after/{name}"], 1e-9)


def check_trades(case: Fixture) -> None:
    cfg = case.meta
    arch = cfg["arch"]
    if arch == "same as train_step fixtures":
        arch = "conv(2,4,3,s2,p1) graft flatten linear(64,12) graft linear(12,4)"
    state = case.under("state/")
    model = described(arch, state, case["in/x"].shape[1:])
    model.train()
    loss = trades(
        model,
        case["in/x"],
        case["in/y"],
        eps=cfg["eps"],
        step=cfg["step"],
        steps=cfg["steps"],
        beta=cfg["beta"],
        noise=case["in/noise"],
    )
    close(loss.detach(), case["out/loss"], 1e-9)
    close(model(case["in/x"]).detach(), case["out/logits"], 1e-9)
    loss.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, case[f"grad/{name}"], 1e-9)


def check_scores(case: Fixture) -> None:
    cfg = case.meta
    state = case.under("state/")
    model = described(cfg["arch"].partition(";")[0], {}, case["in/x"].shape[1:])
    weighted = [m for m in model if list(m.parameters())]
    for name, module in zip(dict.fromkeys(key.rpartition(".")[0] for key in state), weighted, strict=True):
        module.load_state_dict({"weight": state[f"{name}.weight"], "bias": state[f"{name}.bias"]})
    counts = case["in/counts"]
    x = case["in/x"].repeat_interleave(counts, 0)
    y = case["in/y"].repeat_interleave(counts, 0)
    batches = list(zip(x.split(128), y.split(128), strict=True))
    keep = float(re.search(r"top (\d+)%", cfg["note"]).group(1)) / 100
    found = {kind: significance(model, batches, kind) for kind in ("gradient", "magnitude")}
    for kind, scores in found.items():
        for number, score in enumerate(scores.values()):
            close(score, case[f"out/{kind}_{number}"], 1e-10)
    for scope in ("global", "local"):
        for number, mask in enumerate(keep_masks(found["magnitude"], keep, scope).values()):
            assert torch.equal(mask, case[f"out/{scope}_mask_{number}"])


CHECKS = {
    "bounds": check_bounds,
    "graft_op": check_graft_op,
    "net": check_net,
    "scores_and_masks": check_scores,
    "trades": check_trades,
    "train_step": check_train_step,
}


@pytest.mark.parametrize("path", parity_files(__file__), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    check_parity(path, CHECKS)
