"""The deliberate errors of `mutations.py` can be planted."""

import pytest
from mutations import MUTATIONS, ROOT, TESTS, Mutation, file_of_test


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_replaced_text_occurs_once_in_its_file(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.before) == 1
    assert mutation.before != mutation.after


def test_the_tests_of_mutations_exist() -> None:
    for name in TESTS:
        assert file_of_test(name).is_file(), name
