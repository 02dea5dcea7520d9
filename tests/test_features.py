"""Kept outputs of frozen units: the same bits as without, less work, and never those of other weights or of a full disk."""

import errno
import os
import tempfile
from collections import Counter

import pytest
import torch
from helpers import model, same_bits, tokens
from live_bytes import costs_of

from distfl.config import TrainingConfig
from distfl.features import FeatureFile, FeatureShelf, Prefix
from distfl.messages import Assignment
from distfl.model import ModelSpec
from distfl.recipes import Recipe
from distfl.shards import TOKEN, Sequences
from distfl.steps import features_of
from distfl.training import Trained, train
from distfl.units import Window, freeze_outside

SPEC = ModelSpec(depth=4, width=16, heads=2, context=8, vocabulary=40)
ROWS, EPOCHS = 7, 3
CONFIG = TrainingConfig(batch=3, epochs=EPOCHS, optimizer="adamw", clip_norm=1.0)
FIRST = 3  # the embedding and two blocks are frozen, two blocks and the head train
PLAIN = Recipe(3)
VERSIONS = [0] * (SPEC.depth + 2)

# FLOPs of a token by hand, d = 16, f = 64, T = 8, V = 40:
#   block forward: 8 d^2 + 4 d f + 4 T d = 2048 + 4096 + 512 = 6656
#   window: two blocks, forward and twice that backward, and the head 6 d V: 6 * 6656 + 6 * 16 * 40 = 39 936 + 3840 = 43 776
BLOCK, WINDOW = 6656, 43_776


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The node's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def data() -> Sequences:
    return Sequences(tokens(1, (ROWS - 1) * 8 + 4, 40)[0].numpy().astype(TOKEN), 8)  # the last row is short


def client(files: dict[int, FeatureFile], network=None, recipe: Recipe = PLAIN, round: int = 1) -> tuple[Trained, dict, Counter]:
    """A client's round; what it did, its tensors, and how often frozen units were computed."""
    network = network or model(SPEC)
    window = Window(FIRST, SPEC.depth + 2)
    parameters, prefix = freeze_outside(network, window), Prefix(network, FIRST, files)
    assignment = Assignment(round, 0, window, 1.0, 0, 0, 0, 0, recipe, 1e-3)
    done = train(network, parameters, data(), CONFIG, assignment, prefix, costs_of(SPEC, CONFIG), seed=1)
    assert done.sequences == EPOCHS * ROWS
    return done, network.named_tensors(), prefix.computed


def flops(blocks: int) -> int:
    """So many passes of a sequence through one frozen block, and the training of all sequences."""
    return 8 * (blocks * BLOCK + EPOCHS * ROWS * WINDOW)


def shelf_files(shelf: FeatureShelf, levels: list[int], versions: list[int] = VERSIONS, client: int = 0) -> dict[int, FeatureFile]:
    return shelf.files(client, levels, ROWS, SPEC.context, SPEC.width, versions)


# --- same bits, less work ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels, computed", [([3], {range(3): ROWS}), ([2, 3], {range(2): ROWS, range(2, 3): ROWS})])
@pytest.mark.parametrize("recipe", [Recipe(3), Recipe(2, 5, 1), Recipe(1)], ids=lambda recipe: recipe.describe(3))
def test_a_client_that_keeps_features_trains_to_the_same_bits_with_fewer_flops(levels, computed, recipe):
    kept, tensors, counted = client(shelf_files(FeatureShelf(), levels), recipe=recipe)
    plain, reference, all_counted = client({}, recipe=recipe)
    assert same_bits(tensors, reference) and kept.loss == plain.loss
    assert counted == computed  # every sequence once
    assert all_counted == {range(3): EPOCHS * ROWS}
    extra = EPOCHS * ROWS * recipe.recomputed * BLOCK * 8
    assert (kept.flops, plain.flops) == (flops(2 * ROWS) + extra, flops(2 * EPOCHS * ROWS) + extra)


def test_only_what_lies_above_the_kept_level_is_computed_again():
    done, tensors, counted = client(shelf_files(FeatureShelf(), [2]))
    assert counted == {range(2): ROWS, range(2, 3): EPOCHS * ROWS}  # one block once a sequence, the other in every epoch
    assert done.flops == flops(ROWS + EPOCHS * ROWS)
    assert same_bits(tensors, client({})[1])


def test_files_above_the_window_s_start_are_left_alone():
    files = shelf_files(FeatureShelf(), [3, 4])
    client(files)
    assert not any(files[4].read(row, torch.empty(8, 16)) for row in range(ROWS))
    assert all(files[3].read(row, torch.empty(8, 16)) for row in range(ROWS))


def test_without_frozen_units_the_tokens_are_the_features():
    prefix, inputs = Prefix(model(SPEC), 0, {}), tokens(2, 8, 40)
    assert prefix([0, 1], inputs) is inputs and not prefix.computed


def test_features_are_those_of_their_rows():
    network, inputs = model(SPEC), tokens(ROWS, 8, 40)
    prefix, wanted = Prefix(network, FIRST, shelf_files(FeatureShelf(), [2, 3])), features_of(model(SPEC), range(3), inputs)
    for rows in ([5, 0], [0, 1, 2], [6], [5, 6, 3, 0]):
        assert torch.equal(prefix(rows, inputs[rows]), wanted[rows])
    assert prefix.computed == {range(2): 6, range(2, 3): 6}  # rows 0, 1, 2, 3, 5, 6


# --- from round to round -----------------------------------------------------------------------------------------------------------


