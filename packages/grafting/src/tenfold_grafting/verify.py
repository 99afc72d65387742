"""Deciding a property: attack, CROWN, alpha-CROWN, then branch and bound to completeness (section 2.6)."""

import dataclasses
import time
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tenfold_grafting.arithmetic import exact_arithmetic, normalisation_error
from tenfold_grafting.attacks import margin_attack
from tenfold_grafting.backward import backward
from tenfold_grafting.bounds import crown_intervals, margin_errors, relaxations
from tenfold_grafting.branching import Reduce, Rule, choose_neurons
from tenfold_grafting.domains import BetaSettings, Domains, Problem, beta_crown, evaluate
from tenfold_grafting.graph import Graph
from tenfold_grafting.intervals import Box, Intervals, ibp, ibp_margins
from tenfold_grafting.leaf import Leaf, milp_minimum, solve_leaf
from tenfold_grafting.optimise import AlphaSettings, alpha_crown, alpha_crown_joint
from tenfold_grafting.relaxation import Lines
from tenfold_grafting.specification import Property, ball
from tenfold_shared.errors import RunFailure, UserError

Mode = Literal["fast", "checked", "rigorous"]
Method = Literal["ibp", "crown-ibp", "crown", "alpha-crown", "bab", "milp"]
Status = Literal[
    "verified-incomplete",
    "verified-bab",
    "verified-milp",
    "attacked",
    "falsified-bab",
    "falsified-milp",
    "timeout",
    "unknown",
    "leaf-unknown",
]

FAST_MARGIN = 1e-4
"""In single precision a bound is believed from here on (times 1 + its constant, the property's and the pass's own)."""
MILP_TOLERANCE = 1e-6
"""What the mixed-integer solver's tolerances may have added to a minimum."""


@dataclasses.dataclass
class VerifySettings:
    """How a property is decided."""

    method: Method = "bab"
    """The strongest method that is tried; ``bab`` is complete, and so is ``milp``, a mixed-integer program after CROWN for
    tiny networks, which rests on its solver's tolerances."""
    arithmetic: Mode = "checked"
    """fast: single precision, with a small margin. checked: every claim is evaluated in double precision. rigorous: double
    precision, less a bound on its own rounding errors."""
    timeout: float = 300.0
    """Seconds an image, for all its margins together; looked at between the steps of a method."""
    max_domains: int = 5_000_000
    """Subdomains an image."""
    batch: int = 0
    """Subdomains that are split at a time; 0: 256 on a CPU, 4096 on a GPU."""
    branching: Rule = "kfsb"
    """How the neuron to split is chosen."""
    candidates: int = 3
    """Candidates that fsb and kfsb try, by score and by backup score each."""
    reduce: Reduce = "min"
    """Which of a pair of values BaBSR's score and the filter take."""
    give_up: float = -100.0
    """No branch and bound below this bound, as in the released code."""
    alpha: AlphaSettings = dataclasses.field(default_factory=lambda: AlphaSettings(iterations=100))
    """The first alpha-CROWN pass, before branching; 20 iterations are the quick form for alpha-CROWN alone."""
    beta: BetaSettings = dataclasses.field(default_factory=BetaSettings)
    """beta-CROWN in every subdomain."""
    attack_steps: int = 100
    """Steps of the attack that comes first; 0 leaves it out."""
    attack_restarts: int = 5
    """Its restarts."""

    def __post_init__(self) -> None:
        """Refuse what decides nothing."""
        for name in ("timeout", "max_domains", "candidates"):
            if getattr(self, name) <= 0:
                raise UserError(f"--verify.{name} takes more than 0, got {getattr(self, name)}")
        if self.batch < 0:
            raise UserError(f"--verify.batch takes 0 or more, got {self.batch}")
        if self.attack_steps < 0 or self.attack_restarts < 1:
            raise UserError("--verify.attack_steps takes 0 or more and --verify.attack_restarts 1 or more")
        if self.arithmetic != "checked" and (self.method == "milp" or self.alpha.scope == "joint"):
            what = "method milp" if self.method == "milp" else "alpha.scope joint"
            raise UserError(f"--verify.{what} is for --verify.arithmetic checked: its rounding errors have no bound")


