"""Captures: depths, factors, sizes, what is missing."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tenfold_gnt.experiments import DataConfig, capture, judged_targets, training_set
from tenfold_gnt.reproduce import sweep
from tenfold_gnt.train import Recipe
from tenfold_shared.cli import load_recipe
from tenfold_shared.errors import UserError
from tenfold_shared.run import RunOptions
from tenfold_shared.scenes import (
    tabletop_views,
    write_blender,
    write_colmap,
    write_llff,
)


def test_depths_may_be_given_where_the_files_have_none(tmp_path: Path) -> None:
    """A COLMAP model without points."""
    write_colmap(tmp_path, tabletop_views(0, 10, 20))
    with pytest.raises(UserError, match=r"give --data\.near and --data\.far"):
        capture(DataConfig(name="capture", root=tmp_path))
    train, test = capture(DataConfig(name="capture", root=tmp_path, near=2.0, far=5.0))
    assert train.cameras.bounds == test.cameras.bounds == (2.0, 5.0)


def test_the_factor_is_that_of_the_option_or_the_published_one(tmp_path: Path) -> None:
    """Shiny's pictures are reduced by 8 where nothing is said, the captures of LLFF by 4."""
    write_llff(tmp_path / "shiny" / "cd", tabletop_views(0, 9, 24))
    folder = tmp_path / "shiny" / "cd"
    raw = np.load(folder / "poses_bounds.npy")
    rows = raw[:, :15].reshape(-1, 3, 5)
    np.save(folder / "poses_bounds.npy", np.concatenate([rows[:, :, :4].reshape(-1, 12), raw[:, 15:]], 1))
    np.save(folder / "hwf_cxcy.npy", rows[0, :, 4] * 8)
    config = DataConfig(name="shiny", root=tmp_path, scene="cd", sources=3)
    for factor in (0, 2):
        (folder / "images").rename(folder / f"images_{factor or 8}")
        cameras = judged_targets(dataclasses.replace(config, factor=factor))[0].scene.cameras
        assert cameras.intrinsics[0, 0, 0] == pytest.approx(rows[0, 2, 4] * 8 / (factor or 8))
        (folder / f"images_{factor or 8}").rename(folder / "images")
    assert DataConfig(name="llff_test").reduction == 4


def test_values_are_chosen_on_what_is_kept_for_that(tmp_path: Path) -> None:
    """Only the tables have views for choosing: elsewhere they would be chosen on the test views."""
    recipe = load_recipe("tenfold_gnt", "llff-gnt", Recipe)
    data = dataclasses.replace(recipe.data, judge="validation")
    with pytest.raises(UserError, match="which llff_test does not have"):
        sweep(dataclasses.replace(recipe, data=data), RunOptions(output=tmp_path), [{"steps": 1}])


def test_judged_views_of_another_size_are_refused(tmp_path: Path) -> None:
    """A capture whose splits differ cannot be compared with its sources."""
    for split, size in (("train", 20), ("test", 16)):
        write_blender(tmp_path, tabletop_views(0, 6, size), split)
    with pytest.raises(UserError, match="20x20 in its training views and 16x16 in those judged"):
        capture(DataConfig(name="capture", root=tmp_path))


def test_missing_captures_and_scenes_are_named(tmp_path: Path) -> None:
    """One sentence: what, where."""
    with pytest.raises(UserError, match="is no folder"):
        training_set(DataConfig(name="capture", root=tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"data\.root"):
        training_set(DataConfig(name="capture"))
    with pytest.raises(UserError, match="nerf_llff_data"):
        training_set(DataConfig(name="llff_test", root=tmp_path))
    (tmp_path / "nerf_llff_data" / "fern").mkdir(parents=True)
    with pytest.raises(UserError, match="no scene 'farn'; there are fern"):
        training_set(DataConfig(name="llff_test", root=tmp_path, scene="farn"))
