"""Construction, bad input, loaders in the published layouts, transforms, batches, attacks, membership prediction."""

import pickle

import jaxtyping
import numpy as np
import pytest
import scipy.sparse
import torch

from tenfold_hypergcl import attacks, compat, data, linkpred, minibatch, protocol, steps, transforms
from tenfold_hypergcl.fairness import counterfactual_flips, nearest_others, statistical_parity
from tenfold_hypergcl.generative import VHGAE
from tenfold_hypergcl.hypergraph import Hypergraph, HypergraphError, count_nodes
from tenfold_hypergcl.setgnn import EncoderConfig, SetGNN
from tenfold_shared.errors import UserError


@pytest.fixture
def h():
    return Hypergraph.from_hyperedges([[0, 1, 2], [2, 3], [4, 5, 0], [5, 1]], num_nodes=7)


def test_isolated_nodes_and_lost_last_hyperedges_keep_their_place(h):
    assert (h.num_nodes, h.num_hyperedges, h.node_degrees[6]) == (7, 4, 0)
    full = h.with_singletons()
    assert full.hyperedge_sizes.tolist() == [3, 2, 3, 2, *[1] * 7]
    mask = torch.ones(full.num_memberships, dtype=torch.bool)
    mask[full.incidence[1] == 3] = False
    assert full.keep(mask).num_hyperedges == full.num_hyperedges


def test_missing_singletons_only():
    h = Hypergraph.from_hyperedges([[0], [0, 1]], num_nodes=3).with_singletons("missing")
    assert h.incidence[:, h.num_real :].tolist() == [[1, 2], [2, 3]]


@pytest.mark.parametrize(
    ("hyperedges", "message"),
    [([[0, 7]], "names node 7, but there are 7"), ([[0], []], "Hyperedge 1 is empty"), ([[0, -1]], "names node -1")],
)
def test_bad_hyperedges_are_named(hyperedges, message):
    with pytest.raises(HypergraphError, match=message):
        Hypergraph.from_hyperedges(hyperedges, num_nodes=7)


@pytest.mark.parametrize("members", [[[0, 0], [1, 0], [2, 1]], [[0.0, 1.0], [0.0, 0.0]], [0, 1]])
def test_lists_that_are_no_memberships_are_refused(members):
    with pytest.raises((HypergraphError, jaxtyping.TypeCheckError), match=r"incidence|two rows"):
        Hypergraph.from_incidence(torch.tensor(members))


def test_ids_of_32_bits_do_not_overflow():
    ids = torch.tensor([[0, 60000], [1, 60000]], dtype=torch.int32)
    assert Hypergraph.from_incidence(ids).incidence.tolist() == ids.tolist()


def test_duplicate_members_are_merged():
    with pytest.warns(UserWarning, match="1 duplicate"):
        assert Hypergraph.from_hyperedges([[0, 1, 1]]).num_memberships == 2


def test_csv(tmp_path):
    path = tmp_path / "members.csv"
    path.write_text("node,hyperedge\n0,paper b\n2,paper a\n1,paper b\n")
    h, names = Hypergraph.from_csv(path)
    assert names == ["paper b", "paper a"]
    assert h.incidence.tolist() == [[0, 1, 2], [0, 0, 1]]
    path.write_text("0,a\nx,b\n")
    with pytest.raises(HypergraphError, match="line 2: the node id 'x'"):
        Hypergraph.from_csv(path)


def test_nearest_neighbours_against_brute_force():
    features = np.random.default_rng(0).normal(size=(30, 4))
    h = Hypergraph.from_nearest_neighbors(features, 4)
    distance = np.linalg.norm(features[:, None] - features[None], axis=2)
    for i in range(30):
        assert sorted(h.incidence[0, h.incidence[1] == i].tolist()) == sorted(np.argsort(distance[i])[:4].tolist())
    for include_self in (True, False):  # of one neighbour: the node itself, or the nearest other
        one = Hypergraph.from_nearest_neighbors(features, 1, include_self).incidence
        assert one[0, one[1].argsort()].tolist() == distance.argsort(1)[:, 1 - include_self].tolist()


