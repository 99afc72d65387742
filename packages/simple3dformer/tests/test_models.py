"""Architectures at full size, tokenizers and heads against their definitions."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tenfold_shared.errors import UserError
from tenfold_shared.testing import shapes_alone
from tenfold_simple3dformer.abstraction import LocalOperator
from tenfold_simple3dformer.attention import point_rollout, voxel_rollout
from tenfold_simple3dformer.backbone import create_vit, heads, run_blocks
from tenfold_simple3dformer.baselines import PointNet, PointNet2, PointTransformer, VisionPermutator3D, VoxNet
from tenfold_simple3dformer.compat import load_official_state, official_key, to_official
from tenfold_simple3dformer.heads import CosineHead
from tenfold_simple3dformer.lwf import distillation, retention
from tenfold_simple3dformer.models import (
    ModelConfig,
    build_model,
    image_side_parameters,
    parameters,
    released_unused_parameters,
)
from tenfold_simple3dformer.planner import costs
from tenfold_simple3dformer.point import PointFormer
from tenfold_simple3dformer.tokenizers import (
    InflatedEmbedding,
    cells_per_axis,
    embed_occupied,
    sequence_lengths,
    token_grid,
)
from tenfold_simple3dformer.tuning import merge_low_rank, set_trainable
from tenfold_simple3dformer.voxel import VoxelFormer

MODELNET, SHAPENET = (30, 6, 40), (128, 9, 55)
COUNTS = {
    ("tiny", "projection"): ((5_771_792, 5_393_320), (5_906_015, 5_527_543)),
    ("tiny", "naive"): ((5_790_992, 5_412_520), (6_395_231, 6_016_759)),
    ("tiny", "group"): ((5_996_240, 5_617_768), (6_132_191, 5_753_719)),
    ("tiny", "occupancy2d"): ((5_737_232, 5_358_760), (5_781_599, 5_403_127)),
    ("small", "projection"): ((22_159_376, None), (22_427_807, None)),
    ("small", "naive"): ((22_197_776, None), (23_406_239, None)),
    ("small", "group"): ((23_050_640, None), (23_322_527, None)),
    ("small", "occupancy2d"): ((22_090_256, None), (22_178_975, None)),
    ("base", "projection"): ((86_785_040, None), (87_321_887, None)),
    ("base", "naive"): ((86_861_840, None), (89_278_751, None)),
    ("base", "group"): ((90_337_040, None), (90_880_799, None)),
    ("base", "occupancy2d"): ((86_646_800, None), (86_824_223, None)),
}


@pytest.mark.parametrize(("backbone", "tokenizer"), list(COUNTS))
def test_voxel_parameter_counts(backbone: str, tokenizer: str) -> None:
    """Total, and without the image side."""
    for (voxels, cell, classes), (total, without) in zip(
        (MODELNET, SHAPENET), COUNTS[backbone, tokenizer], strict=True
    ):
        config = ModelConfig(backbone=backbone, tokenizer=tokenizer, cell=cell)
        with shapes_alone():
            model = build_model(config, "voxel_cls", classes, 1, voxels)
        assert parameters(model) == total
        if without:
            assert parameters(model) - image_side_parameters(model) == without


@pytest.mark.parametrize(
    ("preset", "backbone", "task", "classes", "inputs", "released", "used"),
    [
        ("3DViT", "tiny", "point_cls", 40, 6, 5_566_776, 5_453_272),
        ("3DViT", "small", "point_cls", 40, 6, 22_063_560, 21_739_912),
        ("3DViT", "base", "point_cls", 40, 6, 87_861_480, 86_813_416),
        ("3DViT", "tiny", "part_seg", 50, 22, 5_569_058, 5_454_530),
        ("3DViT", "base", "part_seg", 50, 22, 87_867_506, 86_818_418),
        ("3DViT", "base", "scene_seg", 13, 9, 87_857_037, 86_808_781),
        ("3DViT_LWF", "base", "part_seg", 50, 22, 89_072_346, 86_818_418),
        ("3DViT_1_layer", "small", "part_seg", 50, 22, 22_625_370, 21_720_050),
        ("3DViT_0_layer", "tiny", "part_seg", 50, 22, 5_806_362, 5_427_890),
    ],
)
def test_point_parameter_counts(preset, backbone, task, classes, inputs, released, used) -> None:
    """As released, and without what the release never uses."""
    with shapes_alone():
        model = build_model(ModelConfig(backbone=backbone, preset=preset), task, classes, inputs)
    assert parameters(model) - image_side_parameters(model) == used
    assert parameters(model) + released_unused_parameters(model) == released


def test_baseline_parameter_counts() -> None:
    with shapes_alone():
        # The release also stores an unused MLP 3 -> out -> out in each of the four set abstractions.
        unused = sum(out**2 + 5 * out for out in (64, 128, 256, 512))
        assert parameters(PointTransformer(6, 40)) + unused == 9_937_096
        assert parameters(PointTransformer(22, 50, "seg")) + unused == 19_750_322
        # The stem, 6912 -> 128, 128 -> classes.
        stem = (125 * 32 + 32) + (27 * 32 * 32 + 32)
        assert parameters(VoxNet(40)) == stem + 6912 * 128 + 128 + 128 * 40 + 40


def test_heads_of_base() -> None:
    """12 heads of width 64; the release's 3 of 256 on request."""
    with shapes_alone():
        own, released = create_vit("base"), create_vit("base", heads=3)
    assert (heads(own), own.blocks[0].attn.head_dim) == (12, 64)
    assert (heads(released), released.blocks[0].attn.head_dim) == (3, 256)


