"""One call from a trained network to a file for deployment: merge, then ONNX or torch.export, and compare."""

import copy
import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from tenfold_slak.layer import Form, LargeKernel, merge_large_kernels


def _merged_copy(model: nn.Module, form: Form | None) -> nn.Module:
    twin = copy.deepcopy(model).eval()
    return twin if form is None else merge_large_kernels(twin, form)


@torch.no_grad()
def branch_scores(model: nn.Module, images: Tensor) -> Tensor:
    """What the network says in eval mode when every branch and its norm are computed as they are, without folding.

    Args:
        model: left as it is.
        images: a batch.

    """
    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        if isinstance(module, LargeKernel):
            module.training = True  # its own flag alone, so that it sums its branches; their norms stay in eval mode
    return twin(images)


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
) -> Tensor:
    """Write the merged network as ONNX, free in the batch size.

    Args:
        model: left as it is; a merged copy is exported.
        example: images of the size to export for.
        path: of the file.
        form: of the merge; None leaves the branches and their norms.
        opset: of ONNX.

    Returns:
        The scores of the example: the file's where onnxruntime is installed, else those of the copy it was made of.

    """
    twin = _merged_copy(model, form)
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    with warnings.catch_warnings():
        # The tracing exporter works without onnxscript and says at each call that another one exists.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            twin, (example,), str(path), input_names=["images"], output_names=["logits"],
            dynamic_axes=axes, opset_version=opset, dynamo=False,
        )  # fmt: skip
    if not onnx_runs():
        with torch.no_grad():
            return twin(example)
    import onnxruntime  # noqa: PLC0415 - not one of the dependencies

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": example.numpy()})[0])


def onnx_runs() -> bool:
    """Whether what runs ONNX files is installed."""
    return importlib.util.find_spec("onnxruntime") is not None
