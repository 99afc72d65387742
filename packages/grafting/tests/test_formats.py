"""Formats of others: ONNX, VNN-LIB, arrays, SVHN."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import random_network

from tenfold_grafting.data import DataConfig, load_data
from tenfold_grafting.graph import Normalise, trace
from tenfold_grafting.specification import ball
from tenfold_grafting.vnnlib import read_vnnlib, write_vnnlib
from tenfold_grafting.zoo import load_images, load_network
from tenfold_shared.errors import UserError


@pytest.mark.parametrize("kind", ["mlp", "conv", "residual"])
def test_onnx_round_trip(kind: str, tmp_path: Path) -> None:
    """What is written, read again, is the same function; ONNX's own reference evaluation agrees."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 - an extra

    from tenfold_grafting.onnx_io import read_onnx, write_onnx  # noqa: PLC0415 - an extra

    model, shape = random_network(2, kind, grafted=True)
    if len(shape) == 3:
        model = torch.nn.Sequential(Normalise([0.1, 0.2], [0.5, 0.7]), model)
    graph = trace(model, shape)
    path = tmp_path / "network.onnx"
    write_onnx(graph, path)
    x = torch.rand(3, *shape).double()
    (reference,) = ReferenceEvaluator(onnx.load(str(path))).run(None, {"input": x.numpy()})
    np.testing.assert_allclose(reference, graph(x).numpy(), atol=1e-10)
    np.testing.assert_allclose(read_onnx(path)(x).numpy(), reference, atol=1e-10)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="no valid ONNX"):
        read_onnx(path)