def test_a_stable_level_serves_every_round_and_the_own_prefix_is_computed_from_it():
    # in round 1 both blocks of 7 rows; then unit 2 changes, and in round 2 only that block is computed
    shelf = FeatureShelf()
    assert client(shelf_files(shelf, [2, 3]))[2] == {range(2): ROWS, range(2, 3): ROWS}
    changed = model(SPEC)
    changed.blocks[1].fc1.bias.data += 0.5
    files = shelf_files(shelf, [2, 3], [0, 0, 1, 1, 1, 1])
    done, tensors, counted = client(files, changed, round=2)
    assert counted == {range(2, 3): ROWS} and done.flops == flops(ROWS)
    reference = model(SPEC)
    reference.blocks[1].fc1.bias.data += 0.5
    assert same_bits(tensors, client({}, reference, round=2)[1])


@pytest.mark.parametrize(
    "versions, same",
    [
        ([0, 0, 0, 0, 0, 0], {2: True, 3: True}),
        ([0, 0, 0, 7, 7, 7], {2: True, 3: True}),  # above both levels
        ([0, 0, 1, 1, 1, 1], {2: True, 3: False}),
        ([1, 0, 0, 0, 0, 0], {2: False, 3: False}),
    ],
)
def test_a_file_is_used_again_only_while_its_units_are_the_same(versions, same):
    shelf = FeatureShelf()
    before = shelf_files(shelf, [2, 3])
    for file in before.values():
        file.write(1, torch.ones(8, 16))
    after = shelf_files(shelf, [2, 3], versions)
    for level in (2, 3):
        assert (after[level] is before[level]) == same[level]
        assert after[level].read(1, torch.empty(8, 16)) == same[level]
        if not same[level]:
            with pytest.raises(ValueError, match="closed"):
                before[level].read(1, torch.empty(8, 16))


def test_versions_that_come_back_do_not_bring_the_features_back():
    shelf = FeatureShelf()
    shelf_files(shelf, [2])[2].write(0, torch.ones(8, 16))
    shelf_files(shelf, [2], [1] * 6)
    assert not shelf_files(shelf, [2])[2].read(0, torch.empty(8, 16))


def test_every_client_and_level_has_a_file_of_its_own():
    shelf = FeatureShelf()
    files = [shelf_files(shelf, [2, 3], client=client)[level] for client in (0, 1) for level in (2, 3)]
    assert len(set(map(id, files))) == 4
    files[0].write(0, torch.ones(8, 16))
    assert [file.read(0, torch.empty(8, 16)) for file in files] == [True, False, False, False]


# --- one file ----------------------------------------------------------------------------------------------------------------------


def test_an_entry_comes_back_bit_by_bit_and_only_where_it_was_written():
    file, draws = FeatureFile(5, 8, 16, ()), torch.Generator().manual_seed(0)
    entries = {row: torch.randn(8, 16, generator=draws) for row in (4, 0, 2)}
    entries[2][0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    for row, entry in entries.items():
        file.write(row, entry)
    for row in range(5):
        out = torch.full((8, 16), 9.0)
        assert file.read(row, out) == (row in entries)
        assert out.numpy().tobytes() == (entries[row] if row in entries else torch.full((8, 16), 9.0)).numpy().tobytes()


def test_files_have_no_name_and_take_no_room_before_they_are_written(folder):
    file = FeatureFile(1000, 8, 16, ())
    assert list(folder.iterdir()) == []  # gone with the process, however it ends
    file.write(999, torch.ones(8, 16))
    assert list(folder.iterdir()) == []
    assert file.read(999, torch.empty(8, 16)) and not file.read(998, torch.empty(8, 16))
    status = os.fstat(file._file.fileno())
    assert status.st_size == 1000 * 512 + 1000  # 8 * 16 * 4 bytes and a mark for each row
    assert status.st_blocks * 512 <= 16 * 1024  # of 513 000 bytes


def test_what_a_forked_client_keeps_its_rank_finds():
    file = FeatureFile(2, 8, 16, ())
    if (child := os.fork()) == 0:
        file.write(1, torch.full((8, 16), 3.0))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    out = torch.empty(8, 16)
    assert file.read(1, out) and (out == 3).all() and not file.read(0, out)


# --- a full disk -------------------------------------------------------------------------------------------------------------------


def refuse(descriptor, content, offset):
    raise OSError(errno.ENOSPC, "No space left on device")


def cut_short(descriptor, content, offset, really=os.pwrite):
    """What the kernel does where the disk fills within one entry: the marks' page may lie there already."""
    return really(descriptor, content[: max(1, len(content) // 2)], offset)


@pytest.mark.parametrize("pwrite", [refuse, cut_short])
def test_a_full_disk_costs_time_and_nothing_else(pwrite, monkeypatch):
    monkeypatch.setattr(os, "pwrite", pwrite)
    done, tensors, counted = client(shelf_files(FeatureShelf(), [2, 3]))
    monkeypatch.undo()
    assert same_bits(tensors, client({})[1])
    assert counted == {range(2): EPOCHS * ROWS, range(2, 3): EPOCHS * ROWS}
    assert done.flops == flops(2 * EPOCHS * ROWS)


@pytest.mark.parametrize("pwrite", [refuse, cut_short])
def test_an_entry_that_was_not_wholly_written_is_not_there(pwrite, monkeypatch):
    file, out = FeatureFile(3, 8, 16, ()), torch.empty(8, 16)
    file.write(0, torch.ones(8, 16))
    monkeypatch.setattr(os, "pwrite", pwrite)
    file.write(1, torch.ones(8, 16))
    monkeypatch.undo()
    assert file.read(0, out) and not file.read(1, out)
    file.write(1, torch.full((8, 16), 2.0))  # there is room again
    assert file.read(1, out) and (out == 2).all()
