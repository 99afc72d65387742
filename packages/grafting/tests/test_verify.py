"""Complete verification: agreement with a mixed-integer solver, limits, modes, and counter-examples that are ones."""

import dataclasses
import sys
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nets import random_network
from torch import Tensor, nn

from tenfold_grafting.attacks import margin_attack
from tenfold_grafting.backward import Lower
from tenfold_grafting.bounds import crown_intervals
from tenfold_grafting.branching import choose_neurons
from tenfold_grafting.domains import BetaSettings, Domains, Problem
from tenfold_grafting.evaluate import Evaluation, decided
from tenfold_grafting.grafting import activation_shapes, graft
from tenfold_grafting.graph import Graph, Normalise, trace
from tenfold_grafting.intervals import Box
from tenfold_grafting.leaf import milp_minimum, solve_leaf
from tenfold_grafting.optimise import AlphaSettings
from tenfold_grafting.specification import Property, ball
from tenfold_grafting.verify import VerifySettings, _Decision, verified_radius, verify
from tenfold_shared.errors import RunFailure, UserError

QUICK = BetaSettings(iterations=4, lr_alpha=0.1, lr_beta=0.2)


def small(seed: int) -> tuple:
    """A network of few neurons, its graph and a property that may hold or not."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    for parameter in model.parameters():
        parameter.data *= 2
    graph = trace(model, (4,))
    x = torch.rand(4, dtype=torch.float64)
    return graph, ball(x, int(graph(x[None]).argmax()), 0.12, 3)


def leaf_domains(graph: Graph, problem: Problem, x: Tensor) -> Domains:
    """The leaf in which an input lies, and the one with every neuron's sign turned round."""
    values = graph.values(x[None])
    signs = torch.zeros(2, problem.size, dtype=torch.int8)
    for index, (neurons, part) in problem.slots.items():
        z = values[graph.nodes[index].inputs[0]].flatten(1)[0, neurons]
        signs[0, part] = torch.where(z >= 0, 1, -1).to(torch.int8)
    signs[1] = -signs[0]
    zero = torch.zeros(2, problem.size, dtype=torch.float64)
    return Domains(signs, zero, zero, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("branching", ["babsr", "fsb", "kfsb"])
def test_branch_and_bound_agrees_with_a_mixed_integer_solver(branching) -> None:
    """The same answer on every network, and no bound above the exact minimum."""
    statuses = set()
    for seed in range(8):
        graph, prop = small(seed)
        intervals, _ = crown_intervals(graph, prop.box(graph))
        exact = [milp_minimum(graph, prop.box(graph), row, intervals)[0] for row in prop.rows]
        settings = VerifySettings(branching=branching, beta=QUICK, timeout=600, attack_steps=0)
        verdict = verify(graph, prop, settings)
        statuses.add(verdict.status)
        assert verdict.verified == (min(exact) > 0), (seed, verdict, exact)
        assert verdict.falsified == (min(exact) < 0)
        assert all(bound <= value + 1e-6 for bound, value in zip(verdict.bounds, exact, strict=True))
        if verdict.counterexample is not None:
            margins = graph(verdict.counterexample[None])[0] @ prop.rows.T
            assert float(margins.min()) < 0
            assert bool((verdict.counterexample >= prop.lower - 1e-9).all())
            assert bool((verdict.counterexample <= prop.upper + 1e-9).all())
    assert len(statuses) > 1


class Doubled(nn.Module):
    """A sum that reads one node twice, or the same function with the weights behind it doubled."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.first, self.relu, self.last, self.twice = nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), twice
        self.last.weight.data *= 1 if twice else 2

    def forward(self, x):
        x = self.relu(self.first(x))
        return self.last(x + x if self.twice else x)


def test_a_mixed_integer_program_reads_a_node_twice() -> None:
    for seed in range(4):
        found = []
        for twice in (True, False):
            torch.manual_seed(seed)
            graph = trace(Doubled(twice).double(), (2,))
            box = Box(-torch.ones(1, 2).double(), torch.ones(1, 2).double())
            row = torch.tensor([1.0, -1.0]).double()
            least, point = milp_minimum(graph, box, row, crown_intervals(graph, box)[0])
            assert float(graph(point)[0] @ row) == pytest.approx(least, abs=1e-6)
            found.append(least)
        assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_the_mixed_integer_method_decides_tiny_networks() -> None:
    """The verdicts of branch and bound, with counter-examples; a network too large for it, or no time, are said."""
    statuses = set()
    for seed in range(6):
        graph, prop = small(seed)
        settings = VerifySettings(beta=QUICK, timeout=600, attack_steps=0)
        verdict = verify(graph, prop, dataclasses.replace(settings, method="milp"))
        assert verdict.verified == verify(graph, prop, settings).verified
        assert verdict.falsified == (verdict.counterexample is not None)
        statuses.add(verdict.status)
    assert {"verified-milp", "falsified-milp"} <= statuses
    intervals, _ = crown_intervals(graph, prop.box(graph))
    with pytest.raises(TimeoutError):
        milp_minimum(graph, prop.box(graph), prop.rows[0], intervals, seconds=0.0)
    large = trace(nn.Sequential(nn.Linear(4, 4000), nn.ReLU(), nn.Linear(4000, 3)).double(), (4,))
    with pytest.raises(UserError, match="of up to 4000 values"):
        verify(large, prop, VerifySettings(method="milp", attack_steps=0))
    with pytest.raises(UserError, match="method milp is for"):
        VerifySettings(method="milp", arithmetic="rigorous")


@pytest.mark.parametrize("arithmetic", ["fast", "checked", "rigorous"])
def test_arithmetics_agree_away_from_zero(arithmetic) -> None:
    for seed in range(6):
        graph, prop = small(seed)
        settings = VerifySettings(beta=QUICK, timeout=600, attack_steps=10, attack_restarts=1)
        reference = verify(graph, prop, settings)
        assert verify(graph, prop, dataclasses.replace(settings, arithmetic=arithmetic)).verified == reference.verified


@pytest.mark.parametrize("method", ["ibp", "crown", "alpha-crown", "bab"])
def test_single_precision_believes_nothing_that_its_cancellation_made(method) -> None:
    """Wide weights, outputs of thousands, and a margin just below zero: the pass's own constant sets the threshold."""
    for seed in range(16):
        torch.manual_seed(seed)
        widths = [20, *[100] * 6]
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(100, 2)).double()
        x = torch.rand(20, dtype=torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10)
            logits = model(x)
            model[-1].bias[0] -= logits[0] - logits[1] + 1e-8 * logits.abs().max()
        prop = Property(x, x.clone(), torch.tensor([[1.0, -1.0]]).double(), torch.zeros(1).double())
        settings = VerifySettings(method=method, arithmetic="fast", attack_steps=0, beta=QUICK)
        assert not verify(trace(model, (20,)), prop, settings).verified, seed


