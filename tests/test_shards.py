"""Token shards: no token lost, moved or shown to another client; the cache is used only while it is whole."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from distfl import shards
from distfl.errors import DataError, DistflError
from distfl.model import IGNORED_TARGET
from distfl.shards import END_OF_TEXT, TOKEN, Sequences, Shard, ShardIndex, build

END = 0  # id of the end-of-text token


def stream(length: int) -> np.ndarray:
    """1, 2, 3, ..: every token says where it stands, and none is the padding's 0."""
    return np.arange(1, length + 1, dtype=TOKEN)


# --- rows --------------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(length=st.integers(0, 120), context=st.integers(1, 17), batch=st.integers(1, 9))
def test_batches_reassemble_the_stream(length, context, batch):
    data = Sequences(stream(length), context)
    inputs, targets, rows = [], [], 0
    for batch_inputs, batch_targets in data.in_order(batch):
        assert batch_inputs.shape == batch_targets.shape == (len(batch_inputs), context) and len(batch_inputs) <= batch
        assert batch_inputs.dtype == batch_targets.dtype == torch.int64
        counts = batch_targets != IGNORED_TARGET
        assert (batch_targets[counts] == batch_inputs[counts] + 1).all()  # the next token of 1, 2, 3, ..
        assert (batch_inputs[~counts] == 0).all()  # padding, which has no target
        inputs += batch_inputs[counts].tolist()
        targets += batch_targets[counts].tolist()
        rows += len(batch_inputs)
    assert rows == len(data) == (length - 1 + context - 1) // context if length > 1 else rows == len(data) == 0
    assert inputs == list(range(1, length)) and targets == list(range(2, length + 1))  # every token but the first is a target once


@settings(deadline=None)
@given(length=st.integers(0, 60), batch=st.integers(1, 9), most=st.integers(1, 20))
def test_the_first_rows_only(length, batch, most):
    data = Sequences(stream(length), 4)
    whole = [row for inputs, _ in data.in_order(1) for row in inputs.tolist()]
    assert [row for inputs, _ in data.in_order(batch, most) for row in inputs.tolist()] == whole[:most]


def test_rows_by_hand():
    # 6 tokens, context 4: row 0 reads 1 2 3 4 and predicts 2 3 4 5; row 1 has 5 -> 6 left.
    inputs, targets = Sequences(stream(6), 4).batch([1, 0, 1])
    no = IGNORED_TARGET
    assert inputs.tolist() == [[5, 0, 0, 0], [1, 2, 3, 4], [5, 0, 0, 0]]
    assert targets.tolist() == [[6, no, no, no], [2, 3, 4, 5], [6, no, no, no]]


def test_a_full_last_row_has_no_empty_one_after_it():
    assert [len(Sequences(stream(length), 4)) for length in (0, 1, 2, 5, 6, 9, 10)] == [0, 0, 1, 1, 2, 2, 3]


def test_tokens_above_the_signed_range_stay_positive():
    inputs, targets = Sequences(np.array([65535, 32768, 40000], TOKEN), 2).batch([0])
    assert inputs.tolist() == [[65535, 32768]] and targets.tolist() == [[32768, 40000]]


# --- building ----------------------------------------------------------------------------------------------------------------------

CLIENTS = [("ann", ["abc abd", "cab"], ["dab"]), ("bob", ["xyz zyx"], []), ("cy", ["123 321 1", "21"], ["3 2", "1"])]


def ids(texts: list[str]) -> list[int]:
    return [token for text in texts for token in (*tokenizer().encode(text).ids, END)]


def test_clients_get_their_own_tokens_and_no_others(tmp_path):
    index = build(CLIENTS, tokenizer(), "key", tmp_path)
    assert tokenizer().token_to_id(END_OF_TEXT) == END
    assert [shard.name for shard in index.shards] == ["ann", "bob", "cy"]
    for client, (_, train, test) in enumerate(CLIENTS):
        for texts, data in ((train, index.train(client, 4)), (test, index.test(client, 4))):
            assert data.tokens.tolist() == ids(texts)
            pairs = list(data.in_order(2))
            seen = {int(token) for inputs, targets in pairs for token in (*inputs.flatten(), *targets.flatten())}
            assert seen - {IGNORED_TARGET, END} == set(ids(texts)) - {END}
    # One after another, train before test, nothing between them.
    lengths = [len(ids(texts)) for _, train, test in CLIENTS for texts in (train, test)]
    assert [shard.offset for shard in index.shards] == [0, sum(lengths[:2]), sum(lengths[:4])]
    assert (tmp_path / os.path.basename(index.folder) / "tokens.bin").stat().st_size == 2 * sum(lengths)


def test_an_empty_test_shard_has_no_rows(tmp_path):
    empty = build(CLIENTS, tokenizer(), "key", tmp_path).test(1, 4)
    assert len(empty) == 0 and list(empty.in_order(2)) == []
    alone = build([("only", ["abc"], [])], tokenizer(), "other key", tmp_path)  # an empty range at the end of the file
    assert len(alone.test(0, 4)) == 0


def test_an_index_survives_the_wire(tmp_path):
    index = build(CLIENTS, tokenizer(), "key", tmp_path)
    again = ShardIndex.from_json(json.loads(json.dumps(asdict(index))))
    assert again == index
    assert again.train(2, 4).tokens.tolist() == ids(CLIENTS[2][1])


