"""What of a checkpoint's recipe is to be otherwise when it is evaluated; the fields are those of the recipe's own options."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenfold_shared.cli import as_trained, given

from .signals import Corruption, DataConfig, DataName
from .solvers import FitOptions, Solver, Support


@dataclasses.dataclass
class OtherData:
    """What is to differ from the data that a checkpoint was trained on; None: nothing. Another set, or that of an authors'
    checkpoint, begins at the defaults of training.
    """

    name: DataName | None = None
    """The data set; photographs for an authors' checkpoint."""
    root: Path | None = None
    """Its folder."""
    download: bool = False
    """Fetch the data set when it is not there and may be fetched."""
    size: int | None = None
    """Samples along each axis to which a signal is brought; 0 leaves it as it comes."""
    patch: int | None = None
    """Side of the patches that images are cut into; 0 takes whole images."""
    train_subset: int | None = None
    """Signals that were learned from, of which some solvers take a prior."""
    test_subset: int | None = None
    """Images, phantoms or shapes to code."""
    views: int | None = None
    """Views of the tomograph, both ends of the half turn among them."""
    category: str | None = None
    """ShapeNet category (synset)."""
    validation: bool | None = None
    """Code signals held out from the training set in the place of the test set."""
    fraction: float | None = None
    """Part of a signal's samples that is observed, drawn at random."""
    test_views: int | None = None
    """Views that are observed in tomography; 0: all."""
    corruption: Corruption | None = None
    """What is done to the images that are coded."""


@dataclasses.dataclass
class OtherFit:
    """What is to differ from the recipe that a checkpoint was trained by; None: nothing. The fields are those of FitOptions."""

    solver: Solver | None = None
    """ridge, map, omp, fista, irls, huber, admm, adam or gate; ridge for an authors' checkpoint."""
    support: Support | None = None
    """Atoms that may take part: those the gate picks, or all."""
    penalty: float | None = None
    """λ of the ridge or l1 term, or the noise variance of map."""
    atoms: int | None = None
    """Atoms that omp chooses."""
    steps: int | None = None
    """Iterations of the iterative solvers, of networks and of latent vectors."""
    lr: float | None = None
    """Their step size."""


def data_of(about: Mapping[str, Any], asked: OtherData) -> DataConfig:
    """The data of a checkpoint's training, changed in what is asked for; another data set begins at its defaults."""
    return as_trained(DataConfig, about.get("data", {}), asked)


def fit_of(about: Mapping[str, Any], asked: OtherFit) -> FitOptions:
    """How a checkpoint's recipe has codes found, changed in what is asked for."""
    return FitOptions(**{**about.get("fit", {}), **given(asked)})
