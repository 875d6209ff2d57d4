"""Exponential moving averages of weights, written once for the target network and for evaluation."""

import copy
from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def frozen_copy(module: ModuleT) -> ModuleT:
    """A copy whose parameters take no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, online: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) online, over all parameters, in place; decay in [0, 1].

    [Song et al. 2023, arXiv:2303.01469, Algorithms 2 and 3, for the target network]. Buffers are constants of our
    networks and stay as they are.
    """
    torch._foreach_lerp_(
        [p for p in average.parameters()], [p.detach() for p in online.parameters()], 1 - decay
    )
