"""The memory cap: what every mechanism does. Baseline, limit, proof, peak.

The *baseline* is what the process holds before the client's first tensor exists (imports, MPI, a
rehearsed step, the node's replica). The budget counts everything above it. A mechanism is only used
after it was proven in this very process: memory just under the budget can be had, memory just past
it cannot.
"""

from __future__ import annotations

import errno
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from distfl.errors import CapError

PROOF_STEP_BYTES = 2 * 2**20  # the proof stops this far under the budget, then asks for twice as much

_ALLOCATION_FAILURES = (
    "can't allocate memory",
    "Cannot allocate memory",
    "bad_alloc",
    "could not create a memory",
    "out of memory",
    "could not create a primitive",
    "could not execute a primitive",
)


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an exception says that memory was refused (PyTorch raises RuntimeError, NumPy and Python MemoryError)."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # a memory-mapped shard
    refused = isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATION_FAILURES)
    return refused or isinstance(error, MemoryError)


def refused_allocation(error: BaseException) -> str:
    """What an allocation failure asked for, in a few words."""
    size = re.search(r"allocate (\d+) bytes", str(error))
    return f"{size[1]} bytes more were refused" if size else f"{type(error).__name__}: {str(error)[:100]}"


@dataclass(frozen=True)
class Outcome:
    """What a client leaves behind: buffers for the wire, and facts that JSON can hold."""

    blocks: list[np.ndarray]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What became of a client's work under a cap.

    Args:
        outcome: None where the mechanism killed the client.
        peak_bytes: most memory it held above the baseline, what was charged without being private included.
        killed: how the kernel ended it, in words; "" where it lived.
    """

    outcome: Outcome | None
    peak_bytes: int
    killed: str = ""


Work = Callable[[], Outcome]


class MemoryCap(ABC):
    """One mechanism."""

    name: ClassVar[str]
    enforced: ClassVar[bool]
    in_this_process: ClassVar[bool] = True  # False: clients run in processes of their own, which the kernel may kill

    @abstractmethod
    def run(
        self,
        budget_bytes: int,
        work: Work,
        charged_bytes: int = 0,
        settle: Callable[[], object] | None = None,
        attend: Callable[[], object] = lambda: None,
    ) -> Measured:
        """Do a client's work under its cap.

        Args:
            charged_bytes: part of the budget that is used up by memory the mechanism does not see as the client's.
            settle: run first and outside of the budget where the client gets a process of its own: what is made
                at the first use belongs to the baseline.
            attend: called now and then in this process while the client works in its own; what it raises ends the client.

        Raises:
            CapError: the cap cannot be imposed, or the peak not be read.
        """

    def prove(self, budget_bytes: int) -> None:
        """Show that the cap bites at this budget, in this process (raises CapError)."""
        if not self.enforced:
            return
        step = min(PROOF_STEP_BYTES, budget_bytes // 2)
        if not self._had(budget_bytes, budget_bytes - step):
            raise CapError(
                f"a cap of {budget_bytes} bytes by {self.name}",
                f"an allocation {step} bytes under it failed",
                "raise the limits of this process (ulimit -d, ulimit -v, the job's memory)",
            )
        if self._had(budget_bytes, budget_bytes + step):
            raise CapError(
                f"a cap of {budget_bytes} bytes by {self.name}",
                f"an allocation {step} bytes past it succeeded: the limit does not bite here",
                "see `distfl doctor`; memory.enforce=report measures without enforcing",
            )

    def _had(self, budget_bytes: int, bytes_: int) -> bool:
        outcome = self.run(budget_bytes, lambda: Outcome([], {"had": self.take(bytes_)})).outcome
        return outcome is not None and outcome.facts["had"]

    def take(self, bytes_: int) -> bool:
        """Whether so many bytes can be had."""
        try:
            self.allocate(bytes_)
            return True
        except Exception as error:
            if is_allocation_failure(error):
                return False
            raise

    def allocate(self, bytes_: int) -> torch.Tensor:
        """Memory of the kind that is capped, written to, so that a limit on pages sees it."""
        return torch.empty(bytes_, dtype=torch.uint8).fill_(1)
