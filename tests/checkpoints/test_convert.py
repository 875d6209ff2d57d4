"""`python src/convert.py`, downloads of published files, and foreign files wherever a checkpoint may stand."""

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import consistency
import foreign
from conftest import ROOT, SHORT, TINY, Run
from consistency.checkpoints import load, nvlabs, ours, pretrained
from consistency.errors import UserError
from consistency.inference.model import Model
from consistency.runtime.files import checksum_path
from real_pipelines import same_images
from tiny_models import (
    TINY_SONG,
    WITH_CHECKSUM,
    WITH_ROLE,
    randomised,
    tiny_adm,
    tiny_card,
    write_card,
)

SUFFIXES = {"a file": "model.safetensors", "a torch file": "model.pt", "a folder": "model"}


def role_of(kind: str) -> list[str]:
    return [] if kind in WITH_ROLE else ["role=consistency"]


def same_model(a: Model, b: Model) -> None:
    ours, theirs = a.denoiser.network.state_dict(), b.denoiser.network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert a.card == b.card


# -------------------------------------------------------------------------------- converting


@pytest.mark.parametrize(
    ("kind", "place"),
    [(k, "a file") for k in ("ours", "openai", "state", "jcm", "diffusers", "unet")]
    + [("nvlabs", place) for place in SUFFIXES],
)
def test_to_ours(
    kind: str, place: str, files: dict[str, Path], convert: Run, tmp_path: Path
) -> None:
    """Every format in, ours out; what is written says its role, and is the same model."""
    target = tmp_path / SUFFIXES[place]
    outcome = convert(f"source={files[kind]}", "to=ours", f"output={target}", *role_of(kind))
    assert outcome.status == 0, outcome.err
    role = None if kind in WITH_ROLE else "consistency"
    same_model(consistency.load(target), consistency.load(files[kind], role))
    assert re.search(r"parameters +[\d,]+\n", outcome.out)
    names = {"openai": "OpenAI", "jcm": "JAX", "unet": "diffusers", "state": "NVlabs"}
    assert names.get(kind, kind).lower() in outcome.out.lower()


@pytest.mark.parametrize("place", SUFFIXES)
def test_to_openai(place: str, files: dict[str, Path], convert: Run, tmp_path: Path) -> None:
    """The published code loads the torch file: a flat state dict under its names."""
    target = tmp_path / SUFFIXES[place]
    outcome = convert(f"source={files['sealed']}", "to=openai", f"output={target}")
    assert outcome.status == 0, outcome.err
    same_model(consistency.load(target), consistency.load(files["sealed"]))
    if target.suffix == ".pt":
        found, expected = torch.load(target, weights_only=True), tiny_adm()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["nvlabs", "jcm"])
