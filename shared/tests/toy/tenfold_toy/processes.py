"""What tests start in processes of their own; importable, so that a new process finds it."""

import os
import signal
from pathlib import Path

import torch
from torch import Tensor, nn

from tenfold_shared.batch_norm import synchronise_batch_norm
from tenfold_shared.claims import Arm, Claim, Measurement
from tenfold_shared.run import RunOptions


def killed_in_the_baseline(claim: Claim, arm: Arm, seed: int, *, options: RunOptions, folder: Path) -> Measurement:
    """A measurement whose process does not outlive the baseline, as where memory runs out."""
    if arm.name != claim.method:
        os.kill(os.getpid(), signal.SIGKILL)
    return Measurement(1.0)


def far_from_zero() -> list[Tensor]:
    """Images of a mean that is large for their spread, and some in half precision, as autocast gives them."""
    noise = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return [noise + 1000, (noise + 4).bfloat16()]


def batch_norm_of_half(rank: int, folder: str) -> None:
    """Outputs, gradients and statistics of a batch norm that sees 2 or 4 of 6 samples."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = synchronise_batch_norm(nn.BatchNorm2d(3).double(), 2, torch.device("cpu"))
    inputs = torch.randn(6, 3, 4, 4, dtype=torch.float64)[2 * rank : 2 + 4 * rank].requires_grad_()
    outputs = layer(inputs)
    (outputs * torch.arange(6.0, dtype=torch.float64)[2 * rank : 2 + 4 * rank, None, None, None]).sum().backward()
    torch.save([outputs.detach(), inputs.grad, layer.running_mean, layer.running_var], f"{folder}/{rank}.pt")
    far = [images[2 * rank : 2 + 4 * rank] for images in far_from_zero()]
    layers = [synchronise_batch_norm(nn.BatchNorm2d(3), 2, torch.device("cpu")) for _ in far]
    given = [layer(images).detach() for layer, images in zip(layers, far, strict=True)]
    torch.save([*given, *(layer.running_var for layer in layers)], f"{folder}/far-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo's that lets go of its last tensor late would abort an interpreter that shuts down
