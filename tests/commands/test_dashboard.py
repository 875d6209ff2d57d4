"""The workspace of W&B: its curves are those that a run logs."""

import re
from typing import Any

import pytest

from conftest import Run
from consistency.commands import dashboard
from wandb_files import documented


def test_without_its_package_one_message_says_so(
    verb: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    outcome = verb("dashboard", "entity=me")
    assert outcome.status == 2
    assert "pip install wandb-workspaces" in outcome.err and "Traceback" not in outcome.err


def test_every_curve_and_axis_is_a_documented_name() -> None:
    names = {re.sub("<.+?>", "x", name) for name in documented()}
    assert set(dashboard.AXES.values()) <= names
    for curves in dashboard.CURVES.values():
        for pattern in curves.values():
            assert any(re.search(pattern, name) for name in names), pattern


def test_the_workspace_has_a_section_for_each_of_the_names(
    verb: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = pytest.importorskip("wandb_workspaces.workspaces")
    saved: list[Any] = []
    monkeypatch.setattr(dashboard, "key_configured", lambda: True)
    monkeypatch.setattr(interface.Workspace, "save", lambda self: saved.append(self))
    monkeypatch.setattr(interface.Workspace, "url", "https://wandb.ai/me/p?nw=1")
    outcome = verb("dashboard", "entity=me", "project=p", "axis=images")
    assert outcome.status == 0, outcome.err
    assert "https://wandb.ai/me/p" in outcome.out
    (made,) = saved
    assert (made.entity, made.project) == ("me", "p")
    assert [s.name for s in made.sections] == ["samples", "quality", "train", "schedule", "speed"]
    assert made.settings.x_axis == "speed/images_seen"
    assert made._to_model()