def test_a_list_of_two_poisoned_pairs_is_told_by_its_ids():
    """2 x 2 in either form: nodes are below 3, so only one reading makes two memberships."""
    pairs = torch.tensor([[0, 3], [1, 4]])
    for given in (pairs, pairs.T):
        assert attacks.from_poisoned_pairs(given, 3, 2).incidence.T.tolist() == [[0, 0], [1, 1]]


def test_features_and_labels_are_checked(h):
    features, labels = np.ones((7, 3)), np.array([0, 1, 0, 1, -1, 0, 1])
    assert data.make_dataset("mine", h, features, labels).num_classes == 2
    with pytest.raises(HypergraphError, match="node 2, column 1"):
        data.make_dataset("mine", h, np.where(np.arange(21).reshape(7, 3) == 7, np.nan, features), labels)
    with pytest.raises(HypergraphError, match="6 labels for 7 nodes"):
        data.make_dataset("mine", h, features, labels[:6])
    with pytest.raises(HypergraphError, match="No node has a label"):
        data.make_dataset("mine", h, features, np.full(7, -1))
    with pytest.raises(HypergraphError, match="6 rows of features"):
        data.make_dataset("mine", h, features[:6], labels)


def write_pickles(root, hypergraph):
    folder = root / "cocitation" / "cora"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    features = scipy.sparse.random(7, 40, 0.05, format="csr", dtype=np.float32, random_state=rng)
    parts = {"features": features, "hypergraph": hypergraph, "labels": [0, 1, 0, 1, 2, 0, 1]}
    for name, value in parts.items():
        (folder / f"{name}.pickle").write_bytes(pickle.dumps(value, protocol=2))
    return folder, features


def test_published_pickles(tmp_path):
    _, features = write_pickles(tmp_path, {"b": {0, 1, 2}, "a": [3, 2]})
    loaded = data.load("cocitation/cora", tmp_path)
    assert loaded.hypergraph.incidence[:, :5].T.tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [3, 1]]
    np.testing.assert_array_equal(loaded.x.to_dense().numpy(), features.toarray())
    assert loaded.num_classes == 3


class Payload:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    write_pickles(tmp_path, Payload())
    with pytest.raises(UserError, match="print"):
        data.load("cocitation/cora", tmp_path)
    assert "must not run" not in capsys.readouterr().out


def test_truncated_and_missing_files_are_named(tmp_path):
    folder, _ = write_pickles(tmp_path, {"b": {0, 1, 2}})
    (folder / "features.pickle").write_bytes((folder / "features.pickle").read_bytes()[:50])
    with pytest.raises(UserError, match=r"features\.pickle"):
        data.load("cocitation/cora", tmp_path)
    with pytest.raises(UserError, match="HyperGCN"):
        data.load("cocitation/citeseer", tmp_path)
    with pytest.raises(HypergraphError, match="no data set 'coar'"):
        data.load("coar", tmp_path)


