"""The neural implicit dictionary: gate, atoms and their sparse mixture (section 2)."""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .experts import IndependentExperts, Route, SharedTrunkExperts
from .gates import CodebookGate, ConvGate, GateKind, LinearGate, ResNetGate, StridedGate
from .gating import (
    Gates,
    ImportanceMode,
    LoadMode,
    dense_gates,
    importance,
    load,
    noise_scale,
    noisy_load,
    split_code,
    top_k_gates,
)
from .networks import NetworkConfig

Atoms = Literal["shared", "independent"]


@dataclass(frozen=True, kw_only=True)
class DictionaryConfig(NetworkConfig):
    """Shape of a dictionary and its gate; the defaults are those of the released scripts (section 6)."""

    num_experts: int = 1024
    """atoms E"""
    num_topk: int = 128
    """atoms k that are active for a signal"""
    atoms: Atoms = "shared"
    """one trunk with linear heads (released code), or separate networks"""
    gate: GateKind = "conv"
    """gating network"""
    size: tuple[int, ...] = (64, 64)
    """samples of a signal along each axis; baked into the resnet, strided and linear gates"""
    num_signals: int = 0
    """rows of the codebook gate"""
    gate_hidden: int = 256
    """width of the conv and strided gates"""
    gate_layers: int = 2
    """layers of the conv gate"""
    noise: bool = False
    """add learned noise to the logits while training"""

    def __post_init__(self) -> None:
        """Refuse what cannot be built, before anything is allocated."""
        super().__post_init__()
        if not 1 <= self.num_topk <= self.num_experts:
            raise ValueError(f"num_topk must lie in 1..num_experts = {self.num_experts}, got {self.num_topk}")
        if self.gate_layers < 1 or self.gate_hidden < 2:
            raise ValueError(
                f"a gate has at least 1 layer of width 2, got gate_layers {self.gate_layers}, gate_hidden {self.gate_hidden}"
            )
        if self.gate == "resnet" and (len(self.size) != 2 or self.size[0] != self.size[1]):
            raise ValueError(f"the resnet gate takes square images, got size {self.size}")
        if self.gate in {"conv", "strided"} and self.in_dim != 2:
            raise ValueError(f"the {self.gate} gate takes images; for {self.in_dim}-D signals use the codebook gate")

    @property
    def code_dim(self) -> int:
        """Numbers in a code: E coefficients and C biases."""
        return self.num_experts + self.out_dim


def celeba_config(size: int = 16) -> DictionaryConfig:
    """Configuration of the released CelebA checkpoint (section 6): 22,405,636 parameters at 16 pixels."""
    return DictionaryConfig(
        num_experts=4096,
        num_topk=256,
        hidden_dim=512,
        ffm_map_size=2048,
        ffm_map_scale=256.0,
        gate="resnet",
        size=(size, size),
    )


class Mixture(NamedTuple):
    """Outcome of a forward pass."""

    preds: Float[Tensor, "batch points channels"]
    """values of the signals, not clamped"""
    gates: Gates
    """coefficients"""
    bias: Float[Tensor, "batch channels"]
    """β"""
    importance: Float[Tensor, " experts"]
    """how much the batch asks of each atom"""
    load: Float[Tensor, " experts"] | Int[Tensor, " experts"] | None
    """how many signals use each atom; None in the dense phase"""


