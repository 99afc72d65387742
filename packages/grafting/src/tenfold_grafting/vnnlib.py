"""Properties as VNN-LIB (section 11): the SMT-LIB subset that verifiers share.

A file declares X_0.. and Y_0.., bounds every X_i, and asserts what a counter-example would satisfy: one inequality of
two outputs or of an output and a number, or a disjunction of conjunctions of such. A property of ours holds if no input
of the box satisfies any of the disjuncts; with one inequality in each they are the rows of one property.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from tenfold_grafting.specification import Property
from tenfold_shared.errors import UserError

Tree = list | str


def write_vnnlib(prop: Property, path: Path, comment: str = "") -> None:
    """Write a property, whose rows compare at most two outputs, or combine any number of them."""
    lines = [f"; {comment}"] if comment else []
    inputs, outputs = prop.lower.numel(), prop.rows.shape[1]
    lines += [f"(declare-const X_{i} Real)" for i in range(inputs)]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    for i, (low, high) in enumerate(zip(prop.lower.flatten().tolist(), prop.upper.flatten().tolist(), strict=True)):
        lines += [f"(assert (<= X_{i} {high!r}))", f"(assert (>= X_{i} {low!r}))"]
    lines.append("(assert (or")
    for row, constant in zip(prop.rows.tolist(), prop.constant.tolist(), strict=True):
        places = {value: i for i, value in enumerate(row) if value}
        if sorted(places) == [-1.0, 1.0] and constant == 0 and sum(map(bool, row)) == 2:
            lines.append(f"  (and (<= Y_{places[1.0]} Y_{places[-1.0]}))")
        else:
            terms = " ".join(f"(* {value!r} Y_{i})" for i, value in enumerate(row) if value)
            lines.append(f"  (and (<= (+ {terms} {constant!r}) 0.0))")
    lines.append("))")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_vnnlib(path: Path, input_shape: tuple[int, ...], outputs: int) -> Property:
    """The property of a file for a network.

    Raises:
        UserError: unreadable, with inputs or outputs that the network does not have, without bounds on an input, or
            with a conjunction of several inequalities of the outputs, which is no property of single margins.

    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    inputs = torch.Size(input_shape).numel()
    low, high = torch.full((inputs,), -torch.inf, dtype=torch.float64), torch.full((inputs,), torch.inf).double()
    rows: list[tuple[Tensor, float]] = []
    conjunction = 0
    declared = {"X": 0, "Y": 0}
    for statement in _parse(re.sub(r";[^\n]*", "", text), path):
        if statement[0] in ("declare-const", "assert") and len(statement) < 2:
            raise UserError(f"{path} has the statement {statement[0]!r} about nothing")
        if statement[0] == "declare-const":
            declared[str(statement[1])[0]] = declared.get(str(statement[1])[0], 0) + 1
        elif statement[0] == "assert":
            body = statement[1]
            names = set(re.findall(r"[XY]_\d+", str(body)))
            if body and body[0] in ("<=", ">=", "<", ">") and all(name[0] == "X" for name in names) and len(names) == 1:
                _bound(body, low, high, path)
            else:
                found = _disjuncts(body, outputs, path)
                conjunction += 1
                rows += found
        else:
            raise UserError(f"{path} has the statement {statement[0]!r}, expected declare-const or assert")
    if declared != {"X": inputs, "Y": outputs}:
        raise UserError(
            f"{path} is about {declared.get('X')} inputs and {declared.get('Y')} outputs, "
            f"the network has {inputs} of shape {input_shape} and {outputs}"
        )
    if conjunction != 1:
        raise UserError(f"{path} asserts {conjunction} conditions of the outputs, expected one (a disjunction)")
    if not rows:
        raise UserError(f"{path} asserts a disjunction of nothing: there is nothing to verify")
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise UserError(f"{path} leaves an input without bounds: every X needs both")
    return Property(
        low.view(input_shape),
        high.view(input_shape),
        torch.stack([row for row, _ in rows]),
        torch.tensor([constant for _, constant in rows], dtype=torch.float64),
    )


