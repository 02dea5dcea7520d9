"""Exact: float32 values as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distfl.codecs.base import Codec
from distfl.transport.base import WORD


class Exact(Codec):
    """Four bytes a value, nothing lost."""

    def encode(self, values: torch.Tensor, draws: np.random.Generator) -> tuple[Any, np.ndarray]:
        return None, values.contiguous().numpy().reshape(-1).view(WORD)

    def decode(self, header: Any, words: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(words.view(np.float32).reshape(shape))


CODEC = Exact
