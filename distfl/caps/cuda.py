"""A cap on a CUDA device: PyTorch's caching allocator refuses what goes past this process's share of the device.

The context and the libraries' own memory are not counted: they are the baseline. Several ranks on one
device have a share each. The peak is what the allocator had reserved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from distfl.caps.base import Measured, MemoryCap, Work
from distfl.errors import CapError


class Cuda(MemoryCap):
    """``set_per_process_memory_fraction`` on the present device.

    Args:
        cuda: ``torch.cuda``, or what stands for it in a test.
    """

    name, enforced = "cuda", True

    def __init__(self, cuda=torch.cuda):
        if not cuda.is_available():
            raise CapError("memory.enforce = cuda", "PyTorch finds no CUDA device", "set memory.enforce=auto, or install a CUDA build")
        self._cuda = cuda
        self._total = cuda.get_device_properties(cuda.current_device()).total_memory

    def run(
        self,
        budget_bytes: int,
        work: Work,
        charged_bytes: int = 0,
        settle: Callable[[], object] | None = None,
        attend: Callable[[], object] = lambda: None,
    ) -> Measured:
        self._cuda.synchronize()
        self._cuda.empty_cache()  # what earlier clients left in the cache is not a gift to this one
        before = self._cuda.memory_reserved()
        limit = before + max(0, budget_bytes - charged_bytes)
        if limit > self._total:
            raise CapError(f"a cap of {budget_bytes} bytes", f"the device has {self._total}, {before} used", "lower fleet.groups memory_mb")
        self._cuda.set_per_process_memory_fraction(limit / self._total)
        self._cuda.reset_peak_memory_stats()
        try:
            outcome = work()
            self._cuda.synchronize()
        finally:
            peak = self._cuda.max_memory_reserved() - before
            self._cuda.set_per_process_memory_fraction(1.0)
        return Measured(outcome, max(0, peak) + charged_bytes)

    def allocate(self, bytes_: int) -> torch.Tensor:
        return torch.empty(bytes_, dtype=torch.uint8, device="cuda").fill_(1)
