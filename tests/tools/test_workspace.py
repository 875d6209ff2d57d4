"""The drawing of the W&B workspace has the curves that W&B would show."""

from pathlib import Path

import pytest
import workspace

from consistency.commands.dashboard import CURVES


def test_a_panel_has_the_metrics_of_its_pattern_over_the_steps() -> None:
    rows = [
        {workspace.AXIS: 9, "train/loss": 3, "train/loss_noise_quartile_1": 4.0},
        {workspace.AXIS: 19, "train/loss": 2.5, "quality/fid/one_step/ema": 7.0},
    ]
    run = workspace.Run(Path("run"), "black", rows, {})
    assert list(run.curves(CURVES["train"]["Loss"])) == [("train/loss", [9, 19], [3.0, 2.5])]
    (quality,) = run.curves(CURVES["quality"]["Fréchet distance"])
    assert quality == ("quality/fid/one_step/ema", [19], [7.0])
    assert not list(run.curves(CURVES["schedule"]["Scales N(k)"]))


def test_a_run_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="WANDB_MODE=offline"):
        workspace.read(tmp_path, "black")
