"""The paper's data sets in their published layouts (section 5), and the embedded default.

Under the data root they lie as published: ``cocitation/cora/{features,hypergraph,labels}.pickle`` (HyperGCN's repository),
``zoo/zoo.content`` and ``zoo/zoo.edges``, ``house-committees/{node-labels,hyperedges}-house-committees.txt`` (Cornell),
``yelp/yelp_restaurant_{...}.csv``.
"""

import contextlib
import csv
import dataclasses
import math
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tenfold_hypergcl.attacks import from_poisoned_pairs, remove_by_degree, remove_random
from tenfold_hypergcl.fairness import nearest_others, rescale
from tenfold_hypergcl.hypergraph import Hypergraph, HypergraphError, check_features, check_labels
from tenfold_hypergcl.propagate import Features, SparseFeatures
from tenfold_hypergcl.protocol import Split, numbered_split, stratified_split
from tenfold_shared.download import SCIPY_GLOBALS, data_root, missing, restricted_pickle_load
from tenfold_shared.errors import UserError

PICKLED = ("cocitation/cora", "cocitation/citeseer", "cocitation/pubmed", "coauthorship/cora", "coauthorship/dblp")
CONTENT = ("zoo", "20newsW100", "Mushroom", "NTU2012", "ModelNet40")
CORNELL = {"house-committees": 2, "walmart-trips": 11}
HYPERGCN_URL = "https://github.com/malllabiisc/HyperGCN/tree/master/data"
CORNELL_URL = "https://www.cs.cornell.edu/~arb/data/"
BUNDLE_URL = "https://github.com/jianhao2016/AllSet (data/raw_data)"
MD5 = {
    "cocitation/cora": {
        "features.pickle": "28feb3207d34f65848becf8c33a5d703",
        "hypergraph.pickle": "6f79dcbc63eca2874228e8b0e1b062fd",
        "labels.pickle": "c8c92c44bf9604cd861f33b5d0cb8823",
    },
    "cocitation/citeseer": {
        "features.pickle": "714ada1a2e3980bbdff214b488a30f49",
        "hypergraph.pickle": "a8ad0d50c8b57802148e13fb9052b79c",
        "labels.pickle": "83ca6c9fd20da5ac346f6f10227d63ba",
    },
    "coauthorship/cora": {"hypergraph.pickle": "20039d4c740cba5418fdd1c37d1d65c3"},
}
SPARSE_DENSITY = 0.1
"""Features with fewer non-zero values than this are kept sparse."""

PICKLE_GLOBALS = SCIPY_GLOBALS | {"builtins.set", "__builtin__.set"}
"""All that the published pickles need to name; anything else in a pickle is refused."""


@dataclass(frozen=True)
class FairTable:
    """The columns of a fairness data set's table."""

    sensitive: str
    label: str
    drop: tuple[str, ...] = ()


FAIR = {
    "german": FairTable("Gender", "GoodCustomer", ("OtherLoansAtStore", "PurposeOfLoan")),
    "bail": FairTable("WHITE", "RECID"),
    "credit": FairTable("Age", "NoDefaultNextMonth", ("Single",)),
}


@dataclass(frozen=True)
class Dataset:
    """A hypergraph with singletons, the nodes' features and labels (-1 = none)."""

    name: str
    hypergraph: Hypergraph
    x: Features
    labels: Int[Tensor, "nodes"]
    num_classes: int
    sensitive_column: int | None = None

    def to(self, device: torch.device | str) -> "Dataset":
        """The data set on another device."""
        return Dataset(
            self.name,
            self.hypergraph.to(device),
            self.x.to(device),
            self.labels.to(device),
            self.num_classes,
            self.sensitive_column,
        )


