"""What is to be proved: a box of inputs, and linear inequalities of the logits (section 2.6)."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_grafting.bounds import margin_spec
from tenfold_grafting.graph import Graph
from tenfold_grafting.intervals import Box
from tenfold_shared.errors import UserError


@dataclasses.dataclass
class Property:
    """For every x with lower <= x <= upper: all rows of C f(x) + d are positive.

    lower and upper are pixels [*input_shape]; C is [rows, classes], d [rows].
    """

    lower: Float[Tensor, "*input"]
    upper: Float[Tensor, "*input"]
    rows: Float[Tensor, "rows classes"]
    constant: Float[Tensor, " rows"]

    def checked(self, graph: Graph) -> "Property":
        """The property, if it is one of this network.

        Raises:
            UserError: shapes that do not fit, no rows, an empty box, or numbers that are not finite.

        """
        if tuple(self.lower.shape) != graph.input_shape or self.upper.shape != self.lower.shape:
            raise UserError(
                f"the property has inputs of shape {tuple(self.lower.shape)}, the network {graph.input_shape}"
            )
        if self.rows.dim() != 2 or self.rows.shape[1] != graph.classes or len(self.constant) != len(self.rows):
            raise UserError(
                f"the property has rows of shape {tuple(self.rows.shape)}, the network gives {graph.classes} logits"
            )
        if not len(self.rows):
            raise UserError("the property has no rows: there is nothing to verify")
        tensors = (self.lower, self.upper, self.rows, self.constant)
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            raise UserError("the property has numbers that are not finite")
        if bool((self.lower > self.upper).any()):
            raise UserError("the property's box is empty: a lower bound lies above its upper bound")
        return self

    def to(self, device: torch.device) -> "Property":
        """The property elsewhere."""
        return Property(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    def box(self, graph: Graph) -> Box:
        """The box as the first node sees it, [1, *input_shape]."""
        return Box(graph.normalised(self.lower[None]), graph.normalised(self.upper[None]))


def check_eps(eps: float) -> None:
    """Refuse a radius that makes no ball.

    Raises:
        UserError: not positive, or larger than the pixel range.

    """
    if not 0 < eps <= 1:
        raise UserError(f"--eps {eps}: the radius is in pixel units and lies in (0, 1]")


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that the network has no logit for.

    Raises:
        UserError: naming the range found.

    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(f"the labels range over [{low}, {high}], the network gives {classes} logits")


def check_pixels(images: Tensor, what: str = "the images range") -> None:
    """Refuse values outside of the pixel range.

    Raises:
        UserError: naming the range found.

    """
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UserError(f"{what} over [{low:g}, {high:g}], expected pixels in [0, 1] before any normalisation")


def pixel_box(graph: Graph, images: Float[Tensor, "batch *input"], eps: float) -> Box:
    """The l-infinity balls around images, cut to pixels in [0, 1], then normalised: not symmetric near 0 and 1."""
    images = images.to(graph.device, graph.dtype)
    return Box(graph.normalised((images - eps).clamp(min=0)), graph.normalised((images + eps).clamp(max=1)))


def ball(image: Float[Tensor, "*input"], label: int, eps: float, classes: int = 10) -> Property:
    """The property that every image of the ball gets the label."""
    check_eps(eps)
    check_pixels(image)
    check_labels(torch.tensor([label]), classes)
    pixels = image.double()
    rows = margin_spec(torch.tensor([label], device=image.device), classes)[0]
    return Property((pixels - eps).clamp(min=0), (pixels + eps).clamp(max=1), rows, rows.new_zeros(len(rows)))
