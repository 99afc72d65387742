"""How the command behaves: the suite that every package runs."""

from tenfold_shared.testing import Conformance

SMALL = ["--optim.batch_rays", "32", "--coarse", "6", "--fine", "4", "--data.views", "2", "--model.width", "16"]


class TestConformance(Conformance):
    """Aug-NeRF on the tiny blocks."""

    package = "tenfold_augnerf"
    train = ["--config", "blocks-tiny", *SMALL, "--optim.steps", "120", "--optim.lr", "2e-5", "--attack.warmup", "0"]
    reproduce = ["smoke", "--seeds", "2"]
    needs_data = ["--config", "llff-fern"]
