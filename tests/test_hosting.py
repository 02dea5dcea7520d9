"""One client on its rank: what is trained and sent, by whatever recipe and cap, also by a method that inserts tensors of its own."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distfl import hosting
from distfl.aggregation import UnitMean
from distfl.caps.base import Measured, MemoryCap
from distfl.caps.cgroup import open_cgroup
from distfl.caps.rlimit import Report
from distfl.config import FaultsConfig, FleetConfig, GroupConfig, LeversConfig, RunConfig, TrainConfig, TrainingConfig, TransportConfig
from distfl.errors import CapError, NotFinite
from distfl.exchange import Gather
from distfl.features import FeatureFile
from distfl.messages import Assignment, Piece
from distfl.methods.caff import Caff, Options
from distfl.model import ModelSpec, initial_tensors
from distfl.recipes import Recipe
from distfl.shards import TOKEN, Shard, ShardIndex
from distfl.transport.local import group
from distfl.updates import LEAD

SPEC = ModelSpec(depth=3, width=16, heads=2, context=8, vocabulary=40)
CONFIG = TrainConfig(FleetConfig((GroupConfig("all", 10, share=1.0),)), TrainingConfig(batch=2, steps=2, learning_rate=1e-2))
OFF = LeversConfig(mapped_prefix="off", prefix_features="off")
PLAIN = Recipe(2)
ROWS = 19  # of 150 tokens: 149 targets in rows of 8


class Gated(Caff):
    """Adds a vector to every block; it takes part in training by way of the block's output."""

    def prepare(self, model):
        for block in model.blocks:
            block.gate = torch.nn.Parameter(torch.empty(SPEC.width, device="meta"))
            block.register_forward_hook(lambda block, _, output: output + block.gate)

    def initial(self, pretrained, seed):
        return pretrained | {f"blocks.{i}.gate": torch.zeros(SPEC.width) for i in range(SPEC.depth)}


class Told(MemoryCap):
    """Runs the work and notes what it was told; measures what it is given, and kills where asked to."""

    name, enforced = "told", True

    def __init__(self, peak_bytes: int = 0, killed: str = ""):
        self.peak_bytes, self.killed, self.told = peak_bytes, killed, []

    def run(self, budget_bytes, work, charged_bytes=0, settle=None, attend=None):
        self.told.append((budget_bytes, charged_bytes))
        settle()
        outcome = work()
        return Measured(None if self.killed else outcome, self.peak_bytes, self.killed)


@pytest.fixture
def state(tmp_path, monkeypatch):
    def make(method=None, config=CONFIG, **levers):
        method = method or Caff(Options())
        monkeypatch.setattr(hosting, "load_method", lambda name, options: method)
        np.random.default_rng(0).integers(0, 40, 200).astype(TOKEN).tofile(tmp_path / "tokens.bin")
        config = replace(config, levers=replace(config.levers, **levers))
        made = hosting.rank_state(group(1)[0], config, SPEC, ShardIndex(str(tmp_path), "", (Shard("a", 0, 150, 50),)))
        made.replica.fill(method.initial(initial_tensors(SPEC, torch.Generator().manual_seed(1)), 1))
        return made

    return make


def assignment(state, blocks: int, recipe: Recipe = PLAIN, memory_bytes: int = 10**9, stable_units: int = 0, round: int = 1) -> Assignment:
    window = state.table.suffix(blocks)
    return Assignment(round, 0, window, 3.0, memory_bytes, 123, 321, 456, recipe, 1e-2, stable_units)


def pieces_of(state, blocks, round: int = 1) -> dict:
    """Name -> piece of what was sent; a block for each unit."""
    assert len(blocks) == len(state.table)
    order = assignment(state, 1, round=round)
    return {
        piece.name: piece
        for unit, block in zip(state.table, blocks)
        if len(block)
        for piece in hosting.decode_update(state, block, order, unit)
    }


def values_of(state, blocks, round: int = 1) -> dict:
    return {name: torch.as_tensor(piece.values).clone() for name, piece in pieces_of(state, blocks, round).items()}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("mapped", ["on", "off"])
