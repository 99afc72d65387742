"""Numbers of the released implementation (and of the specification's robust terms): every .npz, by kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tenfold_cilqud.anchors import class_means, herding, nearest_mean
from tenfold_cilqud.baselines import align_weights
from tenfold_cilqud.compat import load_official_state
from tenfold_cilqud.evaluate import task_accuracies
from tenfold_cilqud.models import PreActResNet
from tenfold_cilqud.objective import (
    Answered,
    Labelled,
    Weights,
    balanced_term,
    batch_composition,
    consistency,
    distillation_terms,
    feature_transfer,
    first_task_terms,
    knowledge_distillation,
    random_term,
)
from tenfold_cilqud.protocol import Samples, new_samples, saved_samples, seen_samples
from tenfold_cilqud.query import query
from tenfold_cilqud.robust import Robust, labelled_attack, rft_attack, rkd_attack, rtc_attack, rtc_term, worst_cases
from tenfold_shared.parity import Fixture, check_parity, parity_files


def close(actual, expected, tolerance: float) -> None:
    """|actual - expected| <= tolerance (1 + |expected|)."""
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=tolerance, atol=tolerance)


def network(case: Fixture, prefix: str = "state/", **changes) -> PreActResNet:
    """The fixture's network in double precision with its state."""
    cfg = case.meta
    net = PreActResNet(
        cfg["classes_per_task"],
        cfg["num_tasks"],
        width=cfg["width"],
        block=cfg.get("block", "basic"),
        blocks=cfg.get("blocks", [2, 2, 2, 2]),
        mean=cfg.get("mean", (0.0,)),
        std=cfg.get("std", (1.0,)),
        **changes,
    ).double()
    if "mean" in cfg:  # the fixtures have them as decimal numbers
        for name in ("mean", "std"):
            getattr(net.normalise, name).copy_(torch.tensor(cfg[name], dtype=torch.float64).view(-1, 1, 1))
    state = case.under(prefix)
    if state:
        load_official_state(net, state)
    return net


def norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


# -- the network --------------------------------------------------------------------------------------------------------


def model_forward(case: Fixture) -> None:
    cfg, x = case.meta, case["in/x"]
    net = network(case)
    assert sum(parameter.numel() for parameter in net.parameters()) == cfg["params"]
    after = case.under("state/")["layer4.0.bn1.running_mean"]
    if torch.equal(after, case["out/running_mean_layer4.0.bn1"]):
        undo_pass(net, x)
    net.eval()
    features = net.features(x)
    close(features, case["out/feature"], 1e-9)
    for head in ("main", "aux"):
        close(net(x, cfg["out_idx"], head), case[f"out/{head}"], 1e-9)
    net.train()
    out = net(x, cfg["out_idx"], "main")
    close(out, case["out/train_main"], 1e-9)
    out.square().sum().backward()
    for name, expected in case.under("grad/").items():
        # The fixtures name the second block of a stage also where a stage has one block only: the last one is meant.
        last = name if name in net.state_dict() else name.replace("layer4.1.", "layer4.0.")
        close(net.get_parameter(last).grad, expected, 1e-9)
    norm = net.get_submodule("layer4.0.bn1")
    close(norm.running_mean, case["out/running_mean_layer4.0.bn1"], 1e-9)
    close(norm.running_var, case["out/running_var_layer4.0.bn1"], 1e-9)


def undo_pass(net: PreActResNet, x: torch.Tensor) -> None:
    """The running statistics before a training pass over `x`, from those after it.

    A fixture whose state already holds what the pass left behind says nothing about the eval outputs otherwise. The
    pass itself does not depend on the running statistics: r_after = (1 - m) r_before + m s gives r_before.
    """
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms(net)]
    net.train()
    with torch.no_grad():
        net(x, 1)
    for norm, (mean, variance) in zip(norms(net), before, strict=True):
        m = norm.momentum
        for now, kept in ((norm.running_mean, mean), (norm.running_var, variance)):
            batch = (now - (1 - m) * kept) / m
            now.copy_((kept - m * batch) / (1 - m))
        norm.num_batches_tracked -= 2


