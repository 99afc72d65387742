"""The controls against slow references of their own."""

import itertools

import pytest
import torch
from torch import nn

import tenfold_nid as nid
from tenfold_nid import evaluate
from tenfold_nid.baselines import linear
from tenfold_nid.baselines.networks import (
    AutoDecoder,
    NetworkBatch,
    adapt,
    fit_latents,
    fit_networks,
    maml_step,
    reptile_step,
)
from tenfold_nid.recipe import Recipe

CONFIG = nid.NetworkConfig(hidden_dim=6, num_layers=3, pos_emb="Id", act_type="sine")


def data(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return nid.lattice((4, 4), dtype=torch.float64), torch.rand(batch, 16, 3, dtype=torch.float64)


@pytest.mark.parametrize("masked", [False, True])
def test_batched_networks_train_as_if_alone(masked: bool) -> None:
    coords, targets = data()
    weights = (torch.rand(3, 16) < 0.6).double() if masked else None
    batch = NetworkBatch(CONFIG, 3).double()
    alone = [batch.single(i).train() for i in range(3)]
    for _ in itertools.islice(fit_networks(batch, coords, targets, weights, lr=1e-2), 6):
        pass
    for i, net in enumerate(alone):
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        rows = torch.ones(16, dtype=torch.bool) if weights is None else weights[i] > 0
        for _ in range(5):
            optimizer.zero_grad()
            (net(coords[rows]) - targets[i, rows]).square().mean().backward()
            optimizer.step()
        assert torch.allclose(net(coords), batch(coords)[i], rtol=1e-8, atol=1e-10)


def test_maml_differentiates_through_the_inner_steps() -> None:
    coords, targets = data(2)
    start = NetworkBatch(CONFIG, 1).double()
    net = start.single(0).train()
    names = [n for n, _ in net.named_parameters()]

    def outer(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for target in targets:
            moved = parameters
            for _ in range(2):
                inner = (torch.func.functional_call(net, moved, (coords,)) - target).square().mean()
                gradients = torch.autograd.grad(inner, list(moved.values()), create_graph=True)
                moved = {n: p - 0.1 * g for (n, p), g in zip(moved.items(), gradients, strict=True)}
            total = total + (torch.func.functional_call(net, moved, (coords,)) - target).square().mean()
        return total / len(targets)

    expected = torch.autograd.grad(outer(dict(net.named_parameters())), list(net.parameters()))
    optimizer = torch.optim.SGD(start.parameters(), lr=0.0)
    loss = maml_step(start, optimizer, coords, targets, inner_steps=2, inner_lr=0.1)
    assert float(loss) == pytest.approx(float(outer(dict(net.named_parameters())).detach()))
    for name, gradient in zip(names, expected, strict=True):
        layer, kind = int(name.split(".")[2]), name.rsplit(".", 1)[1]
        mine = start.weights[layer].grad if kind == "weight" else start.biases[layer].grad
        assert torch.allclose(mine[0], gradient, rtol=1e-8, atol=1e-12)


def test_reptile_moves_towards_the_adapted_networks() -> None:
    coords, targets = data(4)
    start = NetworkBatch(CONFIG, 1).double()
    before = [p.detach().clone() for p in start.parameters()]
    moved = adapt(start, start.map(coords), targets, steps=3, lr=0.05, second_order=False)
    length = reptile_step(start, coords, targets, inner_steps=3, inner_lr=0.05, rate=0.25)
    way = [
        target.mean(0, keepdim=True) - old for old, target in zip(before, [*moved.weights, *moved.biases], strict=True)
    ]
    assert float(length) == pytest.approx(float(sum(w.detach().square().sum() for w in way)))
    for old, new, target in zip(before, start.parameters(), [*moved.weights, *moved.biases], strict=True):
        assert torch.allclose(new, old + 0.25 * (target.mean(0, keepdim=True) - old), rtol=1e-10)


def test_a_learned_start_beats_a_random_one() -> None:
    torch.manual_seed(0)
    coords = nid.lattice((8, 8))
    angle = torch.rand(60, 1) * 0.8
    signals = torch.sin(3 * coords[:, 0] + angle)[..., None] * 0.5 + 0.5
    config = nid.NetworkConfig(hidden_dim=32, out_dim=1, num_layers=3, pos_emb="Id", act_type="sine")
    start = NetworkBatch(config, 1)
    optimizer = torch.optim.Adam(start.parameters(), lr=1e-3)
    for step in range(80):
        maml_step(start, optimizer, coords, signals[(step * 8) % 48 :][:8])

    def error(networks: NetworkBatch) -> float:
        for _ in itertools.islice(fit_networks(networks, coords, signals[50:], lr=1e-2, optimiser="sgd"), 3):
            pass
        return float((networks(coords) - signals[50:]).square().mean().detach())

    assert error(start.repeated(10)) < 0.5 * error(NetworkBatch(config, 10))


def test_an_auto_decoder_fits_latents_with_the_decoder_frozen() -> None:
    torch.manual_seed(0)
    decoder = AutoDecoder(nid.NetworkConfig(hidden_dim=16, ffm_map_size=16, ffm_map_scale=1.0), 4, 5)
    coords, ids = nid.lattice((5, 5)), torch.arange(5)
    assert decoder(ids, coords).shape == (5, 25, 3)
    with torch.no_grad():
        decoder.network.net.net[0][0].weight[:, -4:] *= 5  # an untrained decoder hardly listens to its latent vector
    truth = decoder.decode(0.5 * torch.randn(3, 4), coords).detach()
    before = [p.clone() for p in decoder.parameters()]

    def error(latent: torch.Tensor) -> float:
        return float((decoder.decode(latent, coords) - truth).square().mean().detach())

    fitting = fit_latents(decoder, coords, truth, lr=0.05, prior=0.0)
    latent = next(itertools.islice(fitting, 150, None))
    assert error(latent) < 0.2 * error(torch.zeros(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(before, decoder.parameters(), strict=True))


@pytest.mark.parametrize("limit", [10, 1 << 16])
def test_a_large_lattice_is_computed_where_it_is_observed(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(evaluate, "RENDERED", limit)
    decoder = AutoDecoder(nid.NetworkConfig(hidden_dim=8, ffm_map_size=8, ffm_map_scale=1.0), 3, 5)
    images = torch.rand(2, 5, 5, 3)
    mask = nid.observe_fraction(2, 25, 0.4, torch.Generator().manual_seed(0)).view(2, 5, 5)
    observed = evaluate.Observed(images, images, mask, None, None, None)
    recipe = Recipe(method="latent", fit=nid.FitOptions(lr=0.1))
    *_, (step, _, preds) = evaluate.reconstructions(decoder, recipe, observed, (0, 4))
    coords, weights = nid.lattice((5, 5)), mask.flatten(1).float()
    latent = next(itertools.islice(fit_latents(decoder, coords, images.flatten(1, 2), weights, lr=0.1), 4, None))
    assert step == 4
    assert torch.allclose(preds.flatten(1, 2), decoder.decode(latent, coords), atol=1e-5)


def test_principal_components_are_optimal_and_masked_fits_work() -> None:
    torch.manual_seed(0)
    signals = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 30, dtype=torch.float64) + 2
    model = linear.pca(signals, 6)
    assert torch.allclose(model.atoms.T @ model.atoms, torch.eye(6, dtype=torch.float64), atol=1e-10)
    images = signals[:4].unflatten(1, (10, 3))
    mask = torch.rand(4, 10) < 0.7
    mask[:, :3] = True
    for seen in (None, mask):
        code = nid.ridge(model.system(images, seen), penalty=1e-12)
        assert torch.allclose(model.render(code, 3), images, atol=1e-6)
    values = torch.linalg.svdvals(signals - signals.mean(0))
    coarse = linear.pca(signals, 3)
    code = nid.ridge(coarse.system(signals.unflatten(1, (10, 3))), penalty=1e-13)
    left = (coarse.render(code, 3).flatten(1) - signals).square().sum()
    assert float(left) == pytest.approx(float(values[3:].square().sum()), rel=1e-6)
    with pytest.raises(ValueError, match="at most 30"):
        linear.pca(signals, 31)


def test_ksvd_lowers_the_error_of_its_start() -> None:
    torch.manual_seed(0)
    atoms = nn.functional.normalize(torch.randn(30, 12, dtype=torch.float64), dim=0)
    codes = torch.randn(200, 12, dtype=torch.float64) * (torch.rand(200, 12) < 0.2)
    signals = codes @ atoms.T

    def error(model: linear.LinearDictionary) -> float:
        code, _ = nid.omp(model.system(signals.unflatten(1, (10, 3))), 4)
        return float((model.render(code, 3).flatten(1) - signals).square().mean())

    start, learned = linear.ksvd(signals, 12, 4, iterations=0), linear.ksvd(signals, 12, 4, iterations=12)
    assert error(learned) < 0.3 * error(start)
    assert torch.allclose(learned.atoms.norm(dim=0), torch.ones(12, dtype=torch.float64))
    with pytest.raises(ValueError, match="cannot be learned"):
        linear.ksvd(signals[:5], 12, 4)
