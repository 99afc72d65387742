"""Lines below and above an activation on its interval (section 2.6)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tenfold_grafting.operations import Activation

SMALLEST_WIDTH = 1e-8
"""Widths below it are widened, as in the released code, so that no slope is 0/0."""


class Lines(NamedTuple):
    """lower_slope z + lower_intercept <= f(z) <= upper_slope z + upper_intercept for l <= z <= u.

    All are [batch, *shape], but `lower_slope` may have rows: [batch, rows, *shape]. `lower_intercept` is None where no
    neuron is grafted. `shift` is s beta of the splits, [batch, *shape], None without splits.
    """

    lower_slope: Tensor
    upper_slope: Tensor
    lower_intercept: Tensor | None
    upper_intercept: Tensor
    shift: Tensor | None = None

    def of(self, images: Tensor) -> "Lines":
        """The lines of some images of the batch."""
        return self._replace(**{name: part[images] for name, part in self._asdict().items() if part is not None})

    def of_rows(self, part: slice) -> "Lines":
        """The lines of some rows; only lower slopes differ between rows, if any do."""
        rowwise = self.lower_slope.dim() > self.upper_slope.dim()
        return self._replace(lower_slope=self.lower_slope[:, part]) if rowwise else self


def relax(
    activation: Activation, lower: Tensor, upper: Tensor, alpha: Tensor | None = None, shift: Tensor | None = None
) -> Lines:
    """The tightest upper line, and a lower line through 0, of every neuron.

    With d = u / (u - l), the upper line is d z - l d, and the lower line alpha z, where alpha is in [0, 1] on unstable
    neurons; by default it is 1 if d > 1/2 (u > -l), else 0. Stable neurons and grafted ones are exact.

    Args:
        activation: with the mask of grafted neurons.
        lower: l [batch, *shape].
        upper: u, not below l.
        alpha: slopes [batch, *shape] or [batch, rows, *shape], read on unstable neurons only.
        shift: see `Lines`.

    """
    below, above = lower.clamp(max=0), upper.clamp(min=0)
    above = torch.maximum(above, below + SMALLEST_WIDTH)
    slope = above / (above - below)
    intercept = -below * slope
    flat = (slope > 0.5).to(slope.dtype)
    if alpha is not None:
        unstable = (lower < 0) & (upper > 0)
        rowwise = alpha.dim() > lower.dim()
        flat = torch.where(unstable[:, None], alpha, flat[:, None]) if rowwise else torch.where(unstable, alpha, flat)
    if activation.mask is None or activation.slope is None or activation.intercept is None:
        return Lines(flat, slope, None, intercept, shift)
    grafted = activation.mask != 0
    line = torch.where(grafted, activation.intercept, 0.0)
    return Lines(
        torch.where(grafted, activation.slope, flat),
        torch.where(grafted, activation.slope, slope),
        line.expand_as(slope),
        torch.where(grafted, activation.intercept, intercept),
        shift,
    )
