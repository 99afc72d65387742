"""Every loader on small data in the published layout, and on damaged data."""

import gzip
import pickle
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

from tenfold_shared.batches import StreamedBatches
from tenfold_shared.errors import UserError
from tenfold_shared.images import (
    ImageSet,
    imagenet_transform,
    load_images,
    measured_normalisation,
    normalisation,
    split_train_validation,
    stream_images,
)

RNG = np.random.default_rng(0)


def picture(path, size=(8, 8), mode="RGB", value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = RNG.integers(256, size=shape, dtype=np.uint8) if value is None else np.full(shape, value, np.uint8)
    PIL.Image.fromarray(pixels, mode).save(path)
    return pixels


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for position, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.zeros((4, 3072), np.uint8)
        pixels[:, 0], pixels[:, 1024 + 32], pixels[:, 2048 + 1] = position + 1, 77, 88
        content = {"batch_label": name, "labels": [3, 1, 0, 9], "data": pixels, "filenames": ["x"] * 4}
        (folder / name).write_bytes(pickle.dumps(content, 2).replace(b"numpy._core", b"numpy.core"))
    names = ["airplane", *(f"class{i}" for i in range(1, 10))]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 2))
    return tmp_path


def test_digits_are_split_once_and_for_all():
    train, test = load_images("digits"), load_images("digits", split="test")
    assert (len(train), len(test)) == (1000, 797)
    assert train.images.shape == (1000, 1, 8, 8)
    assert int(train.images.max()) == 16
    assert torch.equal(train.images, load_images("digits").images)
    rows = {bytes(image.flatten().tolist()) for image in train.images}
    assert not any(bytes(image.flatten().tolist()) in rows for image in test.images)
    assert train.labels.bincount().min() > 80


def test_cifar10(cifar10):
    train = load_images("cifar10", cifar10)
    assert train.images.shape == (20, 3, 32, 32)
    assert train.images[::4, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert (int(train.images[0, 1, 1, 0]), int(train.images[0, 2, 0, 1])) == (77, 88)
    assert train.labels[:4].tolist() == [3, 1, 0, 9]
    assert train.classes[0] == "airplane"
    assert load_images("cifar10", cifar10, "test").images[0, 0, 0, 0] == 6


def test_cifar100(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        content = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [99, 0], "coarse_labels": [1, 2]}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}, 2))
    assert load_images("cifar100", tmp_path, "test").labels.tolist() == [99, 0]


class Evil:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-20], "data_batch_2 is truncated or corrupted"),
        (lambda b: pickle.dumps({"data": Evil()}), "data_batch_2 is refused"),
        (lambda b: pickle.dumps({"data": np.zeros((4, 3072), np.uint8)}), "data_batch_2 has no entry 'labels'"),
        (
            lambda b: pickle.dumps({"data": np.zeros((4, 3071), np.uint8), "labels": [0] * 4}),
            r"holds torch.uint8 \[4, 3071\]",
        ),
        (lambda b: pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 3}), "with 3 labels"),
        (
            lambda b: pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}),
            r"labels lie outside of 0..9",
        ),
    ],
)
def test_damaged_cifar_is_named(cifar10, damage, message, capsys):
    file = cifar10 / "cifar-10-batches-py" / "data_batch_2"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        load_images("cifar10", cifar10)
    assert capsys.readouterr().out == ""
    file.unlink()
    with pytest.raises(UserError, match="data_batch_2 does not exist"):
        load_images("cifar10", cifar10)
    (cifar10 / "cifar-10-python.tar.gz").write_bytes(b"looked at, so the file that is missing would be fetched")
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz is not what"):
        load_images("cifar10", cifar10, download=True)


