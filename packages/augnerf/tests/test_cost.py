"""The outer step, and its modes of cost: each gives the gradients of the plain computation where it is exact."""

import contextlib
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tenfold_augnerf import (
    Adversary,
    Batch,
    Objective,
    Rays,
    RaySampling,
    Renderer,
    Step,
    Variant,
    accumulate,
    create_model,
)
from tenfold_augnerf.attack import ascend
from tenfold_augnerf.objective import detached, free_replay, frozen, random_starts
from tenfold_augnerf.schedules import RadiusControl, RadiusSchedule, learning_rate
from tenfold_augnerf.trunk import plain, trunk
from tenfold_augnerf.weights import WeightPerturbation, sharpness_aware
from tenfold_shared.errors import UserError

LOW = ["zval_c", "zval_f", "pts_c", "pts_f", "dir_f", "feat_c", "feat_f", "raw_c", "raw_f", "rgb"]
HIGH = ["dir_c", "feat_c", "feat_f", "raw_c", "raw_f", "rgb"]


def setting(n: int = 7, white: bool = True, kind: str = "tiny") -> tuple[Renderer, Batch]:
    torch.manual_seed(0)
    model = create_model(kind, RaySampling(2.0, 6.0, 6, 5), white=white).double()
    draw = torch.Generator().manual_seed(1)
    origins = torch.tensor([0.0, 0.0, 4.0]) + 0.1 * torch.randn(n, 3, generator=draw)
    directions = torch.tensor([0.0, 0.0, -1.0]) + 0.2 * torch.randn(n, 3, generator=draw)
    rays = Rays(origins.double(), directions.double(), torch.arange(n) % 2, torch.full((n, 1), 0.01).double())
    draws = model.draws(n, draw, noise_std=0.3)
    draws = type(draws)(*(None if x is None else x.double() for x in draws))
    return model, Batch(rays, torch.rand(n, 3, generator=draw).double(), draws)


def gradients(model: Renderer) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=tolerance, rtol=1e-7)


def steps_of_keys(keys: list[str], norm: str = "l_inf", iterations: int = 1) -> dict[str, Step]:
    sizes = {"zval": 0.1, "pts": 0.02, "dir": 0.05, "feat": 0.05, "raw": 0.2, "rgb": 0.02}
    return {k: Step(sizes[k.split("_")[0]], 0.8 * sizes[k.split("_")[0]], iterations, norm) for k in keys}


def zeros(model: Renderer, steps: Mapping[str, Step], n: int = 7):
    return random_starts(steps, model.geometry(40, 50), n, torch.Generator(), torch.float64, zero=True)


@pytest.mark.parametrize("chunk", [0, 2, 3])
def test_chunks_give_the_gradients_of_the_whole_batch(chunk: int) -> None:
    model, batch = setting()
    rendering = model(batch.rays, draws=batch.draws)
    loss = Objective()(rendering, batch.truth).mean()
    loss.backward()
    expected = gradients(model)
    losses = accumulate(model, batch, chunk=chunk)
    same(gradients(model), expected)
    torch.testing.assert_close(losses.clean, loss.detach())
    error = (rendering.rgb.detach() - batch.truth).square().mean()
    torch.testing.assert_close(losses.psnr, -10 * error.log10())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("skip", [False, True])
