"""Label smoothing (section 2.5): 1 - a for the true class, a / (C - 1) for each of the others."""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

SmoothingCurve = Literal["constant", "linear"]


def smoothed_cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], a: float = 0.1
) -> Float[Tensor, ""]:
    """Mean over the batch of -sum_c t_c log softmax(logits)_c with the smoothed targets t.

    torch's own smoothing spreads its epsilon over *all* classes, so epsilon = a C / (C - 1) gives the same targets.

    Args:
        logits: one row a sample.
        labels: true classes.
        a: what is taken from the true class, in [0, 1 - 1 / C]; 0 is the plain cross entropy.

    Raises:
        ValueError: another `a`, which would make a wrong class likelier than the true one.

    """
    classes = logits.shape[1]
    if not 0.0 <= a * classes <= (classes - 1) * (1 + 1e-9):
        raise ValueError(f"Labels of {classes} classes are smoothed by a in [0, {1 - 1 / classes:.3g}], got {a}.")
    return cross_entropy(logits, labels, label_smoothing=min(1.0, a * classes / max(1, classes - 1)))


def smoothing_at(progress: float, a: float, until: float = 1.0, curve: SmoothingCurve = "constant") -> float:
    """The smoothing a(t) at a fraction of training: constant or falling linearly up to `until`, 0 from there on."""
    if progress >= until:
        return 0.0
    return a if curve == "constant" else a * (1.0 - progress / until)
