"""Token shards: tokenised once by the server rank, memory-mapped by everybody, batches of one client.

A shard folder holds ``tokens.bin`` (uint16, all clients one after another: train, then test) and
``index.json`` (where each client's tokens lie). A rank maps only the part of the clients it serves.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from distfl.errors import DataError
from distfl.files import sha256, write_json
from distfl.model import IGNORED_TARGET

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKEN = np.dtype("<u2")
EDITION = 1  # part of the cache's key: raise it when tokenising or partitioning changes
END_OF_TEXT = "<|endoftext|>"  # stands after every text


@dataclass(frozen=True)
class Shard:
    """Where one client's tokens lie: offset and lengths in tokens."""

    name: str
    offset: int
    train_tokens: int
    test_tokens: int


@dataclass(frozen=True)
class ShardIndex:
    """What a rank must know to map a client's tokens."""

    folder: str
    checksum: str  # sha256 of tokens.bin
    shards: tuple[Shard, ...]

    @staticmethod
    def from_json(values: dict) -> ShardIndex:
        return ShardIndex(values["folder"], values["checksum"], tuple(Shard(**shard) for shard in values["shards"]))

    def train(self, client: int, context: int) -> Sequences:
        shard = self.shards[client]
        return Sequences(self._map(shard.offset, shard.train_tokens), context)

    def test(self, client: int, context: int) -> Sequences:
        shard = self.shards[client]
        return Sequences(self._map(shard.offset + shard.train_tokens, shard.test_tokens), context)

    def _map(self, offset: int, tokens: int) -> np.ndarray:
        if tokens == 0:  # an empty range cannot be mapped
            return np.empty(0, TOKEN)
        return np.memmap(Path(self.folder) / "tokens.bin", TOKEN, "r", offset * TOKEN.itemsize, (tokens,))


class Sequences:
    """A token stream cut into rows of ``context`` inputs with the next token of each as target.

    The last row may be short; it is padded, and padding has no target. ``len()`` is the number of rows.
    """

    def __init__(self, tokens: np.ndarray, context: int):
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return max(0, -(-(len(self.tokens) - 1) // self.context))

    def targets_in(self, rows: Sequence[int]) -> int:
        """Positions with a target in the given rows."""
        return sum(min(self.context, len(self.tokens) - 1 - row * self.context) for row in rows)

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the given rows, both (len(rows), context) int64."""
        inputs = torch.zeros(len(rows), self.context, dtype=torch.int64)
        targets = torch.full((len(rows), self.context), IGNORED_TARGET, dtype=torch.int64)
        for i, row in enumerate(rows):
            piece = torch.from_numpy(self.tokens[row * self.context : (row + 1) * self.context + 1].astype(np.int64))
            self._let_go()
            inputs[i, : len(piece) - 1] = piece[:-1]
            targets[i, : len(piece) - 1] = piece[1:]
        return inputs, targets

    def _let_go(self) -> None:
        """Unmap the pages just read: one row brings 64 KB and more of them in, and they would count as the client's."""
        if isinstance(self.tokens.base, mmap.mmap):
            self.tokens.base.madvise(mmap.MADV_DONTNEED)

    def in_order(self, batch: int, most: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All rows once, or the first ``most``, in order, in batches of at most ``batch`` rows."""
        rows = len(self) if most is None else min(most, len(self))
        for start in range(0, rows, batch):
            yield self.batch(range(start, min(start + batch, rows)))


def build(texts: Iterable[tuple[str, list[str], list[str]]], tokenizer: Tokenizer, key: str, cache: Path) -> ShardIndex:
    """Tokenise each client's (name, train texts, test texts) into ``cache/shards-<key>``, or reuse what lies there.

    Args:
        key: names what was tokenised: corpus checksum, tokenizer checksum, partition. Hashed here.

    Raises:
        DataError: the vocabulary does not fit the token type, or a client has fewer than two training tokens.
    """
    name = hashlib.sha256(f"{EDITION}/{key}".encode()).hexdigest()[:16]
    folder = cache / f"shards-{name}"
    if (index := _reusable(folder)) is not None:
        return index
    if tokenizer.get_vocab_size() > np.iinfo(TOKEN).max + 1:
        raise DataError(
            "token shards", f"a vocabulary of {tokenizer.get_vocab_size()}", f"use a tokenizer of at most {np.iinfo(TOKEN).max + 1} entries"
        )
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DataError("token shards", f"the tokenizer has no entry {END_OF_TEXT}", "add it to tokenizer.json as a special token")
    folder.mkdir(parents=True, exist_ok=True)
    shards, offset = [], 0
    # a name of its own: several runs may build the same shards at once, and the last one to end wins with the same content
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tokens-", delete=False) as file:
        for name, train, test in texts:
            streams = [_encode(tokenizer, part) for part in (train, test)]
            if len(streams[0]) < 2:
                raise DataError(
                    f"client {name!r}", "fewer than two tokens of training text", "raise data.minimum_characters or lower data.clients"
                )
            shards.append(Shard(name, offset, len(streams[0]), len(streams[1])))
            for stream in streams:
                file.write(stream.tobytes())
                offset += len(stream)
    index = ShardIndex(str(folder), sha256(Path(file.name)), tuple(shards))
    os.chmod(file.name, 0o644)
    os.replace(file.name, folder / "tokens.bin")
    write_json(folder / "index.json", asdict(index))
    return index


def _reusable(folder: Path) -> ShardIndex | None:
    """The index of shards built earlier; None where there are none or they are damaged."""
    try:
        index = ShardIndex.from_json(json.loads((folder / "index.json").read_text()) | {"folder": str(folder)})
        return index if sha256(folder / "tokens.bin") == index.checksum else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [token for encoding in tokenizer.encode_batch(texts, add_special_tokens=False) for token in (*encoding.ids, end)]
    return np.asarray(ids, TOKEN)
