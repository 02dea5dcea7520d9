"""How many bytes of tensors are alive: what PyTorch's operators make, followed until it is really freed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distfl.config import TrainingConfig
from distfl.costs import Costs
from distfl.features import Prefix
from distfl.messages import Assignment
from distfl.model import ModelSpec, from_tensors, initial_tensors
from distfl.recipes import Recipe
from distfl.shards import TOKEN, Sequences
from distfl.training import state_tensors, train
from distfl.units import UnitTable, Window, freeze_outside


class LiveBytes(TorchDispatchMode):
    """Inside, ``now`` and ``peak`` count the storages that operators have made and that somebody still holds.

    A storage is followed by a weak reference of its own, which neither keeps it alive nor lets its address be
    used again; storages that existed before are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._followed: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        old = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in old and storage._cdata not in self._followed:
                    self._followed[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    @property
    def now(self) -> int:
        self._followed = {key: (weak, bytes_) for key, (weak, bytes_) in self._followed.items() if not weak.expired()}
        return sum(bytes_ for _, bytes_ in self._followed.values())


def costs_of(spec: ModelSpec, config: TrainingConfig) -> Costs:
    return Costs(UnitTable(spec), config.batch, state_tensors(config))


def client(spec: ModelSpec, config: TrainingConfig, window: Window, recipe: Recipe) -> Callable[[], None]:
    """The work of one client: its own copy of the weights, as many rows as a batch has, local steps."""
    draws = np.random.default_rng(0)
    data = Sequences(draws.integers(spec.vocabulary, size=config.batch * spec.context + 1).astype(TOKEN), spec.context)
    assignment = Assignment(1, 0, window, 1.0, 0, 0, 0, 0, recipe, 1e-3)
    costs = costs_of(spec, config)

    def work() -> None:
        model = from_tensors(spec, initial_tensors(spec, torch.Generator().manual_seed(0)))
        train(model, freeze_outside(model, window), data, config, assignment, Prefix(model, window.first, {}), costs, seed=1)

    return work