def model_rule(case: Fixture) -> None:
    cfg = case.meta
    net = network(case)
    state = net.state_dict()
    assert list(state) == [str(key) for key in case.arrays["out/keys"]]
    assert [str(list(value.shape)) for value in state.values()] == [str(s) for s in case.arrays["out/shapes"]]
    assert sum(parameter.numel() for parameter in net.parameters()) == cfg["params"]
    made = {}
    for i, (key, value) in enumerate(state.items()):
        draw, shape = np.random.RandomState(cfg["seed"] + i), tuple(value.shape)
        if key.endswith("num_batches_tracked"):
            made[key] = torch.zeros((), dtype=torch.int64)
        elif key.endswith("running_var"):
            made[key] = torch.from_numpy(0.5 + draw.random_sample(shape))
        elif key.endswith("running_mean"):
            made[key] = torch.from_numpy(0.1 * draw.normal(size=shape))
        elif len(shape) in (2, 4):
            made[key] = torch.from_numpy(draw.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:])))
        elif ".bn" in key and key.endswith("weight"):
            made[key] = torch.from_numpy(1 + 0.1 * draw.normal(size=shape))
        else:
            made[key] = torch.from_numpy(0.1 * draw.normal(size=shape))
    load_official_state(net, made)
    net.eval()
    x = case["in/x"]
    with torch.no_grad():
        close(net.features(x), case["out/feature"], 1e-8)
        for head in ("main", "aux"):
            close(net(x, cfg["out_idx"], head), case[f"out/{head}"], 1e-8)


