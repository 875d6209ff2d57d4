"""Modes at equal training time: which run is the teacher of which."""

import pytest

from configurations import composed, options
from consistency.commands.compare import options_of, teachers_of
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


def test_an_element_may_add_options() -> None:
    """Its folder can be given back to Hydra."""
    options, folder = options_of("tcm model=dit_digits optimizer.lr=1e-3")
    assert options == ["mode=tcm", "model=dit_digits", "optimizer.lr=1e-3"]
    assert folder == "tcm_dit_digits_1e_3"
    config = composed("compare", "modes=[ect,'tcm model=dit_digits']")
    assert teachers_of(config)["tcm model=dit_digits"] == "ect"
