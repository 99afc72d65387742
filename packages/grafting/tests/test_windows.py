"""Windows of convolutions' coefficients, and their transposes."""

import dataclasses

import pytest
import torch
from nets import corners_and_points, random_box
from torch import nn

from tenfold_grafting.bounds import crown_intervals
from tenfold_grafting.graph import trace
from tenfold_grafting.windows import Windows


class Strides(nn.Module):
    """Two ways from 8 x 8 to 4 x 4, of which only one has a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1, self.relu2 = nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), nn.ReLU()
        self.wide, self.strided = nn.Conv2d(4, 4, 5), nn.Conv2d(4, 4, 2, 2)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        x = self.relu1(self.conv1(x))
        return self.head(self.relu2(self.wide(x) + self.strided(x)).flatten(1))


def test_windows_of_unlike_strides_are_not_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways back to one node whose windows move by different steps: sound, and the dense bounds."""
    graph = trace(Strides().double().eval(), (1, 8, 8))
    box = random_box(0, (1, 8, 8), 0.1)
    points = corners_and_points(box, 2000)
    source = graph.nodes[graph.activations[1]].inputs[0]
    with torch.no_grad():
        values = graph.values(points.flatten(0, 1))[source].unflatten(0, points.shape[:2])
        as_is, _ = crown_intervals(graph, box, intersect=False)
        rigorous, _ = crown_intervals(graph, box, rigorous=True)
        monkeypatch.setattr("tenfold_grafting.backward.WINDOW_SHARE", 0.0)
        dense, _ = crown_intervals(graph, box, intersect=False)
    for lower, upper in (found[graph.activations[1]] for found in (as_is, rigorous)):
        assert bool((values >= lower[:, None]).all())
        assert bool((values <= upper[:, None]).all())
    for index, ends in as_is.items():
        for a, b in zip(ends, dense[index], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_every_way_through_a_convolution_is_its_transpose(kernel: int, stride: int, padding: int) -> None:
    """By rows, by cells and by torch: <A, W x> = <A W, x>, on maps with and without a remainder, and on windows."""
    torch.manual_seed(kernel)
    for height, width in ((7, 9), (8, 6)):
        layer = torch.nn.Conv2d(2, 3, kernel, stride, padding, bias=False).double()
        if min(height, width) + 2 * padding < kernel:
            continue
        graph = trace(torch.nn.Sequential(layer, torch.nn.Flatten()), (2, height, width))
        conv = graph.nodes[1]
        x = torch.randn(4, 2, height, width, dtype=torch.float64)
        rows = torch.randn(4, *conv.shape, dtype=torch.float64)
        full = conv._full(conv.shape[1:])
        for size, pads in (((height, width), (padding, padding)), (full, (0, 0))):
            by_torch = torch.autograd.grad(conv.forward(x.requires_grad_()), x, rows)[0]
            found = {
                way: getattr(conv, way)(rows, pads, size) for way in ("_transposed_by_rows", "_transposed_by_cells")
            }
            found["transposed"] = conv.transposed(rows, pads, size)
            found["single"] = dataclasses.replace(conv, weight=conv.weight.float()).transposed(rows.float(), pads, size)
            for way, values in found.items():
                top = padding - pads[0]
                cut = values[:, :, top : top + height, top : top + width].double()
                missing = (0, width - cut.shape[3], 0, height - cut.shape[2])
                cut = torch.nn.functional.pad(cut, missing)
                torch.testing.assert_close(
                    cut, by_torch, rtol=0, atol=1e-5 if way == "single" else 1e-10, msg=lambda m, way=way: f"{way}: {m}"
                )


def test_windows_outside_of_the_map_are_zero() -> None:
    windows = Windows(torch.ones(1, 1, 1, 3, 3), torch.tensor([[[0, 0]]]), (2, 2), (-1, -1), (1, 1), (1, 2, 2))
    assert windows.overhangs
    assert float(windows.masked().values.sum()) == 4
    assert torch.equal(windows.dense(), torch.ones(1, 1, 1, 2, 2))
