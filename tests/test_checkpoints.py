"""Checkpoints: whole or absent, newest first, and damage is named instead of continued from."""

import resource
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import SPEC, same_bits, weights

from distfl.checkpoints import ServerState, load, save
from distfl.errors import CheckpointError
from distfl.replica import NEVER, Replica
from distfl.units import UnitTable

TABLE = UnitTable(SPEC)  # embedding, 3 blocks, head


def state(round: int) -> ServerState:
    replica = Replica(TABLE)
    replica.fill(weights(SPEC, seed=round))
    replica.versions = [1, 1, 2, round, round + 1]
    return ServerState(
        round, replica, {"velocity/x": torch.tensor([0.5, -1.0])}, {3: 1, 10: 0}, {0: [1, 1, NEVER, NEVER, NEVER], 12: [1, 1, 2, 1, 1]}
    )


@pytest.fixture
def two(tmp_path):
    """A folder with the checkpoints of rounds 1 and 2."""
    for round in (1, 2):
        save(state(round), tmp_path / "checkpoints", keep=2)
    return tmp_path / "checkpoints"


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back(two):
    replica = Replica(TABLE)
    found, saved = load(two, replica), state(2)
    assert found.round == 2
    assert found.replica is replica and same_bits(replica.tensors, weights(SPEC, seed=2))
    assert replica.versions == saved.replica.versions
    assert found.optimizer.keys() == {"velocity/x"} and torch.equal(found.optimizer["velocity/x"], saved.optimizer["velocity/x"])
    assert (found.limits, found.copies) == (saved.limits, saved.copies)  # client ids are numbers again


def test_loaded_tensors_lie_in_the_replicas_own_buffers(two):
    replica = Replica(TABLE)
    load(two, replica)
    replica.buffers[0][0] = 42.0
    assert replica.tensors["embedding.token.weight"][0, 0] == 42.0


def test_a_server_without_optimizer_state_is_saved_too(tmp_path):
    before = ServerState(7, state(1).replica)
    save(before, tmp_path, keep=1)
    found = load(tmp_path, Replica(TABLE))
    assert (found.round, found.optimizer, found.limits, found.copies) == (7, {}, {}, {})


def test_only_the_newest_are_kept(tmp_path):
    for round in (8, 9, 10, 11):
        save(state(round), tmp_path, keep=2)
    assert names(tmp_path) == ["round-00010", "round-00011"]


def test_saving_a_round_again_replaces_it(two):
    again = state(2)
    again.limits = {1: 1}
    save(again, two, keep=2)
    assert names(two) == ["round-00001", "round-00002"]
    assert load(two, Replica(TABLE)).limits == {1: 1}


def test_copies_note_what_a_client_was_sent_and_what_it_trained_itself():
    server = state(2)  # versions 1, 1, 2, 2, 3
    server.now_holds(5, range(3, 5))
    assert server.copies[5] == [1, 1, 2, NEVER, NEVER]


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="no checkpoint lies there"):
            load(folder, Replica(TABLE))


def test_a_half_written_one_is_ignored(two):
    # As a crash leaves it: the temporary folder of round 3, with everything in it but the end.
    half = two / ".round-00003"
    shutil.copytree(two / "round-00002", half)
    (half / "state.json").unlink()
    assert load(two, Replica(TABLE)).round == 2
    save(state(3), two, keep=2)
    assert names(two) == ["round-00002", "round-00003"]
    assert load(two, Replica(TABLE)).round == 3


def flip(path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize(
    "damage", [flip, halve, lambda path: path.unlink(), lambda path: path.write_bytes(b"")], ids=["a bit", "cut", "gone", "empty"]
)
def test_a_damaged_file_is_named(two, file, damage):
    path = two / "round-00002" / file
    damage(path)
    with pytest.raises(CheckpointError) as refused:
        load(two, Replica(TABLE))
    assert "round-00002" in refused.value.asked and "round-00002" in refused.value.change
    assert "older ones: round-00001" in refused.value.found
    if damage is flip and file != "state.json":
        assert file in refused.value.found


def test_deleting_the_damaged_one_continues_from_the_older(two):
    shutil.rmtree(two / "round-00002")
    replica = Replica(TABLE)
    assert load(two, replica).round == 1
    assert same_bits(replica.tensors, weights(SPEC, seed=1))


def test_a_checkpoint_of_another_depth_is_refused(two):
    with pytest.raises(CheckpointError):
        load(two, Replica(UnitTable(replace(SPEC, depth=4))))


@pytest.mark.parametrize("before, after", [(r"\"round\": 2", r"\"round\": 9"), (r"\"versions\": [1,", r"\"versions\": [2,")])
def test_a_changed_number_in_the_state_is_found_out(two, before, after):
    path = two / "round-00002" / "state.json"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(CheckpointError, match="state.json"):
        load(two, Replica(TABLE))


def test_one_that_cannot_be_written_whole_is_named_and_leaves_the_others(two):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # stands in for a full disk
    try:
        with pytest.raises(CheckpointError, match="round 3"):
            save(state(3), two, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(two) == ["round-00001", "round-00002"]
    assert load(two, Replica(TABLE)).round == 2