def test_sequence_lengths() -> None:
    found = [sequence_lengths(name, token_grid(name, 30, 6)) for name in ("projection", "naive", "group")]
    assert found == [[26], [126], [6, 26]]
    found = [sequence_lengths(name, token_grid(name, 128, 9)) for name in ("projection", "naive", "group")]
    assert found == [[197], [2745], [15, 197]]
    with pytest.raises(UserError, match="no cell"):
        cells_per_axis(5, 6)


def mini(tokenizer: str = "projection", **options) -> VoxelFormer:
    torch.manual_seed(0)
    model = VoxelFormer(create_vit("mini"), 10, tokenizer, voxels=13, cell=4, **options)
    for name, parameter in model.named_parameters():
        if name.startswith("group."):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def occupancy(count: int = 2, side: int = 13) -> torch.Tensor:
    return (torch.rand(count, 1, side, side, side, generator=torch.Generator().manual_seed(1)) < 0.3).float()


def test_embedding_is_the_convolution() -> None:
    """E = Conv3d(kernel = stride = T), and its mean over z; a border narrower than a cell is cut."""
    x = occupancy()
    for tokenizer in ("naive", "projection"):
        model = mini(tokenizer)
        expected = F.conv3d(x, model.embed.weight, model.embed.bias, stride=4).permute(0, 2, 3, 4, 1)
        expected = expected if tokenizer == "naive" else expected.mean(3)
        torch.testing.assert_close(model.tokens(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [12, 13])
def test_occupied_voxels_are_enough(dtype: torch.dtype, side: int) -> None:
    """Without gradients the empty voxels are passed over; the tokens are the convolution's, whatever the values are."""
    generator = torch.Generator().manual_seed(side)
    embed = InflatedEmbedding(16, 4).to(dtype)
    values = torch.randn(3, 1, side, side, side, generator=generator, dtype=dtype)
    thin = values * (torch.rand(values.shape, generator=generator) < 0.02)
    thin[1] = 0  # an empty grid: the bias everywhere
    thin[0, 0, 4:8, :4, 8:12] = 1  # a full cell
    for voxels in (thin, thin.transpose(2, 4), thin[::2], torch.zeros_like(thin), thin[:0]):
        expected = F.conv3d(voxels, embed.weight, embed.bias, stride=4).permute(0, 2, 3, 4, 1)
        with torch.no_grad():
            found = embed_occupied(voxels, embed.weight.flatten(1), embed.bias, 4)
            assert found is not None
            assert torch.equal(embed(voxels), found)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(embed(voxels), expected)
    with torch.no_grad():
        assert embed_occupied(values, embed.weight.flatten(1), embed.bias, 4) is None  # no empty voxel to pass over
        broken = thin.clone()
        broken[0, 0, 0, 0, 0] = math.nan
        assert embed(broken)[0, 0, 0, 0].isnan().all()


def test_occupied_voxels_of_more_cells_than_16_bits_count() -> None:
    """Cells are sorted by 16 bits at a time: 2 x 34^3 of them need a second turn."""
    generator = torch.Generator().manual_seed(0)
    embed = InflatedEmbedding(2, 2).requires_grad_(False)
    voxels = (torch.rand(2, 1, 68, 68, 68, generator=generator) < 0.02).float()
    found = embed_occupied(voxels, embed.weight.flatten(1), embed.bias, 2)
    assert found is not None
    torch.testing.assert_close(found, F.conv3d(voxels, embed.weight, embed.bias, stride=2).permute(0, 2, 3, 4, 1))


def test_gradients_reach_empty_voxels() -> None:
    """Where a gradient is asked for, nothing is passed over: weights, bias and voxels get the convolution's."""
    embed, voxels = InflatedEmbedding(16, 4), (occupancy() * (occupancy(side=13).cumsum(2) < 2)).requires_grad_()
    towards = torch.randn(2, 3, 3, 3, 16, generator=torch.Generator().manual_seed(0))
    places = [voxels, embed.weight, embed.bias]
    ours = torch.autograd.grad((embed(voxels) * towards).sum(), places)
    convolved = F.conv3d(voxels, embed.weight, embed.bias, stride=4).permute(0, 2, 3, 4, 1)
    for found, expected in zip(ours, torch.autograd.grad((convolved * towards).sum(), places), strict=True):
        torch.testing.assert_close(found, expected)
    assert (ours[0][voxels == 0] != 0).any()


def test_depth_matters_to_some() -> None:
    """Cells exchanged along z change naive, group and slices, not projection or the silhouette."""
    x = occupancy(side=12)
    order = x.unflatten(4, (3, 4))[..., [2, 0, 1], :].flatten(4)
    for tokenizer in ("projection", "occupancy2d"):
        model = VoxelFormer(create_vit("mini"), 10, tokenizer, voxels=12, cell=4).eval()
        torch.testing.assert_close(model(x), model(order))
    for tokenizer in ("naive", "group"):
        torch.manual_seed(0)
        model = VoxelFormer(create_vit("mini"), 10, tokenizer, voxels=12, cell=4).eval()
        if model.group is not None:
            nn.init.normal_(model.group.pos_embed)
        with torch.no_grad():
            assert (model.features(x) - model.features(order)).abs().max() > 1e-4


def test_group_does_not_mix_samples() -> None:
    """The first sample's output does not depend on the others, unless as released."""
    x = occupancy(3)
    with torch.no_grad():
        model = mini("group")
        torch.testing.assert_close(model(x)[:1], model(x[:1]))
        released = mini("group", group_axis="released")
        assert (released(x)[:1] - released(x[:1])).abs().max() > 1e-5


def test_norms_have_their_own_eps() -> None:
    model = mini("group")
    assert model.vit.norm.eps == 1e-6
    assert model.group.layer.norm1.eps == 1e-5


@pytest.mark.parametrize("tokenizer", ["naive", "projection", "group", "occupancy2d", "slices"])
def test_every_tokenizer_learns_and_rolls_out(tokenizer: str) -> None:
    x = occupancy()
    model = mini(tokenizer)
    loss = F.cross_entropy(model(x), torch.tensor([1, 2]))
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("vit.") and p.requires_grad)
    weights = voxel_rollout(model, x)
    assert weights.shape == (2, 3, 3, 3)
    assert weights.amax((1, 2, 3)) == pytest.approx(1)
    assert (weights >= 0).all()