def test_content_and_edges(tmp_path):
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "zoo.content").write_text("10 1 0 3\n11 0 1 1\n12 1 1 3\n20 0 0 0\n21 0 0 0\n")
    (folder / "zoo.edges").write_text("10 20\n11 20\n12 21\n10 21\n")
    loaded = data.load("zoo", tmp_path)
    assert loaded.hypergraph.incidence[:, :4].T.tolist() == [[0, 0], [0, 1], [1, 0], [2, 1]]
    assert loaded.labels.tolist() == [2, 0, 2]
    (folder / "zoo.edges").write_text("10 20\n99 20\n")
    with pytest.raises(HypergraphError, match="names 99"):
        data.load("zoo", tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hyperedge": None}, "lacks the array 'hyperedge'"),
        ({"hyperedge": np.zeros(2, int)}, r"own\.npz is damaged or not what it should be"),
        ({"label": np.array(["a"] * 4)}, "whole numbers"),
        ({"label": np.array([0.5, 1, 0, 1])}, "whole numbers"),
        ({"label": np.array([0, 1, np.nan, 1])}, "whole numbers"),
        ({"label": np.array([print, 1, 0, 1])}, r"own\.npz is damaged"),
        ({"features": np.zeros(4)}, r"shape \(4,\)"),
        ({"features": np.array([["a"]] * 4)}, "are numbers"),
        ({"node": np.arange(4) + 0.5}, "whole numbers"),
        ({"label": np.array(1)}, r"'label' has shape \(\)"),
        ({"sensitive_column": 2}, "sensitive column is 2, and the features have 2"),
        ({"sensitive_column": 1, "features": np.full((4, 2), 3.0)}, "has the value 3"),
        ({"sensitive_column": 1, "label": np.arange(4)}, "there are 4 classes"),
        (
            {name: np.zeros(0, int) for name in ("node", "hyperedge", "label")} | {"features": np.ones((0, 2))},
            "no node",
        ),
    ],
)
def test_faults_of_own_data_are_named(tmp_path, changes, words):
    arrays = {"node": np.arange(4), "hyperedge": np.array([0, 0, 1, 1]), "label": np.array([0, 1, 0, 1])}
    arrays |= {"features": np.ones((4, 2))} | changes
    np.savez(tmp_path / "own.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(HypergraphError, match=words):
        data.load(str(tmp_path / "own.npz"), tmp_path)


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_damaged_archives_and_tables_are_named(tmp_path, content):
    path = tmp_path / "own.npz"
    np.savez(path, node=np.arange(4))
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(HypergraphError, match=r"own\.npz"):
        data.load(str(path), tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("zoo", "zoo.content", ""),
        ("zoo", "zoo.content", "10 1 x 3\n20 0 0 0\n"),
        ("zoo", "zoo.content", "10 1 3\n11 1 0 3\n20 0 0\n"),
        ("zoo", "zoo.edges", "10 20\n11\n"),
        ("zoo", "zoo.edges", "10 20\n20 20\n"),
        ("german", "german.csv", ""),
        ("german", "german.csv", "GoodCustomer,Gender,Age,PurposeOfLoan,OtherLoansAtStore\n1,Male,,car,0\n"),
        ("german", "german.csv", "GoodCustomer,Gender,Age,PurposeOfLoan,OtherLoansAtStore\n1,Male\n"),
        ("house-committees", "node-labels-house-committees.txt", ""),
        ("house-committees", "hyperedges-house-committees.txt", "1,two\n"),
        ("yelp", "yelp_restaurant_latlong.csv", "latitude,longitude\n1,north\n"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*input contained no data")
def test_damaged_tables_are_named(tmp_path, name, file, text):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "zoo.content").write_text("10 1 0 3\n11 0 1 1\n20 0 0 0\n")
    (folder / "zoo.edges").write_text("10 20\n11 20\n")
    (folder / "node-labels-house-committees.txt").write_text("1\n2\n")
    (folder / "hyperedges-house-committees.txt").write_text("1,2\n")
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=file):
        data.load(name, tmp_path)


def test_cornell(tmp_path):
    folder = tmp_path / "house-committees"
    folder.mkdir()
    (folder / "node-labels-house-committees.txt").write_text("1\n2\n1\n")
    (folder / "hyperedges-house-committees.txt").write_text("1,2\n2,3,1\n")
    loaded = data.load("house-committees", tmp_path, feature_noise=0.0)
    assert loaded.hypergraph.incidence[:, :5].T.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 1]]
    assert loaded.x.shape == (3, 100)
    noisy = [data.load("house-committees", tmp_path).x for _ in range(2)]
    assert torch.equal(*noisy)


def test_fairness_table(tmp_path):
    folder = tmp_path / "german"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = ["GoodCustomer,Gender,Age,PurposeOfLoan,OtherLoansAtStore"]
    rows += [f"{rng.choice([-1, 1])},{rng.choice(['Male', 'Female'])},{rng.random()},car,0" for _ in range(20)]
    (folder / "german.csv").write_text("\n".join(rows))
    loaded = data.load("german", tmp_path)
    assert loaded.sensitive_column == 0
    assert set(loaded.x[:, 0].tolist()) == {0.0, 1.0}
    assert loaded.x[:, 1].min() == -1
    assert loaded.x[:, 1].max() == 1
    assert set(loaded.labels.tolist()) == {0, 1}


