"""One client on its rank: what is trained and sent, also by a method that inserts tensors of its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distfl import hosting
from distfl.aggregation import UnitMean
from distfl.codecs.base import unframe
from distfl.config import FleetConfig, GroupConfig, TrainConfig, TrainingConfig
from distfl.messages import Assignment
from distfl.methods.caff import Caff, Options
from distfl.model import ModelSpec, initial_tensors
from distfl.shards import TOKEN, Shard, ShardIndex
from distfl.transport.local import group

SPEC = ModelSpec(depth=2, width=16, heads=2, context=8, vocabulary=40)
CONFIG = TrainConfig(FleetConfig((GroupConfig("all", 10, share=1.0),)), TrainingConfig(batch=2, steps=2, learning_rate=1e-2))


class Gated(Caff):
    """Adds a vector to every block; it takes part in training by way of the block's output."""

    def prepare(self, model):
        for block in model.blocks:
            block.gate = torch.nn.Parameter(torch.empty(SPEC.width, device="meta"))
            block.register_forward_hook(lambda block, _, output: output + block.gate)

    def initial(self, pretrained, seed):
        return pretrained | {f"blocks.{i}.gate": torch.zeros(SPEC.width) for i in range(SPEC.depth)}


@pytest.fixture
def state(tmp_path, monkeypatch):
    def make(method):
        monkeypatch.setattr(hosting, "load_method", lambda name, options: method)
        np.random.default_rng(0).integers(0, 40, 200).astype(TOKEN).tofile(tmp_path / "tokens.bin")
        made = hosting.rank_state(group(1)[0], CONFIG, SPEC, ShardIndex(str(tmp_path), "", (Shard("a", 0, 150, 50),)))
        made.replica.fill(method.initial(initial_tensors(SPEC, torch.Generator().manual_seed(1)), 1))
        return made

    return make


def assignment(state, blocks: int) -> Assignment:
    return Assignment(1, 0, state.table.suffix(blocks), 3.0, 10**9, 0, 1e-2)


def sent(state, tensors, order: Assignment) -> dict:
    pieces = {}
    for unit in state.table:
        block, failure = hosting.try_to_frame(state, tensors, order, unit)
        assert failure is None
        for piece in unframe(state.codec, block, 1, 0, unit) if len(block) else ():
            pieces[piece.name] = piece
    return pieces


@pytest.mark.parametrize("method", [Caff(Options()), Gated(Options())], ids=["caff", "a method with tensors of its own"])
def test_only_the_window_changes_and_only_it_is_sent(state, method):
    made = state(method)
    before = made.replica.copy()
    order = assignment(made, 1)
    tensors, trained, failure = hosting.try_to_train(made, order)
    assert failure is None and trained.steps == 2 and trained.sequences == 4
    pieces = sent(made, tensors, order)
    window = {t.name for unit in order.window.units for t in made.table[unit].tensors}
    assert pieces.keys() == window
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]) == (name not in window), name
        assert torch.equal(made.replica.tensors[name], before[name])  # the node's copy is nobody's to train
    if isinstance(method, Gated):
        assert "blocks.1.gate" in pieces and "blocks.0.gate" not in pieces
        mean = UnitMean(made.table[2])
        mean.add([piece for piece in pieces.values() if piece.unit == 2])
        value, share = mean.mean("blocks.1.gate", before["blocks.1.gate"], 3.0)
        assert torch.equal(value, tensors["blocks.1.gate"]) and float(share) == 1.0


def test_a_loss_that_is_not_finite_is_a_result_and_sends_nothing(state):
    made = state(Caff(Options()))
    made.replica.tensors["head.output.weight"].fill_(float("inf"))
    tensors, trained, failure = hosting.try_to_train(made, assignment(made, 1))
    assert tensors is None and failure.cause == "not_finite" and trained.steps == 0


def test_a_programming_error_is_not_taken_for_a_result(state, monkeypatch):
    made = state(Caff(Options()))
    monkeypatch.setattr(hosting, "train", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hosting.try_to_train(made, assignment(made, 1))


def test_a_rehearsal_leaves_the_replica_as_it_was(state):
    made = state(Caff(Options()))
    before = made.replica.copy()
    hosting.rehearse(replace(made))
    assert all(torch.equal(before[name], tensor) for name, tensor in made.replica.tensors.items())
