"""The released layouts: loading, refusing, exporting."""

import logging
from pathlib import Path

import pytest
import torch

from tenfold_augnerf import (
    RELEASED,
    CheckpointError,
    ModelConfig,
    Rays,
    RaySampling,
    create_model,
    load_official_checkpoint,
    to_official,
)
from tenfold_augnerf.compat import from_keras, recognise
from tenfold_shared.errors import UserError

SAMPLING = RaySampling(2.0, 6.0, 4, 4)
SMALL = {
    "plain": ModelConfig(depth=6, width=16, octaves=5, view_octaves=2),
    "no views": ModelConfig(depth=8, width=16, octaves=4, viewdirs=False),
    "identity": ModelConfig(depth=3, width=16, use_embed=False),
    "points alone": ModelConfig(depth=3, width=16, octaves=0, view_octaves=2),
    "conv": ModelConfig(depth=2, width=16, octaves=3, view_octaves=1, conv_embed=True),
    "mip": ModelConfig(kind="mip-nerf", depth=6, width=16, octaves=4, view_octaves=2),
}


@pytest.mark.parametrize("name", list(SMALL))
def test_sizes_are_recognised_and_files_round_trip(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(SMALL[name], SAMPLING)
    checkpoint = to_official(model, step=12)
    assert set(checkpoint) == {"global_step", "model", "optimizer"}
    path = tmp_path / "00000012.ckpt"
    torch.save(checkpoint, path)
    loaded = load_official_checkpoint(path, SAMPLING)
    torch.optim.Adam(loaded.parameters()).load_state_dict(torch.load(path, weights_only=True)["optimizer"])
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    found = recognise(model.state_dict())
    assert (found.kind, found.depth, found.width, found.viewdirs) == (
        SMALL[name].kind, SMALL[name].depth, 16, SMALL[name].viewdirs
    )  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "nerf", "mip-nerf"])
def test_a_reloaded_field_renders_what_it_rendered(name: str, tmp_path: Path) -> None:
    """Also with a density that the released layout does not know: the file names it, and says nothing else."""
    torch.manual_seed(0)
    model = create_model(name, SAMPLING, white=True)
    checkpoint = to_official(model)
    assert checkpoint.keys() - {"global_step", "model", "optimizer"} == ({"density"} if name == "tiny" else set())
    torch.save(checkpoint, tmp_path / "00000000.ckpt")
    loaded = load_official_checkpoint(tmp_path / "00000000.ckpt", SAMPLING, white=True)
    directions = torch.tensor([0.0, 0.0, -1.0]) + 0.2 * torch.randn(5, 3)
    rays = Rays(torch.tensor([[0.0, 0.0, 4.0]]).expand(5, 3), directions, None, torch.full((5, 1), 0.01))
    with torch.no_grad():
        before, after = model(rays), loaded(rays)
    assert torch.equal(before.rgb, after.rgb)
    assert torch.equal(before.acc, after.acc)
    assert float(before.acc.max()) > 0.1, "an empty scene would prove nothing"


def test_an_unknown_density_is_refused() -> None:
    checkpoint = to_official(create_model(SMALL["plain"], SAMPLING))
    with pytest.raises(CheckpointError, match="density is 'exp': the activations are relu, softplus"):
        load_official_checkpoint({**checkpoint, "density": "exp"}, SAMPLING)


def test_names_are_the_released_ones() -> None:
    names = list(create_model("reference", SAMPLING, variant=RELEASED).state_dict())
    assert len(names) == 72
    assert names[0] == "nerf.mlp.pts_linears.0.weight"
    assert {
        f"nerf_adv.mlp.{n}.weight" for n in ("alpha_linear", "feature_linear", "views_linears.0", "rgb_linear")
    } <= set(names)
    state = create_model("reference", SAMPLING).state_dict()
    shapes = {
        n: tuple(state[f"nerf.mlp.{n}.weight"].shape) for n in ("pts_linears.0", "pts_linears.5", "views_linears.0")
    }
    assert shapes == {"pts_linears.0": (512, 63), "pts_linears.5": (512, 575), "views_linears.0": (256, 539)}


def test_the_auxiliary_network_is_dropped_with_a_message(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    released = create_model(SMALL["plain"], SAMPLING, variant=RELEASED)
    with caplog.at_level(logging.WARNING):
        loaded = load_official_checkpoint(to_official(released), SAMPLING)
    assert "nerf_adv is left out" in caplog.text
    assert torch.equal(loaded.nerf_fine.mlp.rgb_linear.weight, released.nerf_fine.mlp.rgb_linear.weight)
    kept = load_official_checkpoint(to_official(released), SAMPLING, auxiliary=True)
    assert torch.equal(kept.nerf_adv.mlp.rgb_linear.weight, released.nerf_adv.mlp.rgb_linear.weight)


def test_networks_of_nerf_pytorch() -> None:
    model = create_model(SMALL["plain"], SAMPLING)
    networks = {
        f"network_{name}_state_dict": {
            key.removeprefix(f"{branch}.mlp."): value
            for key, value in model.state_dict().items()
            if key.startswith(f"{branch}.")
        }
        for name, branch in (("fn", "nerf"), ("fine", "nerf_fine"))
    }
    loaded = load_official_checkpoint({"global_step": 1, **networks}, SAMPLING)
    assert torch.equal(loaded.nerf_fine.mlp.pts_linears[5].weight, model.nerf_fine.mlp.pts_linears[5].weight)


def test_keras_arrays() -> None:
    model = create_model(SMALL["plain"], SAMPLING)
    mlp = model.nerf.mlp
    layers = [*mlp.pts_linears, mlp.feature_linear, mlp.views_linears[0], mlp.rgb_linear, mlp.alpha_linear]
    arrays = [x.detach().numpy().copy() for layer in layers for x in (layer.weight.T, layer.bias)]
    state = from_keras(arrays)
    assert {f"nerf.{name}" for name in model.nerf.state_dict()} == set(state)
    for name, value in model.nerf.state_dict().items():
        assert torch.equal(state[f"nerf.{name}"], value)
    with pytest.raises(CheckpointError, match="7 arrays"):
        from_keras(arrays[:7])


def test_misfits_are_listed(tmp_path: Path) -> None:
    state = to_official(create_model(SMALL["plain"], SAMPLING))["model"]
    partial = {name: value for name, value in state.items() if "nerf_fine.mlp.rgb_linear" not in name}
    with pytest.raises(
        CheckpointError, match=r"missing nerf_fine.mlp.rgb_linear.weight; missing nerf_fine.mlp.rgb_linear.bias"
    ):
        load_official_checkpoint(partial, SAMPLING)
    wrong = {**state, "nerf.mlp.alpha_linear.weight": torch.zeros(2, 16)}
    with pytest.raises(CheckpointError, match=r"alpha_linear.weight has shape \(2, 16\) instead of \(1, 16\)"):
        load_official_checkpoint(wrong, SAMPLING)
    with pytest.raises(CheckpointError, match=r"keys of no network.*encoder.weight"):
        load_official_checkpoint({"encoder.weight": torch.zeros(2)}, SAMPLING)
    with pytest.raises(CheckpointError, match="no state dict"):
        load_official_checkpoint({"model": {}}, SAMPLING)
    path = tmp_path / "broken.ckpt"
    path.write_bytes(b"\x80\x02nothing")
    with pytest.raises(UserError, match=r"broken.ckpt"):
        load_official_checkpoint(path, SAMPLING)
