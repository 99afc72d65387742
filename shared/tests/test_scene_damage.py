"""Scene files with something wrong in them: each is named, whatever the library that reads it says."""

import json
import struct

import numpy as np
import pytest

from tenfold_shared.errors import UserError
from tenfold_shared.scenes import (
    blocks_views,
    read_blender,
    read_colmap,
    read_image,
    read_llff,
    read_nerfstudio,
    write_blender,
    write_colmap,
    write_image,
    write_llff,
    write_nerfstudio,
)


@pytest.fixture(scope="module")
def scene():
    return blocks_views(3, 8)


def test_a_depth_that_is_cut_short(tmp_path, scene):
    write_blender(tmp_path, scene)
    assert read_blender(tmp_path).depth.shape == (3, 8, 8)
    file = tmp_path / "train" / "depth_r_1.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"depth_r_1.npy is damaged"):
        read_blender(tmp_path)
    np.save(file, np.zeros((4, 4)))  # of other pictures
    assert read_blender(tmp_path).depth is None


def test_poses_whose_header_is_no_python(tmp_path):
    write_llff(tmp_path, blocks_views(3, 8, forward=True))
    file = tmp_path / "poses_bounds.npy"
    file.write_bytes(file.read_bytes().replace(b"}", b"(", 1))
    with pytest.raises(UserError, match=r"poses_bounds.npy is damaged"):
        read_llff(tmp_path, 1)


@pytest.mark.parametrize("count", [2**62, 2**64 - 1])
def test_a_colmap_count_beyond_all_memory(tmp_path, scene, count):
    write_colmap(tmp_path, scene, points=np.eye(3))
    file = tmp_path / "sparse" / "0" / "points3D.bin"
    file.write_bytes(file.read_bytes()[:-8] + struct.pack("<Q", count))
    with pytest.raises(UserError, match="damaged or cut short"):
        read_colmap(tmp_path)


@pytest.mark.parametrize(("name", "row"), [("cameras.txt", "1 PINHOLE 8 8 9.0"), ("points3D.txt", "1 0.5 0.5")])
def test_a_colmap_row_with_too_few_numbers(tmp_path, scene, name, row):
    write_colmap(tmp_path, scene, binary=False, points=np.eye(3))
    file = tmp_path / "sparse" / "0" / name
    file.write_text("\n".join([row, *file.read_text().splitlines()[1:]]))
    with pytest.raises(UserError, match="damaged or cut short"):
        read_colmap(tmp_path)


@pytest.mark.parametrize(("change", "split"), [({"w": 0}, None), ({"train_filenames": 3}, "train")])
def test_a_transforms_file_with_impossible_values(tmp_path, scene, change, split):
    write_nerfstudio(tmp_path, scene)
    file = tmp_path / "transforms.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"transforms.json has"):
        read_nerfstudio(tmp_path, split)


def test_views_are_chosen_by_a_mask_too(scene):
    assert scene.subset(np.array([True, False, True])).cameras.names == scene.subset([0, 2]).cameras.names


def test_a_picture_of_one_channel_is_written(tmp_path):
    grey = np.linspace(0, 1, 16).reshape(4, 4, 1)
    write_image(tmp_path / "grey.png", grey)
    np.testing.assert_allclose(read_image(tmp_path / "grey.png") / 255, np.repeat(grey, 3, 2), atol=0.5 / 255 + 1e-9)