def _parse(text: str, path: Path) -> list[list]:
    """The statements as nested lists."""
    stack: list[list] = [[]]
    for token in re.findall(r"[()]|[^\s()]+", text):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) == 1:
                raise UserError(f"{path} closes a parenthesis that was not opened")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) != 1:
        raise UserError(f"{path} ends inside of a parenthesis: it is truncated")
    return [statement for statement in stack[0] if isinstance(statement, list) and statement]


def _sides(body: list, path: Path) -> tuple[Tree, Tree]:
    """What an inequality compares."""
    if len(body) != 3:
        raise UserError(f"{path} has an inequality {body[0]!r} of {len(body) - 1} sides, expected two")
    return body[1], body[2]


def _bound(body: list, low: Tensor, high: Tensor, path: Path) -> None:
    relation, (first, second) = body[0], _sides(body, path)
    if not str(first).startswith("X_"):
        first, second = second, first
        relation = {"<=": ">=", ">=": "<=", "<": ">", ">": "<"}[relation]
    place = int(str(first)[2:])
    if place >= len(low):
        raise UserError(f"{path} bounds {first}, the network has {len(low)} inputs")
    value = _number(second, path)
    if relation in ("<=", "<"):
        high[place] = min(float(high[place]), value)
    else:
        low[place] = max(float(low[place]), value)


def _number(tree: Tree, path: Path) -> float:
    if isinstance(tree, list) and len(tree) == 2 and tree[0] == "-":
        return -_number(tree[1], path)
    try:
        return float(str(tree))
    except ValueError:
        raise UserError(f"{path} has {tree!r} where a number belongs") from None


def _disjuncts(body: Tree, outputs: int, path: Path) -> list[tuple[Tensor, float]]:
    """Rows (c, d) such that the counter-examples are where some c y + d <= 0."""
    if not isinstance(body, list) or not body:
        raise UserError(f"{path} asserts {body!r}, expected an inequality or a disjunction")
    if body[0] == "or":
        return [row for part in body[1:] for row in _disjuncts(part, outputs, path)]
    if body[0] == "and":
        if len(body) != 2:
            raise UserError(
                f"{path} asserts several inequalities of the outputs at once: only disjunctions are verified"
            )
        return _disjuncts(body[1], outputs, path)
    if body[0] not in ("<=", ">=", "<", ">"):
        raise UserError(f"{path} asserts {body[0]!r}: only and, or and inequalities are read")
    (a, b), (c, d) = (_linear(side, outputs, path) for side in _sides(body, path))
    sign = 1.0 if body[0] in ("<=", "<") else -1.0
    return [(sign * (a - c), sign * (b - d))]


def _linear(tree: Tree, outputs: int, path: Path) -> tuple[Tensor, float]:
    """A linear expression of the outputs: its coefficients and its constant."""
    zero = torch.zeros(outputs, dtype=torch.float64)
    if isinstance(tree, str):
        if re.fullmatch(r"Y_\d+", tree):
            place = int(tree[2:])
            if place >= outputs:
                raise UserError(f"{path} speaks of {tree}, the network has {outputs} outputs")
            zero[place] = 1.0
            return zero, 0.0
        return zero, _number(tree, path)
    operator, *parts = tree or [""]
    terms = [_linear(part, outputs, path) for part in parts]
    if operator == "+":
        return torch.stack([row for row, _ in terms]).sum(0), sum(constant for _, constant in terms)
    if operator == "-":
        if len(terms) == 1:
            return -terms[0][0], -terms[0][1]
        return terms[0][0] - sum(row for row, _ in terms[1:]), terms[0][1] - sum(c for _, c in terms[1:])
    if operator == "*" and len(terms) == 2 and not bool(terms[0][0].any()):
        return terms[0][1] * terms[1][0], terms[0][1] * terms[1][1]
    raise UserError(f"{path} has the expression {operator!r}, which is not linear in the outputs")
