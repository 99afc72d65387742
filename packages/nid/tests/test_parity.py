"""Numbers that the released implementation gave for random weights and inputs.

Every ``*.npz`` of the folder named by ``TENFOLD_PARITY_DIR`` is a case; its ``kind`` says what it exercises.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tenfold_nid as nid
from tenfold_nid.gates import LinearGate, ResNetGate, SetEncoder
from tenfold_nid.networks import NetworkConfig
from tenfold_shared.parity import Fixture, check_parity, parity_files


def check(case: Fixture, key: str, value: Tensor | float, rtol: float, atol: float | None = None) -> None:
    expected = case[key]
    value = torch.as_tensor(value).detach()
    if atol is None:  # entries that cancel to nearly zero are held to the scale of their array
        atol = rtol * float(expected.abs().max())
    assert value.shape == expected.shape, f"{key}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
    torch.testing.assert_close(value.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda m: f"{key}: {m}")


def network_config(cfg: dict[str, Any], **more: Any) -> NetworkConfig:
    names = {
        "in_dim",
        "out_dim",
        "hidden_dim",
        "num_layers",
        "pos_emb",
        "act_type",
        "ffm_map_size",
        "ffm_map_scale",
        "num_freqs",
    }
    return NetworkConfig(**{k: v for k, v in cfg.items() if k in names} | more)


def build(case: Fixture) -> nid.NeuralDictionary:
    cfg = case.meta
    names = {f.name for f in nid.DictionaryConfig.__dataclass_fields__.values()} - {"size", "gate"}
    config = nid.DictionaryConfig(
        **{k: v for k, v in cfg.items() if k in names},
        gate=cfg["gate"],
        size=tuple(cfg["size"]),
        num_signals=cfg["num_images"],
        gate_layers=sum(k.startswith("state/gate_generator.convs.") and k.endswith("weight") for k in case.arrays) or 2,
        noise=any(k.startswith("state/noise_generator.") for k in case.arrays),
    )
    model = nid.NeuralDictionary(config, load_mode="official", importance_mode="signed")
    if "state/noise_generator.w" in case:  # whatever the gate is
        model.noise_generator = LinearGate(*case["state/noise_generator.w"].shape)
    model.double().load_state_dict(case.under("state/"))
    return model.train()


def signal(case: Fixture) -> Tensor:
    if case.meta["gate"] != "codebook":
        return case["in/imgs"]
    return case["in/img_ids"] if "in/img_ids" in case else torch.arange(len(case["in/imgs"]))


def check_gradients(case: Fixture, module: torch.nn.Module, rtol: float) -> None:
    parameters = dict(module.named_parameters())
    for name in case.under("grad/"):
        if name in parameters:
            grad = parameters[name].grad
            check(case, f"grad/{name}", torch.zeros_like(parameters[name]) if grad is None else grad, rtol)


def inrnet(case: Fixture) -> None:
    net = nid.CoordinateNetwork(network_config(case.meta)).double()
    net.load_state_dict(case.under("state/"))
    coords = case["in/coords"].requires_grad_()
    y = net(coords)
    middle = case["out/y"].ndim == 3  # the released positional encoding inserts an axis of length one
    check(case, "out/y", y[:, None] if middle else y, 1e-9)
    if "out/embedding" in case:
        features = net.map(coords)
        check(case, "out/embedding", features[:, None] if case["out/embedding"].ndim == 3 else features, 1e-9)
    y.square().sum().backward()
    check_gradients(case, net, 1e-9)
    check(case, "grad/coords", coords.grad, 1e-9)
    assert sum(p.numel() for p in net.parameters()) == int(case["out/n_params"])
    if "out/flops" in case:
        assert net.flops() == int(case["out/flops"])


def moe(case: Fixture, route: str | None = None) -> None:
    model = build(case)
    noisy = "in/noise" in case
    mixture = model(
        signal(case),
        case["in/coords"],
        dense=not case.meta.get("topk_sparse", True),
        noise=case["in/noise"] if noisy else None,
        route=route,
    )
    tol = 1e-5 if noisy else 1e-9
    check(case, "out/preds", mixture.preds, tol)
    check(case, "out/gates", mixture.gates.dense, tol)
    check(case, "out/importance", mixture.importance, tol)
    if "out/load" in case:
        check(case, "out/load", mixture.load, tol)
    loss = (mixture.preds - case["in/target"]).square().mean()
    if "out/mse" in case:
        check(case, "out/mse", loss, tol)
    if "out/loss" in case:
        weight = case.meta.get("loss_cv", 0.01)
        loss = loss + weight * nid.cv_squared(mixture.importance)
        if mixture.load is not None:
            loss = loss + weight * nid.cv_squared(mixture.load)
        check(case, "out/loss", loss, tol)
    loss.backward()
    check_gradients(case, model, tol)
    for name, value in model.state_dict().items():
        if f"out/state_after_forward/{name}" in case:
            check(case, f"out/state_after_forward/{name}", value, tol)
    if "out/flops" in case:
        assert model.flops() == int(case["out/flops"])


def moe_every_route(case: Fixture) -> None:
    routes = ["merge", "dense"] + (["bag"] if case.meta.get("topk_sparse", True) else [])
    for route in [None, *routes]:
        moe(case, route)


def settings(case: Fixture) -> nid.Objective:
    names = nid.Objective.__dataclass_fields__
    return nid.Objective(**{k: v for k, v in case.meta.items() if k in names}, l1_cap=float("inf"))


def train(case: Fixture) -> None:
    model = build(case)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    finetune = case.meta.get("finetune", False)
    parameters = nid.gate_parameters(model) if finetune else list(model.parameters())
    if finetune:
        model.experts.requires_grad_(False)
    optimizer = nid.adam(parameters, lr=case.meta["lr"], weight_decay=case.meta.get("weight_decay", 0.0))
    for step in range(case.meta["steps"]):
        losses = nid.training_step(
            model,
            optimizer,
            signal(case),
            case["in/coords"],
            case["in/target"],
            settings(case),
            dense=case.meta["warmup"],
        )
        for key, value in (
            ("loss", losses.total),
            ("data", losses.data),
            ("cv", losses.balance),
            ("sparsity", losses.sparsity),
        ):
            if f"out/{key}" in case:
                np.testing.assert_allclose(float(value), case.arrays[f"out/{key}"][step], rtol=1e-5)
        if step == 0:
            check_gradients(case, model, 1e-5)
    for name, value in model.state_dict().items():
        check(case, f"out/state_after/{name}", value, 1e-5)
        if finetune and name.startswith("experts."):
            assert torch.equal(value, before[name]), f"{name} moved although the dictionary is frozen"


def ct(case: Fixture) -> None:
    size = tuple(case.meta["size"])
    coords = nid.ray_coordinates(size, nid.view_angles(case.meta["num_thetas"]))
    check(case, "out/sample_coords", coords, 1e-6)
    images = case["in/imgs"]
    truth = nid.sinogram(images, coords)
    check(case, "out/sinogram", truth, 1e-6)
    model = build(case)
    rays = case["in/ray_index"]
    dense = case.meta.get("warmup", False) or not case.meta.get("topk_sparse", True)
    mixture = nid.project(model, signal(case), coords[rays].double(), dense=dense)
    check(case, "out/pred_projection", mixture.preds, 1e-6)
    losses = nid.objective(mixture, truth[:, rays], settings(case))
    check(case, "out/mse", losses.data, 1e-6)
    check(case, "out/loss", losses.total, 1e-6)
    losses.total.backward()
    check_gradients(case, model, 1e-6)


def lattice(case: Fixture) -> None:
    shapes = [s for key, value in case.meta.items() if key.startswith("shapes") for s in value]
    assert shapes
    for shape in shapes:
        check(case, "out/lattice_" + "x".join(map(str, shape)), nid.lattice(shape), 1e-7)


def cv_squared(case: Fixture) -> None:
    for name in case.under("in/"):
        vector = case[f"in/{name}"]
        if f"grad/{name}" in case:
            vector.requires_grad_()
        value = nid.cv_squared(vector)
        assert value.dtype == torch.float32
        check(case, f"out/{name}", value.reshape(case[f"out/{name}"].shape), 1e-6)
        if f"grad/{name}" in case:
            value.backward()
            check(case, f"grad/{name}", vector.grad, 1e-6, atol=1e-7)


def metrics(case: Fixture) -> None:
    preds, targets = case["in/pred"], case["in/target"]
    check(case, "out/psnr", nid.psnr(preds, targets), 1e-6)
    each = nid.ssim(preds, targets, window=case.meta["window"], sigma=case.meta["sigma"])
    check(case, "out/ssim_each", each, 1e-6)
    check(case, "out/ssim_mean", each.mean(), 1e-6)
    surface = nid.surface_distance(
        case["in/gt_points"], case["in/pred_points"], case["in/gt_normals"], case["in/pred_normals"]
    )
    check(case, "out/chamfer", surface.chamfer, 1e-6)
    check(case, "out/hausdorff", surface.hausdorff, 1e-6)
    check(case, "out/normal", surface.normal_consistency, 1e-6)


def patch_merge(case: Fixture) -> None:
    patch, image = tuple(case.meta["patch"]), case["out/image_nchw"]
    patches = case["in/patches"]
    merged = nid.merge_patches(patches, patch, tuple(image.shape[-2:]))
    assert torch.equal(merged, image)
    assert len(image) * case.meta["patches"] == len(patches)
    assert torch.equal(nid.split_patches(image.movedim(1, -1), patch).flatten(1, 2), patches)


def celeba_preprocess(case: Fixture) -> None:
    size, patch = tuple(case.meta["downsampled_size"]), tuple(case.meta["patch_size"])
    image = nid.celeba_image(case.arrays["in/raw"], size)
    patches = nid.split_patches(image[None], patch)
    assert len(patches) == int(case["out/num_patches_per_img"]) == int(case["out/num_images"])
    for i in case.meta["index"]:
        check(case, f"out/patch_{i}", patches[i], 0, atol=1 / 255 + 1e-6)


def perturb(case: Fixture) -> None:
    cfg, image = case.meta, case["in/image"]
    occlusion = {"size": cfg["occ_size"], "stripes": cfg["occ_stripes"]}
    colours = {"scale": cfg["mag_s"], "offset": cfg["mag_b"]}
    check(case, "out/occ", nid.occlude(image, cfg["seed"], **occlusion), 1e-7)
    shifted = nid.shift_colours(image, cfg["seed"], **colours)
    check(case, "out/color", shifted, 1e-7)
    check(case, "out/occ_color", nid.occlude(shifted, cfg["seed"], **occlusion), 1e-7)


def pointcloud_loss(case: Fixture) -> None:
    net = nid.CoordinateNetwork(network_config(case.meta, in_dim=3, out_dim=1)).double()
    net.load_state_dict(case.under("state/"))
    optimizer = nid.adam(list(net.parameters()), lr=case.meta["lr"])
    for step in range(case.meta["steps"]):
        loss = nid.point_cloud_loss(
            net,
            case["in/on_surface_coords"],
            case["in/on_surface_normals"],
            case["in/off_surface_coords"],
            loss_norm=case.meta["loss_norm"],
        ).total
        np.testing.assert_allclose(float(loss.detach()), case.arrays["out/loss"][step], rtol=1e-7)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            check_gradients(case, net, 1e-7)
        optimizer.step()
    for name, value in net.state_dict().items():
        check(case, f"out/state_after/{name}", value, 1e-7)


def resnet_gate(case: Fixture) -> None:
    cfg = case.meta
    gate = ResNetGate(cfg["ch"], cfg["out"], cfg["res"]).double()
    assert sum(p.numel() for p in gate.parameters()) == cfg["n_params"]
    with torch.no_grad():
        for i, p in enumerate(gate.state_dict().values()):
            scale = np.sqrt(3 / np.prod(p.shape[1:])) if p.ndim > 1 else 0.05
            j = np.arange(p.numel(), dtype=np.float64)
            p.copy_(torch.from_numpy(scale * np.sin(1e-4 * j**2 + 1.7 * j + i)).view_as(p))
    images = case["in/imgs"]
    y = gate(images)
    check(case, "out/conv_features", gate.convs(images.movedim(-1, 1)), 1e-6)
    check(case, "out/y", y, 1e-6)
    y.square().sum().backward()
    for name, p in gate.named_parameters():
        assert p.grad is not None
        if f"grad/norms/{name}" in case:
            check(case, f"grad/norms/{name}", p.grad.norm(), 1e-6)
        for key in (f"grad/{name}", f"grad/{name.removeprefix('convs.')}"):
            if key in case and case[key].shape == p.shape:
                check(case, key, p.grad, 1e-6)
                break


def set_encoder(case: Fixture) -> None:
    state = case.under("state/")
    x, y = case["in/x"], case["in/y"]
    first = state["net.0.weight"]
    last = max((k for k in state if k.endswith("weight")), key=lambda k: int(k.split(".")[1]))
    hidden = sum(k.endswith(".0.weight") and k.count(".") == 3 for k in state)
    encoder = SetEncoder(
        x.shape[-1], y.shape[-1], first.shape[0], state[last].shape[0], hidden, case.meta["act"]
    ).double()
    encoder.load_state_dict(state)
    check(case, "out/plain", encoder(x, y), 1e-9)
    check(case, "out/masked", encoder(x, y, case["in/mask"]), 1e-9)


def sdf_mesh(case: Fixture) -> None:
    field = case["in/sdf"]
    assert field.shape == (case.meta["N"],) * 3
    mesh = nid.marching_cubes(field)
    vertices = mesh.vertices.double()
    assert len(vertices) == int(case["out/n_verts"])
    assert len(mesh.faces) == int(case["out/n_faces"])
    check(case, "out/vert_min", vertices.amin(dim=0), 1e-5)
    check(case, "out/vert_max", vertices.amax(dim=0), 1e-5)
    check(case, "out/vert_mean", vertices.mean(dim=0), 1e-5, atol=1e-5)
    check(case, "out/first_vert", vertices[0], 1e-5)
    check(case, "out/normals_mean_abs", mesh.normals.abs().mean(dim=0), 1e-5)


CHECKS = {
    "celeba_preprocess": celeba_preprocess,
    "ct": ct,
    "cv_squared": cv_squared,
    "finetune": train,
    "inrnet": inrnet,
    "lattice": lattice,
    "metrics": metrics,
    "moe": moe_every_route,
    "patch_merge": patch_merge,
    "perturb": perturb,
    "pointcloud_loss": pointcloud_loss,
    "resnet_gate": resnet_gate,
    "sdf_mesh": sdf_mesh,
    "set_encoder": set_encoder,
    "train": train,
}


@pytest.mark.parametrize("path", parity_files(__file__), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    check_parity(path, CHECKS)
