"""Partitions: every row to exactly one client, the same clients from the same seed, and plain refusals."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distfl.config import DataConfig
from distfl.corpora import Corpus, Rows
from distfl.errors import ConfigError, DataError
from distfl.partition import ClientText, deal


def corpus(train: Rows, test: Rows | None = None) -> Corpus:
    return Corpus(name="made up", checksum="", train=train, test=test)


def rows(*named: tuple[str, str]) -> Rows:
    """Rows from (client, text)."""
    return Rows([text for _, text in named], [name for name, _ in named])


# Four names with 6, 3, 2 and 1 characters of training text.
FOUR = corpus(
    rows(("ann", "aaa"), ("bob", "bbb"), ("ann", "AAA"), ("cat", "cc"), ("dan", "d")),
    rows(("dan", "d?"), ("ann", "a?"), ("bob", "b?"), ("eve", "e?")),
)


# --- by_column ---------------------------------------------------------------------------------------------------------------------


def test_by_column_makes_one_client_per_name_and_leaves_out_short_ones():
    clients = deal(FOUR, DataConfig(minimum_characters=2), seed=1)
    # dan has 1 character, fewer than 2; eve has test text only; cat has no test text.
    assert clients == [ClientText("ann", ["aaa", "AAA"], ["a?"]), ClientText("bob", ["bbb"], ["b?"]), ClientText("cat", ["cc"], [])]


def test_largest_takes_the_names_with_most_text():
    clients = deal(FOUR, DataConfig(minimum_characters=1, clients=2), seed=1)
    assert [client.name for client in clients] == ["ann", "bob"]


def test_largest_breaks_ties_by_name():
    tied = corpus(rows(("c", "x y"), ("a", "x y"), ("b", "x y")))
    assert [client.name for client in deal(tied, DataConfig(minimum_characters=1, clients=2), seed=1)] == ["a", "b"]


def test_random_draws_names_by_the_seed():
    config = DataConfig(minimum_characters=1, clients=2, selection="random")
    drawn = {seed: tuple(client.name for client in deal(FOUR, config, seed)) for seed in range(30)}
    assert all(names == tuple(sorted(set(names))) and len(names) == 2 for names in drawn.values())
    assert len(set(drawn.values())) > 1
    assert drawn[3] == tuple(client.name for client in deal(FOUR, config, 3))


def test_merge_gives_each_name_to_the_client_with_least_text():
    clients = deal(FOUR, DataConfig(minimum_characters=1, clients=2, selection="merge"), seed=1)
    # ann (6) -> 0; bob (3) -> 1; cat (2) -> 1, which has 3; dan (1) -> 1, which has 5.
    assert clients == [
        ClientText("merged-000", ["aaa", "AAA"], ["a?"]),
        ClientText("merged-001", ["bbb", "cc", "d"], ["b?", "d?"]),
    ]


def test_merge_without_a_test_split_tests_every_name():
    three = corpus(rows(("a", "a1"), ("b", "b1"), ("c", "c1"), ("a", "a2"), ("b", "b2"), ("c", "c2")))
    (client,) = deal(three, DataConfig(minimum_characters=1, clients=1, selection="merge", test_fraction=0.5), seed=1)
    assert client == ClientText("merged-000", ["a1", "b1", "c1"], ["a2", "b2", "c2"])


def test_as_many_clients_as_names_keeps_the_names():
    clients = deal(FOUR, DataConfig(minimum_characters=1, clients=4, selection="merge"), seed=1)
    assert [client.name for client in clients] == ["ann", "bob", "cat", "dan"]


@pytest.mark.parametrize("clients, minimum, found", [(5, 1, "4 of its 4 names"), (3, 3, "2 of its 4 names"), (None, 7, "0 of its 4 names")])
def test_more_clients_than_names_is_refused(clients, minimum, found):
    with pytest.raises(DataError, match=found) as caught:
        deal(FOUR, DataConfig(clients=clients, minimum_characters=minimum), seed=1)
    assert "data.clients" in caught.value.change and "data.minimum_characters" in caught.value.change


def test_by_column_needs_a_client_column():
    with pytest.raises(ConfigError, match="data.client_column"):
        deal(corpus(Rows(["a b"])), DataConfig(), seed=1)


# --- test text where the corpus brings none ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, train, test",
    [
        (["aaaa", "bbbb", "cc"], ["aaaa", "bbbb"], ["cc"]),  # 10 characters, cut wanted at 8: exactly there
        (["aaaa", "bb", "cccc"], ["aaaa", "bb"], ["cccc"]),  # cuts at 4 and 6 can be had: 6 is nearer to 8
        (["a", "bbbbbbbbb"], ["a"], ["bbbbbbbbb"]),  # one row on each side, however uneven
        (["bbbbbbbbb", "a"], ["bbbbbbbbb"], ["a"]),
        (["one two three four fi"], ["one two three four"], ["fi"]),  # 21 characters, 16.8 wanted: gaps at 3, 7, 13, 18
        (["  long\n word "], ["long"], ["word"]),  # the white space at the cut and at the ends is nobody's
    ],
)
def test_the_end_of_a_client_is_its_test_text(texts, train, test):
    (client,) = deal(corpus(Rows(texts, ["a"] * len(texts))), DataConfig(minimum_characters=1, test_fraction=0.2), seed=1)
    assert client == ClientText("a", train, test)


def test_a_row_of_one_word_is_all_training_text():
    clients = deal(corpus(rows(("a", "word"), ("b", "two words"))), DataConfig(minimum_characters=1), seed=1)
    assert clients == [ClientText("a", ["word"], []), ClientText("b", ["two"], ["words"])]


def test_no_test_text_at_all_is_refused():
    with pytest.raises(DataError, match="cannot be divided"):
        deal(corpus(rows(("a", "word"))), DataConfig(minimum_characters=1), seed=1)
    with pytest.raises(DataError, match="no rows for any of the 1 clients"):
        deal(corpus(rows(("a", "x y")), rows(("b", "x y"))), DataConfig(minimum_characters=1), seed=1)


# --- iid and dirichlet ---------------------------------------------------------------------------------------------------------------


def test_iid_deals_evenly():
    clients = deal(corpus(Rows([f"r{i}" for i in range(10)]), Rows(["t0", "t1"])), DataConfig(partition="iid", clients=3), seed=1)
    assert [client.name for client in clients] == ["client-000", "client-001", "client-002"]
    assert [len(client.train) for client in clients] == [4, 3, 3]
    assert [len(client.test) for client in clients] == [1, 1, 0]


def test_iid_shuffles():
    texts = [f"r{i}" for i in range(100)]
    (client,) = deal(corpus(Rows(texts), Rows(["t"])), DataConfig(partition="iid", clients=1), seed=1)
    assert client.train != texts and sorted(client.train) == sorted(texts)


def test_a_large_alpha_deals_every_label_evenly_and_test_rows_alike():
    train = Rows(["x"] * 400 + ["y"] * 400, None, ["x"] * 400 + ["y"] * 400)
    test = Rows(["x"] * 40 + ["y"] * 40, None, ["x"] * 40 + ["y"] * 40)
    clients = deal(corpus(train, test), DataConfig(partition="dirichlet", clients=4, dirichlet_alpha=1e6), seed=1)
    # Proportions are 1/4 within about 1/(4 * sqrt(4e6 / 3)), so 100 of 400 and 10 of 40, one more or less by rounding.
    for client in clients:
        assert all(abs(client.train.count(label) - 100) <= 1 and abs(client.test.count(label) - 10) <= 1 for label in "xy")


def test_a_small_alpha_skews_and_test_rows_follow_the_training_rows():
    train = Rows(["x"] * 1000 + ["y"] * 1000, None, ["x"] * 1000 + ["y"] * 1000)
    clients = deal(corpus(train, train), DataConfig(partition="dirichlet", clients=4, dirichlet_alpha=0.2), seed=1)
    assert max(client.train.count("x") for client in clients) > 400  # 250 if even
    assert all(Counter(client.train) == Counter(client.test) for client in clients)  # the same numbers, as the splits are equal


def test_dirichlet_test_text_has_all_of_a_clients_labels():
    train = Rows(["x"] * 500 + ["y"] * 500, None, ["x"] * 500 + ["y"] * 500)
    clients = deal(corpus(train), DataConfig(partition="dirichlet", clients=2, dirichlet_alpha=100.0), seed=1)
    assert all(set(client.test) == {"x", "y"} for client in clients)


def test_a_skew_that_leaves_clients_empty_is_refused():
    with pytest.raises(DataError, match="left a client without") as caught:
        deal(corpus(Rows(["a b"] * 20, None, ["x"] * 20)), DataConfig(partition="dirichlet", clients=20, dirichlet_alpha=0.01), seed=1)
    assert "data.dirichlet_alpha" in caught.value.change


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_missing_settings_are_refused(partition):
    labelled = corpus(Rows(["a b", "c d"], None, ["x", "y"]))
    with pytest.raises(ConfigError, match="data.clients"):
        deal(labelled, DataConfig(partition=partition), seed=1)
    with pytest.raises(DataError, match="2 training rows"):
        deal(labelled, DataConfig(partition=partition, clients=3), seed=1)


def test_dirichlet_needs_a_label_column():
    with pytest.raises(ConfigError, match="data.label_column"):
        deal(corpus(Rows(["a b"])), DataConfig(partition="dirichlet", clients=1), seed=1)


# --- properties of all partitions ----------------------------------------------------------------------------------------------------

CONFIGS = st.sampled_from(
    [
        DataConfig(partition="by_column", minimum_characters=1),
        DataConfig(partition="by_column", minimum_characters=1, clients=2, selection="merge"),
        DataConfig(partition="iid", clients=3),
        DataConfig(partition="dirichlet", clients=2, dirichlet_alpha=2.0),
    ]
)


@st.composite
def corpora(draw) -> Corpus:
    """Three to 40 training rows, of different text, over at least two names; with or without a test split of the same names."""
    names = ["n0", "n1", "n2", *draw(st.lists(st.sampled_from(["n0", "n1", "n2", "n3"]), max_size=37))]
    labels = draw(st.lists(st.sampled_from(["x", "y"]), min_size=len(names), max_size=len(names)))
    lengths = draw(st.lists(st.integers(1, 30), min_size=len(names), max_size=len(names)))
    train = Rows([f"train{row} {'w' * length}" for row, length in enumerate(lengths)], names, labels)
    test = Rows([f"test{row} w" for row in range(len(names))], names, labels) if draw(st.booleans()) else None
    return corpus(train, test)


@given(corpora(), CONFIGS, st.integers(0, 2**31))
def test_every_row_goes_to_exactly_one_client(made, config, seed):
    clients = deal(made, config, seed)
    if made.test is not None:
        assert Counter(text for client in clients for text in client.train) == Counter(made.train.texts)
        assert Counter(text for client in clients for text in client.test) == Counter(made.test.texts)
    else:  # a client of one row has it cut in two, so words are counted
        assert Counter(_words(clients)) == Counter(word for text in made.train.texts for word in text.split())
    assert all(client.train for client in clients)
    assert len({client.name for client in clients}) == len(clients)


@given(corpora(), CONFIGS, st.integers(0, 2**31))
def test_the_same_seed_deals_alike(made, config, seed):
    assert deal(made, config, seed) == deal(made, config, seed)


@given(corpora(), st.randoms(use_true_random=False))
def test_by_column_does_not_depend_on_how_names_are_interleaved(made, chance):
    """Rows of different names may change places; the order within a name stays."""
    turns = list(made.train.clients)
    chance.shuffle(turns)
    queues = {name: iter([text for n, text in zip(made.train.clients, made.train.texts, strict=True) if n == name]) for name in set(turns)}
    mixed = corpus(Rows([next(queues[name]) for name in turns], turns), made.test)
    for config in (DataConfig(minimum_characters=1), DataConfig(minimum_characters=1, clients=2, selection="merge")):
        assert deal(mixed, config, 1) == deal(made, config, 1)


def test_the_hash_seed_of_the_process_changes_nothing():
    program = (
        "from distfl.config import DataConfig; from distfl.corpora import Corpus, Rows; from distfl.partition import deal\n"
        "rows = Rows([f'row {i}' for i in range(60)], None, [f'label{i % 7}' for i in range(60)])\n"
        "print(deal(Corpus('c', '', rows, test=rows), DataConfig(partition='dirichlet', clients=3), 5))"
    )
    first, second = (
        subprocess.check_output([sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": value}) for value in ("1", "2")
    )
    assert first == second and b"client-002" in first


def _words(clients: list[ClientText]) -> list[str]:
    return [word for client in clients for text in client.train + client.test for word in text.split()]
