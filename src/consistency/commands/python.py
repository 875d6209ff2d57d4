"""The commands in Python, without a command line."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from consistency.commands.cli import ERRORS, Main, message, outputs, perform, require_complete
from consistency.commands.overrides import changes, for_hydra, given_options
from consistency.commands.schema import register_experiments
from consistency.errors import UserError, require
from consistency.runtime.files import ROOT

RECORD = "_composed"
"""The attribute of a configuration that keeps what Hydra composed; a copy loses it."""


def compose(overrides: Sequence[str] = (), verb: str = "train") -> DictConfig:
    """Return the checked configuration of src/<verb>.py with these options, written as on its command line.

    config = compose(["mode=ct", "data=digits", "trainer.max_steps=100"])
    config.optimizer.lr = 1e-3
    train(config)
    """
    record = _compose(overrides, verb)
    config = deepcopy(record)
    with open_dict(config):
        del config["hydra"]
    require_complete(config)
    vars(config)[RECORD] = record
    return config


def _compose(overrides: Sequence[str], verb: str) -> DictConfig:
    register_experiments()
    options = [overrides] if isinstance(overrides, str) else list(overrides)
    verbs = sorted(file.stem for file in (ROOT / "conf").glob("*.yaml"))
    require(verb in verbs, f"a verb among {', '.join(verbs)}", verb, "choose one")
    # Another use of Hydra around this one continues unchanged.
    outer, base = GlobalHydra.instance().hydra, hydra.version.getbase()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return hydra.compose(verb, for_hydra(options), return_hydra_config=True)
    except ERRORS as error:
        raise UserError(message(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer
        if outer is not None:
            hydra.version.setbase(str(base))


def called(main: Main, config: DictConfig, verb: str) -> Any:
    """Run a verb's function with a configuration that was composed, and perhaps changed, in Python.

    Changes count as options of the command line: for a run that is resumed, and for further ranks. The default `output`
    becomes a fresh dated folder, which is in `config.output` afterwards.
    """
    composed = vars(config).get(RECORD)
    record = _compose([], verb) if composed is None else deepcopy(composed)
    before: Any = OmegaConf.to_container(record)
    plain: Any = OmegaConf.to_container(config)
    del before["hydra"]
    config.output = outputs.get(plain["output"]) or plain["output"]
    with read_write(record), open_dict(record):
        record.hydra.mode = RunMode.RUN
        record.hydra.overrides.task = [*given_options(record.hydra), *changes(before, plain)]
        record.hydra.runtime.cwd = record.hydra.runtime.output_dir = str(Path.cwd())
        if composed is None:
            record.hydra.runtime.choices = {}
    outer = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(record)
        return perform(verb, main, config)
    finally:
        HydraConfig.instance().cfg = outer
