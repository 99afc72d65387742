"""One call from a trained network to a file for deployment: merge, then ONNX or torch.export, and compare."""

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from tenfold_slak.layer import Form, merge_large_kernels


def _merged_copy(model: nn.Module, form: Form | None) -> nn.Module:
    twin = copy.deepcopy(model).eval()
    return twin if form is None else merge_large_kernels(twin, form)


def export_program(model: nn.Module, example: Tensor, form: Form | None = "two") -> torch.export.ExportedProgram:
    """The merged network as a `torch.export` program of plain operators, free in the batch size.

    Args:
        model: left as it is; a merged copy is exported.
        example: images (at least 2) of the size to export for.
        form: of the merge; None leaves the branches and their norms.

    """
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        return torch.export.export(_merged_copy(model, form), (example,), dynamic_shapes=({0: batch},), strict=False)


def export_onnx(
    model: nn.Module, example: Tensor, path: Path | str, form: Form | None = "two", opset: int = 18
) -> float:
    """Write the merged network as ONNX, free in the batch size.

    Args:
        model: left as it is; a merged copy is exported.
        example: images of the size to export for.
        path: of the file.
        form: of the merge; None leaves the branches and their norms.
        opset: of ONNX.

    Returns:
        The largest difference between the outputs of the exported copy and of the model on the example.

    """
    twin = _merged_copy(model, form)
    was_training = model.training
    with torch.no_grad():
        difference = float((twin(example) - model.eval()(example)).abs().max())
    model.train(was_training)
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    with warnings.catch_warnings():
        # The tracing exporter works without onnxscript and says at each call that another one exists.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            twin, (example,), str(path), input_names=["images"], output_names=["logits"],
            dynamic_axes=axes, opset_version=opset, dynamo=False,
        )  # fmt: skip
    return difference