@pytest.mark.parametrize("method", [Caff(Options()), Gated(Options())], ids=["caff", "a method with tensors of its own"])
def test_only_the_window_changes_and_only_it_is_sent(state, method, mapped):
    made = state(method, mapped_prefix=mapped)
    before = made.replica.copy()
    order = assignment(made, 1)
    blocks, report = hosting.host(made, Report(), order)
    assert report.ok and (report.samples, report.blocks) == (4, 1) and report.reason == ""
    pieces = pieces_of(made, blocks)
    window = {t.name for unit in order.window.units for t in made.table[unit].tensors}
    assert pieces.keys() == window
    values = values_of(made, blocks)
    assert not any(torch.equal(values[name].view(before[name].shape), before[name]) for name in window)
    assert all(torch.equal(made.replica.tensors[name], tensor) for name, tensor in before.items())  # the node's copy is nobody's to train
    if isinstance(method, Gated):
        assert "blocks.2.gate" in pieces and "blocks.1.gate" not in pieces
        mean = UnitMean(made.table[3])
        mean.add([piece for piece in pieces.values() if piece.unit == 3])
        value, share = mean.mean("blocks.2.gate", before["blocks.2.gate"], 3.0)
        assert torch.equal(value, values["blocks.2.gate"]) and float(share) == 1.0


