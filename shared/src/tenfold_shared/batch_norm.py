"""Batch norm over all processes, so that N processes train as one does."""

import torch
from torch import Tensor, nn


class _CrossProcessBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics run over all processes, for devices that torch's own SyncBatchNorm does not serve."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the batch and space of every process together."""
        if not self.training:
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce  # noqa: PLC0415

        dims, shape = [0, *range(2, input.dim())], [1, -1] + [1] * (input.dim() - 2)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))  # under autocast it comes in half precision
        count = wide.new_tensor([input.numel() / input.shape[1]])
        total = all_reduce(torch.cat([wide.sum(dims), count]))
        mean = total[:-1] / total[-1]
        centred = wide - mean.view(shape)  # the mean of squares less the squared mean would cancel
        variance = all_reduce(centred.square().sum(dims)) / total[-1]
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = variance * (total[-1] / (total[-1] - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        normalised = centred * (variance.view(shape) + self.eps).rsqrt()
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)


def synchronise_batch_norm(model: nn.Module, world: int, device: torch.device) -> nn.Module:
    """The model with batch norms whose statistics run over all processes, so that N processes equal one."""
    if world > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if world > 1:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.__class__ = _CrossProcessBatchNorm
    return model
