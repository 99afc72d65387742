"""The method's parts against slow, obvious references."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold_hypergcl import augment, contrast, generative, steps
from tenfold_hypergcl.hypergraph import Hypergraph, disjoint_union
from tenfold_hypergcl.mlp import MLP, dropout, normalized_linear
from tenfold_hypergcl.products import multiply
from tenfold_hypergcl.propagate import SparseFeatures, sum_members
from tenfold_hypergcl.rowwise import draw_kept, layer, thinned, threshold
from tenfold_hypergcl.setgnn import EncoderConfig, SetGNN

DENSE, ATTENTION = EncoderConfig(hidden=8, dropout=0.0), EncoderConfig(hidden=8, dropout=0.0, attention=True, heads=2)


def random_hypergraph(nodes=13, hyperedges=9, memberships=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randperm(nodes * hyperedges, generator=generator)[:memberships]
    incidence = torch.stack([keys // hyperedges, keys % hyperedges])
    return Hypergraph.from_incidence(incidence, nodes, hyperedges).with_singletons()


def dense_incidence(h):
    matrix = torch.zeros(h.num_nodes, h.num_hyperedges, dtype=torch.float64)
    matrix[h.incidence[0], h.incidence[1]] = 1
    return matrix


@pytest.fixture
def h():
    return random_hypergraph()


@pytest.fixture
def x():
    return torch.randn(13, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return SetGNN(6, 3, config, projection=5).double().eval()


def test_sums_and_their_gradients_are_those_of_the_dense_product(h):
    torch.manual_seed(0)
    items = torch.randn(13, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(h.num_memberships, dtype=torch.float64, requires_grad=True)

    def ours(items, weight):
        return sum_members(items, h.by_hyperedge, h.by_node, weight)

    dense = torch.zeros(13, h.num_hyperedges, dtype=torch.float64)
    dense[h.incidence[0], h.incidence[1]] = weight.detach()
    torch.testing.assert_close(ours(items, weight), dense.T @ items)
    assert torch.autograd.gradcheck(ours, (items, weight))


@pytest.mark.parametrize("p_out", [0.0, 0.3])
@pytest.mark.parametrize("p_in", [0.0, 0.2])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("fixed_input", [True, False])
def test_row_blocks_have_the_gradients_of_the_plain_layers(fixed_input, normed, p_in, p_out, monkeypatch):
    monkeypatch.setattr("tenfold_hypergcl.rowwise.CACHED_ROWS", 3)
    torch.manual_seed(0)
    norm, linear = torch.nn.LayerNorm(5).double() if normed else None, torch.nn.Linear(5, 4).double()
    if norm is not None:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=not fixed_input)

    def ours(x):
        torch.manual_seed(3)
        return layer(x, norm, linear, p_in, True, p_out)

    def plain(x):
        torch.manual_seed(3)
        blocks = []
        for rows in x.split(3):
            part = rows if norm is None else norm(rows)
            if p_in:
                part = part * draw_kept(part, p_in) / (1 - round(p_in * 65536) / 65536)
            part = linear(part).relu()
            if p_out:
                part = part * draw_kept(part, p_out) / (1 - round(p_out * 65536) / 65536)
            blocks.append(part)
        return torch.cat(blocks)

    parameters = [*linear.parameters(), *(norm.parameters() if normed else []), *([] if fixed_input else [x])]
    torch.testing.assert_close(ours(x), plain(x))
    probe = torch.randn(8, 4, dtype=torch.float64)
    expected = torch.autograd.grad((plain(x) * probe).sum(), parameters)
    for actual, wanted in zip(torch.autograd.grad((ours(x) * probe).sum(), parameters), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 1, 1), (7, 3, 5), (65, 130, 33)])
def test_products_are_those_of_the_plain_operations(dtype, rows, inner, out):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, inner), torch.randn(out, inner), torch.randn(out)
    expected = x.double() @ weight.double().T
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    torch.testing.assert_close(multiply(x, weight).double(), expected, atol=1e-4, rtol=1e-4)
    positive = multiply(x, weight, bias, relu=True).double()
    torch.testing.assert_close(positive, (expected + bias.double()).relu(), atol=1e-4, rtol=1e-4)


def test_dropout_drops_the_stated_share_and_keeps_the_mean():
    torch.manual_seed(0)
    out = dropout(torch.ones(400_000), 0.2, training=True)
    assert abs(float((out == 0).float().mean()) - 0.2) < 5 * math.sqrt(0.16 / 400_000)
    assert torch.unique(out).tolist() == [0.0, pytest.approx(1.25, rel=1e-4)]
    assert dropout(out, 0.2, training=False) is out


@pytest.mark.parametrize("p", [1e-9, 1e-4, 0.2, 0.5, 0.99])
def test_a_mask_compares_random_levels_with_the_share_to_drop(p):
    x = torch.randn(37, 11)
    torch.manual_seed(3)
    kept = draw_kept(x, p)
    torch.manual_seed(3)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    dropped, scale = threshold(p)
    expected = words.view(torch.int16)[: x.numel()].view(x.shape).long() >= dropped - 2**15
    assert torch.equal(kept, expected)
    torch.testing.assert_close(thinned(x, kept, p), torch.where(expected, x * scale, 0.0))


def test_sparse_features_give_what_dense_ones_do(h):
    torch.manual_seed(0)
    dense = torch.randn(13, 40, dtype=torch.float64) * (torch.rand(13, 40) < 0.1)
    sparse = SparseFeatures.from_dense(dense)
    torch.testing.assert_close(sparse.to_dense(), dense)
    torch.testing.assert_close(sparse.repeat(2).to_dense(), torch.cat([dense, dense]))
    norm, linear = torch.nn.LayerNorm(40).double(), torch.nn.Linear(40, 5).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    torch.testing.assert_close(normalized_linear(sparse, norm, linear), linear(norm(dense)))
    torch.testing.assert_close(normalized_linear(sparse.repeat(2), norm, linear), linear(norm(torch.cat([dense] * 2))))
    mlp = MLP(40, 8, 3, 2, input_norm=True).double()
    gradients = []
    for features in (sparse, dense):
        mlp.zero_grad()
        mlp(features).square().sum().backward()
        gradients.append([p.grad.clone() for p in mlp.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("config", [DENSE, ATTENTION], ids=["deep sets", "attention"])
def test_a_weight_of_zero_and_a_deleted_membership_are_the_same(config, h, x):
    model = model_of(config)
    mask = torch.ones(h.num_memberships, dtype=torch.bool)
    mask[torch.tensor([0, 3, 11, 29])] = False
    torch.testing.assert_close(model.project(x, h, mask.double()), model.project(x, h.keep(mask)))
    compact = steps.generated_view(h, x, mask.double()).hypergraph
    torch.testing.assert_close(model.project(x, compact), model.project(x, h.keep(mask)))


def test_mean_divides_weighted_sums_by_the_unweighted_count(h, x):
    model = model_of(EncoderConfig(hidden=8, dropout=0.0, aggregate="mean"))
    half = model.V2EConvs[0]
    weight = torch.rand(h.num_memberships, dtype=torch.float64)
    matrix = torch.zeros(13, h.num_hyperedges, dtype=torch.float64)
    matrix[h.incidence[0], h.incidence[1]] = weight
    sent = half.f_enc(x, relu=True)
    expected = half.f_dec(matrix.T @ sent / dense_incidence(h).sum(0).clamp_min(1)[:, None], relu=True)
    torch.testing.assert_close(half(x, h, True, weight), expected)


def test_attention_against_a_loop_over_targets(h, x):
    pool = model_of(ATTENTION).V2EConvs[0].prop
    weight = torch.rand(h.num_memberships, dtype=torch.float64)
    weight[h.incidence[1] == 2] = 0
    out = pool(x, h, True, weight, None)
    key, value = pool.lin_K(x).view(13, 2, 4), pool.lin_V(x).view(13, 2, 4)
    for edge in range(h.num_hyperedges):
        member = h.incidence[1] == edge
        nodes, pooled = h.incidence[0, member], pool.att_r[0].clone()
        if nodes.numel():
            score = F.leaky_relu((key[nodes] * pool.att_r).sum(-1), 0.2)
            alpha = torch.softmax(score, 0) * weight[member, None]
            alpha = alpha / (alpha.sum(0) + 1e-16)
            pooled = pooled + (alpha[..., None] * value[nodes]).sum(0)
        o = pool.ln0(pooled.reshape(-1))
        torch.testing.assert_close(out[edge], pool.ln1(o + pool.rFF(o[None])[0].relu()))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("config", [DENSE, ATTENTION], ids=["deep sets", "attention"])
def test_the_receptive_field_gives_the_logits_of_the_whole_hypergraph(config, layers, h, x):
    model = model_of(EncoderConfig(**{**vars(config), "layers": layers}))
    targets = torch.tensor([7, 2, 11])
    part = steps.receptive_field(h, x, targets, layers)
    torch.testing.assert_close(model(part.x, part.incidence, part.rows), model(x, h)[targets])


def test_views_in_one_pass_are_the_views_one_by_one(h, x):
    model = model_of(DENSE)
    torch.manual_seed(0)
    first, second = augment.fabricate_pair("A3", h, x, 0.3)
    union = disjoint_union([first.hypergraph, second.hypergraph])
    z = model.project(steps.stack_views([first.x, second.x]), union)
    expected = torch.cat([model.project(view.x, view.hypergraph) for view in (first, second)])
    torch.testing.assert_close(z, expected)


@pytest.mark.parametrize("only", [None, torch.tensor([11, 0, 4, 7, 2, 9])])
def test_batch_norm_takes_its_statistics_over_all_rows_of_one_view(only, h, x):
    """In training, where they decide: two passes over two views, and no row left out because nobody asked for its output."""
    model = model_of(EncoderConfig(hidden=8, norm="bn", mlp_layers=3, dropout=0.0)).train()
    torch.manual_seed(0)
    views = augment.fabricate_pair("A2", h, x, 0.3)
    z = [model.project(view.x, view.hypergraph, input_dropout=0.0) for view in views]
    expected = contrast.info_nce(*(z if only is None else [part[only] for part in z]), 0.3)
    loss = steps.contrastive_loss(model, *views, 0.3, input_dropout=0.0, only=only)
    torch.testing.assert_close(loss, expected)
    targets = torch.tensor([7, 2, 11])
    field = steps.field_of(model.config, h, x, targets)
    torch.manual_seed(0)
    whole = model(x, h)[targets]
    torch.manual_seed(0)
    torch.testing.assert_close(model(field.x, field.incidence, field.rows), whole)


@pytest.mark.parametrize("name", ["A2", "A3", "A4", "A5"])
def test_some_nodes_are_compared_as_if_there_were_no_others(name, h, x):
    model, only = model_of(DENSE), torch.tensor([11, 0, 4, 7, 2, 9])
    torch.manual_seed(0)
    views = augment.fabricate_pair(name, h, x, 0.3)
    ids = [list(range(13)) if view.nodes is None else view.nodes.tolist() for view in views]
    z = [model.project(view.x, view.hypergraph) for view in views]
    kept = [[own.index(node) for node in only.tolist() if node in own] for own in ids]
    present = [[node for node in only.tolist() if node in own] for own in ids]
    both = [node for node in present[0] if node in present[1]]
    common = tuple(torch.tensor([nodes.index(node) for node in both]) for nodes in present)
    expected = contrast.info_nce(z[0][kept[0]], z[1][kept[1]], 0.3, common)
    torch.testing.assert_close(steps.contrastive_loss(model, *views, 0.3, only=only), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.3, 1.0]), st.integers(1, 20))
def test_info_nce_against_the_formula_node_by_node(seed, temperature, block):
    torch.manual_seed(seed)
    z1, z2 = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    a, b = F.normalize(z1), F.normalize(z2)
    total = 0
    for u, v in ((a, b), (b, a)):
        for i in range(7):
            denominator = sum(torch.exp(u[i] @ u[j] / temperature) for j in range(7) if j != i)
            denominator = denominator + sum(torch.exp(u[i] @ v[j] / temperature) for j in range(7))
            total = total - torch.log(torch.exp(u[i] @ v[i] / temperature) / denominator) / 14
    actual = contrast.info_nce(z1, z2, temperature, block=block)
    torch.testing.assert_close(actual, total)
    for ours, wanted in zip(torch.autograd.grad(actual, (z1, z2)), torch.autograd.grad(total, (z1, z2)), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_info_nce_stays_finite_where_single_precision_would_not():
    z1, z2 = torch.randn(2, 9, 4)
    reference = contrast.info_nce(z1.double(), z2.double(), 0.005)
    assert torch.isfinite(reference)
    torch.testing.assert_close(contrast.info_nce(z1, z2, 0.005).double(), reference, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="temperature"):
        contrast.info_nce(z1, z2, 0.0)
    with pytest.raises(ValueError, match="name the common"):
        contrast.info_nce(z1, z2[:5])


def test_the_gradient_reaches_only_the_view_that_asks():
    z1, z2 = torch.randn(2, 9, 4, dtype=torch.float64)
    z2.requires_grad_()
    contrast.info_nce(z1, z2, 0.3, block=4).backward()
    both = z2.detach().clone().requires_grad_()
    contrast.info_nce(z1.clone().requires_grad_(), both, 0.3).backward()
    torch.testing.assert_close(z2.grad, both.grad)


def test_triplet_margin_clips_and_the_released_one_does_not():
    a = torch.eye(4, dtype=torch.float64)
    unclipped = contrast.triplet_margin(a, a, margin=0.0, clip=False)
    assert unclipped == pytest.approx(2e-6 - math.sqrt(2), abs=1e-9)
    assert contrast.triplet_margin(a, a, margin=0.0) == 0


def test_straight_through_keeps_are_exact_and_differentiate_the_soft_sample(h):
    torch.manual_seed(0)
    logits = torch.randn(h.num_memberships, 2, dtype=torch.float64, requires_grad=True)
    gumbel = torch.randn(h.num_real, 2, dtype=torch.float64)
    keep = generative.keep_weights(logits, h, gumbel)
    assert set(keep.tolist()) <= {0.0, 1.0}
    assert bool((keep[h.num_real :] == 1).all())
    soft = torch.softmax(logits[: h.num_real] + gumbel, 1)[:, 1]
    probe = torch.randn(h.num_real, dtype=torch.float64)
    (ours,) = torch.autograd.grad((keep[: h.num_real] * probe).sum(), logits)
    (wanted,) = torch.autograd.grad((soft * probe).sum(), logits)
    torch.testing.assert_close(ours, wanted)


def test_kl_against_torch_distributions():
    mean, std = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(generative.kl_divergence(mean, std, "paper"), expected)
    torch.testing.assert_close(generative.kl_divergence(mean, std), expected / 5)


@pytest.mark.parametrize("loss", [contrast.jsd, contrast.triplet_margin])
def test_contrasts_are_summed_in_single_precision_under_autocast(loss):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 60, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(z1, z2)
    torch.testing.assert_close(inside, loss(z1, z2))
    half = [z.to(torch.bfloat16) for z in (z1, z2)]
    torch.testing.assert_close(loss(*half), loss(*(z.float() for z in half)))


def test_the_generators_loss_is_averaged_in_single_precision():
    torch.manual_seed(0)
    half = torch.rand(4, 300, 2).add(0.1).to(torch.bfloat16)

    def loss(mean, std, positive, negative):
        latents = generative.Latents(mean, mean, std, mean, mean, std)
        return generative.vhgae_loss(positive, negative, latents)

    torch.testing.assert_close(loss(*half), loss(*half.float()))


def test_negatives_are_no_members(h):
    torch.manual_seed(0)
    negatives = generative.sample_negatives(h, 5000)
    members = set(map(tuple, h.incidence.T.tolist()))
    assert not members & set(map(tuple, negatives.T.tolist()))
    assert np.unique(negatives[0]).size == h.num_nodes


@pytest.mark.parametrize("name", ["A0", "A1", "A2", "A2_add", "A3", "A4", "A5", "mask_col", "mask_zero", "adapt"])
def test_views_keep_every_singleton_and_change_no_input(name, h, x):
    torch.manual_seed(0)
    before = h.incidence.clone(), x.clone()
    view = augment.fabricate(name, h, x, 0.3)
    assert torch.equal(h.incidence, before[0])
    assert torch.equal(x, before[1])
    out = view.hypergraph
    if name != "A5":
        assert out.num_memberships - out.num_real == out.num_nodes
    if name == "A2_add":
        assert out.num_real == h.num_real
    for side, ends in ((out.by_node, out.incidence), (out.by_hyperedge, out.incidence.flip(0))):
        rebuilt = torch.stack([side.rows, side.index])
        assert sorted(map(tuple, rebuilt.T.tolist())) == sorted(map(tuple, ends.T.tolist()))
        assert torch.equal(ends[:, side.position], rebuilt)


@pytest.mark.parametrize("name", ["A1", "A2", "A2_add", "A3", "A5", "adapt"])
def test_views_of_no_hyperedge_are_singletons(name):
    h = Hypergraph.from_hyperedges([], 5).with_singletons()
    assert augment.fabricate(name, h, torch.randn(5, 3), 0.3).hypergraph.num_real == 0
    with pytest.raises(ValueError, match="ratio"):
        augment.fabricate(name, h, torch.randn(5, 3), 1.5)


def test_views_without_a_node_share_none(h, x):
    nothing = augment.View(
        augment.induce(h, torch.tensor([], dtype=torch.long)), x[:0], torch.tensor([], dtype=torch.long)
    )
    rows, _, common = augment.shared_rows(nothing, augment.View(h, x), torch.tensor([3]))
    assert rows.numel() == common[0].numel() == 0


def test_the_same_views_of_sparse_and_dense_features(h):
    x = torch.randn(13, 30) * (torch.rand(13, 30) < 0.2)
    for name in ("mask_col", "mask_zero", "A3", "A4"):
        torch.manual_seed(5)
        dense = augment.fabricate(name, h, x, 0.3).x
        torch.manual_seed(5)
        sparse = augment.fabricate(name, h, SparseFeatures.from_dense(x), 0.3).x
        torch.testing.assert_close(sparse.to_dense() if isinstance(sparse, SparseFeatures) else sparse, dense)


def test_rows_of_sparse_features_are_those_of_the_dense_ones():
    x = torch.randn(13, 30) * (torch.rand(13, 30) < 0.2)
    index = torch.tensor([12, 3, 3, 0])
    rows = SparseFeatures.from_dense(x).rows(index)
    assert rows.shape == (4, 30)
    assert torch.equal(rows.to_dense(), x[index])
    assert torch.equal(rows.to(torch.float64).to("cpu").to_dense(), x[index].double())
    right = torch.randn(30, 2)
    torch.testing.assert_close(rows.matmul(right), x[index] @ right)


def test_views_with_other_words_stay_sparse_over_one_another():
    """And give what the dense ones give, forward and backward, so that dropped nodes do not cost a dense matrix of features."""
    x = torch.randn(13, 30) * (torch.rand(13, 30) < 0.2)
    parts = [SparseFeatures.from_dense(x).rows(index) for index in (torch.tensor([0, 4, 12]), torch.tensor([5, 4]))]
    stacked = steps.stack_views([*parts, augment.zero_columns(parts[0], torch.tensor([3, 7]))])
    assert isinstance(stacked, SparseFeatures)
    expected = torch.cat([x[[0, 4, 12, 5, 4]], x[[0, 4, 12]].index_fill(1, torch.tensor([3, 7]), 0.0)])
    assert torch.equal(stacked.to_dense(), expected)
    right = torch.randn(30, 2, requires_grad=True)
    (got,) = torch.autograd.grad(stacked.matmul(right).square().sum(), right)
    (want,) = torch.autograd.grad((expected @ right).square().sum(), right)
    torch.testing.assert_close(got, want)


def test_walks_move_along_memberships(h):
    torch.manual_seed(0)
    nodes, edges = augment.random_walk(h, torch.tensor([4]), steps=1)
    assert nodes.nonzero().flatten().tolist() == [4]
    assert int(edges.sum()) == 1
    assert bool(((h.incidence[0] == 4) & (h.incidence[1] == edges.nonzero().item())).any())
