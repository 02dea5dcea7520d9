"""Residuals: which file counts, which go, and what is refused."""

import numpy as np
import pytest
import torch

from distfl.errors import CheckpointError, StartError
from distfl.messages import Assignment
from distfl.model import ModelSpec
from distfl.recipes import Recipe
from distfl.residuals import ResidualFolder, Residuals
from distfl.units import UnitTable, Window

TABLE = UnitTable(ModelSpec(2, 4, 2, 3, 5))
UNITS = range(2, 4)


@pytest.fixture
def folder(tmp_path) -> ResidualFolder:
    return ResidualFolder(tmp_path / "run")


def order(client: int, round: int, units=UNITS) -> Assignment:
    return Assignment(round, client, Window(min(units), max(units) + 1), 1.0, 0, 0, 0, 0, Recipe(1), 0.0)


def load(folder: ResidualFolder, client: int, round: int, units=UNITS) -> Residuals:
    return folder.load(order(client, round, units), TABLE)


def save(folder: ResidualFolder, client: int, round: int, residuals: Residuals) -> None:
    folder.save(order(client, round), residuals)


def filled(value: float, units=UNITS) -> Residuals:
    residuals = Residuals(TABLE, units)
    for tensor in residuals.tensors.values():
        tensor.fill_(value)
    return residuals


def values(residuals: Residuals) -> dict[int, set[float]]:
    """Unit -> the values in its buffer."""
    return {unit: set(np.unique(buffer).tolist()) for unit, buffer in residuals.buffers.items()}


def checkpointed(tmp_path, *rounds: int) -> None:
    for round in rounds:
        (tmp_path / "run" / "checkpoints" / f"round-{round:05d}").mkdir(parents=True, exist_ok=True)


def rounds_of(tmp_path, client: int, unit: int = 2) -> list[int]:
    return sorted(int(p.name.split("-")[3]) for p in (tmp_path / "run/residuals" / f"client-{client:05d}").glob(f"unit-{unit}-*"))


def test_buffers_hold_the_units_tensors_and_nothing_else():
    residuals = Residuals(TABLE, UNITS)
    assert residuals.tensors.keys() == {tensor.name for unit in UNITS for tensor in TABLE[unit].tensors}
    assert sum(buffer.nbytes for buffer in residuals.buffers.values()) == sum(TABLE[unit].bytes for unit in UNITS)
    for unit in UNITS:
        for tensor in TABLE[unit].tensors:
            residuals.tensors[tensor.name].fill_(unit)
            assert residuals.tensors[tensor.name].shape == tensor.shape
    assert values(residuals) == {2: {2.0}, 3: {3.0}}


def test_a_new_client_begins_with_zeros_and_goes_on_from_its_newest_round(folder):
    assert values(load(folder, 7, 1, UNITS)) == {2: {0.0}, 3: {0.0}}
    save(folder, 7, 1, filled(1.0))
    save(folder, 8, 1, filled(8.0))
    save(folder, 7, 3, filled(3.0, [3]))  # its window moved in between
    assert values(load(folder, 7, 4, range(1, 4))) == {1: {0.0}, 2: {1.0}, 3: {3.0}}
    assert values(load(folder, 8, 4, UNITS)) == {2: {8.0}, 3: {8.0}}


def test_what_comes_back_has_the_same_bits(folder):
    residuals = Residuals(TABLE, UNITS)
    for tensor in residuals.tensors.values():
        tensor.normal_(generator=torch.Generator().manual_seed(1))
    save(folder, 0, 1, residuals)
    found = load(folder, 0, 2, UNITS).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in residuals.tensors.items())


def test_files_of_a_life_that_was_cut_short_do_not_count(folder, tmp_path):
    for round in (1, 2, 3, 12):
        save(folder, 0, round, filled(round))
    assert values(load(folder, 0, 3, [2])) == {2: {2.0}}
    assert rounds_of(tmp_path, 0) == rounds_of(tmp_path, 0, unit=3) == [1, 2]  # of every unit, also outside the window
    # were round 3 now left out, round 4 must not find what the first life left
    assert values(load(folder, 0, 4, [2])) == {2: {2.0}}


@pytest.mark.parametrize(
    "checkpoints, remain",
    [([], [1, 2, 3, 4, 5]), ([0], [1, 2, 3, 4, 5]), ([3, 4], [3, 4, 5]), ([4, 5], [4, 5]), ([5], [5]), ([2, 99], [2, 3, 4, 5])],
)
def test_files_remain_as_long_as_a_checkpoint_can_need_them(folder, tmp_path, checkpoints, remain):
    for round in range(1, 6):
        save(folder, 0, round, filled(round))
    checkpointed(tmp_path, *checkpoints)
    assert values(load(folder, 0, 6, [2])) == {2: {5.0}}
    assert rounds_of(tmp_path, 0) == remain
    for checkpoint in sorted({*checkpoints} & {*range(1, 6)}, reverse=True):  # continuing from any of them finds what was there
        assert values(load(folder, 0, checkpoint + 1, [2])) == {2: {float(checkpoint)}}


def test_a_client_that_seldom_takes_part_keeps_its_last_one(folder, tmp_path):
    save(folder, 0, 1, filled(1.0))
    save(folder, 0, 2, filled(2.0))
    checkpointed(tmp_path, 40, 41)
    assert values(load(folder, 0, 42, UNITS)) == {2: {2.0}, 3: {2.0}}
    assert rounds_of(tmp_path, 0) == [2]


def test_a_file_that_is_cut_short_is_refused(folder, tmp_path):
    save(folder, 0, 1, filled(1.0))
    path = tmp_path / "run/residuals/client-00000/unit-2-round-1"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cut short"):
        load(folder, 0, 2, UNITS)


def test_a_full_disk_is_said_in_words(folder, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distfl.residuals.write_atomically", full)
    with pytest.raises(CheckpointError, match="No space left.*[\\s\\S]*make room"):
        save(folder, 0, 1, filled(1.0))


def test_every_rank_must_see_the_servers_folder(folder, tmp_path):
    mark = folder.announce()
    folder.check(mark)
    assert [path.name for path in (tmp_path / "run/residuals").iterdir()] == ["mark"]
    with pytest.raises(StartError, match="set run.folder to a folder that all nodes see"):
        ResidualFolder(tmp_path / "elsewhere").check(mark)
    with pytest.raises(StartError, match="another folder"):
        folder.check("of another run")
    assert folder.announce() != mark


def test_a_run_cannot_go_on_without_its_residuals(folder, tmp_path):
    checkpointed(tmp_path, 0)
    folder.announce()  # nobody has trained yet
    (tmp_path / "run/residuals/mark").unlink()
    (tmp_path / "run/residuals").rmdir()
    checkpointed(tmp_path, 1)
    with pytest.raises(CheckpointError, match="there is no folder"):
        folder.announce()
