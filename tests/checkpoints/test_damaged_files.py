"""Damaged checkpoints: each is refused, or opens as a complete model; checksums find flipped bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import consistency
from consistency.errors import UserError
from consistency.runtime.files import checksum_path
from hostile_programs import put, time_limit
from tiny_models import WITH_CHECKSUM, WITH_ROLE


def damaged(content: bytes, draw: np.random.Generator) -> bytes:
    """Return the content with one kind of damage: truncated, bits flipped, a part overwritten, removed, repeated or added."""
    data = bytearray(content)
    start = int(draw.integers(len(data)))
    length = int(draw.integers(1, 64))
    kind = draw.integers(8)
    if kind == 0:
        return bytes(data[:start])
    if kind == 1:
        for _ in range(int(draw.integers(1, 4))):
            data[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
    elif kind == 2:  # most structure is at the beginning or at the end
        edge = int(draw.integers(min(600, len(data))))
        data[edge if draw.integers(2) else -1 - edge] ^= 1 << int(draw.integers(8))
    elif kind == 3:
        data[start : start + length] = draw.bytes(length)
    elif kind == 4:
        del data[start : start + length]
    elif kind == 5:
        data[start:start] = data[start : start + length]
    elif kind == 6:
        data += draw.bytes(length)
    else:
        data[start : start + length] = bytes(len(data[start : start + length]))
    return bytes(data)


def fuzz(seed: int, files: dict[str, Path], folder: Path) -> str:
    """Damage one file and open it; return "refused" for one error, "opened" for a complete model."""
    draw = np.random.default_rng(seed)
    kind = sorted(files)[int(draw.integers(len(files)))]
    source = files[kind]
    inside = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    copy = folder / f"{seed}"
    for file in inside:
        target = copy / file.relative_to(source) if source.is_dir() else copy
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    hit = inside[int(draw.integers(len(inside)))]
    target = copy / hit.relative_to(source) if source.is_dir() else copy
    target.write_bytes(damaged(hit.read_bytes(), draw))
    try:
        with time_limit(20):
            loaded = consistency.load(copy, None if kind in WITH_ROLE else "consistency")
    except UserError as error:
        assert len(str(error)) < 1500
        return "refused"
    state = loaded.denoiser.network.state_dict()
    assert all(bool(torch.isfinite(value).all()) for value in state.values())
    if kind in WITH_CHECKSUM:
        expected = consistency.load(source, None if kind in WITH_ROLE else "consistency")
        whole = expected.denoiser.network.state_dict()
        assert all(torch.equal(state[name], whole[name]) for name in whole), (
            f"{kind} changed silently"
        )
        assert loaded.card == expected.card, f"the settings of {kind} changed silently"
    return "opened"


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_a_damaged_file_is_refused_or_opens_whole(
    first: int, files: dict[str, Path], tmp_path: Path
) -> None:
    outcomes = [fuzz(seed, files, tmp_path) for seed in range(first, first + 20)]
    assert outcomes.count("refused") >= 5


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 1100, 100))
def test_a_damaged_file_is_refused_or_opens_whole_in_many_trials(
    first: int, files: dict[str, Path], tmp_path: Path
) -> None:
    outcomes = [fuzz(seed, files, tmp_path) for seed in range(first, first + 100)]
    assert outcomes.count("refused") >= 40


@pytest.mark.parametrize("kind", WITH_CHECKSUM)
def test_a_flipped_bit_in_the_weights_is_detected(
    kind: str, files: dict[str, Path], tmp_path: Path
) -> None:
    """Flip a bit of the fraction of one weight, which only a checksum detects."""
    source = files[kind]
    name = source / "unet" / "diffusion_pytorch_model.safetensors" if source.is_dir() else source
    content = bytearray(name.read_bytes())
    loaded = consistency.load(source, None if kind in WITH_ROLE else "consistency")
    largest = max(loaded.denoiser.network.state_dict().values(), key=Tensor.numel)
    bytes_of: Any = largest.reshape(-1)[:8].numpy()
    offset = content.find(bytes_of.tobytes())
    assert offset > 0
    content[offset] ^= 1
    if source.is_dir():
        import shutil

        shutil.copytree(source, tmp_path / "copy")
        (tmp_path / "copy" / name.relative_to(source)).write_bytes(content)
    else:
        (tmp_path / "copy").write_bytes(content)
    with pytest.raises(UserError, match=r"checksum|CRC|changed"):
        consistency.load(tmp_path / "copy", None if kind in WITH_ROLE else "consistency")


def test_a_checksum_beside_any_file_is_verified(files: dict[str, Path], tmp_path: Path) -> None:
    """A checksum file detects a flipped bit in a format without its own checksum."""
    import hashlib

    content = bytearray(files["jcm"].read_bytes())
    path = put(tmp_path / "checkpoint_80", bytes(content))
    digest = hashlib.sha256(content).hexdigest()
    checksum_path(path).write_text(f"{digest}  {path.name}\n")
    consistency.load(path, "teacher")
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="changed or is damaged"):
        consistency.load(path, "teacher")