@dataclasses.dataclass
class Verdict:
    """What came out for one property."""

    status: Status
    bounds: list[float]
    """The best lower bound of every margin (a bound of the whole box)."""
    attack_margins: list[float]
    """The smallest value of every margin that an attack reached; empty where none was made."""
    domains: int
    """Subdomains that were bounded."""
    seconds: float
    counterexample: Tensor | None = None
    """Pixels at which a margin is negative, in double precision."""

    @property
    def verified(self) -> bool:
        """Whether the property was proved."""
        return self.status.startswith("verified")

    @property
    def falsified(self) -> bool:
        """Whether a counter-example was found."""
        return self.status in ("attacked", "falsified-bab", "falsified-milp")

    def plain(self) -> dict[str, Any]:
        """Everything but the counter-example, in JSON's types."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "counterexample"}


class _Arithmetic:
    """Evaluates and believes bounds in one of the three modes."""

    def __init__(self, graph: Graph, prop: Property, mode: Mode):
        self.mode = mode
        self.graph = graph.to(torch.float32 if mode == "fast" else torch.float64)
        self.box = prop.box(self.graph)
        if mode == "rigorous":  # normalisation rounds
            pixels = (end[None].to(self.graph.device, self.graph.dtype) for end in (prop.lower, prop.upper))
            error = normalisation_error(self.graph.prefix, *pixels)
            self.box = Box(self.box.lower - error, self.box.upper + error)
        self.spec = prop.rows[None].to(self.graph.device, self.graph.dtype)
        self.constant = prop.constant.to(self.graph.device, self.graph.dtype)
        self.errors: list[Tensor] | None = None
        self.intervals: Intervals = {}

    def start(self, crown: bool) -> None:
        """Compute the intermediate bounds."""
        if crown:
            self.intervals, _ = crown_intervals(self.graph, self.box, rigorous=self.mode == "rigorous")
        else:
            self.intervals, _ = ibp(self.graph, self.box)
        if self.mode == "rigorous":
            self.errors = margin_errors(self.graph, self.box, self.intervals)

    def interval_margins(self) -> Tensor:
        """Interval arithmetic's bounds of the property's rows, less what rounding may have added, [rows]."""
        found = ibp_margins(self.graph, self.box, self.spec)[0]
        lower, upper = ibp(self.graph, self.box)[1]
        size = self.spec[0].abs() @ torch.maximum(lower.abs(), upper.abs())[0]
        loss = self._loss(self.spec[0], size + self.constant.abs())
        return found + self.constant - (loss if self.errors is None else 2 * loss)

    def margins(self, lines: dict[int, Lines]) -> Tensor:
        """CROWN's bounds of the property's rows, less what rounding may have added, [rows]."""
        found = backward(self.graph, self.graph.output, self.spec, lines, self.box)
        loss = self._loss(self.spec[0], found.constant[0].abs() + self.constant.abs())
        return found.bound[0] + self.constant - loss

    def domain_margins(self, problem: Problem, domains: Domains) -> Tensor:
        """The same for subdomains of one row, whose multipliers bring in errors of their own, [domains]."""
        found = evaluate(problem, domains)
        loss = self._loss(problem.row[0].expand(len(domains), -1), found.constant.abs() + abs(problem.constant))
        if self.errors is not None:
            for index, (neurons, part) in problem.slots.items():
                lower, upper = (end.flatten(1)[0, neurons] for end in problem.intervals[index])
                size = torch.maximum(lower.abs(), upper.abs()) * 8 * torch.finfo(lower.dtype).eps
                error = self.errors[problem.graph.nodes[index].inputs[0]].flatten(1)[0, neurons]
                loss = loss + domains.beta[:, part].to(error) @ (error + size)
        return found.bound - loss

    def _loss(self, rows: Tensor, constants: Tensor) -> Tensor:
        """What rounding may have added to a bound of each row [rows, classes] with constants of these sizes [rows]."""
        if self.mode == "fast":
            return FAST_MARGIN * (1 + constants)
        if self.errors is None:
            return rows.new_zeros(len(rows))
        return rows.abs() @ self.errors[-1][0]


def verify(graph: Graph, prop: Property, settings: VerifySettings | None = None) -> Verdict:
    """Decide a property, or say how far it got.

    Args:
        graph: the network, in any arithmetic; its weights are what is verified.
        prop: the property.
        settings: methods, arithmetic and limits.

    Raises:
        UserError: a property that does not fit the network.
        RunFailure: a bound lies above a value that the attack reached: a defect, nothing may be believed.

    """
    settings = settings or VerifySettings()
    prop = prop.checked(graph)
    started = time.monotonic()
    double = graph.to(torch.float64)
    reached = torch.empty(0)
    with exact_arithmetic(classical=settings.arithmetic == "rigorous"):
        if settings.attack_steps:
            reached, worst = _attack(double, prop, settings, started + settings.timeout)
            if bool((reached < 0).any()):
                seconds = time.monotonic() - started
                return Verdict("attacked", [], reached.tolist(), 0, seconds, worst.cpu())
        if time.monotonic() > started + settings.timeout:
            return Verdict("timeout", [], reached.tolist(), 0, time.monotonic() - started)
        run = _Decision(graph, prop, settings, reached, started)
        status = run.decide()
    bounds = run.best
    # Where a bound is exact, both are sums of the same terms and differ by the rounding of double precision.
    limits = reached.double().cpu()
    if settings.arithmetic != "rigorous":
        limits = limits + 1e-9 * (1 + limits.abs())
    if len(limits) and bool((bounds.double().cpu() > limits).any()):
        raise RunFailure("a lower bound lies above a value that the attack reached: the engine is unsound here")
    return Verdict(
        status, bounds.tolist(), reached.tolist(), run.visited, time.monotonic() - started, run.counterexample
    )


def verified_radius(
    graph: Graph,
    image: Float[Tensor, "*input"],
    label: int,
    largest: float,
    bisections: int,
    settings: VerifySettings | None = None,
) -> float:
    """The largest radius met, in pixel units, whose ball is verified: a lower bound of the robust radius (section 11).

    Args:
        graph: the network.
        image: pixels in [0, 1].
        label: what every image of the ball is to get.
        largest: a radius that is too large; with n bisections the answer is known to within largest / 2^n.
        bisections: how many balls are decided.
        settings: see `verify`, for each ball.

    """
    below, above = 0.0, largest
    for _ in range(bisections):
        middle = (below + above) / 2
        if verify(graph, ball(image, label, middle, graph.classes).to(graph.device), settings).verified:
            below = middle
        else:
            above = middle
    return below


def _attack(graph: Graph, prop: Property, settings: VerifySettings, deadline: float) -> tuple[Tensor, Tensor]:
    """The smallest value of every margin at the points that were found, in double precision, and the worst point."""
    rows, constant = prop.rows.to(graph.device, graph.dtype), prop.constant.to(graph.device, graph.dtype)
    single, low = graph.single, prop.lower.to(graph.device).float()
    high = prop.upper.to(graph.device).float()
    _, points = margin_attack(
        lambda x: single(x) @ rows.float().T + constant.float(),
        low,
        high,
        steps=settings.attack_steps,
        restarts=settings.attack_restarts,
        generator=torch.Generator().manual_seed(0),
        deadline=deadline,
    )
    points = torch.minimum(torch.maximum(points.double(), prop.lower.to(points.device)), prop.upper.to(points.device))
    found = graph(points) @ rows.T + constant
    return found.amin(0), points[int(found.amin(1).argmin())]


class _Decision:
    """The way of one property through the methods."""

    def __init__(self, graph: Graph, prop: Property, settings: VerifySettings, reached: Tensor, started: float):
        self.settings, self.reached = settings, reached
        self.deadline = started + settings.timeout
        self.exact = _Arithmetic(graph, prop, settings.arithmetic)
        rows = len(prop.rows)
        self.best = self.exact.spec.new_full((rows,), -torch.inf)
        self.visited = 0
        self.counterexample: Tensor | None = None
        self.prefix = self.exact.graph.prefix

    def decide(self) -> Status:
        settings, exact = self.settings, self.exact
        with torch.no_grad():
            exact.start(crown=settings.method not in ("ibp", "crown-ibp"))
            if settings.method == "ibp":
                self.best = exact.interval_margins()
            else:
                self.best = exact.margins(relaxations(exact.graph, exact.intervals))
        if self._all_proved():
            return "verified-incomplete"
        if settings.method in ("ibp", "crown-ibp", "crown"):
            return "unknown"
        if self._late():
            return "timeout"
        if settings.method == "milp":
            return self._milp()
        alphas = self._alpha()
        if self._all_proved():
            return "verified-incomplete"
        if self._late():
            return "timeout"
        if settings.method == "alpha-crown":
            return "unknown"
        if float(self.best.min()) <= settings.give_up:
            return "unknown"
        (open_rows,) = (~(self.best > 0)).nonzero(as_tuple=True)
        if len(self.reached):
            open_rows = open_rows[self.reached.to(open_rows.device)[open_rows].argsort()]
        for row in open_rows.tolist():
            status = self._branch(row, alphas)
            if status != "verified-bab":
                return status
        return "verified-bab"

    def _all_proved(self) -> bool:
        return bool((self.best > 0).all())

    def _late(self) -> bool:
        return time.monotonic() > self.deadline

    def _alpha(self) -> dict[int, Tensor]:
        """alpha-CROWN in single precision; its slopes are evaluated in the mode's arithmetic. [1, rows, *shape]"""
        exact = self.exact
        if self.settings.alpha.scope == "joint":
            # Its intermediate bounds are claimed too: in the mode's own arithmetic.
            joint = alpha_crown_joint(
                exact.graph, exact.box, exact.spec, exact.intervals, self.settings.alpha, deadline=self.deadline
            )
            self.best = torch.maximum(self.best, joint.lower[0] + exact.constant)
            exact.intervals = joint.intervals
            return joint.alphas
        graph = exact.graph.single
        box = Box(exact.box.lower.float(), exact.box.upper.float())
        intervals = {i: (low.float(), high.float()) for i, (low, high) in exact.intervals.items()}
        # From there on a bound holds in double precision too; in single precision alone more is asked of it.
        until = None if exact.mode == "fast" else FAST_MARGIN - exact.constant
        found = alpha_crown(
            graph, box, exact.spec.float(), intervals, self.settings.alpha, until=until, deadline=self.deadline
        )
        with torch.no_grad():
            lines = relaxations(exact.graph, exact.intervals)
            for i, alpha in found.alphas.items():
                crossing = exact.graph.activation(i).unstable(*exact.intervals[i])[:, None]
                slope = torch.where(crossing, alpha.to(exact.spec).clamp(0, 1), lines[i].lower_slope[:, None])
                lines[i] = lines[i]._replace(lower_slope=slope)
            self.best = torch.maximum(self.best, exact.margins(lines))
        return found.alphas

    def _milp(self) -> Status:
        """The minimum of every open margin by a mixed-integer program; within the solver's tolerances of 0 nothing is said."""
        exact, cpu = self.exact, torch.device("cpu")
        graph, box = exact.graph.to(torch.float64, cpu), Box(exact.box.lower.cpu(), exact.box.upper.cpu())
        intervals = {i: (low.cpu(), high.cpu()) for i, (low, high) in exact.intervals.items()}
        for row in (~(self.best > 0)).nonzero(as_tuple=True)[0].tolist():
            margin, constant = exact.spec[0, row].cpu(), float(exact.constant[row])
            try:
                least, point = milp_minimum(graph, box, margin, intervals, self.deadline - time.monotonic())
            except TimeoutError:
                return "timeout"
            self.best[row] = max(float(self.best[row]), least + constant - MILP_TOLERANCE)
            pixels = self._pixels(point)[0]
            if float(graph(pixels[None])[0] @ margin) + constant < 0:
                self.counterexample = pixels
                return "falsified-milp"
        return "verified-milp" if self._all_proved() else "unknown"

    def _branch(self, row: int, alphas: dict[int, Tensor]) -> Status:
        """Branch and bound of one margin."""
        exact, settings = self.exact, self.settings
        constant = float(exact.constant[row])
        problem = Problem.make(exact.graph, exact.box, exact.spec[0, row], constant, exact.intervals)
        single = problem.single()
        alpha = single.adaptive()
        for i, (neurons, part) in problem.slots.items():
            if i in alphas:
                alpha[part] = alphas[i][0, row].flatten()[neurons]
        root = Domains(
            torch.zeros(1, problem.size, dtype=torch.int8, device=alpha.device),
            alpha[None],
            torch.zeros_like(alpha)[None],
            self.best[row : row + 1].float(),
        )
        queue = root
        batch = settings.batch or (4096 if alpha.device.type == "cuda" else 256)
        closed = torch.inf  # the least bound of a domain that has been dropped
        while len(queue):
            if self._late() or self.visited >= settings.max_domains:
                self._note(row, queue, closed)
                return "timeout"
            order = queue.lower.argsort()
            picked, queue = queue[order[:batch]], queue[order[batch:]]
            if problem.size == 0:
                neurons = torch.full((1,), -1)
            else:
                neurons = choose_neurons(
                    single, picked, settings.branching, candidates=settings.candidates, reduce=settings.reduce
                )
            leaves = neurons < 0
            for number in leaves.nonzero(as_tuple=True)[0].tolist():
                status, least = self._leaf(problem, picked[number : number + 1])
                if status != "verified-bab":
                    return status
                closed = min(closed, least)
            parents = picked[~leaves]
            if not len(parents):
                continue
            children = beta_crown(single, parents.split(neurons[~leaves]), settings.beta, self.deadline)
            self.visited += len(children)
            likely = children.lower > 0
            if bool(likely.any()):
                checked = exact.domain_margins(problem, children[likely])
                children.lower[likely] = checked.float().clamp(max=torch.finfo(torch.float32).max)
                proved = torch.zeros_like(likely)
                proved[likely] = checked > 0
                if bool(proved.any()):
                    closed = min(closed, float(checked[checked > 0].min()))
                children = children[~proved]
            queue = Domains.joined([queue, children])
        self._note(row, queue, closed)
        return "verified-bab"

    def _note(self, row: int, queue: Domains, closed: float) -> None:
        """The margin's bound over the whole box after branching; open domains were bounded in single precision only."""
        if not len(queue) and closed < torch.inf:
            self.best[row] = max(float(self.best[row]), closed)

    def _leaf(self, problem: Problem, leaf: Domains) -> tuple[Status, float]:
        """The exact answer for a fully decided domain, and the bound that it rests on."""
        double = problem
        if self.settings.arithmetic == "fast":
            graph = problem.graph.to(torch.float64)
            box = problem.box.to(torch.float64)
            intervals = {i: (low.double(), high.double()) for i, (low, high) in problem.intervals.items()}
            double = dataclasses.replace(problem, graph=graph, box=box, row=problem.row.double(), intervals=intervals)
        found = solve_leaf(double, leaf)
        if found.status == "verified":
            bound = found.bound if self.exact.mode == "checked" else self._believed_leaf(problem, leaf, found)
            return ("verified-bab" if bound > 0 else "leaf-unknown"), bound
        if found.status == "falsified" and found.point is not None:
            pixels = self._pixels(found.point)[0].cpu()
            value = double.graph(pixels[None].to(double.graph.device))[0] @ double.row[0, 0] + problem.constant
            if float(value) < 0:
                self.counterexample = pixels
                return "falsified-bab", found.bound
        return "leaf-unknown", found.bound

    def _believed_leaf(self, problem: Problem, leaf: Domains, found: Leaf) -> float:
        """A leaf's bound with the solver's dual values as beta, less rounding errors; infinite on an empty leaf.

        An empty leaf is one on which 0 has a positive lower bound.
        """
        assert found.duals is not None
        if found.empty:
            problem = dataclasses.replace(problem, row=torch.zeros_like(problem.row), constant=0.0)
        dual = dataclasses.replace(leaf, beta=found.duals[None].to(problem.row))
        bound = float(self.exact.domain_margins(problem, dual))
        return torch.inf if found.empty and bound > 0 else bound

    def _pixels(self, point: Tensor) -> Tensor:
        """Pixels of a normalised point."""
        if self.prefix is None:
            return point
        wide = (-1, *(1 for _ in point.shape[2:]))
        ends = (self.prefix.shift, self.prefix.factor)
        shift, factor = (t.to(point.device, torch.float64).reshape(wide) for t in ends)
        return (point.double() - shift) / factor
