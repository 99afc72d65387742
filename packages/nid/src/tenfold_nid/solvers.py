"""Fitting images, whole or in patches, by any of the solvers (sections 2.5 and 6)."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .coordinates import lattice
from .dictionary import NeuralDictionary
from .fitting import ENTRIES, CodePrior, System, gate_code, gate_input, posterior, refine_codes, ridge, system
from .gates import CodebookGate
from .optimisation import Objective, adam, gate_parameters, training_step
from .patches import blend_windows, extract_windows
from .robust import admm, irls
from .sparse import fista, omp

Solver = Literal["ridge", "map", "omp", "fista", "irls", "huber", "admm", "adam", "gate"]
Support = Literal["gate", "all"]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How codes of new signals are found."""

    solver: Solver = "ridge"
    """ridge: closed form; map: closed form under a Gaussian prior; omp, fista: sparse; irls, huber, admm: against
    outliers; adam: steps on the codes; gate: steps on the whole gating network, as released"""
    support: Support | None = None
    """atoms that may take part: those the gate picks, or all (default: the gate's if it can predict); map, omp and fista
    choose among all"""
    penalty: float = 1e-4
    """λ of the ridge or l1 term, or the noise variance of map; omp, which limits the atoms, takes 1e-8 at most"""
    atoms: int | None = None
    """atoms that omp chooses (default: as many as the dictionary activates)"""
    steps: int = 100
    """iterations of the iterative solvers"""
    lr: float = 1e-2
    """step size of adam and gate"""

    def __post_init__(self) -> None:
        """Refuse what no solver takes."""
        if not 0 <= self.penalty < float("inf"):
            raise ValueError(f"--fit.penalty takes 0 or more, got {self.penalty}")
        if self.steps < 0 or not 0 < self.lr < float("inf"):
            raise ValueError(
                f"--fit.steps takes 0 or more and --fit.lr a positive number, got {self.steps} and {self.lr}"
            )
        if self.atoms is not None and self.atoms < 1:
            raise ValueError(f"--fit.atoms takes 1 or more, got {self.atoms}")


def fit_codes(
    model: NeuralDictionary,
    images: Float[Tensor, "batch *spatial channels"],
    mask: Bool[Tensor, "batch *spatial"] | None = None,
    options: FitOptions | None = None,
    *,
    prior: CodePrior | None = None,
) -> Float[Tensor, "batch code"]:
    """Codes of new signals sampled on the lattice; only observed samples are used, by the gate as well.

    Args:
        model: a trained dictionary, left as it is.
        images: signals; what lies at masked samples is never read.
        mask: True where a sample was observed.
        options: the solver and its parameters.
        prior: distribution of the codes, for the solver ``map``.

    Raises:
        ValueError: channels or sizes do not fit the dictionary, nothing was observed, or the system is singular.

    """
    options = options or FitOptions()
    config = model.config
    if images.shape[-1] != config.out_dim or images.ndim != config.in_dim + 2:
        raise ValueError(
            f"the dictionary represents {config.in_dim}-D signals of {config.out_dim} channels (channels last), "
            f"got an array of shape {tuple(images.shape)}"
        )
    with torch.no_grad():
        if options.solver != "gate":
            design = model.design(lattice(images.shape[1:-1], device=images.device, dtype=images.dtype))
            codes = []
            for part in signal_parts(model, options, images, mask):
                some, seen = images[part], None if mask is None else mask[part]
                problem = system(design, some.flatten(1, -2), None if seen is None else seen.flatten(1))
                codes.append(solve(model, problem, options, images=some, mask=seen, prior=prior))
            return torch.cat(codes)
    return finetune_gate(model, images, mask, steps=options.steps, lr=options.lr)


