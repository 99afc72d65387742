"""Image weights into the blocks: what is taken, resized, inflated, new; other naming schemes; refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tenfold_shared.errors import UserError
from tenfold_simple3dformer import weights
from tenfold_simple3dformer.backbone import create_vit, freeze_image_path
from tenfold_simple3dformer.compat import load_official_checkpoint, read_state, to_official
from tenfold_simple3dformer.lwf import lwf_loss
from tenfold_simple3dformer.point import PointFormer
from tenfold_simple3dformer.voxel import VoxelFormer
from tenfold_simple3dformer.weights import (
    block_drift,
    inflate_patches,
    read_image_weights,
    resize_positions,
    to_timm,
    transfer,
)


def source() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {k: torch.randn_like(v) for k, v in create_vit("mini").state_dict().items()}


def test_everything_of_the_image_network_is_taken() -> None:
    state = source()
    model = VoxelFormer(create_vit("mini"), 5, voxels=12, cell=4)
    report = transfer(model, state, source="here")
    for name, tensor in state.items():
        assert torch.equal(model.vit.state_dict()[name], tensor)  # the positions bit for bit, too
    assert report.count("taken") == len(state)
    assert {n for n, s in report.status.items() if s == "new"} == {"pos_embed", "embed.weight", "embed.bias", "head.weight", "head.bias"}  # fmt: skip
    assert report.unused == []
    assert "blocks.*" in report.table()
    assert 0.01 < float(model.pos_embed.detach().std()) < 0.03


def test_a_point_network_leaves_the_image_path() -> None:
    model = PointFormer(create_vit("mini"), 6, 5)
    report = transfer(model, source())
    assert "head.weight" in report.unused
    assert "pos_embed" in report.unused


@pytest.mark.parametrize("how", ["average", "center"])
def test_inflated_patches_answer_a_constant_alike(how: str) -> None:
    weight = torch.randn(6, 3, 1, 1).expand(-1, -1, 16, 16)
    volume = inflate_patches(weight, 5, how)
    assert volume.shape == (6, 1, 5, 5, 5)
    torch.testing.assert_close(volume.sum((1, 2, 3, 4)), weight.sum((1, 2, 3)))
    filled = (volume.abs().sum((0, 1, 2, 3)) > 0).tolist()
    assert filled == ([True] * 5 if how == "average" else [False, False, True, False, False])


def test_inflated_positions() -> None:
    state = source()
    flat = VoxelFormer(create_vit("mini"), 5, voxels=12, cell=4)
    report = transfer(flat, state, inflate="average", positions="resize2d")
    assert report.status["embed.weight"] == report.status["pos_embed"] == "inflated"
    assert torch.equal(flat.pos_embed[:, 0], state["pos_embed"][:, 0])
    deep = VoxelFormer(create_vit("mini"), 5, "naive", voxels=12, cell=4)
    transfer(deep, state, positions="replicate_z")
    columns = deep.pos_embed[:, 1:].view(9, 3, -1)
    assert torch.equal(columns[:, 0], columns[:, 2])
    torch.testing.assert_close(columns[:, 0], flat.pos_embed[0, 1:])
    with pytest.raises(UserError, match="replicate_z"):
        transfer(deep, state, positions="resize2d")
    silhouette = VoxelFormer(create_vit("mini"), 5, "occupancy2d", voxels=12, cell=4)
    with pytest.raises(UserError, match="no cells"):
        transfer(silhouette, state, inflate="center")


def test_positions_of_another_image_size() -> None:
    positions = torch.arange(17.0)[None, :, None].expand(1, 17, 4)
    assert resize_positions(positions, (4, 4)) is positions
    resized = resize_positions(positions, (6, 6))
    assert resized.shape == (1, 37, 4)
    assert torch.equal(resized[:, 0], positions[:, 0])
    report = transfer(create_vit("mini", img_size=48), source())
    assert report.status["pos_embed"] == "resized"
    with pytest.raises(UserError, match="no square grid"):
        resize_positions(torch.zeros(1, 18, 4), (6, 6))


def test_positions_of_backbones_whose_class_token_has_none() -> None:
    """DeiT-III and backbones with registers have positions for the patches alone; SigLIP has no class token at all."""
    patches = source()["pos_embed"][:, 1:]
    for options in ({"no_embed_class": True}, {"no_embed_class": True, "reg_tokens": 2}, {"class_token": False, "global_pool": "avg", "fc_norm": False}):  # fmt: skip
        vit = create_vit("mini", **options)
        state = {**vit.state_dict(), "pos_embed": patches}
        larger = transfer(create_vit("mini", img_size=48, **options), state)
        assert larger.status["pos_embed"] == "resized"
        for name, way in (("projection", "resize2d"), ("naive", "replicate_z")):
            model = VoxelFormer(create_vit("mini", **options), 5, name, voxels=16, cell=4)
            transfer(model, state, positions=way)
            own = model.pos_embed.shape[1] - math.prod(model.grid)
            assert own == (0 if vit.cls_token is None else 1)
            assert torch.equal(model.pos_embed[:, :own], torch.zeros(1, own, 64))
            assert torch.equal(model.pos_embed[0, own:].view(16, -1, 64)[:, 0], patches[0])


def test_distilled_weights_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a file: without the distillation token's position. As a backbone, such a network is refused."""
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: distilled)
    state, _ = read_image_weights("timm:deit_tiny_distilled_patch16_224")
    assert state["pos_embed"].shape == (1, 197, 192)
    assert "dist_token" not in state
    with pytest.raises(UserError, match="distillation token"):
        create_vit("deit_tiny_distilled_patch16_224")


