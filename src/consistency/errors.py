"""The error that a person can act on."""


class UserError(ValueError):
    """Wrong input. The commands print it without a traceback and exit with status 2.

    expected: what the input should be.
    got: what it is.
    remedy: what to do about it.
    """

    def __init__(self, expected: str, got: object = None, remedy: str = "") -> None:
        super().__init__(expected, got, remedy)
        self.expected, self.got, self.remedy = expected, got, remedy

    def __str__(self) -> str:
        if not self.remedy:
            return self.expected
        return f"expected {self.expected}\n  got: {self.got}\n  do: {self.remedy}"


def require(condition: bool, expected: str, got: object, remedy: str) -> None:
    """Raise `UserError(expected, got, remedy)` unless the condition holds."""
    if not condition:
        raise UserError(expected, got, remedy)
