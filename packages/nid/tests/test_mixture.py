"""Gating, losses and the evaluation of mixtures against obvious references."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tenfold_nid as nid
from tenfold_nid import train
from tenfold_nid.coordinates import FourierFeatures, PositionalEncoding, RadialBasis
from tenfold_nid.experts import IndependentExperts, SharedTrunkExperts
from tenfold_nid.gates import CodebookGate
from tenfold_nid.gating import dense_gates, noisy_load
from tenfold_nid.plan import Plan
from tenfold_nid.recipe import Recipe, Schedule


def small(**fields: object) -> nid.DictionaryConfig:
    base: dict = {
        "num_experts": 20,
        "num_topk": 5,
        "hidden_dim": 12,
        "ffm_map_size": 10,
        "ffm_map_scale": 2.0,
        "gate": "codebook",
        "num_signals": 6,
        "size": (8, 8),
    }
    return nid.DictionaryConfig(**{**base, **fields})


def by_loops(experts: nn.Module, coords: Tensor, gates: Tensor, bias: Tensor) -> Tensor:
    """f_s(x) written with three nested loops over single atoms."""
    values = experts.atoms(experts.features(coords))
    rows = []
    for s in range(len(gates)):
        total = bias[s].expand(len(coords), -1)
        for i in range(gates.shape[1]):
            total = total + gates[s, i] * values[:, i]
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("per_signal", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("act", ["relu", "sine"])
def test_every_route_gives_the_same_values_and_gradients(per_signal: bool, sparse: bool, act: str) -> None:
    experts = SharedTrunkExperts(
        nid.NetworkConfig(hidden_dim=12, ffm_map_size=10, ffm_map_scale=2.0, act_type=act), 20
    ).double()
    code = torch.randn(4, 20, dtype=torch.float64)
    coords = torch.rand(*([4] if per_signal else []), 7, 2, dtype=torch.float64)
    outcomes = {}
    for route in ("dense", "merge", "bag") if sparse else ("dense", "merge"):
        logits, bias = code.clone().requires_grad_(), torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
        where = coords.clone().requires_grad_()
        gates = nid.top_k_gates(logits, 5) if sparse else dense_gates(logits)
        experts.zero_grad()
        value = experts.mix(experts.features(where), gates, bias, route)
        value.pow(3).sum().backward()
        outcomes[route] = [value, logits.grad, bias.grad, where.grad, *[p.grad for p in experts.parameters()]]
    for route, found in outcomes.items():
        for expected, got in zip(outcomes["dense"], found, strict=True):
            assert torch.allclose(expected, got, rtol=1e-12, atol=1e-12 * float(expected.detach().abs().max())), route
    if not per_signal:
        gates = nid.top_k_gates(code, 5) if sparse else dense_gates(code)
        reference = by_loops(experts, coords, gates.dense, torch.ones(4, 3, dtype=torch.float64))
        assert torch.allclose(outcomes["merge"][0], reference, rtol=1e-12, atol=1e-12)


def test_all_routes_run_in_half_precision() -> None:
    experts = SharedTrunkExperts(nid.NetworkConfig(hidden_dim=12, ffm_map_size=10, ffm_map_scale=2.0), 20)
    gates, coords = nid.top_k_gates(torch.randn(4, 20), 5), torch.rand(7, 2)
    with torch.no_grad():
        expected = experts.mix(experts.features(coords), gates, torch.zeros(4, 3), "dense")
        half = gates._replace(dense=gates.dense.bfloat16(), value=gates.value.bfloat16())
        for route in ("dense", "merge", "bag"):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = experts.mix(experts.features(coords), half, torch.zeros(4, 3), route)
            assert torch.allclose(found.float(), expected, atol=0.05 * float(expected.abs().max())), route


def test_independent_experts_are_separate_networks() -> None:
    config = nid.NetworkConfig(hidden_dim=6, ffm_map_size=8, ffm_map_scale=1.0, num_layers=3, act_type="sine")
    experts = IndependentExperts(config, 9).double()
    coords = torch.rand(11, 2, dtype=torch.float64)
    alone = []
    for i in range(9):
        net = nid.CoordinateNetwork(config).double()
        net.map.load_state_dict(experts.map.state_dict())
        with torch.no_grad():
            for layer, weight, bias in zip(net.net.net, experts.weights, experts.biases, strict=True):
                layer[0].weight.copy_(weight[i])
                layer[0].bias.copy_(bias[i])
        alone.append(net(coords))
    together = experts.atoms(experts.features(coords))
    assert torch.allclose(together, torch.stack(alone, dim=1), rtol=1e-12)
    gates = nid.top_k_gates(torch.randn(3, 9, dtype=torch.float64), 2)
    bias = torch.randn(3, 3, dtype=torch.float64)
    mixed = experts.mix(experts.features(coords), gates, bias)
    assert torch.allclose(mixed, by_loops(experts, coords, gates.dense, bias), rtol=1e-12)
    with pytest.raises(ValueError, match="share no trunk"):
        experts.mix(experts.features(coords), gates, bias, "merge")


def test_the_cheapest_route_follows_the_counts() -> None:
    sizes = {"experts": 1024, "active": 128, "hidden": 256, "channels": 3, "training": True}
    assert nid.cheapest_route(batch=16, points=1024, **sizes) == "merge"
    assert nid.cheapest_route(batch=4096, points=16, **{**sizes, "experts": 64, "active": 8}) == "dense"
    assert nid.cheapest_route(batch=16, points=1024, **{**sizes, "active": 16, "training": False}) == "bag"


@given(
    logits=st.integers(1, 4).flatmap(
        lambda b: st.lists(
            st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=7, max_size=7), min_size=b, max_size=b
        )
    ),
    k=st.integers(1, 7),
)
@settings(max_examples=60, deadline=None)
def test_top_k_keeps_the_largest_magnitudes_with_their_sign(logits: list[list[float]], k: int) -> None:
    raw = torch.tensor(logits, dtype=torch.float64)
    gates = nid.top_k_gates(raw, k)
    for row, kept in zip(raw, gates.dense, strict=True):
        chosen = kept != 0
        assert int(chosen.sum()) <= k
        assert torch.equal(kept[chosen], row[chosen])
        smallest = row.abs().sort(descending=True).values[k - 1]
        assert bool((row.abs()[~chosen] <= smallest).all())
    assert torch.equal(nid.load(gates), (gates.dense != 0).sum(0))
    assert bool((nid.load(gates, "official") <= nid.load(gates)).all())


def test_the_noisy_load_is_the_probability_of_being_chosen_again() -> None:
    torch.manual_seed(1)
    clean = torch.randn(1, 6, dtype=torch.float64)
    sigma = torch.rand(1, 6, dtype=torch.float64) + 0.3
    noisy = clean + sigma * torch.randn(1, 6, dtype=torch.float64)
    draws = 200_000
    expected = []
    for i in range(6):
        others = noisy[0].abs().clone()
        others[i] = -1
        threshold = others.topk(2).values[-1]  # k = 2: the second largest of the others has to be beaten
        again = clean[0, i] + sigma[0, i] * torch.randn(draws, dtype=torch.float64)
        expected.append((again.abs() > threshold).double().mean())
    found = noisy_load(clean, noisy, sigma, 2)
    assert torch.allclose(found, torch.stack(expected), atol=5 * 0.5 / math.sqrt(draws))


def test_balance_stays_finite_in_the_default_mode_where_the_signed_sum_explodes() -> None:
    torch.manual_seed(0)
    gates = nid.top_k_gates(torch.randn(64, 256), 64)
    centred = gates._replace(dense=gates.dense - gates.dense.mean())
    assert float(nid.cv_squared(nid.importance(centred, "signed"))) > 1e3
    assert float(nid.cv_squared(nid.importance(centred))) < 10


def test_one_element_does_not_vary() -> None:
    assert float(nid.cv_squared(torch.tensor([3.0]))) == 0


def test_exponential_weights_are_capped() -> None:
    weights = nid.l1_weights(200, 0.5)
    assert bool(weights.isfinite().all())
    assert weights[:4].tolist() == [1, 2, 4, 8]
    assert float(weights[-1]) == 1e6
    with pytest.raises(ValueError, match="overflow"):
        nid.l1_weights(200, 0.5, cap=math.inf)
    model = nid.NeuralDictionary(small(num_experts=200))
    coords = nid.lattice((4, 4))
    losses = nid.objective(model(torch.arange(6), coords, dense=True), torch.zeros(6, 16, 3), nid.Objective(l1_exp=0.5))
    assert bool(losses.total.isfinite())


def test_the_dense_phase_counts_epochs_from_zero() -> None:
    assert not nid.is_dense(0, 0)
    assert nid.is_dense(0, 0, official=True)
    assert [nid.is_dense(e, 2) for e in range(4)] == [True, True, False, False]
    assert [nid.is_dense(e, 2, official=True) for e in range(4)] == [True, True, True, False]


def test_the_codebook_rescales_only_the_rows_it_looks_up() -> None:
    gate = CodebookGate(5, 8)
    before = gate.codebook.weight.detach().clone() * 3
    with torch.no_grad():
        gate.codebook.weight.copy_(before)
    code = gate(torch.tensor([1, 3]))
    after = gate.codebook.weight.detach()
    norms = before.norm(dim=1)
    for row in range(5):
        expected = before[row] / norms[row] if row in {1, 3} and norms[row] > 1 else before[row]
        assert torch.allclose(after[row], expected, rtol=1e-5)
    assert bool((code.norm(dim=1) <= 1 + 1e-5).all())


def test_processes_rescale_the_rows_of_the_whole_batch_in_every_codebook() -> None:
    model = nid.NeuralDictionary(small(noise=True)).train()
    before = {name: 3 * value for name, value in model.state_dict().items()}
    model.load_state_dict(before)
    ranks = [copy.deepcopy(model), copy.deepcopy(model)]
    for rank, own in zip(ranks, ([0, 1], [2, 3]), strict=True):
        train.look_up(rank, torch.tensor([0, 1, 2, 3]))
        rank(torch.tensor(own), torch.rand(5, 2))
    tables = [rank.state_dict() for rank in ranks]
    for name in ("gate_generator.codebook.weight", "noise_generator.codebook.weight"):
        assert torch.allclose(tables[0][name], tables[1][name], rtol=1e-6), name
        assert float(tables[0][name][:4].norm(dim=1).max()) <= 1 + 1e-5
        assert torch.equal(tables[0][name][4:], before[name][4:])


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (lambda: nid.NeuralDictionary(nid.celeba_config()), 22_405_636),
        (lambda: nid.NeuralDictionary(nid.celeba_config(128)), 22_421_764),
        (lambda: nid.NeuralDictionary(nid.DictionaryConfig(out_dim=1)), 3_352_321),
        (
            lambda: nid.NeuralDictionary(
                nid.DictionaryConfig(in_dim=3, out_dim=1, gate="codebook", num_signals=100, size=(128,) * 3)
            ),
            1_546_084,
        ),
        (lambda: nid.ffm(2, 3), 1_181_187),
        (lambda: nid.ffm(2, 1), 1_180_673),
        (lambda: nid.ffm(3, 1), 1_180_673),
        (lambda: nid.siren(2, 3), 133_123),
        (lambda: nid.siren(2, 1), 132_609),
        (lambda: nid.siren(3, 1), 132_865),
        (lambda: nid.pe_mlp(2, 3), 143_363),
        (lambda: nid.pe_mlp(3, 1), 148_225),
    ],
)
def test_parameter_counts_at_full_size(model, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in model().parameters()) == count


def test_the_parts_of_the_celeba_model() -> None:
    with torch.device("meta"):
        model = nid.NeuralDictionary(nid.celeba_config())
    assert sum(p.numel() for p in model.experts.parameters()) == 7_878_144
    assert sum(p.numel() for p in model.gate_generator.parameters()) == 14_527_492
    assert model.experts.map.B.numel() == 2_048
    assert sum(p.numel() for p in model.gate_generator.convs.parameters()) == 13_474_049


def test_initial_weights_stay_within_their_bounds() -> None:
    net = nid.CoordinateNetwork(nid.NetworkConfig(hidden_dim=64, pos_emb="Id", act_type="sine"))
    bounds = [1 / 2] + [math.sqrt(6 / 64) / 30] * 3
    for layer, bound in zip(net.net.net, bounds, strict=True):
        largest = float(layer[0].weight.detach().abs().max())
        assert 0.8 * bound < largest <= bound * (1 + 1e-6)
    net = nid.CoordinateNetwork(nid.NetworkConfig(hidden_dim=64, ffm_map_size=100))
    for layer in net.net.net:
        bound = 1 / math.sqrt(layer[0].in_features)
        assert 0.8 * bound < float(layer[0].weight.detach().abs().max()) <= bound * (1 + 1e-6)


def test_embeddings_against_their_formulae() -> None:
    x = torch.rand(5, 2, dtype=torch.float64)
    fourier = FourierFeatures(2, 6, 3.0).double()
    expected = [[math.sin(float(b @ p)) for b in fourier.B] + [math.cos(float(b @ p)) for b in fourier.B] for p in x]
    assert torch.allclose(fourier(x), torch.tensor(expected, dtype=torch.float64))
    octaves = PositionalEncoding(2, 3).double()
    expected = [
        [*p.tolist()] + [f(2**i * math.pi * float(c)) for i in range(3) for c in p for f in (math.sin, math.cos)]
        for p in x
    ]
    assert torch.allclose(octaves(x), torch.tensor(expected, dtype=torch.float64))
    radial = RadialBasis(2, 4).double()
    expected = [[math.exp(-((10 * float((p - c).norm())) ** 2)) for c in radial.centres.detach()] for p in x]
    assert torch.allclose(radial(x), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("gate", "atoms"),
    [("resnet", "shared")]
    + [(g, a) for g in ("conv", "strided", "linear", "codebook") for a in ("shared", "independent")],
)
def test_every_gate_trains_with_every_kind_of_atoms(gate: str, atoms: str) -> None:
    torch.manual_seed(0)
    model = nid.NeuralDictionary(small(gate=gate, atoms=atoms, gate_hidden=8))
    images = torch.rand(6, 8, 8, 3)
    signal = torch.arange(6) if gate == "codebook" else images
    optimizer = nid.adam(list(model.parameters()), lr=1e-3)
    coords = nid.lattice((8, 8))
    settings_ = nid.Objective(loss_cv=1e-4)
    losses = [
        float(nid.training_step(model, optimizer, signal, coords, images.flatten(1, 2), settings_, dense=e < 2).data)
        for e in range(4 if gate == "resnet" else 12)
    ]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("places", ["embedded", "antipodal"])
def test_a_kept_embedding_changes_nothing(places: str) -> None:
    coords = nid.lattice((6, 4), dtype=torch.float64)
    coords = torch.cat([coords[:12], -coords[:12]])
    outcomes = []
    for kind in ("points", places):
        torch.manual_seed(0)
        model = nid.NeuralDictionary(small()).double()
        where = {"points": coords, "embedded": model.experts.map(coords), "antipodal": model.experts.map(coords[:12])}
        preds = nid.Sampled(model, kind)(torch.arange(6), where[kind]).preds
        preds.pow(3).sum().backward()
        outcomes.append([preds, *[p.grad for p in model.parameters()]])
    for expected, found in zip(*outcomes, strict=True):
        assert torch.allclose(expected, found, rtol=1e-12, atol=1e-12 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("size", [(6, 4), (1, 4), (5, 5)])
def test_a_plan_samples_the_signals_where_their_targets_lie(size: tuple[int, int]) -> None:
    model = nid.NeuralDictionary(small(gate="conv", gate_hidden=4))
    signals = nid.lattice(size).view(1, *size, 2).repeat(2, 1, 1, 2)[..., :3]  # their own coordinates are their values
    plan = Plan(Recipe(schedule=Schedule(chunk_size=100)), signals, model, seed=0)
    batch = plan[0]
    found = nid.Sampled(model, plan.places)(batch.signal, batch.where).preds
    expected = model(batch.signal, batch.targets[0, :, :2]).preds
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("antipodal", [False, True])
def test_chunks_visit_every_coordinate_once(antipodal: bool) -> None:
    chunks = nid.coordinate_chunks(20, 6, torch.Generator().manual_seed(0), antipodal=antipodal)
    assert torch.cat(chunks).sort().values.tolist() == list(range(20))
    assert [len(c) for c in chunks] == [6, 6, 6, 2]
    if antipodal:
        coords = nid.lattice((5, 4))
        assert all(torch.allclose(coords[c[: len(c) // 2]], -coords[c[len(c) // 2 :]], atol=1e-6) for c in chunks)


def test_training_in_bfloat16_autocast_follows_float32() -> None:
    torch.manual_seed(0)
    model = nid.NeuralDictionary(small(gate="conv", gate_hidden=8))
    images, coords = torch.rand(3, 8, 8, 3), nid.lattice((8, 8))
    full = model(images, coords).preds
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(images, coords).preds
    assert torch.allclose(full, half.float(), atol=0.05 * float(full.detach().abs().max()) + 0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_topk": 21}, "num_topk must lie in 1..num_experts"),
        ({"num_signals": 0}, "needs num_signals"),
        ({"gate": "resnet", "size": (8, 6)}, "square"),
        ({"num_layers": 1}, "num_layers must be at least 2"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"pos_emb": "pe", "num_freqs": -1}, "num_freqs must not be negative"),
        ({"gate": "conv", "gate_layers": 0}, "at least 1 layer"),
        ({"gate": "conv", "in_dim": 3}, "codebook gate"),
    ],
)
def test_configurations_that_cannot_be_built_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nid.NeuralDictionary(small(**fields))


def test_wrong_sizes_are_named() -> None:
    model = nid.NeuralDictionary(small(gate="resnet"))
    with pytest.raises(ValueError, match="8×8 pixels, got 10×10"):
        model.code(torch.rand(1, 10, 10, 3))
    with pytest.raises(ValueError, match="3 channels, got 1"):
        model.code(torch.rand(1, 8, 8, 1))
    with pytest.raises(ValueError, match="23 numbers"):
        model.render(torch.zeros(1, 21), nid.lattice((4, 4)))


def test_rendering_in_chunks_changes_nothing() -> None:
    model = nid.NeuralDictionary(small()).double()
    code, coords = torch.randn(2, 23, dtype=torch.float64), nid.lattice((9, 9), dtype=torch.float64)
    whole = model.render(code, coords)
    assert torch.allclose(whole, model.render(code, coords, chunk=7), rtol=1e-12)
    through_design = (code @ model.design(coords).T).view(2, 81, 3)
    assert torch.allclose(whole, through_design, rtol=1e-10)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *(t.untyped_storage().nbytes() // t.element_size() for t in made)])
        return found


@pytest.mark.parametrize("dense", [False, True])
def test_no_step_makes_a_message_for_every_signal_and_active_atom(dense: bool) -> None:
    with torch.device("meta"):  # shapes alone: the whole CelebA configuration, with a batch of four images' patches
        model = nid.NeuralDictionary(nid.celeba_config())
        images = torch.rand(256, 16, 16, 3)
    coords = nid.lattice((16, 16)).to("meta")
    with Largest() as seen:
        losses = nid.objective(model(images, coords, dense=dense), images.flatten(1, 2), nid.Objective())
        losses.total.backward()
    assert all(p.grad is not None for p in model.parameters())
    messages = 256 * model.config.num_topk * len(coords) * 3
    assert seen.numbers <= messages // 3  # the gate's own convolutions, 256 channels at every pixel, are the largest
    with Largest() as seen:
        torch.rand(256 * model.config.num_topk, len(coords) * 3, device="meta")
    assert seen.numbers == messages
