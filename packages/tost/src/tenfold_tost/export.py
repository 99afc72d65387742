"""What a sparse network saves: a file without its zeros, and convolutions that multiply what is left of them.

The file holds every pruned weight in compressed rows (CSR): the values, their columns, and where each row begins.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tenfold_shared.checkpoint import load_weights, save_weights
from tenfold_shared.errors import UserError
from tenfold_tost.masking import prunable_weights

VALUES, COLUMNS, ROWS = ".csr_values", ".csr_columns", ".csr_rows"
WORTH_IT = 0.5  # below this density compressed rows (4 bytes a value, 2 or 4 a column) are smaller than dense ones


def compact_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The state dict with sparse weights in compressed rows, and the shapes of those weights."""
    pruned = {
        name: weight.detach()
        for name, weight in prunable_weights(model, linear=True).items()
        if int(weight.count_nonzero()) < WORTH_IT * weight.numel()
    }
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name not in pruned:
            tensors[name] = value
            continue
        rows = value.flatten(1)
        csr = rows.to_sparse_csr()
        narrow = torch.int16 if rows.shape[1] < 2**15 else torch.int32
        tensors[name + VALUES] = csr.values()
        tensors[name + COLUMNS] = csr.col_indices().to(narrow)
        tensors[name + ROWS] = csr.crow_indices().to(torch.int32)
    return tensors, {name: list(weight.shape) for name, weight in pruned.items()}


def expand_state(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The dense state dict of `compact_state`.

    Raises:
        UserError: a weight's parts are missing or do not belong together.

    """
    state = {n: t for n, t in tensors.items() if not n.endswith((VALUES, COLUMNS, ROWS))}
    for name, shape in shapes.items():
        try:
            values, columns, rows = (tensors[name + part] for part in (VALUES, COLUMNS, ROWS))
            size = (shape[0], torch.Size(shape[1:]).numel())
            csr = torch.sparse_csr_tensor(rows.long(), columns.long(), values, size, check_invariants=True)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"the compressed rows of {name} are incomplete or damaged ({error})") from error
        state[name] = csr.to_dense().view(shape)
    return state


def save_compact(path: Path, model: nn.Module, **about: object) -> None:
    """Write the compact file, with `about` (of `restore`'s arguments at least `arch`) in its metadata."""
    tensors, shapes = compact_state(model)
    save_weights(path, tensors, {**about, "csr_shapes": shapes})


def load_compact(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The dense state dict of a compact file, and its metadata. Raises UserError for any other file."""
    tensors, about = load_weights(path)
    if "csr_shapes" not in about:
        raise UserError(f"{path} is no compact file: write one with `export`")
    return expand_state(tensors, about.pop("csr_shapes")), about


class SparseConv2d(nn.Module):
    """A convolution as the product of its non-zero weights, in compressed rows, with the patches of the picture.

    Only the patch entries that some filter uses are gathered. For inference: there are no gradients.

    Args:
        conv: with one group and zero padding.

    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        rows = conv.weight.detach().flatten(1)
        self.used: Tensor
        self.register_buffer("used", rows.abs().sum(0).nonzero().flatten())
        self.csr = rows[:, self.used].to_sparse_csr()
        self.bias = None if conv.bias is None else conv.bias.detach().clone()
        self.kernel, self.stride, self.padding, self.dilation = (
            conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        )  # fmt: skip

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs out_h out_w"]:
        """The convolution."""
        if isinstance(self.padding, str):
            raise UserError("a sparse convolution takes its padding as numbers")
        sizes = zip(x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
        patches = functional.unfold(x, self.kernel, self.dilation, self.padding, self.stride)[:, self.used]
        product = self.csr @ patches.transpose(0, 1).flatten(1)
        if self.bias is not None:
            product = product + self.bias[:, None]
        return product.view(len(product), len(x), height, width).transpose(0, 1)


def sparsify(model: nn.Module, below: float = WORTH_IT) -> nn.Module:
    """A copy for inference in which every convolution below a density is a `SparseConv2d`; grouped ones stay, and those
    whose padding is no number of zeros.
    """
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Conv2d) or child.groups != 1:
                continue
            if child.padding_mode != "zeros" or isinstance(child.padding, str):
                continue
            if int(child.weight.count_nonzero()) < below * child.weight.numel():
                setattr(parent, name, SparseConv2d(child))
    return model