def test_refused_weights(tmp_path: Path) -> None:
    model = VoxelFormer(create_vit("mini"), 5, voxels=12, cell=4)
    narrow = create_vit("mini", embed_dim=32).state_dict()
    with pytest.raises(UserError, match="width is 32 and the network's 64"):
        transfer(model, narrow)
    shallow = create_vit("mini", depth=2).state_dict()
    with pytest.raises(UserError, match=r"lacks blocks.2.norm1.weight"):
        transfer(model, shallow)
    with pytest.raises(UserError, match="no checkpoint"):
        read_image_weights(str(tmp_path / "missing.pth"))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no such thing")
    with pytest.raises(UserError, match=r"broken\.pth"):
        read_image_weights(str(broken))


def test_file_formats_and_wraps(tmp_path: Path) -> None:
    state = source()
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "deit.pth")
    save_file(state, tmp_path / "deit.safetensors")
    save_file(state, tmp_path / "timm.safetensors", metadata={"format": "pt"})
    np.savez(tmp_path / "deit.npz", **{k: v.numpy() for k, v in state.items()})
    for file in tmp_path.iterdir():
        loaded, _ = read_image_weights(str(file))
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[k], state[k]) for k in state)


def test_weights_in_the_data_root_and_at_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called as a model of timm's in the data root is taken from there; an address is fetched into it."""
    monkeypatch.setenv("TENFOLD_DATA", str(tmp_path))
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save(source(), folder / "some_vit.pth")
    assert read_image_weights("timm:some_vit")[1] == str(folder / "some_vit.pth")
    monkeypatch.setattr(weights, "fetch", lambda url, file: Path(file) if url == "https://x.org/a/some_vit.pth?v=1" else None)  # fmt: skip
    assert read_image_weights("url:https://x.org/a/some_vit.pth?v=1")[1] == str(folder / "some_vit.pth")


def test_distilled_files_lose_the_distillation_token() -> None:
    state = source()
    distilled = {**state, "dist_token": torch.zeros(1, 1, 64), "head_dist.weight": torch.zeros(22, 64)}
    positions = state["pos_embed"]
    distilled["pos_embed"] = torch.cat([positions[:, :1], torch.full((1, 1, 64), 7.0), positions[:, 1:]], 1)
    plain = to_timm(distilled)
    assert plain.keys() == state.keys()
    assert torch.equal(plain["pos_embed"], positions)