def signal_parts(
    model: NeuralDictionary,
    options: FitOptions,
    images: Float[Tensor, "batch *spatial channels"],
    mask: Bool[Tensor, "batch *spatial"] | None,
) -> list[slice]:
    """The signals to solve for at a time, which bounds the memory of whatever a solver keeps for each of them."""
    width, active = model.config.code_dim, options.atoms or model.config.num_topk
    numbers = {"omp": active * width, "admm": width**2}.get(options.solver, active**2)
    if mask is not None:  # rows of its own
        numbers += int(mask.flatten(1).sum(dim=1).max()) * images.shape[-1] * width
    size = max(1, ENTRIES // numbers)
    return [slice(first, first + size) for first in range(0, len(images), size)]


def gate_start(
    model: NeuralDictionary,
    options: FitOptions,
    images: Float[Tensor, "batch *spatial channels"] | None,
    mask: Bool[Tensor, "batch *spatial"] | None = None,
) -> tuple[Float[Tensor, "batch code"] | None, Int[Tensor, "batch active"] | None]:
    """The gate's code and support where the options ask for them, or leave it open and it can predict; else None.

    Raises:
        ValueError: they ask for the gate, which is a table or has no images to look at.

    """
    predicts = images is not None and not isinstance(model.gate_generator, CodebookGate)
    if options.support == "all" or (options.support is None and not predicts):
        return None, None
    if images is None:
        raise ValueError("the gate looks at images; without any, set support to 'all'")
    return gate_code(model, images, mask)


def solve(
    model: NeuralDictionary,
    problem: System,
    options: FitOptions,
    *,
    images: Float[Tensor, "batch *spatial channels"] | None = None,
    mask: Bool[Tensor, "batch *spatial"] | None = None,
    prior: CodePrior | None = None,
) -> Float[Tensor, "batch code"]:
    """Codes from a linear system, which may stand for pixels, projections or points.

    Args:
        model: the dictionary.
        problem: what was observed.
        options: the solver and its parameters (any but ``gate``).
        images: what the gate may look at to propose atoms and a start; None leaves the gate out.
        mask: True where the images were observed.
        prior: distribution of the codes, for the solver ``map``.

    """
    start, support = gate_start(model, options, images, mask)
    solver, penalty = options.solver, options.penalty
    if solver == "ridge":
        return ridge(problem, support, penalty=penalty)
    if solver == "map":
        if prior is None:
            raise ValueError("the solver 'map' needs the distribution of the training codes; compute it with fit_prior")
        return posterior(problem, prior, penalty).mean
    if solver == "omp":
        return omp(problem, options.atoms or model.config.num_topk, penalty=min(penalty, 1e-8))[0]
    if solver == "fista":
        return fista(problem, penalty, steps=options.steps, start=start)
    if solver == "irls":
        return irls(problem, support, penalty=penalty, steps=options.steps).code
    if solver == "huber":
        return irls(problem, support, loss="huber", penalty=penalty, steps=options.steps).code
    if solver == "admm":
        return admm(problem, support, penalty=penalty, steps=options.steps).code
    if solver == "adam":
        if start is None:
            start = problem.targets.new_zeros(len(problem.targets), model.config.code_dim)
        return refine_codes(problem, start, support, steps=options.steps, lr=options.lr, keep=[options.steps])[0]
    raise ValueError(f"the solver {solver!r} does not work on a linear system")


def finetune_gate(
    model: NeuralDictionary,
    images: Float[Tensor, "batch *spatial channels"],
    mask: Bool[Tensor, "batch *spatial"] | None = None,
    *,
    settings: Objective | None = None,
    steps: int = 100,
    lr: float = 1e-4,
    seed: int = 0,
) -> Float[Tensor, "batch code"]:
    """The released way: Adam on the whole gating network, the dictionary frozen, the top-k taken anew at every step.

    A codebook of another size is replaced by a fresh one with a row a signal.

    Raises:
        ValueError: the signals observe different numbers of samples, so that they do not form a batch.

    """
    model = copy.deepcopy(model).train()
    model.experts.requires_grad_(False)
    signal: Tensor = gate_input(images, mask)
    if isinstance(model.gate_generator, CodebookGate):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.renew_codebooks(len(images))
        model.to(images)
        signal = torch.arange(len(images), device=images.device)
    coords = lattice(images.shape[1:-1], device=images.device, dtype=images.dtype)
    targets = images.flatten(1, -2)
    if mask is not None:
        counts = mask.flatten(1).sum(dim=1)
        if bool((counts != counts[0]).any()) or not bool(counts[0]):
            raise ValueError(
                "the gate solver takes a batch that observes the same number (at least one) of samples each"
            )
        order = mask.flatten(1).to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(counts[0])]
        coords = coords[order]
        targets = targets.gather(1, order[..., None].expand(-1, -1, targets.shape[-1]))
    optimizer = adam(gate_parameters(model), lr=lr)
    for _ in range(steps):
        training_step(model, optimizer, signal, coords, targets, settings or Objective())
    with torch.no_grad():
        return model.sparse_code(signal)


