"""Sparse gates that depend on the signal, and the balance statistics taken from them (sections 2.2 and 2.3)."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

LoadMode = Literal["abs", "official"]
ImportanceMode = Literal["abs", "signed"]
NOISE_FLOOR = 0.01
"""Smallest standard deviation of the gating noise."""


class Gates(NamedTuple):
    """Coefficients of a batch of signals over the dictionary.

    ``dense`` holds every coefficient, exact zeros outside the support. ``support`` and ``value`` list the support of
    each
    signal (largest magnitude first) when the gates are sparse, and are None when every atom is on.
    """

    dense: Float[Tensor, "batch experts"]
    support: Int[Tensor, "batch active"] | None
    value: Float[Tensor, "batch active"] | None


def split_code(
    code: Float[Tensor, "batch width"], num_experts: int
) -> tuple[Float[Tensor, "batch experts"], Float[Tensor, "batch channels"]]:
    """A code is E coefficients followed by C biases (section 2.1).

    Raises:
        ValueError: the code is no longer than the dictionary, so that no bias is left.

    """
    if code.shape[-1] <= num_experts:
        raise ValueError(
            f"a code for {num_experts} atoms "
            f"has that many coefficients and one bias a channel, got length {code.shape[-1]}"
        )
    return code[..., :num_experts], code[..., num_experts:]


def noise_scale(raw: Float[Tensor, "batch experts"]) -> Float[Tensor, "batch experts"]:
    """Standard deviation of the gating noise, ``softplus(raw) + 0.01`` (section 2.2, step 2)."""
    return torch.nn.functional.softplus(raw) + NOISE_FLOOR


def dense_gates(logits: Float[Tensor, "batch experts"]) -> Gates:
    """Every atom on: the warm-up phase (section 2.2, step 7)."""
    return Gates(logits, None, None)


def top_k_gates(logits: Float[Tensor, "batch experts"], k: int) -> Gates:
    """The k logits of largest magnitude, with their sign and without any normalisation (section 2.2, steps 3 and 4).

    The selection is not differentiated; the gradient flows through the chosen values.

    Raises:
        ValueError: k lies outside 1..E.

    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"the number of active atoms must lie in 1..{logits.shape[-1]}, got {k}")
    index = logits.detach().abs().topk(k, dim=-1).indices
    return gates_on(logits, index)


def gates_on(logits: Float[Tensor, "batch experts"], index: Int[Tensor, "batch active"]) -> Gates:
    """The logits restricted to a support that is given."""
    value = logits.gather(-1, index)
    return Gates(torch.zeros_like(logits).scatter(-1, index, value), index, value)


def importance(gates: Gates, mode: ImportanceMode = "abs") -> Float[Tensor, " experts"]:
    """How much the batch asks of each atom: ``Σ_s |g_s|``, or the signed sum of the released code (section 2.2, step
    5).
    """
    return (gates.dense.abs() if mode == "abs" else gates.dense).sum(dim=0)


def load(gates: Gates, mode: LoadMode = "abs") -> Int[Tensor, " experts"]:
    """How many signals of the batch use each atom (section 2.2, step 6).

    ``official`` counts positive coefficients only, so that an atom chosen with a negative one goes unnoticed.
    """
    used = gates.dense > 0 if mode == "official" else gates.dense != 0
    return used.sum(dim=0)


def noisy_load(
    clean: Float[Tensor, "batch experts"],
    noisy: Float[Tensor, "batch experts"],
    sigma: Float[Tensor, "batch experts"],
    k: int,
    mode: LoadMode = "abs",
) -> Float[Tensor, " experts"]:
    """Differentiable load: the probability of each atom to be chosen under a fresh draw of its noise (section 2.2,
    step 6).

    ``official`` compares signed logits with thresholds that are magnitudes. ``abs`` asks for the two-sided event
    ``|clean + σε| > τ``.

    Args:
        clean: logits before the noise.
        noisy: logits after it.
        sigma: standard deviation of the noise.
        k: active atoms, smaller than E.
        mode: which of the two.

    Raises:
        ValueError: k is not smaller than E, so that no atom is left out.

    """
    if not 1 <= k < clean.shape[-1]:
        raise ValueError(f"the noisy load is defined for 1 <= k < {clean.shape[-1]} atoms, got k = {k}")
    top = noisy.abs().topk(k + 1, dim=-1).values
    threshold_in, threshold_out = top[:, k : k + 1], top[:, k - 1 : k]
    size = noisy if mode == "official" else noisy.abs()
    threshold = torch.where(size > threshold_in, threshold_in, threshold_out)
    above = _normal_cdf((clean - threshold) / sigma)
    if mode == "official":
        return above.sum(dim=0)
    return (above + _normal_cdf((-clean - threshold) / sigma)).sum(dim=0)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def cv_squared(x: Float[Tensor, " n"] | Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Squared coefficient of variation, ``var(x) / (mean(x)² + 1e-10)``, in float32 as released (section 2.3).

    The variance is unbiased; the value for one element is 0.
    """
    if x.numel() == 1:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    x = x.float()
    return x.var() / (x.mean().square() + 1e-10)
