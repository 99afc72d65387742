"""Every fixture of the released implementation in ``$TENFOLD_PARITY_DIR`` (default: the selection beside this file)."""

import re
import statistics
from pathlib import Path

import pytest
import torch

from tenfold_hypergcl import attacks, augment, baselines, contrast, fairness, generative, protocol, steps
from tenfold_hypergcl.compat import load_state, released_parameter_count
from tenfold_hypergcl.hypergraph import Hypergraph
from tenfold_hypergcl.mlp import MLP
from tenfold_hypergcl.setgnn import EncoderConfig, SetGNN
from tenfold_hypergcl.train import Best
from tenfold_shared.parity import check_parity, parity_files


def near(actual, expected, tolerance):
    actual, expected = torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def hypergraph(incidence, num_nodes, num_real):
    """With the singletons, which are the last columns and one for every node."""
    singletons = incidence.shape[1] - num_real
    edges = int(incidence[1].max()) + 1
    return Hypergraph(incidence, num_nodes, edges, num_real, edges - singletons)


def encoder_config(cfg):
    return EncoderConfig(
        hidden=cfg["MLP_hidden"],
        layers=cfg["All_num_layers"],
        mlp_layers=cfg["MLP_num_layers"],
        attention=cfg["PMA"],
        heads=cfg["heads"],
        dropout=0.0,
        norm="none" if cfg["normalization"] in {"None", None} else cfg["normalization"],
        input_norm=cfg.get("deepset_input_norm", True),
        aggregate={"add": "sum"}.get(cfg.get("aggregate", "add"), cfg.get("aggregate", "add")),
        gpr=bool(cfg.get("GPR", False)),
    )


def set_gnn(cfg, state):
    model = SetGNN(
        cfg["num_features"],
        cfg["num_classes"],
        encoder_config(cfg),
        projection=cfg["Classifier_hidden"],
        head_layers=cfg["Classifier_num_layers"],
    ).double()
    load_state(model, state)
    return model.eval()


def check_gradients(model, fixture, tolerance, skip=()):
    parameters = dict(model.named_parameters())
    names = [name for name in fixture.under("grad/") if not name.startswith("__")]
    assert names
    for name in names:
        near(parameters[name].grad, fixture["grad/" + name], tolerance)
    for name, parameter in parameters.items():
        assert name in names or parameter.grad is None or not parameter.grad.any(), name


def setgnn(f):
    x, y, incidence, weight = f["in/x"], f["in/y"], f["in/incidence"], f["in/weight"].requires_grad_()
    h = hypergraph(incidence, x.shape[0], f["in/incidence_raw"].shape[1])
    before = incidence.clone()
    model = set_gnn(f.meta, f.under("state/"))
    assert released_parameter_count(model) == f.meta["num_parameters"]
    nodes, hyperedges = model.encode(x, h, want_hyperedges=True)
    near(nodes, f["out/node_embed"], 1e-9)
    near(hyperedges, f["out/hyperedge_embed"], 1e-9)
    near(model.embed(x, h), f["out/embed"], 1e-9)
    logits = model(x, h)
    near(logits, f["out/logits"], 1e-9)
    near(model.linear(model.embed(x, h)), f["out/finetune_logits"], 1e-9)
    z1, z2 = model.project(x, h), model.project(x, h, weight)
    near(z1, f["out/proj"], 1e-9)
    near(z2, f["out/proj_weighted"], 1e-9)
    field = steps.field_of(model.config, h, x, f["in/train_idx"])
    supervised = steps.supervised_loss(model, field, y[f["in/train_idx"]])
    view = augment.View(h, x)
    contrastive = steps.contrastive_loss(model, view, view, f.meta["temperature"], weights=(None, weight))
    near(supervised, f["out/loss_sup"], 1e-9)
    near(contrastive, f["out/loss_cl"], 1e-9)
    factor = float(re.search(r"([\d.]+)\*InfoNCE", f.meta["loss"])[1])
    loss = supervised + factor * contrastive
    near(loss, f["out/loss"], 1e-9)
    loss.backward()
    check_gradients(model, f, 1e-9)
    near(weight.grad, f["grad/__weight__"], 1e-9)
    assert torch.equal(incidence, before)


