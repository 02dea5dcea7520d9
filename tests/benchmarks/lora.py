"""How many blocks does a window train for the memory of LoRA on all blocks?  python tests/benchmarks/lora.py

LoRA (arXiv 2106.09685) of rank 8 on every matrix of every block, head trained too, against windows of the last
blocks: the same steps, the same recipe, resident peaks measured. Adapters sit in every block, so the gradient
crosses all of them and their activations are kept; a window saves those and pays with optimiser state. At equal
peak, AdamW, float32 and d-wide blocks, K of L blocks fit, with N tokens a step:

    K / L = N / (N + 1.5 d)      and with 2.25 in place of 1.5 where gradients are alive at the peak (small N)
"""

import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from distfl.allocator import restart_prepared

restart_prepared()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from distfl.allocator import collect_garbage, exact_allocator  # noqa: E402
from distfl.calibration import Case, hosted, rank_of  # noqa: E402
from distfl.caps.base import Outcome  # noqa: E402
from distfl.caps.rlimit import Report  # noqa: E402
from distfl.features import Prefix  # noqa: E402
from distfl.fleet import MEGA  # noqa: E402
from distfl.hosting import RankState, rehearse  # noqa: E402
from distfl.messages import Assignment  # noqa: E402
from distfl.methods.base import build_model  # noqa: E402
from distfl.model import Linear, ModelSpec  # noqa: E402
from distfl.recipes import LOSS_CHUNK_TOKENS, Recipe  # noqa: E402
from distfl.training import train  # noqa: E402
from distfl.units import Window  # noqa: E402

RANK, ALPHA = 8, 16
BATCHES = (1, 2, 4, 8, 16, 32)


class Adapted(nn.Module):
    """A frozen linear layer with a trained product of low rank beside it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.layer = layer
        self.down = nn.Parameter(torch.randn(RANK, inputs) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).add_(F.linear(F.linear(x, self.down), self.up), alpha=ALPHA / RANK)


def lora_work(state: RankState, recipe: Recipe) -> Outcome:
    """One client's steps with adapters in all blocks and the whole head; weights that do not train are the node's."""
    model = build_model(state.method, state.spec, state.replica.tensors)
    model.requires_grad_(False)
    parameters = []
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, Linear):
                setattr(block, name, adapted := Adapted(layer))
                parameters += [adapted.down, adapted.up]
    for parameter in model.head.parameters():
        parameter.data = parameter.data.clone()
        parameters.append(parameter.requires_grad_())
    window = Window(1, state.spec.depth + 2)
    assignment = Assignment(1, 0, window, 1.0, 10**12, 0, 0, 0, recipe, learning_rate=1e-3)
    data = state.shards.train(0, state.spec.context)
    train(model, parameters, data, state.config.training, assignment, Prefix(model, 1, {}), state.costs, 1)
    return Outcome([], {})


def peaks(spec: ModelSpec, batch: int) -> tuple[int, list[int]]:
    """Bytes at the peak of LoRA, and of windows of 1, 2, ... blocks."""
    recipe = Recipe(batch, LOSS_CHUNK_TOKENS)
    with TemporaryDirectory() as folder:
        windows = []
        for blocks in range(1, spec.depth + 1):
            case = Case(spec, batch, "adamw", True, blocks, recipe, mapped_prefix=True)
            state = rank_of(case, Path(folder))
            rehearse(state)
            windows.append(hosted(state, case, Report(), 10**12).measured_peak_bytes)
        Report().run(10**12, lambda: lora_work(state, recipe))
        collect_garbage()
        frozen = sum(unit.bytes for unit in state.table) - state.table[spec.depth + 1].bytes
        lora = Report().run(10**12, lambda: lora_work(state, recipe), frozen).peak_bytes
        collect_garbage()
    return lora, windows


def blocks_for(peak: int, windows: list[int]) -> float:
    """Blocks, in fractions, whose peak is this one; beyond the last by the slope of the last two."""
    slope = windows[-1] - windows[-2]
    if peak > windows[-1]:
        return len(windows) + (peak - windows[-1]) / slope
    return float(np.interp(peak, windows, range(1, len(windows) + 1)))


def main() -> None:
    torch.set_num_threads(1)
    exact_allocator()
    print(f"{'width':>5} {'tokens':>6} {'LoRA MB':>8} {'blocks at that peak':>20} {'N/(N+1.5d)':>11} {'N/(N+2.25d)':>12}  all blocks MB")
    for width in (128, 256):
        spec = ModelSpec(12, width, width // 32, 128, 2048)
        for batch in BATCHES:
            lora, windows = peaks(spec, batch)
            tokens = batch * spec.context
            formulas = [spec.depth * tokens / (tokens + factor * width) for factor in (1.5, 2.25)]
            found = blocks_for(lora, windows)
            print(
                f"{width:5} {tokens:6} {lora / MEGA:8.1f} {found:20.1f} {formulas[0]:11.1f} {formulas[1]:12.1f}  {windows[-1] / MEGA:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
