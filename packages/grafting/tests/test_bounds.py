"""The engine: soundness on random networks, exactness where it must be exact, and agreement with slow references."""

import pytest
import torch
from nets import corners_and_points, random_box, random_network
from torch import nn

from tenfold_grafting.arithmetic import gamma
from tenfold_grafting.attacks import margin_attack
from tenfold_grafting.backward import backward
from tenfold_grafting.bounds import (
    bound_margins,
    crown_intervals,
    crown_margins,
    margin_errors,
    margin_spec,
    relaxations,
)
from tenfold_grafting.domains import BetaSettings, Domains, Problem, beta_crown, evaluate
from tenfold_grafting.grafting import activation_shapes, graft
from tenfold_grafting.graph import Normalise, trace
from tenfold_grafting.intervals import Box, ibp
from tenfold_grafting.operations import Activation, Add, Affine
from tenfold_grafting.optimise import AlphaSettings, alpha_crown, alpha_crown_joint
from tenfold_grafting.relaxation import relax
from tenfold_grafting.specification import pixel_box

KINDS = ["mlp", "conv", "residual"]
METHODS = ["ibp", "crown-ibp", "crown"]
eye = torch.eye(3, dtype=torch.float64)


def spec_of(batch: int) -> torch.Tensor:
    return torch.cat([margin_spec(torch.zeros(batch, dtype=torch.int64), 3), eye.expand(batch, -1, -1)], 1)