def make_dataset(
    name: str,
    hypergraph: Hypergraph,
    features: Any,
    labels: Any,
    singletons: str = "all",
    sensitive_column: int | None = None,
) -> Dataset:
    """A data set of any hypergraph (without singletons), float features ``[nodes, features]`` and integer labels, all checked.

    Raises:
        HypergraphError: for features or labels of another length or with values that are not finite, for no label at all, and for a
            sensitive column that is none.
    """
    table, classes_of = np.asarray(features), np.asarray(labels)
    if table.ndim != 2 or classes_of.ndim != 1:
        raise HypergraphError(
            f"Features of shape {table.shape} and labels of shape {classes_of.shape}: they are [nodes, features] and [nodes]."
        )
    if table.dtype.kind not in "iufb":
        raise HypergraphError(f"Features are numbers, not {table.dtype}.")
    if classes_of.dtype.kind not in "iufb" or not np.array_equal(classes_of, np.trunc(classes_of)):
        raise HypergraphError(
            "Labels are whole numbers, the classes from 0, and -1 for none: number the classes first."
        )
    x, y = torch.as_tensor(table, dtype=torch.float32), torch.as_tensor(classes_of).long()
    check_features(x, hypergraph.num_nodes)
    classes = check_labels(y, hypergraph.num_nodes)
    if sensitive_column is not None:
        check_sensitive(x, sensitive_column, classes)
    sparse = x.numel() > 0 and float((x != 0).float().mean()) < SPARSE_DENSITY
    kept: Features = SparseFeatures.from_dense(x) if sparse else x
    return Dataset(name, hypergraph.with_singletons(singletons), kept, y, classes, sensitive_column)


def check_sensitive(features: Float[Tensor, "nodes features"], column: int, classes: int) -> None:
    """Refuse a sensitive column that is not there or not 0 and 1, and more or fewer than two classes: fairness is of binary predictions."""
    if not 0 <= column < features.shape[1]:
        raise HypergraphError(f"The sensitive column is {column}, and the features have {features.shape[1]} columns.")
    other = [value for value in torch.unique(features[:, column]).tolist() if value not in (0, 1)]
    if other:
        raise HypergraphError(f"The sensitive column {column} has the value {other[0]:g}: its groups are 0 and 1.")
    if classes != 2:
        raise HypergraphError(f"With a sensitive column labels are 0 and 1, but there are {classes} classes.")


def digits(neighbors: int = 5) -> Dataset:
    """The embedded default: scikit-learn's 1797 handwritten digits, one hyperedge of each image and its nearest others.

    It is real data, but not a data set of the paper; k = 5 with the image itself, as ModelNet40 and NTU2012 have it.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow to import

    bundle = load_digits()
    features = (bundle.data / 16).astype(np.float32)
    h = Hypergraph.from_nearest_neighbors(features, neighbors)
    return make_dataset("digits", h, features, bundle.target)


def _require(path: Path, name: str, source: str) -> Path:
    if not path.is_file():
        raise missing(name, source, str(path))
    return path


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Whatever a damaged or foreign file makes its reader raise, as one sentence that names the file."""
    try:
        yield path
    except UserError:
        raise
    except (OSError, EOFError, LookupError, TypeError, ValueError, csv.Error, zipfile.BadZipFile, MemoryError) as error:
        said = " ".join(str(error).split())[:120]
        raise HypergraphError(
            f"{path} is damaged or not what it should be ({said}): write or fetch it again."
        ) from error


def load_pickled(root: Path, name: str) -> Dataset:
    """A co-citation or co-authorship set: ``features.pickle`` (scipy CSR), ``hypergraph.pickle`` (name -> node ids, in order),
    ``labels.pickle`` (list).

    The pickles are read by an unpickler that only knows arrays, sparse matrices and sets; any other content is refused.
    """
    parts = {}
    for part in ("features", "hypergraph", "labels"):
        path = _require(root / name / f"{part}.pickle", name, HYPERGCN_URL)
        parts[part] = restricted_pickle_load(path, PICKLE_GLOBALS, "latin1")
    with _reading(root / name / "features.pickle"):
        features = parts["features"].toarray()
    with _reading(root / name / "hypergraph.pickle"):
        h = Hypergraph.from_hyperedges(map(sorted, parts["hypergraph"].values()), len(features))
    return make_dataset(name, h, features, np.asarray(parts["labels"]))


