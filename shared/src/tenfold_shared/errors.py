"""The expected ways to fail; the command line turns them into one sentence and an exit code."""

import difflib
import errno
from collections.abc import Iterable

DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class UserError(ValueError):
    """Usage, configuration or data is wrong: exit code 2. The message is one sentence: what, where, what to do."""


class RunFailure(RuntimeError):
    """The run itself failed (numerics, a full disk, a claim that ``--strict`` demanded): exit code 1."""


class Interrupted(BaseException):
    """A signal stopped the run after its state was saved: exit code 128 + the signal's number."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses an unknown word: "; did you mean 'x'?", or nothing where no known word is close.

    Words are compared whole and by their last part, so that ``--epocs`` finds ``--optim.epochs``.
    """

    def likeness(other: str) -> float:
        pairs = [(word, other), (_last_part(word), _last_part(other))]
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    nearest = max(sorted(known), key=likeness, default="")
    return f"; did you mean {nearest!r}?" if likeness(nearest) >= 0.5 else ""


def _last_part(word: str) -> str:
    return word.rpartition(".")[2].removeprefix("--")
