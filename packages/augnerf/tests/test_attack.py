"""The inner maximisation, keys and radii, and the augmentation on fields that are no NeRF."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tenfold_augnerf import (
    KEYS,
    RELEASED,
    Objective,
    Rays,
    RaySampling,
    Renderer,
    Samples,
    Step,
    Variant,
    attack,
    augment,
    create_model,
    describe_budget,
    maximise,
    radius,
    steps_of,
)
from tenfold_augnerf.attack import ascend, flat_norm, project, start
from tenfold_augnerf.augment import reached
from tenfold_augnerf.compositing import composite, intervals
from tenfold_augnerf.models import ModelConfig
from tenfold_augnerf.perturbation import Geometry, broadcast
from tenfold_shared.errors import UserError

GEOMETRY = Geometry(2.0, 6.0, 8, 16, 32, 40, 50, 3)
SAMPLING = RaySampling(2.0, 6.0, 6, 5)


class GridField(nn.Module):
    """A second field type: features interpolated from a grid, linear heads."""

    extra_edges = 0

    def __init__(self, width: int = 6, resolution: int = 5) -> None:
        super().__init__()
        self.width = width
        self.grid = nn.Parameter(torch.randn(1, width, resolution, resolution, resolution))
        self.head = nn.Linear(width + 3, 4)

    def locate(self, rays: Rays, z: torch.Tensor) -> Samples:
        return Samples(rays.origins[:, None] + z[..., None] * rays.directions[:, None])

    def encode(self, samples: Samples) -> torch.Tensor:
        found = F.grid_sample(self.grid, samples.points[None, None] / 4, align_corners=True)
        return found[0, :, 0].movedim(0, -1)

    def heads(self, features: torch.Tensor, views: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([features, views[:, None].expand(*features.shape[:2], 3)], -1))

    def compose(self, raw, z, directions, *, white, noise):
        return composite(raw[..., :3].sigmoid(), F.softplus(raw[..., 3]), intervals(z, directions), z, white=white)


class SamplesOnly(nn.Module):
    """A field that exposes coordinates and samples, but no features."""

    extra_edges, width = 0, 1
    locate, compose, heads = GridField.locate, GridField.compose, GridField.heads


def batch(n: int = 6) -> tuple[Rays, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    origins = torch.tensor([0.0, 0.0, 4.0]) + 0.1 * torch.randn(n, 3, generator=draw)
    directions = torch.tensor([0.0, 0.0, -1.0]) + 0.2 * torch.randn(n, 3, generator=draw)
    rays = Rays(origins, directions, torch.arange(n) % 2, torch.full((n, 1), 0.01))
    return rays, torch.rand(n, 3, generator=draw)


def model_of(kind: str = "tiny", variant: Variant = Variant()) -> Renderer:  # noqa: B008
    torch.manual_seed(0)
    if kind == "grid":
        return Renderer(GridField(), GridField(), sampling=SAMPLING, white=True, variant=variant)
    return create_model(kind, SAMPLING, white=True, variant=variant)


def random_delta(model: Renderer, keys: list[str], n: int = 6, scale: float = 0.1) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    geometry = model.geometry(40, 50, cameras=2)
    return {key: scale * torch.randn(geometry.shape(key, n), generator=draw) for key in keys}


# -- radii ----------------------------------------------------------------------------------------------------------------


def test_radii_by_hand() -> None:
    assert radius("zval_c", 2.0, GEOMETRY) == pytest.approx(2 * 4 / 7 / 2)
    assert radius("zval_f", 1.0, GEOMETRY) == pytest.approx(4 / 15 / 2)
    assert radius("pts_c", 1.0, GEOMETRY) == pytest.approx(2 / 50)  # a pixel is smaller than half a bin
    assert radius("cam_r", 3.0, GEOMETRY) == pytest.approx(math.radians(3))
    assert radius("feat_f", 0.3, GEOMETRY) == 0.3
    assert "of 255 levels" in describe_budget("rgb", 0.1, GEOMETRY)
    assert "1 pixels" in describe_budget("pts_c", 1.0, GEOMETRY)
    for key in KEYS:
        assert key in describe_budget(key, 0.5, GEOMETRY)


@pytest.mark.parametrize(
    ("keys", "options", "words"),
    [
        (["pts"], {}, "'pts' is no perturbation"),
        (["pts_c"], {"eps": [-1.0]}, "radius of pts_c is -1"),
        (["pts_c"], {"eps": [float("nan")]}, "radius of pts_c"),
        (["cam_r"], {}, "cam_r needs cam_t"),
        (["pts_c", "pts_c"], {}, "twice"),
        (["pts_c", "pts_f"], {"eps": [1.0, 1.0, 1.0]}, "3 entries for 2 keys"),
        (["pts_c"], {"alpha": [-0.1]}, "0 or more"),
        (["pts_c"], {"norm": ["l_1"]}, "l_1"),
    ],
)
def test_bad_attacks_are_refused(keys: list[str], options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        steps_of(keys, GEOMETRY, **{"eps": [1.0], "alpha": [0.1], **options})


def test_lists_are_broadcast() -> None:
    settings_ = broadcast(["pts_c", "raw_f"], eps=[0.1, 0.2], iterations=[3])
    assert settings_ == {"pts_c": {"eps": 0.1, "iterations": 3}, "raw_f": {"eps": 0.2, "iterations": 3}}
    steps = steps_of(["raw_c", "raw_f"], GEOMETRY, eps=[0.2, 0.4], alpha=[1.25], relative_alpha=True)
    assert steps["raw_f"].alpha == pytest.approx(0.5)


# -- the ball -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["l_inf", "l_2"]), st.floats(0.0, 2.0), st.integers(0, 1000))
def test_start_step_and_projection_stay_in_the_ball(norm: str, epsilon: float, seed: int) -> None:
    step = Step(epsilon, 0.7, 1, norm)
    draw = torch.Generator().manual_seed(seed)
    delta = start((4, 5, 2), step, draw)
    moved = ascend(delta, torch.randn(4, 5, 2, generator=draw), step)
    for value in (delta, moved, project(10 * delta + 1, step)):
        size = value.abs().max() if norm == "l_inf" else flat_norm(value).max()
        assert float(size) <= epsilon * (1 + 1e-5) + 1e-7


def test_zero_gradients_leave_entries_where_they_are() -> None:
    delta = torch.tensor([[0.01, -0.02]])
    assert torch.equal(ascend(delta, torch.tensor([[0.0, 1.0]]), Step(1.0, 0.1)), torch.tensor([[0.01, 0.08]]))


def test_l2_step_by_hand() -> None:
    moved = ascend(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), Step(10.0, 0.5, 1, "l_2"))
    torch.testing.assert_close(moved, torch.tensor([[0.3, 0.4]]))
    assert torch.allclose(
        ascend(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), Step(0.25, 0.5, 1, "l_2")).norm(), torch.tensor(0.25)
    )


def test_one_step_maximises_a_linear_loss() -> None:
    slope = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    found = maximise(lambda d: (slope * d["rgb"]).sum(-1), {"rgb": torch.zeros(3, 4)}, {"rgb": Step(0.3, 1.0)})
    assert torch.equal(found["rgb"], 0.3 * slope.sign())
    helpful = maximise(
        lambda d: (slope * d["rgb"]).sum(-1), {"rgb": torch.zeros(3, 4)}, {"rgb": Step(0.3, 1.0)}, helpful=True
    )
    assert torch.equal(helpful["rgb"], -0.3 * slope.sign())


@pytest.mark.parametrize("norm", ["l_inf", "l_2"])
def test_worst_is_worse_than_random_and_helpful_is_better(norm: str) -> None:
    model, (rays, truth) = model_of(), batch()
    keys = ["pts_c", "pts_f", "feat_c", "feat_f", "raw_c", "raw_f", "rgb"]
    eps = [0.2, 0.2, 0.05, 0.05, 0.2, 0.2, 0.05]
    steps = steps_of(
        keys, model.geometry(40, 50), eps=eps, alpha=[0.5], iterations=[4], norm=[norm], relative_alpha=True
    )
    objective, draw = Objective(), torch.Generator().manual_seed(0)
    starts = {key: start(model.geometry(40, 50).shape(key, 6), step, draw) for key, step in steps.items()}

    def loss(delta: dict) -> torch.Tensor:
        return objective(model(rays, delta), truth)

    with torch.no_grad():
        random = float(loss(starts).mean())
        worst = float(loss(maximise(loss, starts, steps)).mean())
        best = float(loss(maximise(loss, starts, steps, helpful=True)).mean())
    assert best < random < worst


def test_the_attack_leaves_no_gradient_on_the_weights() -> None:
    model, (rays, truth) = model_of(), batch()
    augment(model, rays, truth, {"pts_c": 0.2, "raw_f": 0.1}, image_size=(40, 50))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_restarts_keep_the_worst_of_each_ray() -> None:
    model, (rays, truth) = model_of(), batch()
    steps = {"raw_f": Step(0.3, 0.0, 0)}  # no ascent: only the starts differ
    starts = [random_delta(model, ["raw_f"], scale=s) for s in (0.05, 0.3, 0.1)]
    objective = Objective()

    def loss(delta: dict) -> torch.Tensor:
        return objective(model(rays, delta), truth)

    found = attack(loss, lambda number: starts[number], steps, restarts=3)
    each = torch.stack([loss(delta) for delta in starts])
    torch.testing.assert_close(loss(found), each.max(0).values)


def test_restarts_keep_the_worst_of_the_batch_for_cameras() -> None:
    """Judged by the mean loss of each restart, whatever the other restarts did to single rays."""
    losses = torch.tensor([[3.0, 0.0], [0.0, 4.0], [2.5, 2.5]])
    steps = dict.fromkeys(("cam_r", "cam_t"), Step(9.0, 0.0, 0))

    def starts(number: int) -> dict[str, torch.Tensor]:
        return dict.fromkeys(steps, torch.full((1, 3), float(number)))

    found = attack(lambda delta: losses[int(delta["cam_r"][0, 0])], starts, steps, restarts=3)
    assert float(found["cam_r"][0, 0]) == 2


# -- which weights hear of it ---------------------------------------------------------------------------------------------

ALL = ["pts_c", "pts_f", "feat_c", "feat_f", "raw_c", "raw_f"]


@pytest.mark.parametrize("kind", ["tiny", "mip-nerf"])
def test_the_third_network_changes_no_other(kind: str) -> None:
    """At one seed every method starts from the same coarse and fine networks, so that seeds pair."""
    shared, released = model_of(kind).state_dict(), model_of(kind, RELEASED).state_dict()
    assert len(released) > len(shared)
    for key, value in shared.items():
        assert torch.equal(value, released[key]), key


def test_shared_branch_reaches_every_evaluated_weight() -> None:
    model, (rays, truth) = model_of(), batch()
    assert all(reached(model, rays, truth, random_delta(model, ALL)).values())


def test_auxiliary_branch_reaches_none_of_them() -> None:
    model, (rays, truth) = model_of(variant=RELEASED), batch()
    for name, there in reached(model, rays, truth, random_delta(model, ALL)).items():
        assert there == name.startswith("nerf_adv."), name


@pytest.mark.parametrize("kind", ["tiny", "grid", "mip-nerf"])
def test_zero_perturbation_is_the_clean_rendering(kind: str) -> None:
    model, (rays, _) = model_of(kind), batch()
    zero = {key: torch.zeros_like(value) for key, value in random_delta(model, list(KEYS)).items()}
    clean, perturbed = model(rays), model(rays, zero)
    torch.testing.assert_close(perturbed.rgb, clean.rgb, atol=1e-6, rtol=0)
    without = {key: value for key, value in zero.items() if not key.startswith(("cam", "dir"))}
    assert torch.equal(model(rays, without).rgb, clean.rgb)  # nothing is recomputed but the sums


def test_zero_perturbation_of_the_auxiliary_branch_differs() -> None:
    model, (rays, _) = model_of(variant=RELEASED), batch()
    zero = {"raw_c": torch.zeros(6, 6, 4)}
    assert float((model(rays, zero).rgb - model(rays).rgb).detach().abs().max()) > 1e-3


def test_released_behaviour_is_on_black_with_inert_colour() -> None:
    rays, _ = batch()
    released, ours = model_of(variant=RELEASED), model_of()
    delta = {"raw_c": torch.zeros(6, 6, 4), "raw_f": torch.zeros(6, 11, 4)}
    colour = {key: value + torch.tensor([1.0, 1.0, 1.0, 0.0]) for key, value in delta.items()}
    assert torch.equal(released(rays, colour).rgb, released(rays, delta).rgb)
    assert float((ours(rays, colour).rgb - ours(rays, delta).rgb).detach().abs().max()) > 1e-3
    shown = released(rays, delta)
    released.white = False
    assert torch.equal(released(rays, delta).rgb, shown.rgb)


def test_moved_samples_are_sorted_again() -> None:
    rays, _ = batch()
    delta = {"zval_f": 2 * torch.randn(6, 11, generator=torch.Generator().manual_seed(0))}
    assert (model_of()(rays, delta).fine.z.diff() >= 0).all()
    unsorted = model_of(variant=Variant(resort=False))(rays, delta).fine.z
    assert (unsorted.diff() < 0).any()


# -- other fields ---------------------------------------------------------------------------------------------------------


def test_augmentation_of_a_grid() -> None:
    model, (rays, truth) = model_of("grid"), batch()
    eps = {"zval_c": 0.5, "pts_f": 0.5, "dir_f": 0.1, "feat_c": 0.1, "feat_f": 0.1, "raw_f": 0.2, "rgb": 0.02}
    delta = augment(model, rays, truth, eps, image_size=(40, 50))
    objective = Objective()
    assert float(objective(model(rays, delta), truth).mean()) > float(objective(model(rays), truth).mean())
    loss = objective(model(rays, delta), truth).mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_cameras_are_attacked_together() -> None:
    """Every ray of a camera gets the same motion, and it makes things worse."""
    model, (rays, truth) = model_of(), batch()
    delta = augment(
        model,
        rays,
        truth,
        {"cam_r": 2.0, "cam_t": 0.05},
        image_size=(40, 50),
        cameras=2,
        iterations=3,
        alpha=0.5,
        norm="l_2",
    )
    assert delta["cam_r"].shape == (2, 3)
    assert float(flat_norm(delta["cam_t"]).max()) <= 0.05 * (1 + 1e-5)
    objective = Objective()
    assert float(objective(model(rays, delta), truth).mean()) > float(objective(model(rays), truth).mean())


def test_a_level_that_is_not_exposed_is_refused() -> None:
    model = Renderer(SamplesOnly(), sampling=SAMPLING)
    with pytest.raises(UserError, match=r"feat_c perturbs the level of features, which nerf \(SamplesOnly\) does not"):
        model.check(["pts_c", "feat_c"])
    model.check(["pts_c", "raw_f"])


def test_a_rendering_refuses_what_it_would_not_apply() -> None:
    rays, _ = batch()
    for keys, words in ((["ptsf"], "no perturbation"), (["cam_r"], "needs cam_t"), (["raw_c"], "coarse pass")):
        model = create_model("tiny", RaySampling(2.0, 6.0, 4, 0))
        with pytest.raises(UserError, match=words):
            model(rays, dict.fromkeys(keys, torch.zeros(1)))


def test_directions_that_no_field_sees_are_refused() -> None:
    model = create_model(ModelConfig(depth=2, width=8, viewdirs=False), SAMPLING)
    with pytest.raises(UserError, match="dir_f perturbs directions"):
        model.check(["pts_c", "dir_f"])


def test_coarse_keys_need_a_coarse_pass() -> None:
    model = create_model("tiny", RaySampling(2.0, 6.0, 6, 0))
    with pytest.raises(UserError, match="raw_f"):
        model.check(["raw_c"])


def test_the_auxiliary_branch_needs_its_network() -> None:
    with pytest.raises(UserError, match="third network"):
        Renderer(GridField(), sampling=SAMPLING, variant=RELEASED)