def test_nearest_others_keeps_ties_and_leaves_the_person_out():
    line = np.array([[0.0], [1.0], [2.0], [3.0]])
    incidence = nearest_others(line, k=1)
    members = [incidence[0, incidence[1] == i].tolist() for i in range(4)]
    assert members == [[1], [0, 2], [1, 3], [2]]


def test_digits_is_what_it_says():
    loaded = data.digits()
    assert loaded.x.shape == (1797, 64)
    assert bool((loaded.hypergraph.hyperedge_sizes[:1797] == 5).all())


def test_splits_warn_of_absent_classes_and_refuse_empty_training():
    labels = torch.tensor([0, 1, 2, -1] * 30)
    with pytest.warns(UserWarning, match="no training node of at least one class"):
        split = protocol.random_splits(labels, 0.03, 1)[0]
    assert bool((labels[torch.cat([split.train, split.valid, split.test])] >= 0).all())
    with pytest.raises(ValueError, match="leaves none"):
        protocol.random_splits(labels, 0.001, 1)
    with pytest.raises(ValueError, match="at most half"):  # The rest is validated and tested on.
        protocol.stratified_split(labels, 0.6, torch.Generator())


def test_a_numbered_split_is_that_of_the_list():
    labels = torch.tensor([0, 1, 2, -1] * 30)
    listed, numbered = protocol.random_splits(labels, 0.3, 4)[3], protocol.numbered_split(labels, 0.3, 3)
    assert all(torch.equal(getattr(listed, part), getattr(numbered, part)) for part in ("train", "valid", "test"))


def test_undefined_fairness_gaps_are_nan_with_a_warning():
    with pytest.warns(UserWarning, match="undefined"):
        assert np.isnan(statistical_parity(torch.tensor([0, 1]), torch.tensor([1, 1])))


def test_counterfactual_flips():
    x = torch.tensor([[0.0, 5.0], [1.0, -5.0], [0.0, 0.2]])
    flips = counterfactual_flips(lambda x: (x.sum(1) > 1).long(), x, 0, torch.arange(3))
    assert flips == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", sorted(transforms.BY_NAME))
def test_transforms_alone(name, h):
    torch.manual_seed(0)
    source = h.to_data(x=torch.randn(7, 3), y=torch.arange(7))
    before = source.edge_index.clone()
    out = transforms.BY_NAME[name]()(source)
    assert torch.equal(source.edge_index, before)
    assert count_nodes(out) == out.x.shape[0] == out.y.shape[0]
    if name in {"A3", "A5"}:
        assert torch.equal(out.y, out.node_ids)
    full = transforms.AddSingletons()(out) if name != "A5" else out
    assert int(full.edge_index[0].max()) < count_nodes(full)
    if name == "A2":
        assert out.edge_index.shape[1] == 10 - 3


def test_batches_with_full_fanout_are_exact(h):
    torch.manual_seed(0)
    x = torch.randn(7, 3, dtype=torch.float64)
    full = h.with_singletons()
    model = SetGNN(3, 2, EncoderConfig(hidden=4), 4).double().eval()
    sampler = minibatch.HypergraphSampler(full, x, batch_size=3)
    seen = []
    for batch in sampler:
        ids = batch.nodes[batch.seeds]
        torch.testing.assert_close(model(batch.x, batch.hypergraph, batch.seeds), model(x, full)[ids])
        seen += ids.tolist()
    assert sorted(seen) == list(range(7))
    assert len(sampler) == 3


def test_sampled_batches_respect_the_fanout():
    full = Hypergraph.from_hyperedges([range(50), range(0, 50, 2)], 50).with_singletons()
    batch = minibatch.HypergraphSampler(full, torch.randn(50, 3), 4, members=5).batch(torch.arange(4))
    assert int(batch.hypergraph.hyperedge_sizes.max()) <= 5 + 4
    assert batch.hypergraph.num_memberships - batch.hypergraph.num_real == batch.nodes.numel()