@pytest.mark.parametrize(
    "late, steps, ok", [("contribute", 2, True), ("leave_out", 2, False), ("contribute", 0, False), ("leave_out", 4, True)]
)
def test_a_late_client_stops_before_its_next_batch(state, monkeypatch, late, steps, ok):
    config = replace(CONFIG, training=replace(CONFIG.training, epochs=None, steps=4), faults=FaultsConfig(deadline_seconds=10.0, late=late))
    made, clock = state(config=config), iter([0.0, *[1.0] * steps, *[11.0] * 9])
    monkeypatch.setattr(hosting, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    blocks, report = hosting.host(made, Report(), assignment(made, 1))
    assert (report.ok, report.cause) == (ok, None if ok else "late")
    assert report.samples == steps * min(CONFIG.training.batch, 19)  # 150 tokens, 8 a row
    assert any(map(len, blocks)) == ok
    assert report.reason == ("" if steps == 4 else f"{'stopped' if ok else 'not done'} after 10.0 s: {steps} steps")


def test_an_update_that_cannot_be_kept_is_left_out(state):
    made = state()

    def keep(assignment, blocks):
        assert any(map(len, blocks))
        raise NotFinite("a sum", "too large", "lower the learning rate")

    blocks, report = hosting.host(made, Report(), assignment(made, 1), keep)
    assert not any(map(len, blocks))
    assert (report.ok, report.cause, report.reason, report.upload_bytes) == (
        False,
        "not_finite",
        "a sum: too large; lower the learning rate",
        0,
    )


@pytest.mark.parametrize("feedback", [False, True])
def test_a_garbled_block_is_a_result_sends_nothing_and_leaves_the_residuals(state, tmp_path, monkeypatch, feedback):
    made = state(config=by("top_k" if feedback else "int8", tmp_path))
    plain = hosting.frame

    def frame(*arguments):
        block = plain(*arguments)
        if len(block) and arguments[4].name == "head":
            block[-1] ^= 1
        return block

    monkeypatch.setattr(hosting, "frame", frame)
    order = assignment(made, 1)
    blocks, report = hosting.host(made, Report(), order, Gather(made, 3.0).keep)
    failed(made, blocks, report, "bad_message")
    assert "a block of unit head from client 0" in report.reason
    monkeypatch.setattr(hosting, "frame", plain)
    if feedback:
        assert not list((tmp_path / "run").glob("residuals/client-*/unit-*"))
    blocks, report = hosting.host(made, Report(), order, Gather(made, 3.0).keep)
    assert report.ok and any(map(len, blocks))
    if feedback:
        assert list((tmp_path / "run").glob("residuals/client-*/unit-*"))


def test_the_report_says_what_was_planned_and_done(state):
    made = state(prefix_features="off")
    order = assignment(made, 2, Recipe(1, recomputed=1))
    blocks, report = hosting.host(made, Told(peak_bytes=777), order)
    assert (report.round, report.client, report.memory_bytes, report.measured_peak_bytes) == (1, 0, 10**9, 777)
    assert (report.predicted_peak_bytes, report.predicted_upload_bytes, report.predicted_flops) == (123, 321, 456)
    assert report.upload_bytes == sum(block.nbytes for block in blocks) > made.table.window_bytes(order.window)
    # 4 rows of 8 tokens, d=16, f=64: F = 8*256 + 4*16*64 + 4*8*16 = 6656, head 6*16*40 = 3840; one frozen block, two trained,
    # one of them recomputed
    assert report.flops == 32 * ((1 + 3 * 2 + 1) * 6656 + 3840)
    assert report.loss > 0 and report.seconds > 0


RECIPES = [PLAIN, Recipe(1), Recipe(2, 5), Recipe(2, recomputed=2), Recipe(1, 3, 2), Recipe(2, 5, 1, True)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.describe(2))
def test_where_weights_lie_and_whether_features_are_kept_changes_no_bit(state, recipe):
    # 12 steps of 2 of 19 rows: some come twice, so that features are read back
    config = replace(CONFIG, training=replace(CONFIG.training, steps=12, clip_norm=None))
    found = []
    for mapped, kept in (("off", "off"), ("on", "off"), ("off", "on"), ("on", "on")):
        made = state(config=config, mapped_prefix=mapped, prefix_features=kept)
        results = []
        for round in (1, 2):  # in the second, features of the first are there
            blocks, report = hosting.host(made, Report(), assignment(made, 2, recipe, stable_units=2, round=round))
            results.append((values_of(made, blocks, round), report.loss))
        found.append((results, report.flops))
    plain, *others = found
    for results, _ in others:
        assert all(loss == wanted and same(values, expected) for (values, loss), (expected, wanted) in zip(results, plain[0]))
    assert found[2][1] == found[3][1] < found[0][1] == found[1][1]  # the work saved is counted


@pytest.mark.parametrize("mapped, charged_units", [("on", [0, 1]), ("off", [])])
def test_weights_used_where_the_node_holds_them_are_charged(state, mapped, charged_units):
    made, cap = state(mapped_prefix=mapped), Told()
    hosting.host(made, cap, assignment(made, 2, memory_bytes=10**7))
    assert cap.told == [(10**7, sum(made.table[unit].bytes for unit in charged_units))]


@pytest.mark.parametrize(
    "training, kept, stable, blocks, levels",
    [
        ({"steps": 2}, "auto", 2, 1, [2]),  # nothing is seen twice: only what is of use in later rounds
        ({"steps": 2}, "auto", 0, 1, []),
        ({"steps": 2}, "auto", 1, 1, []),  # the embedding alone is cheap
        ({"steps": 10}, "auto", 0, 1, [3]),  # 20 rows of 19: one comes twice in this round
        ({"steps": 10}, "auto", 2, 1, [2, 3]),
        ({"steps": 10}, "auto", 3, 1, [3]),
        ({"steps": 10}, "auto", 3, 2, [2]),  # no deeper than its own window
        ({"steps": 9}, "auto", 0, 1, []),  # 18 rows of 19
        ({"epochs": 1, "steps": None}, "auto", 0, 1, []),
        ({"epochs": 2, "steps": None}, "auto", 0, 1, [3]),
        ({"epochs": 2, "steps": None}, "off", 2, 1, []),
        ({"epochs": 2, "steps": None}, "auto", 0, 3, []),  # no frozen block
    ],
)
def test_features_are_kept_where_they_are_of_use_again(state, training, kept, stable, blocks, levels):
    made = state(config=replace(CONFIG, training=replace(CONFIG.training, **training)), prefix_features=kept)
    assert len(made.shards.train(0, SPEC.context)) == ROWS
    order = assignment(made, blocks, stable_units=stable)
    files = hosting._feature_files(made, order)
    assert list(files) == levels and all(isinstance(file, FeatureFile) for file in files.values())
    assert hosting._feature_files(made, order) == files  # the same in the next round


def test_features_of_units_that_changed_are_not_used(state):
    made = state()
    order = assignment(made, 1, stable_units=2)
    first = hosting._feature_files(made, order)[2]
    made.replica.versions[2] += 1  # above those units
    assert hosting._feature_files(made, order)[2] is first
    made.replica.versions[1] += 1
    assert hosting._feature_files(made, order)[2] is not first


CODECS = ["exact", "bf16", "int8", "int4", "top_k"]


def by(codec: str, tmp_path, **training) -> TrainConfig:
    """CONFIG with a codec, and a run folder for its residuals."""
    training = replace(CONFIG.training, **training)
    return replace(CONFIG, training=training, transport=TransportConfig(codec=codec), run=RunConfig(str(tmp_path / "run")))


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_sent_is_what_was_planned_and_near_what_was_trained(state, tmp_path, codec):
    exact, made = state(), state(config=by(codec, tmp_path))
    order = assignment(made, 2)
    trained = values_of(exact, hosting.host(exact, Report(), order)[0])
    blocks, report = hosting.host(made, Report(), order)
    values = values_of(made, blocks)
    assert report.ok and values.keys() == trained.keys()
    headers = sum(4 * (LEAD + int(block[2])) for block in blocks if len(block))
    assert report.upload_bytes - headers == made.costs.upload_bytes(order.window) <= made.table.window_bytes(order.window)
    change = max(float((trained[name] - made.replica.tensors[name]).abs().max()) for name in trained)
    for name in trained:
        largest = (trained[name] - made.replica.tensors[name]).abs().max()
        assert (values[name] - trained[name]).abs().max() <= largest * (1 if codec == "top_k" else 0.15) + 1e-7
    assert change > 1e-3
    again = state(config=by(codec, tmp_path))
    assert all(np.array_equal(*pair) for pair in zip(blocks, hosting.host(again, Report(), order)[0]))


@pytest.mark.parametrize("codec", CODECS)
def test_no_training_changes_nothing_after_the_merge(state, tmp_path, codec):
    made = state(config=by(codec, tmp_path, steps=0))
    values = values_of(made, hosting.host(made, Report(), assignment(made, 2))[0])
    mean = UnitMean(made.table[3])
    for _ in range(3):
        mean.add([Piece(3, t.name, None, values[t.name], 1.7) for t in made.table[3].tensors])
    for tensor in made.table[3].tensors:
        old = made.replica.tensors[tensor.name]
        assert torch.equal(values[tensor.name], old) and torch.equal(mean.mean(tensor.name, old, 5.1)[0], old)


def kept(made, client: int, round: int, blocks: int = 2) -> dict:
    order = replace(assignment(made, blocks), client=client, round=round)
    return made.residuals.load(order, made.table).tensors


def test_what_a_round_lost_comes_with_the_next_and_is_charged(state, tmp_path):
    made, cap = state(config=by("top_k", tmp_path)), Told()
    order = assignment(made, 2, memory_bytes=10**7)
    exact = state()
    trained = values_of(exact, hosting.host(exact, Report(), order)[0])
    sent = values_of(made, hosting.host(made, cap, order)[0])
    frozen, window = (sum(made.table[unit].bytes for unit in units) for units in ((0, 1), order.window.units))
    assert cap.told == [(10**7, frozen + window)]
    lost = kept(made, 0, 2)
    for name in trained:
        assert torch.allclose(lost[name], trained[name] - sent[name], atol=1e-6)
    idle = replace(made, config=by("top_k", tmp_path, steps=0))  # round 2 without training: the residual alone is sent
    sent = values_of(made, hosting.host(idle, Report(), replace(order, round=2))[0], 2)
    assert any(not torch.equal(sent[name], made.replica.tensors[name]) for name in trained)
    for name, left in kept(made, 0, 3).items():
        assert torch.allclose(left + sent[name] - made.replica.tensors[name], lost[name], atol=1e-6)


@pytest.mark.parametrize("how", ["over its cap", "killed", "not finite"])
def test_an_update_that_is_not_sent_leaves_the_residual_as_it_was(state, tmp_path, how):
    made = state(config=by("top_k", tmp_path))
    hosting.host(made, Report(), assignment(made, 2))
    before = kept(made, 0, 2)
    if how == "not finite":
        order = replace(assignment(made, 2, round=2), learning_rate=1e39)
        report = hosting.host(replace(made, config=by("top_k", tmp_path, steps=1, clip_norm=None, optimizer="sgd")), Report(), order)[1]
    else:
        cap = Told(peak_bytes=10**8, killed="killed" if how == "killed" else "")
        report = hosting.host(made, cap, assignment(made, 2, memory_bytes=10**7, round=2))[1]
    assert not report.ok
    assert same(kept(made, 0, 3), before)


def test_a_narrower_window_leaves_the_residuals_of_other_units(state, tmp_path):
    made = state(config=by("top_k", tmp_path))
    hosting.host(made, Report(), assignment(made, 3))
    before = kept(made, 0, 2, 3)
    hosting.host(made, Report(), assignment(made, 1, round=2))
    after, narrow = kept(made, 0, 3, 3), {t.name for unit in made.table.suffix(1).units for t in made.table[unit].tensors}
    assert same({n: t for n, t in after.items() if n not in narrow}, {n: t for n, t in before.items() if n not in narrow})
    assert not any(torch.equal(after[name], before[name]) for name in narrow if before[name].any())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("codec", ["int4", "top_k"])
def test_in_a_process_of_its_own_the_client_sends_and_keeps_the_same(state, tmp_path, codec):
    try:
        cap = open_cgroup(1)
    except CapError as error:
        pytest.skip(str(error))
    found = []
    torch.set_num_threads(1)  # as there: sums round alike
    for one, folder in ((Report(), "a"), (cap, "b")):
        made = state(config=by(codec, tmp_path / folder))
        results = [hosting.host(made, one, assignment(made, 2, round=round, memory_bytes=10**8)) for round in (1, 2)]
        assert all(report.ok for _, report in results), [report.reason for _, report in results]
        found.append([block.tobytes() for blocks, _ in results for block in blocks])
        found[-1] += [tensor.numpy().tobytes() for tensor in kept(made, 0, 3).values()] if codec == "top_k" else []
    assert found[0] == found[1]


def failed(state, blocks, report, cause: str) -> None:
    assert not report.ok and report.cause == cause and report.upload_bytes == 0
    assert [len(block) for block in blocks] == [0] * len(state.table)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.describe(2))
