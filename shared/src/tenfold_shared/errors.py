"""The two expected ways to fail."""


class UserError(Exception):
    """Usage, configuration or data is wrong: exit code 2. The message is one sentence: what, where, what to do."""


class RunFailure(Exception):
    """The run itself failed (numerics, a claim demanded by --strict): exit code 1."""
