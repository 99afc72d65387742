"""The query and the audit as tools of their own, on any folder of images (section 11)."""

import base64
import dataclasses
import io
import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tenfold_cilqud.data import NORMALISATION, ClassData, DataConfig, load_data
from tenfold_cilqud.evaluate import load_checkpoint
from tenfold_cilqud.pools import SOURCES, PoolConfig, find_duplicates, open_pool, read_excluded
from tenfold_cilqud.query import Metric, Order
from tenfold_cilqud.query import query as run_query
from tenfold_cilqud.session import features_of, pool_features
from tenfold_shared.checkpoint import write_json, write_text
from tenfold_shared.errors import UserError
from tenfold_shared.report import figure_style
from tenfold_shared.run import Run, RunOptions

SHOWN = 20  # anchors on a contact sheet


@dataclasses.dataclass
class QueryTool:
    """A query outside of training."""

    checkpoint: Path
    """The network whose features are compared: a run's folder, or a file of ours or of the released layout, whose images
    are normalised as the CIFAR is that has as many classes."""
    anchors: Path
    """Folder of the images that ask."""
    pool: Path
    """Folder of the images that are asked for."""
    per_anchor: int = 8
    """Neighbours of an anchor."""
    metric: Metric = "l2"
    """Distance of the features."""
    order: Order = "stored"
    """Anchors one after the other (by file name), or one image a round."""
    into: Path = Path("query")
    """Folder for the indices, distances and the contact sheet."""

    def __post_init__(self) -> None:
        """Refuse an empty query."""
        if self.per_anchor < 1:
            raise UserError(f"--per_anchor takes 1 or more, got {self.per_anchor}")


def query(tool: QueryTool, options: RunOptions) -> None:
    """Write ``query.json`` (what was taken, by whom, from how far) and ``query.html`` (each anchor and its images)."""
    net, about = load_checkpoint(tool.checkpoint)
    if "mean" not in about and about["in_channels"] == 3:  # a released one, which saw CIFAR with as many classes
        normal = NORMALISATION.get(f"cifar{net.tasks * net.classes_per_task}", ((0.0,), (1.0,)))
        net, about = load_checkpoint(tool.checkpoint, *normal)
    shape = tuple(about.get("shape", (about.get("in_channels", 3), 32, 32)))
    anchors, pool = (SOURCES["folder"](str(folder), _only_shape(shape), 0) for folder in (tool.anchors, tool.pool))
    with Run.evaluation("cilqud", options) as run:
        net = net.to(run.device)
        images = anchors[torch.arange(len(anchors))]
        found = run_query(
            features_of(net, images), pool_features(net, pool), tool.per_anchor, metric=tool.metric, order=tool.order
        )
    content = {
        "anchors": str(tool.anchors),
        "pool": pool.provenance,
        "indices": found.indices.tolist(),
        "anchor": found.anchor.tolist(),
        "squared_distance": found.distance.tolist(),
    }
    write_json(tool.into / "query.json", content)
    rows = [(images[i], pool[found.indices[found.anchor == i]]) for i in range(min(SHOWN, len(images)))]
    write_text(tool.into / "query.html", _page(rows, f"{len(found.indices)} of {len(pool)} images queried"))
    print(f"{len(found.indices)} of {len(pool)} images taken by {len(anchors)} anchors; {tool.into / 'query.html'}")


def _only_shape(shape: tuple[int, ...]) -> ClassData:
    nothing = torch.zeros(0, *shape, dtype=torch.uint8)
    return ClassData([nothing], [nothing], [nothing], [nothing], (0,), ("",), 1, (0.0,), (1.0,))


def _page(rows: list[tuple[Tensor, Tensor]], title: str) -> str:
    from tenfold_cilqud.figures import contact_sheet  # noqa: PLC0415 - plotting is slow to import

    stream = io.BytesIO()
    with figure_style():
        contact_sheet(rows).savefig(stream, format="png", dpi=120, bbox_inches="tight", facecolor="white")
    uri = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1><img src="{uri}" alt="{title}">\n'
    )


@dataclasses.dataclass
class AuditTool:
    """A pool against a test set."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The data set whose test images are looked for."""
    pool: PoolConfig = dataclasses.field(default_factory=PoolConfig)
    """The pool."""
    show: Literal["count", "indices"] = "count"
    """Print how many were found, or their pool indices, one a line, for --pool.exclude."""

    def __post_init__(self) -> None:
        """Hold back what the pool says."""
        self.data = self.pool.holding_back(self.data)


def audit(tool: AuditTool, options: RunOptions) -> None:
    """Count the test images in a pool, by hash and, with --pool.near, by distance."""
    data = load_data(tool.data, options.seed)
    source = dataclasses.replace(tool.pool, duplicates="keep", exclude=None)  # so that indices count its images
    pool = open_pool(source, data, options.seed, download=tool.data.download)
    found = find_duplicates(pool, torch.cat(list(data.test)), tool.pool.near)
    excluded = read_excluded(tool.pool.exclude, len(pool))
    if excluded is not None:
        found = found[~torch.isin(found, excluded)]
    if tool.show == "indices":
        print("\n".join(map(str, found.tolist())))
        return
    print(json.dumps({"pool": len(pool), "provenance": pool.provenance, "test_images_in_it": len(found)}))
