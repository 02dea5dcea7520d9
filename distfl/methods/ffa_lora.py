"""FFA-LoRA: A stays as it was drawn, only B trains and is sent, so that the mean of what clients send is the mean of their updates.

Source: Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313 (ICLR 2024): mean(B_c) A = mean(B_c A),
half the upload of the adapters. Nor is a layer's input kept, for only A's gradient would need it: 6d + f + 6r elements per token of a
block, the fewest of all LoRA variants.
"""

from __future__ import annotations

from distfl.methods.lora import Lora


class FfaLora(Lora):
    """Only B trains."""

    source = "arXiv 2403.12313"
    trained_factors = ("_B",)


METHOD = FfaLora
