"""Parameter counts of the paper's architectures, all weights and prunable ones."""

import pytest
import torch
from torch import nn

from tenfold_bip import create_model, fix_masks, flops, flops_per_layer, model_names, prune_parametrize
from tenfold_bip.ledger import Ledger
from tenfold_bip.masking import kept_per_layer, prunable_weights

# architecture -> classes -> (parameters, prunable weights, those of convolutions)
COUNTS = {
    "resnet20s": {10: (269722, 268336, 267696), 100: (275572, 274096), 200: (282072, 280496)},
    "resnet32s": {10: (464154, 461872, 461232), 100: (470004, 467632), 200: (476504, 474032)},
    "resnet44s": {10: (658586, 655408, 654768), 100: (664436, 661168), 200: (670936, 667568)},
    "resnet56s": {10: (853018, 848944, 848304), 100: (858868, 854704), 200: (865368, 861104)},
    "resnet18": {10: (11173962, 11164352, 11159232), 100: (11220132, 11210432), 200: (11271432, 11261632)},
    "resnet34": {10: (21282122, 21265088), 100: (21328292, 21311168), 200: (21379592, 21362368)},
    "resnet50": {10: (23520842, 23467712), 100: (23705252, 23652032), 200: (23910152, 23856832)},
    "ResNet18": {200: (11279112, 11269312), 1000: (11689512, 11678912)},
    "ResNet34": {200: (21387272,), 1000: (21797672, 21779648)},
    "ResNet50": {200: (23917832,), 1000: (25557032, 25502912)},
    "vgg11_bn": {10: (9816138, 9810112), 100: (9839268, 9833152), 200: (9864968, 9858752)},
    "vgg16_bn": {10: (15311818, 15302848), 100: (15334948, 15325888), 200: (15360648, 15351488)},
    "vgg16": {10: (15303370, 15302848), 100: (15326500,)},
    "wrn_28_1": {10: (388186, 386096)},
    "wrn_28_4": {10: (6118266, 6110128)},
    "wrn_28_10": {10: (38119866, 38099632)},
    "wrn_40_2": {10: (2350778, 2344624)},
    "digits_cnn": {10: (14458, 14288)},
}
CASES = [(name, classes, counts) for name, table in COUNTS.items() for classes, counts in table.items()]


def test_every_architecture_is_counted() -> None:
    assert set(COUNTS) == set(model_names())


@pytest.mark.parametrize(("name", "classes", "counts"), CASES)
def test_counts(name: str, classes: int, counts: tuple[int, ...]) -> None:
    options = {"legacy_sub_block": True} if name.startswith("wrn") else {}
    with torch.device("meta"):
        model = create_model(name, classes, **options)
    numbers = [sum(p.numel() for p in model.parameters())]
    numbers += [sum(getattr(m, a).numel() for _, m, a in prunable_weights(model, only)) for only in (False, True)]
    assert tuple(numbers[: len(counts)]) == counts


def test_the_unused_block_is_absent_by_default() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model("wrn_28_1").parameters()) == 369498


@pytest.mark.parametrize("name", ["resnet20s", "resnet18", "vgg11_bn", "vgg16", "wrn_28_1"])
@pytest.mark.parametrize("size", [32, 64])
def test_pictures_of_both_sizes(name: str, size: int) -> None:
    assert create_model(name, 20)(torch.randn(2, 3, size, size)).shape == (2, 20)


def test_initialisation() -> None:
    torch.manual_seed(0)
    small, big = create_model("resnet56s"), create_model("vgg16_bn")
    weight = small.layer3[4].conv1.weight
    assert float(weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)
    assert float(big.classifier[0].weight.std()) == pytest.approx(0.01, rel=0.03)
    assert (big.classifier[0].bias == 0).all()
    wide = create_model("wrn_28_4").block3.layer[1].conv1.weight
    assert float(wide.std()) == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.03)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="did you mean 'resnet20s'"):
        create_model("resnet20")
    with pytest.raises(ValueError, match="at least 2 classes"):
        create_model("resnet20s", 1)


def test_flops_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(64, 5))
    example = torch.randn(6, 3, 8, 8)
    layers = flops_per_layer(model, example)
    assert layers["0.weight"].dense == 2 * 4 * 3 * 9 * 16
    assert layers["2.weight"].dense == 2 * 64 * 5
    prune_parametrize(model, 0.25, "layer")
    for name, (kept, total) in kept_per_layer(model).items():
        layer = flops_per_layer(model, example)[name]
        assert layer.sparse * total == layer.dense * kept
        assert layer.dense == layers[name].dense
    assert flops(model, example).dense == sum(layer.dense for layer in layers.values())


def test_flops_of_attention_and_without_side_effects() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    layers = flops_per_layer(model, torch.randn(2, 3, 8))
    assert layers["self_attn.in_proj_weight"].dense == 2 * 3 * 24 * 8
    assert layers["linear1.weight"].dense == 2 * 3 * 16 * 8
    assert layers["self_attn.out_proj.weight"].dense == 2 * 3 * 8 * 8
    model = create_model("resnet20s").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert flops(model, torch.randn(1, 3, 32, 32)).dense == pytest.approx(81.1e6, rel=0.01)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_flops_of_fixed_masks_and_ledger() -> None:
    model = fix_masks(nn.Sequential(nn.Linear(4, 4)), {"0.weight": torch.eye(4)})
    assert flops(model, torch.randn(1, 4)) == (32, 8)
    ledger = Ledger()
    ledger.count(samples=64, passes=2)
    ledger.count(samples=32)
    assert (ledger.passes, ledger.samples, ledger.training_flops(10)) == (3, 160, 4800)
