"""What a sparse network saves: a file without its zeros, and convolutions that multiply what is left of them.

The file holds every pruned weight in compressed rows (CSR): the values, their columns, and where each row begins.
"""

import copy
import itertools
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
SMALLER_BELOW = 0.5
"""Below this density compressed rows (4 bytes a value, 2 or 4 a column) are smaller than dense ones."""
FASTER_BELOW, FASTER_FROM = 0.06, 128
"""Below this density and from so many channels on a CPU is faster with the sparse product, one with fast dense ones too."""


def compact_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The state dict with sparse weights in compressed rows, and the shapes of those weights."""
    pruned = {
        name: weight.detach()
        for name, weight in prunable_weights(model, linear=True).items()
        if int(weight.count_nonzero()) < SMALLER_BELOW * weight.numel()
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
    """A convolution by its non-zero weights: those of each place of the kernel, in compressed rows, times the pictures
    shifted to that place. The pictures lie channel by channel in one row, where a shift is an offset: nothing is gathered.

    For inference: there are no gradients.

    Args:
        conv: with one group and zero padding, given as numbers.

    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if isinstance(conv.padding, str):
            raise UserError("a sparse convolution takes its padding as numbers")
        weight = conv.weight.detach()
        self.bias = None if conv.bias is None else conv.bias.detach().clone()
        self.kernel, self.stride, self.padding, self.dilation = (
            conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        )  # fmt: skip
        self.places = {
            (i, j): weight[:, :, i, j].to_sparse_csr()
            for i, j in itertools.product(*map(range, conv.kernel_size))
            if (i, j) == (0, 0) or bool(weight[:, :, i, j].any())
        }

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "batch inputs height width"]) -> Float[Tensor, "batch outputs out_h out_w"]:
        """The convolution."""
        (batch, inputs, *sizes), (top, left), (down, across) = x.shape, self.padding, self.stride
        padded = [n + 2 * p for n, p in zip(sizes, self.padding, strict=True)]
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        height, width = ((n - span - 1) // s + 1 for n, span, s in zip(padded, spans, self.stride, strict=True))
        # Pixels a stride apart make a grid of their own, in which the convolution goes from neighbour to neighbour.
        rows, columns = (-(-n // s) for n, s in zip(padded, self.stride, strict=True))
        bottom, right = rows * down - sizes[0] - top, columns * across - sizes[1] - left
        grids = functional.pad(x, (left, right, top, bottom)).reshape(batch, inputs, rows, down, columns, across)
        length, farthest = batch * rows * columns, spans[0] // down * columns + spans[1] // across
        flat = x.new_empty(down, across, inputs, length + farthest)  # what lies behind the pictures reaches no output
        flat[..., :length].unflatten(3, (batch, rows, columns)).copy_(grids.permute(3, 5, 1, 0, 2, 4))
        product: Tensor | None = None
        for (i, j), weights in self.places.items():
            below, row = divmod(i * self.dilation[0], down)
            beside, column = divmod(j * self.dilation[1], across)
            shifted = flat[row, column, :, below * columns + beside :][:, :length]
            product = weights @ shifted if product is None else torch.addmm(product, weights, shifted, out=product)
        assert product is not None  # the first place is always there
        if self.bias is not None:
            product += self.bias[:, None]
        return product.unflatten(1, (batch, rows, columns))[:, :, :height, :width].transpose(0, 1)


def sparsify(model: nn.Module, below: float = FASTER_BELOW, channels: int = FASTER_FROM) -> nn.Module:
    """A copy for inference in which every convolution below a density, with so many inputs and outputs at least, is a
    `SparseConv2d`; grouped ones stay, and those whose padding is no number of zeros.
    """
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Conv2d) or child.groups != 1:
                continue
            if child.padding_mode != "zeros" or isinstance(child.padding, str):
                continue
            wide = min(child.in_channels, child.out_channels) >= channels
            if wide and int(child.weight.count_nonzero()) < below * child.weight.numel():
                setattr(parent, name, SparseConv2d(child))
    return model
