"""Solvers against direct minimisation, and the promise that hidden samples stay hidden."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tenfold_nid as nid
from tenfold_nid import fitting, solvers
from tenfold_nid.fitting import System


def problem_of(batch: int = 3, rows: int = 60, atoms: int = 12, seed: int = 0) -> System:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    design = torch.cat([draw(rows, atoms), torch.eye(3, dtype=torch.float64).repeat(rows // 3, 1)], dim=1)
    return System(design, draw(batch, rows), None, atoms)


def masked(problem: System, seed: int = 0) -> tuple[System, torch.Tensor]:
    points = problem.targets.shape[1] // 3
    mask = torch.rand(len(problem.targets), points, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[0, :15] = True
    return nid.system(problem.design, problem.targets.unflatten(1, (-1, 3)), mask), mask


def slow_ridge(problem: System, mask: torch.Tensor, support: torch.Tensor | None, penalty: float) -> torch.Tensor:
    codes = []
    for s in range(len(problem.targets)):
        rows = mask[s].repeat_interleave(3)
        cols = torch.arange(12) if support is None else support[s]
        cols = torch.cat([cols, torch.arange(12, 15)])
        a, y = problem.design[rows][:, cols], problem.targets[s, rows]
        extra = (penalty * len(y)) ** 0.5 * torch.eye(len(cols), dtype=torch.float64)[: len(cols) - 3]
        z = torch.linalg.lstsq(torch.cat([a, extra]), torch.cat([y, y.new_zeros(len(extra))])).solution
        codes.append(torch.zeros(15, dtype=torch.float64).scatter(0, cols, z))
    return torch.stack(codes)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("partial", [False, True])
def test_ridge_is_the_least_squares_solution(sparse: bool, partial: bool) -> None:
    problem = problem_of()
    support = torch.stack([torch.randperm(12)[:5] for _ in range(3)]) if sparse else None
    mask = torch.ones(3, 20, dtype=torch.bool)
    observed = problem
    if partial:
        observed, mask = masked(problem)
    expected = slow_ridge(problem, mask, support, 0.03)
    assert torch.allclose(nid.ridge(observed, support, penalty=0.03), expected, rtol=1e-9, atol=1e-10)
    one_at_a_time = nid.ridge(observed, support, penalty=0.03, max_entries=1)
    assert torch.allclose(one_at_a_time, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rows", [9, 60])
def test_the_posterior_is_the_gaussian_conditional(rows: int) -> None:
    problem = problem_of(rows=rows)
    generator = torch.Generator().manual_seed(3)
    prior = nid.fit_prior(torch.randn(40, 15, generator=generator, dtype=torch.float64) + 1)
    found = nid.posterior(problem, prior, 0.2)
    precision = torch.linalg.inv(prior.covariance) + problem.design.T @ problem.design / 0.2
    covariance = torch.linalg.inv(precision)
    for s in range(3):
        mean = covariance @ (
            torch.linalg.inv(prior.covariance) @ prior.mean + problem.design.T @ problem.targets[s] / 0.2
        )
        assert torch.allclose(found.mean[s], mean, rtol=1e-8, atol=1e-9)
    assert torch.allclose(found.covariance[0], covariance, rtol=1e-7, atol=1e-9)
    spread = torch.diagonal(problem.design @ covariance @ problem.design.T).sqrt()
    assert torch.allclose(found.deviation(problem.design)[0], spread, rtol=1e-6)


def test_masked_posterior_forgets_what_was_not_seen() -> None:
    problem = problem_of()
    observed, mask = masked(problem)
    prior = nid.fit_prior(torch.randn(40, 15, dtype=torch.float64))
    together = nid.posterior(observed, prior, 0.1).mean
    for s in range(3):
        rows = mask[s].repeat_interleave(3)
        alone = System(problem.design[rows], problem.targets[s : s + 1, rows], None, 12)
        assert torch.allclose(together[s], nid.posterior(alone, prior, 0.1).mean[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("partial", [False, True])
def test_omp_is_greedy(partial: bool) -> None:
    problem = problem_of()
    observed, mask = masked(problem) if partial else (problem, torch.ones(3, 20, dtype=torch.bool))
    code, chosen = nid.omp(observed, 4, penalty=0.0)
    for s in range(3):
        rows = mask[s].repeat_interleave(3)
        design, y = problem.design[rows], problem.targets[s, rows]
        support: list[int] = []
        for step in range(4):
            cols = [*support, 12, 13, 14]
            z = torch.linalg.lstsq(design[:, cols], y[:, None]).solution[:, 0]
            found = (design[:, :12].T @ (y - design[:, cols] @ z)).abs() / design[:, :12].norm(dim=0)
            found[support] = -1
            support.append(int(found.argmax()))
            assert support[-1] == int(chosen[s, step])
        z = torch.linalg.lstsq(design[:, [*support, 12, 13, 14]], y[:, None]).solution[:, 0]
        assert torch.allclose(code[s, [*support, 12, 13, 14]], z, rtol=1e-8)


@pytest.mark.parametrize("partial", [False, True])
def test_fista_reaches_the_optimality_conditions(partial: bool) -> None:
    problem = masked(problem_of())[0] if partial else problem_of()
    penalty = 0.05
    code = nid.fista(problem, penalty, steps=3000)
    weights = 1 / problem.counts[:, None] * (1 if problem.weights is None else problem.weights)
    gradient = problem.adjoint((problem.predict(code) - problem.targets) * weights)
    atoms, coefficients = gradient[:, :12], code[:, :12]
    assert bool((atoms.abs() <= penalty + 1e-8).all())
    active = coefficients != 0
    assert 0 < int(active.sum()) < active.numel()
    assert torch.allclose(atoms[active], -penalty * coefficients[active].sign(), atol=1e-8)
    assert float(gradient[:, 12:].abs().max()) < 1e-8


@pytest.mark.parametrize("solver", ["irls", "huber", "admm"])
@pytest.mark.parametrize("partial", [False, True])
def test_robust_solvers_ignore_a_fifth_of_gross_errors(solver: str, partial: bool) -> None:
    problem = problem_of(rows=150, atoms=6)
    generator = torch.Generator().manual_seed(5)
    truth = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    bad = torch.rand(3, 50, generator=generator) < 0.2
    clean = truth @ problem.design.T
    targets = clean + 8 * bad.repeat_interleave(3, dim=1)
    spoilt = problem._replace(targets=targets)
    if partial:
        mask = torch.rand(3, 50, generator=generator) < 0.8
        mask[0] = True
        spoilt = nid.system(problem.design, targets.unflatten(1, (-1, 3)), mask)
    least_squares = (nid.ridge(spoilt, penalty=1e-9) - truth).norm()
    if solver == "admm":
        fitted = nid.admm(spoilt, penalty=1e-9, steps=2000)
    else:
        loss = "l1" if solver == "irls" else "huber"
        fitted = nid.irls(spoilt, loss=loss, penalty=1e-9, steps=60, delta=1e-4)
    assert float((fitted.code - truth).norm()) < 0.02 * float(least_squares)
    if not partial:
        assert torch.equal(fitted.outliers, bad)


@pytest.mark.parametrize("solver", ["irls", "huber", "admm"])
def test_robust_codes_do_not_depend_on_what_other_signals_show(solver: str) -> None:
    together, mask = masked(problem_of())
    assert len(set(mask.sum(dim=1).tolist())) > 1
    fit = {"admm": nid.admm, "irls": partial(nid.irls, loss="l1"), "huber": partial(nid.irls, loss="huber")}[solver]
    found = fit(together, penalty=0.3, steps=5).code
    for s in range(3):
        rows = mask[s].repeat_interleave(3)
        alone = System(problem_of().design[rows], problem_of().targets[s : s + 1, rows], None, 12)
        assert torch.allclose(found[s], fit(alone, penalty=0.3, steps=5).code[0], rtol=1e-8, atol=1e-9)


def test_refinement_is_adam_on_the_codes() -> None:
    problem, _ = masked(problem_of())
    start = torch.zeros(3, 15, dtype=torch.float64)
    support = torch.stack([torch.randperm(12)[:5] for _ in range(3)])
    found = nid.refine_codes(problem, start, support, steps=7, lr=0.1)
    for s in range(3):
        cols = torch.cat([support[s], torch.arange(12, 15)])
        free = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=0.1)
        rows = problem.weights[s] > 0
        for step in range(7):
            optimizer.zero_grad()
            (problem.design[s][rows][:, cols] @ free - problem.targets[s, rows]).square().mean().backward()
            optimizer.step()
            assert torch.allclose(found[step + 1, s, cols], free.detach(), rtol=1e-9)
        rest = torch.ones(15, dtype=torch.bool).scatter(0, cols, False)
        assert not bool(found[:, s, rest].any())


def test_only_the_wanted_codes_are_kept() -> None:
    problem, start = problem_of(), torch.zeros(3, 15, dtype=torch.float64)
    every = nid.refine_codes(problem, start, steps=5)
    assert torch.equal(nid.refine_codes(problem, start, steps=5, keep=(0, 3, 5)), every[[0, 3, 5]])


def dictionary(gate: str = "conv", **fields: object) -> nid.NeuralDictionary:
    torch.manual_seed(0)
    return nid.NeuralDictionary(
        nid.DictionaryConfig(
            num_experts=24,
            num_topk=6,
            hidden_dim=16,
            ffm_map_size=16,
            ffm_map_scale=2.0,
            gate=gate,
            gate_hidden=8,
            size=(8, 8),
            num_signals=4,
            **fields,
        )
    )


SOLVERS = ["ridge", "map", "omp", "fista", "irls", "huber", "admm", "adam", "gate"]


@pytest.mark.parametrize(
    ("solver", "gate"),
    [("ridge", "resnet"), *[(s, g) for s in SOLVERS for g in ("conv", "strided", "codebook")]],
)
def test_hidden_pixels_never_reach_the_code(solver: str, gate: str) -> None:
    model = dictionary(gate)
    images = torch.rand(2, 8, 8, 3)
    mask = nid.observe_fraction(2, 64, 0.4, torch.Generator().manual_seed(1)).view(2, 8, 8)
    prior = nid.fit_prior(torch.randn(30, 27))
    options = nid.FitOptions(solver=solver, steps=3, penalty=1e-3)
    code = nid.fit_codes(model, images, mask, options, prior=prior)
    for filler in (torch.rand(2, 8, 8, 3) * 100, torch.full((2, 8, 8, 3), torch.nan)):
        changed = torch.where(mask[..., None], images, filler)
        assert torch.equal(nid.fit_codes(model, changed, mask, options, prior=prior), code)
    moved = torch.where(mask[..., None], images + 0.3, images)
    assert not torch.equal(nid.fit_codes(model, moved, mask, options, prior=prior), code)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "gate"])
@pytest.mark.parametrize("hidden", [False, True])
def test_signals_are_coded_in_parts_that_bound_the_memory(solver: str, hidden: bool, monkeypatch) -> None:
    model, images = dictionary().double(), torch.rand(5, 8, 8, 3, dtype=torch.float64)
    mask = nid.observe_fraction(5, 64, 0.5).view(5, 8, 8) if hidden else None
    prior, options = (
        nid.fit_prior(torch.randn(30, 27, dtype=torch.float64)),
        nid.FitOptions(solver=solver, steps=3, penalty=1e-2),
    )
    whole = nid.fit_codes(model, images, mask, options, prior=prior)
    sizes: dict[str, list[int]] = {"solved": [], "gated": []}

    def solve(model, problem, *rest, **more):
        sizes["solved"].append(len(problem.targets))
        return solvers_solve(model, problem, *rest, **more)

    solvers_solve = solvers.solve
    monkeypatch.setattr(solvers, "solve", solve)
    monkeypatch.setattr(solvers, "ENTRIES", 1)
    monkeypatch.setattr(fitting, "GATED", 2)
    assert torch.allclose(nid.fit_codes(model, images, mask, options, prior=prior), whole, rtol=1e-8, atol=1e-9)
    assert sizes["solved"] == [1] * 5
    model.gate_generator.register_forward_hook(lambda gate, args, found: sizes["gated"].append(len(found)))
    nid.gate_code(model, images)
    assert sizes["gated"] == [2, 2, 1]


def test_a_noisy_codebook_is_fine_tuned_on_any_number_of_signals() -> None:
    model = dictionary("codebook", noise=True)
    code = nid.finetune_gate(model, torch.rand(6, 8, 8, 3), steps=1)
    assert code.shape == (6, 27)


def test_fitting_recovers_a_signal_of_the_dictionary() -> None:
    model = dictionary().double()
    coords = nid.lattice((8, 8), dtype=torch.float64)
    truth = model.sparse_code(torch.rand(3, 8, 8, 3, dtype=torch.float64)).detach()
    images = model.render(truth, coords).detach().view(3, 8, 8, 3)
    options = nid.FitOptions(penalty=1e-12, support="all")
    mask = nid.observe_fraction(3, 64, 0.5).view(3, 8, 8)
    code = nid.fit_codes(model, images, mask, options)
    assert torch.allclose(model.render(code, coords).view_as(images), images, atol=1e-5)


def test_fine_tuning_leaves_the_model_alone_and_lowers_the_error() -> None:
    model = dictionary()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.rand(2, 8, 8, 3)
    coords = nid.lattice((8, 8))

    def error(steps: int) -> float:
        code = nid.finetune_gate(model, images, steps=steps, lr=1e-3, settings=nid.Objective(loss_cv=0.0))
        return float((model.render(code, coords).view_as(images) - images).square().mean().detach())

    assert error(40) < 0.9 * error(0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_bad_observations_are_refused_in_a_sentence() -> None:
    model, images = dictionary(), torch.rand(2, 8, 8, 3)
    nothing = torch.zeros(2, 8, 8, dtype=torch.bool)
    nothing[0] = True
    with pytest.raises(ValueError, match="signal 1 has no observed sample"):
        nid.fit_codes(model, images, nothing)
    few = nid.observe_fraction(2, 64, 2 / 64).view(2, 8, 8)
    with pytest.raises(ValueError, match="6 observed numbers do not determine 9 unknowns"):
        nid.fit_codes(model, images, few, nid.FitOptions(penalty=0.0))
    with pytest.raises(ValueError, match="more unknowns"):
        nid.fit_codes(model, images, few, nid.FitOptions(solver="omp"))
    with pytest.raises(ValueError, match="3 channels"):
        nid.fit_codes(model, torch.rand(2, 8, 8, 1))
    with pytest.raises(ValueError, match="not a finite number"):
        nid.fit_codes(model, torch.full((1, 8, 8, 3), torch.nan))
    coords = torch.zeros(64, 2)
    repeated = nid.system(model.design(coords).detach(), images.flatten(1, 2))
    with pytest.raises(ValueError, match="samples repeat each other"):
        nid.ridge(repeated, penalty=0.0)
    assert bool(nid.ridge(repeated, penalty=1e-4).isfinite().all())
    with pytest.raises(ValueError, match="evaluate the design"):
        nid.system(model.design(coords).detach(), images.flatten(1, 2)[:, :5])
    with pytest.raises(ValueError, match="codebook gate stores"):
        nid.gate_code(dictionary("codebook"), images)


@given(seed=st.integers(0, 1000), penalty=st.floats(1e-6, 1.0))
@settings(max_examples=25, deadline=None)
def test_ridge_is_linear_and_equivariant_to_the_order_of_signals(seed: int, penalty: float) -> None:
    problem = problem_of(batch=4, seed=seed)
    code = nid.ridge(problem, penalty=penalty)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(nid.ridge(problem._replace(targets=problem.targets[order]), penalty=penalty), code[order])
    doubled = nid.ridge(problem._replace(targets=2 * problem.targets), penalty=penalty)
    assert torch.allclose(doubled, 2 * code, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"penalty": -1.0}, {"steps": -1}, {"lr": 0.0}, {"atoms": 0}], ids=str)
def test_options_that_no_solver_takes_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=f"--fit.{next(iter(options))}"):
        nid.FitOptions(**options)