class PatchModel:
    """A dictionary of patches applied to whole images: cut, fit, render, blend (section 2.8).

    Args:
        model: dictionary whose ``size`` is the patch.
        stride: distance of neighbouring patches; None tiles without overlap (as released).

    """

    def __init__(self, model: NeuralDictionary, stride: int | None = None) -> None:
        if len(model.config.size) != 2:
            raise ValueError(f"patches of images are two-dimensional, the dictionary has size {model.config.size}")
        self.model = model
        self.patch = (model.config.size[0], model.config.size[1])
        self.stride = min(self.patch) if stride is None else stride

    def reconstruct(
        self,
        images: Float[Tensor, "batch height width channels"],
        mask: Bool[Tensor, "batch height width"] | None = None,
        options: FitOptions | None = None,
        *,
        prior: CodePrior | None = None,
        scale: int = 1,
    ) -> Float[Tensor, "batch rows cols channels"]:
        """Images from the codes of their patches, at ``scale`` times the resolution.

        Raises:
            ValueError: an image is smaller than a patch, or a patch has no observed pixel.

        """
        codes = self.codes(images, mask, options, prior=prior)
        return self.render(codes, (images.shape[1], images.shape[2]), scale)

    def codes(
        self,
        images: Float[Tensor, "batch height width channels"],
        mask: Bool[Tensor, "batch height width"] | None = None,
        options: FitOptions | None = None,
        *,
        prior: CodePrior | None = None,
    ) -> Float[Tensor, "patches code"]:
        """Codes of the patches, row by row, images one after the other."""
        patches = extract_windows(images, self.patch, self.stride)
        seen = None if mask is None else extract_windows(mask[..., None], self.patch, self.stride).squeeze(-1)
        return fit_codes(self.model, patches, seen, options, prior=prior)

    def render(
        self, codes: Float[Tensor, "patches code"], size: tuple[int, int], scale: int = 1
    ) -> Float[Tensor, "batch rows cols channels"]:
        """Images of a size, at ``scale`` times the resolution, from the codes of their patches.

        A patch is evaluated at the centres of the fine pixels, which lie around that of the coarse one, so that
        neighbouring patches go on where the other ends.
        """
        fine = (self.patch[0] * scale, self.patch[1] * scale)
        coords = lattice(fine, device=codes.device, dtype=codes.dtype)
        if scale > 1:
            coarse, many = (torch.tensor(n, device=codes.device, dtype=codes.dtype) for n in (self.patch, fine))
            coords = coords * (many - 1) / (coarse - 1).clamp(min=1) / scale
        with torch.no_grad():
            rendered = self.model.render(codes, coords).unflatten(1, fine)
        return blend_windows(rendered, (size[0] * scale, size[1] * scale), self.stride * scale)


def inpaint(
    model: NeuralDictionary,
    images: Float[Tensor, "batch height width channels"],
    mask: Bool[Tensor, "batch height width"] | None = None,
    options: FitOptions | None = None,
    *,
    stride: int | None = None,
) -> tuple[Float[Tensor, "batch height width channels"], Bool[Tensor, "batch height width"]]:
    """Fill what is hidden or does not belong: with a mask, its complement; without, what a robust fit takes for
    outliers.

    Args:
        model: dictionary of patches of clean images.
        images: corrupted images.
        mask: True where a pixel can be trusted; None lets the l1 fit decide.
        options: the solver; default is ridge with a mask and irls without.
        stride: of the patches; None tiles without overlap.

    Returns:
        The images with the pixels in question replaced, and which those are.

    """
    patched = PatchModel(model, stride)
    chosen = options or FitOptions(solver="irls" if mask is None else "ridge", steps=20)
    clean = patched.reconstruct(images, mask, chosen)
    hidden = residual_outliers(images, clean) if mask is None else ~mask
    return torch.where(hidden[..., None], clean, images), hidden


def residual_outliers(
    images: Float[Tensor, "batch *spatial channels"],
    clean: Float[Tensor, "batch *spatial channels"],
    threshold: float = 4.0,
    floor: float = 0.05,
) -> Bool[Tensor, "batch *spatial"]:
    """Samples that differ from a reconstruction by more than ``threshold`` robust deviations and at least ``floor``."""
    residual = (images - clean).square().mean(dim=-1).sqrt()
    scale = 1.4826 * residual.flatten(1).median(dim=1).values
    return residual > (threshold * scale).clamp(min=floor).view(-1, *[1] * (residual.ndim - 1))
