"""Data sets and pools in their published layouts, the released bundle, and everything bad that they may contain."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tenfold_cilqud.data import ClassData, DataConfig, load_data, pixels, prepare, read_classes
from tenfold_cilqud.pools import PoolConfig, audited, find_duplicates, memory_pool, mixed, open_pool, read_excluded
from tenfold_cilqud.recipe import Recipe
from tenfold_shared.errors import UserError
from tenfold_shared.images import ImageSet

COLOUR = (3, 32, 32)


def data_of(shape: tuple[int, ...] = COLOUR, classes: int = 4) -> ClassData:
    draw = torch.Generator().manual_seed(0)

    def split(n: int) -> list[torch.Tensor]:
        return [torch.randint(256, (n, *shape), generator=draw).to(torch.uint8) for _ in range(classes)]

    names = tuple(str(k) for k in range(classes))
    return ClassData(split(6), split(2), split(3), split(2), tuple(range(classes)), names, 2, (0.5,), (0.5,))


# -- the digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_split_as_specified() -> None:
    data = load_data(DataConfig(name="digits", held_back=30, validation=10), 0)
    for part, size in ((data.test, 50), (data.train, 60), (data.held_back, 30), (data.validation, 10)):
        assert [len(images) for images in part] == [size] * 10
    assert sorted(data.order) == list(range(10))
    everything = torch.cat([*data.test, *data.train, *data.held_back, *data.validation]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything)
    assert 0 <= float(everything.min()) <= float(everything.max()) == 1.0
    assert load_data(DataConfig(), 0).order != load_data(DataConfig(), 1).order


def test_the_miniatures_pool_has_no_test_image() -> None:
    data = load_data(DataConfig(name="digits", held_back=30), 0)
    pool = open_pool(PoolConfig(), data, 0)
    assert len(pool) == 3300
    assert int((pool.labels >= 0).sum()) == 300
    images = pool[torch.tensor([0, 299, 300, 3299])]
    assert images.dtype == torch.float32
    assert images.shape[1:] == (1, 8, 8)
    patches = pool[torch.arange(300, 400)]
    assert patches.amin((1, 2, 3)).max() == 0
    highest = patches.amax((1, 2, 3))
    assert set(highest.tolist()) <= {0.0, 1.0}  # a patch of one colour cannot be stretched
    assert highest.mean() > 0.8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": 3}, "equal size"),
        ({"anchors": 0}, "fewer anchors than classes"),
        ({"anchors_total": 9}, "fewer anchors than the 10 classes"),
        ({"per_class": 500}, "lower --data.per_class"),
        ({"class_order": "0,1,2"}, "no permutation"),
        ({"evaluate_on": "validation"}, "needs --data.validation"),
        ({"per_class": -1}, "0 or more"),
        ({"name": "official10", "per_class": 5}, "--data.per_class: the released bundle"),
        ({"name": "official10", "anchor_rule": "herding"}, "--data.anchor_rule: the released bundle"),
    ],
)
def test_what_is_no_protocol_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(**{"name": "digits", **changes}), 0)


def test_a_fraction_of_the_digits_is_held_back() -> None:
    """Of each digit's images that are not for the test."""
    whole = load_data(DataConfig(held_back=60), 0)
    found = load_data(DataConfig(held_back=0.2), 10**6)
    assert all(len(images) in range(24, 28) for images in found.held_back)
    assert [len(images) for images in whole.held_back] == [60] * 10


