"""Narrow storage of frozen matrices: bytes by hand, rounding within its bound, only below the window, gradients close to fp32's."""

import pytest
import torch
import torch.nn.functional as F
from helpers import model, same_bits, tokens, weights

from distfl.costs import Costs
from distfl.frozen import Narrow, matrix_bytes, narrow, stored_bytes
from distfl.model import Linear, ModelSpec, next_token_loss
from distfl.recipes import Recipe
from distfl.units import UnitTable, Window, freeze_outside

SPEC = ModelSpec(depth=3, width=16, heads=2, context=8, vocabulary=300)
TABLE = UnitTable(SPEC)
NARROW = ["bf16", "int8"]
MATRICES = ["qkv", "proj", "fc1", "fc2"]
ROUNDING = {"bf16": 2**-8, "int8": 0.5 / 127}  # of a value, of a row's largest: bf16 keeps 8 bits, int8 has 127 steps
SLACK = 1 + 1e-5  # the scale and the product are float32

# a block at d = 16: qkv 48 x 16, proj 16 x 16, fc1 64 x 16, fc2 16 x 64: 12 * 256 = 3072 values in 48 + 16 + 64 + 16 = 144 rows
BLOCK_BYTES = {"fp32": 4 * 3072, "bf16": 2 * 3072, "int8": 3072 + 4 * 144}


def layer(weight: torch.Tensor) -> Linear:
    made = Linear(weight.shape[1], weight.shape[0])
    made.load_state_dict({"weight": weight, "bias": torch.arange(len(weight)) * 0.5})
    return made.requires_grad_(False)