@pytest.mark.parametrize("grafted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_point_of_a_box_falls_below_a_bound(kind: str, grafted: bool) -> None:
    """Hundreds of networks and boxes: values of all pre-activations and margins lie within every method's bounds."""
    for seed in range(12):
        model, shape = random_network(seed, kind, grafted)
        graph, box = trace(model, shape), random_box(seed, shape, radius=0.05 * (1 + seed % 8))
        spec = spec_of(len(box))
        points = corners_and_points(box, 64, seed)
        with torch.no_grad():
            values = graph.values(points.flatten(0, 1))
            for intervals in (
                ibp(graph, box)[0],
                crown_intervals(graph, box)[0],
                crown_intervals(graph, box, rigorous=True)[0],
            ):
                for index, (lower, upper) in intervals.items():
                    z = values[graph.nodes[index].inputs[0]].unflatten(0, points.shape[:2])
                    assert bool((z >= lower[:, None] - 1e-12).all())
                    assert bool((z <= upper[:, None] + 1e-12).all())
            margins = torch.einsum("bsk,bnk->bns", spec, values[-1].unflatten(0, points.shape[:2]))
            for method in METHODS:
                assert bool((margins >= bound_margins(graph, box, spec, method)[:, None] - 1e-12).all())
        if seed < 2:
            intervals = crown_intervals(graph, box)[0]
            for optimise in (alpha_crown, alpha_crown_joint):
                found = optimise(graph, box, spec, intervals, AlphaSettings(6)).lower
                assert bool((margins >= found[:, None] - 1e-12).all())


@pytest.mark.parametrize("kind", KINDS)
def test_attacked_points_stay_above_bounds(kind: str) -> None:
    """Gradient descent on the margin itself, from many starts, never gets below CROWN."""
    for seed in range(4):
        model, shape = random_network(seed, kind, grafted=bool(seed % 2))
        graph, box = trace(model, shape), random_box(seed, shape, radius=0.3, batch=1)
        spec = spec_of(1) * 1.0
        lower = alpha_crown(graph, box, spec, crown_intervals(graph, box)[0], AlphaSettings(10)).lower[0]
        reached, _ = margin_attack(
            lambda x, graph=graph, spec=spec: graph.values(x)[-1] @ spec[0].T + 100,
            box.lower[0],
            box.upper[0],
            steps=40,
            restarts=4,
        )
        assert bool((reached - 100 >= lower - 1e-12).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_is_its_own_bound(kind: str) -> None:
    """With an empty radius every method gives the network's output: odd sizes, strides, pads and pools are right."""
    for seed in range(5):
        model, shape = random_network(seed, kind, grafted=bool(seed % 2))
        graph = trace(model, shape)
        x = torch.rand(2, *shape, dtype=torch.float64)
        expected = model(x).detach()
        torch.testing.assert_close(graph(x), expected, rtol=0, atol=1e-10)
        for method in METHODS:
            found = bound_margins(graph, Box(x, x), eye.expand(2, -1, -1), method)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_the_dense_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, chunks and the dense pass give the same bounds, and so does a plain matrix implementation."""
    model, shape = random_network(3, kind, grafted=True)
    graph, box = trace(model, shape), random_box(3, shape)
    with torch.no_grad():
        as_is, _ = crown_intervals(graph, box, intersect=False)
        chunked, _ = crown_intervals(graph, box, intersect=False, elements=500)
        monkeypatch.setattr("tenfold_grafting.backward.WINDOW_SHARE", 0.0)
        dense, lines = crown_intervals(graph, box, intersect=False)
        monkeypatch.setattr("tenfold_grafting.backward.WINDOW_SHARE", 9.0)
        windowed, _ = crown_intervals(graph, box, intersect=False)
        monkeypatch.undo()
        monkeypatch.setattr("tenfold_grafting.backward.BLOCK", 300)
        blocks, _ = crown_intervals(graph, box, intersect=False)
    for other in (chunked, dense, windowed, blocks):
        for index, ends in as_is.items():
            for a, b in zip(ends, other[index], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    found = crown_margins(graph, box, eye.expand(2, -1, -1), lines)
    torch.testing.assert_close(found, by_matrices(graph, box, lines), rtol=0, atol=1e-10)


def by_matrices(graph, box, lines):
    """CROWN of the outputs with the full matrix of every operation, one box at a time."""
    found = []
    for b in range(len(box)):
        pending, c = {graph.output: eye}, torch.zeros(3, dtype=torch.float64)
        for index in range(graph.output, 0, -1):
            if index not in pending:
                continue
            a, node = pending.pop(index), graph.nodes[index]
            if isinstance(node, Add):
                parts = [(i, a) for i in node.inputs]
            elif isinstance(node, Activation):
                line = lines[index]
                low, up, shift_up = (t[b].flatten() for t in (line.lower_slope, line.upper_slope, line.upper_intercept))
                shift_low = (
                    torch.zeros_like(shift_up) if line.lower_intercept is None else line.lower_intercept[b].flatten()
                )
                plus, minus = a.clamp(min=0), a.clamp(max=0)
                c = c + plus @ shift_low + minus @ shift_up
                parts = [(node.inputs[0], plus * low + minus * up)]
            else:
                size = torch.Size(node.in_shape).numel()
                basis = torch.eye(size, dtype=torch.float64).view(size, *node.in_shape)
                zero = node.forward(torch.zeros(1, *node.in_shape, dtype=torch.float64))
                matrix = (node.forward(basis) - zero).flatten(1).T
                c = c + a @ zero.flatten()
                parts = [(node.inputs[0], a @ matrix)]
            for source, value in parts:
                pending[source] = pending[source] + value if source in pending else value
        a = pending[0]
        centre, radius = box.centre[b].flatten(), box.radius[b].flatten()
        found.append(c + a @ centre - a.abs() @ radius)
    return torch.stack(found)


def test_fan_out_is_summed() -> None:
    """relu(x) - relu(x) is 0: an unsound pass that drops one reader would miss it."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.minus, self.relu = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.ReLU()

        def forward(self, x):
            y = self.relu(self.first(x))
            return y + self.minus(y)

    model = Difference().double()
    model.minus.weight.data.copy_(-torch.eye(2))
    graph = trace(model, (2,))
    box = random_box(0, (2,), 1.0)
    found = bound_margins(graph, box, torch.eye(2).double().expand(2, -1, -1), "crown")
    assert bool((found.abs() < 1e-9).all())


def test_fully_grafted_is_exact() -> None:
    """A network of lines: CROWN gives its exact affine range, whatever the signs of the slopes."""
    model, shape = random_network(1, "conv")
    masks = {n: torch.ones(s) for n, s in ((k, v) for k, v in _shapes(model, shape).items())}
    model = graft(model, masks, slope=-0.7, bias=0.2).eval()
    graph, box = trace(model, shape), random_box(1, shape)
    found = bound_margins(graph, box, eye.expand(2, -1, -1), "crown")
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], box.centre[0]).flatten(1)
    exact = model(box.centre)[0] - jacobian.abs() @ box.radius[0].flatten()
    torch.testing.assert_close(found[0], exact.detach(), rtol=0, atol=1e-9)
    assert not any(
        bool(graph.activation(i).unstable(*ends).any()) for i, ends in crown_intervals(graph, box)[0].items()
    )


def _shapes(model, shape):
    return activation_shapes(model, shape)