def test_backward_pass_of_the_rows_that_count(share: float, skip: bool) -> None:
    """The trunk's own backward pass gives autograd's gradients, whatever share of the rows has one."""
    draw = torch.Generator().manual_seed(0)
    sizes = [7, 6, 6 + 7 * skip, 6]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    parameters = [drawn(*shape).requires_grad_() for size in sizes for shape in ((6, size), (6,))]
    encoded = drawn(4, 25, 7).requires_grad_()
    gradient = drawn(4, 25, 6) * (torch.rand(4, 25, 1, generator=draw) < share)
    expected, found = plain(encoded, parameters), trunk(encoded, parameters)
    torch.testing.assert_close(found, expected)
    inputs = [encoded, *parameters]
    pairs = zip(*(torch.autograd.grad(h, inputs, gradient) for h in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_samples_without_density_stay_out_of_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a ReLU density, gradients are those of autograd though the products have fewer rows."""
    model, batch = setting()
    for field in (model.nerf, model.nerf_fine):
        field.density = "relu"
    loss = Objective()(model(batch.rays, draws=batch.draws), batch.truth).mean()
    loss.backward()
    found = gradients(model)
    features = model(batch.rays, draws=batch.draws, taps=["feat_f"])
    Objective()(features, batch.truth).mean().backward()
    counted = features.sites["feat_f"].grad.abs().amax(-1) != 0
    assert 0 < int(counted.sum()) < counted.numel(), "some samples have a density and some have none"
    model.zero_grad()
    monkeypatch.setattr("tenfold_augnerf.fields.trunk", plain)
    Objective()(model(batch.rays, draws=batch.draws), batch.truth).mean().backward()
    same(found, gradients(model))


def test_attacks_leave_the_weights_out() -> None:
    model, _ = setting()
    model.nerf.mlp.alpha_linear.bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("mix", ["convex", "additive"])
def test_outer_loss_by_hand(chunk: int, mix: str) -> None:
    model, batch = setting()
    steps = steps_of_keys(LOW, iterations=2)
    adversary = Adversary(steps, weight=0.3, mix=mix)
    starts = random_starts(
        steps, model.geometry(40, 50), 7, torch.Generator().manual_seed(3), torch.float64, zero=False
    )
    objective = Objective()
    delta = {key: value.clone() for key, value in starts(0, slice(0, 7)).items()}
    for _ in range(2):  # with a full backward pass, weight gradients included
        leaves = {key: value.requires_grad_() for key, value in delta.items()}
        objective(model(batch.rays, leaves), batch.truth).mean().backward()
        delta = {key: ascend(leaf.detach(), leaf.grad, steps[key]) for key, leaf in leaves.items()}
        model.zero_grad()
    clean = objective(model(batch.rays, draws=batch.draws), batch.truth).mean()
    worst = objective(model(batch.rays, delta), batch.truth).mean()
    ((0.7 if mix == "convex" else 1.0) * clean + 0.3 * worst).backward()
    expected = gradients(model)
    losses = accumulate(model, batch, adversary, starts, chunk=chunk)
    same(gradients(model), expected)
    torch.testing.assert_close(losses.adversarial, worst.detach())


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
@pytest.mark.parametrize("kind", ["tiny", "mip-nerf"])
def test_reuse_is_plain_fgsm(norm: str, kind: str) -> None:
    """Without jitter, the clean backward pass gives the δ and the gradients of an attack of its own from zero."""
    model, batch = setting(kind=kind)
    batch = batch._replace(draws=type(batch.draws)())
    steps = steps_of_keys(LOW, norm)
    accumulate(model, batch, Adversary(steps, zero_start=True), zeros(model, steps))
    expected = gradients(model)
    losses = accumulate(model, batch, Adversary(steps, cost="reuse"), zeros(model, steps), chunk=3)
    same(gradients(model), expected, 1e-9)
    assert losses.adversarial > losses.clean


def test_heads_share_the_samples_and_features() -> None:
    """Equal to renderings that compute everything anew at the clean pass's samples."""
    model, batch = setting()
    steps = steps_of_keys(HIGH, iterations=2)
    starts = random_starts(
        steps, model.geometry(40, 50), 7, torch.Generator().manual_seed(3), torch.float64, zero=False
    )
    objective = Objective()

    def anew(delta: Mapping[str, Tensor]) -> Tensor:
        clean = model(batch.rays, draws=batch.draws)
        total = torch.zeros(7, dtype=torch.float64)
        for which, field, old in (("c", model.nerf, clean.coarse), ("f", model.nerf_fine, clean.fine)):
            features = field.encode(field.locate(clean.rays, old.z.detach())) + delta[f"feat_{which}"]
            views = clean.views
            if f"dir_{which}" in delta:
                views = torch.nn.functional.normalize(views + delta[f"dir_{which}"], dim=-1)
            raw = field.heads(features, views) + delta[f"raw_{which}"]
            rgb = field.compose(raw, old.z.detach(), clean.rays.directions, white=True, noise=None).rgb
            rgb = rgb + delta["rgb"] if which == "f" else rgb
            total = total + (rgb - batch.truth).square().mean(-1)
        return total

    delta = dict(starts(0, slice(0, 7)))
    for _ in range(2):
        leaves = {key: value.detach().requires_grad_() for key, value in delta.items()}
        found = torch.autograd.grad(anew(leaves).mean(), list(leaves.values()))
        delta = {key: ascend(leaves[key].detach(), g, steps[key]) for key, g in zip(leaves, found, strict=True)}
    clean = objective(model(batch.rays, draws=batch.draws), batch.truth).mean()
    (0.5 * clean + 0.5 * anew(delta).mean()).backward()
    expected = gradients(model)
    losses = accumulate(model, batch, Adversary(steps, cost="heads"), starts, chunk=4)
    same(gradients(model), expected)
    torch.testing.assert_close(losses.adversarial, anew(delta).mean().detach())


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_free_replay_is_the_outer_step_and_one_ascent(chunk: int, norm: str) -> None:
    model, batch = setting()
    steps = steps_of_keys(LOW, norm)
    adversary = Adversary(steps, weight=0.4)
    starts = random_starts(
        steps, model.geometry(40, 50), 7, torch.Generator().manual_seed(3), torch.float64, zero=False
    )
    delta = dict(starts(0, slice(0, 7)))
    alive = []
    handle = model.register_forward_pre_hook(lambda module, inputs: alive.append(len(inputs[0].origins)))
    losses, following = free_replay(model, batch, adversary, delta, chunk=chunk)
    handle.remove()
    assert max(alive) == (chunk or 7)
    found = gradients(model)
    leaves = {key: value.detach().requires_grad_() for key, value in delta.items()}
    objective = Objective()
    worst = objective(model(batch.rays, leaves), batch.truth).mean()
    clean = objective(model(batch.rays, draws=batch.draws), batch.truth).mean()
    (0.6 * clean + 0.4 * worst).backward()
    same(found, gradients(model))
    torch.testing.assert_close(losses.adversarial, worst.detach())
    torch.testing.assert_close(losses.clean, clean.detach())
    for key, leaf in leaves.items():
        torch.testing.assert_close(following[key], ascend(leaf.detach(), leaf.grad, steps[key]))


def test_free_replay_keeps_the_cameras_whole() -> None:
    """A camera's perturbation is moved by all of its rays, so that chunks change nothing."""
    model, batch = setting()
    steps = {"cam_r": Step(0.01, 0.004, 1, "l_2"), "cam_t": Step(0.02, 0.01, 1, "l_2")}
    delta = {key: torch.full((2, 3), 0.001, dtype=torch.float64) for key in steps}
    _, whole = free_replay(model, batch, Adversary(steps), delta)
    model.zero_grad()
    _, cut = free_replay(model, batch, Adversary(steps), delta, chunk=2)
    same(cut, whole)


def test_weights_are_perturbed_under_the_perturbations() -> None:
    """AWP with keys (section 2.4): the attack first, then the weights for the loss under it, then both outer renderings."""
    model, batch = setting()
    steps = steps_of_keys(LOW)
    starts = random_starts(
        steps, model.geometry(40, 50), 7, torch.Generator().manual_seed(3), torch.float64, zero=False
    )
    objective, awp, whole = Objective(), WeightPerturbation(model, gamma=0.02), slice(0, 7)
    with frozen(model):
        leaves = {key: value.clone().requires_grad_() for key, value in starts(0, whole).items()}
        found = torch.autograd.grad(objective(model(batch.rays, leaves), batch.truth).mean(), list(leaves.values()))
    delta = {key: ascend(leaves[key].detach(), g, steps[key]) for key, g in zip(leaves, found, strict=True)}
    direction = awp.direction(model, lambda net: objective(net(batch.rays, delta), batch.truth).mean())
    with awp.applied(model, direction):
        worst = objective(model(batch.rays, delta), batch.truth).mean()
        (0.5 * objective(model(batch.rays, draws=batch.draws), batch.truth).mean() + 0.5 * worst).backward()
    expected = gradients(model)
    other = WeightPerturbation(model, gamma=0.02)
    with contextlib.ExitStack() as stack:

        def perturb(loss) -> None:
            stack.enter_context(other.applied(model, other.direction(model, loss)))

        losses = accumulate(model, batch, Adversary(steps), starts, perturb_weights=perturb)
    same(gradients(model), expected)
    torch.testing.assert_close(losses.adversarial, worst.detach())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cost": "heads", "steps": steps_of_keys(["pts_c"])}, "pts_c moves samples"),
        ({"cost": "reuse", "steps": steps_of_keys(["raw_c"], iterations=2)}, "one ascent step"),
        ({"cost": "reuse", "mode": "random", "steps": steps_of_keys(["raw_c"])}, "one ascent step"),
        ({"cost": "reuse", "steps": {"cam_r": Step(1, 1), "cam_t": Step(1, 1)}}, "camera keys"),
        ({"cost": "reuse", "weight": 1.0, "steps": steps_of_keys(["raw_c"])}, "lambda 1 gives no weight"),
        ({"weight": 1.5}, "lambda"),
    ],
)
def test_modes_that_do_not_fit_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Adversary(**options)