def of_rows(*largest: float) -> torch.Tensor:
    """(rows, 64) random values, a row's largest magnitude as given."""
    values = torch.rand(len(largest), 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return values / values.abs().amax(1, keepdim=True) * torch.tensor(largest)[:, None]


# --- bytes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", BLOCK_BYTES)
def test_bytes_are_those_of_the_blocks_below_the_window(precision):
    for first, below in {0: 0, 1: 0, 2: 1, 3: 2, 4: 3}.items():  # never the embedding; 4 = only the head trains
        window = Window(first, 5)
        assert matrix_bytes(TABLE, window) == below * BLOCK_BYTES["fp32"]
        assert stored_bytes(TABLE, window, precision) == below * BLOCK_BYTES[precision]
        assert Costs(TABLE, 2, 2, 0, precision).weights(window) == TABLE.bytes - below * (BLOCK_BYTES["fp32"] - BLOCK_BYTES[precision])


def test_blocks_above_a_window_stay_as_they_are():
    assert matrix_bytes(TABLE, Window(2, 3)) == 12288


@pytest.mark.parametrize("precision", NARROW)
def test_what_is_predicted_is_what_is_stored(precision):
    for first in range(5):
        network = model(SPEC)
        narrow(network, Window(first, 5), precision)
        stored = [part for part in network.modules() if isinstance(part, Narrow)]
        held = sum(part.stored.nbytes + (0 if part.scale is None else part.scale.nbytes) for part in stored)
        assert held == stored_bytes(TABLE, Window(first, 5), precision)


@pytest.mark.parametrize("precision", NARROW)
def test_a_narrow_peak_is_lower_by_what_is_saved_above_the_prefix(precision):
    window = TABLE.suffix(1)
    wide, lean = (Costs(TABLE, 2, 2, 777, kind).peak(window, Recipe(2)) for kind in ("fp32", precision))
    saved = 2 * (BLOCK_BYTES["fp32"] - BLOCK_BYTES[precision])
    assert {name: total - lean.moments[name] for name, total in wide.moments.items() if name != "prefix"} == {
        name: saved for name in wide.moments if name != "prefix"
    }
    assert wide.moments["prefix"] - lean.moments["prefix"] == saved - 4 * 16 * 64  # one matrix, the largest, is widened at a time
    assert wide.bytes - lean.bytes == saved


# --- rounding ----------------------------------------------------------------------------------------------------------------------


def test_bf16_keeps_every_value_to_eight_bits():
    weight = of_rows(1e-6, 0.1, 1.0, 1000.0)
    found = Narrow(layer(weight), "bf16")
    assert found.stored.dtype == torch.bfloat16 and found.scale is None
    assert torch.equal(found.stored.float(), weight.to(torch.bfloat16).float())
    assert ((found.stored.float() - weight).abs() <= ROUNDING["bf16"] * weight.abs()).all()


def test_int8_is_within_half_a_step_of_its_own_row():
    weight = of_rows(1e-6, 0.1, 1.0, 1000.0)
    found = Narrow(layer(weight), "int8")
    assert found.stored.dtype == torch.int8 and found.scale.shape == (4, 1) and found.scale.dtype == torch.float32
    errors = (found.stored * found.scale - weight).abs().amax(1)
    bounds = ROUNDING["int8"] * weight.abs().amax(1)
    assert (errors <= bounds * SLACK).all() and (errors > bounds / 2).all()  # a row's bound is its own, and not a loose one
    assert (found.stored.abs().amax(1) == 127).all()  # the largest takes the last step, in either direction


def test_int8_keeps_a_row_of_zeros_and_both_signs():
    weight = torch.tensor([[0.0, 0.0], [-2.0, 2.0], [0.0, -1e-30]])
    found = Narrow(layer(weight), "int8")
    assert found.stored.tolist() == [[0, 0], [-127, 127], [0, -127]]
    assert (found.scale > 0).all()
    torch.testing.assert_close(found.stored * found.scale, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", NARROW)
def test_forward_is_float32_arithmetic_on_the_rounded_matrix_and_keeps_the_bias(precision):
    wide = layer(of_rows(0.1, 1.0, 30.0))
    found = Narrow(wide, precision)
    rounded = found.stored.float() if found.scale is None else found.stored.float() * found.scale
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    before = found.stored.clone()
    for _ in range(2):  # widening touches nothing that is stored
        assert found(x).dtype == torch.float32
        assert torch.equal(found(x), F.linear(x, rounded, wide.bias))
    assert torch.equal(found.stored, before) and found.layer is wide


# --- models ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("window", [Window(0, 5), Window(1, 5), Window(2, 5), Window(3, 5), Window(4, 5), Window(2, 3)])
def test_only_matrices_of_blocks_below_the_window_are_replaced(window, precision):
    given = weights(SPEC)
    network = model(SPEC)
    narrow(network, window, precision)
    replaced = {name for name, part in network.named_modules() if isinstance(part, Narrow)}
    assert replaced == {f"blocks.{unit - 1}.{name}" for unit in range(1, min(window.first, 4)) for name in MATRICES}
    left = {name: tensor for name, tensor in given.items() if name not in {f"{part}.weight" for part in replaced}}
    assert same_bits(
        {name.replace(".layer.", "."): tensor for name, tensor in network.named_tensors().items()}, left
    )  # biases and norms below the window as well


def test_fp32_replaces_nothing():
    network = model(SPEC)
    narrow(network, Window(4, 5), "fp32")
    assert not any(isinstance(part, Narrow) for part in network.modules())
    assert same_bits(network.named_tensors(), weights(SPEC))


def gradients(first: int, precision: str) -> dict[str, torch.Tensor]:
    network = model(SPEC)
    trained = freeze_outside(network, Window(first, 5))
    narrow(network, Window(first, 5), precision)
    next_token_loss(network(tokens(4, 8), first), tokens(4, 8, seed=1)).backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert len(found) == len(trained)  # nothing below the window has a gradient
    return found


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("first", [0, 1, 2, 3, 4])
def test_gradients_of_the_window_are_close_to_those_of_full_precision(first, precision):
    wanted, found = gradients(first, "fp32"), gradients(first, precision)
    if first < 2:
        assert same_bits(found, wanted)  # there is no matrix below
        return
    assert found.keys() == wanted.keys()
    whole = [torch.cat([tensor.flatten() for tensor in some.values()]) for some in (found, wanted)]
    error = ((whole[0] - whole[1]).norm() / whole[1].norm()).item()
    assert 0 < error < {"bf16": 0.01, "int8": 0.02}[precision]
