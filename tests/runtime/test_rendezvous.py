"""The rendezvous of the processes of one job: its decisions, its errors, and its deaths reach every process."""

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from omegaconf import OmegaConf

from consistency.commands.cli import require_agreement
from consistency.errors import UserError
from consistency.runtime import rendezvous
from consistency.runtime.rendezvous import SILENT, EndedError, Guest, Rendezvous


def guest(host: Rendezvous, name: str = "rank 1") -> Guest:
    return Guest(name, ["127.0.0.1", host.port, host.token], 5.0)


def facts(rendezvous: Rendezvous) -> tuple[str, str, int]:
    end = rendezvous.end
    assert end is not None
    return end.name, end.message, end.cause


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rendezvous]:
    """A first process, none of whose others is ended by force."""
    monkeypatch.setattr(Rendezvous, "_end_process", lambda self: None)
    host = Rendezvous("127.0.0.1")
    yield host
    host.close()
    time.sleep(0.2)


def test_all_are_told_what_the_first_decides_also_who_comes_late(host: Rendezvous) -> None:
    early = guest(host)
    host.gather(1, 5)
    assert host.decided(lambda: {"folder": "a"}) == {"folder": "a"}
    assert host.decided(lambda: [1, None]) == [1, None]
    for other in (early, guest(host, "rank 2")):
        assert other.decided(lambda: {"folder": "mine"}) == {"folder": "a"}
        assert other.decided(list) == [1, None]
        other.close()
    time.sleep(0.2)
    assert host.end is None
    assert early.end is None


def test_the_words_of_one_reach_all_on_one_line(host: Rendezvous) -> None:
    one, other = guest(host), guest(host, "rank 2")
    host.gather(2, 5)
    one.failed(UserError("expected a\n  got: b"))
    assert host.ended.wait(5)
    assert other.ended.wait(5)
    assert facts(host) == facts(other) == ("rank 1", "expected a\n  got: b", 2)
    assert str(host.end) == "rank 1: expected a; got: b"
    with pytest.raises(EndedError):
        other.decided(lambda: 0)


def test_a_connection_that_ends_without_a_word_is_a_death(host: Rendezvous) -> None:
    one, other = guest(host), guest(host, "rank 2")
    host.gather(2, 5)
    with socket.socket(fileno=os.dup(one.links["rank 0"].fileno())) as connection:
        connection.shutdown(socket.SHUT_RDWR)
    assert other.ended.wait(5)
    assert facts(other) == ("rank 1", SILENT, 1)
    assert "rank 1 ended without a word, killed or lost; do:" in str(other.end)


def test_a_process_without_the_token_is_no_guest(host: Rendezvous) -> None:
    with pytest.raises(EndedError, match="rank 0 ended"):
        Guest("rank 1", ["127.0.0.1", host.port, "guess"], 5.0)
    with pytest.raises(UserError, match="1 after 0 s"):
        host.gather(1, 0.2)


def test_other_settings_than_those_of_the_first_are_refused_without_telling_values(
    host: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "current", host)
    require_agreement(OmegaConf.create({"seed": 0, "data": {"password": "secret"}}))
    other = guest(host)
    assert "secret" not in str(host._sent)
    monkeypatch.setattr(rendezvous, "current", other)
    with pytest.raises(UserError, match="seed=5 on rank 1"):
        require_agreement(OmegaConf.create({"seed": 5, "data": {"password": "secret"}}))


def test_a_process_that_hangs_is_ended_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = threading.Event()
    monkeypatch.setattr(rendezvous, "NOTICE", 0.1)
    monkeypatch.setattr(os, "_exit", lambda status: gone.set())
    Rendezvous().report(EndedError("rank 1", SILENT, 1))
    assert gone.wait(5)
    assert "error: rank 1 ended without a word" in capsys.readouterr().err
