"""Local optimisers: the same bits as PyTorch's own, at a fraction of their start-up cost."""

import math
import subprocess
import sys

import pytest
import torch
from helpers import SPEC, model

from distfl.optimizers import SGD, AdamW, clip_gradients

RATES = [0.1, 0.1, 0.03, 0.3, 0.01]  # one for each step


def parameters() -> list[torch.nn.Parameter]:
    return list(model(SPEC).parameters())


def descend(ours, mine: list[torch.nn.Parameter], theirs: torch.optim.Optimizer, yours: list[torch.nn.Parameter]) -> None:
    """Some steps of both on the same gradients; equal bits after each."""
    generator = torch.Generator().manual_seed(5)
    start = [p.detach().clone() for p in mine]
    for rate in RATES:
        for left, right in zip(mine, yours, strict=True):
            left.grad = torch.randn(left.shape, generator=generator)
            right.grad = left.grad.clone()
        ours.step(rate)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        assert all(torch.equal(left, right) for left, right in zip(mine, yours, strict=True))
    assert all(not torch.equal(now, then) for now, then in zip(mine, start, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adamw_has_the_bits_of_pytorch(weight_decay, betas):
    mine, yours = parameters(), parameters()
    descend(AdamW(mine, betas, weight_decay), mine, torch.optim.AdamW(yours, 1.0, betas, weight_decay=weight_decay, fused=True), yours)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_has_the_bits_of_pytorch(momentum, weight_decay):
    mine, yours = parameters(), parameters()
    descend(SGD(mine, momentum, weight_decay), mine, torch.optim.SGD(yours, 1.0, momentum, weight_decay=weight_decay, fused=True), yours)


def one(value: float, gradient: float) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.tensor([value]))
    parameter.grad = torch.tensor([gradient])
    return parameter


def test_first_steps_by_hand():
    # AdamW's first step is the rate against the gradient's sign, after the decay 1 - rate * decay: 2 * (1 - 0.1 * 0.5) - 0.1 = 1.8
    parameter = one(2.0, 7.0)
    AdamW([parameter], (0.9, 0.999), 0.5).step(0.1)
    assert parameter.item() == pytest.approx(1.8, abs=1e-6)
    # Momentum: 2 - 0.1 * 7 = 1.3, then the buffer is 0.5 * 7 + 1 = 4.5 and 1.3 - 0.1 * 4.5 = 0.85
    parameter = one(2.0, 7.0)
    optimizer = SGD([parameter], 0.5, 0.0)
    optimizer.step(0.1)
    parameter.grad = torch.tensor([1.0])
    optimizer.step(0.1)
    assert parameter.item() == pytest.approx(0.85, abs=1e-6)


def test_state_is_made_with_the_optimiser_and_only_what_is_needed():
    # before the first activation exists: long-lived tensors must not come to lie between those of a step
    mine = parameters()
    adamw, plain, momentum = AdamW(mine, (0.9, 0.999), 0.0), SGD(mine, 0.0, 0.0), SGD(mine, 0.9, 0.0)
    shapes = [p.shape for p in mine]
    assert [t.shape for t in adamw.means] == [t.shape for t in adamw.squares] == [t.shape for t in momentum.buffers] == shapes
    assert plain.buffers == [None] * len(mine)
    state = [*adamw.means, *adamw.squares, *momentum.buffers]
    assert not any(tensor.any() for tensor in state)
    places = [tensor.data_ptr() for tensor in state]
    for parameter in mine:
        parameter.grad = torch.ones_like(parameter)
    for optimizer in (adamw, plain, momentum):
        optimizer.step(0.1)
    assert [t.data_ptr() for t in (*adamw.means, *adamw.squares, *momentum.buffers)] == places  # no step makes another
    assert all(tensor.any() for tensor in state) and plain.buffers == [None] * len(mine)


def test_clipping_scales_the_joint_norm():
    first, second = one(0.0, 3.0), one(0.0, 4.0)  # joint norm 5
    assert clip_gradients([first, second], 1.0) == pytest.approx(5.0)
    assert (first.grad.item(), second.grad.item()) == pytest.approx((0.6, 0.8), abs=1e-5)


def test_clipping_leaves_small_gradients_alone():
    first, second = one(0.0, 3.0), one(0.0, 4.0)
    assert clip_gradients([first, second], 5.5) == pytest.approx(5.0)
    assert (first.grad.item(), second.grad.item()) == (3.0, 4.0)


def test_clipping_shows_what_is_not_finite():
    assert math.isnan(clip_gradients([one(0.0, float("nan")), one(0.0, 1.0)], 1.0))


def test_no_step_imports_the_compiler():
    # torch._dynamo is what torch.optim.AdamW(...) imports when constructed: a second of CPU on every client rank.
    program = """
import sys, torch
from distfl.optimizers import SGD, AdamW, clip_gradients
for make in (lambda p: AdamW([p], (0.9, 0.999), 0.1), lambda p: SGD([p], 0.9, 0.1)):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    clip_gradients([parameter], 1.0)
    make(parameter).step(0.1)
    assert not torch.equal(parameter.detach(), torch.ones(3))
assert "torch._dynamo" not in sys.modules, "torch._dynamo was imported"
torch.optim.AdamW([parameter])
assert "torch._dynamo" in sys.modules, "PyTorch's own no longer imports it: optimizers.py has lost its reason"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
