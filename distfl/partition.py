"""Deals a corpus to clients: by its client column, evenly (iid), or with skewed labels (Dirichlet).

Every draw comes from (seed, purpose), so the same corpus and config give the same clients anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from distfl.config import DataConfig
from distfl.corpora import Corpus, Rows
from distfl.errors import ConfigError, DataError
from distfl.seeds import generator

DIRICHLET_DRAWS = 100  # tries before a skew that leaves some client without any row is refused


@dataclass(frozen=True)
class ClientText:
    """What one client owns: the texts it trains on and the texts it is tested on (may be none)."""

    name: str
    train: list[str]
    test: list[str]


def deal(corpus: Corpus, data: DataConfig, seed: int) -> list[ClientText]:
    """Deal the train split to clients, and the test split as the partition says.

    Where the corpus has no test split, ``data.test_fraction`` of the characters of each client (by_column: of each
    name) are cut off from its end as its test text.

    Returns:
        The clients in a fixed order: by_column by name, else by number. Each has training text.

    Raises:
        ConfigError: the partition needs a setting (``data.clients``, a column) that is not given.
        DataError: more clients asked than can be had, or no test text for any client.
    """
    clients = {"by_column": _by_column, "iid": _iid, "dirichlet": _dirichlet}[data.partition](corpus, data, seed)
    if not any(client.test for client in clients):
        if corpus.test is None:
            raise DataError(
                "test text for the clients", "every client has one row of one word, which cannot be divided", "set data.path to longer text"
            )
        raise DataError(
            "test text for the clients",
            f"the test split of {corpus.name} has no rows for any of the {len(clients)} clients",
            "name the clients alike in the train and test files, or remove the test file to use data.test_fraction",
        )
    return clients


# --- by_column ---------------------------------------------------------------------------------------------------------------------


def _by_column(corpus: Corpus, data: DataConfig, seed: int) -> list[ClientText]:
    """A client per name in the client column, or ``data.clients`` of them, chosen or merged."""
    train = _grouped(corpus.train)
    test = _grouped(corpus.test) if corpus.test is not None else None
    characters = {name: sum(map(len, train[name])) for name in sorted(train)}
    characters = {name: count for name, count in characters.items() if count >= data.minimum_characters}
    if len(characters) < (data.clients or 1):
        raise DataError(
            f"{data.clients or 'one or more'} clients from the client column of {corpus.name}",
            f"{len(characters)} of its {len(train)} names have at least {data.minimum_characters} characters of training text",
            "lower data.clients or data.minimum_characters",
        )
    clients = []
    for client, names in _members(characters, data, seed).items():
        # Cut name by name, so that a merged client is tested on all the names it trains on.
        halves = [_cut(train[name], data.test_fraction) if test is None else (train[name], test.get(name, [])) for name in names]
        clients.append(ClientText(client, [text for half, _ in halves for text in half], [text for _, half in halves for text in half]))
    return clients


def _grouped(rows: Rows) -> dict[str, list[str]]:
    """The texts of each name in the client column, in the order of the rows."""
    if rows.clients is None:
        raise ConfigError(
            "data.partition = by_column", "no client column", "set data.client_column, or data.partition=iid with data.clients"
        )
    groups: dict[str, list[str]] = {}
    for name, text in zip(rows.clients, rows.texts, strict=True):
        groups.setdefault(name, []).append(text)
    return groups


def _members(characters: dict[str, int], data: DataConfig, seed: int) -> dict[str, list[str]]:
    """Which names form which client.

    Args:
        characters: characters of training text of each name, in the order of the names.
    """
    names = list(characters)
    if data.clients is None or data.clients == len(names):
        return {name: [name] for name in names}
    falling = sorted(names, key=lambda name: (-characters[name], name))
    if data.selection == "largest":
        return {name: [name] for name in sorted(falling[: data.clients])}
    if data.selection == "random":
        drawn = generator(seed, "partition").choice(len(names), size=data.clients, replace=False)
        return {names[index]: [names[index]] for index in sorted(drawn)}
    members: list[list[str]] = [[] for _ in range(data.clients)]
    filled = [0] * data.clients
    for name in falling:  # the largest first, each to the client with the least so far, keeps the clients alike in size
        least = filled.index(min(filled))
        members[least].append(name)
        filled[least] += characters[name]
    return {label: sorted(bundle) for label, bundle in zip(_labels("merged", data.clients), members, strict=True)}


# --- iid and dirichlet ---------------------------------------------------------------------------------------------------------------


def _iid(corpus: Corpus, data: DataConfig, seed: int) -> list[ClientText]:
    """Shuffled rows, dealt evenly: the numbers of rows of two clients differ by one at most."""
    count = _count(corpus, data)
    train = np.array_split(generator(seed, "partition").permutation(len(corpus.train)), count)
    test = None
    if corpus.test is not None:
        test = np.array_split(generator(seed, "partition of the test split").permutation(len(corpus.test)), count)
    return _numbered(corpus, data, train, test)


def _dirichlet(corpus: Corpus, data: DataConfig, seed: int) -> list[ClientText]:
    """Each label's rows, dealt by proportions of its own from Dirichlet(alpha, ..., alpha).

    Source: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks" (2019), experiments.
    """
    if corpus.train.labels is None:
        raise ConfigError(
            "data.partition = dirichlet", f"no label column for {corpus.name}", "set data.label_column, or another data.partition"
        )
    count = _count(corpus, data)
    train_rows = _rows_by_label(corpus.train)
    test_rows = _rows_by_label(corpus.test) if corpus.test is not None else {}
    labels = sorted(train_rows.keys() | test_rows.keys())
    draw = generator(seed, "partition")
    for _ in range(DIRICHLET_DRAWS):
        proportions = dict(zip(labels, draw.dirichlet([data.dirichlet_alpha] * count, size=len(labels)), strict=True))
        train = _by_proportions(train_rows, proportions, count, draw)
        if all(len(rows) for rows in train):
            break
    else:
        raise DataError(
            f"data.dirichlet_alpha = {data.dirichlet_alpha} with {count} clients",
            f"each of {DIRICHLET_DRAWS} draws left a client without any of the {len(corpus.train)} rows",
            "raise data.dirichlet_alpha or lower data.clients",
        )
    test = None
    if corpus.test is not None:
        test = _by_proportions(test_rows, proportions, count, generator(seed, "partition of the test split"))
    return _numbered(corpus, data, train, test)


def _rows_by_label(rows: Rows) -> dict[str, list[int]]:
    """Label -> the numbers of its rows, in order."""
    members: dict[str, list[int]] = {}
    for row, label in enumerate(rows.labels):
        members.setdefault(label, []).append(row)
    return members


def _by_proportions(
    members: dict[str, list[int]], proportions: dict[str, np.ndarray], count: int, draw: np.random.Generator
) -> list[np.ndarray]:
    """The row numbers of each client.

    Args:
        members: label -> the numbers of its rows; a label without rows may be missing.
        proportions: label -> each client's part of the label's rows, shape [clients].
    """
    parts: list[list[np.ndarray]] = [[] for _ in range(count)]
    for label, part in proportions.items():
        rows = draw.permutation(np.array(members.get(label, []), dtype=np.int64))
        ends = np.rint(np.cumsum(part)[:-1] * len(rows)).astype(int)  # the last client ends where the rows end
        for client, dealt in enumerate(np.split(rows, ends)):
            parts[client].append(dealt)
    # Shuffled once more: test text is cut from a client's end, which would else hold one label only.
    return [draw.permutation(np.concatenate(dealt)) for dealt in parts]


def _count(corpus: Corpus, data: DataConfig) -> int:
    """``data.clients``, refused where it is missing or above the number of rows."""
    if data.clients is None:
        raise ConfigError(f"data.partition = {data.partition}", "data.clients is not set", "set data.clients to the number of clients")
    if data.clients > len(corpus.train):
        raise DataError(
            f"data.clients = {data.clients}",
            f"{corpus.name} has {len(corpus.train)} training rows, and each client needs one",
            "lower data.clients",
        )
    return data.clients


def _numbered(corpus: Corpus, data: DataConfig, train: list[np.ndarray], test: list[np.ndarray] | None) -> list[ClientText]:
    """Clients ``client-000``, ... from the row numbers of each in the train and test splits."""
    clients = []
    for client, name in enumerate(_labels("client", len(train))):
        texts = [corpus.train.texts[row] for row in train[client]]
        if test is None:
            clients.append(ClientText(name, *_cut(texts, data.test_fraction)))
        else:
            clients.append(ClientText(name, texts, [corpus.test.texts[row] for row in test[client]]))
    return clients


def _labels(kind: str, count: int) -> list[str]:
    """``kind-000``, ``kind-001``, ...: equally long, so that they sort by number."""
    digits = max(3, len(str(count - 1)))
    return [f"{kind}-{number:0{digits}d}" for number in range(count)]


# --- test text where the corpus brings none ----------------------------------------------------------------------------------------


def _cut(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Train and test part of one client's texts, divided between two rows as near to the fraction as they allow.

    A single row is divided at white space (a row of one word is all train).

    Args:
        fraction: the test part, of all characters, taken from the end.
    """
    if len(texts) == 1:
        text = texts[0].strip()
        gaps = list(re.finditer(r"\s+", text))
        if not gaps:
            return texts, []
        gap = min(gaps, key=lambda gap: abs(gap.start() - (1 - fraction) * len(text)))
        return [text[: gap.start()]], [text[gap.end() :]]
    ends = np.cumsum([len(text) for text in texts])  # characters up to and with each row
    row = 1 + int(np.argmin(np.abs(ends[:-1] - (1 - fraction) * ends[-1])))
    return texts[:row], texts[row:]
