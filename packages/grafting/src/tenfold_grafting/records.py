"""Files of one JSON line an image, written as the images are decided; a kill may cut the last line short."""

import json
from pathlib import Path
from typing import Any


def complete_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The lines of a file up to the first that is cut short, and whether they are all; none of a file that is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    good: list[dict[str, Any]] = []
    for line in lines:
        try:
            good.append(json.loads(line))
        except ValueError:
            return good, False
    return good, True


def recorded(path: Path) -> dict[int, dict[str, Any]]:
    """Image -> its line, for the lines that are complete; a line cut short is removed from the file."""
    good, whole = complete_lines(path)
    if not whole:
        path.write_text("".join(json.dumps(line) + "\n" for line in good), encoding="utf-8")
    return {line["index"]: line for line in good}