def test_the_naming_of_vit_21k() -> None:
    state = source()
    other = {"class_token": state["cls_token"], "positional_embedding.pos_embedding": state["pos_embed"]}
    other |= {f"patch_embedding.{p}": state[f"patch_embed.proj.{p}"] for p in ("weight", "bias")}
    other |= {f"fc.{p}": state[f"head.{p}"] for p in ("weight", "bias")}
    for name, value in state.items():
        if name.startswith("blocks.") and ".attn.qkv." in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                other["transformer." + name.replace("qkv", f"proj_{part}")] = chunk
        elif name.startswith("blocks."):
            other["transformer." + name.replace(".mlp.", ".pwff.").replace(".attn.proj.", ".proj.")] = value
        elif name.startswith("norm."):
            other[name] = value
    mapped = to_timm(other)
    assert mapped.keys() == state.keys()
    assert all(torch.equal(mapped[k], state[k]) for k in state)


def test_released_files_are_recognised(tmp_path: Path) -> None:
    """Voxel and point files give the network that they fit, with the same answers."""
    torch.manual_seed(0)
    vit = create_vit("tiny", depth=1, heads=3)
    voxel = VoxelFormer(vit, 7, "group", voxels=30, cell=6, group_axis="released").eval()
    torch.save({f"module.{k}": v for k, v in to_official(voxel).items()}, tmp_path / "voxel.pth")
    found = load_official_checkpoint(tmp_path / "voxel.pth").eval()
    grids = (torch.rand(2, 1, 30, 30, 30) < 0.2).float()
    with torch.no_grad():
        torch.testing.assert_close(found(grids), voxel(grids))
    hybrid = VoxelFormer(create_vit("tiny", depth=1, heads=3), 7, "hybrid_naive").eval()
    assert hybrid.pos_embed.shape[1] == 217
    torch.save(to_official(hybrid), tmp_path / "hybrid.pth")
    with torch.no_grad():
        torch.testing.assert_close(load_official_checkpoint(tmp_path / "hybrid.pth").eval()(grids), hybrid(grids))
    point = PointFormer(create_vit("tiny", depth=1), 22, 50, "seg", ratios=(4,), image_path=True).eval()
    state = to_official(point) | {"transition_downs.0.sa.last_pos_embed.0.weight": torch.zeros(192, 3)}
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}, tmp_path / "point.pth")
    again = load_official_checkpoint(tmp_path / "point.pth").eval()
    cloud = torch.rand(1, 32, 22)
    with torch.no_grad():
        torch.testing.assert_close(again(cloud), point(cloud))
    torch.save({"stranger": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="stranger"):
        load_official_checkpoint(tmp_path / "other.pth")
    assert "epoch" not in read_state(tmp_path / "point.pth")


def test_both_terms_train_the_blocks_and_no_image_tensor() -> None:
    """The image term's gradient reaches the blocks and the class token, not what only voxels use."""
    torch.manual_seed(0)
    model = VoxelFormer(create_vit("mini"), 5, voxels=12, cell=4)
    freeze_image_path(model.vit)
    images, teacher = torch.randn(2, 1, 32, 32), torch.randn(2, 22)
    logits, image_logits = model((torch.rand(2, 1, 12, 12, 12) < 0.3).float(), images)
    loss, terms = lwf_loss(logits, torch.tensor([0, 1]), image_logits, teacher, lam=0.5)
    torch.testing.assert_close(loss.detach(), terms["loss_3d"] + 0.5 * terms["loss_2d"])
    (image_logits.sum() * 1.0).backward()
    assert model.vit.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert model.vit.cls_token.grad.abs().max() > 0
    assert model.embed.weight.grad is None
    assert model.vit.head.weight.grad is None


def test_drift() -> None:
    state = source()
    moved = {k: -v if k.startswith("blocks.1.") else v for k, v in state.items()}
    drift = block_drift(state, moved)
    assert drift[0] == pytest.approx(0)
    assert drift[1] == pytest.approx(2)
