"""The Hugging Face Hub: the folder of `convert to=hub`, push=, and hf: names, without a network."""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import consistency
from conftest import Run
from consistency.checkpoints import hub, ours
from consistency.checkpoints.load import find, load
from consistency.errors import UserError
from consistency.inference.card import ModelCard
from consistency.runtime.files import fingerprint
from tiny_models import tiny, tiny_adm

library = pytest.importorskip("huggingface_hub")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> Path:
    """An empty cache of the library, which is offline."""
    constants = import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def in_cache(
    cache: Path, name: str, content: Path, commit: str = COMMIT, ref: str = "main"
) -> None:
    """Put a folder into the library's cache as a revision of a repository, files as links to blobs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for folder in ("refs", "blobs"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    for file in (path for path in content.rglob("*") if path.is_file()):
        blob = repository / "blobs" / fingerprint(file)
        shutil.copyfile(file, blob)
        link = repository / "snapshots" / commit / file.relative_to(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


def same_weights(a: Any, b: Any) -> bool:
    first, second = (model.denoiser.network.state_dict() for model in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# ---------------------------------------------------------------------------- the folder


def test_the_folder_has_weights_settings_pipeline_samples_and_a_valid_card(
    files: dict[str, Path], convert: Run, tmp_path: Path, cache: Path
) -> None:
    """What is written is the model again: as ours, as diffusers' pipeline, and by its name on the Hub."""
    target = tmp_path / "tiny"
    outcome = convert(f"source={files['sealed']}", "to=hub", f"output={target}", "license=mit")
    assert outcome.status == 0, outcome.err
    assert {file.name for file in target.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "samples.png"),
        *("model_index.json", "scheduler", "unet"),
    }
    source = load(files["sealed"])
    assert same_weights(load(target), source)
    card = ModelCard.parse(json.loads((target / "config.json").read_text()), target)
    assert card == source.card
    theirs = load(target / "unet" / "diffusion_pytorch_model.safetensors")
    assert same_weights(theirs, source)
    read = library.ModelCard.load(target / "README.md")
    assert read.data.license == "mit"
    assert read.data.library_name == "diffusers"
    assert {"consistency-models", "consistency"} <= set(read.data.tags)
    assert "![Samples in 1 and 2 steps" in read.text
    assert 'ConsistencyModelPipeline.from_pretrained("<user>/tiny")' in read.text
    assert "Not measured." in read.text
    in_cache(cache, "someone/tiny", target)
    assert same_weights(load("hf:someone/tiny"), source)


def test_a_network_that_diffusers_lacks_goes_without_a_pipeline(
    files: dict[str, Path], convert: Run, tmp_path: Path
) -> None:
    target = tmp_path / "song"
    shutil.copyfile(files["nvlabs"], tmp_path / "cwd" / "song.pkl")
    outcome = convert("source=song.pkl", "to=hub", f"output={target}")
    assert outcome.status == 0, outcome.err
    assert "no pipeline, because diffusers does not have a network other than ADM" in outcome.out
    assert "license     not stated" in outcome.out
    assert not (target / "unet").exists()
    assert library.ModelCard.load(target / "README.md").data.library_name == "consistency"
    assert same_weights(load(target), load(files["nvlabs"]))


def write_run(run: Path) -> None:
    """The last checkpoint of a run of two steps, as far as it is read here."""
    part = {"_target_": "consistency.objectives.ConsistencyObjective"}
    source = {"_target_": "consistency.data.digits.Digits", "path": str(run)}
    config = {
        "data": {"source": source, "batch_size": 8, "path": str(run)},
        "mode": {"role": "consistency", "objective": part, "total_steps": 2, "distance": "l2"},
        "optimizer": {"_target_": "torch.optim.RAdam", "lr": 2e-3},
        **{"trainer": {"precision": "32-true"}, "seed": 0},
        **{"teacher": str(run / "teacher"), "init": "edm:edm-cifar10-32x32-uncond-vp"},
    }
    begun = {"path": str(run), "weights": "ema", "sha256": 64 * "a"}
    content = {"card": tiny().saved(), "config": config, "k": 2}
    content |= {"sources": {"teacher": begun, "init": begun}}
    content["callbacks"] = {"EvaluationEMA": {"averages": {"0.99": tiny_adm()}}}
    (run / "checkpoints").mkdir(parents=True)
    ours.write(content, run / "checkpoints" / ours.LAST)


