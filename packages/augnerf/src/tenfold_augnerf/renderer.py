"""Coarse and fine rendering of rays, clean or perturbed at any of the places of `perturbation.KEYS`."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_augnerf.cameras import Rays, ndc_rays, transform_rays
from tenfold_augnerf.compositing import Composited
from tenfold_augnerf.perturbation import PAIRED, Delta, Geometry, check_exposed, check_keys, check_pairs
from tenfold_augnerf.sampling import importance, stratified
from tenfold_shared.errors import UserError


@dataclass(frozen=True)
class RaySampling:
    """Where rays are sampled.

    Attributes:
        near: smallest ray parameter.
        far: largest ray parameter.
        coarse: N_c.
        fine: N_f further samples of the fine pass; 0 leaves it out.
        inverse: coarse samples at equal steps of 1/z.
        ndc: (height, width, focal) of forward-facing cameras whose rays are warped to NDC; near and far are then 0 and 1.

    """

    near: float
    far: float
    coarse: int = 64
    fine: int = 64
    inverse: bool = False
    ndc: tuple[int, int, float] | None = None

    def __post_init__(self) -> None:
        """Refuse what gives no samples."""
        if not self.near < self.far:
            raise UserError(f"rays need near < far, got near {self.near:g} and far {self.far:g}")
        if self.coarse < 2 or self.fine < 0:
            raise UserError(f"rays need 2 or more coarse and 0 or more fine samples, got {self.coarse} and {self.fine}")
        if self.inverse and self.near <= 0:
            raise UserError(f"samples at equal steps of 1/z need near > 0, got {self.near:g}")


@dataclass(frozen=True)
class Variant:
    """Where figure, released code and sense disagree (section 2.6); the defaults are ours.

    Attributes:
        branch: "shared": perturbed queries go through the networks that are evaluated; "auxiliary": both passes of a
            perturbed rendering go through a third network, as released, which the evaluated ones never hear of.
        inert_colour: level 3 leaves the raw colour alone, as released (there the sigmoid comes first).
        resort: sort the ray parameters again after `zval` moved them; released: not, so that intervals can be negative.
        white_in_adversarial: perturbed renderings have the background of clean ones; released: always black.

    """

    branch: Literal["shared", "auxiliary"] = "shared"
    inert_colour: bool = False
    resort: bool = True
    white_in_adversarial: bool = True


RELEASED = Variant(branch="auxiliary", inert_colour=True, resort=False, white_in_adversarial=False)


class Draws(NamedTuple):
    """The random numbers of a rendering; None for none.

    Attributes:
        stratified: uniform jitter of the coarse samples.
        importance: uniform numbers for the fine samples.
        coarse_noise: added to the coarse raw densities.
        fine_noise: added to the fine ones.

    """

    stratified: Float[Tensor, "rays coarse"] | None = None
    importance: Float[Tensor, "rays fine"] | None = None
    coarse_noise: Float[Tensor, "rays coarse"] | None = None
    fine_noise: Float[Tensor, "rays total"] | None = None

    def chosen(self, index: Tensor | slice) -> "Draws":
        """Those of some of the rays."""
        return Draws(*(None if x is None else x[index] for x in self))


class Pass(NamedTuple):
    """One pass over the samples of rays: what they show, and what it came from."""

    shown: Composited
    raw: Float[Tensor, "rays samples 4"]
    z: Float[Tensor, "rays edges"]
    features: Float[Tensor, "rays samples width"] | None


@dataclass
class Rendering:
    """The passes of a rendering.

    Attributes:
        fine: the pass that is shown (the coarse one where there is no other).
        coarse: the first pass, None where there is only one.
        z_std: population standard deviation of each ray's new samples, [rays]; None without them.
        views: unit view directions.
        rays: the rays as they were sampled, after cameras were moved and NDC.
        sites: the tensors at the places named by `taps`, whose `.grad` is the gradient by a perturbation there.

    """

    fine: Pass
    coarse: Pass | None
    z_std: Tensor | None
    views: Tensor
    rays: Rays
    sites: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rgb(self) -> Float[Tensor, "rays 3"]:
        """The colours shown."""
        return self.fine.shown.rgb

    @property
    def depth(self) -> Float[Tensor, "rays 1"]:
        """Expected depth, Σ w z."""
        return self.fine.shown.depth

    @property
    def acc(self) -> Float[Tensor, "rays 1"]:
        """Opacity."""
        return self.fine.shown.acc


class _Sites:
    """Applies perturbations and remembers tensors that gradients are wanted for."""

    def __init__(self, delta: Delta, taps: Collection[str]) -> None:
        self.delta, self.taps = delta, taps
        self.tapped: dict[str, Tensor] = {}

    def at(self, key: str, x: Tensor) -> Tensor:
        if key in self.delta:
            x = x + self.delta[key]
        if key in self.taps:
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            x.retain_grad()
            self.tapped[key] = x
        return x

    def __contains__(self, key: str) -> bool:
        return key in self.delta or key in self.taps


class Renderer(nn.Module):
    """NeRF's two passes; state dict keys are the released ones for `NeRF` fields.

    Args:
        nerf: field of the coarse pass.
        nerf_fine: field of the fine pass; by default the same module.
        nerf_adv: third field, which only `Variant.branch == "auxiliary"` asks.
        sampling: where rays are sampled.
        white: background.
        variant: what perturbed renderings do.

    Raises:
        UserError: the auxiliary branch without its network, or too few coarse samples for a fine pass.

    """

    coarse_weight = 1.0
    fewest_coarse = 3  # the fine pass draws from the weights of the inner samples

    def __init__(
        self,
        nerf: nn.Module,
        nerf_fine: nn.Module | None = None,
        nerf_adv: nn.Module | None = None,
        *,
        sampling: RaySampling,
        white: bool = False,
        variant: Variant = Variant(),
    ) -> None:
        super().__init__()
        self.nerf: Any = nerf
        self.nerf_fine: Any = nerf if nerf_fine is None else nerf_fine
        self.nerf_adv: Any = nerf_adv
        if variant.branch == "auxiliary" and nerf_adv is None:
            raise UserError("the auxiliary branch needs a third network: give the renderer one, or use branch shared")
        if sampling.fine and sampling.coarse < self.fewest_coarse:
            raise UserError(
                f"{sampling.coarse} coarse samples leave the fine pass nothing to draw from: take {self.fewest_coarse} or more"
            )
        self.sampling, self.white, self.variant = sampling, white, variant

    @property
    def fine_samples(self) -> int:
        """Samples of the fine pass, the coarse ones included."""
        return self.sampling.coarse + self.sampling.fine

    def check(self, keys: Collection[str]) -> None:
        """Refuse keys that this renderer cannot perturb.

        Raises:
            UserError: unknown, incomplete pairs, a level that a field does not expose, directions that it does not see,
                or a pass that is not there.

        """
        check_keys(keys)
        check_pairs(keys)
        for name in ("nerf", "nerf_fine"):
            check_exposed(keys, getattr(self, name), f"{name} ({type(getattr(self, name)).__name__})")
        for key in keys:
            if key.startswith("dir") and not getattr(self.nerf, "viewdirs", True):
                raise UserError(
                    f"{key} perturbs directions, which fields without view directions do not see: leave it out"
                )
        if not self.sampling.fine:
            for key in keys:
                if key.endswith("_c"):
                    raise UserError(
                        f"{key} perturbs the coarse pass, which a renderer without fine samples shows itself: use {key[:-1]}f"
                    )

    def forward(
        self,
        rays: Rays,
        delta: Delta | None = None,
        draws: Draws = Draws(),  # noqa: B008 - immutable
        *,
        taps: Collection[str] = (),
        keep_features: bool = False,
        fixed: Rendering | None = None,
    ) -> Rendering:
        """Render rays.

        Args:
            rays: of any number of cameras.
            delta: perturbations by key, shaped as `Geometry.shape` says; any that this renderer cannot have is refused.
            draws: random numbers; none render deterministically.
            taps: places whose tensors are kept in `Rendering.sites` with their gradient after a backward pass, which
                equals the gradient by a perturbation of zero there.
            keep_features: keep each pass's features.
            fixed: a rendering of the same rays with its features: samples and features are taken from it, so that only
                heads and compositing are computed; perturbations below the features are not possible then.

        Raises:
            UserError: see `check`; cameras that move, without `Rays.cameras`.

        """
        delta = delta or {}
        if delta or taps:
            self.check({**dict.fromkeys(taps), **delta})
        sites = _Sites(delta, taps)
        adversarial = bool(delta)
        white = self.white and (self.variant.white_in_adversarial or not adversarial)
        auxiliary = adversarial and self.variant.branch == "auxiliary"
        coarse_field = self.nerf_adv if auxiliary else self.nerf
        fine_field = self.nerf_adv if auxiliary else self.nerf_fine
        if fixed is not None:
            return self._reheaded(fixed, sites, draws, white, coarse_field, fine_field)
        rays, views = self._placed(rays, sites)
        sampling = self.sampling
        near, far = (
            rays.origins.new_tensor([[value]]) if given is None else given
            for value, given in ((sampling.near, rays.near), (sampling.far, rays.far))
        )
        edges = sampling.coarse + coarse_field.extra_edges
        z = stratified(near, far, len(rays.origins), edges, inverse=sampling.inverse, jitter=draws.stratified)
        last = not sampling.fine
        first = self._pass(
            coarse_field, rays, z, views, sites, "f" if last else "c", draws.coarse_noise, white, keep_features
        )
        if last:
            return Rendering(self._coloured(first, sites), None, None, views, rays, sites.tapped)
        z, new = self.resample(first.z, first.shown.weights, draws.importance)
        second = self._pass(fine_field, rays, z, views, sites, "f", draws.fine_noise, white, keep_features)
        z_std = new.std(-1, unbiased=False)
        return Rendering(self._coloured(second, sites), first, z_std, views, rays, sites.tapped)

    def geometry(self, height: int, width: int, cameras: int = 1) -> Geometry:
        """What radii are measured in, for images of the given size."""
        sampling = self.sampling
        fine = self.fine_samples if sampling.fine else sampling.coarse
        edges, size = self.nerf.extra_edges, self.nerf.width
        return Geometry(sampling.near, sampling.far, sampling.coarse, fine, size, height, width, cameras, edges)

    def draws(self, rays: int, generator: torch.Generator, noise_std: float = 0.0) -> Draws:
        """Jitter and, where `noise_std` is not 0, density noise of a training step, from a generator of any device."""
        sampling, edges = self.sampling, self.nerf.extra_edges

        def uniform(count: int) -> Tensor:
            return torch.rand(rays, count, generator=generator, device=generator.device)

        def normal(count: int) -> Tensor | None:
            if not noise_std:
                return None
            return noise_std * torch.randn(rays, count, generator=generator, device=generator.device)

        jitter = uniform(sampling.coarse + edges), uniform(sampling.fine + edges) if sampling.fine else None
        return Draws(*jitter, normal(sampling.coarse), normal(self.fine_samples))

    def resample(self, z: Tensor, weights: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ray parameters of the fine pass, and which of them are new."""
        return importance(z, weights, self.sampling.fine, uniform)

    def _placed(self, rays: Rays, sites: _Sites) -> tuple[Rays, Tensor]:
        """The rays where they are sampled, and unit view directions: cameras move first, NDC comes last."""
        origins, directions = rays.origins, rays.directions
        if any(key in sites for key in PAIRED):
            if rays.cameras is None:
                raise UserError("cam_r and cam_t need to know the camera of every ray: give Rays.cameras")
            angles, offsets = sites.delta["cam_r"], sites.delta["cam_t"]
            origins, directions = transform_rays(origins, directions, rays.cameras, angles, offsets)
        views = F.normalize(directions, dim=-1)
        if self.sampling.ndc is not None:
            origins, directions = ndc_rays(origins, directions, *self.sampling.ndc)
        return rays._replace(origins=origins, directions=directions), views

    def _pass(
        self,
        radiance: Any,
        rays: Rays,
        z: Tensor,
        views: Tensor,
        sites: _Sites,
        which: str,
        noise: Tensor | None,
        white: bool,
        keep: bool,
    ) -> Pass:
        z = sites.at(f"zval_{which}", z)
        if f"zval_{which}" in sites.delta and self.variant.resort:
            z = z.sort(-1).values
        samples = radiance.locate(rays, z)
        samples = samples._replace(points=sites.at(f"pts_{which}", samples.points))
        features = radiance.encode(samples)
        raw, shown = self._read(radiance, features, z, rays.directions, views, sites, which, noise, white)
        return Pass(shown, raw, z, features if keep else None)

    def _read(
        self,
        radiance: Any,
        features: Tensor,
        z: Tensor,
        directions: Tensor,
        views: Tensor,
        sites: _Sites,
        which: str,
        noise: Tensor | None,
        white: bool,
    ) -> tuple[Tensor, Composited]:
        """Levels 2 and 3: features to raw values to what the rays show."""
        if f"dir_{which}" in sites:
            views = F.normalize(sites.at(f"dir_{which}", views), dim=-1)
        raw = radiance.heads(sites.at(f"feat_{which}", features), views)
        key = f"raw_{which}"
        if key in sites.delta and self.variant.inert_colour:
            density_only = raw.new_tensor([0.0, 0.0, 0.0, 1.0])
            return raw, radiance.compose(raw + density_only * sites.delta[key], z, directions, white=white, noise=noise)
        raw = sites.at(key, raw)
        return raw, radiance.compose(raw, z, directions, white=white, noise=noise)

    @staticmethod
    def _coloured(result: Pass, sites: _Sites) -> Pass:
        if "rgb" not in sites:
            return result
        return result._replace(shown=result.shown._replace(rgb=sites.at("rgb", result.shown.rgb)))

    def _reheaded(
        self, fixed: Rendering, sites: _Sites, draws: Draws, white: bool, coarse_field: Any, fine_field: Any
    ) -> Rendering:
        below = [key for key in (*sites.delta, *sites.taps) if not key.startswith(("feat", "raw", "rgb", "dir"))]
        if below:
            raise UserError(
                f"{below[0]} moves samples, which shared samples and features cannot follow: use resample own"
            )
        passes: list[Pass | None] = []
        for which, old, radiance, noise in (
            ("c", fixed.coarse, coarse_field, draws.coarse_noise),
            ("f", fixed.fine, fine_field, draws.fine_noise if fixed.coarse else draws.coarse_noise),
        ):
            if old is None:
                passes.append(None)
                continue
            assert old.features is not None, "shared samples need a rendering with keep_features"
            raw, shown = self._read(
                radiance, old.features, old.z, fixed.rays.directions, fixed.views, sites, which, noise, white
            )
            passes.append(Pass(shown, raw, old.z, old.features))
        coarse, fine = passes
        assert fine is not None
        return replace(fixed, fine=self._coloured(fine, sites), coarse=coarse, sites=sites.tapped)


def criterion(
    rendering: Rendering, truth: Float[Tensor, "rays 3"], *, coarse_weight: float = 1.0, per_ray: bool = False
) -> Float[Tensor, ""] | Float[Tensor, " rays"]:
    """Item 7: the mean over rays and colours of (rgb - y)², of the fine and the coarse pass together."""
    loss = (rendering.rgb - truth).square().mean(-1)
    if rendering.coarse is not None:
        loss = loss + coarse_weight * (rendering.coarse.shown.rgb - truth).square().mean(-1)
    return loss if per_ray else loss.mean()
