"""The computed memory of a step, against the bytes that a real one allocates."""

import memory
import pytest
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_the_computed_peak_is_that_of_real_allocations(recompute: bool) -> None:
    """Above the start of the step, on a small network; real kernels allocate a little inside of operators."""
    config = memory.configured(["mode=ct", "data=digits", "data.image_size=16"])
    OmegaConf.update(config, "model.network.checkpoint_activations", recompute, force_add=True)
    step = memory.steps(config, 32)
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    now = real = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        now += event.nbytes() if event.name() == "[memory]" else 0
        real = max(real, now)
    with memory.as_it_is, FakeTensorMode(), memory.Storages() as storages:
        step = memory.steps(config, 32)
        step()
        start = storages.peak = storages.now
        step()
    assert storages.peak - start == pytest.approx(real, rel=0.05)