def test_the_card_of_a_run_has_recipe_and_metrics_with_their_protocol(
    convert: Run, tmp_path: Path
) -> None:
    run, target = tmp_path / "run", tmp_path / "card"
    write_run(run)
    metrics = {"fid": 12.5, "kid": 0.25, "kid_std": 0.125}
    content = {"protocol": {"extractor": "inception", "samples": 50_000}, "k": 2}
    content |= {"nfe": {"one_step": 1.0}, "results": {"one_step/ema": metrics}}
    (run / "evaluation.json").write_text(json.dumps(content))
    outcome = convert(f"source={run}", "to=hub", f"output={target}")
    assert outcome.status == 0, outcome.err
    read = library.ModelCard.load(target / "README.md")
    found = {result.metric_type: result.metric_value for result in read.data.eval_results}
    assert found == {"fid": 12.5, "kid": 0.25}
    assert {result.dataset_name for result in read.data.eval_results} == {"Digits"}
    assert "| one_step | ema | 1 | 12.5 | 0.25 | 0.125 |" in read.text
    assert read.data.license == "cc-by-nc-sa-4.0"  # of the initial weights
    for line in (
        *("- samples: 50000", "| optimizer steps | 2 of 2 |", "| images a step | 8 |"),
        *("| distance | l2 |", f"| teacher | a checkpoint of SHA-256 {16 * 'a'} |"),
        "They began with `edm:edm-cifar10-32x32-uncond-vp`: cc-by-nc-sa-4.0.",
    ):
        assert line in read.text
    assert str(tmp_path) not in read.text  # no path of this machine
    named = convert(f"source={run}", "to=hub", f"results={run}", f"output={tmp_path / 'named'}")
    assert named.status == 0, named.err  # the same results by their name
    assert "| one_step | ema | 1 | 12.5 |" in (tmp_path / "named" / "README.md").read_text()
    (run / "evaluation.json").write_text(json.dumps(content | {"k": 1}))
    again = convert(f"source={run}", "to=hub", f"output={tmp_path / 'again'}")
    assert again.status == 0, again.err
    assert "Not measured." in (tmp_path / "again" / "README.md").read_text()  # of an earlier step


def test_results_of_another_file_are_refused(
    files: dict[str, Path], convert: Run, tmp_path: Path
) -> None:
    row = {"sampler": "onestep", "weights": "ema", "nfe": 1.0, "fid": 3.0, "seconds": {}}
    content = {"protocol": {}, "checkpoint": "x", "sha256": "0" * 64, "results": [row]}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    given = ["to=hub", f"output={tmp_path / 'out'}", f"results={tmp_path}"]
    outcome = convert(f"source={files['sealed']}", *given)
    assert outcome.status == 2
    assert "those of another file, by its hash" in outcome.err
    (tmp_path / "evaluation.json").write_text(
        json.dumps(content | {"sha256": fingerprint(files["sealed"])})
    )
    assert convert(f"source={files['sealed']}", *given).status == 0
    assert "| onestep | ema | 1 | 3 |" in (tmp_path / "out" / "README.md").read_text()


# ----------------------------------------------------------------------------------- push


class StandIn:
    """What push= uses of huggingface_hub.HfApi."""

    calls: tuple[tuple[str, dict[str, Any]], ...] = ()

    def create_repo(self, name: str, **options: Any) -> str:
        StandIn.calls += (("create_repo", {"name": name, **options}),)
        return f"https://hub.example/{name}"

    def upload_folder(self, **options: Any) -> None:
        StandIn.calls += (("upload_folder", options),)


