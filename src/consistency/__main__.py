"""`python -m consistency --version`: the versions and devices of this installation, for a report of a fault."""

import argparse
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from consistency.runtime.files import commit

PACKAGES = (
    "torch", "torchvision", "lightning", "hydra-core", "omegaconf", "wandb", "torchmetrics", "torch-fidelity"
)  # fmt: skip


def installed(package: str) -> str:
    """Return the version of a package, from its metadata alone."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def report() -> Iterator[tuple[str, str]]:
    """Yield names and values: versions, the commit, and the devices that torch finds."""
    yield "consistency", f"{installed('consistency')}, commit {commit() or 'unknown'}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, installed(package)
    import torch  # seconds, so that `--help` needs none

    cudnn = torch.backends.cudnn.version()
    yield "CUDA", f"{torch.version.cuda}, cuDNN {cudnn}" if torch.version.cuda else "none in torch"
    yield "CPU", f"{platform.machine()}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None and other.type != "cuda":
        yield str(other.type), "available"


def main() -> None:
    """Print the report."""
    about = "Print versions and devices. The commands are src/<verb>.py; README.md lists them."
    parser = argparse.ArgumentParser("python -m consistency", description=about)
    parser.add_argument("--version", action="store_true", required=True, help="for a report")
    parser.parse_args()
    for name, value in report():
        print(f"{name:<14} {value}")


if __name__ == "__main__":
    main()