def test_intermediate_bounds_optimised_jointly_prove_more() -> None:
    """Never less than with fixed ones, and sound; branch and bound goes on from the tighter intervals."""
    better = 0
    for seed in range(8):
        graph, prop = small(seed)
        settings = VerifySettings(method="alpha-crown", attack_steps=0)
        joint = dataclasses.replace(settings, alpha=AlphaSettings(scope="joint"))
        fixed, found = verify(graph, prop, settings), verify(graph, prop, joint)
        better += sum(found.bounds) > sum(fixed.bounds) + 1e-3
        points = prop.lower + (prop.upper - prop.lower) * torch.rand(500, 4, dtype=torch.float64)
        assert bool((graph(points) @ prop.rows.T >= torch.tensor(found.bounds) - 1e-9).all())
        complete = dataclasses.replace(joint, method="bab", beta=QUICK)
        assert verify(graph, prop, complete).verified == verify(graph, prop, VerifySettings(beta=QUICK)).verified
    assert better
    with pytest.raises(UserError, match="scope joint is for"):
        VerifySettings(arithmetic="rigorous", alpha=AlphaSettings(scope="joint"))


def test_leaves_are_exact() -> None:
    """At a fully decided leaf the linear program meets the minimum over the leaf's points, and an empty leaf is empty."""
    found, empty = set(), 0
    for seed in range(6):
        graph, prop = small(seed)
        box = prop.box(graph)
        intervals, _ = crown_intervals(graph, box)
        problem = Problem.make(graph, box, prop.rows[0], 0.0, intervals)
        x = prop.lower + torch.rand(4, dtype=torch.float64) * (prop.upper - prop.lower)
        domains = leaf_domains(graph, problem, x)
        here = solve_leaf(problem, domains[:1])
        assert here.bound <= float(graph(x[None])[0] @ prop.rows[0]) + 1e-9
        assert not here.empty
        turned = solve_leaf(problem, domains[1:])
        found |= {here.status, turned.status}
        empty += turned.empty
        assert choose_neurons(problem, domains).tolist() == [-1, -1]
    assert "verified" in found
    assert "unknown" not in found  # which an empty leaf is where nobody sees that it is empty
    assert 0 < empty < 6