def test_a_loss_that_is_not_finite_is_a_result_and_sends_nothing(state, recipe):
    made = state(config=replace(CONFIG, training=replace(CONFIG.training, clip_norm=None)))
    made.replica.tensors["head.output.weight"].fill_(float("inf"))
    blocks, report = hosting.host(made, Report(), assignment(made, 1, recipe))
    failed(made, blocks, report, "not_finite")
    assert (report.samples, report.flops, report.loss) == (0, 0, None)


def test_an_update_that_is_not_finite_is_a_result_and_sends_nothing(state):
    made = state(config=replace(CONFIG, training=TrainingConfig(batch=2, steps=1, optimizer="sgd", clip_norm=None)))
    blocks, report = hosting.host(made, Report(), replace(assignment(made, 1), learning_rate=1e39))  # one step: no loss shows it
    failed(made, blocks, report, "not_finite")
    assert "is not finite" in report.reason


@pytest.mark.parametrize(
    "error, reason",
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
            "4096 bytes more were refused",
        ),
        (MemoryError(), "MemoryError"),
    ],
)
def test_memory_that_is_refused_is_a_result_and_sends_nothing(state, monkeypatch, error, reason):
    made = state()

    def refuse(*arguments):
        raise error

    for place in ("train", "frame"):  # while it trains, and while it encodes
        with monkeypatch.context() as patched:
            patched.setattr(hosting, place, refuse)
            blocks, report = hosting.host(made, Report(), assignment(made, 1))
        failed(made, blocks, report, "over_cap")
        assert f"over its memory cap of {10**9} bytes: " in report.reason and reason in report.reason


