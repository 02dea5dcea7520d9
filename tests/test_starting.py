"""When ranks are forked: asked for, or proven to work here."""

import pytest

from distfl import forking, starting


@pytest.fixture
def tried(tmp_path, monkeypatch):
    """What a trial will find; counts the trials."""

    class Tried(list):
        found = ""

        def __call__(self):
            self.append(1)
            return self.found

    tried = Tried()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(forking.START, raising=False)
    monkeypatch.setattr(starting.launching, "mpirun_path", lambda: str(__file__))
    monkeypatch.setattr(starting, "_try", tried)
    return tried


def start(asked: str, ranks: int = starting.PAYS_FROM_RANKS) -> str:
    flag, value = starting.flags(asked, ranks)
    assert flag == "-x"
    return value.removeprefix(f"{forking.START}=")


def test_what_is_asked_for_is_done(tried, monkeypatch):
    assert [start("plain"), start("fork")] == ["plain", "fork"]
    monkeypatch.setenv(forking.START, "fork")
    assert [start("plain"), start("auto")] == ["plain", "fork"]
    assert not tried


@pytest.mark.parametrize("found, expected", [("", "fork"), ("two parents", "plain")])
def test_the_first_start_of_many_ranks_tries_once(tried, capfd, found, expected):
    tried.found = found
    assert start("auto", starting.PAYS_FROM_RANKS - 1) == "plain" and not tried
    assert [start("auto"), start("auto"), start("auto", 2)] == [expected] * 3
    assert len(tried) == 1
    assert found in capfd.readouterr().err


def test_another_installation_is_tried_again(tried, monkeypatch):
    assert starting.prove() == "" and start("auto", 2) == "fork"
    monkeypatch.setattr(starting.platform, "node", lambda: "another")
    assert start("auto", 2) == "plain"
    monkeypatch.undo()


def test_a_proof_that_cannot_be_kept_is_not_made_at_every_start(tried, tmp_path):
    (tmp_path / "distfl").write_text("no folder")
    assert start("auto") == "plain" and not tried
    assert starting.prove() == ""  # doctor says what it found all the same