def test_hybrid_and_no_positions() -> None:
    model = VoxelFormer(create_vit("mini"), 5, "hybrid", voxels=16, positions="none").eval()
    assert model.pos_embed is None
    assert model(occupancy(side=16)).shape == (2, 5)
    with pytest.raises(UserError, match="16 voxels"):
        model(occupancy(side=13))


def test_images_go_the_old_way() -> None:
    model = mini()
    images = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(model.forward_images(images), model.vit(images))
    logits, image_logits = model(occupancy(), images)
    assert (logits.shape, image_logits.shape) == ((2, 10), (2, 22))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("deit3_small_patch16_224", 1), ("vit_small_patch14_dinov2", 1), ("vit_small_patch14_reg4_dinov2", 5), ("vit_base_patch16_clip_224", 1)],
)  # fmt: skip
def test_any_plain_vit(name: str, prefix: int) -> None:
    """DeiT-III, DINOv2 with and without registers, CLIP: depth cut to one block for the test."""
    vit = create_vit(name, depth=1)
    model = VoxelFormer(vit, 4, voxels=12, cell=6).eval()
    with torch.no_grad():
        assert run_blocks(vit, torch.randn(1, 4, vit.embed_dim), model.pos_embed).shape[1] == 4 + prefix
        assert model(occupancy(side=12)).shape == (2, 4)