def contrastive_losses(f):
    def inputs(second):
        return f["in/z1"].requires_grad_(), f["in/" + second].requires_grad_()

    for t in f.meta["temperatures"]:
        z1, z2 = inputs("z2")
        rows12, rows21 = contrast.info_nce_rows(z1, z2, t, block=5)
        near(rows12, f[f"out/infonce_rows12_t{t}"], 1e-10)
        near(rows21, f[f"out/infonce_rows21_t{t}"], 1e-10)
        loss = contrast.info_nce(z1, z2, t, block=5)
        near(loss, f[f"out/infonce_t{t}"], 1e-10)
        loss.backward()
        near(z1.grad, f[f"grad/infonce_z1_t{t}"], 1e-10)
        near(z2.grad, f[f"grad/infonce_z2_t{t}"], 1e-10)
    z1, z2 = inputs("z2")
    loss = contrast.jsd(z1, z2, block=5)
    near(loss, f["out/jsd"], 1e-10)
    loss.backward()
    near(z1.grad, f["grad/jsd_z1"], 1e-10)
    near(z2.grad, f["grad/jsd_z2"], 1e-10)
    z1, z2 = inputs("z2b")
    loss = contrast.info_nce(z1, z2, f.meta["common_temperature"], common=(f["in/pos1"], f["in/pos2"]))
    near(loss, f["out/infonce_common"], 1e-10)
    loss.backward()
    near(z1.grad, f["grad/common_z1"], 1e-10)
    near(z2.grad, f["grad/common_z2b"], 1e-10)


def vhgae(f):
    cfg, x = f.meta, f["in/x"]
    h = hypergraph(f["in/incidence"], x.shape[0], int(f["in/num_ori_edge"]))
    generator = generative.VHGAE(cfg["num_features"], encoder_config(cfg)).double()
    load_state(generator, f.under("state/"))
    generator.eval()
    assert released_parameter_count(generator) == cfg["num_parameters"]
    noise = generative.Noise(f["in/eps_node"], f["in/eps_hyperedge"], f["in/gumbel"])
    latents, logits, _ = generator(x, h, noise)
    for name in ("node", "node_mean", "node_std", "hyperedge", "hyperedge_mean", "hyperedge_std"):
        near(getattr(latents, name), f["out/" + name], 1e-9)
    near(logits, f["out/pair_logits"], 1e-9)
    loss = generative.vhgae_loss(logits, generator.decoder(latents, f["in/incidence_neg"]), latents)
    near(loss, f["out/loss_vhgae"], 1e-9)
    keep = generative.keep_weights(logits, h, noise.gumbel, bool(cfg["hard"]))
    near(keep, f["out/keep"], 1e-9)
    near(generative.drop_ratio(keep, h), f["out/drop_ratio"], 1e-9)
    objective = loss + (keep * f["in/probe"]).sum()
    near(objective, f["out/objective"], 1e-9)
    objective.backward()
    check_gradients(generator, f, 1e-9)


def kept(h, positions):
    """A view given by the positions of all its memberships, singletons among them."""
    mask = torch.zeros(h.num_memberships, dtype=torch.bool)
    mask[positions] = True
    return h.keep(mask)


def expected_state(f, prefix):
    return {
        name: value for name, value in f.under(prefix).items() if ".bn" not in "." + name and "num_batches" not in name
    }


def train_fabricated(f):
    cfg, x, y, train = f.meta, f["in/x"], f["in/y"], f["in/train_idx"]
    h = hypergraph(f["in/incidence"], x.shape[0], int(f["in/num_ori_edge"]))
    model = set_gnn(cfg, f.under("state/"))
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg["lr"], weight_decay=cfg["weight_decay"])
    field = steps.field_of(model.config, h, x, train)
    for epoch in range(cfg["epochs"]):
        views = [augment.View(kept(h, f[f"in/keep_view{i}_{epoch}"]), x) for i in (1, 2)]
        optimizer.zero_grad()
        supervised = steps.supervised_loss(model, field, y[train])
        supervised.backward()
        contrastive = steps.contrastive_loss(model, *views, cfg["t"])
        (cfg["m_l"] * contrastive).backward()
        optimizer.step()
        near(supervised, f[f"out/loss_sup_{epoch}"], 1e-8)
        near(contrastive, f[f"out/loss_cl_{epoch}"], 1e-8)
    check_parameters(model, expected_state(f, "out/after."))