def load_content(root: Path, name: str) -> Dataset:
    """A set of ``NAME.content`` (rows ``id f1..fF label``, hyperedges' dummy rows after the nodes') and ``NAME.edges`` (node, hyperedge)."""
    content = _require(root / name / f"{name}.content", name, BUNDLE_URL)
    edges = _require(root / name / f"{name}.edges", name, BUNDLE_URL)
    with _reading(content):
        cells = [line.split() for line in content.read_text(encoding="utf-8").splitlines() if line.strip()]
        ids = {int(float(row[0])): i for i, row in enumerate(cells)}
        rows = np.asarray([row[1:] for row in cells], dtype=np.float64).reshape(len(cells), -1)
    with _reading(edges):
        pairs = np.loadtxt(edges, dtype=np.int64, ndmin=2).reshape(-1, 2)
    unknown = [int(key) for key in np.unique(pairs) if int(key) not in ids]
    if unknown:
        raise HypergraphError(f"{edges} names {unknown[0]}, which {content} does not list.")
    mapped = np.vectorize(ids.__getitem__)(pairs)
    nodes = int(mapped[:, 1].min())
    if int(mapped[:, 0].max()) >= nodes:
        raise HypergraphError(f"{edges}: hyperedges must come after all nodes in {content}.")
    incidence = torch.from_numpy(np.stack([mapped[:, 0], mapped[:, 1] - nodes]))
    labels = rows[:nodes, -1]
    return make_dataset(name, Hypergraph.from_incidence(incidence, nodes), rows[:nodes, :-1], labels - labels.min())


def load_cornell(root: Path, name: str, feature_noise: float = 1.0, seed: int = 0, columns: int = 100) -> Dataset:
    """House-committees or walmart-trips: features are one-hot labels padded to 100 columns plus N(0, ``feature_noise``) noise.

    The paper's noise was drawn once and not recorded; ``seed`` fixes ours.
    """
    labels_file = _require(root / name / f"node-labels-{name}.txt", name, CORNELL_URL)
    edges_file = _require(root / name / f"hyperedges-{name}.txt", name, CORNELL_URL)
    with _reading(labels_file):
        labels = np.loadtxt(labels_file, dtype=np.int64, ndmin=1)
        labels = labels - labels.min()
    with _reading(edges_file):
        lines = edges_file.read_text(encoding="utf-8").splitlines()
        hyperedges = [[int(node) - 1 for node in line.replace(",", " ").split()] for line in lines if line.strip()]
    features = np.zeros((labels.size, max(columns, int(labels.max()) + 1)), dtype=np.float32)
    features[np.arange(labels.size), labels] = 1
    features += np.random.default_rng(seed).standard_normal(features.shape, dtype=np.float32) * np.float32(
        feature_noise
    )
    return make_dataset(name, Hypergraph.from_hyperedges(map(set, hyperedges), labels.size), features, labels)


def load_yelp(root: Path, words: int = 1000) -> Dataset:
    """Yelp restaurants: ``yelp_restaurant_{latlong,locations,name,business_stars,incidence_H}.csv``.

    Features: latitude and longitude, one-hot state and city, the ``words`` most common words of the names; labels: the star bins.
    """
    from sklearn.feature_extraction.text import CountVectorizer  # noqa: PLC0415 - slow to import

    folder, prefix = root / "yelp", "yelp_restaurant_"

    def columns(part: str, count: int, kind: type) -> np.ndarray:
        """The last ``count`` columns of a part, below its header."""
        with _reading(_require(folder / f"{prefix}{part}.csv", "yelp", BUNDLE_URL)) as path:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row[-count:] for row in list(csv.reader(file))[1:]]
            return np.asarray(rows, dtype=kind).reshape(len(rows), count)

    latlong = columns("latlong", 2, np.float32)
    places = columns("locations", 2, str)
    one_hot = []
    for column in (1, 0):  # state, then city
        _, ids = np.unique(places[:, column], return_inverse=True)
        one_hot.append(np.eye(ids.max() + 1, dtype=np.float32)[ids])
    names = columns("name", 1, str)[:, 0]
    counts = (
        CountVectorizer(max_features=words, stop_words="english", strip_accents="ascii").fit_transform(names).toarray()
    )
    _, labels = np.unique(columns("business_stars", 1, np.float64)[:, 0], return_inverse=True)
    pairs = columns("incidence_H", 2, np.float64).astype(np.int64) - 1
    features = np.concatenate([latlong, *one_hot, counts.astype(np.float32)], axis=1)
    return make_dataset(
        "yelp", Hypergraph.from_incidence(torch.from_numpy(pairs.T.copy()), len(names)), features, labels
    )


