"""A `UserError` keeps its message, whichever process raises it."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from consistency.errors import UserError, require


class NarrowError(UserError):
    """A subclass, as modules may have."""


class Broken(Dataset[int]):
    """A data set whose samples cannot be read."""

    def __init__(self, kind: type[UserError]) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        try:
            raise OSError("an error below")
        except OSError as error:
            raise self.kind(
                "an image of 8 x 8", (index, "UserError"), "crop it\n      or: resize it"
            ) from error


def fail() -> None:
    require(False, "a", ["b"], "c")


TEXT = "expected an image of 8 x 8\n  got: (0, 'UserError')\n  do: crop it\n      or: resize it"


@pytest.mark.parametrize("kind", [UserError, NarrowError])
def test_a_worker_of_a_loader_hands_the_message_over(kind: type[UserError]) -> None:
    loader: Any = DataLoader(Broken(kind), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(kind) as caught:
        next(iter(loader))
    assert type(caught.value) is kind
    assert str(caught.value) == TEXT


@pytest.mark.slow
def test_a_process_of_a_pool_hands_the_fields_over() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, pytest.raises(UserError) as caught:
        pool.submit(fail).result()
    error = caught.value
    assert (error.expected, error.got, error.remedy) == ("a", "['b']", "c")


def test_a_value_that_cannot_be_pickled_is_kept_as_text() -> None:
    error = NarrowError("a number", fail.__get__, "give one")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is NarrowError
    assert str(copy) == str(error)