def idx(array):
    return bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw"), ("mnist", ".")]
)
def test_idx_sets(tmp_path, name, folder, compressed):
    images, labels = RNG.integers(256, size=(5, 28, 28), dtype=np.uint8), np.array([0, 1, 9, 3, 4], np.uint8)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for part, array in (("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)):
        file = tmp_path / folder / (part + ".gz" * compressed)
        file.write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    data = load_images(name, tmp_path, "test")
    np.testing.assert_array_equal(data.images[:, 0].numpy(), images)
    assert data.labels.tolist() == labels.tolist()
    with pytest.raises(UserError, match=r"is not there.*train-images-idx3-ubyte.*--data.download"):
        load_images(name, tmp_path, "train")

    file = next((tmp_path / folder).glob("t10k-images*"))
    whole = file.read_bytes()
    for damaged in (whole[:-4], whole[:3], whole[:20], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte(.gz)? (is truncated|is no IDX|has \d+ values)"):
            load_images(name, tmp_path, "test")


@pytest.fixture
def tiny(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    lines = []
    for name in ("n02", "n01"):
        for i in range(3):
            picture(folder / "train" / name / "images" / f"{name}_{i}.JPEG", mode="L" if i else "RGB")
    for i in range(60):
        name = ("n02", "n01")[i % 2]
        picture(folder / "val" / "images" / f"val_{i:02}.JPEG", value=i * 4)
        lines.append(f"val_{i:02}.JPEG\t{name}\t0\t0\t1\t1\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


def test_tiny_imagenet(tiny):
    train = load_images("tiny-imagenet", tiny)
    assert train.images.shape == (6, 3, 8, 8)
    assert train.classes == ("n01", "n02")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    test = load_images("tiny-imagenet", tiny, "test")
    assert len(test) == 60
    values = test.images.float().mean((1, 2, 3))
    assert values[test.labels == 0].tolist() == pytest.approx([i * 4 for i in range(1, 60, 2)], abs=1)
    official = [load_images("tiny-imagenet", tiny, split, official_split=True) for split in ("val", "test")]
    assert [len(part) for part in official] == [50, 10]
    assert official[1].labels.tolist() == [0] * 5 + [1] * 5
    with pytest.raises(UserError, match="no split 'val'"):
        load_images("tiny-imagenet", tiny, "val")
    (tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text("val_00.JPEG n02\n")
    with pytest.raises(UserError, match=r"val_annotations.txt is missing or damaged"):
        load_images("tiny-imagenet", tiny, "test")


def test_a_class_without_its_folder_of_images_is_named(tiny):
    shutil.rmtree(tiny / "tiny-imagenet-200" / "train" / "n02" / "images")
    with pytest.raises(UserError, match="the class n02 has no images"):
        load_images("tiny-imagenet", tiny)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                picture(tmp_path / split / name / f"{i:04}.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


def test_an_image_folder(folder):
    train = load_images("folder", folder)
    assert train.images.shape == (8, 3, 8, 8)
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    first = np.asarray(PIL.Image.open(folder / "train" / "cat" / "0000.png"))
    np.testing.assert_array_equal(train.images[0].permute(1, 2, 0).numpy(), first)
    assert load_images("folder", folder, "test", mode="L").images.shape == (4, 1, 8, 8)


def test_bad_image_folders_are_named(folder):
    with pytest.raises(UserError, match=r"val does not exist"):
        load_images("folder", folder, "val")
    file = folder / "train" / "dog" / "0001.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    for read in (lambda: load_images("folder", folder), lambda: stream_images("folder", folder)[5]):
        with pytest.raises(UserError, match=r"dog/0001.png is no readable image"):
            read()
    picture(file, size=(9, 8))
    with pytest.raises(UserError, match=r"0001.png has 9 x 8 pixels, not 8 x 8 as 0000.png"):
        load_images("folder", folder)
    picture(file)
    (folder / "test" / "cow").mkdir()
    with pytest.raises(UserError, match=r"cow is a class that .*train does not have"):
        load_images("folder", folder, "test")
    (folder / "train" / ".hidden").mkdir()
    assert len(load_images("folder", folder).classes) == 2
    with pytest.raises(UserError, match=r"train/.hidden is a hidden folder"):
        stream_images("folder", folder)
    (folder / "train" / ".hidden").rmdir()
    file.write_bytes(b"BM" + bytes(12) + b"\x28\0\0\0" + b"\xff\xff\xff\x0f" * 2 + b"\1\0\x18\0" + bytes(24))
    with pytest.raises(UserError, match=r"0001.png is no readable image .*pixels"):
        load_images("folder", folder)
    picture(file)
    (folder / "train" / "cow").mkdir()
    for read in (load_images, stream_images):
        with pytest.raises(UserError, match=r"has no images|have no images"):
            read("folder", folder)


@pytest.mark.parametrize("read", [load_images, stream_images])
def test_a_folder_with_one_class_is_refused(tmp_path, read):
    picture(tmp_path / "train" / "cat" / "0.png")
    with pytest.raises(UserError, match=r"has 1 class folder"):
        read("folder", tmp_path)


def test_imagenet_is_streamed(tmp_path):
    for split in ("train", "val"):
        for name in ("n01", "n02"):
            picture(tmp_path / "imagenet" / split / name / "a.JPEG", size=(300, 260))
            picture(tmp_path / "imagenet" / split / name / "b.JPEG", size=(250, 400), mode="L")
    data = StreamedBatches(stream_images("imagenet", tmp_path, "train"), 2, seed=1)
    images, labels = next(data.epoch(0))
    assert images.shape == (2, 3, 224, 224)
    again = next(StreamedBatches(stream_images("imagenet", tmp_path, "train"), 2, seed=1).epoch(0))
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    test = stream_images("imagenet", tmp_path, "test", imagenet_transform(False, 32))
    assert test[3][0].shape == (3, 32, 32)
    with pytest.raises(UserError, match="does not fit into memory"):
        load_images("imagenet", tmp_path)
    with pytest.raises(UserError, match=r"ImageNet-1k .*is not there: get it from https://image-net.org"):
        stream_images("imagenet", tmp_path / "none")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist", "tiny-imagenet"])
def test_a_set_that_is_not_there_says_where_to_get_it(tmp_path, name):
    with pytest.raises(UserError, match=r"is not there: get it from http.* and lay it out as .*--data.download"):
        load_images(name, tmp_path)


def test_names_and_splits():
    with pytest.raises(UserError, match=r"no image set 'cifar-10'.*did you mean 'cifar10'"):
        load_images("cifar-10")
    with pytest.raises(UserError, match="digits has no split 'validation'"):
        load_images("digits", split="validation")
    assert normalisation("cifar10")[1] == (0.2470, 0.2435, 0.2616)
    with pytest.raises(UserError, match="measured_normalisation"):
        normalisation("folder")


def test_measured_normalisation_is_that_of_the_pixels():
    images = torch.randint(256, (20, 3, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = measured_normalisation(ImageSet(images, torch.zeros(20, dtype=torch.int64), ("a",)))
    pixels = images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-12)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-12)


@pytest.mark.parametrize("held_out", [0.25, 250])
def test_split_train_validation(held_out):
    data = load_images("digits")
    marked = ImageSet(data.images, torch.arange(1000), tuple(map(str, range(1000))))
    train, validation = split_train_validation(marked, held_out, seed=1)
    assert len(validation) == 250
    assert sorted([*train.labels.tolist(), *validation.labels.tolist()]) == list(range(1000))
    assert torch.equal(split_train_validation(marked, held_out, seed=1)[1].labels, validation.labels)
    assert not torch.equal(split_train_validation(marked, held_out, seed=2)[1].labels, validation.labels)
    for bad in (0, 1000, 1.0):
        with pytest.raises(UserError, match="cannot be held out"):
            split_train_validation(marked, bad, seed=1)


def test_an_inconsistent_set_cannot_be_made():
    with pytest.raises(ValueError, match="outside"):
        ImageSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 2]), ("a", "b"))
