"""AllSmall: FedAvg on the deepest model of the family that every client can train wholly.

The comparison that subset techniques must win (Pfeiffer et al., "Aggregating Capacity in FL through Successive Layer
Training for Computationally-Constrained Devices", arXiv 2305.17005): the weakest client decides the size of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from distfl.methods.fedavg import CommonDepth


@dataclass(frozen=True)
class Options:
    """There are none."""


class AllSmall(CommonDepth):
    """The largest common model."""

    Options = Options
    source = "arXiv 2305.17005, the baseline of this name"


METHOD = AllSmall