def load_fair(root: Path, name: str) -> Dataset:
    """German, bail or credit from its ``NAME.csv``: features min-max scaled to [-1, 1] but for the sensitive column, and the
    hypergraph of the five nearest others (section 5).
    """
    rule = FAIR[name]
    source = "https://github.com/weitianxin/HyperGCL (data/fair_data)"
    with _reading(_require(root / name / f"{name}.csv", name, source)) as path:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = [key for key in rows[0] if key not in (rule.label, *rule.drop)]
        if rule.label not in rows[0] or not any(key.startswith(rule.sensitive) for key in columns):
            raise HypergraphError(f"{path} lacks the column {rule.label!r} or {rule.sensitive!r}.")
        sensitive = next(i for i, key in enumerate(columns) if key.startswith(rule.sensitive))
        raw = np.asarray([[_number(row[key], key == columns[sensitive]) for key in columns] for row in rows])
        labels = np.asarray([int(float(row[rule.label])) for row in rows]).clip(0)
    return make_fair(name, rescale(raw, sensitive), labels, sensitive)


def _number(text: str, sensitive: bool) -> float:
    try:
        return float(text)
    except ValueError:
        if sensitive:
            return float(text.strip().lower() == "female")
        raise


def make_fair(name: str, scaled: np.ndarray, labels: np.ndarray, sensitive_column: int) -> Dataset:
    """A fairness data set from features that are scaled already: the hypergraph of the five nearest others is built here."""
    h = Hypergraph.from_incidence(torch.from_numpy(nearest_others(scaled)), len(scaled), len(scaled))
    return make_dataset(name, h, scaled, labels, sensitive_column=sensitive_column)


def load_npz(path: Path) -> Dataset:
    """Any hypergraph from an ``.npz``: ``node`` and ``hyperedge`` (memberships), ``label`` and ``features`` - dense, or as
    ``feat_{indptr,indices,data,shape}`` of a CSR matrix. Without memberships, but with ``sensitive_column``, the fairness rule makes them.
    """
    with _reading(path):
        if not zipfile.is_zipfile(path):
            raise HypergraphError(f"{path} is no .npz archive of arrays: write it with numpy.savez.")
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)

        def array(name: str) -> np.ndarray:
            if name not in arrays:
                raise HypergraphError(f"{path} lacks the array {name!r}.")
            return arrays[name]

        if "feat_shape" in arrays:
            csr = (array("feat_data"), array("feat_indices"), array("feat_indptr"))
            features = scipy.sparse.csr_matrix(csr, shape=tuple(arrays["feat_shape"])).toarray()
        else:
            features = array("features")
        labels = array("label")
        if labels.ndim != 1:
            raise HypergraphError(f"{path}: 'label' has shape {labels.shape}, not [nodes].")
        sensitive = int(arrays["sensitive_column"]) if "sensitive_column" in arrays else None
        if "node" not in arrays and sensitive is not None:
            return make_fair(path.stem, features.astype(np.float64), labels, sensitive)
        pairs = np.stack([array("node"), array("hyperedge")])
        if pairs.dtype.kind not in "iu":
            raise HypergraphError(f"{path}: 'node' and 'hyperedge' are whole numbers, not {pairs.dtype}.")
        incidence = torch.from_numpy(pairs.astype(np.int64))
    h = Hypergraph.from_incidence(incidence, len(labels))
    return make_dataset(path.stem, h, features, labels, sensitive_column=sensitive)


def names() -> list[str]:
    """All names that :func:`load` knows."""
    return ["digits", *PICKLED, *CONTENT, *CORNELL, "yelp", *FAIR]


def load(name: str, root: Path, feature_noise: float = 1.0) -> Dataset:
    """The data set ``name`` from ``root``, or any ``.npz`` file of one.

    Raises:
        UserError: if a file is missing (the message says where to get it and where to put it), or its pickle is damaged or names code.
        HypergraphError: if a file is damaged, or the name is unknown.
    """
    if name.endswith(".npz"):
        return load_npz(_require(Path(name), name, "its maker"))
    if name == "digits":
        return digits()
    if name in PICKLED:
        return load_pickled(root, name)
    if name in CONTENT:
        return load_content(root, name)
    if name in CORNELL:
        return load_cornell(root, name, feature_noise)
    if name == "yelp":
        return load_yelp(root)
    if name in FAIR:
        return load_fair(root, name)
    raise HypergraphError(f"There is no data set {name!r}; there are {', '.join(names())}, and any .npz file.")


