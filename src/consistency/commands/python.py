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

from consistency.commands.cli import ERRORS, Main, fresh_folders, message, perform, require_complete
from consistency.commands.overrides import changes, for_hydra, given_options
from consistency.commands.schema import register_experiments
from consistency.errors import UserError, require
from consistency.runtime.files import ROOT

RECORD = "_composed"
"""The attribute of a configuration that keeps what Hydra composed; a copy loses it."""

_defaults: dict[str, str] = {}
"""The default of `output` that each folder was made for."""


def composed(overrides: Sequence[str], verb: str) -> DictConfig:
    """Compose and check the configuration of a verb; see `consistency.compose`."""
    record = _compose(overrides, verb)
    config = _without_hydra(record)
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
    except UserError:
        raise
    except ERRORS as error:
        raise UserError(message(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer
        if outer is not None:
            hydra.version.setbase(str(base))


def _without_hydra(config: DictConfig) -> DictConfig:
    copy = deepcopy(config)
    with open_dict(copy):
        del copy["hydra"]
    return copy


def called(main: Main, config: DictConfig, verb: str) -> Any:
    """Run a verb's function with a configuration that was composed, and perhaps changed, in Python.

    Changes count as options of the command line: for a run that is resumed, and for further ranks. The default `output`
    becomes a fresh dated folder, which is in `config.output` afterwards.
    """
    composed_before = vars(config).get(RECORD)
    record = deepcopy(composed_before) if composed_before is not None else _compose([], verb)
    plain: Any = OmegaConf.to_container(config)
    before: Any = OmegaConf.to_container(_without_hydra(record))
    changed = changes(before, plain)
    config.output = output = _defaults.get(plain["output"], plain["output"])
    with read_write(record), open_dict(record):
        record.hydra.mode = RunMode.RUN
        record.hydra.overrides.task = [*given_options(record.hydra), *changed]
        record.hydra.runtime.cwd = record.hydra.runtime.output_dir = str(Path.cwd())
        if composed_before is None:
            record.hydra.runtime.choices = {}
    outer = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(record)
        return perform(verb, main, config)
    finally:
        if Path(config.output) in fresh_folders:
            _defaults[config.output] = output
        HydraConfig.instance().cfg = outer
