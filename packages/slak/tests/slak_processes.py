"""What the tests start in processes of their own; importable, so that a new process finds it."""

import contextlib
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tenfold_shared.run import RunOptions
from tenfold_slak.evaluate import EvalConfig, evaluate
from tenfold_slak.masks import initial_masks
from tenfold_slak.sparse import CosinePruneRate, DynamicSparseTraining


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(),
        nn.Linear(12, 3),
    )  # fmt: skip


def batch(seed: int = 0, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 2, 4, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def train_as_rank(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(minutes=4))
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(network())
    # Each rank draws its own masks and its own growth: rank 0's must win both times.
    masks = initial_masks(model, 0.5, "uniform", seed=rank)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparse = DynamicSparseTraining(model, masks, optimizer, CosinePruneRate(0.4, 40), 1, "random", seed=rank)
    for step in range(3):
        x, y = batch(10 * step + rank)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        sparse.step()
        optimizer.zero_grad()
    torch.save({"masks": sparse.masks, "model": model.module.state_dict()}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def evaluate_as_rank(rank: int, folder: str, checkpoints: list[str]) -> None:
    """Evaluate checkpoints as one of two processes; what it prints goes to a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # the store is used
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(minutes=4))
    with (Path(folder) / f"rank{rank}.txt").open("w") as file, contextlib.redirect_stdout(file):
        for checkpoint in checkpoints:
            evaluate(EvalConfig(Path(checkpoint)), RunOptions(output=Path(folder), device="cpu", quiet=True))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo's that lets go of its last tensor late would abort an interpreter that shuts down
