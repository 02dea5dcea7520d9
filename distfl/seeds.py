"""The only source of randomness: every draw is named by (seed, purpose, round, client).

No draw depends on how many ranks there are, on which rank hosts a client or on what was drawn
before, so the same config gives the same model on any number of ranks.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(seed: int, purpose: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """An independent NumPy generator for one purpose.

    Args:
        seed: the run's seed.
        purpose: what is drawn, for instance ``"participants"`` or ``"batches"``.
        round: round number; 0 where no round is meant.
        client: client id; 0 where no client is meant.
    """
    name = f"{seed}/{purpose}/{round}/{client}".encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name).digest()[:16], "little"))