def pruned_checkpoint(case: Fixture) -> None:
    net = network(case).eval()
    x = case["in/x"]
    with torch.no_grad():
        for head in ("main", "aux"):
            close(net(x, case.meta["num_tasks"], head), case[f"out/{head}"], 1e-9)
    weights = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d)]
    kept = sum(int((weight != 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    close(100 * kept, case["out/remaining_percent"], 1e-9)


def validate(case: Fixture) -> None:
    net = network(case).eval()
    tasks = range(case.meta["tasks_seen"])
    sets = [Samples(case[f"in/x_task{j}"], case[f"in/y_task{j}"]) for j in tasks]
    found = task_accuracies(net, sets, case.meta["tasks_seen"], batch_size=case.meta["batch_size"])
    close(found, case["out/per_task"], 1e-9)
    close(np.mean(found), case["out/mean"], 1e-9)


# -- the objective ------------------------------------------------------------------------------------------------------


def kd_loss(case: Fixture) -> None:
    student = case["in/student"].requires_grad_()
    loss = knowledge_distillation(student, case["in/teacher"], case.meta["T"]).mean()
    loss.backward()
    close(loss, case["out/loss"], 1e-11)
    close(student.grad, case["grad/student"], 1e-11)


def kd_step(net: PreActResNet, case: Fixture, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, auxiliary logits and labels of an incremental step."""
    cfg = case.meta
    part = step % cfg["batches_per_cycle"]

    def labelled(name: str, index: int) -> Labelled:
        x, y = case[f"in/{name}_x{index}"], case[f"in/{name}_y{index}"]
        return Labelled(x, y, len(x))

    weights = Weights(aux=cfg["weights"]["aux"], main=cfg["weights"]["main"], temperature=cfg["T"])
    random, old = labelled("random", step), cfg["old_tasks"]
    first, logits = random_term(net, random, old + 1, weights)
    parts = [(cfg["coef_new"], labelled("new", part)), (cfg["coef_old"], labelled("old", part))]
    second = balanced_term(net, parts, old + 1, weights)
    x = case[f"in/unlabeled_x{part}"]
    answers = (case[f"in/unlabeled_main{part}"], case[f"in/unlabeled_aux{part}"])
    kept = distillation_terms(net, Answered(x, *answers, torch.zeros(len(x), 1).double(), len(x)), old, weights)
    return first + second + sum(kept.values()), logits, random.y


def first_step(net: PreActResNet, case: Fixture, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = case[f"in/x{step}"], case[f"in/y{step}"]
    terms, logits = first_task_terms(net, Labelled(x, y, len(x)))
    return sum(terms.values()), logits, y


def train_steps(case: Fixture) -> None:
    take = kd_step if case.meta["kind"] == "train_step_kd" else first_step
    start, end = case.under("state/"), case.under("out/state/")
    if all(torch.equal(value, end[name]) for name, value in start.items()):
        start = find_start(case, end)
    net, losses, accuracy = run_steps(case, take, start)
    close(losses, case["out/losses"], 1e-9)
    close(accuracy, case["out/train_acc"], 1e-7)  # the release counts it in single precision
    for name, value in net.state_dict().items():
        close(value, end[name], 1e-9)


def run_steps(case: Fixture, take, start: dict[str, torch.Tensor]):
    """The network after the fixture's steps from a state, their losses, the training accuracy in per cent."""
    cfg = case.meta
    net = network(case).train()
    net.load_state_dict(start)
    optimiser = torch.optim.SGD(net.parameters(), cfg["lr"], cfg["momentum"], weight_decay=cfg["weight_decay"])
    losses, right, total = [], 0, 0
    for step in range(cfg["steps"]):
        loss, logits, labels = take(net, case, step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        right += int((logits.argmax(1) == labels).sum())
        total += len(labels)
    return net, losses, 100 * right / total


def state_of_seed(case: Fixture, seed: int) -> dict[str, torch.Tensor]:
    """The random start of the fixtures: torch's default initialisation, then norms drawn by a generator of their own."""
    torch.manual_seed(seed)
    net = network(case, prefix="no state/")
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for norm in norms(net):
            size = norm.weight.shape
            norm.weight.copy_(1 + 0.1 * torch.randn(size, generator=draw, dtype=torch.float64))
            norm.bias.copy_(0.1 * torch.randn(size, generator=draw, dtype=torch.float64))
            norm.running_mean.copy_(0.1 * torch.randn(size, generator=draw, dtype=torch.float64))
            norm.running_var.copy_(0.5 + torch.rand(size, generator=draw, dtype=torch.float64))
    return net.state_dict()


def find_start(case: Fixture, end: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state before the steps, for fixtures whose `state/*` is, entry by entry, the one after them.

    The fixtures' networks start from a seed, and a few small steps leave the stem's weights close to it: the seed is the
    one whose stem correlates. A wrong one could not give the losses and the final state to nine digits.
    """
    stem = end["conv1.weight"]
    seeds, draw, bound = range(3000), torch.Generator(), stem[0].numel() ** -0.5  # the default's for a convolution
    drawn = torch.stack(
        [torch.empty(stem.numel()).uniform_(-bound, bound, generator=draw.manual_seed(s)) for s in seeds]
    )
    likeness = torch.cosine_similarity(drawn.double(), stem.reshape(1, -1))
    return state_of_seed(case, seeds[int(likeness.argmax())])


def composition(case: Fixture) -> None:
    columns = case.meta["columns"]
    for row in case.arrays["out/table"]:
        given = dict(zip(columns, row, strict=True))
        found = batch_composition(int(given["batch_size"]), int(given["old_tasks"]))
        expected = [given[name] for name in ("sub_batch", "batch_new", "batch_old", "coef_new", "coef_old")]
        assert list(found) == expected


def robust_terms(case: Fixture) -> None:
    cfg, x, y = case.meta, case["in/x"], case["in/y"]
    student, teacher = (network(case, f"state/{who}/").eval() for who in ("student", "teacher"))
    noise, old = case["in/delta0"] / cfg["eps"], cfg["old_tasks"]
    settings = Robust(adv="madry", eps=cfg["eps"], step_size=cfg["alpha"], steps=cfg["steps"])
    with torch.no_grad():
        features = teacher.features(x)
        answered = Answered(x, teacher.logits(features, old), teacher.logits(features, old, "aux"), features, len(x))
    labelled = Labelled(x, y, len(x))

    def at(images):
        return nn.functional.cross_entropy(student(images, old + 1), y)

    def rkd(images):
        return knowledge_distillation(student(images, old), answered.main, cfg["T"]).mean()

    def rft(images):
        return feature_transfer(student.features(images), features, "l2").mean()

    def rtc(images):
        return rtc_term(student, x, images, old + 1, len(x))

    attacks = {
        "at": labelled_attack(student, labelled, old + 1, ("main",), settings, noise),
        "rkd": rkd_attack(student, answered, old, cfg["T"], noise),
        "rft": rft_attack(answered, "l2", noise),
        "rtc": rtc_attack(student, x, old + 1, noise),
    }
    deltas = dict(zip(attacks, worst_cases(student, list(attacks.values()), settings), strict=True))
    for name, loss in {"at": at, "rkd": rkd, "rft": rft, "rtc": rtc}.items():
        expected = case[f"out/{name}_delta"]
        assert ((deltas[name] - expected).abs() > 1e-9).double().mean() <= 1e-3, name
        student.zero_grad()
        value = loss(x + expected)
        value.backward()
        close(value, case[f"out/{name}_loss"], 1e-7)
        close(loss(x), case[f"out/{name}_clean_loss"], 1e-7)
        for key, gradient in case.under(f"grad/{name}_").items():
            close(student.get_parameter(key).grad, gradient, 1e-6)
    clean = student(x, old + 1).detach()
    close(consistency(clean, student(x, old + 1)), torch.zeros(len(x)), 1e-12)


# -- query, data, baselines ---------------------------------------------------------------------------------------------


def query_knn(case: Fixture) -> None:
    anchors, pool = case["in/anchor_features"], case["in/pool_features"]
    for memory in (1, 64 << 20):  # one anchor at a time, and all at once
        found = query(anchors, pool, case.meta["per_anchor"], memory=memory)
        assert found.chosen.tolist() == case["out/selected_sorted"].tolist()
        assert found.counts.tolist() == case["out/count_after_each_anchor"].tolist()


def query_pipeline(case: Fixture) -> None:
    net = network(case).eval()

    def pixels(name: str) -> torch.Tensor:
        return case[name].permute(0, 3, 1, 2).float().div(255).double()

    pool, anchors = pixels("in/pool_uint8"), pixels("in/anchors_uint8")
    with torch.no_grad():
        pool_features, anchor_features = net.features(pool), net.features(anchors)
        close(pool_features, case["out/pool_features"], 1e-6)
        close(anchor_features, case["out/anchor_features"], 1e-6)
        chosen = query(anchor_features, pool_features, case.meta["per_anchor"]).chosen
        assert chosen.tolist() == case["out/selected_sorted"].tolist()
        for head in ("aux", "main"):
            close(net(pool[chosen], case.meta["old_tasks"], head), case[f"out/teacher_{head}"], 1e-6)
        close(net.normalise(pool[chosen])[0], case["out/first_image_normalised"], 1e-6)


def task_dataset(case: Fixture) -> None:
    cfg = case.meta
    split = [case[f"in/class_{k}"] for k in range(cfg["num_classes"])]
    order = [int(k) for k in case["in/class_order"]]
    make = {"new": new_samples, "saved": saved_samples, "val": seen_samples}[cfg["mode"]]
    samples = make(split, order, cfg["task"], cfg["classes_per_task"])
    assert torch.equal(samples.images, case["out/images"])
    assert torch.equal(samples.labels, case["out/labels"])


def herded(case: Fixture) -> None:
    cfg, features, labels = case.meta, case["in/features"], case["in/labels"]
    chosen = []
    for k in range(cfg["num_classes"]):
        own = (labels == k).nonzero().squeeze(1)
        chosen.append(own[herding(features[own], cfg["per_class"])])
    indices = torch.cat(chosen)
    assert indices.tolist() == case["out/exemplar_indices"].tolist()
    means = class_means(features[indices], labels[indices], cfg["num_classes"])
    close(means, case["out/class_means"], 1e-9)
    assert nearest_mean(case["in/query"], means).argmax(1).tolist() == case["out/nme_top1"].tolist()


def weight_align(case: Fixture) -> None:
    weight = case["in/weight"]
    assert len(weight) == case.meta["n_old"] + case.meta["n_new"]
    close(align_weights(weight, case.meta["n_new"]), case["out/weight"], 1e-12)


def variant(case: Fixture) -> None:
    """Of a kind that covers two checks, the one that its options name."""
    named = {check.__name__: check for check in (model_forward, model_rule, query_knn, query_pipeline)}
    named[case.meta["kind"]](case)


CHECKS = {
    "batches": composition,
    "herding": herded,
    "kd": kd_loss,
    "model": variant,
    "pruned": pruned_checkpoint,
    "query": variant,
    "robust": robust_terms,
    "step": train_steps,
    "task_data": task_dataset,
    "validate": validate,
    "weight_align": weight_align,
}


@pytest.mark.parametrize("path", parity_files(__file__), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    check_parity(path, CHECKS)
