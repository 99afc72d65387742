"""Cost of a method and of its result: forward-backward passes, floating-point operations, time (section 8)."""

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tenfold_bip.masking import MaskedWeight, masked_layers, prunable_weights


class LayerFlops(NamedTuple):
    """Floating-point operations of one layer for one sample: with all weights, and with those kept."""

    dense: int
    sparse: int


def flops_per_layer(model: nn.Module, example: Tensor) -> dict[str, LayerFlops]:
    """Operations of one forward pass by weight name, for the convolutions, linear layers and attention projections.

    A multiply-add counts as two operations. Biases, normalisation, activations and the products inside attention are
    left out. A layer that is called twice counts twice. "Sparse" counts the ones of the mask, or the non-zero weights
    of a model without masks: what an ideal sparse kernel would do.

    Args:
        model: with or without masks; its training mode is left as it is, and nothing in it changes.
        example: an input batch, of any size; the counts are for one sample.

    """
    kept: dict[str, int] = {}
    if any(isinstance(module, MaskedWeight) for module in model.modules()):
        kept = {layer.name: int(layer.masking.mask.sum()) for layer in masked_layers(model)}
    weights: dict[nn.Module, list[tuple[str, Tensor]]] = {}
    for name, module, attribute in prunable_weights(model):
        weights.setdefault(module, []).append((name, getattr(module, attribute).detach()))
    for module in list(weights):
        if isinstance(module, nn.MultiheadAttention):  # it uses the weight of its output layer without calling it
            weights[module] += weights.pop(module.out_proj)
    counts: dict[str, LayerFlops] = {}

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for name, weight in weights[module]:
            # every weight is used once per output position: a pixel, or a token
            attention = isinstance(module, nn.MultiheadAttention)
            uses = inputs[0].numel() // inputs[0].shape[-1] if attention else output.numel() // weight.shape[0]
            ones = kept[name] if name in kept else int(weight.count_nonzero())
            before, per_sample = counts.get(name, LayerFlops(0, 0)), 2 * uses // example.shape[0]
            counts[name] = LayerFlops(before.dense + per_sample * weight.numel(), before.sparse + per_sample * ones)

    handles = [module.register_forward_hook(count) for module in weights]
    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would call no module
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return counts


def flops(model: nn.Module, example: Tensor) -> LayerFlops:
    """Dense and sparse operations of the whole network for one sample; see `flops_per_layer`."""
    layers = flops_per_layer(model, example).values()
    return LayerFlops(sum(layer.dense for layer in layers), sum(layer.sparse for layer in layers))


@dataclass
class Ledger:
    """Cost of a method, all of its rounds included.

    Attributes:
        passes: forward-backward passes (gradient evaluations).
        samples: samples they saw.
        seconds: wall-clock time since creation, plus what earlier parts of a resumed run took.

    """

    passes: int = 0
    samples: int = 0
    earlier_seconds: float = 0.0
    _started: float = field(default_factory=time.perf_counter, repr=False)

    def count(self, samples: int, passes: int = 1) -> None:
        """Record `passes` forward-backward passes over batches of `samples` samples each."""
        self.passes += passes
        self.samples += samples * passes

    @property
    def seconds(self) -> float:
        """Wall-clock seconds so far."""
        return self.earlier_seconds + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint in the middle of a phase keeps: the time so far. Passes are counted when a phase closes."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from that time."""
        self.earlier_seconds, self._started = state["seconds"], time.perf_counter()

    def training_flops(self, forward: int) -> int:
        """Operations of all passes, a backward pass counted as two forward passes of `forward` operations a sample.

        With `forward` of the dense network it is what dense kernels do; none of the methods trains with sparse ones.
        """
        return 3 * forward * self.samples
