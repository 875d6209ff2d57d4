"""The error a person can act on: the one form in which the project says that something given to it is wrong."""


class UserError(ValueError):
    """Something given from outside is wrong: says what was expected, what came and what to do.

    The commands print it without a stack trace and exit with status 2.
    """


def require(condition: bool, expected: str, got: object, remedy: str) -> None:
    """Raises `UserError` in the one form of the house unless the condition holds."""
    if not condition:
        raise UserError(f"expected {expected}\n  got: {got}\n  do: {remedy}")