def test_refused_backbones() -> None:
    for name in ("resnet18", "no_such_model"):
        with pytest.raises(UserError, match=name):
            create_vit(name)


def test_cosine_head() -> None:
    head = CosineHead(3, 2)
    with torch.no_grad():
        head.W.copy_(torch.tensor([[2.0, 0.0], [0.0, 0.5], [0.0, 0.0]]))
    torch.testing.assert_close(head(torch.tensor([[3.0, 4.0, 0.0]])), torch.tensor([[18.0, 24.0]]))
    assert torch.isfinite(head(torch.zeros(1, 3))).all()


@pytest.mark.parametrize("preset", ["3DViT", "3DViT_LWF", "3DViT_1_layer", "3DViT_0_layer"])
@pytest.mark.parametrize("task", ["point_cls", "part_seg"])
def test_point_presets(preset: str, task: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone="mini", preset=preset), task, 7, 6)
    cloud = torch.rand(2, 64, 6)
    assert model(cloud).shape == ((2, 7) if task == "point_cls" else (2, 64, 7))
    weights = point_rollout(model, cloud)
    assert weights.shape == (2, 64)
    assert weights.amax(1) == pytest.approx(1)
    copy = build_model(ModelConfig(backbone="mini", preset=preset), task, 7, 6)
    load_official_state(copy, to_official(model))
    torch.testing.assert_close(copy.eval()(cloud), model.eval()(cloud))


def test_point_order_does_not_matter() -> None:
    """Evaluation logits of a permuted cloud are permuted alike when all points are kept in the first stage."""
    torch.manual_seed(0)
    model = PointFormer(create_vit("mini"), 3, 5, "seg", ratios=(1,)).eval()
    cloud = torch.rand(1, 40, 3)
    order = torch.randperm(40)
    with torch.no_grad():
        torch.testing.assert_close(model(cloud)[:, order], model(cloud[:, order]), atol=1e-4, rtol=1e-4)


def test_local_operator() -> None:
    model = PointFormer(create_vit("mini"), 6, 5, "cls", ratios=(4,), tokenizer="local_op")
    assert model(torch.rand(3, 64, 6)).shape == (3, 5)


def test_refused_points() -> None:
    model = PointFormer(create_vit("mini"), 6, 5)
    with pytest.raises(UserError, match="6 channels, got 3"):
        model(torch.rand(1, 64, 3))
    with pytest.raises(UserError, match="too few"):
        model(torch.rand(1, 2, 6))
    with pytest.raises(UserError, match="image path"):
        model.forward_images(torch.rand(1, 1, 32, 32))


