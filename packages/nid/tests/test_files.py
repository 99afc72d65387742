"""Checkpoints, exports and data sets on disk."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tenfold_nid as nid
from tenfold_nid import data
from tenfold_nid.compat import infer_config
from tenfold_nid.recipe import Recipe, Schedule
from tenfold_nid.signals import DataConfig, load_signals, observation
from tenfold_shared.errors import UserError


def dictionary(**fields: object) -> nid.NeuralDictionary:
    torch.manual_seed(0)
    base: dict = {
        "num_experts": 24,
        "num_topk": 3,
        "hidden_dim": 16,
        "ffm_map_size": 16,
        "gate": "conv",
        "gate_hidden": 8,
        "size": (8, 8),
        "num_signals": 4,
    }
    return nid.NeuralDictionary(
        nid.DictionaryConfig(**{**base, **fields}), load_mode="official", importance_mode="signed"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gate": "codebook"},
        {"gate": "resnet"},
        {"gate": "linear"},
        {"gate": "codebook", "in_dim": 3, "out_dim": 1, "size": (4, 4, 4)},
        {"pos_emb": "Id", "act_type": "sine", "num_layers": 3},
        {"pos_emb": "pe", "num_freqs": 5},
        {"noise": True, "gate_layers": 3},
    ],
    ids=str,
)
def test_official_checkpoints_go_round(fields: dict, tmp_path) -> None:
    model = dictionary(**fields).eval()
    nid.save_official_checkpoint(model, tmp_path / "0001.ckpt", epoch=1)
    raw = torch.load(tmp_path / "0001.ckpt", weights_only=True)
    assert set(raw) == {"model", "optimizer", "current_epoch"}
    assert len(raw["optimizer"]["param_groups"][0]["params"]) == len(list(model.parameters()))
    loaded = nid.load_official_checkpoint(tmp_path / "0001.ckpt")
    assert loaded.config.num_topk == 3
    signal = torch.arange(4) if model.config.gate == "codebook" else torch.rand(2, 8, 8, 3)
    coords = torch.rand(7, model.config.in_dim)
    assert torch.equal(loaded(signal, coords).preds, model(signal, coords).preds)


@pytest.mark.parametrize("make", [nid.ffm, nid.siren, nid.pe_mlp])
def test_released_networks_of_single_signals_load(make, tmp_path) -> None:
    network = make(hidden_dim=8)
    torch.save({"model": network.state_dict(), "optimizer": {}, "current_epoch": 3}, tmp_path / "0003.ckpt")
    loaded = nid.load_official_checkpoint(tmp_path / "0003.ckpt")
    coords = torch.rand(7, 2)
    assert isinstance(loaded, nid.CoordinateNetwork)
    assert torch.equal(loaded(coords), network(coords))
    torch.save({k: v for k, v in network.state_dict().items() if k != "net.net.0.0.bias"}, tmp_path / "bad.ckpt")
    with pytest.raises(nid.DataError, match=r"missing: net\.net\.0\.0\.bias"):
        nid.load_official_checkpoint(tmp_path / "bad.ckpt")


def test_the_released_layout_is_read_off_the_shapes() -> None:
    with torch.device("meta"):
        state = nid.NeuralDictionary(nid.celeba_config(128)).state_dict()
    state["experts.map.B"] = torch.randn(1024, 2) * 256
    config = infer_config(state)
    assert (config.num_experts, config.num_topk, config.out_dim, config.hidden_dim) == (4096, 256, 3, 512)
    assert (config.gate, config.size, config.ffm_map_size, config.num_layers) == ("resnet", (128, 128), 2048, 4)
    assert config.ffm_map_scale == pytest.approx(256, rel=0.05)


def test_checkpoints_that_do_not_fit_list_their_keys(tmp_path) -> None:
    path = tmp_path / "bad.ckpt"
    good = dictionary().state_dict()

    def load_with(state: object) -> None:
        torch.save(state, path)
        nid.load_official_checkpoint(path)

    with pytest.raises(nid.DataError, match=r"missing: experts\.net\.net\.0\.0\.bias"):
        load_with({"model": {k: v for k, v in good.items() if k != "experts.net.net.0.0.bias"}})
    with pytest.raises(nid.DataError, match="unexpected: extra"):
        load_with({"model": {**good, "extra": torch.zeros(1)}})
    with pytest.raises(nid.DataError, match="does not fit 72 head outputs"):
        load_with({"model": {**good, "gate_generator.fc.weight": torch.zeros(30, 8)}})
    with pytest.raises(nid.DataError, match=r"of another shape: gate_generator\.fc\.bias"):
        load_with({"model": {**good, "gate_generator.fc.bias": torch.zeros(5)}})
    with pytest.raises(nid.DataError, match="there is no gate_generator"):
        load_with({"model": {k: v for k, v in good.items() if k.startswith("experts")}})
    with pytest.raises(nid.DataError, match="no dictionary of tensors"):
        load_with([1, 2])
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"bad\.ckpt is truncated or corrupted"):
        nid.load_official_checkpoint(path)
    path.write_bytes(pickle.dumps({"model": print}))
    with pytest.raises(UserError, match=r"bad\.ckpt .*not loaded"):
        nid.load_official_checkpoint(path)
    with pytest.raises(nid.DataError, match=r"huggingface\.co"):
        nid.load_official_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="independent atoms"):
        nid.save_official_checkpoint(dictionary(atoms="independent"), path)
    with pytest.raises(ValueError, match="radial basis"):
        nid.save_official_checkpoint(dictionary(pos_emb="rbf"), path)


def test_official_configuration_files(tmp_path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(
        "expname = faces\nnum_experts=4096  # atoms\n\nlr = 1e-4\ndownsampled_size = [128, 128]\nsiren = True\n"
    )
    assert nid.parse_official_config(path) == {
        "expname": "faces",
        "num_experts": 4096,
        "lr": 1e-4,
        "downsampled_size": [128, 128],
        "siren": True,
    }
    path.write_text("nonsense\n")
    with pytest.raises(nid.DataError, match=":1: expected"):
        nid.parse_official_config(path)


@pytest.mark.parametrize(
    "fields", [{}, {"pos_emb": "Id", "act_type": "sine"}, {"pos_emb": "pe", "num_freqs": 3}], ids=str
)
def test_a_single_signal_needs_no_dictionary(fields: dict, tmp_path) -> None:
    model = dictionary(**fields).double()
    code = model.sparse_code(torch.rand(2, 8, 8, 3, dtype=torch.float64)).detach()
    coords = torch.rand(31, 2, dtype=torch.float64)
    network = nid.single_signal(model, code[1])
    assert torch.allclose(network(coords), model.render(code, coords)[1], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="27 numbers, got 26"):
        nid.single_signal(model, code[1, 1:])
    with pytest.raises(ValueError, match="shared trunk"):
        nid.single_signal(dictionary(atoms="independent"), code[1])


def test_onnx_gives_the_same_numbers(tmp_path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX export needs the extra tenfold-nid[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="comparing ONNX needs onnxruntime")
    model = dictionary()
    network = nid.single_signal(model, model.sparse_code(torch.rand(1, 8, 8, 3))[0])
    nid.save_onnx(network, tmp_path / "signal.onnx")
    session = runtime.InferenceSession(str(tmp_path / "signal.onnx"), providers=["CPUExecutionProvider"])
    for count in (5, 64):
        coords = torch.rand(count, 2)
        (values,) = session.run(None, {"coords": coords.numpy()})
        np.testing.assert_allclose(values, network(coords).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_packed_codes_are_small_and_close() -> None:
    model = dictionary(num_experts=600, num_topk=20)
    code = model.sparse_code(torch.rand(5, 8, 8, 3)).detach()
    packed = nid.pack_codes(code, 600, 20)
    back = nid.unpack_codes(packed)
    assert packed.num_bytes < 5 * (20 * 3 + 3 + 8 + 1)
    step = code[:, :600].abs().amax(dim=1, keepdim=True) / 127
    assert bool(((back - code)[:, :600].abs() <= 0.51 * step).all())
    assert torch.equal(back[:, :600] != 0, (code[:, :600].abs() > 0.5 * step))
    with pytest.raises(ValueError, match="can be kept"):
        nid.pack_codes(code, 600, 601)


def write_image(path, size=(178, 218), seed=0, mode="RGB") -> None:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")


def test_celeba_layout(tmp_path) -> None:
    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "list_eval_partition.txt").write_text("".join(f"{i:06d}.jpg {i % 3}\n" for i in range(6)))
    for i in range(6):
        write_image(tmp_path / "img_align_celeba" / f"{i:06d}.jpg", seed=i)
    images = data.celeba(tmp_path, "test", subset=1, size=(32, 32))
    assert images.shape == (1, 32, 32, 3)
    assert data.celeba_names(tmp_path, "test") == ["000002.jpg", "000005.jpg"]
    (tmp_path / "img_align_celeba" / "000002.jpg").write_bytes(b"\x89PNG broken")
    with pytest.raises(nid.DataError, match=r"000002\.jpg is no image, or damaged"):
        data.celeba(tmp_path, "test", subset=1)
    (tmp_path / "list_eval_partition.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(nid.DataError, match=":1: expected"):
        data.celeba_names(tmp_path, "train")
    (tmp_path / "list_eval_partition.txt").write_text("a.jpg 7\n")
    with pytest.raises(nid.DataError, match=":1: expected"):
        data.celeba_names(tmp_path, "train")
    with pytest.raises(nid.DataError, match=r"mmlab\.ie\.cuhk\.edu\.hk"):
        data.celeba(tmp_path / "nowhere")


def test_frames_faces_and_slices(tmp_path) -> None:
    for i in range(9):
        write_image(tmp_path / f"{i:03d}.png", (12, 10), seed=i)
        write_image(tmp_path / f"subject{i:02d}.happy", (12, 10), seed=i, mode="L")
    assert data.frames(tmp_path).shape == (9, 10, 12, 3)
    assert data.yale(tmp_path, "train").shape == (8, 10, 12, 1)
    assert data.yale(tmp_path, "test").shape == (1, 10, 12, 1)
    write_image(tmp_path / "999.png", (13, 10))
    with pytest.raises(nid.DataError, match="all must be alike"):
        data.frames(tmp_path)
    with pytest.raises(nid.DataError, match="holds no images"):
        data.frames(tmp_path / "none")
    np.save(tmp_path / "images.npy", np.zeros((3, 8, 9)))
    assert data.ct_images(tmp_path / "images.npy").shape == (3, 8, 9, 1)
    np.save(tmp_path / "flat.npy", np.zeros((3, 8)))
    with pytest.raises(nid.DataError, match=r"\[N, H, W\]"):
        data.ct_images(tmp_path / "flat.npy")
    np.save(tmp_path / "nan.npy", np.full((3, 8, 9), np.nan))
    with pytest.raises(nid.DataError, match="not finite"):
        data.ct_images(tmp_path / "nan.npy")
    np.save(tmp_path / "words.npy", np.full((3, 8, 9), "a"))
    np.savez(tmp_path / "many.npz", images=np.zeros((3, 8, 9)))
    for name in ("words.npy", "many.npz"):
        with pytest.raises(nid.DataError, match="no array of numbers"):
            data.ct_images(tmp_path / name)
    with pytest.raises(nid.DataError, match="were not distributed; save slices"):
        data.ct_images(tmp_path / "none.npy")
    with pytest.raises(nid.DataError, match="holds no file subject"):
        data.yale(tmp_path / "999.png")
    Image.fromarray(np.full((10, 12), 500, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(nid.DataError, match="more than 8 bits"):
        data.read_images([tmp_path / "deep.png"], 1)
    np.save(tmp_path / "code.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(nid.DataError, match="no array of numbers"):
        data.ct_images(tmp_path / "code.npy")


def test_shapes_on_disk(tmp_path) -> None:
    np.save(tmp_path / "abc.sdf.npy", np.zeros((4, 4, 4), np.float32))
    ((name, volume),) = data.sdf_volumes(tmp_path)
    assert name == "abc"
    assert volume.shape == (4, 4, 4, 1)
    with pytest.raises(nid.DataError, match=r"missing\.sdf\.npy is missing"):
        list(data.sdf_volumes(tmp_path, ["missing"]))
    np.save(tmp_path / "def.sdf.npy", np.zeros((5, 5, 5), np.float32))
    with pytest.raises(nid.DataError, match=r"def\.sdf\.npy has shape \(5, 5, 5\), abc has \(4, 4, 4\)"):
        list(data.sdf_volumes(tmp_path))
    splits = tmp_path / "pix2mesh_splits_val05.json"
    splits.write_text(json.dumps({"train": {"03001627": ["b", "a"]}}))
    assert data.shapenet_ids(splits, "train") == ["a", "b"]
    with pytest.raises(nid.DataError, match="no entry"):
        data.shapenet_ids(splits, "test")
    with pytest.raises(nid.DataError, match="unknown category"):
        data.shapenet_ids(splits, "train", "1")
    (tmp_path / "points.xyz").write_text("0 0 1 0 0 2\n1 0 0 3 0 0\n")
    points, normals = data.point_cloud(tmp_path / "points.xyz")
    assert points.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert normals.tolist() == [[0, 0, 1], [1, 0, 0]]
    (tmp_path / "points.xyz").write_text("0 0 1\n")
    with pytest.raises(nid.DataError, match="rows of 3 numbers"):
        data.point_cloud(tmp_path / "points.xyz")
    for text, word in (("", "has no points"), ("0 0 1 0 0 2\n1 0 0 3 0 nan\n", "row 2")):
        (tmp_path / "points.xyz").write_text(text)
        with pytest.raises(nid.DataError, match=word):
            data.point_cloud(tmp_path / "points.xyz")


def test_fetched_data_sets_are_named_when_missing(tmp_path) -> None:
    with pytest.raises(UserError, match="cifar"):
        data.cifar10(tmp_path)
    with pytest.raises(nid.DataError, match="Olivetti faces are missing"):
        data.olivetti(tmp_path)
    (tmp_path / "olivetti_py3.pkz").write_bytes(b"garbage")
    with pytest.raises(nid.DataError, match="Olivetti faces there are damaged"):
        data.olivetti(tmp_path)
    assert data.every_eighth(20, "test") == [1, 9, 17]
    assert data.spread(10, 4) == [0, 3, 6, 9]


def test_slices_are_shared_out_between_learning_and_coding(tmp_path) -> None:
    def counts(slices: int, **subsets: int) -> tuple[int, int]:
        np.save(tmp_path / "images.npy", np.random.RandomState(0).rand(slices, 4, 4))
        found = load_signals(DataConfig(name="ct", root=tmp_path, **subsets))
        return len(found.train), len(found.test)

    assert counts(12, train_subset=5, test_subset=3) == (5, 3)
    assert counts(12, test_subset=3) == (9, 3)
    assert counts(12) == (6, 6)
    with pytest.raises(UserError, match="has 1 slices"):
        counts(1)
    with pytest.raises(UserError, match="0 signals to learn from"):
        counts(2, validation=True)


@pytest.mark.parametrize("options", [{"patch": 4}, {"corruption": "occlusion"}], ids=str)
def test_what_is_done_to_images_is_not_done_to_volumes(options: dict) -> None:
    with pytest.raises(UserError, match="primitives has volumes"):
        load_signals(DataConfig(name="primitives", size=8, train_subset=1, test_subset=1, **options))


def test_held_out_signals_are_training_signals_and_not_learned_from() -> None:
    for name in ("photographs", "faces"):
        plain, held = load_signals(DataConfig(name=name)), load_signals(DataConfig(name=name, validation=True))  # type: ignore[arg-type]
        learned = {x.numpy().tobytes() for x in held.train}
        assert not any(x.numpy().tobytes() in learned for x in held.test)
        assert not any(x.numpy().tobytes() in {y.numpy().tobytes() for y in plain.test} for x in held.test)
        if name == "faces":
            assert not any(x.flip(1).numpy().tobytes() in learned for x in held.test)


def test_observations_are_the_same_for_every_arm_of_a_seed() -> None:
    signals = torch.zeros(3, 4, 4, 1)
    first, again, other = (observation(signals, 0.5, seed) for seed in (1, 1, 2))
    assert first is not None
    assert torch.equal(first, again)  # type: ignore[arg-type]
    assert not torch.equal(first, other)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least one"):
        observation(signals, 0.01, 0)
    for bad in (
        {"fraction": 0.0},
        {"views": 0},
        {"size": -1},
        {"name": "phantoms", "fraction": 0.5},
        {"name": "faces", "test_views": 3},
        {"patch": 8},
    ):
        with pytest.raises(UserError, match=f"--data.{[*bad][-1]}|--data.size"):
            DataConfig(**bad)  # type: ignore[arg-type]
    for change in ({"schedule": "cosine"}, {"weight_decay": 0.1}):
        with pytest.raises(UserError, match="--method reptile"):
            Recipe(method="reptile", schedule=Schedule(**change))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="epochs"):
        Schedule(epochs=0)
    with pytest.raises(UserError, match="lr"):
        Schedule(lr=0)
    with pytest.raises(UserError, match="--pretrained"):
        Recipe(finetune=True)
    for hidden in ({"fraction": 0.1}, {"name": "phantoms", "test_views": 4}):
        with pytest.raises(UserError, match="would see what"):
            Recipe(finetune=True, pretrained=Path("x"), data=DataConfig(**hidden))  # type: ignore[arg-type]