def test_rigorous_leaves_hold_after_rounding() -> None:
    """With intervals alone and every neuron split, verdicts come from leaves; their dual values bear the errors too."""
    leaves = {"checked": 0, "rigorous": 0}
    for seed in range(4):
        graph, prop = small(seed)
        for arithmetic in leaves:
            decision = _Decision(graph, prop, VerifySettings(arithmetic=arithmetic), torch.empty(0), 0.0)
            decision.exact.start(crown=True)
            exact = decision.exact
            problem = Problem.make(exact.graph, exact.box, exact.spec[0, 0], 0.0, exact.intervals)
            x = prop.lower + torch.rand(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * (
                prop.upper - prop.lower
            )
            domains = leaf_domains(graph, problem, x)
            for part in (domains[:1], domains[1:]):
                status, bound = decision._leaf(problem, part)
                plain = solve_leaf(problem, part)
                leaves[arithmetic] += status == "verified-bab"
                if status == "verified-bab" and not plain.empty:
                    assert bound <= plain.bound
                    assert bound > plain.bound - 1e-9
    assert leaves["checked"] == leaves["rigorous"] > 2


def test_fully_grafted_network_visits_no_domain() -> None:
    model, shape = random_network(0, "conv")
    masks = {name: torch.ones(s) for name, s in activation_shapes(model, shape).items()}
    graph = trace(graft(model, masks).eval(), shape)
    x = torch.rand(shape, dtype=torch.float64)
    verdict = verify(graph, ball(x, int(graph(x[None]).argmax()), 0.02, 3), VerifySettings(attack_steps=0))
    assert verdict.domains == 0
    assert verdict.status in ("verified-incomplete", "falsified-bab")


def test_an_exact_bound_meets_the_attack_that_reaches_it() -> None:
    """Where nothing is unstable the attack ends in the corner whose value the bound is; rounding is no contradiction."""
    for seed in range(12):
        graph, prop = small(seed)
        middle = (prop.lower + prop.upper) / 2
        tight = ball(middle, int(graph(middle[None]).argmax()), 1e-5, 3)
        verdict = verify(graph, tight, VerifySettings(attack_steps=5, attack_restarts=1))
        assert verdict.verified
        assert all(b <= a + 1e-9 for b, a in zip(verdict.bounds, verdict.attack_margins, strict=True))


def test_grafted_neurons_are_never_split() -> None:
    model, shape = random_network(4, "residual", grafted=True)
    graph = trace(model, shape)
    x = torch.rand(shape, dtype=torch.float64)
    prop = ball(x, 0, 0.2, 3)
    intervals, _ = crown_intervals(graph, prop.box(graph))
    problem = Problem.make(graph, prop.box(graph), prop.rows[0], 0.0, intervals)
    for index, (neurons, _) in problem.slots.items():
        mask = graph.activation(index).mask
        assert mask is not None
        assert not bool(mask.flatten()[neurons].any())


def test_limits() -> None:
    graph, prop = small(3)
    hard = dataclasses.replace(prop, constant=prop.constant - 0.3)
    verdict = verify(graph, hard, VerifySettings(attack_steps=0, max_domains=2, batch=1, beta=QUICK))
    assert verdict.status in ("timeout", "falsified-bab", "verified-incomplete", "verified-bab")
    assert verdict.domains <= 4
    for name in ("timeout", "max_domains", "candidates"):
        with pytest.raises(UserError, match=name):
            VerifySettings(**{name: 0})


def test_the_time_limit_is_looked_at_before_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves at each look: after the attack, after CROWN, after an alpha-CROWN that was cut short."""
    graph, prop = small(3)
    hard = dataclasses.replace(prop, constant=prop.constant - 0.3)
    module = sys.modules["tenfold_grafting.verify"]  # the package gives its name to the function
    clock = count()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for looks, bounds in ((0.5, 0), (1.5, 2), (2.5, 2)):
        for method in ("alpha-crown", "bab"):
            verdict = verify(graph, hard, VerifySettings(method=method, attack_steps=0, timeout=looks))
            assert (verdict.status, len(verdict.bounds), verdict.domains) == ("timeout", bounds, 0)
    monkeypatch.undo()
    seen: list[int] = []
    margin_attack(lambda x: seen.append(1) or x[:, :1] + 1, prop.lower, prop.upper, deadline=-1.0)
    assert len(seen) == 2  # the number of rows, and the random starts


def test_the_verified_radius_of_a_line_is_exact() -> None:
    """The margin over the weights' sum, where no pixel is near the ends of its range."""
    linear = nn.Linear(3, 2).double()
    x = torch.full((3,), 0.5, dtype=torch.float64)
    row = linear.weight[0] - linear.weight[1]
    with torch.no_grad():
        linear.bias.copy_(torch.tensor([0.2 * float(row.abs().sum()) - float(row @ x), 0.0]))
    graph = trace(nn.Sequential(linear), (3,))
    settings = VerifySettings(method="crown", attack_steps=0)
    assert verified_radius(graph, x, 0, 0.5, 10, settings) == pytest.approx(0.2, abs=0.5 / 2**10)
    assert verified_radius(graph, x, 1, 0.5, 3, settings) == 0


def test_contradiction_is_a_hard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound above what the attack reached is never reported as a result."""
    graph, prop = small(0)
    module = sys.modules["tenfold_grafting.verify"]  # the package gives its name to the function
    absurd = Lower(torch.full((1, 2), 1e9, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64))
    monkeypatch.setattr(module, "backward", lambda *a: absurd)
    with pytest.raises(RunFailure, match="unsound"):
        verify(graph, dataclasses.replace(prop, constant=prop.constant + 50), VerifySettings(attack_steps=3))


def test_refused_properties() -> None:
    graph, prop = small(0)
    with pytest.raises(UserError, match="inputs of shape"):
        verify(graph, dataclasses.replace(prop, lower=prop.lower[:2], upper=prop.upper[:2]))
    with pytest.raises(UserError, match="gives 3 logits"):
        verify(graph, dataclasses.replace(prop, rows=prop.rows[:, :2]))
    with pytest.raises(UserError, match="no rows"):
        verify(graph, dataclasses.replace(prop, rows=prop.rows[:0], constant=prop.constant[:0]))
    with pytest.raises(UserError, match="empty"):
        verify(graph, Property(prop.upper, prop.lower, prop.rows, prop.constant))
    with pytest.raises(UserError, match="not finite"):
        verify(graph, dataclasses.replace(prop, constant=prop.constant * float("nan")))
    for eps in (0.0, -1.0, 2.0):
        with pytest.raises(UserError, match="eps"):
            ball(torch.rand(4), 0, eps, 3)
    with pytest.raises(UserError, match="pixels in"):
        ball(torch.rand(4) + 1, 0, 0.1, 3)


def test_normalised_counterexample_is_in_pixels() -> None:
    model = nn.Sequential(Normalise([0.3], [0.2]), nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    graph = trace(model, (1, 2, 2))
    x = torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    label = int(graph(x[None]).argmax())
    verdict = verify(graph, ball(x, label, 0.5, 2), VerifySettings(attack_steps=0, beta=QUICK))
    if verdict.counterexample is not None:
        assert float(verdict.counterexample.min()) >= -1e-9
        assert float(verdict.counterexample.max()) <= 1 + 1e-9
        assert int(graph(verdict.counterexample[None]).argmax()) != label


def test_a_record_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images with a complete line are not decided again, and processes agree with one."""
    graph, _ = small(1)
    images = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = graph(images).argmax(1)
    labels[4] = (labels[4] + 1) % 3
    settings = VerifySettings(beta=QUICK, attack_steps=3, attack_restarts=1, timeout=600)
    e = Evaluation(eps=0.02, verify=settings)
    record = tmp_path / "images.jsonl"
    first = decided(graph, images, labels, e, record)
    assert first["statuses"]["wrong"] == 1
    assert sum(first["statuses"].values()) == 5
    lines = record.read_text().splitlines(keepends=True)
    assert len(lines) == 4
    record.write_text("".join(lines[:3]) + lines[3][:7])
    asked = []
    module = sys.modules["tenfold_grafting.evaluate"]  # the package gives its name to the function
    monkeypatch.setattr(module, "verify", lambda *a: asked.append(1) or verify(*a))
    again = decided(graph, images, labels, e, record)
    assert len(asked) == 1
    assert again["statuses"] == first["statuses"]
    assert decided(graph, images, labels, dataclasses.replace(e, jobs=2))["statuses"] == first["statuses"]


def test_a_verdict_against_another_attack_is_a_hard_error() -> None:
    """The robust accuracy's attack is not the verifier's own: what it breaks must not be verified."""
    graph, _ = small(1)
    images = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = graph(images).argmax(1)
    settings = VerifySettings(beta=QUICK, attack_steps=0, timeout=600)
    e = Evaluation(eps=1e-4, verify=settings)
    held = torch.tensor([True, True, True])
    assert decided(graph, images, labels, e, robust=held)["va"] == 100
    with pytest.raises(RunFailure, match="image 1 is verified and attacked"):
        decided(graph, images, labels, e, robust=torch.tensor([True, False, True]))
