"""Cameras: projections, axes, resizing, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_shared.errors import UserError
from tenfold_shared.scenes import (
    CameraSet,
    circle_path,
    look_at,
    opencv_from_opengl,
    tabletop_cameras,
)


@given(st.integers(0, 5), st.floats(-10, 40), st.floats(-10, 40), st.floats(0.1, 20))
@settings(max_examples=30, deadline=None)
def test_projection_inverts_rays(view, u, v, depth):
    cameras = tabletop_cameras(6, 24)
    origin, direction = cameras.rays(view, np.array([u, v]))
    pixel, z = cameras.project(origin + depth * direction)
    np.testing.assert_allclose(pixel[view], [u, v], atol=1e-8)
    assert z[view] == pytest.approx(depth)


def test_opencv_axes():
    pose = look_at(np.array([0.0, -3, 0]), np.zeros(3))
    np.testing.assert_allclose(pose[:3, :3], np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0.0]]), atol=1e-12)
    np.testing.assert_allclose(opencv_from_opengl(opencv_from_opengl(pose)), pose)
    np.testing.assert_allclose(circle_path(4)[0, :3, 3], [4 * np.cos(np.pi / 6), 0, 2], atol=1e-12)


def test_slices_and_resizing():
    cameras = tabletop_cameras(6, 24)
    assert cameras[2].names == ("002",)
    assert len(cameras[1:4]) == 3
    assert cameras[[4, 0]].names == ("004", "000")
    small = cameras.resized(12, 8)
    np.testing.assert_allclose(small.intrinsics[0, 0], cameras.intrinsics[0, 0] / 3)
    assert small.bounds == (2.0, 5.0)
    with pytest.raises(UserError, match="got none"):
        cameras[[]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"camera_to_world": np.zeros((0, 4, 4))}, "at least one view"),
        ({"near": [5.0, 2.0], "far": [5.0, 6.0]}, "view 000 needs depths 0 < near < far"),
        ({"near": [1.0, 2.0]}, "come together"),
        ({"names": ("a",)}, "1 names were given for 2 cameras"),
        ({"intrinsics": np.zeros((2, 3, 3))}, "focal length"),
        ({"camera_to_world": np.stack([np.eye(4), np.diag([1, 1, -1.0, 1])])}, "view 001 .* not a rotation"),
        ({"camera_to_world": np.stack([np.diag([2, 2, 2.0, 1]), np.eye(4)])}, "view 000 .* not a rotation"),
        ({"camera_to_world": np.full((2, 4, 4), np.nan)}, "not finite"),
        ({"height": 0}, "is empty"),
    ],
)
def test_bad_cameras_are_refused(change, message):
    good = {
        "intrinsics": np.tile(np.eye(3), (2, 1, 1)),
        "camera_to_world": np.tile(np.eye(4), (2, 1, 1)),
        "height": 4,
        "width": 4,
    }
    CameraSet(**good)
    with pytest.raises(UserError, match=message):
        CameraSet(**(good | change))
