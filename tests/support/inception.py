"""Inception with random weights in torch-fidelity's file layout: tests cannot download the published weights."""

from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as published


def write_random_inception(path: Path, seed: int = 0) -> Path:
    """Write weights whose features are of order one and differ between images."""
    network = published.FeatureExtractorInceptionV3
    with (
        mock.patch.object(published, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network, "load_state_dict"),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(seed)
        random = network("inception-v3-compat", ["2048"])
        for part in random.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    torch.save(random.state_dict(), path)
    return path