def test_shared_samples_do_not_follow_moved_ones() -> None:
    model, batch = setting()
    fixed = detached(model(batch.rays, keep_features=True))
    with pytest.raises(UserError, match="moves samples"):
        model(batch.rays, {"pts_c": torch.zeros(7, 6, 3).double()}, fixed=fixed)


def test_robust_losses() -> None:
    model, batch = setting()
    for kind in ("huber", "trimmed"):
        losses = accumulate(model, batch, objective=Objective(1.0, kind), chunk=2)
        found = gradients(model)
        plain = accumulate(model, batch)
        assert losses.clean <= plain.clean
        assert any(not torch.equal(found[name], value) for name, value in gradients(model).items())


# -- weights --------------------------------------------------------------------------------------------------------------


def test_weight_perturbation_raises_the_loss_and_is_taken_off() -> None:
    model, batch = setting()
    awp = WeightPerturbation(model, gamma=0.01, lr=5e-4)

    def loss(model: Renderer) -> Tensor:
        return Objective()(model(batch.rays), batch.truth).mean()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    direction = awp.direction(model, loss)
    for name, value in direction.items():
        assert value.ndim > 1
        torch.testing.assert_close(value.norm(), before[name].norm())
    clean = float(loss(model).detach())
    with awp.applied(model, direction):
        assert float(loss(model).detach()) > clean
    same(model.state_dict(), before, 1e-15)
    other = WeightPerturbation(model)
    other.load_state_dict(awp.state_dict())
    same(awp.direction(model, loss), other.direction(model, loss))


