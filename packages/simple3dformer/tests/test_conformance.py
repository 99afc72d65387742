"""How the command behaves: the suite that every package runs."""

from tenfold_shared.testing import Conformance


class TestConformance(Conformance):
    """Voxel classification of generated shapes."""

    package = "tenfold_simple3dformer"
    # SGD: the gradient of the keys' biases is zero but for rounding, which Adam would blow up to whole steps.
    train = ["--config", "procshapes-mini", "--steps", "80", "--data.train_size", "20", "--data.test_size", "20", "--optim.name", "sgd"]  # fmt: skip
    reproduce = ["mini-silhouette", "--arms", "projection", "--seeds", "1"]
    needs_data = ["--config", "modelnet40-projection-small"]
    eval_options = ["--data.train_size", "20", "--data.test_size", "20", "--device", "cpu"]
