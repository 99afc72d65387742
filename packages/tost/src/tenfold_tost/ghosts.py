"""The recipe around any network (sections 2.7, 2.8): ghosts attached, faded, and gone.

recipe = SparseRecipe()
ghosts = Ghosts(model, recipe, example)      # masked already; soft neurons and ghost skips are in now
for step in range(total):
    ghosts.advance(step / total)             # fades them; takes them out when their time is over
    loss = recipe.loss(model(x), y, step / total)
ghosts.finalize(masks)                       # proves that the plain sparse network is left
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from jaxtyping import Float, Int
from torch import Tensor, nn

from tenfold_tost.activations import SOFT_KINDS, GhostActivation, SoftKind
from tenfold_tost.lrsi import Lrsi
from tenfold_tost.masking import masks_from_zeros
from tenfold_tost.schedules import BetaCurve, SkipCurve, skip_strength, soft_state
from tenfold_tost.skips import SkipKind, attach_skips, detach_skips, ghost_skips, has_hooks, set_strength
from tenfold_tost.smoothing import SmoothingCurve, smoothed_cross_entropy, smoothing_at


def _check_choice(what: str, value: str, choices: Any) -> None:
    """Refuse a value that is none of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"Unknown {what} {value!r}: choose one of {', '.join(get_args(choices))}.")


@dataclasses.dataclass
class Soft:
    """Ghost soft neurons."""

    kind: SoftKind = "pswish"
    """The smooth activation in place of ReLU."""
    beta0: float = 1.0
    """Slope of pswish at the start."""
    beta_max: float = 10.0
    """Slope of pswish at the end of the window."""
    curve: BetaCurve = "linear"
    """How the slope rises; `switch` keeps the soft neuron as it is until the window ends."""
    constant: bool = False
    """Never fade, as in the released code: the trained network keeps the soft neurons, at the slope beta0."""

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        if self.kind not in SOFT_KINDS:
            raise ValueError(f"Unknown soft neuron {self.kind!r}: choose one of {', '.join(SOFT_KINDS)}.")
        _check_choice("curve of the soft neurons", self.curve, BetaCurve)
        if not 0.0 < self.beta0 <= self.beta_max:
            raise ValueError(f"The slope rises from beta0 > 0 to beta_max, got {self.beta0} and {self.beta_max}.")


@dataclasses.dataclass
class Skips:
    """Ghost skip connections."""

    kind: SkipKind = "conv"
    """A 1x1 convolution with batch norm, or a path without parameters."""
    curve: SkipCurve = "linear"
    """How the strength falls from 1 to 0."""
    lr_factor: float = 1.0
    """Learning rate of the skips relative to that of the network."""
    constant: bool = False
    """Keep strength 1 for good, as in the released code: the trained network keeps the skips."""

    def __post_init__(self) -> None:
        """Refuse a kind or curve that there is not, and a rate that climbs."""
        _check_choice("kind of ghost skip", self.kind, SkipKind)
        _check_choice("curve of the ghost skips", self.curve, SkipCurve)
        if self.lr_factor < 0.0:
            raise ValueError(
                f"The learning rate of the skips is lr_factor >= 0 times the network's, got {self.lr_factor}."
            )


@dataclasses.dataclass
class Smoothing:
    """Label smoothing."""

    a: float = 0.1
    """What is taken from the true class."""
    until: float = 1.0
    """Fraction of training after which the labels are hard."""
    curve: SmoothingCurve = "constant"
    """Constant, or falling to zero."""

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        _check_choice("curve of the label smoothing", self.curve, SmoothingCurve)
        if not 0.0 <= self.a < 1.0 or not 0.0 < self.until <= 1.0:
            raise ValueError(f"Label smoothing takes a in [0, 1) and until in (0, 1], got {self.a} and {self.until}.")


@dataclasses.dataclass
class SparseRecipe:
    """The four techniques, each None where it is not used. All of them is the paper's recipe."""

    soft: Soft | None = dataclasses.field(default_factory=Soft)
    skips: Skips | None = dataclasses.field(default_factory=Skips)
    smoothing: Smoothing | None = dataclasses.field(default_factory=Smoothing)
    lrsi: Lrsi | None = dataclasses.field(default_factory=Lrsi)
    ghost_fraction: float = 0.5
    """Part f of training in which soft neurons and ghost skips fade, in (0, 1]."""

    def __post_init__(self) -> None:
        """Refuse a window that does not lie within training."""
        if not 0.0 < self.ghost_fraction <= 1.0:
            raise ValueError(
                f"The ghosts fade within training: ghost_fraction lies in (0, 1], got {self.ghost_fraction}, "
                "which is longer than training."
                if self.ghost_fraction > 1.0
                else f"The ghosts need some time to fade: ghost_fraction lies in (0, 1], got {self.ghost_fraction}."
            )

    @property
    def fades(self) -> bool:
        """Whether any ghost goes at the end of the window."""
        return any(ghost is not None and not ghost.constant for ghost in (self.soft, self.skips))

    @property
    def stays(self) -> bool:
        """Whether any ghost is there for good, so that the trained network is not the plain one."""
        return any(ghost is not None and ghost.constant for ghost in (self.soft, self.skips))

    def window(self, total: int) -> int:
        """How many of `total` steps have the ghosts in: up to the one at which `Ghosts.advance` takes them out. (The
        product with the fraction may be rounded to a little above that step.)
        """
        return next((step for step in range(total) if step / total / self.ghost_fraction >= 1.0), total)

    def loss(
        self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], progress: float
    ) -> Float[Tensor, ""]:
        """Cross entropy with the smoothing of this moment; `progress` is the fraction of training that is over."""
        a = 0.0
        if self.smoothing is not None:
            a = smoothing_at(progress, self.smoothing.a, self.smoothing.until, self.smoothing.curve)
        return smoothed_cross_entropy(logits, labels, a)