def test_box_is_cut_at_the_pixel_range_and_normalised_by_channel() -> None:
    """A pixel at 0 has no room below; eps is divided by each channel's standard deviation."""
    model = nn.Sequential(Normalise([0.5, 0.2], [0.5, 0.25]), nn.Flatten(), nn.Linear(8, 3)).double()
    graph = trace(model, (2, 2, 2))
    image = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    image[0, 1] = 0.5
    box = pixel_box(graph, image, 0.1)
    assert graph.prefix is not None
    torch.testing.assert_close(box.lower[0, 0], torch.full((2, 2), -1.0, dtype=torch.float64))
    torch.testing.assert_close(box.upper[0, 0], torch.full((2, 2), -0.8, dtype=torch.float64))
    torch.testing.assert_close(box.radius[0, 1], torch.full((2, 2), 0.4, dtype=torch.float64))


def test_lines_enclose_the_activation() -> None:
    model, shape = random_network(0, "mlp", grafted=True)
    graph = trace(model, shape)
    lower = torch.linspace(-2, 1, 9).double()[None]
    upper = lower + torch.rand(1, 9).double()
    z = lower + torch.linspace(0, 1, 21).double()[:, None] * (upper - lower)
    activation = graph.activation(graph.activations[0])
    lines = relax(activation, lower, upper)
    f = activation.forward(z)
    below = lines.lower_slope * z + lines.lower_intercept
    assert bool((f >= below - 1e-12).all())
    assert bool((f <= lines.upper_slope * z + lines.upper_intercept + 1e-12).all())


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_improves_and_joint_improves_more(kind: str) -> None:
    model, shape = random_network(7, kind)
    graph, box = trace(model, shape), random_box(7, shape, 0.3)
    spec = spec_of(2)
    intervals, lines = crown_intervals(graph, box)
    crown = crown_margins(graph, box, spec, lines)
    alpha = alpha_crown(graph, box, spec, intervals).lower
    joint = alpha_crown_joint(graph, box, spec, intervals)
    assert bool((alpha >= crown - 1e-10).all())
    assert float((joint.lower - crown).sum()) >= 0.9 * float((alpha - crown).sum()) - 1e-6
    assert float((alpha - crown).sum()) > 1e-6
    for index, (lower, upper) in joint.intervals.items():
        assert bool((lower >= intervals[index][0]).all())
        assert bool((upper <= intervals[index][1]).all())


def test_optimisation_ends_at_its_deadline_or_its_goal() -> None:
    """Past the deadline the first bound is what there is; a goal that is met ends it as well."""
    model, shape = random_network(7, "conv")
    graph, box = trace(model, shape), random_box(7, shape, 0.3, batch=1)
    intervals, lines = crown_intervals(graph, box)
    spec = spec_of(1)
    crown = crown_margins(graph, box, spec, lines)
    for end in ({"deadline": -1.0}, {"until": crown[0] - 1}):
        torch.testing.assert_close(alpha_crown(graph, box, spec, intervals, **end).lower, crown)
    problem = Problem.make(graph, box, spec[0, 0], 0.0, intervals)
    alpha = problem.adaptive()[None]
    start = Domains(torch.zeros_like(alpha, dtype=torch.int8), alpha, alpha * 0, torch.full((1,), -torch.inf).double())
    found = beta_crown(problem, start, BetaSettings(20, 0.1, 0.2), deadline=-1.0)
    torch.testing.assert_close(found.lower, evaluate(problem, start).bound)