def check_parameters(model, expected):
    ours = model.state_dict()
    assert set(expected) == set(ours)
    for name, value in expected.items():
        near(ours[name], value, 1e-8)


def train_generative(f):
    cfg, x, y, train = f.meta, f["in/x"], f["in/y"], f["in/train_idx"]
    h = hypergraph(f["in/incidence"], x.shape[0], int(f["in/num_ori_edge"]))
    model = set_gnn(cfg, f.under("state/model."))
    generator = generative.VHGAE(cfg["num_features"], encoder_config(cfg)).double()
    load_state(generator, f.under("state/generator."))
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg["lr"], weight_decay=cfg.get("weight_decay", 0))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=cfg["g_lr"])
    field = steps.field_of(model.config, h, x, train)
    for e in range(cfg["epochs"]):
        noise = {
            part: generative.Noise(
                f[f"in/eps_node_{part}_{e}"], f[f"in/eps_hyperedge_{part}_{e}"], f[f"in/gumbel_{part}_{e}"]
            )
            for part in ("g", "m")
        }
        hard = bool(cfg["hard"])
        losses = steps.generator_step(
            model, generator, h, x, cfg["g_l"], cfg["t"], noise["g"], f[f"in/incidence_neg_{e}"], hard
        )
        optimizer_g.step()
        near(losses.vhgae, f[f"out/loss_vhgae_{e}"], 1e-8)
        near(losses.contrastive, f[f"out/loss_cl_generator_{e}"], 1e-8)
        near(losses.total, f[f"out/loss_generator_{e}"], 1e-8)
        near(losses.keep, f[f"out/keep_generator_{e}"], 1e-8)
        near(losses.drop_ratio, f[f"out/drop_ratio_{e}"], 1e-8)
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        part = steps.core(h, x)
        keep = steps.generate_view(generator, h, part, part.restrict(noise["m"]), hard)
        near(keep, f[f"out/keep_model_{e}"], 1e-8)
        first = augment.View(kept(h, f[f"in/view1_keep_{e}"]), x)
        supervised = steps.supervised_loss(model, field, y[train])
        # As in training: with the mean of all members a weight of zero is no deletion.
        smaller = hard and (model.config.aggregate == "sum" or model.config.attention)
        second = steps.generated_view(h, x, keep) if smaller else augment.View(h, x)
        weights = (None, None if smaller else keep)
        contrastive = steps.contrastive_loss(model, first, second, cfg["t"], weights=weights)
        loss = supervised + cfg["a_l"] * contrastive
        near(supervised, f[f"out/loss_sup_{e}"], 1e-8)
        near(contrastive, f[f"out/loss_cl_{e}"], 1e-8)
        near(loss, f[f"out/loss_{e}"], 1e-8)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for part, module in (("model", model), ("generator", generator)):
            if f.under(f"out/after{e + 1}.{part}."):
                check_parameters(module, expected_state(f, f"out/after{e + 1}.{part}."))


def columns(incidence):
    return sorted(map(tuple, incidence.T.tolist()))