def test_attacks_remove_what_they_say(h):
    torch.manual_seed(0)
    full = h.with_singletons()
    assert attacks.remove_by_degree(full, 0.3).num_real == 10 - 3
    x, y = torch.randn(7, 3), torch.tensor([0, 1, 0, 1, 0, 1, 0])
    model = SetGNN(3, 2, EncoderConfig(hidden=4), 4)
    assert attacks.remove_by_gradient(model, full, x, torch.arange(7), y, 0.2).num_real == 8
    assert model.training
    assert attacks.remove_random(full, 1.0).num_real == 0
    with pytest.raises(ValueError, match="share"):
        attacks.remove_random(full, -0.5)


def test_memberships_are_split_and_predicted(h):
    torch.manual_seed(0)
    loaded = data.digits()
    split = linkpred.split_memberships(loaded.hypergraph)
    assert split.hypergraph.num_real == 8985 - 2 * 898
    x, model = loaded.x, SetGNN(64, 10, EncoderConfig(hidden=32), 32)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)

    def auc():
        return linkpred.membership_auc(model, x, split.hypergraph, split.valid, split.valid_negatives)

    untrained = auc()
    for _ in range(20):
        optimiser.zero_grad()
        linkpred.membership_loss(model, x, split.hypergraph).backward()
        optimiser.step()
    assert untrained < 0.7
    assert auc() > 0.8


def test_too_few_memberships_to_test_on_are_refused(h):
    with pytest.raises(HypergraphError, match="tenth of 7 memberships"):
        linkpred.split_memberships(h.keep(torch.arange(10) < 7).with_singletons())


def test_states_go_to_the_released_layout_and_back():
    model = SetGNN(6, 3, EncoderConfig(hidden=8, layers=2), 5)
    state = compat.export_state(model)
    assert "bnV2Es.1.running_mean" in state
    other = SetGNN(6, 3, EncoderConfig(hidden=8, layers=2), 5)
    compat.load_state(other, state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    del state["linear.bias"]
    state["surplus"] = state.pop("linear.weight")
    with pytest.raises(compat.CheckpointError, match=r"missing linear\.bias; missing linear\.weight; unknown surplus"):
        compat.load_state(other, state)


PARAMETERS = [  # features, classes, D, P, heads, deep sets, attention, VHGAE (the released sizes; section 3)
    (1433, 7, 256, 128, 4, 937_922, 1_235_344, 1_427_764),
    (3703, 6, 512, 256, 8, 4_152_828, 5_777_166, 6_116_592),
    (16, 7, 64, 64, 1, 40_752, 37_392, 68_962),
    (100, 40, 512, 128, 8, 2_270_106, 2_056_914, 4_264_650),
]


@pytest.mark.parametrize(("features", "classes", "d", "p", "heads", "sets", "attention", "generator"), PARAMETERS)
def test_parameter_counts(features, classes, d, p, heads, sets, attention, generator):
    config = EncoderConfig(hidden=d, heads=heads)
    with torch.device("meta"):
        assert compat.released_parameter_count(SetGNN(features, classes, config, p)) == sets
        pma = EncoderConfig(hidden=d, heads=heads, attention=True)
        assert compat.released_parameter_count(SetGNN(features, classes, pma, p)) == attention
        assert compat.released_parameter_count(VHGAE(features, config)) == generator


def test_a_generated_view_is_the_weighted_one(h):
    torch.manual_seed(0)
    x, full = torch.randn(7, 3, dtype=torch.float64), h.with_singletons()
    model = SetGNN(3, 2, EncoderConfig(hidden=4), 4).double().eval()
    keep = (torch.rand(full.num_memberships) < 0.5).double()
    keep[full.num_real :] = 1
    view = steps.generated_view(full, x, keep)
    torch.testing.assert_close(model.project(x, view.hypergraph), model.project(x, full, keep))
