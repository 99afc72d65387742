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
    """The end of a sentence that refuses an unknown word: "; did you mean 'x'?", or nothing where no known word is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""
