"""The run folder: one writer at a time, nothing left of a refused run, and resuming only where there is something to resume from."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distfl import cli, settings
from distfl.config import FleetConfig, GroupConfig, RunConfig, TrainConfig, TrainingConfig, TransportConfig
from distfl.errors import CheckpointError
from distfl.run_folder import RESIDUALS, RunFolder

HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"


def run_folder(path: Path) -> RunFolder:
    groups = (GroupConfig("all", 10, share=1.0),)
    return RunFolder(TrainConfig(FleetConfig(groups), TrainingConfig(steps=1), rounds=3, run=RunConfig(str(path))))


@pytest.fixture
def begun(tmp_path) -> RunFolder:
    """A run that was killed in round 2, with a checkpoint of round 1."""
    folder = run_folder(tmp_path / "run")
    (folder.checkpoints / "round-00001").mkdir(parents=True)
    (folder.path / "config.yaml").write_text(settings.to_yaml(folder.config))
    (folder.path / "rounds.jsonl").write_text("".join(json.dumps({"round": round}) + "\n" for round in range(2)) + '{"round": 2, "tr')
    return folder


def test_a_claimed_folder_is_refused_to_others_and_free_again_after_kill_9(begun):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, begun.path / ".lock"], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(CheckpointError, match="another run is writing here"):
        begun.check(resume=True)
    with pytest.raises(CheckpointError, match="another run is writing here"), begun.claimed(resume=True):
        pass
    holder.kill()
    holder.communicate()
    begun.check(resume=True)
    with begun.claimed(resume=True):
        pass
    assert (begun.path / "config.yaml").exists()


def test_what_another_run_began_since_the_check_is_found_when_claiming(tmp_path):
    folder = run_folder(tmp_path / "run")
    folder.check(resume=False)
    folder.path.mkdir()
    (folder.path / "config.yaml").touch()
    with pytest.raises(CheckpointError, match="not empty"), folder.claimed(resume=False):
        pass


def test_nothing_is_left_of_a_run_that_was_refused_after_claiming(tmp_path):
    folder = run_folder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), folder.claimed(resume=False):
        raise ZeroDivisionError
    assert not folder.path.exists()


def test_a_refused_run_leaves_no_folder_for_residuals_and_a_finished_one_neither(tmp_path, begun):
    folder = run_folder(tmp_path / "refused")
    with pytest.raises(ZeroDivisionError), folder.claimed(resume=False):
        (folder.path / RESIDUALS).mkdir()
        raise ZeroDivisionError
    assert not folder.path.exists()
    (begun.path / RESIDUALS).mkdir()
    begun.finish()
    assert not (begun.path / RESIDUALS).exists() and (begun.path / "finished").exists()


@pytest.mark.parametrize(
    "changes", [{"codec": "int8"}, {"codec": "top_k", "codec_options": {"density": 0.2}}, {"deltas": "on"}, {"error_feedback": "off"}]
)
def test_a_run_goes_on_only_with_the_codec_it_began_with(begun, changes):
    begun.check(resume=True)
    RunFolder(replace(begun.config, transport=TransportConfig(name="local"))).check(resume=True)
    with pytest.raises(CheckpointError, match=f"transport.{next(iter(changes))}"):
        RunFolder(replace(begun.config, transport=TransportConfig(**changes))).check(resume=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run", Path("/proc/x")):
        with pytest.raises(CheckpointError, match="run.folder"), run_folder(path).claimed(resume=False):
            pass


def test_rounds_without_a_checkpoint_are_not_silently_run_again(begun):
    assert begun.how_to_go_on() == "after round 1; continue with --resume"
    (begun.checkpoints / "round-00001").rmdir()
    with pytest.raises(CheckpointError, match="rounds up to 1 are recorded, but there is no checkpoint"):
        begun.check(resume=True)
    (begun.path / "rounds.jsonl").write_text('{"round": 0}\n')  # killed before its first checkpoint
    begun.check(resume=True)
    assert "before round 0" in begun.how_to_go_on()


# --- the command around it -------------------------------------------------------------------------


def test_what_is_cheap_to_refuse_is_refused_before_any_rank_starts(begun, capfd):
    overrides = [f"run.folder={begun.path}", "--ranks", "3"]
    config = str(begun.path / "config.yaml")
    assert cli.main(["train", config, *overrides]) == 2
    assert "not empty" in (err := capfd.readouterr().err) and "prterun" not in err


def test_commands_of_one_process_run_on_one_rank_only(monkeypatch, capfd):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert cli.main(["export", "/nowhere", "/nowhere/else"]) == 0
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert cli.main(["export", "/nowhere", "/nowhere/else"]) == 2


def test_ranks_under_a_launcher_that_started_others_are_refused(begun, monkeypatch, capfd):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert cli.main(["train", str(begun.path / "config.yaml"), "--ranks", "3"]) == 2
    assert "started 4 ranks already" in capfd.readouterr().err


@pytest.mark.parametrize("threads", ["abc", "0", "1.5", ""])
def test_threads_that_are_no_number_are_refused(monkeypatch, capfd, threads):
    monkeypatch.setenv("DISTFL_THREADS", threads)
    assert cli.main(["train", os.devnull]) == 2
    assert "DISTFL_THREADS" in capfd.readouterr().err
