"""Numbers of the authors' released implementation: every .npz of TENFOLD_PARITY_DIR, by kind."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tenfold_bip.compat import layerwise_dense_state, load_official_state, official_state
from tenfold_bip.masking import MaskedProduct, kept_per_layer, mask_iou, pack_mask, prune_parametrize, set_keep
from tenfold_bip.models import SmallCifarResNet, create_model
from tenfold_bip.projections import Projection, keep_count, project_channel, project_filter, project_global
from tenfold_bip.released import (
    hydra_step,
    released_accelerate_step,
    released_bilevel_step,
    released_optimizer,
)
from tenfold_bip.schedules import cosine, mask_step, step
from tenfold_shared.parity import Fixture, check_parity, close, parity_files


def procedural_state(case: Fixture) -> dict[str, torch.Tensor]:
    """The fixtures' deterministic weights, under the released keys."""
    a = case.meta["a"]
    state = {}
    keys = zip(case.decoded("cfg/keys"), case.decoded("cfg/shapes"), strict=True)
    for t, (key, shape) in enumerate(keys):
        n = math.prod(shape)
        v = (((np.arange(n) + 1.0) * 0.6180339887498949 + 0.1 * (t + 1) + 0.37 * a) % 1.0 - 0.5).reshape(shape)
        kind = key.rpartition(".")[2]
        if kind == "num_batches_tracked":
            v = np.zeros(shape, dtype=np.int64)
        elif kind == "running_mean":
            v = 0.2 * v
        elif kind == "running_var":
            v = 1 + 0.5 * v
        elif kind == "popup_scores" or (kind == "weight" and len(shape) > 1):
            v = v * math.sqrt(24 / math.prod(shape[1:]))
        elif kind == "weight":
            v = 1 + 0.4 * v
        elif kind == "bias":
            v = 0.2 * v
        elif kind == "weight_mask":
            v = np.ones(shape)
        state[key] = torch.as_tensor(v)
    return state


STRUCTURE = {"unstructured": "global", "filter": "filter", "channel": "channel"}


def check_masks(case: Fixture) -> None:
    scores, conv = case["in/scores"], case["in/conv_scores"]
    for k in case.meta["keep_ratios"]:
        for p in (1, 2):
            for name, project in (("filter", project_filter), ("channel", project_channel)):
                assert torch.equal(project(conv.abs(), k, float(p)).double(), case[f"out/{name}_p{p}_{k}"])
        (mask,) = project_global([scores.abs()], k)
        assert torch.equal(mask.double(), case[f"out/unstructured_{k}"])
        # z = m * theta with theta = 1 hands the upstream gradient on to the scores
        s = scores.clone().requires_grad_()
        MaskedProduct.apply(torch.ones_like(s), s, mask).backward(case[f"in/upstream_{k}"])
        close(s.grad, case[f"grad/scores_{k}"], 1e-12)


def check_layer(case: Fixture) -> None:
    cfg = case.meta
    weight = case["state/weight"]
    x = case["in/x"].requires_grad_()
    bias = "state/bias" in case
    if weight.dim() == 2:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    else:
        layer = nn.Conv2d(
            x.shape[1],
            weight.shape[0],
            cfg["kernel"],
            cfg.get("stride", 1),
            cfg.get("padding", 0),
            groups=x.shape[1] // weight.shape[1],
            bias=bias,
        )
    prune_parametrize(layer.double(), float(cfg["k"]), STRUCTURE[cfg["kind"]], p=float(cfg.get("norm_p", 2)))
    load_official_state(layer, case.under("state/"))
    y = layer(x)
    close(y.detach(), case["out/y"], 1e-10)
    y.backward(case["in/upstream"])
    (chain,) = [layer.parametrizations["weight"]]
    close(x.grad, case["grad/x"], 1e-10)
    close(chain.original.grad, case["grad/weight"], 1e-10)
    close(chain[0].scores.grad, case["grad/popup_scores"], 1e-10)
    if bias:
        close(layer.bias.grad, case["grad/bias"], 1e-10)


