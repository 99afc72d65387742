"""Tasks on one network shared out over processes: each takes the next task as soon as it is free."""

import itertools
import multiprocessing
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from tenfold_grafting.graph import Graph

GPU_JOBS = 4
"""Processes that keep a GPU busy: while one waits for its next kernel, another computes."""


def job_count(jobs: int, device: torch.device) -> int:
    """How many processes: as asked, or for 0 one for each thread that this process may use, or `GPU_JOBS` on a GPU."""
    return jobs or (GPU_JOBS if device.type == "cuda" else torch.get_num_threads())


class _Worker:
    """A process of the pool, with the graph that its tasks are about."""

    graph: Graph

    @classmethod
    def start(cls, graph: bytes, device: str) -> None:
        torch.set_num_threads(1)
        loaded: Graph = pickle.loads(graph)
        cls.graph = loaded.to(loaded.dtype, torch.device(device))

    @classmethod
    def call(cls, task: bytes) -> bytes:
        function, arguments = pickle.loads(task)
        return pickle.dumps(function(cls.graph, *arguments))


def over_processes(
    function: Callable[..., Any], graph: Graph, tasks: Iterable[tuple[Any, ...]], jobs: int = 0
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(task, function(graph, *task)) for every task, in the order in which they are done.

    With one process, everything happens in this one. Otherwise every process has one thread, a copy of the graph on its
    device, and tasks and results travel as bytes: a tensor in shared memory would need a file descriptor each.

    Args:
        function: importable by name.
        graph: what the tasks are about.
        tasks: the function's other arguments; tensors on the CPU.
        jobs: see `job_count`.

    """
    jobs = job_count(jobs, graph.device)
    left = iter(tasks)
    first = list(itertools.islice(left, 2))
    left = itertools.chain(first, left)
    if jobs == 1 or len(first) < 2:
        for task in left:
            yield task, function(graph, *task)
        return
    plain = pickle.dumps(graph.to(graph.dtype, torch.device("cpu")))
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, context, _Worker.start, (plain, str(graph.device)))
    waiting: dict[Future, tuple[Any, ...]] = {}
    try:
        while True:
            for task in itertools.islice(left, jobs + 2 - len(waiting)):  # two in reserve, and no more in memory
                waiting[pool.submit(_Worker.call, pickle.dumps((function, task)))] = task
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), pickle.loads(future.result())
    except BaseException:  # an interruption too: nobody waits for the images that are being decided
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
