"""Configurations of the commands, composed from conf/ as the command line composes them."""

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from conftest import ROOT
from consistency.commands import schema

CONF = ROOT / "conf"


def options(group: str) -> list[str]:
    """Return the names of a group's YAML files."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def composed(command: str, *overrides: str) -> DictConfig:
    """Compose the configuration of a command."""
    schema.register()
    schema.register_experiments(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, [*overrides, "output=/nowhere/run"])
