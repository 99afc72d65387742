"""Numbers of the released implementation, every fixture of every kind."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate as resize

from tenfold_shared.testing import Fixture, load_fixture, parity_files
from tenfold_simple3dformer.backbone import create_vit, freeze_image_path
from tenfold_simple3dformer.baselines import PointTransformer
from tenfold_simple3dformer.compat import load_official_state, official_key
from tenfold_simple3dformer.lwf import lwf_loss
from tenfold_simple3dformer.point import RELEASED_PRESETS, PointFormer
from tenfold_simple3dformer.pointops import (
    ball_query,
    farthest_point_sampling,
    gather_points,
    interpolate,
    nearest_neighbours,
    normalise_points,
    squared_distances,
)
from tenfold_simple3dformer.abstraction import SetAbstraction
from tenfold_simple3dformer.voxel import VoxelFormer, released_name

FILES = parity_files(__file__)


def tensor(case: Fixture, name: str) -> Tensor:
    return torch.from_numpy(np.array(case.arrays[name]))


def close(actual: object, expected: object, tolerance: float) -> None:
    """|actual - expected| <= tolerance * max(1, max |expected|)."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape
    atol = tolerance * max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(actual.detach().double(), expected.double(), rtol=0, atol=atol)


def state(case: Fixture, prefix: str = "state/") -> dict[str, Tensor]:
    return {k.removeprefix(prefix): tensor(case, k) for k in case.arrays if k.startswith(prefix)}


def check_gradients(case: Fixture, model: nn.Module, tolerance: float) -> None:
    """Every gradient that the fixture has; a parameter of ours that it lacks there proves nothing."""
    own = {official_key(model, name): p.grad for name, p in model.named_parameters()}
    for name, expected in state(case, "grad/").items():
        grad = own[name]
        assert grad is not None, name
        close(grad.reshape(expected.shape), expected, tolerance)


def vit(case: Fixture, **options: object):
    cfg = case.meta
    return create_vit("tiny", heads=cfg["num_heads"], depth=cfg["depth"], embed_dim=cfg["embed_dim"], **options)


def voxel_model(case: Fixture, **options: object) -> VoxelFormer:
    cfg = case.meta
    head = "linear" if cfg.get("head", "default") == "default" else "cosine"
    name = released_name(cfg["embed_layer"], cfg["pos_embedding"])
    model = VoxelFormer(
        vit(case, mlp_ratio=cfg.get("mlp_ratio", 4)), cfg["n_classes"], name, voxels=cfg["voxel_size"], cell=cfg["cell_size"],
        head=head, **options,
    ).double()  # fmt: skip
    for module in model.vit.modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == cfg.get("ln_eps", 1e-6)
    assert model.grid[0] == cfg["patch_size"]
    load_official_state(model, state(case), image_path="state/head.weight" in case.arrays)
    return model.eval()


def check_voxel(case: Fixture) -> None:
    voxels = tensor(case, "in/voxel").double()
    model = voxel_model(case, group_axis="released")
    embedded = model.tokens(voxels)
    close(embedded.movedim(-1, 1), tensor(case, "out/embed"), 1e-9)
    features = model.features(voxels)
    close(features, tensor(case, "out/features"), 1e-9)
    logits = model(voxels)
    close(logits, tensor(case, "out/logits"), 1e-9)
    loss = cross_entropy(logits, tensor(case, "in/label"))
    close(loss, tensor(case, "out/loss"), 1e-9)
    loss.backward()
    check_gradients(case, model, 1e-9)
    if "out/logits_group_batch_first" in case.arrays:
        close(voxel_model(case, group_axis="z")(voxels), tensor(case, "out/logits_group_batch_first"), 1e-9)


def check_voxel_lwf(case: Fixture) -> None:
    cfg = case.meta
    model = voxel_model(case, group_axis="released")
    freeze_image_path(model.vit)
    voxels, labels = tensor(case, "in/voxel").double(), tensor(case, "in/label")
    images = resize(tensor(case, "in/image_lowres7"), size=(224, 224), mode="nearest")
    target = tensor(case, "in/teacher_argmax")
    taught = nn.functional.one_hot(target, len(model.vit.head.bias)).double()
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, cfg["lr"], tuple(cfg["betas"]), weight_decay=cfg["weight_decay"])
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {official_key(model, n).split(".")[0] for n in frozen} == set(cfg["frozen"])
    for step in range(cfg["steps"]):
        logits, image_logits = model(voxels, images)
        loss, terms = lwf_loss(logits, labels, image_logits, taught, lam=cfg["lwf_lambda"])
        adam.zero_grad()
        loss.backward()
        if step == 0:
            close(logits, tensor(case, "out/logits_3d"), 1e-8)
            close(image_logits[:, :20], tensor(case, "out/logits_2d_first20"), 1e-8)
            close(loss, tensor(case, "out/loss"), 1e-8)
            close(terms["loss_3d"], tensor(case, "out/loss_3d"), 1e-8)
            close(terms["loss_2d"], tensor(case, "out/loss_2d"), 1e-8)
            check_gradients(case, model, 1e-8)
        adam.step()
    own = {official_key(model, name): p for name, p in model.named_parameters()}
    for name, expected in state(case, "out/after/").items():
        close(own[name], expected, 1e-8)
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before)