ONNX_CASES: list[tuple] = [
    ("pad value", [("Pad", ["x", "p", "v"], "f", {})], {"p": [0, 0, 1, 1, 0, 0, 1, 1], "v": 1.5}, "around a map"),
    ("pad channels", [("Pad", ["x", "p"], "f", {})], {"p": [0, 1, 0, 0, 0, 1, 0, 0]}, "around a map"),
    ("pad negative", [("Pad", ["x", "p"], "f", {})], {"p": [0, 0, -1, 0, 0, 0, 0, 0]}, "around a map"),
    ("pool", [("AveragePool", ["x"], "f", {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"})], {}, "AveragePool"),
    ("add", [("GlobalAveragePool", ["x"], "a", {}), ("Add", ["x", "a"], "f", {})], {}, "of two shapes"),
    ("gemm", [("Flatten", ["x"], "f", {}), ("Gemm", ["f", "W", "f"], "g", {"transB": 1})], {}, "of several inputs"),
    ("rows", [("Mul", ["x", "c"], "f", {})], {"c": [1.0, 2.0, 3.0, 4.0]}, "operands that do not fit"),
    ("reshape", [("Reshape", ["x", "s"], "f", {})], {"s": [-1, 16]}, "operands that do not fit"),
    ("no output of logits", [("Mul", ["x", "c"], "y", {})], {"c": 2.0}, "vector of logits"),
    ("first", [("Identity", ["B0"], "B", {}), ("Mul", ["c", "x"], "f", {})], {"c": 2.0, "B0": [1.0, 2.0, 3.0]}, None),
]


@pytest.mark.parametrize(("name", "nodes", "constants", "message"), ONNX_CASES, ids=lambda value: str(value)[:12])
def test_onnx_of_others(name: str, nodes: list, constants: dict, message: str | None, tmp_path: Path) -> None:
    """What others write is the same function here, or refused; nothing in it is passed over."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 - an extra

    from tenfold_grafting.onnx_io import read_onnx  # noqa: PLC0415 - an extra

    helper, double = onnx.helper, onnx.TensorProto.DOUBLE
    weights = {"W": np.linspace(-1, 1, 96).reshape(3, 32), "B": np.zeros(3)} | {
        key: np.array(value, np.int64 if key in "ps" else np.float64) for key, value in constants.items()
    }
    if "B0" in constants:
        del weights["B"]
    made = [helper.make_node(kind, inputs, [output], **options) for kind, inputs, output, options in nodes]
    if made[-1].output[0] not in ("y", "g"):
        made.append(helper.make_node("Flatten", ["f"], ["g"]))
        made.append(helper.make_node("Gemm", ["g", "W", "B"], ["y"], transB=1))
    inputs = helper.make_tensor_value_info("x", double, ["batch", 2, 4, 4])
    outputs = helper.make_tensor_value_info(made[-1].output[0], double, ["batch", 3])
    initial = [onnx.numpy_helper.from_array(value, key) for key, value in weights.items()]
    model = helper.make_model(
        helper.make_graph(made, name, [inputs], [outputs], initial),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path = tmp_path / "other.onnx"
    path.write_bytes(model.SerializeToString())
    if message is not None:
        with pytest.raises(UserError, match=message):
            read_onnx(path)
        return
    x = np.random.default_rng(0).random((2, 2, 4, 4))
    (reference,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(read_onnx(path)(torch.from_numpy(x)).numpy(), reference, atol=1e-12)


def test_vnnlib_round_trip(tmp_path: Path) -> None:
    prop = ball(torch.rand(1, 2, 2), 1, 0.1, 4)
    prop.constant[0] = 0.25
    path = tmp_path / "p.vnnlib"
    write_vnnlib(prop, path, "a test")
    again = read_vnnlib(path, (1, 2, 2), 4)
    for name in ("lower", "upper", "rows", "constant"):
        torch.testing.assert_close(getattr(again, name), getattr(prop, name), rtol=0, atol=0)
    text = path.read_text()
    for change, message in (
        (text[: len(text) // 2], "truncated|parenthesis"),
        (text.replace("(declare-const Y_3 Real)\n", ""), "outputs"),
        (text.replace("(assert (>= X_0 ", "(assert (>= X_1 "), "without bounds"),
        (text.replace("<= Y_1 Y_2", "sin Y_1 Y_2"), "only and, or"),
        (text.replace("<= Y_1 Y_2", "<= Y_1"), "of 1 sides"),
        (text.replace("<= Y_1 Y_2", "<= Y_1 Y_2x"), "'Y_2x' where a number"),
        (text[: text.index("(assert (or")] + "(assert (or))", "nothing to verify"),
        (text + "(assert)", "about nothing"),
    ):
        path.write_text(change)
        with pytest.raises(UserError, match=message):
            read_vnnlib(path, (1, 2, 2), 4)


def test_arrays_and_networks_that_are_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 3), np.float32), y=np.zeros(2, np.int64))
    with pytest.raises(UserError, match="expected x uint8"):
        load_images(tmp_path / "x.npz")
    with pytest.raises(UserError, match="no readable network"):
        load_network(tmp_path / "x.npz")
    with pytest.raises(UserError, match="no images"):
        load_images(tmp_path / "none.npz")
    np.savez(tmp_path / "empty.npz", x=np.zeros((0, 1, 8, 8), np.uint8), y=np.zeros(0, np.int64))
    with pytest.raises(UserError, match="holds no images"):
        load_images(tmp_path / "empty.npz")
    meta = {"arch": [["linear", 3]], "classes": 2, "input_shape": [3], "mean": [0], "std": [1]}
    np.savez(tmp_path / "odd.npz", meta=np.array([json.dumps(meta)]))
    with pytest.raises(UserError, match="lacks its sizes"):
        load_network(tmp_path / "odd.npz")
    del meta["mean"]
    np.savez(tmp_path / "odd.npz", meta=np.array([json.dumps(meta)]))
    with pytest.raises(UserError, match=r"no readable network \('mean'\)"):
        load_network(tmp_path / "odd.npz")


def test_svhn_layout(tmp_path: Path) -> None:
    from scipy.io import savemat  # noqa: PLC0415

    for part in ("train", "test"):
        labels = np.arange(1, 11, dtype=np.uint8).repeat(600)[:, None]
        savemat(tmp_path / f"{part}_32x32.mat", {"X": np.zeros((32, 32, 3, 6000), np.uint8), "y": labels})
    data = load_data(DataConfig("svhn", root=tmp_path))
    assert data.train is not None
    assert data.validation is not None
    assert (len(data.train.labels), len(data.validation.labels), len(data.test.labels)) == (1000, 5000, 6000)
    assert int(data.test.labels.max()) == 9
    (tmp_path / "test_32x32.mat").write_bytes(b"short")
    with pytest.raises(UserError, match="truncated or corrupted"):
        load_data(DataConfig("svhn", root=tmp_path))
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="SVHN is not there"):
        load_data(DataConfig("svhn", root=tmp_path))