def test_beta_bounds_hold_in_their_half_spaces() -> None:
    """Sampled points of every subdomain lie above its bound; beta = 0 is CROWN of the split; beta never hurts."""
    checked = 0
    for seed in range(12):
        model, shape = random_network(seed, KINDS[seed % 3], grafted=bool(seed % 2))
        graph, box = trace(model, shape), random_box(seed, shape, 0.4, batch=1)
        intervals, _ = crown_intervals(graph, box)
        problem = Problem.make(graph, box, margin_spec(torch.tensor([0]), 3)[0, 0], 0.0, intervals)
        if problem.size < 3:
            continue
        draws = torch.Generator().manual_seed(seed)
        signs = torch.zeros(4, problem.size, dtype=torch.int8)
        for row in range(4):
            chosen = torch.randperm(problem.size, generator=draws)[:3]
            signs[row, chosen] = (torch.randint(0, 2, (3,), generator=draws) * 2 - 1).to(torch.int8)
        alpha = problem.adaptive().expand(4, -1)
        start = Domains(signs, alpha, torch.zeros_like(alpha), torch.full((4,), -torch.inf).double())
        plain = evaluate(problem, start).bound
        better = beta_crown(problem, start, BetaSettings(8, 0.1, 0.2))
        assert bool((better.lower >= plain - 1e-10).all())
        torch.testing.assert_close(evaluate(problem, better).bound, better.lower, rtol=0, atol=1e-9)
        points = corners_and_points(box, 4000, seed)[0]
        with torch.no_grad():
            values = graph.values(points)
        margins = values[-1] @ problem.row[0, 0]
        for row in range(4):
            inside = torch.ones(len(points), dtype=torch.bool)
            for index, (neurons, part) in problem.slots.items():
                z = values[graph.nodes[index].inputs[0]].flatten(1)[:, neurons]
                inside &= (z * signs[row, part] >= 0).all(1)
            if bool(inside.any()):
                checked += 1
                assert float(margins[inside].min()) >= float(better.lower[row]) - 1e-10
    assert checked > 5


def test_rigorous_error_covers_single_precision() -> None:
    """The error term, made for single precision, covers the true difference to double, also with weights times ten."""
    for seed in range(6):
        model, shape = random_network(seed, KINDS[seed % 3], grafted=bool(seed % 2))
        if seed > 2:
            for parameter in model.parameters():
                parameter.data *= 3
        model = model.float()
        graph = trace(model, shape)
        box = random_box(seed, shape)
        single = Box(box.lower.float(), box.upper.float())
        box = Box(single.lower.double(), single.upper.double())
        double = graph.to(torch.float64)
        intervals, lines = crown_intervals(double, box)
        rows = eye.expand(2, -1, -1)
        exact = backward(double, double.output, rows, lines, box).bound
        low = {i: (a.float(), b.float()) for i, (a, b) in intervals.items()}
        rough = backward(graph, graph.output, rows.float(), relaxations(graph, low), single).bound.double()
        error = margin_errors(graph, single, low)[-1].double()
        # the intervals were rounded as well: what their slopes change is relative to the same magnitudes
        assert bool((exact - rough <= 2 * error).all())
        assert bool((error < 1e-2 * (1 + exact.abs().max()) * 50).all())


def test_rigorous_intervals_are_wider() -> None:
    model, shape = random_network(2, "residual")
    graph, box = trace(model, shape), random_box(2, shape)
    plain, rigorous = crown_intervals(graph, box)[0], crown_intervals(graph, box, rigorous=True)[0]
    first = graph.activations[0]
    assert bool((rigorous[first][0] < plain[first][0]).all())
    assert bool((rigorous[first][1] > plain[first][1]).all())
    assert gamma(10, torch.float64) == pytest.approx(10 * 2.0**-53, rel=1e-9)


def test_batch_norm_is_folded_only_for_a_single_reader() -> None:
    model, shape = random_network(0, "residual")
    names = [type(node).__name__ for node in trace(model, shape).nodes]
    assert "Scale" not in names

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.relu = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()

        def forward(self, x):
            y = self.linear(x)
            return self.relu(self.norm(y)) + y

    shared = Shared().double().eval()
    shared.norm.running_mean.uniform_(-1, 1)
    graph = trace(shared, (3,))
    assert "Scale" in [type(node).__name__ for node in graph.nodes]
    x = torch.rand(4, 3).double()
    torch.testing.assert_close(graph(x), shared(x).detach())