def check_point_ops(case: Fixture) -> None:
    cfg = case.meta
    xyz, features = tensor(case, "in/xyz"), tensor(case, "in/feat").requires_grad_()
    starts = tensor(case, "in/fps_start")
    index = farthest_point_sampling(xyz, cfg["npoint"], starts)
    assert torch.equal(index, tensor(case, "out/fps_idx"))
    centres = gather_points(xyz, index)
    close(squared_distances(centres, xyz), tensor(case, "out/sqdist"), 1e-9)
    assert torch.equal(nearest_neighbours(centres, xyz, cfg["knn"])[1], tensor(case, "out/knn_idx"))
    k = case.arrays["out/ball_idx"].shape[-1]
    assert torch.equal(ball_query(centres, xyz, cfg["ball_radius"], k), tensor(case, "out/ball_idx"))
    layer = SetAbstraction(cfg["npoint"], cfg["knn"], [cfg["in_channel"], *cfg["mlp"]]).double()
    names = {}
    for key in layer.state_dict():
        _, kind, number, what = key.split(".")
        names[f"{'mlp_convs' if kind == 'linears' else 'mlp_bns'}.{number}.{what}"] = key
    own = layer.state_dict()
    given = state(case, "state/sa.")
    layer.load_state_dict({key: given[name].reshape(own[key].shape) for name, key in names.items()})
    for norm in layer.mlp.norms:
        norm.momentum = cfg["bn_momentum"]
    close(layer.eval()(xyz, features, starts)[1], tensor(case, "out/sa_eval"), 1e-9)
    result = layer.train()(xyz, features, starts)[1]
    close(result, tensor(case, "out/sa_train"), 1e-9)
    for name, expected in state(case, "out/after_bn/").items():
        close(layer.state_dict()[names[name]], expected, 1e-9)
    result.square().mean().backward()  # what the fixture's gradients are of
    close(features.grad, tensor(case, "grad/feat"), 1e-9)
    for name, expected in state(case, "grad/sa.").items():
        close(layer.get_parameter(names[name]).grad.reshape(expected.shape), expected, 1e-9)
    close(interpolate(xyz, centres, tensor(case, "in/points2")), tensor(case, "out/fp"), 1e-9)
    close(normalise_points(tensor(case, "in/pc_raw")), tensor(case, "out/pc_normalized"), 1e-9)


def point_model(case: Fixture) -> PointFormer:
    cfg = case.meta
    preset = RELEASED_PRESETS[cfg["released_model"].split("/")[1]]
    task = "seg" if cfg["released_model"].endswith("Seg") else "cls"
    model = PointFormer(
        vit(case), cfg["input_dim"], cfg["n_classes"], task, ratios=preset["ratios"], neighbours=cfg["nneighbor"],
        image_path=preset["image_path"], points=cfg["num_point_cfg"], head="linear" if cfg["head"] == "default" else "cosine",
    ).double()  # fmt: skip
    load_official_state(model, state(case), image_path="state/head.weight" in case.arrays)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = cfg["bn_momentum"]
    return model


def check_point(case: Fixture) -> None:
    model, points = point_model(case), tensor(case, "in/points")
    starts = list(tensor(case, "in/fps_starts"))
    sampled = [level.shape[1] for level in model.eval().tokens(points, starts)[0][1:]]
    assert sampled == case.meta["td_npoints"]
    with torch.no_grad():
        close(model(points, starts=starts), tensor(case, "out/logits_eval"), 1e-8)
    logits = model.train()(points, starts=starts)
    close(logits, tensor(case, "out/logits_train"), 1e-8)
    loss = cross_entropy(logits.flatten(0, -2), tensor(case, "in/label"))
    close(loss, tensor(case, "out/loss_train"), 1e-8)
    loss.backward()
    check_gradients(case, model, 1e-8)
    own = {official_key(model, key): value for key, value in model.state_dict().items()}
    for name, expected in state(case, "out/after_bn/").items():
        close(own[name], expected, 1e-8)


def check_point_transformer(case: Fixture) -> None:
    cfg = case.meta
    checked = 0
    for task in ("cls", "seg"):
        if f"out/{task}" not in case.arrays:
            continue
        model = PointTransformer(
            cfg["input_dim"], cfg["n_classes"], task, stages=cfg["nblocks"], dim=cfg["transformer_dim"],
            neighbours=cfg["nneighbor"],
        ).double()  # fmt: skip
        load_official_state(model, state(case, f"state/{task}."))
        with torch.no_grad():
            result = model.eval()(tensor(case, "in/points"), starts=list(tensor(case, "in/fps_starts")))
        close(result, tensor(case, f"out/{task}"), 1e-8)
        checked += 1
    assert checked


KINDS: dict[str, Callable[[Fixture], None]] = {
    "point_cls": check_point,
    "point_ops": check_point_ops,
    "point_seg": check_point,
    "point_transformer_baseline": check_point_transformer,
    "voxel": check_voxel,
    "voxel_lwf": check_voxel_lwf,
}


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_parity(path: Path) -> None:
    case = load_fixture(path)
    assert case.kind in KINDS, f"unknown kind {case.kind!r}"
    KINDS[case.kind](case)