@dataclass
class DataConfig:
    """Which hypergraph, how it is prepared, and which of its nodes have labels."""

    name: str = "digits"
    """The data set by name (cocitation/cora, zoo, german ...), or any .npz of a hypergraph."""
    root: Path | None = None
    """Folder that holds the data sets; default: $TENFOLD_DATA or the platform's cache."""
    label_rate: float = 0.1
    """Share of the labelled nodes that training sees (of each class, for the fairness sets)."""
    split_seed: int = 123
    """Seed of the list of splits."""
    split: int | None = None
    """Number of the split in the list; default: the run's seed. (The released fairness runs all use split 1, only their seeds differ.)"""
    singletons: Literal["all", "missing"] = "all"
    """Singleton hyperedges for all nodes (HyperGCL), or for those without a hyperedge of size 1 (AllSet)."""
    feature_noise: float = 1.0
    """Standard deviation of the noise that is the Cornell sets' features."""
    attack: Literal["none", "minmax", "net", "remove", "degree"] = "none"
    """Poisoned structure, for training and test: a released pair list, random removal, or removal by degree."""
    attack_ratio: float = 0.1
    """Share of the memberships that the removing attacks take."""

    def __post_init__(self) -> None:
        """Refuse rates that are none."""
        for name in ("label_rate", "attack_ratio"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise UserError(f"--data.{name} is a share between 0 and 1, got {value}")
        if not 0 <= self.feature_noise < math.inf:
            raise UserError(f"--data.feature_noise takes 0 or more, got {self.feature_noise}")
        if self.split is not None and self.split < 0:
            raise UserError(f"--data.split counts from 0, got {self.split}")


def load_data(config: DataConfig) -> Dataset:
    """The data set of a configuration, poisoned where it asks for it; removal at random is drawn from the global generator."""
    root = data_root() if config.root is None else config.root
    loaded = load(config.name, root, config.feature_noise)
    h = loaded.hypergraph
    if config.attack == "remove":
        h = remove_random(h, config.attack_ratio)
    elif config.attack == "degree":
        h = remove_by_degree(h, config.attack_ratio)
    elif config.attack != "none":
        pairs = read_pairs(root, config.name, config.attack)
        h = from_poisoned_pairs(pairs, h.num_nodes, h.num_real_hyperedges)
    elif config.singletons == "all":
        return loaded
    return dataclasses.replace(loaded, hypergraph=h.without_singletons().with_singletons(config.singletons))


def read_pairs(root: Path, name: str, attack: str) -> Int[Tensor, "a b"]:
    """The released poisoned star expansion of a data set: the array ``pairs`` of ``attack/NAME_ATTACK_pairs.npz`` below the root,
    NAME without the folder (``cora`` for ``cocitation/cora``).
    """
    source = "https://github.com/weitianxin/HyperGCL (data/attack_data), as the array 'pairs' of an .npz"
    path = _require(root / "attack" / f"{Path(name).stem}_{attack}_pairs.npz", f"{name} under {attack}", source)
    with _reading(path), np.load(path, allow_pickle=False) as file:
        if "pairs" not in file.files:
            raise HypergraphError(f"{path} lacks the array 'pairs'.")
        return torch.from_numpy(file["pairs"].astype(np.int64))


def split_of(config: DataConfig, data: Dataset, seed: int) -> Split:
    """The split of the data set's list that the configuration or else the run's seed says: stratified for the fairness sets, else the
    paper's (section 5).
    """
    number = seed if config.split is None else config.split
    if number < 0:
        raise UserError(
            f"--seed is the number of the split too and counts from 0, got {seed}: name one with --data.split"
        )
    try:
        if data.sensitive_column is not None:
            generator = torch.Generator().manual_seed(config.split_seed + number)
            split = stratified_split(data.labels.cpu(), config.label_rate, generator)
        else:
            split = numbered_split(data.labels, config.label_rate, number, config.split_seed)
    except ValueError as error:
        raise UserError(f"--data.label_rate: {error}") from error
    for part in ("train", "valid", "test"):
        if getattr(split, part).numel() == 0:
            labelled = int((data.labels >= 0).sum())
            raise UserError(
                f"--data.label_rate {config.label_rate} leaves no {part} node among the {labelled} labelled ones of "
                f"{data.name}: choose another rate"
            )
    absent = sorted(set(data.labels[data.labels >= 0].tolist()) - set(data.labels.cpu()[split.train].tolist()))
    if absent:
        listed = ", ".join(map(str, absent))
        warnings.warn(f"Split {number} of {data.name} has no training node of class {listed}.", stacklevel=2)
    return split