def augmentations(f):
    cfg, x, incidence = f.meta, f["in/x"], f["in/incidence"]
    n = x.shape[0]
    h = hypergraph(incidence, n, int(f["in/num_ori_edge"]))
    assert h.num_real_hyperedges == int(f["in/num_hyperedges"])
    before_x, before = x.clone(), incidence.clone()
    removed = f["in/a1_removed_hyperedges"]
    assert augment.draw_hyperedges(h, cfg["ratio"]).numel() == removed.numel()
    assert columns(augment.drop_hyperedges(h, removed).incidence) == columns(f["out/a1_incidence"])
    positions = f["in/a2_kept_positions"]
    assert augment.draw_memberships(h, cfg["ratio"]).numel() == int(f["out/a2_expected_kept"]) == positions.numel()
    assert columns(augment.keep_memberships(h, positions).incidence) == columns(f["out/a2_incidence"])
    near(augment.mask_nodes(x, f["in/a4_masked_nodes"]), f["out/a4_x"], 1e-12)
    for name, count in (("a3", int(n * (1 - cfg["ratio"]))), ("sub", cfg["sub_size"])):
        nodes = f["in/a3_permutation"][:count].sort().values
        assert augment.draw_nodes(h, count).numel() == count
        sub = augment.induce(h, nodes)
        shifted = sub.incidence + torch.tensor([[0], [count]])
        assert columns(shifted) == columns(f[f"out/{name}_incidence"])
        assert sub.num_real_hyperedges == int(f[f"out/{name}_num_hyperedges"].reshape(-1)[0])
        near(augment.take_rows(x, nodes), f[f"out/{name}_x"], 0)
        if name == "a3":
            assert torch.equal(nodes, f["out/a3_kept_nodes"])
        else:
            assert sub.num_real == int(f["out/sub_num_ori_edge"])
    visited = f["in/a5_visited"]
    nodes, edges = torch.zeros(n, dtype=torch.bool), torch.zeros(h.num_hyperedges, dtype=torch.bool)
    nodes[visited[visited < n]] = True
    edges[visited[visited >= n] - n] = True
    sub, kept_nodes = augment.visited_subgraph(h, nodes, edges)
    assert columns(sub.incidence + torch.tensor([[0], [kept_nodes.numel()]])) == columns(f["out/a5_incidence"])
    near(augment.hyperedge_drop_weights(h), f["out/adapt_hyperedge_weights"], 1e-5)
    near(augment.column_drop_weights(x, h), f["out/adapt_feature_weights"], 1e-5)
    assert torch.equal(x, before_x)
    assert torch.equal(incidence, before)


def baseline_models(f):
    cfg, x = f.meta, f["in/x"]
    n, raw = x.shape[0], f["in/incidence_raw"]
    h = Hypergraph.from_incidence(raw, n, cfg["n_hyperedges"])
    looped = hypergraph(f["in/incidence_selfloop"], n, raw.shape[1])
    layers, width, classes, features = cfg["layers"], cfg["hidden"], cfg["num_classes"], cfg["num_features"]

    def run(name, model, structure, tolerance=1e-9):
        model = model.double().eval()
        load_state(model, f.under(f"state/{name}."))
        count = f"out/{name}_num_parameters"
        if count in f:
            assert released_parameter_count(model) == int(f[count])
        near(model(x, *structure) if isinstance(structure, tuple) else model(x, structure), f[f"out/{name}"], tolerance)

    def norm_of(name):
        names = [key for key in f.under(f"state/{name}.") if key.startswith("normalizations")]
        return "none" if not names else "bn" if any(key.endswith("running_mean") for key in names) else "ln"

    sizes = (features, width, classes, layers)
    run("hcha", baselines.HypergraphConvNet(*sizes), looped)
    run("hgnn", baselines.HypergraphConvNet(*sizes, symmetric=True), looped)
    exponents = cfg["hnhn_alpha"], cfg["hnhn_beta"]
    given = baselines.HNHNWeights(
        *[f["in/hnhn_" + name] for name in ("D_v_beta", "D_e_alpha", "D_e_beta_inv", "D_v_alpha_inv")]
    )
    for name, value in vars(baselines.HNHNWeights.of(looped, torch.float64, *exponents)).items():
        near(value, getattr(given, name), 1e-6)
    run("hnhn", baselines.HNHN(*sizes, alpha=exponents[0], beta=exponents[1]), (looped, given))
    run("unigcnii", baselines.UniGCNII(*sizes, heads=cfg["heads"]), looped)
    mlp = MLP(features, width, classes, layers, norm=norm_of("mlp")).double().eval()
    load_state(mlp, f.under("state/mlp."))
    assert released_parameter_count(mlp) == int(f["out/mlp_num_parameters"])
    near(mlp(x), f["out/mlp"], 1e-9)

    graph = baselines.clique_expansion(h, directed=True)
    ours = {(i, j): w for (i, j), w in zip(graph.edges.T.tolist(), graph.weight.tolist(), strict=True)}
    theirs = zip(f["in/clique_edges"].T.tolist(), f["in/clique_weights"].tolist(), strict=True)
    assert ours == {(i, j): w for (i, j), w in theirs}
    normalized = baselines.gcn_normalized(graph, loops=int(graph.edges.max()) + 1)
    ours = {(i, j): w for (i, j), w in zip(normalized.edges.T.tolist(), normalized.weight.tolist(), strict=True)}
    theirs = {
        (i, j): w
        for (i, j), w in zip(f["out/clique_norm_edges"].T.tolist(), f["out/clique_norm_weights"].tolist(), strict=True)
    }
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[key] - theirs[key]) < 1e-6 for key in ours)
    run("cegcn", baselines.CliqueNet(*sizes, norm=norm_of("cegcn")), normalized, 1e-6)
    attention = baselines.CliqueNet(*sizes, norm=norm_of("cegat"), attention=True, heads=cfg["heads"])
    run("cegat", attention, baselines.gcn_normalized(graph))

    signal = x @ f["in/hypergcn_projection"]
    for name, mediators in (("mediators", True), ("plain", False)):
        operator = baselines.hypergcn_operator(h, signal, mediators)
        dense = operator.propagate(torch.eye(n, dtype=torch.float64))
        near(dense, f[f"out/hypergcn_operator_{name}"], 1e-6)
    wide = cfg["hypergcn_widths"][1] == 2 ** (layers + 4) if layers > 1 else False
    network = baselines.HyperGCN(features, classes, layers, wide=wide)
    run("hypergcn", network, baselines.hypergcn_operator(h, signal), 1e-6)