@pytest.mark.parametrize("network", [PointNet, PointNet2])
def test_point_baselines(network: type) -> None:
    cloud = torch.rand(2, 128, 6)
    assert network(6, 5)(cloud).shape == (2, 5)
    assert network(6, 5, "seg")(cloud).shape == (2, 128, 5)


def test_volume_baselines() -> None:
    x = occupancy(side=12)
    assert VoxNet(4)(x).shape == (2, 4)
    assert VisionPermutator3D(4, voxels=12, cell=4, width=16, depth=1)(x).shape == (2, 4)


@pytest.mark.parametrize("mode", ["full", "frozen", "norm", "lora"])
def test_tuning_modes(mode: str) -> None:
    """What trains in each mode, and that a step moves nothing else; low-rank updates start at the weights and merge."""
    model = mini().train()
    x = occupancy()
    before = model(x).detach()
    set_trainable(model, mode, rank=2)
    torch.testing.assert_close(model(x), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "embed.weight", "pos_embed", "vit.norm.weight"} <= trained
    assert not any(n.startswith(("vit.patch_embed", "vit.head", "vit.pos_embed")) for n in trained)
    assert any("blocks" in n and "norm1" in n for n in trained) == (mode in ("full", "norm"))
    assert any("mlp.fc1" in n for n in trained) == (mode == "full")
    if mode == "lora":
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        optimiser.step()
        after = model(x).detach()
        merge_low_rank(model)
        torch.testing.assert_close(model(x), after)
        assert "blocks.0.attn.qkv.weight" in model.vit.state_dict()


def test_official_round_trip_and_refusals() -> None:
    model = mini("group")
    state = to_official(model)
    assert {"voxel_embed.proj.conv3d_1.weight", "group_embed.linear1.weight", "voxel_head.weight"} <= state.keys()
    copy = mini("group")
    load_official_state(copy, {f"module.{k}": v for k, v in state.items()})
    torch.testing.assert_close(copy(occupancy()), model(occupancy()))
    broken = {k: v for k, v in state.items() if k != "norm.weight"} | {"stranger": torch.zeros(1)}
    with pytest.raises(UserError, match=r"norm.weight is missing.*stranger is unexpected"):
        load_official_state(copy, broken)
    with pytest.raises(UserError, match="shape"):
        load_official_state(copy, state | {"voxel_head.weight": torch.zeros(3, 64)})
    assert official_key(model, "vit.norm.bias") == "norm.bias"


def test_distillation() -> None:
    """Hard is a cross entropy with the decision; the divergence is 0 only where both agree; temperature keeps its size."""
    student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 3.0, 1.0]])
    expected = math.log(math.exp(2) + 1 + math.e)
    assert float(distillation(student, teacher)) == pytest.approx(expected)
    assert float(distillation(teacher, teacher, "kl", 2.0)) == pytest.approx(0)
    p, q = student.softmax(1), teacher.softmax(1)
    both = ((p - q) * (p / q).log()).sum() / 2
    assert float(distillation(student, teacher, "kl")) == pytest.approx(float(both))
    assert float(retention(student, teacher)) == 0.0


def test_planned_costs() -> None:
    """On a fine grid the naive tokenizer's quadratic term dominates; on a coarse one the groups' two passes do."""
    fine, coarse = ({cost.tokenizer: cost for cost in costs("mini", side, 4)} for side in (64, 20))
    assert fine["naive"].macs > fine["group"].macs > fine["projection"].macs
    assert coarse["group"].macs > coarse["naive"].macs
    assert coarse["naive"].sequences == [126]


def test_local_operator_by_name() -> None:
    """The release's unused tokenizer in place of the only stage's set abstraction; more stages have no use for it."""
    config = ModelConfig(backbone="mini", preset="3DViT_1_layer", tokens="local_op")
    model = build_model(config, "point_cls", 5, 6)
    assert isinstance(model.downs[0], LocalOperator)
    assert model(torch.rand(2, 64, 6)).shape == (2, 5)
    with pytest.raises(UserError, match=r"--model\.preset 3DViT_1_layer"):
        build_model(ModelConfig(backbone="mini", tokens="local_op"), "point_cls", 5, 6)