class GhostsRemainError(RuntimeError):
    """What should be the plain sparse network is not."""


class Ghosts:
    """The ghosts in a model, which is changed in place.

    Args:
        model: any module; its soft neurons take the place of its `nn.ReLU` modules.
        recipe: which ghosts, and how they fade.
        example: a batch of the model's inputs, to find what a skip goes around; needed with skips alone.

    Raises:
        ValueError: no ReLU module to replace; no skip that can be added (see `skips.skip_units`); ghosts in the model
            already.

    """

    def __init__(self, model: nn.Module, recipe: SparseRecipe, example: Tensor | None = None) -> None:
        if has_ghosts(model):
            raise ValueError("The model has ghosts already: take them out before attaching others.")
        self.model, self.recipe = model, recipe
        self._keys = list(model.state_dict())
        self._soft: list[GhostActivation] = []
        self._relus: list[tuple[nn.Module, str, nn.Module]] = []
        if recipe.skips is not None:
            if example is None:
                raise ValueError("Ghost skips need an example input, to find what they go around.")
            attach_skips(model, example, recipe.skips.kind)
        if recipe.soft is not None:
            try:
                self._soften(recipe.soft)
            except ValueError:
                detach_skips(model)
                raise
        self.advance(0.0)

    def _soften(self, soft: Soft) -> None:
        """Replace every ReLU; one that is used in several places is one soft neuron in all of them."""
        replacements: dict[nn.Module, GhostActivation] = {}
        device = next((p.device for p in self.model.parameters()), None)
        for parent in list(self.model.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, nn.ReLU):
                    if child not in replacements:
                        replacements[child] = GhostActivation(soft.kind, soft.beta0).to(device)
                        replacements[child].train(child.training)
                    self._relus.append((parent, name, child))
                    setattr(parent, name, replacements[child])
        if not replacements:
            raise ValueError(
                f"No soft neuron can be added to {type(self.model).__name__}: it has no nn.ReLU module (a ReLU that is "
                "called as a function cannot be replaced)."
            )
        self._soft = list(replacements.values())

    @property
    def attached(self) -> bool:
        """Whether any ghost is in the model."""
        return has_ghosts(self.model)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the ghost skips, which the deployed network does not have."""
        return [parameter for skip in ghost_skips(self.model).values() for parameter in skip.parameters()]

    def advance(self, progress: float) -> bool:
        """Set the ghosts to where they are when this fraction of training is over; at the end of the window take those
        out that fade. Returns whether any was taken out: parameters are gone then, so the optimiser is to be made anew.
        """
        u = progress / self.recipe.ghost_fraction
        skips, soft = self.recipe.skips, self.recipe.soft
        if u >= 1.0 and self.recipe.fades:
            return self.detach()
        if skips is not None:
            set_strength(self.model, 1.0 if skips.constant else skip_strength(u, skips.curve))
        if soft is not None:
            moved = (
                (soft.beta0, 0.0) if soft.constant else soft_state(u, soft.kind, soft.beta0, soft.beta_max, soft.curve)
            )
            for neuron in self._soft:
                neuron.set(*moved)
        return False

    def detach(self, everything: bool = False) -> bool:
        """Take out the ghosts that fade, or all of them. Returns whether there were any."""
        skips, soft = self.recipe.skips, self.recipe.soft
        before = self.attached
        if skips is not None and (everything or not skips.constant):
            detach_skips(self.model)
        if soft is not None and (everything or not soft.constant):
            for parent, name, relu in self._relus:
                setattr(parent, name, relu)
                relu.train(parent.training)
            self._soft, self._relus = [], []
        return before

    def finalize(self, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Prove that what is left is the plain network under the mask, and return it.

        Raises:
            GhostsRemainError: a ghost module or hook is left, the state dict has other keys than before, or a weight is
                not zero where the mask is.

        """
        left = [type(m).__name__ for m in self.model.modules() if isinstance(m, GhostActivation)]
        left += list(ghost_skips(self.model)) or ["a hook of theirs"] * has_hooks(self.model)
        if left or list(self.model.state_dict()) != self._keys:
            raise GhostsRemainError(f"The network is not the plain one: {', '.join(left) or 'other keys'} is in it.")
        if masks:
            support = masks_from_zeros(self.model, linear=True)
            awake = [name for name, mask in masks.items() if bool((support[name] & ~mask.to(support[name])).any())]
            if awake:
                raise GhostsRemainError(f"Pruned weights of {', '.join(awake)} are no longer zero.")
        return self.model


def has_ghosts(model: nn.Module) -> bool:
    """Whether a model has soft neurons or ghost skips."""
    return bool(ghost_skips(model)) or any(isinstance(module, GhostActivation) for module in model.modules())


TECHNIQUES = ("soft", "skip", "ls", "lrsi")


def parse_techniques(text: str) -> frozenset[str]:
    """The techniques that a name stands for: "vanilla", "tost" (all), or any of soft, skip, ls, lrsi joined by "+".

    Raises:
        ValueError: a name that is none.

    """
    if text == "vanilla":
        return frozenset()
    if text == "tost":
        return frozenset(TECHNIQUES)
    names = text.split("+")
    unknown = [name for name in names if name not in TECHNIQUES]
    if unknown:
        raise ValueError(
            f"There is no technique {unknown[0]!r}: take vanilla, tost, or any of {', '.join(TECHNIQUES)} joined by '+'."
        )
    return frozenset(names)
