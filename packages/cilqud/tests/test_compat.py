"""Architectures at full size, and the released checkpoints."""

import collections
from pathlib import Path

import numpy as np
import pytest
import torch

from tenfold_cilqud import (
    CheckpointError,
    PreActResNet,
    create_model,
    load_official_checkpoint,
    load_official_state,
    model_names,
    to_official,
)
from tenfold_cilqud.compat import recognise
from tenfold_cilqud.evaluate import load_checkpoint
from tenfold_shared.checkpoint import save_weights
from tenfold_shared.errors import UserError


@pytest.mark.parametrize(
    ("arch", "classes", "tasks", "parameters"),
    [
        ("preact18", 2, 5, 11_176_276),
        ("preact18", 10, 10, 11_268_616),
        ("preact18", 5, 20, 11_268_616),
        ("preact18", 20, 10, 11_371_216),
        ("preact50", 2, 5, 23_529_556),
    ],
)
def test_parameter_counts(arch: str, classes: int, tasks: int, parameters: int) -> None:
    with torch.device("meta"):
        net = create_model(arch, classes, tasks)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    if (arch, classes) == ("preact18", 2):
        assert len(net.state_dict()) == 120


@pytest.mark.parametrize("name", [*model_names(), "mobilenet_v3_small"])
def test_architectures_by_name(name: str) -> None:
    net = create_model(name, 2, 3, width=4 if name in model_names() else 0).eval()
    x = torch.rand(2, 3, 32, 32)
    assert net.features(x).shape == (2, net.width)
    assert net(x, 2).shape == net(x, 2, "aux").shape == (2, 4)
    with pytest.raises(ValueError, match="4 tasks"):
        net(x, 4)


@pytest.mark.parametrize("name", model_names())
def test_images_need_not_be_square(name: str) -> None:
    net = create_model(name, 2, 3, shape=(1, 16, 21), width=2).eval()
    assert net(torch.rand(2, 1, 16, 21), 2).shape == (2, 4)


@pytest.mark.parametrize("name", ["preact19", "fcn_resnet50"])
def test_unknown_names_are_refused(name: str) -> None:
    """And networks of torchvision that are no classifiers, which would fetch weights."""
    with pytest.raises(UserError, match="neither"):
        create_model(name, 2, 3)


def test_a_backbone_of_torchvision_sees_grey_images() -> None:
    net = create_model("mobilenet_v3_small", 2, 3, shape=(1, 32, 32)).eval()
    grey = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(net.features(grey), net.features(grey.expand(-1, 3, -1, -1)))


def small(**changes) -> PreActResNet:
    torch.manual_seed(0)
    return PreActResNet(2, 3, **{"width": 2, **changes}).eval()


def test_released_files_are_read_with_the_optimiser_in_them(tmp_path: Path) -> None:
    """Their pickled optimiser is the one object that is let through."""
    net = small()
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.rand(2, 3, 16, 16), 3).sum().backward()
    optimiser.step()
    content = {"epoch": 3, "state_dict": net.state_dict(), "best_prec1": 71.5, "optimizer": optimiser}
    torch.save(content, tmp_path / "task2_best_model.pt")
    loaded = load_official_checkpoint(tmp_path / "task2_best_model.pt")
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(loaded(x, 3), net(x, 3))
    torch.save(content | {"best_prec1": np.mean([71.0, 72.0])}, tmp_path / "mean.pt")
    torch.testing.assert_close(load_official_checkpoint(tmp_path / "mean.pt")(x, 3), net(x, 3))
    torch.save({"state_dict": net.state_dict(), "who": Path("x")}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not loaded"):
        load_official_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(
    "changes", [{}, {"block": "bottleneck", "blocks": (1, 2, 1, 1)}, {"in_channels": 1, "width": 4}]
)
def test_layouts_are_recognised(changes: dict, tmp_path: Path) -> None:
    net = small(**changes)
    to_official(net, tmp_path / "net.pt")
    layout = recognise(net.state_dict())
    assert (layout.classes_per_task, layout.tasks, layout.width) == (2, 3, changes.get("width", 2))
    assert not layout.pruned
    loaded = load_official_checkpoint(tmp_path / "net.pt")
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert list(to_official(loaded)["state_dict"]) == list(net.state_dict())


def test_pruned_weights_are_multiplied_out(tmp_path: Path) -> None:
    net, state = small(), collections.OrderedDict()
    for name, value in net.state_dict().items():
        if "conv" in name:
            state[f"{name}_orig"], state[f"{name}_mask"] = value, (torch.rand_like(value) < 0.5).float()
        else:
            state[name] = value
    torch.save(state, tmp_path / "BU_ticket.pt")
    loaded = load_official_checkpoint(tmp_path / "BU_ticket.pt")
    assert recognise(state).pruned
    torch.testing.assert_close(loaded.conv1.weight, state["conv1.weight_orig"] * state["conv1.weight_mask"])
    del state["conv1.weight_mask"]
    with pytest.raises(CheckpointError, match="no mask"):
        load_official_state(net, state)


def test_what_does_not_fit_is_listed() -> None:
    net, state = small(), dict(small().state_dict())
    del state["linear.0.bias"]
    state["layer9.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(3, 3, 3, 3)
    with pytest.raises(
        CheckpointError, match=r"missing: linear\.0\.bias.*layer9\.weight.*conv1\.weight \[3, 3, 3, 3\]"
    ):
        load_official_state(net, state)
    with pytest.raises(CheckpointError, match="none of the released layout"):
        recognise({"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="no tensor"):
        recognise({"conv1.weight": 3})
    with pytest.raises(CheckpointError, match="no released layout"):
        to_official(create_model("small", 2, 3, shape=(1, 8, 8)))


def test_a_released_state_in_our_file_is_recognised(tmp_path: Path) -> None:
    save_weights(tmp_path / "net.safetensors", small().state_dict())
    net, about = load_checkpoint(tmp_path / "net.safetensors")
    assert about["tasks"] == net.tasks == 3


def test_counters_may_be_missing() -> None:
    state = {name: value for name, value in small().state_dict().items() if "num_batches" not in name}
    load_official_state(small(), state)