@pytest.mark.parametrize("to", ["openai", "diffusers"])
def test_another_network_has_no_such_form(
    kind: str, to: str, files: dict[str, Path], convert: Run, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    outcome = convert(f"source={files[kind]}", f"to={to}", f"output={target}", *role_of(kind))
    assert outcome.status == 2
    assert "a network other than ADM" in outcome.err
    assert not target.exists()


def test_safetensors_hold_the_card(files: dict[str, Path]) -> None:
    import json

    from safetensors import safe_open

    with safe_open(files["sealed"], framework="pt") as file:
        assert json.loads(file.metadata()["consistency"]) == tiny_card()


MISTAKES = {
    "nothing to do": ([], "source="),
    "two things to do": (["source=a", "verify=b"], "one of the two"),
    "unknown format": (["source={openai}", "to=onnx"], "to="),
    "unknown role": (["source={openai}", "role=student"], "role="),
    "no role": (["source={openai}"], "role=consistency"),
    "another role": (["source={nvlabs}", "role=consistency"], "a consistency checkpoint"),
    "nothing there": (["source=/nowhere"], "/nowhere"),
    "other weights": (["source={openai}", "role=teacher", "weights=online"], "weights"),
    "unknown release": (["source=openai:cd_imagenet64_lpip"], "openai:cd_imagenet64_lpips"),
    "heads that do not divide": (
        ["source={openai}", "role=teacher", "num_head_channels=7"],
        "num_head_channels",
    ),
    "a file for a folder": (["source={sealed}", "to=diffusers", "output=x.pt"], "folder"),
    "misspelt option": (["sauce={sealed}"], "sauce"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(name: str, files: dict[str, Path], convert: Run) -> None:
    arguments, hint = MISTAKES[name]
    outcome = convert(*(a.format(**files) for a in arguments))
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert hint in outcome.err
    assert not any(Path.cwd().iterdir())


def test_nothing_is_overwritten(files: dict[str, Path], convert: Run, tmp_path: Path) -> None:
    target = tmp_path / "taken.safetensors"
    target.write_text("mine")
    outcome = convert(f"source={files['ours']}", f"output={target}")
    assert outcome.status == 2
    assert "output=" in outcome.err
    assert target.read_text() == "mine"


def test_as_a_process(files: dict[str, Path], process: Run, tmp_path: Path) -> None:
    """From another folder, with a relative output."""
    outcome = process("convert", f"source={files['nvlabs']}", "output=here/model.safetensors")
    assert outcome.status == 0, outcome.err
    same_model(
        consistency.load(tmp_path / "process_cwd" / "here" / "model.safetensors"),
        consistency.load(files["nvlabs"]),
    )


# --------------------------------------------------------------------------------- verifying


@pytest.mark.parametrize("kind", [*WITH_CHECKSUM, "nvlabs", "jcm", "unet"])
def test_verify(kind: str, files: dict[str, Path], convert: Run) -> None:
    outcome = convert(f"verify={files[kind]}", *role_of(kind))
    assert outcome.status == 0, outcome.err
    assert "verified" in outcome.out
    for line in ("format", "role", "keys", "parameters", "boundary", "outputs", "sample"):
        assert re.search(rf"^{line} ", outcome.out, re.MULTILINE), line
    if kind not in ("nvlabs", "state"):
        assert "max |f(x, t_min) - x| = 0\n" in outcome.out


def test_equal_models_have_equal_hashes(files: dict[str, Path], convert: Run) -> None:
    found = {}
    for kind in ("ours", "sealed", "openai", "diffusers", "nvlabs"):
        outcome = convert(f"verify={files[kind]}", "image_size=8", *role_of(kind))
        found[kind] = re.search(r"^sample +(\w+)", outcome.out, re.MULTILINE)[1]  # type: ignore[index]
    assert len({found[kind] for kind in ("ours", "sealed", "openai", "diffusers")}) == 1
    assert found["nvlabs"] != found["ours"]


def test_verify_finds_a_broken_model(convert: Run, tmp_path: Path) -> None:
    """Weights that overflow, and a consistency model without the boundary condition."""
    weights = {name: value * 1e30 for name, value in tiny_adm().items()}
    path = tmp_path / "huge.ckpt"
    ours.write({"card": tiny_card(), "weights": weights}, path)
    outcome = convert(f"verify={path}")
    assert outcome.status == 2
    assert "not finite at t = " in outcome.err

    scalings = {"_target_": "consistency.preconditioning.EDM", "sigma_data": 0.5}
    path = write_card(tmp_path / "edm.ckpt", preconditioning=scalings | {"c_noise_scale": 250.0})
    outcome = convert(f"verify={path}")
    assert outcome.status == 2
    assert "|f(x, t_min) - x|" in outcome.err


# --------------------------------------------------------- wherever a checkpoint may stand


def tiny_digits_teacher(path: Path) -> Path:
    """An NVlabs file of a denoiser of the digits' size and classes."""
    kwargs = TINY_SONG | {"img_channels": 1, "label_dim": 10}
    settings = nvlabs.settings("SongUNet", kwargs | {"in_channels": 1, "out_channels": 1})
    state = randomised(load.build(settings, load.NETWORKS, torch.nn.Module))
    return foreign.write_nvlabs(path, kwargs, {f"model.{k}": v for k, v in state.items()})


def test_a_teacher_from_nvlabs(verb: Run, tmp_path: Path) -> None:
    teacher = tiny_digits_teacher(tmp_path / "network-snapshot-000001.pkl")
    output = tmp_path / "run"
    outcome = verb(
        "train",
        "mode=cd",
        f"teacher={teacher}",
        "init=null",
        *TINY,
        "trainer.max_steps=1",
        f"output={output}",
    )
    assert outcome.status == 0, outcome.err
    assert consistency.load(output).card.role == "consistency"


def test_samples_from_a_foreign_file(verb: Run, files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "samples"
    outcome = verb(
        "sample",
        f"checkpoint={files['openai']}",
        "role=consistency",
        "sampler=multistep",
        "num_samples=2",
        f"output={output}",
    )
    assert outcome.status == 0, outcome.err
    assert (output / "grid.png").is_file()


def test_initial_weights_from_any_format(files: dict[str, Path]) -> None:
    """The role does not matter for `init=`; the network and its time input do."""
    network = load.build(tiny_card()["network"], load.NETWORKS, torch.nn.Module)
    load.load_initial(str(files["openai"]), network, weights="ema", c_noise_scale=250.0)
    expected = tiny_adm()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match=r"c_noise_scale=250"):
        load.load_initial(str(files["openai"]), network, weights="ema", c_noise_scale=0.25)
    with pytest.raises(UserError, match="of another network"):
        load.load_initial(str(files["nvlabs"]), network, weights="ema", c_noise_scale=0.25)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("network", "scale"),
    [
        pytest.param(SHORT, 0.25, marks=pytest.mark.slow),
        (TINY, 0.25),
        pytest.param(TINY, 250, marks=pytest.mark.slow),
    ],
    ids=["the default network", "a tiny one", "another time input"],
)
def test_a_model_trained_here_opens_in_diffusers(
    network: list[str], scale: float, verb: Run, convert: Run, tmp_path: Path
) -> None:
    """The real pipeline draws the images that our sampler draws from the same noise, whatever the time input."""
    diffusers = pytest.importorskip("diffusers")
    output = tmp_path / "run"
    outcome = verb(
        "train",
        "mode=ect",
        *network,
        "trainer.max_steps=2",
        f"model.c_noise_scale={scale}",
        f"output={output}",
    )
    assert outcome.status == 0, outcome.err
    last, folder = load.find(output), tmp_path / "pipeline"
    content = ours.read(last)  # two steps leave the output near its initial zero
    for average in content["callbacks"]["EvaluationEMA"]["averages"].values():
        average |= {
            k: torch.randn_like(v) * (v[0].numel() or 1) ** -0.5 for k, v in average.items()
        }
    ours.write(content, last)
    outcome = convert(f"source={output}", "to=diffusers", f"output={folder}")
    assert outcome.status == 0, outcome.err
    pipe = diffusers.ConsistencyModelPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    same_images(pipe, consistency.load(output), [3, 7])
    same_model(consistency.load(folder), consistency.load(output))
    if (
        scale != 250
    ):  # written on by others, it would be a table of 40 times that nothing says is one
        pipe.save_pretrained(tmp_path / "copy")
        with pytest.raises(UserError, match="time_embedding_dim"):
            consistency.load(tmp_path / "copy")


# --------------------------------------------------------------------------------- downloads


class Server(BaseHTTPRequestHandler):
    """Serves one file, in parts if asked, and may break off early."""

    content: ClassVar[bytes] = b""
    breaks_after: ClassVar[int | None] = None
    requests: ClassVar[list[str]] = []
    tag: ClassVar[str] = '"one"'

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.requests.append(asked or "all")
        start = 0
        if asked and self.headers.get("If-Range") == self.tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(self.content) > 0 and start:
            self.send_error(416)
            return
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", self.tag)
        self.send_header("Content-Length", str(len(body)))
        if start:
            total = len(self.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        self.wfile.write(body[: self.breaks_after])

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of one file."""
    for name, value in {"breaks_after": None, "requests": [], "tag": '"one"'}.items():
        monkeypatch.setattr(Server, name, value)
    http = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/ema.pt"
    http.shutdown()
    http.server_close()


@pytest.fixture
def release(
    server: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Path:
    """Makes openai:cd_imagenet64_lpips a small file on that server; where it will be cached."""
    monkeypatch.setenv("CONSISTENCY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Server, "content", files["openai"].read_bytes())
    small = pretrained.Released(server, "consistency", len(Server.content) // 2)
    monkeypatch.setitem(pretrained.RELEASED, "openai:cd_imagenet64_lpips", small)
    return tmp_path / "cache" / "openai" / "ema.pt"


NAME = "openai:cd_imagenet64_lpips"


def test_a_published_name_is_fetched_once(release: Path, files: dict[str, Path]) -> None:
    """Its role is known, the file is cached, and its checksum is kept and verified."""
    for _ in range(2):
        same_model(consistency.load(NAME), consistency.load(files["openai"], "consistency"))
    assert Server.requests == ["all"]
    digest = hashlib.sha256(Server.content).hexdigest()
    assert checksum_path(release).read_text().startswith(digest)
    with pytest.raises(UserError, match="a consistency checkpoint"):
        consistency.load(NAME, "teacher")
    content = bytearray(release.read_bytes())
    content[len(content) // 2] ^= 1
    release.write_bytes(content)
    with pytest.raises(UserError, match="changed or is damaged"):
        consistency.load(NAME)


def test_a_broken_download_goes_on(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "breaks_after", 1000)
    for _ in range(2):
        with pytest.raises(UserError, match="run it again"):
            consistency.load(NAME)
    assert not release.exists()
    monkeypatch.setattr(Server, "breaks_after", None)
    consistency.load(NAME)
    assert Server.requests == ["all", "bytes=1000-", "bytes=2000-"]
    assert release.read_bytes() == Server.content


def test_a_file_that_changed_meanwhile_begins_anew(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "breaks_after", 1000)
    with pytest.raises(UserError):
        consistency.load(NAME)
    monkeypatch.setattr(Server, "breaks_after", None)
    monkeypatch.setattr(Server, "tag", '"two"')
    consistency.load(NAME)
    assert release.read_bytes() == Server.content


def test_a_page_in_place_of_the_file_is_refused(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "content", b"<html>come back later</html>")
    with pytest.raises(UserError, match="bytes"):
        consistency.load(NAME)
    assert not release.exists()


def test_offline_says_what_to_do(
    convert: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CONSISTENCY_CACHE", str(tmp_path / "cache"))
    nowhere = pretrained.Released("http://127.0.0.1:9/cd.pt", "consistency", 10)
    monkeypatch.setitem(pretrained.RELEASED, NAME, nowhere)
    outcome = convert(f"source={NAME}")
    assert outcome.status == 2
    assert "http://127.0.0.1:9/cd.pt" in outcome.err
    assert str(tmp_path / "cache" / "openai" / "cd.pt") in outcome.err


def test_the_documentation_lists_every_published_file() -> None:
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    rows = {row.split("`")[1] for row in text.splitlines() if row.startswith("| `")}
    assert {row for row in rows if ":" in row and not row.startswith("hf:")} == set(
        pretrained.RELEASED
    )
