"""The two expected ways to fail; the command line turns them into one sentence and an exit code."""


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
