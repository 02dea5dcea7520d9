"""Pretraining: the family it writes, growth that keeps the function, interruption, and any number of ranks."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import SPEC, model, on_ranks, same_bits, tokens, weights

from distfl import pretrain as module
from distfl.config import ArchitectureConfig, DataConfig, PretrainConfig, PretrainSchedule
from distfl.errors import CheckpointError, ConfigError, DataError
from distfl.family import open_family
from distfl.model import from_tensors
from distfl.pretrain import grow, pretrain, train_tokenizer, unigram_loss, validate
from distfl.shards import TOKEN, Sequences
from distfl.training import evaluate
from distfl.transport.local import group

NOUNS, VERBS = ["cat", "dog", "bird", "fish", "child", "queen", "horse"], ["sees", "likes", "follows", "carries", "greets"]
STEPS = 10  # of each depth


def sentences(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [f"the {generator.choice(NOUNS)} {generator.choice(VERBS)} the {generator.choice(NOUNS)}." for _ in range(count)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About 6 KB of sentences to train on and 1 KB to validate on."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, count, seed in (("train", 240, 1), ("valid", 40, 2)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(count, seed)))
    return folder


@pytest.fixture
def config(corpus, tmp_path):
    return PretrainConfig(
        output=str(tmp_path / "family"),
        data=DataConfig(corpus="json", path=str(corpus), cache=str(tmp_path / "cache")),
        architecture=ArchitectureConfig(depths=(1, 2), width=16, heads=2, context=16, vocabulary=300),
        schedule=PretrainSchedule(
            tokens=(STEPS * 4 * 16,),
            batch=4,
            warmup_steps=2,
            learning_rate=1e-2,
            validate_every=4,
            checkpoint_every=3,
            early_validation_sequences=8,
        ),
    )


@pytest.fixture
def written(monkeypatch):
    """The weights of each depth before they are rounded to half precision, by output folder and file."""
    kept = {}

    def write(path, tensors, dtype):
        kept.setdefault(path.parent.name, {})[path.name] = {name: tensor.clone() for name, tensor in tensors.items()}
        write_weights(path, tensors, dtype)

    write_weights = module.write_weights
    monkeypatch.setattr(module, "write_weights", write)
    return kept


def alone(config, resume: bool = False):
    return pretrain(config, group(1)[0], resume)


def into(config, folder: str):
    return replace(config, output=str(module.Path(config.output).parent / folder))


def change(config, section: str = "schedule", **values):
    return replace(config, **{section: replace(getattr(config, section), **values)})


# --- what is written ---------------------------------------------------------------------------------------------------------------


def test_a_family_with_its_manifest_is_written(config, tmp_path):
    family = alone(config)
    assert family == open_family(config.output) and family.depths == (1, 2)
    assert sorted(file.name for file in (tmp_path / "family").iterdir()) == [
        "depth-01.safetensors",
        "depth-02.safetensors",
        "family.json",
        "log.jsonl",
        "tokenizer.json",
    ]
    manifest = family.manifest
    assert manifest["architecture"] == {"width": 16, "heads": 2, "context": 16, "vocabulary": 300}
    assert manifest["uniform_validation_loss"] == pytest.approx(math.log(300), abs=1e-4)
    tokenizer = family.tokenizer()
    ids = [token for text in sentences(40, 2) for token in (*tokenizer.encode(text).ids, 0)]
    held_out = Sequences(np.array(ids, TOKEN), 16)
    assert manifest["corpus"]["validation_tokens"] == len(ids) and len(manifest["corpus"]["checksum"]) == 64
    for depth in (1, 2):  # what stands in the manifest is the loss of what lies in the file
        entry = manifest["depths"][str(depth)]
        score = evaluate(from_tensors(family.spec(depth), family.tensors(depth)), held_out.in_order(7))
        assert entry["validation_loss"] == pytest.approx(score.loss, abs=1e-4)
        assert entry["validation_accuracy"] == pytest.approx(score.accuracy, abs=1e-4)
        assert entry["tokens_seen"] == STEPS * 4 * 16 and entry["tokens_seen_with_shallower_starts"] == depth * STEPS * 4 * 16
    first, second = (manifest["depths"][depth]["validation_loss"] for depth in "12")
    assert second < first < manifest["uniform_validation_loss"]
    events = [json.loads(line) for line in (tmp_path / "family" / "log.jsonl").read_text().splitlines()]
    # validated after steps 4, 8 and the last, for each depth
    assert [(e["depth"], e["step"]) for e in events if e["event"] == "step"] == [(1, 4), (1, 8), (1, 10), (2, 4), (2, 8), (2, 10)]


def test_the_same_seed_gives_the_same_weights(config, written):
    alone(config)
    alone(into(config, "again"))
    alone(replace(into(config, "other"), seed=2))
    assert all(same_bits(written["family"][file], written["again"][file]) for file in ("depth-01.safetensors", "depth-02.safetensors"))
    assert not same_bits(written["family"]["depth-01.safetensors"], written["other"]["depth-01.safetensors"])


def test_a_finished_family_is_not_overwritten(config, tmp_path):
    alone(config)
    before = {file.name: file.read_bytes() for file in (tmp_path / "family").iterdir()}
    for resume in (False, True):
        with pytest.raises(CheckpointError, match="(?s)a finished family.*set output"):
            alone(config, resume)
    assert {file.name: file.read_bytes() for file in (tmp_path / "family").iterdir()} == before


def test_a_corpus_without_held_out_text_is_refused(config, corpus):
    with pytest.raises(DataError, match="(?s)no validation or test split"):
        alone(change(config, "data", path=str(corpus / "train.jsonl")))


def test_a_corpus_too_small_for_its_vocabulary_is_refused(config):
    with pytest.raises(DataError, match="(?s)vocabulary of 5000.*lower architecture.vocabulary"):
        alone(change(config, "architecture", vocabulary=5000))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns(config, precision):
    short = change(change(config, tokens=(40 * 4 * 16,), precision=precision), "architecture", depths=(1,))
    manifest = alone(short).manifest
    assert manifest["depths"]["1"]["validation_loss"] < manifest["unigram_validation_loss"] - 0.3


def test_without_growth_every_depth_starts_at_random(config, written):
    plain = change(config, grow=False)
    entries = alone(plain).manifest["depths"]
    assert [entries[depth]["tokens_seen_with_shallower_starts"] for depth in "12"] == [STEPS * 64] * 2
    alone(into(change(plain, "architecture", depths=(2,)), "only"))
    assert same_bits(written["family"]["depth-02.safetensors"], written["only"]["depth-02.safetensors"])
    alone(into(config, "grown"))
    assert not same_bits(written["family"]["depth-02.safetensors"], written["grown"]["depth-02.safetensors"])


def test_each_depth_has_its_own_number_of_tokens(config):
    entries = alone(change(config, tokens=(2 * 64, 3 * 64 + 63))).manifest["depths"]  # whole steps of 64 tokens
    assert [entries[depth]["tokens_seen"] for depth in "12"] == [128, 192]


@pytest.mark.parametrize("grow, begin", [(True, 8), (False, 0)], ids=["grown", "from random"])
def test_a_grown_depth_goes_on_reading_where_the_shallower_one_ended(config, monkeypatch, grow, begin):
    begun, rows_of_step = [], module._rows_of_step
    monkeypatch.setattr(module, "_rows_of_step", lambda seed, seen, *rest: begun.append(seen) or rows_of_step(seed, seen, *rest))
    alone(change(config, tokens=(2 * 64,), grow=grow))
    assert begun == [0, 4, begin, begin + 4]  # two steps of 4 rows for each depth


# --- growth ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old, new", [(1, 2), (2, 3), (3, 4), (3, 6), (3, 7), (3, 3)])
def test_growing_keeps_the_function(old, new):
    shallow, deep = replace(SPEC, depth=old), replace(SPEC, depth=new)
    grown = grow(weights(shallow), deep)
    with torch.no_grad():
        wanted, found = model(shallow)(tokens(2, 8)), from_tensors(deep, grown)(tokens(2, 8))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    # Nothing but the residual projections of new blocks is zero: the new blocks can learn at once.
    silent = {name for name, tensor in grown.items() if not tensor.any()}
    parts = ("proj.weight", "proj.bias", "fc2.weight", "fc2.bias")
    assert len(silent) == 4 * (new - old) and all(name.endswith(parts) for name in silent)
    assert not any(name.startswith("blocks.0.") for name in silent)
    network = from_tensors(deep, grown)
    network(tokens(2, 8)).square().sum().backward()
    assert all(network.get_parameter(name).grad.any() for name in silent)


def test_new_blocks_are_spread_evenly():
    # 2 -> 5: new block i copies old block i * 2 // 5 = 0 0 0 1 1
    shallow = weights(replace(SPEC, depth=2))
    grown = grow(shallow, replace(SPEC, depth=5))
    for index, source in enumerate([0, 0, 0, 1, 1]):
        assert torch.equal(grown[f"blocks.{index}.qkv.weight"], shallow[f"blocks.{source}.qkv.weight"])
    assert [bool(grown[f"blocks.{index}.fc2.weight"].any()) for index in range(5)] == [True, False, False, True, False]


def test_growing_shares_no_memory_and_changes_no_source():
    shallow = weights(SPEC)
    grown = grow(shallow, replace(SPEC, depth=5))
    assert not {tensor.data_ptr() for tensor in grown.values()} & {tensor.data_ptr() for tensor in shallow.values()}
    assert len({tensor.data_ptr() for tensor in grown.values()}) == len(grown)
    assert same_bits(shallow, weights(SPEC))


# --- interruption ------------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def stop_after(monkeypatch, steps: int):
    """Let this many steps be, then fail, as a job does that is killed."""
    taken, real = [], module._DepthTask._step

    def step(self, *arguments):
        if len(taken) == steps:
            raise Killed
        taken.append(None)
        return real(self, *arguments)

    monkeypatch.setattr(module._DepthTask, "_step", step)
    return real


@pytest.mark.parametrize("steps", [1, 3, 5, 10, 11, 17], ids="killed after step {}".format)
def test_an_interrupted_pretraining_ends_in_the_same_weights(config, written, monkeypatch, steps):
    alone(config)
    halved = into(config, "halved")
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Killed):
            alone(halved)
    with pytest.raises(CheckpointError, match="(?s)unfinished.*--resume"):
        alone(halved)
    taken, real = [], module._DepthTask._step
    monkeypatch.setattr(module._DepthTask, "_step", lambda self, *arguments: taken.append(1) or real(self, *arguments))
    family = alone(halved, resume=True)
    # Checkpoints lie at steps 3, 6, 9 and 10 of each depth: what was done before the last one is not done again.
    saved = steps // STEPS * STEPS + steps % STEPS // 3 * 3
    assert len(taken) == 2 * STEPS - saved
    for file in ("depth-01.safetensors", "depth-02.safetensors"):
        assert same_bits(written["family"][file], written["halved"][file])
    assert {depth: entry["validation_loss"] for depth, entry in family.manifest["depths"].items()} == {
        depth: entry["validation_loss"] for depth, entry in open_family(config.output).manifest["depths"].items()
    }
    assert not (family.folder / "unfinished").exists()


def test_resuming_where_nothing_lies_just_begins(config):
    assert alone(config, resume=True).depths == (1, 2)


def interrupted(config, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Killed):
            alone(config)


@pytest.mark.parametrize(
    "section, values",
    [
        ("schedule", {"learning_rate": 1e-3}),
        ("schedule", {"batch": 2}),
        ("architecture", {"width": 32}),
        ("architecture", {"heads": 4}),
        ("architecture", {"vocabulary": 310}),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_config_is_refused(config, monkeypatch, section, values):
    interrupted(config, monkeypatch)
    with pytest.raises(CheckpointError):
        alone(change(config, section, **values), resume=True)


def test_a_checkpoint_of_another_corpus_is_refused(config, monkeypatch, tmp_path):
    interrupted(config, monkeypatch)
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(240, 9)))
    with pytest.raises(CheckpointError):
        alone(change(config, "data", path=str(tmp_path)), resume=True)


def test_a_damaged_checkpoint_is_refused(config, monkeypatch, tmp_path):
    interrupted(config, monkeypatch)
    file = tmp_path / "family" / "unfinished" / "depth-01.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="depth-01"):
        alone(config, resume=True)


def test_a_tokenizer_that_an_early_failure_left_behind_is_not_used(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "build", lambda *_: (_ for _ in ()).throw(Killed()))  # for instance: the cache's disk is full
        with pytest.raises(Killed):
            alone(config)
    smaller = change(config, "architecture", vocabulary=310)
    try:
        family = alone(smaller)
    except CheckpointError:
        return  # a refusal is right too
    assert family.tokenizer().get_vocab_size() == 310


# --- several ranks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("seed", [3, 1], ids=["full rows", "short row"])
def test_several_ranks_train_the_same_family_as_one(config, written, monkeypatch, seed, ranks):
    steady, met, rows_of_step = replace(change(config, tokens=(8 * 4 * 16,)), seed=seed), [], module._rows_of_step

    def watched(seed: int, seen: int, batch: int, rows: int) -> list[int]:
        chosen = rows_of_step(seed, seen, batch, rows)
        met.append(rows - 1 in chosen)  # only the last row of the corpus is short
        return chosen

    monkeypatch.setattr(module, "_rows_of_step", watched)
    family = alone(steady)
    assert any(met) == (seed == 1)
    several = on_ranks(ranks, lambda transport: pretrain(into(steady, "several"), transport, False))
    assert several[1:] == [None] * (ranks - 1)
    for depth in (1, 2):
        file, spec = f"depth-{depth:02d}.safetensors", family.spec(depth)
        with torch.no_grad():
            one, more = (from_tensors(spec, written[folder][file])(tokens(2, 16)) for folder in ("family", "several"))
        torch.testing.assert_close(more, one, rtol=0, atol=1e-4)
        for name, tensor in written["family"][file].items():
            # A key's bias changes no attention: its gradient is rounding alone, which Adam makes large steps of.
            keys = slice(16, 32) if name.endswith("qkv.bias") else slice(0, 0)
            left, right = tensor.clone(), written["several"][file][name].clone()
            left[keys], right[keys] = 0, 0
            torch.testing.assert_close(right, left, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        one, more = (result.manifest["depths"][str(depth)]["validation_loss"] for result in (family, several[0]))
        assert more == pytest.approx(one, abs=2e-4)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_logged_training_loss_does_not_depend_on_the_ranks(config, tmp_path, ranks):
    short = change(config, "architecture", depths=(1,))
    alone(short)
    on_ranks(ranks, lambda transport: pretrain(into(short, "several"), transport, False))

    def logged(folder):
        events = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        return [event["training_loss"] for event in events if event["event"] == "step"]

    assert logged("several") == pytest.approx(logged("family"), rel=0.1)  # an estimate: it is of rank 0's rows only


def test_more_ranks_than_rows_of_a_batch_agree(config, written):
    short = change(change(config, tokens=(3 * 2 * 16,), batch=2), "architecture", depths=(1,))
    alone(short)
    on_ranks(3, lambda transport: pretrain(into(short, "several"), transport, False))
    one, more = written["family"]["depth-01.safetensors"], written["several"]["depth-01.safetensors"]
    torch.testing.assert_close(more["head.output.weight"], one["head.output.weight"], rtol=0, atol=1e-4)


def short_row(length: int = 2 * 16 + 2) -> Sequences:
    """Three rows of 16 tokens, 16 tokens and a single one, of which the last row has but one target."""
    return Sequences(np.arange(1, length + 1, dtype=TOKEN), 16)


def test_a_short_row_weighs_the_same_on_any_number_of_ranks(config):
    spec = replace(SPEC, context=16)
    schedule = change(config, batch=3, clip_norm=1e9).schedule

    def gradient(transport):
        task = module._DepthTask(schedule, 0, spec, 1, module.Path("nowhere"), 0)
        network = model(spec)
        flat = module._flat_gradient(network)
        task._step(network, [], flat, short_row(), transport, 0)
        return flat

    (one,) = on_ranks(1, gradient)
    for flat in on_ranks(3, gradient):
        torch.testing.assert_close(flat, one, rtol=1e-4, atol=1e-5)


def test_validation_is_the_same_on_any_number_of_ranks():
    data = Sequences(tokens(1, 400)[0].numpy().astype(TOKEN), SPEC.context)  # 50 rows, the last one short
    wanted = evaluate(model(), data.in_order(50))
    for ranks in (1, 2, 3):
        for result in on_ranks(ranks, lambda transport: validate(model(), data, None, transport, batch=8)):
            assert (result.loss, result.accuracy, result.tokens) == (pytest.approx(wanted.loss, rel=1e-6), wanted.accuracy, 399)
    first = evaluate(model(), [data.batch(range(5))])
    for ranks in (1, 2):
        for result in on_ranks(ranks, lambda transport: validate(model(), data, 5, transport, batch=2)):
            assert (result.loss, result.tokens) == (pytest.approx(first.loss, rel=1e-6), 40)


# --- smaller parts -----------------------------------------------------------------------------------------------------------------


def test_rows_of_steps_make_whole_passes_in_orders_of_their_own():
    seen = [row for step in range(10) for row in module._rows_of_step(1, step * 4, 4, 10)]  # 40 rows: 4 passes over 10
    passes = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    assert module._rows_of_step(1, 6, 12, 10) == seen[6:18]  # beginning anywhere
    assert module._rows_of_step(2, 0, 10, 10) != passes[0]


def test_a_batch_may_be_larger_than_the_corpus():
    rows = module._rows_of_step(1, 6, 25, 10)  # the end of pass 0, passes 1 and 2, one row of pass 3
    assert rows == [row for start in range(6, 31) for row in module._rows_of_step(1, start, 1, 10)]


def test_the_learning_rate_rises_stays_and_falls_to_a_twentieth(config):
    schedule = replace(config.schedule, learning_rate=1.0, warmup_steps=4, decay_fraction=0.5, batch=1, tokens=(100,))
    task = module._DepthTask(schedule, 0, replace(SPEC, context=2), 1, module.Path("nowhere"), 0)
    assert task.steps == 50
    # 1/4 .. 1 in 4 steps; then 1; from step 25 on (50 - step) / 25, at least 1/20: the last step would be 1/25.
    wanted = {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 25: 1.0, 26: 0.96, 40: 0.4, 48: 0.08, 49: 0.05}
    assert {step: task._learning_rate(step) for step in wanted} == pytest.approx(wanted)


def test_no_warm_up_is_a_plateau_from_the_start_or_refused(config):
    try:
        schedule = replace(config.schedule, learning_rate=1.0, warmup_steps=0)
    except ConfigError:
        return
    assert module._DepthTask(schedule, 0, SPEC, 1, module.Path("nowhere"), 0)._learning_rate(0) == 1.0


def test_unigram_loss_by_hand():
    # Counts plus one over a vocabulary of 4: token 0 three times -> 4/8, token 1 once -> 2/8, tokens 2 and 3 -> 1/8 each.
    train = Sequences(np.array([0, 1, 0, 0], TOKEN), 2)
    held_out = Sequences(np.array([3, 0, 1, 2], TOKEN), 2)  # the first token is no target
    assert unigram_loss(train, held_out, 4) == pytest.approx((math.log(2) + math.log(4) + math.log(8)) / 3)


def test_a_tokenizer_reads_any_text_and_begins_with_the_end():
    made = train_tokenizer(sentences(50, 1), 300)
    assert made.get_vocab_size() == 300 and made.token_to_id("<|endoftext|>") == 0
    for text in ("the cat sees the dog.", "Zürich 東京 🙂\n\ttab  blanks", ""):
        assert made.decode(made.encode(text).ids) == text
    assert len(made.encode("the cat sees the dog.").ids) < 12  # merges were learnt: 21 letters
