"""Convolution on tensor cores without any unfolded copy of the map, in Triton.

One program owns a channel, a block of output rows and a block of columns of the map, the columns of all images laid end
to end (so a 7 x 7 map fills a tile as well as a 56 x 56 one). For each column tap j it builds the Toeplitz block
`T[h,g] = weight[g-h+kh//2, j]` from the taps in cache, loads the shifted columns of the map, and multiplies. Only
blocks that the kernel reaches are visited. Accumulation is in float32 (float64 for float64 input). Nothing depends on
the order of programs: the weight gradient writes partial sums which are added in a fixed order.
"""

import os

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from tenfold_slak.backends.toeplitz import diagonal_sums

WANTS_CONTIGUOUS = False
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def supports(x: Tensor, kernel_size: tuple[int, int]) -> bool:
    """CUDA tensors, or any tensor but bfloat16 when Triton interprets its kernels (TRITON_INTERPRET=1)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and x.dtype != torch.bfloat16
    return (x.is_cuda or interpreted) and x.dtype in _DTYPES and min(kernel_size) <= 13


@triton.jit
def _correlate_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    height,
    width,
    columns,  # batch * width
    x_batch,
    x_channel,
    x_row,
    x_column,
    y_batch,
    y_channel,
    y_row,
    y_column,
    TAPS: tl.constexpr,  # kh
    SHIFTS: tl.constexpr,  # kw
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    channel = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(2) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    image = (column // width).to(tl.int64)
    w = column % width
    accumulator = tl.zeros((ROWS, COLUMNS), dtype=ACCUMULATOR)
    start = tl.maximum(first_row - TAPS // 2, 0) // ROWS * ROWS
    stop = tl.minimum(first_row + ROWS + TAPS // 2, height)
    for first_source in range(start, stop, ROWS):
        source = first_source + tl.arange(0, ROWS)
        tap = source[None, :] - rows[:, None] + TAPS // 2
        reached = (tap >= 0) & (tap < TAPS) & (source < height)[None, :]
        for shift in range(SHIFTS):
            toeplitz = tl.load(weight_ptr + (channel * TAPS + tap) * SHIFTS + shift, mask=reached, other=0.0)
            shifted = w + shift - SHIFTS // 2
            inside = (column < columns) & (shifted >= 0) & (shifted < width)
            pointers = x_ptr + channel * x_channel + source[:, None] * x_row
            pointers += (image * x_batch + shifted * x_column)[None, :]
            values = tl.load(pointers, mask=(source < height)[:, None] & inside[None, :], other=0.0)
            accumulator += tl.dot(toeplitz, values, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + channel).to(ACCUMULATOR)
    pointers = y_ptr + channel * y_channel + rows[:, None] * y_row + (image * y_batch + w * y_column)[None, :]
    tl.store(
        pointers, accumulator.to(y_ptr.dtype.element_ty), mask=(rows < height)[:, None] & (column < columns)[None, :]
    )


@triton.jit
def _kernel_gradient_kernel(
    x_ptr,
    grad_ptr,
    partial_ptr,  # (splits, channels, SHIFTS, height, height)
    channels,
    height,
    width,
    columns,
    columns_per_split,
    x_batch,
    x_channel,
    x_row,
    x_column,
    g_batch,
    g_channel,
    g_row,
    g_column,
    TAPS: tl.constexpr,
    SHIFTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    channel = (tl.program_id(0) // SHIFTS).to(tl.int64)
    shift = tl.program_id(0) % SHIFTS
    blocks = tl.cdiv(height, ROWS)
    first_row = (tl.program_id(1) // blocks) * ROWS
    first_source = (tl.program_id(1) % blocks) * ROWS
    split = tl.program_id(2)
    rows = first_row + tl.arange(0, ROWS)
    source = first_source + tl.arange(0, ROWS)
    accumulator = tl.zeros((ROWS, ROWS), dtype=ACCUMULATOR)
    if (first_source - first_row < ROWS + TAPS // 2) & (first_row - first_source < ROWS + TAPS // 2):
        stop = tl.minimum((split + 1) * columns_per_split, columns)
        for first_column in range(split * columns_per_split, stop, COLUMNS):
            column = first_column + tl.arange(0, COLUMNS)
            image = (column // width).to(tl.int64)
            w = column % width
            shifted = w + shift - SHIFTS // 2
            inside = (column < stop) & (shifted >= 0) & (shifted < width)
            grad_at = grad_ptr + channel * g_channel + rows[:, None] * g_row
            grad_at += (image * g_batch + w * g_column)[None, :]
            grads = tl.load(grad_at, mask=(rows < height)[:, None] & inside[None, :], other=0.0)
            x_at = x_ptr + channel * x_channel + source[None, :] * x_row
            x_at += (image * x_batch + shifted * x_column)[:, None]
            values = tl.load(x_at, mask=(source < height)[None, :] & inside[:, None], other=0.0)
            accumulator += tl.dot(grads, values, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    plane = ((split * channels + channel) * SHIFTS + shift) * height
    pointers = partial_ptr + (plane + rows[:, None]) * height + source[None, :]
    tl.store(pointers, accumulator, mask=(rows < height)[:, None] & (source < height)[None, :])


def _block(size: int, largest: int) -> int:
    """A power of two between 16, the least that tensor cores take, and `largest`."""
    return min(max(16, triton.next_power_of_2(size)), largest)


def _arithmetic(x: Tensor) -> dict:
    """The accumulator, and whether float32 products may be rounded to TF32 as the user's torch setting says."""
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return {
        "ACCUMULATOR": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def correlate(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels 1 kh kw"],
    bias: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """One launch; x may have any strides, so that a transposed view costs no copy. The result has the strides of x."""
    batch, channels, height, width = x.shape
    weight = weight.contiguous()
    y = torch.empty_like(x)  # preserves the strides of a transposed, dense x
    columns = batch * width
    row_block, column_block = _block(height, 64), _block(columns, 128)
    grid = (triton.cdiv(columns, column_block), channels, triton.cdiv(height, row_block))
    _correlate_kernel[grid](
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        y,
        height,
        width,
        columns,
        *x.stride(),
        *y.stride(),
        TAPS=weight.shape[2],
        SHIFTS=weight.shape[3],
        HAS_BIAS=bias is not None,
        ROWS=row_block,
        COLUMNS=column_block,
        **_arithmetic(x),
    )
    return y


def kernel_gradient(
    x: Float[Tensor, "batch channels height width"],
    grad: Float[Tensor, "batch channels height width"],
    kernel_size: tuple[int, int],
) -> Float[Tensor, "channels 1 kh kw"]:
    """Products of gradient rows with shifted map rows, split over the columns, then sums along the diagonals."""
    batch, channels, height, width = x.shape
    columns = batch * width
    row_block, column_block = _block(height, 64), _block(columns, 64)
    # Enough programs to fill a large GPU; more would only add partial sums to write and read back.
    programs = channels * kernel_size[1] * triton.cdiv(height, row_block) ** 2
    splits = max(1, min(triton.cdiv(512, programs), triton.cdiv(columns, 4 * column_block)))
    per_split = triton.cdiv(triton.cdiv(columns, splits), column_block) * column_block
    arithmetic = _arithmetic(x)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(splits, channels, kernel_size[1], height, height, dtype=dtype, device=x.device)
    _kernel_gradient_kernel[(channels * kernel_size[1], triton.cdiv(height, row_block) ** 2, splits)](
        x,
        grad,
        partial,
        channels,
        height,
        width,
        columns,
        per_split,
        *x.stride(),
        *grad.stride(),
        TAPS=kernel_size[0],
        SHIFTS=kernel_size[1],
        ROWS=row_block,
        COLUMNS=column_block,
        **arithmetic,
    )
    return diagonal_sums(partial.sum(0), kernel_size[0]).transpose(1, 2)[:, None].to(x.dtype)