def evaluation_protocol(f):
    for rate in f.meta["split_props"]:
        split = protocol.split_permutation(f[f"in/perm_{rate}"], rate)
        for part in ("train", "valid", "test"):
            assert getattr(split, part).tolist() == f[f"out/split_{rate}_{part}"].tolist()
    predicted, label, sensitive = f["in/pred"], f["in/label"], f["in/sens"]
    near(fairness.statistical_parity(predicted, sensitive), f["out/statistical_parity"], 1e-7)
    near(fairness.equal_opportunity(predicted, label, sensitive), f["out/equal_opportunity"], 1e-7)
    valid, test = [], []
    for curve in 100 * f["in/curves"].double():  # (train, valid, test) of each epoch
        best = Best()
        for epoch, row in enumerate(curve.tolist()):
            best.offer(row[1], epoch, torch.nn.Identity())
        valid.append(best.value)
        test.append(float(curve[best.epoch, 2]))
    near(torch.tensor(valid), f["out/best_valid_percent"], 1e-5)
    near(torch.tensor(test), f["out/test_percent_at_best_valid"], 1e-5)
    near(statistics.fmean(test), f["out/test_mean"], 1e-5)
    near(statistics.stdev(test), f["out/test_std"], 1e-5)
    raw = f["in/knn_raw"].numpy().copy()
    raw[:, 0] = f["in/knn_sens_values"].numpy()
    scaled = fairness.rescale(raw, 0)
    near(scaled, f["out/knn_features"], 1e-7)
    assert fairness.nearest_others(scaled).tolist() == f["out/knn_incidence"].tolist()
    size = int(f["in/poisoned_n_nodes"]), int(f["in/poisoned_n_hyperedges"])
    for pairs in (f["in/poisoned_pairs"], f["in/poisoned_pairs"].T.contiguous()):
        poisoned = attacks.from_poisoned_pairs(pairs, *size)
        assert poisoned.num_hyperedges == int(f["out/poisoned_n_hyperedges"])
        assert columns(poisoned.incidence) == columns(f["out/poisoned_incidence"])


CHECKS = {
    "setgnn": setgnn,
    "contrastive_losses": contrastive_losses,
    "vhgae": vhgae,
    "train_fabricated": train_fabricated,
    "train_generative": train_generative,
    "augmentations": augmentations,
    "baselines": baseline_models,
    "protocol": evaluation_protocol,
}


@pytest.mark.parametrize("path", parity_files(__file__), ids=lambda path: path.stem)
def test_parity(path: Path) -> None:
    check_parity(path, CHECKS)
