"""The error that a person can act on."""


class UserError(ValueError):
    """Wrong input: what is expected, what it is, and what to do. The commands print it and exit with status 2.

    With `expected` alone, that is the whole message. torch rebuilds an error of a loader's worker in this way, from a text
    with the worker's traceback in front.
    """

    def __init__(self, expected: str, got: object = "", remedy: str = "") -> None:
        if not remedy:
            expected = expected.rpartition(f"{type(self).__qualname__}: ")[2].rstrip()
        self.expected, self.got, self.remedy = expected, str(got), remedy
        super().__init__(self.expected, self.got, self.remedy)

    def __str__(self) -> str:
        if not self.remedy:
            return self.expected
        return f"expected {self.expected}\n  got: {self.got}\n  do: {self.remedy}"


class DivergenceError(UserError):
    """A loss or gradient that is not finite, at which a run stops."""


def require(condition: bool, expected: str, got: object, remedy: str) -> None:
    """Raise `UserError(expected, got, remedy)` unless the condition holds."""
    if not condition:
        raise UserError(expected, got, remedy)
