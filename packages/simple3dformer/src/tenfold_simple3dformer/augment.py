"""Augmentations of point clouds (section 6), on NumPy arrays with NumPy's legacy generator, as the release draws them."""

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.random import RandomState

Cloud = Float[ndarray, "n c"]


def random_point_dropout(cloud: Cloud, rng: RandomState, most: float = 0.875) -> Cloud:
    """A share U(0, most) of the points becomes copies of the first one; the number of points stays."""
    ratio = rng.random_sample() * most
    dropped = rng.random_sample(len(cloud)) <= ratio
    result = cloud.copy()
    result[dropped] = result[0]
    return result


def random_scale(
    clouds: Float[ndarray, "b n c"], rng: RandomState, low: float = 0.8, high: float = 1.25
) -> Float[ndarray, "b n c"]:
    """The coordinates of each cloud times U(low, high)."""
    result = clouds.copy()
    result[..., :3] *= rng.uniform(low, high, len(clouds))[:, None, None]
    return result


def random_shift(clouds: Float[ndarray, "b n c"], rng: RandomState, most: float = 0.1) -> Float[ndarray, "b n c"]:
    """The coordinates of each cloud plus U(-most, most) along every axis."""
    result = clouds.copy()
    result[..., :3] += rng.uniform(-most, most, (len(clouds), 3))[:, None]
    return result


def jitter(
    clouds: Float[ndarray, "b n c"], rng: RandomState, sigma: float = 0.01, clip: float = 0.05
) -> Float[ndarray, "b n c"]:
    """Every value plus N(0, sigma), cut at +-clip."""
    return np.clip(sigma * rng.standard_normal(clouds.shape), -clip, clip) + clouds


def rotate_y(clouds: Float[ndarray, "b n 3"], rng: RandomState) -> Float[ndarray, "b n 3"]:
    """Each cloud turned about the y axis by U(0, 2 pi)."""
    result = np.empty_like(clouds)
    for i, cloud in enumerate(clouds):
        angle = rng.uniform() * 2 * np.pi
        c, s = np.cos(angle), np.sin(angle)
        result[i] = cloud @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return result


def augment_cloud(cloud: Cloud, rng: RandomState, *, dropout: bool = False) -> Cloud:
    """What the released training scripts do to a cloud: dropout (classification only), scale, shift."""
    if dropout:
        cloud = random_point_dropout(cloud, rng)
    return random_shift(random_scale(cloud[None], rng), rng)[0]
