"""CIL-QUD: class-incremental learning with queried unlabeled data, standard and robust (RCIL-QUD).

The objective is in `objective`, its worst cases in `robust`, the query in `query`, the protocol in `protocol`; `streams`
and `session` make the batches of a task, `methods` the loss of a step, `train` the loop; `baselines` and `decisions` are
what CIL-QUD is compared with, `pools` the unlabeled images, `compat` the released checkpoints.
"""

from tenfold_cilqud.anchors import class_means, herding, k_center, nearest_mean
from tenfold_cilqud.compat import CheckpointError, load_official_checkpoint, load_official_state, to_official
from tenfold_cilqud.models import IncrementalNet, PreActResNet, SmallNet, create_model, model_names
from tenfold_cilqud.objective import (
    Answered,
    Labelled,
    Weights,
    balanced_term,
    batch_composition,
    consistency,
    distillation_terms,
    feature_transfer,
    first_task_terms,
    knowledge_distillation,
    random_term,
    transfer_term,
)
from tenfold_cilqud.protocol import Summary, class_order, summarise_matrix
from tenfold_cilqud.query import Query, approximate_query, query
from tenfold_cilqud.robust import (
    Robust,
    labelled_attack,
    rft_attack,
    rkd_attack,
    rtc_attack,
    rtc_term,
    worst_cases,
)

__all__ = [
    "Answered",
    "CheckpointError",
    "IncrementalNet",
    "Labelled",
    "PreActResNet",
    "Query",
    "Robust",
    "SmallNet",
    "Summary",
    "Weights",
    "approximate_query",
    "balanced_term",
    "batch_composition",
    "class_means",
    "class_order",
    "consistency",
    "create_model",
    "distillation_terms",
    "feature_transfer",
    "first_task_terms",
    "herding",
    "k_center",
    "knowledge_distillation",
    "labelled_attack",
    "load_official_checkpoint",
    "load_official_state",
    "model_names",
    "nearest_mean",
    "query",
    "random_term",
    "rft_attack",
    "rkd_attack",
    "rtc_attack",
    "rtc_term",
    "summarise_matrix",
    "to_official",
    "transfer_term",
    "worst_cases",
]
