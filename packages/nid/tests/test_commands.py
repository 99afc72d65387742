"""The verbs of the tasks, the recipes, and one small run that learns."""

import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import call, keep

import tenfold_nid as nid
from tenfold_nid import embedded, evaluate, metrics, shapes, train
from tenfold_nid.checkpoints import load_dictionary, load_model
from tenfold_nid.overrides import OtherData, OtherFit, data_of, fit_of
from tenfold_nid.recipe import Recipe
from tenfold_nid.signals import DataConfig, Signals, load_signals
from tenfold_shared.batches import generator
from tenfold_shared.checkpoint import save_weights


def test_fit_codes_any_image(tmp_path: Path) -> None:
    checkpoint = keep(tmp_path)
    pixels = (embedded.photograph("chelsea", 48)[:, :40] * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    code, (found,), err = call(
        tmp_path, "fit", "--checkpoint", str(checkpoint), "--images", "cat.png", "--stride", "8", "--scale", "2"
    )
    assert code == 0, err
    assert found["image"] == "cat"
    assert found["psnr"] > 15
    assert Image.open(tmp_path / "runs/nid/fit/cat.png").size == (80, 96)
    with np.load(tmp_path / "runs/nid/fit/cat.npz") as packed:
        assert len(packed["value"]) == found["patches"] == 5 * 4
    Image.fromarray(pixels[:10]).save(tmp_path / "flat.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "cat.png").read_bytes()[:200])
    for name, word in (("flat.png", "smaller than a patch"), ("torn.png", "torn.png"), ("none.png", "none.png")):
        code, _, err = call(tmp_path, "fit", "--checkpoint", str(checkpoint), "--images", name)
        assert code == 2
        assert word in err
    for options, word in (
        (["--fit.penalty", "0", "--fit.support", "all", "--fraction", "0.03"], "do not determine"),
        (["--fit.solver", "omp", "--fraction", "0.01"], "more unknowns"),
        (["--fraction", "0"], "fraction"),
        (["--stride", "17"], "gaps"),
        (["--output", "cat.png"], "choose another --output"),
        (["--images", "cat.png,./cat.png"], "would both be written as cat"),
    ):
        code, _, err = call(tmp_path, "fit", "--checkpoint", str(checkpoint), "--images", "cat.png", *options)
        assert code == 2, options
        assert word in err


def test_inpaint_with_and_without_a_mask(tmp_path: Path) -> None:
    checkpoint = keep(tmp_path)
    image = np.full((32, 32, 3), 120, np.uint8)
    mask = np.full((32, 32), 255, np.uint8)
    image[6:12, 5:10], mask[6:12, 5:10] = 255, 0
    Image.fromarray(image).save(tmp_path / "spoilt.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ["inpaint", "--checkpoint", str(checkpoint), "--images", "spoilt.png"]
    code, (found,), err = call(tmp_path, *arguments, "--mask", "mask.png")
    assert code == 0, err
    assert found["replaced"] == pytest.approx(30 / 1024)
    repaired = np.asarray(Image.open(tmp_path / "runs/nid/inpaint/spoilt.png")).astype(int)
    assert np.abs(repaired - 120).max() < 25
    code, (found,), err = call(tmp_path, *arguments)
    assert code == 0, err
    code, (other,), err = call(tmp_path, *arguments, "--robust.solver", "ridge")
    assert code == 0, err
    assert other["replaced"] != found["replaced"]
    code, _, err = call(tmp_path, *arguments, "--fit.solver", "map")
    assert code == 2
    assert "learns its prior" in err
    Image.fromarray(mask * 0).save(tmp_path / "mask.png")
    code, _, err = call(tmp_path, *arguments, "--mask", "mask.png")
    assert code == 2
    assert "no observed sample" in err
    Image.fromarray(mask[:8]).save(tmp_path / "mask.png")
    code, _, err = call(tmp_path, *arguments, "--mask", "mask.png")
    assert code == 2
    assert "mask is" in err


def test_separate_a_folder_of_frames(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for i in range(6):
        frame = np.full((8, 10, 3), 90, np.uint8)
        frame[2:5, i : i + 3] = 220
        Image.fromarray(frame).save(tmp_path / f"frames/{i}.png")
    small = [
        "--model.num_experts",
        "8",
        "--model.num_topk",
        "8",
        "--model.hidden_dim",
        "16",
        "--model.ffm_map_size",
        "16",
    ]
    code, (found,), err = call(tmp_path, "separate", "--frames", "frames", "--steps", "30", *small)
    assert code == 0, err
    assert 0 < found["foreground"] < 0.6
    assert len(list((tmp_path / "runs/nid/separate").glob("background-*.png"))) == 6
    trained = keep(tmp_path, gate="codebook", num_signals=6, num_experts=8, num_topk=8, size=(8, 10))
    again = ["separate", "--frames", "frames", "--checkpoint", str(trained)]
    code, (found,), err = call(tmp_path, *again, "--background_atoms", "8")
    assert code == 0, err
    assert 0 < found["foreground"] < 1
    code, _, err = call(tmp_path, *again, "--background_atoms", "9")
    assert code == 2
    code, _, err = call(tmp_path, "separate", "--frames", "empty")
    assert code == 2
    assert "no images" in err


def test_tomography_and_its_controls(tmp_path: Path) -> None:
    checkpoint = keep(tmp_path, out_dim=1, gate="codebook", num_signals=4, size=(16, 16))
    few = [
        "--data.train_subset",
        "8",
        "--data.test_subset",
        "2",
        "--data.test_views",
        "4",
        "--data.views",
        "9",
    ]
    code, found, err = call(tmp_path, "ct", "--checkpoint", str(checkpoint), *few)
    assert code == 0, err
    assert [line["method"] for line in found] == ["nid", "fbp", "tv"]
    assert all(line["psnr"] > 5 for line in found)
    assert Image.open(tmp_path / "runs/nid/ct/nid-00000.png").size == (16, 16)  # that of the dictionary
    np.save(tmp_path / "images.npy", np.random.RandomState(0).rand(4, 8, 12))
    slices = ["--data.name", "ct", "--data.root", ".", "--data.views", "9", "--tv_weight", "0"]
    code, found, err = call(tmp_path, "ct", "--checkpoint", str(checkpoint), *slices)
    assert code == 0, err
    assert [line["method"] for line in found] == ["nid", "tv"]
    assert all(np.isfinite(line["psnr"]) for line in found)
    code, _, err = call(
        tmp_path, "ct", "--checkpoint", str(checkpoint), *few[:-4], "--data.views", "3", "--data.test_views", "4"
    )
    assert code == 2
    assert "distinct" in err
    code, _, err = call(tmp_path, "ct", "--checkpoint", str(keep(tmp_path)), *few)
    assert code == 2
    assert "3 channels" in err


def test_shapes_become_meshes(tmp_path: Path) -> None:
    o3d = pytest.importorskip("open3d", reason="meshes need the extra tenfold-nid[mesh]", exc_type=ImportError)
    checkpoint = keep(tmp_path, in_dim=3, out_dim=1, gate="codebook", num_signals=4, size=(12,) * 3, ffm_map_scale=1.0)
    arguments = ["sdf", "--checkpoint", str(checkpoint), "--resolution", "16", "--points", "1500"]
    code, (found,), err = call(tmp_path, *arguments, "--count", "1")
    assert code == 0, err
    assert found["chamfer"] < 0.3
    mesh = o3d.io.read_triangle_mesh(str(tmp_path / "runs/nid/sdf/shape-0.ply"))
    assert len(mesh.vertices) == found["vertices"]
    truth = nid.marching_cubes(embedded.distance_fields(1, shapes.FINE, seed=1)[0, ..., 0])
    points, _ = shapes.sample_surface(truth, shapes.SURFACE_SAMPLES, generator(0))
    distance = nid.surface_distance(torch.from_numpy(np.asarray(mesh.vertices)), points)
    assert found["chamfer"] == pytest.approx(float(distance.chamfer), rel=1e-6)
    code, _, err = call(tmp_path, *arguments, "--count", "1", "--points", "1")
    assert code == 2
    assert "shape-0: the field" in err
    torn = o3d.geometry.TriangleMesh.create_box()
    torn.triangles = o3d.utility.Vector3iVector(np.asarray(torn.triangles)[:-1])
    o3d.io.write_triangle_mesh(str(tmp_path / "torn.ply"), torn)
    code, _, err = call(tmp_path, *arguments, "--meshes", "torn.ply")
    assert code == 2
    assert "watertight" in err
    separate = {
        "in_dim": 3,
        "out_dim": 1,
        "gate": "codebook",
        "num_signals": 4,
        "size": (12,) * 3,
        "ffm_map_scale": 1.0,
    }
    alone = keep(tmp_path, atoms="independent", **separate)
    code, (found,), err = call(tmp_path, "sdf", "--checkpoint", str(alone), *arguments[3:], "--count", "1")
    assert code == 0, err
    assert found["chamfer"] < 0.3
    points = ["--config", "pointcloud-siren", "--schedule.epochs", "2", "--name", "points"]
    code, _, err = call(
        tmp_path, "train", *points, "--schedule.batch_size", "64", "--network.hidden_dim", "16", "--quiet"
    )
    assert code == 0, err
    network, _ = load_model(tmp_path / "runs/nid/points")
    with torch.no_grad():  # a few steps do not make a surface
        network.biases[-1] -= network(nid.lattice((16,) * 3)).median()
    save_weights(tmp_path / "shape.safetensors", network.state_dict(), load_model(tmp_path / "runs/nid/points")[1])
    code, (found,), err = call(tmp_path, "sdf", "--checkpoint", "shape.safetensors", "--resolution", "16")
    assert code == 0, err
    assert found["vertices"] > 0
    code, _, err = call(tmp_path, "sdf", "--checkpoint", str(keep(tmp_path)))
    assert code == 2
    assert "2-D" in err


def test_export_writes_the_network_of_one_signal(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="ONNX export needs the extra tenfold-nid[onnx]")
    code, (found,), err = call(tmp_path, "export", "--checkpoint", str(keep(tmp_path)), "--index", "3")
    assert code == 0, err
    assert found["folded_differs_by"] < 1e-4
    assert found.get("onnx_differs_by", 0) < 1e-4
    assert (tmp_path / found["file"]).is_file()
    code, _, err = call(tmp_path, "export", "--checkpoint", str(keep(tmp_path)), "--index", "100")
    assert code == 2
    assert "100 patches" in err


def test_released_checkpoints_are_evaluated_and_others_refused(tmp_path: Path) -> None:
    model = nid.NeuralDictionary(
        nid.DictionaryConfig(
            num_experts=16, num_topk=2, hidden_dim=16, ffm_map_size=16, gate="conv", gate_hidden=4, size=(16, 16)
        )
    )
    nid.save_official_checkpoint(model, tmp_path / "0001.ckpt")
    code, (found,), err = call(tmp_path, "eval", "--checkpoint", "0001.ckpt")
    assert code == 0, err
    assert found["atoms"] == 16
    assert (found["data"], found["solver"]) == ("photographs", "ridge")
    assert "gate_psnr" in found
    state = torch.load(tmp_path / "0001.ckpt", weights_only=True)
    state["model"]["gate_generator.fc.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "bad.ckpt")
    code, _, err = call(tmp_path, "eval", "--checkpoint", "bad.ckpt")
    assert code == 2
    assert "gate_generator.fc.bias" in err
    code, _, err = call(tmp_path, "eval", "--checkpoint", "0001.ckpt", "--data.name", "faces")
    assert code == 2
    assert "3 channels" in err


def test_scores_of_patches_are_those_of_the_images_they_make_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = embedded.photograph("chelsea", 32)[None]
    patches = nid.split_patches(images, (16, 16))
    monkeypatch.setattr(evaluate, "load_signals", lambda config: Signals(patches, patches, patches, (32, 32)))
    checkpoint = keep(tmp_path)
    code, (found,), err = call(tmp_path, "eval", "--checkpoint", str(checkpoint))
    assert code == 0, err
    model, _ = load_dictionary(checkpoint)
    preds = model.render(nid.fit_codes(model, patches), nid.lattice((16, 16)))
    whole = nid.merge_patches(preds.detach(), (16, 16), (32, 32))
    assert found["ssim"] == pytest.approx(float(nid.ssim(whole, images.movedim(-1, 1))), abs=1e-5)

    def distance(first: torch.Tensor, second: torch.Tensor, *, net_type: str, normalize: bool) -> torch.Tensor:
        assert first.shape == second.shape == (1, 3, 32, 32)
        return torch.tensor(0.25 if normalize else 0.5)

    stand_in = types.ModuleType("torchmetrics.functional.image")  # the real one fetches weights, and takes seconds
    stand_in.learned_perceptual_image_patch_similarity = distance  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", stand_in)
    code, (found,), err = call(tmp_path, "eval", "--checkpoint", str(checkpoint), "--lpips")
    assert code == 0, err
    assert (found["lpips"], found["lpips_released"]) == (0.25, 0.5)
    with pytest.raises(ValueError, match="32 pixels or more, got 16×16"):
        metrics.lpips(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16))


def test_eval_goes_on_as_the_checkpoint_was_trained(tmp_path: Path) -> None:
    few = ["--data.name", "phantoms", "--data.size", "12", "--data.train_subset", "9", "--data.test_subset", "2"]
    small = ["--schedule.epochs", "1", "--network.hidden_dim", "8", "--network.pos_emb", "Id", "--quiet"]
    for name, method in (
        ("ksvd", ["ksvd", "--linear.components", "6", "--linear.sparsity", "2", "--linear.iterations", "1"]),
        ("maml", ["maml", "--meta.test_optimiser", "adam", *small]),
        ("scratch", ["scratch", *small]),
        ("pca", ["pca", "--linear.components", "2"]),
    ):
        faces = ["--data.name", "faces"] if name == "ksvd" else few
        code, _, err = call(tmp_path, "train", "--method", *method, *faces, "--name", name)
        assert code == 0, err
    model, about = load_model(tmp_path / "runs/nid/ksvd")
    assert about["sparsity"] == 2
    code, (found,), err = call(tmp_path, "eval", "--checkpoint", "runs/nid/ksvd")
    assert code == 0, err
    assert found["data"] == "faces"
    faces = load_signals(DataConfig(name="faces")).test
    codes, _ = nid.omp(model.system(faces.flatten(1, -2)), 2)
    expected = nid.psnr(model.render(codes, 1).view_as(faces), faces).mean()
    assert found["psnr"] == pytest.approx(float(expected), abs=1e-3)
    assert load_model(tmp_path / "runs/nid/maml")[1]["test_optimiser"] == "adam"
    for name, data, word in (
        ("scratch", [*few[:-1], "3"], "a network for each of 2 signals"),
        ("pca", [], "not to projections"),
    ):
        code, _, err = call(tmp_path, "eval", "--checkpoint", f"runs/nid/{name}", *data)
        assert code == 2, name
        assert word in err


def test_eval_takes_data_and_solver_from_the_checkpoint_unless_told_otherwise(tmp_path: Path) -> None:
    path = keep(tmp_path, out_dim=1, gate="conv", gate_hidden=4, size=(25, 25))
    data = DataConfig(name="faces", fraction=0.5, root=Path("nowhere"))
    recipe = Recipe(data=data, fit=nid.FitOptions(solver="omp", atoms=2))
    save_weights(path, load_model(path)[0].state_dict(), train.about(recipe, load_model(path)[0]))
    assert vars(OtherFit()).keys() == {f.name for f in dataclasses.fields(nid.FitOptions)}
    assert vars(OtherData()).keys() == {f.name for f in dataclasses.fields(DataConfig)}
    about = load_model(path)[1]
    assert fit_of(about, OtherFit(steps=7)) == dataclasses.replace(recipe.fit, steps=7)
    assert data_of(about, OtherData()) == data
    assert data_of(about, OtherData(size=9)) == dataclasses.replace(data, size=9)
    assert data_of(about, OtherData(name="olivetti")) == DataConfig(name="olivetti")
    assert data_of({"method": "nid"}, OtherData()) == DataConfig()
    code, (found,), err = call(tmp_path, "eval", "--checkpoint", str(path))
    assert code == 0, err
    assert (found["data"], found["solver"], found["signals"]) == ("faces", "omp", 20)
    code, (other,), err = call(
        tmp_path, "eval", "--checkpoint", str(path), "--data.fraction", "1", "--fit.solver", "ridge"
    )
    assert code == 0, err
    assert (other["data"], other["solver"]) == ("faces", "ridge")
    assert other["psnr"] > found["psnr"]


def test_eval_takes_every_solver_and_refuses_in_one_sentence(tmp_path: Path) -> None:
    arguments = ["eval", "--checkpoint", str(keep(tmp_path, gate="conv", gate_hidden=4))]
    values = []
    for steps in ("0", "2"):
        code, (found,), err = call(
            tmp_path, *arguments, "--fit.solver", "gate", "--fit.steps", steps, "--fit.lr", "0.003"
        )
        assert code == 0, err
        values.append(found["psnr"])
    assert values[1] > values[0] == pytest.approx(found["gate_psnr"], abs=1e-3)
    code, _, err = call(tmp_path, *arguments, "--fit.solver", "omp", "--data.fraction", "0.01")
    assert code == 2
    assert "more unknowns" in err
    arguments = ["eval", "--checkpoint", str(keep(tmp_path, gate="strided")), "--data.size", "12"]
    code, _, err = call(tmp_path, *arguments)
    assert code == 2
    assert "without the gate" in err
    code, (found,), err = call(tmp_path, *arguments, "--fit.support", "all")
    assert code == 0, err
    assert "gate_psnr" not in found
    table = keep(tmp_path, gate="codebook", num_signals=4)
    code, _, err = call(tmp_path, "eval", "--checkpoint", str(table), "--fit.solver", "adam", "--fit.support", "gate")
    assert code == 2
    assert "codebook gate stores" in err
    torch.save(nid.siren(hidden_dim=8).state_dict(), tmp_path / "siren.ckpt")
    code, _, err = call(tmp_path, "eval", "--checkpoint", "siren.ckpt")
    assert code == 2
    assert "network of one signal" in err


def test_precision_is_that_of_the_networks_or_refused(tmp_path: Path) -> None:
    arguments = ["eval", "--checkpoint", str(keep(tmp_path, num_experts=128))]
    for solver in ("ridge", "adam", "gate"):
        values = []
        for precision in ("fp32", "bf16"):
            asked = ["--precision", precision, "--fit.solver", solver, "--fit.steps", "5", "--fit.lr", "0.003"]
            code, (found,), err = call(tmp_path, *arguments, *asked)
            assert code == 0, err
            values.append(found["psnr"])
        assert values[1] == pytest.approx(values[0], abs=1), solver
        assert values[1] != values[0], solver
    learned = []
    small = ["--data.name", "faces", "--schedule.epochs", "1", "--network.hidden_dim", "4", "--network.pos_emb", "Id"]
    for method in ("scratch", "maml", "reptile", "latent"):
        for precision in ("fp32", "bf16"):
            name = f"{method}-{precision}"
            code, _, err = call(
                tmp_path, "train", "--method", method, *small, "--precision", precision, "--name", name, "--quiet"
            )
            assert code == 0, err
            learned.append([*load_model(tmp_path / "runs/nid" / name)[0].parameters()])
        first, second = learned[-2:]
        assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), method
        assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(first, second, strict=True)), method
    code, (found,), err = call(tmp_path, "eval", "--checkpoint", "runs/nid/maml-fp32", "--precision", "bf16")
    assert code == 0, err
    for refused in (
        [*arguments, "--compile"],
        [*arguments, "--precision", "fp16"],
        ["train", "--method", "pca", "--data.name", "faces", "--precision", "bf16", "--name", "pca"],
        ["train", "--method", "maml", *small, "--compile", "--name", "compiled"],
        ["fit", *arguments[1:], "--precision", "bf16"],
    ):
        code, _, err = call(tmp_path, *refused)
        assert code == 2, refused
        assert "runs in" in err