def test_sharpness_aware_step_by_hand() -> None:
    model, batch = setting()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accumulate(model, batch)
    held = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in held.values()]).norm()
    with sharpness_aware(model, 0.05):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), before[name] + 0.05 * held[name] / norm)
            assert parameter.grad is None
    same(model.state_dict(), before, 0.0)


# -- schedules ------------------------------------------------------------------------------------------------------------


def test_learning_rate_is_exponential() -> None:
    assert learning_rate(250_000) == pytest.approx(5e-5)
    assert learning_rate(125_000, 1.0, 0.01, 125_000) == pytest.approx(0.01)


def test_radii_warm_up_ramp_and_anneal() -> None:
    schedule = RadiusSchedule(0.2, 0.4, 0.2)
    assert [schedule.share(step, 10) for step in (0, 1, 2, 4, 6, 8, 9)] == pytest.approx([0, 0, 0, 0.5, 1, 1, 0.5])
    assert RadiusSchedule().share(0, 10) == 1.0
    with pytest.raises(UserError, match="fractions"):
        RadiusSchedule(0.8, 0.4)


def test_control_finds_the_ratio() -> None:
    """On a loss that rises linearly with the scale, the ratio settles at its target."""
    control = RadiusControl(1.5, rate=0.1)
    for _ in range(100):
        control.observe(1.0, 1.0 + 0.1 * control.scale)
    assert 1 + 0.1 * control.scale == pytest.approx(1.5, rel=0.02)
    other = RadiusControl(1.5)
    other.load_state_dict(control.state_dict())
    assert other.scale == control.scale


def test_weights_that_move_are_seen_under_autocast() -> None:
    """Half precision keeps copies of the weights for the length of a step, in which SAM and AWP move them."""
    model, batch = setting(n=16)
    model = model.float()
    batch = Batch(Rays(batch.rays.origins.float(), batch.rays.directions.float()), batch.truth.float())
    direction = {name: 0.3 * p.detach() for name, p in model.named_parameters() if p.ndim > 1}
    awp = WeightPerturbation(model, gamma=1.0)
    for perturbed in (lambda: sharpness_aware(model, rho=0.5), lambda: awp.applied(model, direction)):
        found = []
        for fresh in (True, False):
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                before = accumulate(model, batch).clean
                with perturbed():
                    if fresh:
                        stack.close()
                        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                    found.append(accumulate(model, batch).clean)
                torch.testing.assert_close(accumulate(model, batch).clean, before, rtol=1e-3, atol=0)
            model.zero_grad()
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=0)


def test_reuse_under_autocast_keeps_the_precision_of_radii() -> None:
    """Gradients of raw values are of half precision there; perturbations are not, as those of the plain attack."""
    model, batch = setting(n=16)
    model = model.float()
    batch = Batch(Rays(batch.rays.origins.float(), batch.rays.directions.float()), batch.truth.float())
    seen: list[torch.dtype] = []
    steps = steps_of_keys(["pts_f", "feat_f", "raw_c", "raw_f"])
    model.register_forward_pre_hook(lambda _, given: seen.extend(d.dtype for x in given[1:2] if x for d in x.values()))
    with torch.autocast("cpu", torch.bfloat16):
        accumulate(model, batch, Adversary(steps, cost="reuse"), lambda number, rows: {})
    assert seen == 4 * [torch.float32]


def test_reuse_needs_the_clean_background() -> None:
    """Where perturbed renderings are on black, the clean pass's gradient is another one's."""
    fields = (create_model("tiny", RaySampling(2.0, 6.0, 6, 5)).nerf for _ in range(2))
    model = Renderer(*fields, sampling=RaySampling(2.0, 6.0, 6, 5), variant=Variant(white_in_adversarial=False))
    _, batch = setting()
    adversary = Adversary(steps_of_keys(["raw_f"]), cost="reuse")
    with pytest.raises(UserError, match="clean background"):
        accumulate(model, batch, adversary, lambda number, rows: {})