def check_arch(case: Fixture) -> None:
    cfg, keys = case.meta, case.decoded("cfg/keys")
    options = {"legacy_sub_block": any(k.startswith("sub_block1.") for k in keys)} if "wrn" in cfg["arch"] else {}
    model = create_model(cfg["arch"], cfg["num_classes"], **options).double()
    structure = STRUCTURE[cfg.get("layer_type", "unstructured")]
    prune_parametrize(model, 1.0, structure)
    load_official_state(model, procedural_state(case))
    own = official_state(model)
    parameters = [key for key in keys if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert sum(own[key].numel() for key in parameters) == cfg["params_total"]
    assert sum(own[key].numel() for key in keys if key.endswith("popup_scores")) == cfg["scores"]
    head = torch.stack([own[key].flatten()[:1] for key in parameters])
    close(head, case["state/head"])

    x = case["in/x"]
    with torch.no_grad():
        model.eval()
        close(model(x), case["out/logits_dense_eval"], 1e-8)
        set_keep(model, float(cfg["k"]))
        close(model(x), case["out/logits_sparse_eval"], 1e-8)
        kept = kept_per_layer(model)
        layers = [key.replace("popup_scores", "weight") for key in keys if key.endswith("popup_scores")]
        assert [list(kept[layer]) for layer in layers] == case["out/kept_per_layer"].tolist()
        model.train()
        close(model(x), case["out/logits_sparse_train"], 1e-8)


def check_trainer(case: Fixture) -> None:
    cfg, keys, stat_keys = case.meta, case.decoded("cfg/keys"), case.decoded("cfg/stat_keys")
    state = procedural_state(case)
    model = SmallCifarResNet(cfg["blocks"], state["fc.weight"].shape[0]).double()
    load_official_state(model, {key: value for key, value in state.items() if not key.endswith("popup_scores")})
    prune_parametrize(model, float(cfg["k"]), STRUCTURE[cfg["layer_type"]], tie_scores=cfg["tied"])
    assert set(official_state(model)) == set(keys)
    options = {"momentum": float(cfg["momentum"]), "weight_decay": float(cfg["weight_decay"])}
    weight_optimizer = released_optimizer(model, float(cfg["lr"]), **options)
    mask_optimizer = released_optimizer(model, float(cfg["mask_lr"]), **options)
    model.train()
    for i in range(cfg["steps"]):
        train, val = ((case[f"in/x_{part}_{i}"], case[f"in/y_{part}_{i}"]) for part in ("train", "val"))
        if cfg["mode"] == "bilevel":
            released_bilevel_step(model, train, val, weight_optimizer, mask_optimizer, lr2=float(cfg["lr2"]))
        elif cfg["mode"] == "accelerate":
            released_accelerate_step(model, train, val, weight_optimizer, mask_optimizer)
        elif cfg["mode"] == "hydra":
            hydra_step(model, train, weight_optimizer)
        else:
            pytest.fail(f"unknown mode {cfg['mode']}")
        own = official_state(model)
        close(torch.stack([own[key].sum() for key in stat_keys]), case[f"out/sum_{i}"], 1e-8)
        close(torch.stack([own[key].norm() for key in stat_keys]), case[f"out/l2_{i}"], 1e-8)
        for entry, expected in case.under("out/").items():
            name = entry.removesuffix(f"_{i}")
            if entry == f"{name}_{i}" and name in own:
                close(own[name], expected, 1e-8)
    model.eval()
    set_keep(model, float(cfg["k"]))
    with torch.no_grad():
        close(model(case["in/x_train_0"]), case["out/final_logits_eval"], 1e-8)


def check_schedules(case: Fixture) -> None:
    cfg = case.meta
    lr, mask_lr, epochs, warmup = float(cfg["lr"]), float(cfg["mask_lr"]), cfg["epochs"], cfg["warmup_epochs"]
    for epoch in range(len(case["out/cosine"])):
        for prefix, rate in (("", lr), ("mask_", mask_lr)):
            expected = float(case[f"out/{prefix}cosine"][epoch])
            assert cosine(epoch, rate, epochs, warmup, float(cfg["warmup_lr"])) == pytest.approx(expected, abs=1e-12)
        assert step(epoch, lr, epochs) == pytest.approx(float(case["out/step"][epoch]), abs=1e-12)
        assert mask_step(epoch, mask_lr, epochs) == pytest.approx(float(case["out/mask_step"][epoch]), abs=1e-12)


def check_mask_iou(case: Fixture) -> None:
    masks = []
    for i in (0, 1):
        scores = case[f"in/scores_{i}"]
        (mask,) = Projection("global", case.meta["k"])([scores.abs()])
        assert int(mask.sum()) == int(case[f"out/kept_{i}"]) == keep_count(case.meta["k"], scores.numel())
        assert torch.equal(pack_mask(mask), case[f"out/mask_packed_{i}"])
        masks.append({"all": mask})
    assert mask_iou(*masks) == pytest.approx(float(case["out/iou"]), abs=1e-12)


def check_layerwise_export(case: Fixture) -> None:
    dense = layerwise_dense_state(case.under("state/"), case.meta["k"])
    for name, expected in case.under("out/").items():
        assert torch.equal(dense[name], expected)


CHECKS = {
    "arch": check_arch,
    "bilevel": check_trainer,
    "hydra": check_trainer,
    "layer": check_layer,
    "layerwise_export": check_layerwise_export,
    "mask_iou": check_mask_iou,
    "masks": check_masks,
    "schedules": check_schedules,
}


@pytest.mark.parametrize("path", parity_files(__file__), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    check_parity(path, CHECKS)
