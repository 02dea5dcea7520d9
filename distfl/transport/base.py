"""The transport seam: a handful of collectives, and a ledger of the bytes they moved.

Every verb is collective: all ranks call it, in the same order. Values are what JSON can hold (small
records); arrays are contiguous NumPy arrays of a 4-byte type, so that counts stay counts of elements.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, NoReturn

import numpy as np

WORD = np.dtype("<u4")  # blocks are counted in words of 4 bytes


class Ledger:
    """Bytes that this rank handed to (``sent``) and took from (``received``) each verb."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()

    def add(self, verb: str, sent: int = 0, received: int = 0) -> None:
        self.sent[verb] += sent
        self.received[verb] += received

    def take(self) -> dict[str, dict[str, int]]:
        """What was counted since the last call: {"sent": {verb: bytes}, "received": {...}}."""
        counted = {"sent": dict(+self.sent), "received": dict(+self.received)}
        self.sent.clear()
        self.received.clear()
        return counted


class Transport(ABC):
    """Collectives among ranks 0 (the server) to size - 1."""

    rank: int
    size: int
    ledger: Ledger

    @abstractmethod
    def broadcast(self, array: np.ndarray) -> None:
        """Fill every rank's array with rank 0's (same shape and type everywhere)."""

    @abstractmethod
    def broadcast_value(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank."""

    @abstractmethod
    def scatter(self, values: list[Any] | None = None) -> Any:
        """The entry of rank 0's list (one per rank) that is meant for this rank."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value at rank 0, in rank order; None elsewhere."""

    @abstractmethod
    def gather_blocks(self, block: np.ndarray) -> list[np.ndarray] | None:
        """Every rank's block (1-D WORD array, any length, also 0) at rank 0, in rank order; None elsewhere."""

    @abstractmethod
    def sum(self, array: np.ndarray) -> None:
        """Replace every rank's float32 array by the sum over all ranks."""

    @abstractmethod
    def abort(self, code: int) -> NoReturn:
        """End every rank of the job at once."""


def pack(value: Any) -> np.ndarray:
    """A JSON value as words, padded with blanks."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return np.frombuffer(text + b" " * (-len(text) % WORD.itemsize), WORD)


def unpack(words: np.ndarray) -> Any:
    """The value that ``pack`` made words of."""
    return json.loads(words.tobytes())