class Skip(nn.Module):
    """Three inputs, a few neurons, a sum around one of the layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = self.relu1(self.first(x))
        return self.last(self.relu2(self.second(x)) + x)


def test_hundreds_of_tiny_networks_at_their_worst_points() -> None:
    """Wide weights, every corner of the box and the best of a descent from each: nothing falls below any bound."""
    eye2 = torch.eye(2, dtype=torch.float64)[None]
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).double()
    for seed in range(200):
        torch.manual_seed(seed)
        model: nn.Module = Skip(2 + seed % 4).double()
        for parameter in model.parameters():
            parameter.data *= 1 + seed % 5
        if seed % 3 == 0:
            masks = {name: (torch.rand(2 + seed % 4) < 0.5).float() for name in ("relu1", "relu2")}
            model = graft(model, masks, slope=float(torch.randn(())), bias=float(torch.randn(()))).double()
        graph = trace(model, (3,))
        box = random_box(seed, (3,), radius=2.0 ** (seed % 6 - 4), batch=1)
        share = corners.clone()
        with torch.no_grad():
            bounds = [bound_margins(graph, box, eye2, method)[0] for method in METHODS]
            for step in (0.0, 0.2, 0.1, 0.05):  # a coordinate search from every corner
                for axis in range(3):
                    for sign in (-1.0, 1.0):
                        moved = share.clone()
                        moved[:, axis] = (moved[:, axis] + sign * step).clamp(0, 1)
                        both = [graph.values(box.lower + p * (box.upper - box.lower))[-1][:, 0] for p in (share, moved)]
                        share = torch.where((both[1] < both[0])[:, None], moved, share)
            values = graph.values(box.lower + torch.cat([share, corners]) * (box.upper - box.lower))[-1]
        for bound in bounds:
            assert bool((values >= bound - 1e-11 * (1 + values.abs().max())).all())


def test_lengths_count_the_longer_way() -> None:
    """A backward pass sums over a layer's outputs, interval arithmetic over its inputs."""
    widening = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()
    lengths = {
        type(node).__name__: node.length for node in trace(widening, (2, 4, 4)).nodes if isinstance(node, Affine)
    }
    assert lengths["Conv"] == 16 * 9 + 1
    assert lengths["Linear"] == 64 + 1


def test_rigorous_error_is_the_sum_over_steps() -> None:
    """The recursion against the sum that it stands for, with the coefficients of a backward pass written out."""
    model, shape = random_network(5, "mlp", grafted=True)
    graph, box = trace(model, shape), random_box(5, shape)
    intervals, lines = crown_intervals(graph, box, rigorous=True)
    found = margin_errors(graph, box, intervals)[-1]
    ranges: list[torch.Tensor] = [torch.maximum(box.lower.abs(), box.upper.abs())]
    pairs = [(box.lower, box.upper)]
    for index, node in enumerate(graph.nodes[1:], 1):
        pair = node.interval(*(intervals[index] if isinstance(node, Activation) else pairs[node.inputs[0]]))
        pairs.append(pair)
        ranges.append(torch.maximum(pair[0].abs(), pair[1].abs()))
    coefficients, least = eye.expand(2, -1, -1), torch.zeros(2, 3, dtype=torch.float64)
    for index in range(graph.output, 0, -1):
        node, before = graph.nodes[index], ranges[graph.nodes[index].inputs[0]]
        if isinstance(node, Activation):
            line = lines[index]
            low, up = line.lower_slope[:, None], line.upper_slope[:, None]
            coefficients = coefficients.clamp(min=0) * low + coefficients.clamp(max=0) * up
            continue
        rows = coefficients.abs().flatten(0, 1)
        spread = coefficients.abs() @ node.absolute(before)[..., None]
        least = least + gamma(node.shape[0], torch.float64) * spread[..., 0]
        if node.magnitude() is not None:
            least = least + gamma(node.shape[0], torch.float64) * (rows @ node.magnitude()).view(2, 3)
        coefficients = node.transpose(coefficients.flatten(0, 1)).unflatten(0, (2, 3))
    least = least + gamma(shape[0], torch.float64) * (coefficients.abs() @ ranges[0][..., None])[..., 0]
    assert bool((found > least).all())
    assert bool((found < 1e-9).all())


def test_batches_with_unlike_images_give_each_its_own_bounds() -> None:
    """Images with few and with many unstable neurons, in chunks of few rows, as one by one."""
    model, shape = random_network(4, "conv")
    graph = trace(model, shape)
    x = torch.rand(5, *shape, dtype=torch.float64)
    radius = torch.tensor([0.0, 0.3, 0.01, 0.2, 0.05], dtype=torch.float64)[:, None, None, None]
    box = Box(x - radius, x + radius)
    together, _ = crown_intervals(graph, box, elements=600)
    for b in range(5):
        alone, _ = crown_intervals(graph, box[b : b + 1])
        for index, ends in alone.items():
            for one, all_of_them in zip(ends, together[index], strict=True):
                torch.testing.assert_close(all_of_them[b], one[0], rtol=0, atol=1e-9)


def test_no_boxes_have_no_bounds() -> None:
    model, shape = random_network(0, "conv")
    nothing = Box(torch.zeros(0, *shape).double(), torch.zeros(0, *shape).double())
    for method in METHODS:
        assert bound_margins(trace(model, shape), nothing, spec_of(0), method).shape == (0, 5)