def test_image_folders_make_classes(tmp_path: Path) -> None:
    draw = np.random.RandomState(0)
    for split, count in (("train", 8), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.randint(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    config = DataConfig(name="folder", root=tmp_path, tasks=2, validation=1, held_back=0.25, per_class=3)
    data = load_data(config, 0)
    assert [len(images) for images in data.train] == [3, 3]
    assert [len(images) for images in data.held_back] == [2, 2]
    assert data.names == ("cat", "dog")
    with pytest.raises(UserError, match="are asked for"):
        load_data(DataConfig(name="folder", root=tmp_path, tasks=2, per_class=9), 0)


# -- the released bundle --------------------------------------------------------------------------------------------------


def test_the_bundle_is_written_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(config: DataConfig, seed: int) -> ClassData:
        asked.append(config.validation)
        return data_of()

    monkeypatch.setattr("tenfold_cilqud.data.load_data", load)
    prepare(DataConfig(name="cifar100", tasks=2, anchors=2, validation=7), tmp_path, 0)
    prepare(DataConfig(name="cifar100", tasks=2, anchors=2), tmp_path, 0)
    prepare(DataConfig(name="cifar10", tasks=2, anchors=2), tmp_path, 0)
    assert asked == [7, 50, 500]
    monkeypatch.undo()
    data = load_data(
        DataConfig(name="official10", root=tmp_path, tasks=2, class_order=str(tmp_path / "cifar10_order.txt")), 0
    )
    for mine, theirs in ((data_of().train, data.train), (data_of().test, data.test)):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert [len(images) for images in data.anchors] == [2] * 4
    assert data.order == (0, 1, 2, 3)
    fewer = DataConfig(name="official10", root=tmp_path, tasks=2, class_order="natural", anchors=1)
    assert [len(images) for images in load_data(fewer, 0).anchors] == [1] * 4
    # Its validation images are there without being held out.
    assert DataConfig(name="official10", evaluate_on="validation").validation == 0
    with pytest.raises(UserError, match="anchors are --anchors random"):
        prepare(DataConfig(name="cifar10", anchor_rule="herding"), tmp_path, 0)


@pytest.mark.parametrize(
    ("part", "content", "words"),
    [
        ("save_100", {k: 0 if k == 2 else 2 for k in range(4)}, "fewer anchors than classes, class 2"),
        ("save_100", dict.fromkeys(range(3), 2), "fewer anchors than classes, class 3"),
        ("test", {k: 0 if k == 1 else 2 for k in range(4)}, "class 1 .* has no test images"),
        ("train", {k: 0 if k == 3 else 2 for k in range(4)}, "class 3 .* has no training images"),
    ],
)
def test_a_bundle_that_lacks_a_class_is_refused_before_training(part, content, words, tmp_path: Path) -> None:
    for name in ("train", "val", "test", "save_100"):
        sizes = content if name == part else dict.fromkeys(range(4), 2)
        arrays = {label: np.zeros((n, 32, 32, 3), np.uint8) for label, n in sizes.items()}
        (tmp_path / f"cifar10_{name}.pkl").write_bytes(pickle.dumps(arrays))
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(name="official10", root=tmp_path, tasks=2, class_order="natural"), 0)


def test_damaged_bundles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cifar10_train\.pkl"):
        load_data(DataConfig(name="official10", root=tmp_path), 0)
    bad = tmp_path / "bad.pkl"
    bad.write_bytes(pickle.dumps({0: np.zeros((2, 3))}))
    with pytest.raises(UserError, match="class 0"):
        read_classes(bad)
    bad.write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(UserError, match=r"bad\.pkl is refused"):
        read_classes(bad)


# -- pools ------------------------------------------------------------------------------------------------------------------


def test_published_pools_are_read_in_their_layouts(tmp_path: Path) -> None:
    draw = np.random.RandomState(0)
    images = draw.randint(256, size=(5, 32, 32, 3), dtype=np.uint8)
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    (tmp_path / "pool.pkl").write_bytes(
        pickle.dumps({"data": images, "label": np.zeros(5), "extrapolated_targets": [0]})
    )
    np.save(tmp_path / "pool.npy", images)
    images.transpose(0, 3, 2, 1).tofile(tmp_path / "tiny.bin")  # plane by plane, column by column
    (tmp_path / "small").mkdir()
    rows = images.transpose(0, 3, 1, 2).reshape(5, -1)
    for k, part in enumerate((rows[:2], rows[2:]), 1):
        content = {"data": part, "labels": [1] * len(part), "mean": np.zeros(3072)}
        (tmp_path / "small" / f"train_data_batch_{k}").write_bytes(pickle.dumps(content))
    (tmp_path / "files").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "files" / f"{i}.png")
    sources = [
        f"official150k:{tmp_path}/pool.pkl",
        f"ti500k:{tmp_path}/pool.pkl",
        f"npy:{tmp_path}/pool.npy",
        f"tinyimages-bin:{tmp_path}/tiny.bin",
        f"imagenet32:{tmp_path}/small",
        f"folder:{tmp_path}/files",
    ]
    for source in sources:
        pool = open_pool(PoolConfig(source=source), data_of(), 0)
        chosen = torch.tensor([3, 0, 4])
        assert torch.equal(pool[chosen], expected[chosen]), source
        assert pool.provenance
        assert pool.labels is None
    assert "withdrawn" in open_pool(PoolConfig(source=sources[0]), data_of(), 0).provenance
    both = open_pool(PoolConfig(source=f"{sources[2]}+split+patches:4"), data_of(), 0)
    assert len(both) == 5 + 8 + 4
    assert both.labels.tolist() == [-1] * 5 + [0, 0, 1, 1, 2, 2, 3, 3] + [-1] * 4
    assert len(open_pool(PoolConfig(source=sources[2], limit=3), data_of(), 0)) == 3


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "the sources are"),
        ("ti500k:/no/such/file", "withdrawn"),
        ("folder:/no/such/folder", "no image files"),
        ("npy:/no/such/file.npy", "no readable array"),
        ("patches:0", "pool is empty"),
        ("patches:many", "a whole one"),
    ],
)
def test_sources_that_are_none_are_refused(source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_pool(PoolConfig(source=source), data_of(), 0)


@pytest.mark.parametrize(("classes", "name"), [(10, "cifar10_80m_150k"), (100, "cifar100_80m_150k")])
def test_the_released_pool_is_that_of_the_data_set(classes, name, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tenfold_cilqud.pools.data_root", lambda: tmp_path)
    with pytest.raises(UserError, match=f"cil-qud/{name}.pkl"):
        open_pool(PoolConfig(source="official150k"), data_of((3, 4, 4), classes), 0)


def test_a_pool_may_say_which_fraction_of_the_training_set_it_is() -> None:
    """A fifth of each digit's images that are not for the test, as --data.held_back 0.2 takes them."""
    for pool in (PoolConfig("split:0.2+patches:5"), PoolConfig("split")):
        recipe = Recipe(data=DataConfig(held_back=0.2 if pool.source == "split" else 0), pool=pool)
        found = open_pool(recipe.pool, load_data(recipe.data, 0), 0)
        assert (
            int((found.labels >= 0).sum()) == sum(len(images) for images in load_data(recipe.data, 0).held_back) > 240
        )
    for source in ("split:half", "split:0", "split:1.5", "split:nan"):
        with pytest.raises(UserError, match="a fraction between 0 and 1"):
            Recipe(pool=PoolConfig(source))
    with pytest.raises(UserError, match="differ"):
        Recipe(data=DataConfig(held_back=30), pool=PoolConfig("split:0.5"))


def test_broken_pools_are_named(tmp_path: Path) -> None:
    (tmp_path / "tiny.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(UserError, match="truncated"):
        open_pool(PoolConfig(source=f"tinyimages-bin:{tmp_path}/tiny.bin"), data_of(), 0)
    (tmp_path / "pool.pkl").write_bytes(pickle.dumps({"images": 1}))
    with pytest.raises(UserError, match="no entry 'data'"):
        open_pool(PoolConfig(source=f"ti500k:{tmp_path}/pool.pkl"), data_of(), 0)
    np.savez(tmp_path / "pool.npz", np.zeros((3, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="an archive of arrays"):
        open_pool(PoolConfig(source=f"npy:{tmp_path}/pool.npz"), data_of(), 0)
    (tmp_path / "extra.mat").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"extra\.mat is no MATLAB file"):
        open_pool(PoolConfig(source=f"svhn:{tmp_path}/extra.mat"), data_of(), 0)
    np.save(tmp_path / "grey.npy", np.zeros((3, 8, 8, 1), np.uint8))
    with pytest.raises(UserError, match="its images are"):
        open_pool(PoolConfig(source=f"npy:{tmp_path}/grey.npy"), data_of(), 0)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png is no readable image"):
        open_pool(PoolConfig(source=f"folder:{tmp_path}"), data_of(), 0)


def test_test_images_in_a_pool_are_refused_or_dropped() -> None:
    data = data_of()
    pool = memory_pool(torch.cat([data.train[0], data.test[1][:2], data.train[1]]), "mine")
    with pytest.raises(UserError, match="contains 2 of the test images"):
        audited(pool, PoolConfig(), data)
    rest = audited(pool, PoolConfig(duplicates="drop"), data)
    assert len(rest) == 12
    assert "2 test images left out" in rest.provenance
    assert not len(find_duplicates(rest, torch.cat(list(data.test))))
    assert len(audited(pool, PoolConfig(duplicates="keep"), data)) == 14


def test_excluded_indices_count_the_source_whether_test_images_are_dropped_or_not(tmp_path: Path) -> None:
    """As `audit --show indices` prints them: a test image in front of the pool must not shift what is left out."""
    data = data_of()
    images = torch.cat([data.test[0][:1], data.train[0]])
    np.save(tmp_path / "pool.npy", images.permute(0, 2, 3, 1).numpy())
    (tmp_path / "some.txt").write_text("1\n3\n")
    for duplicates in ("drop", "keep"):
        config = PoolConfig(source=f"npy:{tmp_path}/pool.npy", duplicates=duplicates, exclude=tmp_path / "some.txt")
        pool = open_pool(config, data, 0)
        expected = images[[2, 4, 5, 6] if duplicates == "drop" else [0, 2, 4, 5, 6]]
        assert torch.equal(pool[torch.arange(len(pool))], expected)
    (tmp_path / "some.txt").write_text("\n".join(map(str, range(7))))
    with pytest.raises(UserError, match="the pool is empty"):
        open_pool(config, data, 0)


def test_a_pool_of_cifar_is_fetched_with_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked = data_of(), []

    def load(name, root, split, download):
        asked.append((name, download))
        return ImageSet(data.train[0], torch.zeros(6, dtype=torch.int64), ("a",))

    monkeypatch.setattr("tenfold_cilqud.pools.load_images", load)
    for download in (False, True):
        open_pool(PoolConfig(source="cifar100+split"), data, 0, download=download)
    assert asked == [("cifar100", False), ("cifar100", True)]


def test_near_duplicates_are_found_by_distance() -> None:
    data = data_of()
    close = data.test[0][:1].clone()
    close[0, 0, 0, 0] ^= 1
    pool = memory_pool(torch.cat([close, data.train[0]]), "mine")
    test = torch.cat(list(data.test))
    assert find_duplicates(pool, test).tolist() == []
    assert find_duplicates(pool, test, near=0.1).tolist() == [0]


def test_small_distances_of_bright_images_are_told_apart() -> None:
    """One pixel of each image is a level away from a test image's, or two."""
    test = data_of(classes=15).test
    images = torch.cat(list(test)) | 128
    pool = images.clone().repeat(2, 1, 1, 1)
    pool[:, 0, 0, 0] ^= torch.tensor([1] * len(images) + [2] * len(images), dtype=torch.uint8)
    assert find_duplicates(memory_pool(pool, "mine"), images, near=1.5 / 255).tolist() == list(range(len(images)))


def test_excluded_indices(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("3\n1\n")
    assert read_excluded(tmp_path / "some.txt", 5).tolist() == [3, 1]
    assert read_excluded(None, 5) is None
    with pytest.raises(UserError, match="outside"):
        read_excluded(tmp_path / "some.txt", 3)
    (tmp_path / "some.txt").write_text("three")
    with pytest.raises(UserError, match="one index a line"):
        read_excluded(tmp_path / "some.txt", 3)


def test_mixed_pools_must_agree() -> None:
    with pytest.raises(UserError, match="mixes images"):
        mixed([memory_pool(torch.zeros(2, 1, 8, 8), "a"), memory_pool(torch.zeros(2, 3, 8, 8), "b")])[torch.arange(4)]


def test_mixed_pools_agree_on_what_a_pixel_is() -> None:
    """Digits in [0, 1] beside image files of 8 bits: both in [0, 1], whichever comes first."""
    digits, files = torch.rand(3, 1, 8, 8), torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    for order in ([digits, files], [files, digits]):
        pool = mixed([memory_pool(images, "a") for images in order])
        found = torch.cat([pixels(pool[torch.arange(5)]), pixels(pool[torch.tensor([4, 0])])])
        expected = torch.cat([pixels(images) for images in order])
        torch.testing.assert_close(found, torch.cat([expected, expected[[4, 0]]]))
        assert len(pool[torch.arange(0)]) == 0  # what an anchor takes once all is taken


def test_pixels_range_from_0_to_1() -> None:
    assert pixels(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0.0, 1.0]
    assert pixels(torch.tensor([0.25])).tolist() == [0.25]
