"""Hostile and malformed checkpoints: each is refused by one clear error, and none runs code."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import consistency
import foreign
from conftest import REPORT
from consistency.errors import UserError
from hostile_programs import (
    Call,
    archive,
    doubled,
    nested_pickle,
    nvlabs_meta,
    older_program,
    put,
    safetensors_file,
    tensor_program,
    time_limit,
    write_persistent,
)
from tiny_models import TINY_ADM, TINY_SONG, tiny_card, write_card, write_config, write_weights

MARK = "executed_by_a_checkpoint"


Write = Callable[[Path], Path]


LONG = b"\x8e" + struct.pack("<Q", 1 << 62)


HOSTILE: dict[str, tuple[Write, str]] = {
    # Wrong kinds
    "empty": (lambda p: put(p, b""), "an empty file"),
    "text": (lambda p: put(p, b"not a checkpoint at all"), "begins with"),
    "image": (lambda p: put(p, b"\x89PNG\r\n\x1a\n" + b"\x00" * 64), "different names"),
    "arrays": (
        lambda p: (np.savez(p, x=np.zeros(3)), p.with_name(f"{p.name}.npz"))[1],
        "torch did not write",
    ),
    "optimizer state": (lambda p: (torch.save({"state": {}}, p), p)[1], "no model"),
    "a tensor": (lambda p: (torch.save(torch.zeros(3), p), p)[1], "no model"),
    "empty folder": (lambda p: (p.mkdir(), p)[1], "a folder that is neither"),
    "other pipeline": (
        lambda p: (
            p.mkdir(),
            (p / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}'),
            p,
        )[2],
        "DDPMPipeline",
    ),
    # Code
    "os.system": (
        lambda p: put(p, pickle.dumps({"ema": Call(os.system, f"touch {MARK}")})),
        r"posix.system|os.system",
    ),
    "eval in an archive": (
        lambda p: archive(p, pickle.dumps({"card": Call(eval, f"open('{MARK}', 'w')")}, 2)),
        "eval",
    ),
    "torch.load": (lambda p: put(p, pickle.dumps({"ema": Call(torch.load, "x")})), r"torch\S*load"),
    "attribute of a name": (
        lambda p: put(
            p, b"\x80\x02cbuiltins\ngetattr\nccollections\nOrderedDict\nX\x03\x00\x00\x00pop\x86R."
        ),
        "attribute 'pop' of collections.OrderedDict",
    ),
    "call of a method": (
        lambda p: write_persistent(p, Call(foreign.EctLoss().t_to_r, 1.0)),
        "calls Object",
    ),
    "old names": (
        lambda p: put(p, b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
        "os.system",
    ),
    "a class instance": (lambda p: put(p, b"\x80\x02ctorch.nn\nLinear\n)\x81."), "torch.nn.Linear"),
    "instruction INST": (lambda p: put(p, b"\x80\x02(ios\nsystem\n."), "INST"),
    "extension registry": (lambda p: put(p, b"\x80\x02\x82\x01."), "EXT1"),
    "call of a storage": (
        lambda p: put(p, b"\x80\x02ctorch\nFloatStorage\n)R."),
        "torch.FloatStorage",
    ),
    "state on a name": (lambda p: put(p, b"\x80\x02ccollections\nOrderedDict\n}b."), "OrderedDict"),
    # Sizes
    "long bytes": (lambda p: put(p, b"\x80\x04" + LONG + b"abc."), "no sense"),
    "long array of bytes": (
        lambda p: put(p, b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"abc."),
        "no sense",
    ),
    "memo bomb": (lambda p: put(p, b"\x80\x02]r\xff\xff\xff\xff."), "no model"),
    "deep lists": (lambda p: put(p, nested_pickle(50_000)), "no model"),
    "deep keys": (
        lambda p: put(p, b"\x80\x02})" + b"\x85" * 50_000 + b"Ns."),
        "keys that no checkpoint has",
    ),
    "doubled lists": (
        lambda p: archive(p, pickle.dumps({"card": tiny_card(process={"t_min": doubled(60)})}, 2)),
        "card",
    ),
    "doubled settings": (
        lambda p: archive(
            p, pickle.dumps({"card": tiny_card(network={"_target_": doubled(60)})}, 2)
        ),
        "card|weights",
    ),
    "repeated copies": (
        lambda p: put(
            p,
            b"\x80\x02c_codecs\nencode\nq\x00X\x00\x00\x10\x00"
            + b"a" * (1 << 20)
            + b"q\x01"
            + b"h\x00h\x01X\x06\x00\x00\x00latin1\x86R" * 500
            + b".",
        ),
        "over and over",
    ),
    "zip bomb": (
        lambda p: archive(
            p, tensor_program(1 << 24, 0, (4,), (1,)), zipfile.ZIP_DEFLATED, r0=b"\x00" * (1 << 26)
        ),
        "compressed",
    ),
    "short storage": (
        lambda p: archive(p, tensor_program(1 << 40, 0, (4,), (1,)), r0=b"\x00" * 64),
        "full length",
    ),
    "no storage": (lambda p: archive(p, tensor_program(16, 0, (4,), (1,))), "full length"),
    "view beyond": (
        lambda p: archive(p, tensor_program(16, 8, (16,), (1,)), r0=b"\x00" * 64),
        "reaches out",
    ),
    "negative stride": (
        lambda p: archive(p, tensor_program(16, 8, (4,), (-1,)), r0=b"\x00" * 64),
        "impossible",
    ),
    "endless view": (
        lambda p: archive(p, tensor_program(16, 0, (1 << 40,), (0,)), r0=b"\x00" * 64),
        "reaches out",
    ),
    "older storage": (lambda p: put(p, older_program(1 << 44)), "larger than the file"),
    "older short storage": (lambda p: put(p, older_program(4)), "full length|early"),
    "msgpack array": (lambda p: put(p, b"\x81\xa1a\xdd\xff\xff\xff\xff"), "ends early"),
    "msgpack map": (lambda p: put(p, b"\xdf\xff\xff\xff\xff"), "ends early"),
    "msgpack bytes": (lambda p: put(p, b"\x81\xa1a\xc6\xff\xff\xff\xff"), "ends early"),
    "msgpack extension": (lambda p: put(p, b"\x81\xa1a\xc9\xff\xff\xff\xff\x01"), "ends early"),
    "msgpack depth": (lambda p: put(p, b"\x81\xa1a" * 100_000 + b"\xc0"), "deeper"),
    "msgpack shape": (
        lambda p: put(
            p,
            foreign.pack({"params_ema": {}})[:-1]
            + b"\x81\xa1a\xc7\x20\x01\x93\x91\xcf"
            + b"\x00\x00\x00\xff\xff\xff\xff\xff\xa7float32\xc4\x04"
            + b"\x00" * 12,
        ),
        "no sense|array|impossible|early",
    ),
    "header length": (lambda p: put(p, struct.pack("<Q", 1 << 60) + b'{"a":1}'), "begins with"),
    "header nonsense": (lambda p: put(p, safetensors_file(b"{" + b" " * 40)), "no sense"),
    "header as long as a pickle begins": (
        lambda p: put(
            p,
            safetensors_file(
                b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x280), b"\x00" * 4
            ),
        ),
        "1 tensors named a",
    ),
    "tensor past the end": (
        lambda p: put(
            p,
            safetensors_file(
                b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}', b"\x00" * 16
            ),
        ),
        "no sense",
    ),
    # Weights
    "nan": (
        lambda p: write_weights(p, lambda w: w["out.2.weight"].fill_(float("nan"))),
        "not all finite",
    ),
    "infinite": (
        lambda p: write_weights(p, lambda w: w["out.2.bias"].fill_(float("inf"))),
        "not all finite",
    ),
    "integers": (
        lambda p: write_weights(p, lambda w: w.update({"out.2.bias": torch.zeros(3).long()})),
        "floating",
    ),
    "missing": (
        lambda p: write_weights(p, lambda w: w.update({"none": w.pop("out.0.bias")})),
        r"out\.0\.bias",
    ),
    "unknown": (lambda p: write_weights(p, lambda w: w.update(extra=torch.zeros(3))), "extra"),
    "shape": (
        lambda p: write_weights(p, lambda w: w.update({"out.0.bias": torch.zeros(7)})),
        r"out\.0\.bias",
    ),
    "guided diffusion": (
        lambda p: write_weights(
            p, lambda w: w.update({k: v[..., 0] for k, v in w.items() if k.endswith("qkv.weight")})
        ),
        "guided-diffusion",
    ),
    "block far away": (
        lambda p: write_weights(
            p, lambda w: w.update({"output_blocks.99999999999.0.bias": torch.zeros(1)})
        ),
        "another network|no ADM",
    ),
    # Settings
    "foreign target": (
        lambda p: write_card(p, network={"_target_": "os.system", "command": "true"}),
        "os.system",
    ),
    "function as target": (
        lambda p: write_card(p, preconditioning={"_target_": "torch.load", "f": "x"}),
        "torch.load",
    ),
    "own function as target": (
        lambda p: write_card(
            p, network={"_target_": "consistency.networks.layers.zeroed", "module": 1}
        ),
        "zeroed",
    ),
    "interpolation": (
        lambda p: write_card(p, network=TINY_ADM | {"attention": "${oc.env:HOME}"}),
        "plain arguments",
    ),
    "endless network": (
        lambda p: write_card(p, network=TINY_ADM | {"num_res_blocks": 10**6}),
        "more blocks",
    ),
    "huge network": (
        lambda p: write_card(p, network=TINY_ADM | {"model_channels": 1 << 20}),
        "shape",
    ),
    "beyond numbers": (
        lambda p: write_card(p, network=TINY_ADM | {"model_channels": 1 << 70}),
        "plain arguments",
    ),
    "unknown argument": (lambda p: write_card(p, network=TINY_ADM | {"colour": 1}), "colour"),
    "negative sigma_data": (
        lambda p: write_card(
            p, preconditioning=tiny_card()["preconditioning"] | {"sigma_data": -1.0}
        ),
        "sigma_data",
    ),
    "another role": (lambda p: write_card(p, role="student"), "card"),
    "no image": (lambda p: write_card(p, image=None), "card"),
    "card of no kind": (lambda p: archive(p, pickle.dumps({"card": {}}, 2)), "card"),
    "many layers": (
        lambda p: write_config(p, layers_per_block=10**9),
        "layers_per_block=1000000000",
    ),
    "wide blocks": (
        lambda p: write_config(p, block_out_channels=[1 << 40]),
        "plain|no sense|shape",
    ),
    "fourier time": (
        lambda p: write_config(p, time_embedding_type="fourier"),
        "time_embedding_type",
    ),
    "unknown block": (
        lambda p: write_config(p, down_block_types=["KDownBlock2D"]),
        "mirror|KDownBlock2D",
    ),
    "no head": (lambda p: write_config(p, attention_head_dim=0), "attention_head_dim=0"),
    "deep config": (
        lambda p: (write_config(p), (p / "config.json").write_text("[" * 100_000))[0],
        "no sense",
    ),
    "other preconditioning": (
        lambda p: write_persistent(p, nvlabs_meta("VPPrecond", {"_modules": {}})),
        "VPPrecond",
    ),
    "other network": (
        lambda p: write_persistent(
            p, nvlabs_meta("EDMPrecond", {"_modules": {"model": nvlabs_meta("UNet", {})}})
        ),
        "class UNet",
    ),
    "no settings": (
        lambda p: write_persistent(
            p,
            nvlabs_meta(
                "EDMPrecond",
                {"_modules": {"model": nvlabs_meta("SongUNet", {"_init_kwargs": None})}},
            ),
        ),
        "without its settings",
    ),
}


REFUSED: list[str] = []


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_error(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    write, hint = HOSTILE[name]
    path = write(tmp_path / "some.file")
    with time_limit(20), pytest.raises(UserError, match=hint) as error:
        consistency.load(
            path, "teacher" if path.is_dir() else None if "card" in hint else "consistency"
        )
    assert len(str(error.value)) < 1200
    assert len(str(error.value).splitlines()) <= 4
    assert not (tmp_path / MARK).exists()
    REFUSED.append(name)
    if name == [*HOSTILE][-1]:
        record_property(REPORT, f"checkpoints: {len(REFUSED)} hostile or wrong files refused")


def test_the_source_in_an_nvlabs_snapshot_does_not_run(files: dict[str, Path]) -> None:
    assert foreign.SOURCE.encode()[:40] in files["nvlabs"].read_bytes()
    consistency.load(files["nvlabs"])


def test_modules_nested_exponentially_often_are_refused(tmp_path: Path) -> None:
    """Walking a chain in which every module holds the next one twice would take forever."""
    inner = nvlabs_meta("UNetBlock", {"_modules": {}, "_parameters": {}, "_buffers": {}})
    for _ in range(40):
        both = {"a": inner, "b": inner}
        inner = nvlabs_meta("UNetBlock", {"_modules": both, "_parameters": {}, "_buffers": {}})
    inner.class_name = "SongUNet"
    inner.attributes["_init_kwargs"] = TINY_SONG | {"in_channels": 3, "out_channels": 3}
    path = write_persistent(
        tmp_path / "p", nvlabs_meta("EDMPrecond", {"_modules": {"model": inner}, "sigma_data": 0.5})
    )
    with (
        time_limit(20),
        pytest.raises(UserError, match="contain each other"),
    ):
        consistency.load(path)
