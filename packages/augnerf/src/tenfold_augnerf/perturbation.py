"""The places where the pipeline is perturbed (section 2.2): keys, shapes, radii, and radii in the units of the scene."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from tenfold_shared.errors import UserError

Delta = Mapping[str, Tensor]
Level = Literal["coordinates", "features", "samples"]


class Key(NamedTuple):
    """One place: its level (1, 2, 3 of the paper), which pass it is in, and what its leading dimension counts."""

    level: Level
    which: Literal["coarse", "fine", "both"]
    leading: Literal["rays", "cameras"]
    unit: str


KEYS: dict[str, Key] = {
    "zval_c": Key("coordinates", "coarse", "rays", "half bins"),
    "zval_f": Key("coordinates", "fine", "rays", "half bins"),
    "pts_c": Key("coordinates", "coarse", "rays", "pixels or half bins"),
    "pts_f": Key("coordinates", "fine", "rays", "pixels or half bins"),
    "dir_c": Key("coordinates", "coarse", "rays", "of a unit vector"),
    "dir_f": Key("coordinates", "fine", "rays", "of a unit vector"),
    "cam_r": Key("coordinates", "both", "cameras", "degrees"),
    "cam_t": Key("coordinates", "both", "cameras", "world units"),
    "feat_c": Key("features", "coarse", "rays", "of a feature"),
    "feat_f": Key("features", "fine", "rays", "of a feature"),
    "raw_c": Key("samples", "coarse", "rays", "of a raw value"),
    "raw_f": Key("samples", "fine", "rays", "of a raw value"),
    "rgb": Key("samples", "fine", "rays", "of the range of colours"),
}
"""Every key, in the paper's order of levels."""

PAIRED = ("cam_r", "cam_t")


@dataclass(frozen=True)
class Geometry:
    """What radii are measured in.

    Attributes:
        near: smallest ray parameter.
        far: largest ray parameter.
        coarse: samples of the coarse pass.
        fine: samples of the fine pass, the coarse ones included.
        width: W, the size of the features.
        height_pixels: of the images.
        width_pixels: of the images.
        cameras: how many there are.

    """

    near: float
    far: float
    coarse: int
    fine: int
    width: int
    height_pixels: int
    width_pixels: int
    cameras: int = 1
    extra_edges: int = 0

    def samples(self, key: str) -> int:
        """Samples of the pass that a key is in."""
        return self.coarse if KEYS[key].which == "coarse" else self.fine

    def half_bin(self, key: str) -> float:
        """(far - near) / (S - 1) / 2: half a mean interval of the key's pass."""
        return (self.far - self.near) / max(1, self.samples(key) - 1) / 2

    @property
    def pixel(self) -> float:
        """2 / max(H, W)."""
        return 2 / max(self.height_pixels, self.width_pixels)

    def shape(self, key: str, rays: int) -> tuple[int, ...]:
        """Of the perturbation of a batch of rays."""
        samples = self.samples(key)
        kind = key.partition("_")[0]
        return {
            "zval": (rays, samples + self.extra_edges),
            "pts": (rays, samples, 3),
            "dir": (rays, 3),
            "cam": (self.cameras, 3),
            "feat": (rays, samples, self.width),
            "raw": (rays, samples, 4),
            "rgb": (rays, 3),
        }[kind]


def radius(key: str, eps: float, geometry: Geometry) -> float:
    """The resolved radius ε of a key from the user's `eps`.

    Raises:
        UserError: an unknown key or a negative radius.

    """
    check_keys([key])
    if not (math.isfinite(eps) and eps >= 0):
        raise UserError(f"the radius of {key} is {eps}: give a number of 0 or more")
    if key.startswith("zval"):
        return geometry.half_bin(key) * eps
    if key.startswith("pts"):
        return min(geometry.pixel, geometry.half_bin(key)) * eps
    return math.radians(eps) if key == "cam_r" else eps


def check_keys(keys: Iterable[str]) -> None:
    """Refuse keys that do not exist, and half of the camera's pair.

    Raises:
        UserError: naming the key and the ones there are.

    """
    keys = list(keys)
    for key in keys:
        if key not in KEYS:
            raise UserError(f"{key!r} is no perturbation: the keys are {', '.join(KEYS)}")


def check_pairs(keys: Iterable[str]) -> None:
    """Refuse one of `cam_r` and `cam_t` without the other, since a camera has both.

    Raises:
        UserError: naming the missing one.

    """
    given = [key for key in PAIRED if key in keys]
    if len(given) == 1:
        (missing,) = set(PAIRED) - set(given)
        raise UserError(
            f"{given[0]} needs {missing} beside it: a camera is perturbed in orientation and position together"
        )


def check_exposed(keys: Iterable[str], field: object, name: str = "the field") -> None:
    """Refuse a perturbation on a level that a field does not expose.

    Raises:
        UserError: naming the key and the method that is missing.

    """
    needs = {"coordinates": ("locate",), "features": ("encode", "heads"), "samples": ("heads", "compose")}
    for key in keys:
        missing = [method for method in needs[KEYS[key].level] if not callable(getattr(field, method, None))]
        if missing:
            raise UserError(
                f"{key} perturbs the level of {KEYS[key].level}, which {name} does not expose: it has no {missing[0]}()"
            )


def broadcast(keys: Sequence[str], **lists: Sequence[float | int | str]) -> dict[str, dict[str, float | int | str]]:
    """Settings of each key from lists that have one entry for all keys or one for each.

    Raises:
        UserError: a list of another length, a key named twice, an unknown key.

    """
    check_keys(keys)
    check_pairs(keys)
    if len(set(keys)) != len(keys):
        raise UserError(f"the keys {', '.join(keys)} name a place twice: name each once")
    settings: dict[str, dict[str, float | int | str]] = {key: {} for key in keys}
    for name, values in lists.items():
        if len(values) not in (1, len(keys)):
            raise UserError(f"{name} has {len(values)} entries for {len(keys)} keys: give one for all, or one for each")
        for i, key in enumerate(keys):
            settings[key][name] = values[0] if len(values) == 1 else values[i]
    return settings


def describe_budget(key: str, eps: float, geometry: Geometry) -> str:
    """A radius in physical units: pixels and bins on level 1, 8-bit levels on level 3."""
    resolved = radius(key, eps, geometry)
    kind = key.partition("_")[0]
    if kind in ("zval", "pts"):
        bins = resolved / (2 * geometry.half_bin(key))
        return f"{key}: {resolved:.4g} world units = {bins:.3g} bins = {resolved / geometry.pixel:.3g} pixels"
    if key == "rgb":
        return f"{key}: {resolved:.4g} = {255 * resolved:.3g} of 255 levels"
    if kind == "raw":
        return f"{key}: {resolved:.4g} before the sigmoid = at most {255 * resolved / 4:.3g} of 255 levels a sample"
    return f"{key}: {eps:g} {KEYS[key].unit}"
