"""Values of the miniatures' recipes, chosen on what is held out: patches of a training photograph, further phantoms,
shapes and videos. What is tested on is never looked at.

    python studies/choose.py STUDY [--folder runs/studies] [--seeds 1]

Every point of a study's grid is measured; the outcome is written to results/studies/STUDY.json, best point first. The
number of steps is read off the curve, whose maximum is noted, rather than made part of the grid.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from tenfold_nid.recipe import Recipe
from tenfold_nid.reproduce import coded
from tenfold_shared.checkpoint import write_json
from tenfold_shared.cli import load_recipe
from tenfold_shared.run import RunOptions

FEW = {"data.fraction": [0.1]}
SLICES: dict[str, list[Any]] = {"data.test_subset": [4], "fit.steps": [100]}
STUDIES: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "siren": ("photographs-siren", {"fit.lr": [1e-4, 3e-4, 1e-3, 3e-3]}),
    "ffm": ("photographs-ffm", {"fit.lr": [1e-3, 3e-3, 1e-2], "network.ffm_map_scale": [4.0, 8.0, 16.0]}),
    "pe-mlp": ("photographs-pe-mlp", {"fit.lr": [3e-3, 1e-2, 3e-2]}),
    "maml": ("photographs-maml", {"meta.inner_lr": [3e-3, 1e-2, 3e-2], "fit.lr": [3e-3, 1e-2, 3e-2]}),
    "maml-points": ("photographs-maml", {"schedule.chunk_size": [64, 128, 256]}),
    "reptile": ("photographs-reptile", {"meta.inner_lr": [3e-2, 1e-1, 3e-1], "fit.lr": [3e-2, 1e-1, 3e-1]}),
    "latent": ("photographs-latent", {"fit.lr": [0.03, 0.1, 0.3, 1.0]}),
    "nid-train": ("photographs-nid", {"schedule.lr": [3e-4, 1e-3, 3e-3]}),
    "nid-warm": ("photographs-nid", {"fit.lr": [0.003, 0.01, 0.03, 0.1]}),
    "nid-cold": ("photographs-nid", {"fit.support": ["all"], "fit.lr": [0.01, 0.03, 0.1, 0.3]}),
    "nid-ridge": ("photographs-nid", {"fit.solver": ["ridge"], "fit.penalty": [1e-4, 1e-5, 1e-6, 1e-7, 1e-8]}),
    "nid-omp": ("photographs-nid", {"fit.solver": ["omp"]}),
    "pca": ("photographs-pca", {"fit.penalty": [1e-5, 1e-6, 1e-7, 1e-8]}),
    "ksvd": ("photographs-ksvd", {"linear.iterations": [3]}),
    "few-nid-map": ("photographs-nid", {**FEW, "fit.solver": ["map"], "fit.penalty": [1e-2, 1e-3, 1e-4, 1e-5]}),
    "few-nid-ridge": ("photographs-nid", {**FEW, "fit.solver": ["ridge"], "fit.penalty": [1e-2, 1e-3, 1e-4, 1e-5]}),
    "few-pca": ("photographs-pca", {**FEW, "fit.penalty": [1e-3, 3e-4, 1e-4, 3e-5, 1e-5]}),
    "few-siren": ("photographs-siren", {**FEW, "fit.lr": [1e-4, 3e-4, 1e-3], "fit.steps": [100]}),
    "few-ffm": (
        "photographs-ffm",
        {**FEW, "fit.lr": [3e-3, 1e-2, 3e-2], "fit.steps": [300], "network.ffm_map_scale": [0.03, 0.06, 0.125, 0.25]},
    ),
    "few-pe-mlp": (
        "photographs-pe-mlp",
        {**FEW, "fit.lr": [1e-2, 3e-2, 1e-1], "fit.steps": [300], "network.num_freqs": [1, 2]},
    ),
    "few-maml": (
        "photographs-maml",
        {**FEW, "meta.inner_lr": [1e-2, 3e-2], "fit.lr": [1e-2, 3e-2, 1e-1], "fit.steps": [30]},
    ),
    "few-reptile": (
        "photographs-reptile",
        {**FEW, "meta.inner_lr": [1e-2, 3e-2, 1e-1], "fit.lr": [3e-3, 1e-2, 3e-2], "fit.steps": [30]},
    ),
    "few-latent": ("photographs-latent", {**FEW, "fit.lr": [0.03, 0.1, 0.3, 1.0], "fit.steps": [60]}),
    "ct-nid": ("phantoms-nid", {"fit.solver": ["ridge", "map"], "fit.penalty": [1e-4, 1e-5, 1e-6, 1e-7]}),
    "ct-tv": ("phantoms-tv", {"fit.penalty": [1e-3, 3e-4, 1e-4, 3e-5, 1e-5]}),
    "ct-siren": ("phantoms-siren", {**SLICES, "fit.lr": [3e-5, 1e-4, 3e-4]}),
    "ct-ffm": ("phantoms-ffm", {**SLICES, "fit.lr": [1e-3, 3e-3, 1e-2], "network.ffm_map_scale": [4.0, 8.0, 16.0]}),
    "ct-pe-mlp": ("phantoms-pe-mlp", {**SLICES, "fit.lr": [3e-3], "network.num_freqs": [2, 3, 4]}),
    "ct-maml": ("phantoms-maml", {**SLICES, "fit.steps": [20], "fit.lr": [1e-3, 3e-3, 1e-2, 3e-2]}),
    "sdf-nid": ("primitives-nid", {"fit.solver": ["ridge", "map"], "fit.penalty": [1e-1, 1e-2, 1e-3, 1e-4]}),
    "sdf-siren": ("primitives-siren", {"fit.lr": [1e-4, 3e-4, 1e-3], "fit.steps": [60]}),
    "sdf-latent": ("primitives-latent", {"fit.lr": [3e-3, 1e-2, 3e-2], "fit.steps": [100]}),
    "sdf-maml": ("primitives-maml", {"fit.lr": [1e-3, 3e-3, 1e-2], "fit.steps": [10, 30]}),
    "sdf-pca": ("primitives-pca", {"fit.penalty": [1e-6, 1e-7, 1e-8, 1e-9, 1e-10]}),
    "video-nid": ("discs-nid", {"fit.atoms": [1, 2, 4]}),
}
SMALLER_IS_BETTER = ("chamfer",)
EARLY = ("maml", "maml-points", "reptile", "latent")
"""Judged after three steps, as the claims are that they stand beside."""


def measured(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What a point of a grid gave, mean over the seeds: F1 of a video; Chamfer distance of shapes; PSNR, dB, otherwise."""
    if "f1" in runs[0]:
        return {"f1": sum(run["f1"] for run in runs) / len(runs)}
    curve = [sum(step) / len(runs) for step in zip(*([p[2] for p in run["points"]] for run in runs), strict=True)]
    best = runs[0]["points"][curve.index(max(curve))][0]
    found = {"psnr": curve[-1], "best_psnr": max(curve), "best_step": best, "curves": curve}
    steps = [step for step, *_ in runs[0]["points"]]
    if 3 in steps:
        found["psnr_after_3"] = curve[steps.index(3)]
    if "chamfer" in runs[0]:
        found["chamfer"] = sum(run["chamfer"] for run in runs) / len(runs)
    return found


def main() -> None:
    """Measure the points of a study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", choices=[*STUDIES, "all"])
    parser.add_argument("--folder", type=Path, default=Path("runs/studies"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results" / "studies")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    for name in STUDIES if "all" in arguments.studies else arguments.studies:
        recipe_name, grid = STUDIES[name]
        rows = []
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            recipe = load_recipe("tenfold_nid", recipe_name, Recipe, **{"data.validation": True, **point})
            runs = []
            for seed in range(arguments.seeds):
                options = RunOptions(seed=seed, device="cpu", quiet=True, resume=True)
                runs.append(coded(recipe, seed, options, arguments.folder))
            row = {**point, **measured(runs)}
            rows.append(row)
            print(name, json.dumps(row), flush=True)
        metric = "psnr_after_3" if name in EARLY else next(m for m in ("chamfer", "f1", "best_psnr") if m in rows[0])
        rows.sort(key=lambda row: row[metric], reverse=metric not in SMALLER_IS_BETTER)
        outcome = {"recipe": recipe_name, "metric": metric, "seeds": arguments.seeds, "points": rows}
        write_json(arguments.results / f"{name}.json", outcome)


if __name__ == "__main__":
    main()
