"""What several tests build: small weights, tokens, a tokenizer, a family folder, ranks in threads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from distfl.aggregation import UnitMean
from distfl.family import FORMAT, Family, open_family, write_weights
from distfl.files import write_atomically, write_json
from distfl.messages import Assignment
from distfl.methods.base import Method
from distfl.model import ModelSpec, TinyTransformer, from_tensors, skeleton
from distfl.pretrain import train_tokenizer
from distfl.transport.local import LocalTransport, group
from distfl.units import UnitTable

torch.set_num_threads(1)  # tests that demand equal bits must not depend on the number of cores

SPEC = ModelSpec(depth=3, width=16, heads=2, context=8, vocabulary=300)
TEXTS = [
    "the cat sat on the mat and the dog sat on the log",
    "a rose is a rose is a rose and a thorn is a thorn",
    "rain on the plain, sun on the sand, wind in the willows",
    "one fish, two fish, red fish, blue fish, no fish",
]


def weights(spec: ModelSpec = SPEC, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor random and far from its usual start (zero biases and unit norms would hide their absence)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator) * 0.3 + (1.0 if ".norm" in name and name.endswith("weight") else 0.0)
        for name, parameter in skeleton(spec).named_parameters()
    }


def model(spec: ModelSpec = SPEC, seed: int = 0) -> TinyTransformer:
    return from_tensors(spec, weights(spec, seed))


def tokens(batch: int, length: int, vocabulary: int = SPEC.vocabulary, seed: int = 0) -> Tensor:
    """(batch, length) random token ids."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def tokenizer():
    """Byte-level BPE of 300 entries: 1 end of text, 256 bytes, 43 merges."""
    return train_tokenizer(TEXTS, 300)


def write_family(folder: Path, models: dict[ModelSpec, dict[str, Tensor]]) -> Family:
    """A family folder of models that differ in depth, with the tokenizer above."""
    for spec, tensors in models.items():
        write_weights(folder / f"depth-{spec.depth:02d}.safetensors", tensors, torch.float32)
        shape = {"width": spec.width, "heads": spec.heads, "context": spec.context, "vocabulary": spec.vocabulary}
    write_atomically(folder / "tokenizer.json", tokenizer().to_str())
    write_json(
        folder / "family.json",
        {
            "format": FORMAT,
            "architecture": shape,
            "depths": {str(spec.depth): {"file": f"depth-{spec.depth:02d}.safetensors"} for spec in models},
        },
    )
    return open_family(str(folder))


def merge(
    method: Method, table: UnitTable, old: dict[str, Tensor], updates: list[tuple[Assignment, dict[str, Tensor]]], weight: float
) -> dict[str, Tensor]:
    """A round's server half, without the wire.

    Args:
        updates: assignments, and tensors of the clients' models.
        weight: of all clients that took part.
    """
    new = dict(old)
    for unit in table.trainable:
        mean, lifted = UnitMean(method.mean_unit(unit)), method.lifted(unit, old)
        for assignment, tensors in updates:
            mean.add(method.restore(method.collect(tensors, assignment, unit), assignment))
        new |= dict(method.finish(unit, old, lambda name, mean=mean, lifted=lifted: mean.mean(name, lifted[name], weight)))
    return new


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def on_ranks(size: int, work: Callable[[LocalTransport], object]) -> list[object]:
    """``work(transport)`` on ``size`` ranks in threads; what it returned, in rank order."""

    def one(transport: LocalTransport) -> object:
        torch.set_num_threads(1)  # a setting of each thread
        try:
            return work(transport)
        except BaseException:
            with contextlib.suppress(SystemExit):
                transport.abort(1)  # the others must not wait for this rank
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, transport) for transport in group(size)]
    return [future.result() for future in futures]