def test_push_uploads_the_folder_after_the_hubs_check(
    files: dict[str, Path], convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    monkeypatch.setattr(library, "HfApi", StandIn)
    monkeypatch.setattr(library.ModelCard, "validate", lambda card: checked.append(str(card)))
    target = tmp_path / "out"
    given = ["to=hub", "push=someone/tiny-model", "private=false", f"output={target}"]
    outcome = convert(f"source={files['sealed']}", *given)
    assert outcome.status == 0, outcome.err
    assert "pushed      https://hub.example/someone/tiny-model" in outcome.out
    (made, one), (sent, two) = StandIn.calls
    assert (made, sent) == ("create_repo", "upload_folder")
    assert one == {"name": "someone/tiny-model", "private": False, "exist_ok": True}
    assert (two["repo_id"], two["folder_path"]) == ("someone/tiny-model", target)
    assert len(checked) == 1 and "hf:someone/tiny-model" in checked[0]


def test_without_a_network_the_folder_stays_and_one_line_tells(
    files: dict[str, Path], convert: Run, tmp_path: Path, cache: Path
) -> None:
    target = tmp_path / "out"
    given = ["to=hub", "push=someone/tiny", f"output={target}"]
    outcome = convert(f"source={files['sealed']}", *given)
    assert outcome.status == 2
    assert "to push to someone/tiny" in outcome.err
    assert f"hf upload someone/tiny {target}" in outcome.err
    assert (target / "README.md").is_file()


MISTAKES = {
    "a name without its owner": (["to=hub", "push=tiny"], "push=<user>/<name>"),
    "no name": (["to=hub", "push=some one/tiny"], "push=<user>/<name>"),
    "push of another form": (["to=ours", "push=someone/tiny"], "to=hub"),
    "a file": (["to=hub", "output=model.safetensors"], "a folder at output="),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_the_work(
    name: str, files: dict[str, Path], convert: Run, tmp_path: Path
) -> None:
    given, hint = MISTAKES[name]
    outcome = convert(f"source={files['sealed']}", f"output={tmp_path / 'out'}", *given)
    assert outcome.status == 2
    assert hint in outcome.err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------- names


def test_a_name_opens_a_pipeline_of_diffusers_at_a_revision(
    files: dict[str, Path], cache: Path
) -> None:
    name, model = "openai/diffusers-tiny", load(files["diffusers"])
    in_cache(cache, name, files["diffusers"])
    in_cache(cache, name, files["unet"].parent, OLDER, "v1")
    opened = load(f"hf:{name}")
    assert opened.card.role == "consistency"
    assert same_weights(opened, model)
    assert find(f"hf:{name}").name == COMMIT
    for revision in ("v1", OLDER):
        assert find(f"hf:{name}@{revision}").name == OLDER
    with pytest.raises(UserError, match=r"at revision v2 on the Hugging Face Hub"):
        load(f"hf:{name}@v2")


def test_a_single_file_of_weights_is_the_checkpoint(files: dict[str, Path], cache: Path) -> None:
    (cache.parent / "one").mkdir()
    shutil.copyfile(files["openai"], cache.parent / "one" / "ema.pt")
    in_cache(cache, "someone/one", cache.parent / "one")
    model = load("hf:someone/one", "consistency")
    assert same_weights(model, load(files["openai"], "consistency"))


@pytest.mark.parametrize(
    "name", ["hf:", "hf:a/b/c", "hf:a b/c", "hf:../../etc", "hf:a/b@", "hf:/a"]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="hf:<user>/<name>"):
        load(name)


def test_a_model_that_is_not_there_is_one_clear_line(convert: Run, cache: Path) -> None:
    outcome = convert("verify=hf:someone/nothing")
    assert outcome.status == 2
    assert "the model someone/nothing on the Hugging Face Hub" in outcome.err
    assert "HF_HUB_OFFLINE" in outcome.err
    assert "Traceback" not in outcome.err


def test_without_the_package_one_line_tells(
    files: dict[str, Path], convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'consistency\[huggingface\]'"):
        consistency.load("hf:someone/tiny")
    with pytest.raises(UserError, match="the package huggingface_hub for push="):
        hub.require_name("someone/tiny")
    outcome = convert(f"source={files['sealed']}", "to=hub", f"output={tmp_path / 'out'}")
    assert outcome.status == 2
    assert "the package huggingface_hub for to=hub" in outcome.err
    assert not (tmp_path / "out").exists()
