"""What a sparse network is worth and costs (section 9): accuracy, weights, operations, zeros."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold_shared.checkpoint import load_weights
from tenfold_shared.errors import UserError
from tenfold_shared.images import Batches
from tenfold_shared.run import Run, RunOptions
from tenfold_tost.activations import GhostActivation
from tenfold_tost.compat import from_released, recognise_architecture, restore, without_skips
from tenfold_tost.data import Data, DataConfig, load_data
from tenfold_tost.export import expand_state
from tenfold_tost.maskfiles import read_tensors
from tenfold_tost.masking import prunable_weights, relaxed_zero_filters
from tenfold_tost.models import normalizes_inside


@dataclasses.dataclass
class EvalConfig:
    """What to evaluate."""

    checkpoint: Path
    """A run's folder, a .safetensors file of ours, or a .pth.tar, .pth or .pt file of the authors' layout."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The images."""
    batch_size: int = 256
    """Images at a time, over all processes."""
    arch: str = ""
    """Architecture, where the checkpoint's keys do not tell."""
    activation: str = ""
    """The soft activation that a released network keeps, such as swish, which no key tells; default: ReLU."""


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Batches, run: Run) -> Tensor:
    """Top-1 accuracy in per cent over all processes, every sample counted once; stays on the device."""
    training = model.training
    model.eval()
    hits = [(model(images).argmax(1) == labels).sum() for images, labels in batches.epoch(0) if len(labels)]
    model.train(training)
    correct = torch.stack(hits).sum() if hits else torch.zeros((), dtype=torch.int64, device=run.device)
    return 100.0 * run.reduce(correct.float()) / batches.samples


def weights_file(checkpoint: Path) -> Path:
    """The weights of a run's folder, or the file itself."""
    return checkpoint / "checkpoints" / "last.safetensors" if checkpoint.is_dir() else checkpoint


def load_model(checkpoint: Path, arch: str = "", activation: str = "") -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, with its ghosts if it was trained to keep them, and what the file says about itself,
    its architecture at least.

    Args:
        checkpoint: a run's folder, a .safetensors file of ours, compact ones included, or one of the authors' layout.
        arch: the architecture, where neither file nor keys tell.
        activation: the soft activation that a released network keeps.

    Raises:
        UserError: unreadable, or of no known architecture (the keys that do not fit are named).

    """
    path = weights_file(checkpoint)
    about: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        state, about = load_weights(path)
        if "csr_shapes" in about:
            state = expand_state(state, about.pop("csr_shapes"))
    elif path.is_file():
        state = from_released(read_tensors(path))
    else:
        raise UserError(f"no checkpoint at {path}: give a run's folder, a .safetensors or a .pth.tar file")
    about["arch"] = arch or about.get("arch", "") or recognise_architecture(without_skips(state))
    kept = {name: about.get(name) for name in ("soft", "beta", "skip")}
    return restore(state, about["arch"], **kept, activation=activation), about


def evaluate(config: EvalConfig, options: RunOptions) -> None:
    """Print accuracy, remaining weights and operations of a checkpoint as one JSON line."""
    model, about = load_model(config.checkpoint, config.arch, config.activation)
    with Run.evaluation("tost", options) as run:
        data = load_data(config.data, config.batch_size, run, normalizes_inside(model), config.batch_size)
        check_fit(model, data, config.data.name)
        model = run.prepare(model)
        reached = accuracy(model, data.evaluation, run).item()
        if run.is_main:
            plain = run.unwrap(model)
            print(json.dumps({**about, "accuracy": reached, **weight_counts(plain), **operations(plain, data.example)}))


def check_fit(model: nn.Module, data: Data, name: str) -> None:
    """Refuse a network whose first layer takes images of other channels than the data set has, or whose head has other
    classes.

    Raises:
        UserError: naming both.

    """
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.in_channels != data.shape[0]:
        raise UserError(
            f"the network takes images of {first.in_channels} channels and {name} has {data.shape[0]}: "
            "choose another --arch or --data.name"
        )
    head = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if head and head[-1].out_features != data.classes:
        raise UserError(f"the network has {head[-1].out_features} classes and {name} has {data.classes}")


def weight_counts(model: nn.Module) -> dict[str, Any]:
    """Weights that are not zero and all of them: over the convolutions, with linear layers, over all parameters."""

    def count(tensors: list[nn.Parameter]) -> list[int]:
        return [int(sum(int(t.count_nonzero()) for t in tensors)), sum(t.numel() for t in tensors)]

    convolutions = list(prunable_weights(model).values())
    return {
        "nonzero_conv": count(convolutions),
        "nonzero_conv_linear": count(list(prunable_weights(model, linear=True).values())),
        "nonzero_all": count(list(model.parameters())),
    }


def operations(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Floating-point operations of one picture: of the dense network, and what an ideal sparse kernel would need.

    Convolutions and linear layers are counted, a multiply-add as two.
    """
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415 - slow to import

    training = model.training
    example = example.to(next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(example)
    model.train(training)
    counts = counter.get_flop_counts()
    dense = sparse = 0
    for name, weight in prunable_weights(model, linear=True).items():
        module = f"{type(model).__name__}.{name.rpartition('.')[0]}"
        layer = sum(counts.get(module, {}).values()) // len(example)
        dense += layer
        sparse += layer * int(weight.count_nonzero()) // weight.numel()
    return {"flops_dense": dense, "flops_sparse": sparse}


@torch.no_grad()
def zero_rates(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Fraction of zeros that each activation puts out (section 9 a), by the activation's name; a module used twice
    counts both.
    """
    seen: dict[str, list[Tensor]] = {}
    names: dict[nn.Module, str] = {m: n for n, m in model.named_modules() if isinstance(m, nn.ReLU | GhostActivation)}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen.setdefault(names[module], []).append((output == 0).double().mean())

    handles = [module.register_forward_hook(note) for module in names]
    training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: float(torch.stack(rates).mean()) for name, rates in seen.items()}


def mean_zero_rates(model: nn.Module, batches: Batches, run: Run) -> dict[str, float]:
    """The fractions of `zero_rates` over all batches and processes."""
    zeros: dict[str, float] = {}
    for images, _ in batches.epoch(0):
        if len(images):
            for name, rate in zero_rates(model, images).items():
                zeros[name] = zeros.get(name, 0.0) + rate * len(images)
    return {
        name: run.reduce(torch.tensor(count, dtype=torch.float64, device=run.device)).item() / batches.samples
        for name, count in zeros.items()
    }


def zero_filters(model: nn.Module, threshold: float = 0.9) -> float:
    """Fraction of filters of which more than `threshold` of the weights are zero (section 9 b)."""
    filters, zero, _ = relaxed_zero_filters(prunable_weights(model).values(), threshold=threshold)
    return zero / filters