def unread():
    pytest.fail("the texts were read although the cache held their tokens")
    yield


def test_a_whole_cache_is_used_again(tmp_path):
    index = build(CLIENTS, tokenizer(), "key", tmp_path)
    assert build(unread(), tokenizer(), "key", tmp_path) == index


def test_a_moved_cache_is_used_where_it_is(tmp_path):
    build(CLIENTS, tokenizer(), "key", tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    index = build(unread(), tokenizer(), "key", tmp_path / "after")
    assert index.train(0, 4).tokens.tolist() == ids(CLIENTS[0][1])


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied", "removed", "index removed"])
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    index = build(CLIENTS, tokenizer(), "key", tmp_path)
    file = tmp_path / os.path.basename(index.folder) / "tokens.bin"
    whole = file.read_bytes()
    if damage == "flipped":
        file.write_bytes(whole[:7] + bytes([whole[7] ^ 1]) + whole[8:])
    elif damage == "truncated":
        file.write_bytes(whole[:-2])
    elif damage == "emptied":
        file.write_bytes(b"")
    else:
        (file if damage == "removed" else file.with_name("index.json")).unlink()
    assert build(iter(CLIENTS), tokenizer(), "key", tmp_path) == index
    assert file.read_bytes() == whole


@pytest.mark.parametrize("content", ["", "{", "[]", '{"folder": ""}', '{"folder": "", "checksum": "", "shards": [{"odd": 1}]}'])
def test_a_cache_with_a_garbled_index_is_built_again(tmp_path, content):
    index = build(CLIENTS, tokenizer(), "key", tmp_path)
    (tmp_path / os.path.basename(index.folder) / "index.json").write_text(content)
    assert build(iter(CLIENTS), tokenizer(), "key", tmp_path) == index


def test_another_key_has_another_cache(tmp_path):
    first = build(CLIENTS, tokenizer(), "key", tmp_path)
    second = build([("dan", ["other text"], [])], tokenizer(), "key 2", tmp_path)
    assert first.folder != second.folder and build(unread(), tokenizer(), "key", tmp_path) == first


def test_two_runs_that_build_the_same_cache_at_once_both_get_it(tmp_path):
    # What two jobs of one array do: the second starts and ends its build while the first is reading texts.
    def slow_texts():
        yield CLIENTS[0]
        assert build(CLIENTS, tokenizer(), "key", tmp_path).train(2, 4).tokens.tolist() == ids(CLIENTS[2][1])
        yield from CLIENTS[1:]

    index = build(slow_texts(), tokenizer(), "key", tmp_path)
    assert [index.train(client, 4).tokens.tolist() for client in range(3)] == [ids(train) for _, train, _ in CLIENTS]


@pytest.mark.parametrize("texts", [[], [""]])
def test_a_client_without_a_token_to_predict_is_refused(tmp_path, texts):
    with pytest.raises(DataError, match="(?s)client 'eve'.*fewer than two.*minimum_characters"):
        build([CLIENTS[0], ("eve", texts, ["test"])], tokenizer(), "key", tmp_path)
    assert build(CLIENTS, tokenizer(), "key", tmp_path).train(0, 4).tokens.tolist() == ids(CLIENTS[0][1])  # the refusal left no half cache


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path):
    class Large:
        def get_vocab_size(self):
            return 65537

    with pytest.raises(DataError, match="(?s)65537.*at most 65536"):
        build(CLIENTS, Large(), "key", tmp_path)


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    other = Tokenizer.from_str(tokenizer().to_str().replace(END_OF_TEXT, "</s>"))  # as an imported family may bring
    with pytest.raises(DistflError, match="endoftext"):
        build(CLIENTS, other, "key", tmp_path)


def test_nobody_can_write_through_a_shard(tmp_path):
    mapped = build(CLIENTS, tokenizer(), "key", tmp_path).train(0, 4).tokens
    assert isinstance(mapped, np.memmap)
    with pytest.raises(ValueError):
        mapped[0] = 1
    assert shards.TOKEN.itemsize == 2


def test_pages_of_a_large_shard_do_not_stay_with_the_client(tmp_path):
    np.arange(12_000_000, dtype=np.uint32).astype(TOKEN).tofile(tmp_path / "tokens.bin")
    data = ShardIndex(str(tmp_path), "", (Shard("client", 0, 12_000_000, 0),)).train(0, 128)
    data.batch([0])
    for start in range(0, len(data), len(data) // 100):
        assert data.batch([start])[0][0, 1] == (start * 128 + 1) % 2**16
    assert resident_bytes_of(tmp_path / "tokens.bin") < 500_000


def resident_bytes_of(path: Path) -> int:
    """Bytes of a mapped file that are resident in this process."""
    with open("/proc/self/smaps") as file:
        mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", file.read(), flags=re.MULTILINE)
    found = [mapping for mapping in mappings if mapping.splitlines()[:1] and mapping.splitlines()[0].endswith(str(path))]
    assert found
    return sum(int(re.search(r"^Rss: +(\d+) kB", mapping, re.MULTILINE)[1]) * 1024 for mapping in found)
