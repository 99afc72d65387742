"""The physically smaller network against the masked one."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tenfold_bip import (
    UnsupportedOperationError,
    create_model,
    flops,
    prune_parametrize,
    shrink,
)
from tenfold_bip.shrink import ConstantMap

NETS = {
    "digits_cnn": (1, 8, 8),
    "resnet20s": (3, 16, 16),
    "resnet18": (3, 16, 16),
    "resnet50": (3, 16, 16),
    "ResNet18": (3, 64, 64),
    "vgg11_bn": (3, 32, 32),
    "vgg16": (3, 32, 32),
    "wrn_28_1": (3, 16, 16),
}


def trained(model: nn.Module) -> nn.Module:
    """Batch norm and biases as after training, so that zeroed filters emit non-zero constants."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.5)
            nn.init.normal_(module.running_mean, 0.0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return model


def agree(model: nn.Module, small: nn.Module, *inputs: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        for x in inputs:
            expected = model(x)
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-5 * scale)
    for module in small.modules():  # what a layer says of itself is what its weight is
        if isinstance(module, nn.Conv2d | nn.Linear):
            linear = isinstance(module, nn.Linear)
            own = (module.out_features, module.in_features) if linear else (module.out_channels, module.in_channels)
            assert own == module.weight.shape[:2]


@pytest.mark.parametrize("structure", ["filter", "channel"])
@pytest.mark.parametrize("name", NETS)
def test_the_papers_networks(name: str, structure: str) -> None:
    torch.manual_seed(1)
    model = prune_parametrize(trained(create_model(name)), 0.5, structure, scores_init="random")
    x = torch.randn(2, *NETS[name])
    small = shrink(model, x)
    agree(model, small, x, torch.randn(3, *NETS[name]))
    assert flops(small, x).dense < 0.55 * flops(model, x).dense


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("name", ["digits_cnn", "resnet20s"])
def test_all_ratios(name: str, keep: float) -> None:
    torch.manual_seed(2)
    model = prune_parametrize(trained(create_model(name)), keep, "filter", scores_init="random")
    x = torch.randn(2, *NETS[name])
    agree(model, shrink(model, x), x)


class Everything(nn.Module):
    """Operations and habits of foreign networks: biases, views with sizes, in-place additions, padding modes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.reflect = nn.Conv2d(12, 12, 3, padding=1, padding_mode="reflect")
        self.valid = nn.Conv2d(12, 12, 3, padding="valid")
        self.same = nn.Conv2d(12, 10, 3, padding="same")
        self.norm = nn.BatchNorm2d(12)
        self.average = nn.AvgPool2d(2, padding=1)
        self.hidden = nn.Linear(10 * 4 * 4, 14)
        self.norm1d = nn.BatchNorm1d(14)
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        y = self.reflect(x).sigmoid()
        y += x + 1.5
        y = F.max_pool2d(F.leaky_relu(self.norm(y)), 2)
        y = self.average(self.valid(y))
        y = F.dropout(self.same(y), training=self.training)
        y = y.view(y.size(0), -1)
        return self.head(torch.tanh(self.norm1d(self.hidden(y))))


@pytest.mark.parametrize("structure", ["filter", "channel"])
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_a_foreign_network(structure: str, keep: float) -> None:
    torch.manual_seed(3)
    model = prune_parametrize(trained(Everything()), keep, structure, scores_init="random").eval()
    x = torch.randn(2, 3, 16, 16)
    agree(model, shrink(model, x), x, torch.randn(5, 3, 16, 16))


def test_padded_constants_survive_at_the_border() -> None:
    """A zeroed filter with a bias, read by a padded convolution: dropping it would be wrong at the border only."""
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1))
    with torch.no_grad():
        model[0].weight[2:] = 0
        model[0].bias[2:] = torch.tensor([1.0, 2.0, -3.0, 0.5])
    x = torch.randn(1, 1, 6, 6)
    small = shrink(model, x)
    agree(model, small, x, torch.randn(3, 1, 9, 5))
    assert small.get_submodule("0").out_channels == 2  # those that vary; the constants are a map that is added
    assert isinstance(small.get_submodule("2"), ConstantMap)


def test_constants_fold_into_the_bias_of_a_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        model[0].weight[1:] = 0
    small = shrink(model, torch.randn(2, 4))
    agree(model, small, torch.randn(7, 4))
    assert small.get_submodule("0").out_features == 1
    assert small.get_submodule("2").bias is not None


def test_a_residual_branch_without_filters() -> None:
    torch.manual_seed(0)
    model = trained(create_model("resnet20s"))
    with torch.no_grad():
        model.layer2[1].conv2.weight.zero_()
        model.layer3[0].conv1.weight.zero_()
    x = torch.randn(2, 3, 16, 16)
    agree(model, shrink(model, x), x)


def test_the_original_stays_and_the_result_exports() -> None:
    model = prune_parametrize(trained(create_model("resnet20s")), 0.5, "filter")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    small = shrink(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    exported = torch.export.export(small, (x,), strict=False).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), small(x))


def test_the_result_can_be_fine_tuned() -> None:
    model = prune_parametrize(trained(create_model("digits_cnn")), 0.5, "filter")
    small = shrink(model, torch.randn(2, 1, 8, 8)).train()
    small(torch.randn(4, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


class Gated(nn.Module):
    """Multiplies two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


def test_operations_that_cannot_be_followed_are_named() -> None:
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(UnsupportedOperationError, match="mul"):
        shrink(Gated(), x[:, :3])
    with pytest.raises(UnsupportedOperationError, match=r"groups=4"):
        shrink(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), x)
    shared = nn.Conv2d(4, 4, 1)
    with pytest.raises(UnsupportedOperationError, match="more than once"):
        shrink(nn.Sequential(shared, nn.ReLU(), shared), x)
    with pytest.raises(UnsupportedOperationError, match="after flattening"):
        shrink(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.BatchNorm1d(144)), x)
