"""Modes at equal training time: which run is the teacher of which."""

import pytest

from configurations import composed, options
from consistency.commands.compare import teachers_of
from consistency.errors import UserError


def test_a_mode_has_the_teacher_of_all_or_its_own() -> None:
    config = composed("compare")
    teachers = teachers_of(config)
    assert list(teachers) == list(config.modes)
    assert teachers.pop("tcm") == "ect"
    assert set(teachers.values()) == {config.teacher_mode}
    assert {f"{config.data}_{mode}" for mode in config.modes} <= set(options("recipe"))


@pytest.mark.parametrize("modes", ["[tcm]", "[tcm,ect]"])
def test_a_teacher_is_trained_before_its_student(modes: str) -> None:
    with pytest.raises(UserError, match="teacher of tcm among the modes before it: edm"):
        teachers_of(composed("compare", f"modes={modes}"))
