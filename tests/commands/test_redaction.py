"""What is secret in the options and in the environment reaches no file of a run and nothing that is printed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import REPORT, TINY, Run
from consistency.runtime.redaction import MASK, masked, masked_text

HIDDEN = "hunter2"
ADDRESSES = {
    f"s3://me:{HIDDEN}@bucket/set": f"s3://{MASK}@bucket/set",
    f"https://{HIDDEN}@github.com/x": f"https://{MASK}@github.com/x",
    f"s3:/me:{HIDDEN}@bucket/set": f"s3:/{MASK}@bucket/set",
    f"s3://AKIA1:{HIDDEN}/with/slashes+@bucket/set": f"s3://{MASK}@bucket/set",
    f"https://me:{HIDDEN}@more@host:8080/x": f"https://{MASK}@host:8080/x",
    f"https://host/x?token={HIDDEN}&size=3": f"https://host/x?token={MASK}&size=3",
    f"https://host/x?X-Amz-Signature={HIDDEN}": f"https://host/x?X-Amz-Signature={MASK}",
    f"see s3://me:{HIDDEN}@a and s3://you:{HIDDEN}@b": f"see s3://{MASK}@a and s3://{MASK}@b",
    f"data.source.storage_options.aws_secret_access_key={HIDDEN}": f"data.source.storage_options.aws_secret_access_key={MASK}",
    f"['+x.api_key={HIDDEN}', 'seed=3']": f"['+x.api_key={MASK}', 'seed=3']",
    f"{{'password': '{HIDDEN}', 'seed': 3}}": f"{{'password': '{MASK}', 'seed': 3}}",
}  # fmt: skip
HARMLESS = [
    "s3://bucket/set@2x.png",
    "https://host:8080/set/image@2x.png",
    "hf://datasets/me/set@main/x.parquet",
    "me@host:/path",
    "runs/2026-01-01",
    "http://127.0.0.1:7860",
    "tokens of the network",
]


@pytest.mark.parametrize("text", ADDRESSES)
def test_secrets_in_a_text_are_masked(text: str) -> None:
    assert masked_text(text) == ADDRESSES[text]
    assert masked_text(masked_text(text)) == masked_text(text)
    assert HIDDEN not in json.dumps(masked({"data": {"path": [text]}}))


@pytest.mark.parametrize("text", HARMLESS)
def test_all_else_stays(text: str) -> None:
    assert masked_text(text) == text


def test_options_that_are_secret_by_name_are_masked() -> None:
    given = {"secret": HIDDEN, "aws_secret_access_key": HIDDEN, "Token": 12345, "api_key": [HIDDEN], "credentials": {"a": HIDDEN},
             "password": "", "use_token": True, "seed": 3, "path": None}  # fmt: skip
    assert masked(given) == {"secret": MASK, "aws_secret_access_key": MASK, "Token": MASK, "api_key": [MASK], "credentials": {"a": MASK},
                             "password": MASK, "use_token": True, "seed": 3, "path": None}  # fmt: skip


ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_ThisIsNoTokenButLooksLikeOne",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIthisisnokey",
    "A_VARIABLE": "whatever_stands_in_the_environment",
}


def test_no_secret_reaches_a_file_or_the_screen(
    verb: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """A run with W&B, beside which the words stand in the environment and in the options; and one that fails with them."""
    for name, word in ENVIRONMENT.items():
        monkeypatch.setenv(name, word)
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = [a for a in TINY if a != "logger=csv"]
    options += ["mode=edm", "trainer.max_steps=2", "logger=wandb", f"output={tmp_path / 'run'}"]
    secret = [f"data.path='s3://me:{HIDDEN}@bucket/set'", f"teacher='https://{HIDDEN}@host/x'"]
    done = verb("train", *options, *secret)
    assert done.status == 0, done.err
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(list(tmp_path.rglob("*.wandb"))) == 1
    assert f"s3://{MASK}@bucket/set" in (tmp_path / "run" / "config.yaml").read_text()
    missing = verb("train", "data=folder", *secret, "output=there")
    assert missing.status == 2
    assert f"s3://{MASK}@bucket/set" in missing.err
    words = [HIDDEN, *ENVIRONMENT.values()]
    texts = {str(file): file.read_bytes() for file in files}
    texts |= {"screen": "".join((done.out, done.err, missing.out, missing.err)).encode()}
    found = [
        (word, name) for word in words for name, text in texts.items() if word.encode() in text
    ]
    assert not found
    size = sum(map(len, texts.values()))
    record_property(
        REPORT,
        f"secrets: {len(words)} words sought in {len(texts)} files and outputs ({size:,} bytes), none found",
    )
