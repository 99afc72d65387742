"""Numbers of the released implementation, every fixture of every kind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.functional import interpolate as resize

from tenfold_shared.parity import Fixture, check_parity, close, parity_files
from tenfold_simple3dformer.abstraction import SetAbstraction
from tenfold_simple3dformer.attention import rollout
from tenfold_simple3dformer.augment import jitter, random_point_dropout, random_scale, random_shift, rotate_y
from tenfold_simple3dformer.backbone import create_vit, freeze_image_path
from tenfold_simple3dformer.baselines import PointTransformer
from tenfold_simple3dformer.compat import load_official_state, official_key
from tenfold_simple3dformer.data.binvox import binvox_bytes, parse_binvox
from tenfold_simple3dformer.data.s3dis import block_features, label_weights, training_rooms, whole_scene
from tenfold_simple3dformer.detection.average_precision import Detections, evaluate_detections, mean_average_precision
from tenfold_simple3dformer.detection.boxes import angle_to_bin, box_corners, box_iou, pairwise_giou
from tenfold_simple3dformer.detection.criterion import Boxes, Criterion, LossWeights, MatchCost, Prediction, Scene
from tenfold_simple3dformer.detection.transformer import (
    ConvolutionHead,
    Decoder,
    Encoder,
    FourierEmbedding,
    sine_embedding,
)
from tenfold_simple3dformer.lwf import lwf_loss
from tenfold_simple3dformer.metrics import part_segmentation
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
from tenfold_simple3dformer.voxel import VoxelFormer, released_name


def check_gradients(case: Fixture, model: nn.Module, tolerance: float) -> None:
    """Every gradient that the fixture has; a parameter of ours that it lacks there proves nothing."""
    own = {official_key(model, name): p.grad for name, p in model.named_parameters()}
    for name, expected in case.under("grad/").items():
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
    load_official_state(model, case.under("state/"), image_path="state/head.weight" in case)
    return model.eval()


def check_voxel(case: Fixture) -> None:
    voxels = case["in/voxel"].double()
    model = voxel_model(case, group_axis="released")
    embedded = model.tokens(voxels)
    close(embedded.movedim(-1, 1), case["out/embed"], 1e-9)
    with torch.no_grad():  # where empty voxels are passed over
        close(model.tokens(voxels).movedim(-1, 1), case["out/embed"], 1e-9)
    features = model.features(voxels)
    close(features, case["out/features"], 1e-9)
    logits = model(voxels)
    close(logits, case["out/logits"], 1e-9)
    loss = cross_entropy(logits, case["in/label"])
    close(loss, case["out/loss"], 1e-9)
    loss.backward()
    check_gradients(case, model, 1e-9)
    if "out/logits_group_batch_first" in case:
        close(voxel_model(case, group_axis="z")(voxels), case["out/logits_group_batch_first"], 1e-9)


def check_voxel_lwf(case: Fixture) -> None:
    cfg = case.meta
    model = voxel_model(case, group_axis="released")
    freeze_image_path(model.vit)
    voxels, labels = case["in/voxel"].double(), case["in/label"]
    images = resize(case["in/image_lowres7"], size=(224, 224), mode="nearest")
    target = case["in/teacher_argmax"]
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
            close(logits, case["out/logits_3d"], 1e-8)
            close(image_logits[:, :20], case["out/logits_2d_first20"], 1e-8)
            close(loss, case["out/loss"], 1e-8)
            close(terms["loss_3d"], case["out/loss_3d"], 1e-8)
            close(terms["loss_2d"], case["out/loss_2d"], 1e-8)
            check_gradients(case, model, 1e-8)
        adam.step()
    own = {official_key(model, name): p for name, p in model.named_parameters()}
    for name, expected in case.under("out/after/").items():
        close(own[name], expected, 1e-8)
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before)


def check_point_ops(case: Fixture) -> None:
    cfg = case.meta
    xyz, features = case["in/xyz"], case["in/feat"].requires_grad_()
    starts = case["in/fps_start"]
    index = farthest_point_sampling(xyz, cfg["npoint"], starts)
    assert torch.equal(index, case["out/fps_idx"])
    centres = gather_points(xyz, index)
    close(squared_distances(centres, xyz), case["out/sqdist"], 1e-9)
    assert torch.equal(nearest_neighbours(centres, xyz, cfg["knn"])[1], case["out/knn_idx"])
    k = case["out/ball_idx"].shape[-1]
    assert torch.equal(ball_query(centres, xyz, cfg["ball_radius"], k), case["out/ball_idx"])
    layer = SetAbstraction(cfg["npoint"], cfg["knn"], [cfg["in_channel"], *cfg["mlp"]]).double()
    names = {}
    for key in layer.state_dict():
        _, kind, number, what = key.split(".")
        names[f"{'mlp_convs' if kind == 'linears' else 'mlp_bns'}.{number}.{what}"] = key
    own = layer.state_dict()
    given = case.under("state/sa.")
    layer.load_state_dict({key: given[name].reshape(own[key].shape) for name, key in names.items()})
    for norm in layer.mlp.norms:
        norm.momentum = cfg["bn_momentum"]
    close(layer.eval()(xyz, features, starts)[1], case["out/sa_eval"], 1e-9)
    result = layer.train()(xyz, features, starts)[1]
    close(result, case["out/sa_train"], 1e-9)
    for name, expected in case.under("out/after_bn/").items():
        close(layer.state_dict()[names[name]], expected, 1e-9)
    result.square().mean().backward()  # what the fixture's gradients are of
    close(features.grad, case["grad/feat"], 1e-9)
    for name, expected in case.under("grad/sa.").items():
        close(layer.get_parameter(names[name]).grad.reshape(expected.shape), expected, 1e-9)
    close(interpolate(xyz, centres, case["in/points2"]), case["out/fp"], 1e-9)
    close(normalise_points(case["in/pc_raw"]), case["out/pc_normalized"], 1e-9)


def point_model(case: Fixture) -> PointFormer:
    cfg = case.meta
    preset = RELEASED_PRESETS[cfg["released_model"].split("/")[1]]
    task = "seg" if cfg["released_model"].endswith("Seg") else "cls"
    model = PointFormer(
        vit(case), cfg["input_dim"], cfg["n_classes"], task, ratios=preset["ratios"], neighbours=cfg["nneighbor"],
        image_path=preset["image_path"], points=cfg["num_point_cfg"], head="linear" if cfg["head"] == "default" else "cosine",
    ).double()  # fmt: skip
    load_official_state(model, case.under("state/"), image_path="state/head.weight" in case)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = cfg["bn_momentum"]
    return model


def point_stages(case: Fixture) -> int:
    return len(case.meta["td_npoints"])


def check_point(case: Fixture) -> None:
    model, points = point_model(case), case["in/points"]
    starts = list(case["in/fps_starts"]) if point_stages(case) else []
    sampled = [level.shape[1] for level in model.eval().tokens(points, starts)[0][1:]]
    assert sampled == case.meta["td_npoints"]
    with torch.no_grad():
        close(model(points, starts=starts), case["out/logits_eval"], 1e-8)
    logits = model.train()(points, starts=starts)
    close(logits, case["out/logits_train"], 1e-8)
    loss = cross_entropy(logits.flatten(0, -2), case["in/label"])
    close(loss, case["out/loss_train"], 1e-8)
    loss.backward()
    check_gradients(case, model, 1e-8)
    own = {official_key(model, key): value for key, value in model.state_dict().items()}
    for name, expected in case.under("out/after_bn/").items():
        close(own[name], expected, 1e-8)


def check_point_transformer(case: Fixture) -> None:
    cfg = case.meta
    checked = 0
    for task in ("cls", "seg"):
        if f"out/{task}" not in case:
            continue
        model = PointTransformer(
            cfg["input_dim"], cfg["n_classes"], task, stages=cfg["nblocks"], dim=cfg["transformer_dim"],
            neighbours=cfg["nneighbor"],
        ).double()  # fmt: skip
        load_official_state(model, case.under(f"state/{task}."))
        with torch.no_grad():
            result = model.eval()(case["in/points"], starts=list(case["in/fps_starts"]))
        close(result, case[f"out/{task}"], 1e-8)
        checked += 1
    assert checked


def check_rollout(case: Fixture) -> None:
    joint = rollout(list(case["in/attn"]))
    close(joint[0], case["out/joint_first"], 1e-5)
    close(joint[-1], case["out/joint_last"], 1e-5)
    grid = case.meta["grid"]
    mask = joint[-1][0, 1:]
    size = case["out/mask"].shape
    close(mask.view(size), case["out/mask"], 1e-5)
    assert size[0] == grid


def check_augment(case: Fixture) -> None:
    cfg, points = case.meta, case.arrays["in/points"]
    rng = np.random.RandomState(cfg["seed"])
    dropped = np.stack([random_point_dropout(cloud, rng, cfg["max_dropout"]) for cloud in points])
    close(dropped, case.arrays["out/dropout"], 1e-6)
    scaled = random_scale(dropped, rng, *cfg["scale"])
    close(scaled, case.arrays["out/scale"], 1e-6)
    close(random_shift(scaled, rng, cfg["shift"]), case.arrays["out/shift"], 1e-6)
    jittered = jitter(points[..., :3], np.random.RandomState(cfg["seed"] + 1), cfg["jitter_sigma"], cfg["jitter_clip"])
    close(jittered, case.arrays["out/jitter"], 1e-6)
    close(rotate_y(points[..., :3], np.random.RandomState(cfg["seed"] + 2)), case.arrays["out/rotate_y"], 1e-6)


def check_binvox(case: Fixture) -> None:
    read = parse_binvox(bytes(case.arrays["in/bytes"]))
    assert len(read.grid) == case.meta["dim"]
    assert np.array_equal(read.grid, case.arrays["out/xyz"])
    assert np.array_equal(read.grid.transpose(0, 2, 1), case.arrays["out/raw_xzy"])
    assert np.array_equal(read.translate, case.arrays["out/translate"])
    assert read.scale == float(case.arrays["out/scale"])
    assert np.array_equal(parse_binvox(binvox_bytes(read)).grid, read.grid)


def check_partseg(case: Fixture) -> None:
    cfg = case.meta
    logits = case["in/logits"].float()
    found = part_segmentation(logits, case["in/target"], {c: cfg["seg_classes"][c] for c in cfg["cat_order"]})
    names = {"accuracy": "accuracy", "class accuracy": "class_avg_accuracy", "class mIoU": "class_avg_iou"}
    for ours, theirs in {**names, "instance mIoU": "inctance_avg_iou"}.items():
        expected = case[f"out/{theirs}"]
        if torch.isnan(expected):  # the release divides by the samples of a class that has none; here it is left out
            assert 0 <= found[ours] <= 1
        else:
            close(found[ours], expected, 1e-12)
    for category, expected in zip(cfg["cat_order"], case.arrays["out/cat_iou"], strict=True):
        if np.isnan(expected):
            assert f"iou {category}" not in found
        else:
            close(found[f"iou {category}"], expected, 1e-12)


def check_s3dis(case: Fixture) -> None:
    cfg = case.meta
    room, test = case.arrays["in/room_train"], case.arrays["in/room_test"]
    features = block_features(
        room, case.arrays["in/selected"], room[int(case.arrays["in/center_index"]), :3], room[:, :3].max(0)
    )
    close(features, case.arrays["out/points"], 1e-5)
    assert np.array_equal(room[case.arrays["in/selected"], 6], case.arrays["out/labels"])
    weights = label_weights([room])
    close(weights, case.arrays["out/labelweights"], 1e-5)
    assert len(training_rooms([room], cfg["num_point"])) == cfg["n_train_samples"]
    rng = np.random.RandomState(cfg["seed"] + 1)
    grid = whole_scene(test, rng, cfg["num_point"], cfg["block"], cfg["stride"], cfg["padding"], label_weights([test]))
    assert grid.features.shape == tuple(case.arrays["out/ws_blocks_shape"])
    assert np.array_equal(grid.rows, case.arrays["out/ws_index"])
    assert np.array_equal(grid.labels, case.arrays["out/ws_label"])
    close(grid.features[0], case.arrays["out/ws_first"], 1e-5)
    close(grid.features[-1], case.arrays["out/ws_last"], 1e-5)
    close(grid.weights.astype(float).sum(), case.arrays["out/ws_weight_sum"], 1e-5)


def check_det_criterion(case: Fixture) -> None:
    cfg = case.meta
    counts = case["in/n_gt"]
    most = case["in/gt_label"].shape[1]
    truth = Boxes(
        case["in/gt_center"].float(), case["in/gt_size"].float(), case["in/gt_angle"].float(),
        case["in/gt_label"], torch.arange(most) < counts[:, None],
    )  # fmt: skip
    scene = Scene(case["in/scene_min"].float(), case["in/scene_max"].float())
    bins, residuals = angle_to_bin(case["in/gt_angle"], cfg["num_angle_bin"])
    here = truth.present
    assert torch.equal(bins[here], case["out/gt_angle_class"][here])
    close(residuals[here], case["out/gt_angle_residual"][here], 1e-4)
    corners = box_corners(truth.centre, truth.size, truth.angle)
    close(corners[here], case["out/gt_corners"][here], 1e-4)
    names = ["sem_cls_logits", "center_unnormalized", "size_unnormalized", "angle_logits", "angle_residual_normalized"]
    plain = Prediction(*(case[f"in/pred/{name}"] for name in names))
    assert plain.logits.shape[-1] == cfg["num_semcls"] + 1
    close(plain.angle, case["out/pred_angle"], 1e-4)
    close(plain.corners, case["out/pred_corners"], 1e-4)
    pairs = here[:, None].expand(-1, plain.logits.shape[1], -1)
    rotated = bool((truth.angle[here] > 0).any())
    found = pairwise_giou(plain.corners, corners, rotated=rotated, released=True)
    close(found[pairs], case["out/giou"][pairs], 1e-4)
    for arm, settings in cfg["arms"].items():
        prediction = Prediction(*(case[f"in/pred/{name}"].requires_grad_() for name in names))
        criterion = Criterion(MatchCost(**settings["cost"]), LossWeights(**settings["weights"]), released_giou=True)
        terms, assigned = criterion.layer(prediction, truth, scene)
        for name, value in terms.items():
            close(value, case[f"out/{arm}/loss_{name}"], 1e-4)
        loss, _ = criterion([prediction], truth, scene)
        close(loss, case[f"out/{arm}/loss"], 1e-4)
        assert torch.equal(assigned.matched, case[f"out/{arm}/matched_mask"].bool())
        theirs = case[f"out/{arm}/matched_gt"]
        assert torch.equal(assigned.box[assigned.matched], theirs[assigned.matched])
        loss.backward()
        for name, value in zip(names, prediction, strict=True):
            close(value.grad, case[f"grad/{arm}/{name}"], 1e-4)


def detections(rows: Tensor) -> Detections:
    score = rows[:, 9] if rows.shape[1] > 9 else torch.ones(len(rows))
    return Detections(rows[:, 0].long(), rows[:, 1].long(), rows[:, 2:5], rows[:, 5:8], rows[:, 8], score)


def check_det_ap(case: Fixture) -> None:
    truth, predicted = detections(case["in/gt_rows"]), detections(case["in/pred_rows"])
    thresholds = case.meta["thresholds"]
    for threshold, results in evaluate_detections(predicted, truth, thresholds).items():
        labels = sorted(results)
        close([results[k][0] for k in labels], case[f"out/ap_{threshold}"], 1e-6)
        close([results[k][1] for k in labels], case[f"out/recall_{threshold}"], 1e-6)
        close(mean_average_precision(results), case[f"out/mAP_{threshold}"], 1e-6)
    for i, expected in enumerate(case["out/iou_first_pairs"]):  # of a row with a true box of its scene
        here = truth.scene == predicted.scene[i]
        close(
            (box_iou(predicted.corners[i].expand(int(here.sum()), 8, 3), truth.corners[here]) - expected).abs().min(),
            0.0,
            1e-6,
        )


def check_det_decoder(case: Fixture) -> None:
    cfg = case.meta
    d, bounds = cfg["d_model"], [case["in/range_min"], case["in/range_max"]]
    xyz = case["in/xyz"]
    fourier = FourierEmbedding(d)
    fourier.load_state_dict(case.under("state/pos."))
    close(fourier(xyz, *bounds), case["out/fourier"], 1e-5)
    close(sine_embedding(xyz, *bounds, d), case["out/sine"], 1e-5)
    encoder = Encoder(d, cfg["nhead"], cfg["enc_ffn"], cfg["layers"])
    encoder.load_state_dict(case.under("state/enc."))
    memory = encoder.eval()(case["in/src"])
    close(memory, case["out/memory"], 1e-5)
    decoder = Decoder(d, cfg["nhead"], cfg["dec_ffn"], cfg["layers"])
    decoder.load_state_dict(case.under("state/dec."))
    position = fourier(xyz, *bounds).permute(2, 0, 1)
    features = decoder.eval()(memory, case["in/query_pos"], position)
    close(features, case["out/box_features"], 1e-5)
    head = ConvolutionHead(d, case["state/head.layers.8.bias"].shape[0])
    head.load_state_dict(case.under("state/head."))
    flat = features.permute(0, 2, 3, 1).flatten(0, 1)
    close(head.eval()(flat), case["out/head"], 1e-5)


CHECKS: dict[str, Callable[[Fixture], None]] = {
    "attention_rollout": check_rollout,
    "augment": check_augment,
    "binvox": check_binvox,
    "det_ap": check_det_ap,
    "det_criterion": check_det_criterion,
    "det_decoder": check_det_decoder,
    "partseg_metrics": check_partseg,
    "s3dis_blocks": check_s3dis,
    "point_cls": check_point,
    "point_ops": check_point_ops,
    "point_seg": check_point,
    "point_transformer_baseline": check_point_transformer,
    "voxel": check_voxel,
    "voxel_lwf": check_voxel_lwf,
}


@pytest.mark.parametrize("path", parity_files(__file__), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    check_parity(path, CHECKS)