class NeuralDictionary(nn.Module):
    """A dictionary of coordinate networks whose sparse combinations represent the signals of a class (section 2.1).

    The state uses the released names: ``experts.*``, ``gate_generator.*``, ``noise_generator.*``.

    Args:
        config: its shape.
        load_mode: ``abs`` counts the atoms in use, ``official`` only those with a positive coefficient.
        importance_mode: ``abs`` sums magnitudes, ``signed`` is the released sum, whose variation explodes near zero
            mean.

    """

    def __init__(
        self, config: DictionaryConfig, *, load_mode: LoadMode = "abs", importance_mode: ImportanceMode = "abs"
    ) -> None:
        super().__init__()
        self.config = config
        self.load_mode, self.importance_mode = load_mode, importance_mode
        network = NetworkConfig(**{f.name: getattr(config, f.name) for f in fields(NetworkConfig)})
        kind = SharedTrunkExperts if config.atoms == "shared" else IndependentExperts
        self.experts = kind(network, config.num_experts)
        self.gate_generator = _gate(config, config.code_dim)
        self.noise_generator = _gate(config, config.num_experts) if config.noise else None

    def codebooks(self) -> list[CodebookGate]:
        """The tables of the gate and of its noise, where they are tables."""
        return [gate for gate in (self.gate_generator, self.noise_generator) if isinstance(gate, CodebookGate)]

    def renew_codebooks(self, num_signals: int) -> None:
        """Begin the tables of the gate and of its noise anew, with a row a signal."""
        self.gate_generator = CodebookGate(num_signals, self.config.code_dim)
        if self.noise_generator is not None:
            self.noise_generator = CodebookGate(num_signals, self.config.num_experts)

    def code(self, signal: Tensor) -> Float[Tensor, "batch code"]:
        """Raw code of each signal: E logits, then C biases.

        Args:
            signal: images [batch, *size, channels], or ids [batch] for the codebook gate.

        """
        return self.gate_generator(signal)

    def gating(
        self, signal: Tensor, *, dense: bool = False, noise: Float[Tensor, "batch experts"] | None = None
    ) -> tuple[Gates, Float[Tensor, "batch channels"], Tensor, Tensor | None]:
        """Gates, biases, importance and load of a batch of signals (section 2.2).

        Args:
            signal: what the gate takes.
            dense: keep every atom (warm-up).
            noise: standard normal draw for the noisy gate; None draws one.

        """
        clean, bias = split_code(self.code(signal), self.config.num_experts)
        if self.noise_generator is None or not self.training:
            gates = dense_gates(clean) if dense else top_k_gates(clean, self.config.num_topk)
            return gates, bias, importance(gates, self.importance_mode), None if dense else load(gates, self.load_mode)
        sigma = noise_scale(self.noise_generator(signal))
        noisy = clean + sigma * (torch.randn_like(clean) if noise is None else noise)
        if dense:
            gates = dense_gates(noisy)
            return gates, bias, importance(gates, self.importance_mode), None
        k = self.config.num_topk
        gates = top_k_gates(noisy, k)
        if k == self.config.num_experts:
            usage: Tensor = load(gates, self.load_mode)
        else:
            usage = noisy_load(clean, noisy, sigma, k, self.load_mode)
        return gates, bias, importance(gates, self.importance_mode), usage

    def forward(
        self,
        signal: Tensor,
        coords: Float[Tensor, "*points in_dim"],
        *,
        dense: bool = False,
        noise: Float[Tensor, "batch experts"] | None = None,
        route: Route | None = None,
    ) -> Mixture:
        """Values of the signals at the coordinates.

        Args:
            signal: images [batch, *size, channels], or ids [batch] for the codebook gate.
            coords: [points, m] shared by the batch, or [batch, points, m].
            dense: keep every atom (warm-up).
            noise: standard normal draw for the noisy gate.
            route: how to evaluate the mixture; None takes the cheapest.

        """
        return self.mixture(signal, self.experts.features(coords), dense=dense, noise=noise, route=route)

    def mixture(
        self,
        signal: Tensor,
        features: Float[Tensor, "*points hidden"],
        *,
        dense: bool = False,
        noise: Float[Tensor, "batch experts"] | None = None,
        route: Route | None = None,
    ) -> Mixture:
        """As ``forward``, from trunk features that are already there."""
        gates, bias, weight, usage = self.gating(signal, dense=dense, noise=noise)
        return Mixture(self.experts.mix(features, gates, bias, route), gates, bias, weight, usage)

    def render(
        self,
        code: Float[Tensor, "batch code"],
        coords: Float[Tensor, "points in_dim"],
        *,
        chunk: int = 1 << 16,
    ) -> Float[Tensor, "batch points channels"]:
        """Values of signals given by their codes, at any resolution; used as they are, without a selection.

        Args:
            code: coefficients (zeros where an atom is off) and biases.
            coords: where to evaluate.
            chunk: coordinates evaluated at a time, which bounds the memory.

        Raises:
            ValueError: the code has another length than the dictionary asks for.

        """
        if code.shape[-1] != self.config.code_dim:
            raise ValueError(
                f"a code of this dictionary has {self.config.code_dim} numbers "
                f"({self.config.num_experts} atoms and {self.config.out_dim} biases), got {code.shape[-1]}"
            )
        logits, bias = split_code(code, self.config.num_experts)
        gates = dense_gates(logits)
        parts = [self.experts.mix(self.experts.features(part), gates, bias) for part in coords.split(chunk)]
        return torch.cat(parts, dim=1)

    def sparse_code(self, signal: Tensor) -> Float[Tensor, "batch code"]:
        """Code of each signal as the gate gives it, zeros outside the k active atoms: a reconstruction in no step."""
        logits, bias = split_code(self.code(signal), self.config.num_experts)
        return torch.cat([top_k_gates(logits, self.config.num_topk).dense, bias], dim=-1)

    def design(self, coords: Float[Tensor, "points in_dim"], *, chunk: int = 1 << 16) -> Float[Tensor, "rows code"]:
        """Matrix that takes a code to the samples, rows in the order point, channel: ``f = design @ code``.

        The first E columns are the atoms, the last C the indicator of a channel. ``chunk`` coordinates are evaluated at
        a time, which bounds what is needed besides.
        """
        parts = [self.experts.atoms(self.experts.features(part)) for part in coords.split(chunk)]
        return design_from_atoms(torch.cat(parts))

    def flops(self) -> int:
        """Operations per coordinate as the released code counts them (section 3).

        Raises:
            ValueError: the gate is neither a codebook nor linear; no count is defined for the others.

        """
        config = self.config
        if isinstance(self.gate_generator, LinearGate):
            gate = self.gate_generator.w.numel()
        elif isinstance(self.gate_generator, CodebookGate):
            gate = 0
        else:
            raise ValueError(f"the released code defines no operation count for the {config.gate} gate")
        heads = (config.num_experts * config.out_dim + 1) * config.hidden_dim
        skipped = heads * (config.num_experts - config.num_topk) // config.num_experts
        return self.experts.flops() - skipped + config.num_topk * config.out_dim + gate


def design_from_atoms(atoms: Float[Tensor, "points experts channels"]) -> Float[Tensor, "rows code"]:
    """Stack the channels of every atom and append one bias column a channel."""
    points, _, channels = atoms.shape
    biases = torch.eye(channels, device=atoms.device, dtype=atoms.dtype).expand(points, channels, channels)
    return torch.cat([atoms.transpose(1, 2), biases], dim=-1).flatten(0, 1)


def _gate(config: DictionaryConfig, width: int) -> nn.Module:
    if config.gate == "codebook":
        if config.num_signals < 1:
            raise ValueError("the codebook gate needs num_signals, the number of training signals")
        return CodebookGate(config.num_signals, width)
    if config.gate == "linear":
        return LinearGate(math.prod(config.size) * config.out_dim, width)
    if config.gate == "resnet":
        return ResNetGate(config.out_dim, width, config.size[0])
    if config.gate == "strided":
        return StridedGate(config.out_dim, width, config.size, config.gate_hidden)
    return ConvGate(config.out_dim, width, config.gate_hidden, config.gate_layers)
