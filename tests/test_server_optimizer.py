"""The server's optimiser: the mean itself, momentum and Adam worked by hand over two rounds, and state that survives."""

import pytest
import torch

from distfl.config import ServerConfig
from distfl.server_optimizer import ServerOptimizer


def two_rounds(config: ServerConfig, interrupted: bool = False) -> list[float]:
    """The value after each of two rounds from 1.0: the clients' mean lies 0.5 above it, then 0.25 below it."""
    optimizer, values = ServerOptimizer(config), [1.0]
    for update in (0.5, -0.25):
        if interrupted:  # as after a restart from a checkpoint
            saved = {name: tensor.clone() for name, tensor in optimizer.state.items()}
            optimizer = ServerOptimizer(config)
            optimizer.state = saved
        old = torch.tensor([values[-1]])
        values.append(optimizer.step("x", old, old + update).item())
    return values[1:]


# momentum 0.5, rate 2:  v = 0.5, x = 1 + 2*0.5 = 2;  v = 0.5*0.5 - 0.25 = 0, x = 2 + 0 = 2
MOMENTUM = ServerConfig(optimizer="momentum", momentum=0.5, learning_rate=2.0)
# betas 0.5, 0.75, rate 0.1, epsilon 0.25, no bias correction (Reddi et al., algorithm 2):
#   m = 0.5*0.5 = 0.25, s = 0.25*0.25 = 0.0625, x = 1 + 0.1 * 0.25 / (0.25 + 0.25) = 1.05
#   m = 0.5*0.25 + 0.5*(-0.25) = 0, x stays at 1.05
ADAM = ServerConfig(optimizer="adam", betas=(0.5, 0.75), learning_rate=0.1, epsilon=0.25)
# the same with beta_1 = 0.75:  m = 0.125, x = 1 + 0.1 * 0.125 / 0.5 = 1.025
#   m = 0.75*0.125 - 0.25*0.25 = 0.03125, s = 0.75*0.0625 + 0.25*0.0625 = 0.0625, x = 1.025 + 0.1 * 0.03125 / 0.5 = 1.03125
SLOW_ADAM = ServerConfig(optimizer="adam", betas=(0.75, 0.75), learning_rate=0.1, epsilon=0.25)


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize(
    "config, expected",
    [
        (ServerConfig(), [1.5, 1.25]),
        (MOMENTUM, [2.0, 2.0]),
        (ADAM, [1.05, 1.05]),
        (SLOW_ADAM, [1.025, 1.03125]),
    ],
)
def test_two_rounds_by_hand(config, expected, interrupted):
    assert two_rounds(config, interrupted) == pytest.approx(expected, abs=1e-7)


def test_without_its_state_momentum_would_differ():
    lost = ServerOptimizer(MOMENTUM)
    old = torch.tensor([2.0])
    assert lost.step("x", old, old - 0.25).item() == 1.5  # two_rounds() gives 2.0


def test_average_takes_the_mean_bit_for_bit_and_keeps_no_state():
    old, new = torch.randn(5), torch.randn(5)
    optimizer = ServerOptimizer(ServerConfig(learning_rate=0.1))  # the rate is not for averaging
    assert torch.equal(optimizer.step("x", old, new), new)
    assert optimizer.state == {}


@pytest.mark.parametrize("config", [MOMENTUM, ADAM])
def test_tensors_have_state_of_their_own_and_arguments_are_left_alone(config):
    optimizer = ServerOptimizer(config)
    old, new = torch.zeros(2), torch.tensor([1.0, -1.0])
    first = optimizer.step("x", old, new)
    assert torch.equal(optimizer.step("y", old, new), first)
    assert old.tolist() == [0, 0] and new.tolist() == [1, -1]
    kinds = ("velocity",) if config is MOMENTUM else ("mean", "square")
    assert set(optimizer.state) == {f"{kind}/{name}" for kind in kinds for name in "xy"}


def test_the_default_rate_is_one_for_momentum_and_small_for_adam():
    one = torch.ones(1)
    assert ServerOptimizer(ServerConfig(optimizer="momentum")).step("x", one, one + 0.5).item() == 1.5
    assert abs(ServerOptimizer(ServerConfig(optimizer="adam")).step("x", one, one + 0.5).item() - 1) < 0.02