def test_a_client_that_the_kernel_killed_is_a_result_and_sends_nothing(state):
    made = state()
    blocks, report = hosting.host(made, Told(peak_bytes=10**7, killed="killed by the kernel"), assignment(made, 1, memory_bytes=10**7))
    failed(made, blocks, report, "over_cap")
    assert "killed by the kernel" in report.reason and (report.measured_peak_bytes, report.samples) == (10**7, 0)


def test_a_peak_over_the_budget_that_nothing_refused_sends_nothing(state):
    made = state()
    for peak, ok in ((10**7, True), (10**7 + 1, False)):
        blocks, report = hosting.host(made, Told(peak_bytes=peak), assignment(made, 1, memory_bytes=10**7))
        assert report.ok == ok
    failed(made, blocks, report, "over_cap")
    assert f"with a peak of {10**7 + 1}" in report.reason and report.samples == 4  # it did train


def test_a_programming_error_is_not_taken_for_a_result(state, monkeypatch):
    made = state()
    monkeypatch.setattr(hosting, "train", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hosting.host(made, Report(), assignment(made, 1))


def test_a_rehearsal_leaves_the_replica_and_the_shelf_as_they_were(state):
    made = state()
    before = made.replica.copy()
    hosting.rehearse(replace(made))
    assert all(torch.equal(before[name], tensor) for name, tensor in made.replica.tensors.items())
    assert not made.shelf._files
