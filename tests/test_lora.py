"""Adapters: the layer against plain autograd and against peft, merging, and what a block with adapters keeps and computes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import SPEC, tokens, weights
from test_costs import explicit_attention
from test_model import saved_bytes
from torch.utils.flop_counter import FlopCounterMode

from distfl import model as model_module
from distfl.errors import ConfigError
from distfl.lora import TARGETS, Adapted, AdaptedBlock, initial_adapters, is_adapter, merged
from distfl.methods.base import build_model, load_method, table_of
from distfl.model import Linear, next_token_loss
from distfl.units import Window, freeze_outside

SUBSETS = [TARGETS, ("q", "v"), ("fc2",), ("proj",), ("fc1",), ("k", "fc2"), ("proj", "fc1")]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapted(targets: tuple[str, ...], inputs: int, outputs: int, rank: int = 3, scale: float = 1.5) -> Adapted:
    """A layer with random tensors, B not zero."""
    plain = Linear(inputs, outputs)
    plain.load_state_dict({"weight": random(outputs, inputs), "bias": random(outputs, seed=1)})
    layer = Adapted(plain.requires_grad_(False), targets, rank, scale)
    for number, (name, parameter) in enumerate(layer.named_parameters(), start=2):
        if is_adapter(name):
            parameter.data = random(*parameter.shape, seed=number)
    return layer


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 7), (5, 2, 7)])
@pytest.mark.parametrize("targets, outputs", [(("q", "k", "v"), 12), (("q", "v"), 12), (("k",), 12), (("fc1",), 8)])
@pytest.mark.parametrize("trained", ["both", "B"])
@pytest.mark.parametrize("of_input", [True, False])
def test_output_and_gradients_are_those_of_the_plain_formula(shape, targets, outputs, trained, of_input):
    layer, scale = adapted(targets, 7, outputs), 1.5
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(is_adapter(name) and (trained == "both" or name.endswith("_B")))
    wanted = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    x, upstream = random(*shape, seed=9).requires_grad_(of_input), random(*shape[:-1], outputs, seed=8)
    third = outputs // 3
    place = {"q": slice(0, third), "k": slice(third, 2 * third), "v": slice(2 * third, outputs), "fc1": slice(0, outputs)}

    expected = F.linear(x, layer.weight, layer.bias)
    for target in targets:
        low = scale * (x @ layer.get_parameter(f"{target}_A").T) @ layer.get_parameter(f"{target}_B").T
        expected = expected + F.pad(low, (place[target].start, outputs - place[target].stop))
    gradients = torch.autograd.grad(expected, [*wanted.values(), *([x] if of_input else [])], upstream)

    found = layer(x)
    assert_close(found, expected)
    for mine, other in zip(torch.autograd.grad(found, [*wanted.values(), *([x] if of_input else [])], upstream), gradients):
        assert_close(mine, other)


def test_output_and_gradients_are_those_of_peft():
    import peft  # takes seconds

    for target, inputs, outputs in (("proj", 7, 7), ("fc1", 7, 28), ("fc2", 28, 7)):
        layer = adapted((target,), inputs, outputs, rank=3, scale=4 / 3)
        base = torch.nn.Linear(inputs, outputs)
        base.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        theirs = torch.nn.Sequential(base)
        peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=4, target_modules=["0"]), theirs)
        down, up = theirs[0].lora_A["default"].weight, theirs[0].lora_B["default"].weight
        assert up.abs().max() == 0 and down.abs().max() <= inputs**-0.5  # as initial_adapters draws them
        down.data, up.data = layer.get_parameter(f"{target}_A").data, layer.get_parameter(f"{target}_B").data
        x = random(5, inputs, seed=9).requires_grad_()
        mine, expected = layer(x), theirs(x)
        assert_close(mine, expected)
        pairs = [layer.get_parameter(f"{target}_A"), layer.get_parameter(f"{target}_B"), x]
        upstream = random(5, outputs, seed=8)
        for one, other in zip(torch.autograd.grad(mine, pairs, upstream), torch.autograd.grad(expected, [down, up, x], upstream)):
            assert_close(one, other)


def test_a_starts_within_its_bound_the_same_anywhere_and_b_at_zero():
    adapters = initial_adapters(weights(), TARGETS, 5, seed=1)
    assert len(adapters) == SPEC.depth * 12 and adapters["blocks.1.fc2.fc2_A"].shape == (5, 64)
    for name, tensor in adapters.items():
        bound = tensor.shape[1] ** -0.5
        assert tensor.any() == name.endswith("_A") and tensor.abs().max() <= bound
        assert name.endswith("_B") or tensor.abs().max() > 0.8 * bound
    again, other = initial_adapters(weights(seed=3), TARGETS, 5, 1), initial_adapters(weights(), TARGETS, 5, 2)
    assert all(torch.equal(tensor, again[name]) for name, tensor in adapters.items())
    assert not torch.equal(adapters["blocks.0.qkv.q_A"], other["blocks.0.qkv.q_A"])
    assert not torch.equal(adapters["blocks.0.qkv.q_A"], adapters["blocks.0.qkv.k_A"])


@pytest.mark.parametrize("targets", SUBSETS)
def test_a_merged_model_computes_the_same(targets):
    method = load_method("lora", {"rank": 3, "targets": list(targets)})
    tensors = method.initial(weights(), 1)
    for name in tensors:
        if is_adapter(name):
            tensors[name] = random(*tensors[name].shape, seed=len(name)) * 0.1
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    plain = method.deployed(tensors)
    assert plain.keys() == weights().keys() and all(torch.equal(before[name], tensor) for name, tensor in tensors.items())
    x = tokens(2, 8)
    with torch.no_grad():
        wanted = build_model(method, SPEC, tensors)(x)
        torch.testing.assert_close(model_module.from_tensors(SPEC, plain)(x), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model_module.from_tensors(SPEC, weights())(x), wanted, atol=1e-2)


def test_the_scale_does_not_depend_on_the_rank_unless_alpha_is_given():
    assert {load_method("lora", {"rank": rank}).options.scale for rank in (1, 3, 24)} == {2.0}
    assert load_method("lora", {"rank": 8, "alpha": 4}).options.scale == 0.5
    update = {"blocks.0.proj.weight": torch.zeros(4, 4), "blocks.0.proj.proj_A": random(2, 4), "blocks.0.proj.proj_B": random(4, 2)}
    padded = update | {
        name: F.pad(tensor, (0, 0, 0, 3) if name.endswith("_A") else (0, 3)) for name, tensor in update.items() if "_" in name
    }
    for name, tensor in merged(update, 2.0).items():  # zeros up to a higher rank change nothing at the same scale
        torch.testing.assert_close(merged(padded, 2.0)[name], tensor)


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"alpha": 0}, {"targets": []}, {"targets": ["q", "q"]}, {"blocks": 0}, {"targets": ["qkv"]}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        load_method("lora", options)


# --- formulas ----------------------------------------------------------------------------------------------------------------------

# what the counter has no rule for: (N, i) times (i, o), added in place
IN_PLACE = {torch.ops.aten.addmm_: lambda _, left, right, **more: 2 * left[0] * left[1] * right[1]}
ALL_BLOCKS = [(targets, down) for targets, down in itertools.product(SUBSETS, (True, False))]


def network_of(targets: tuple[str, ...], trains_down: bool, first: int):
    method = load_method("lora", {"rank": 3, "targets": list(targets)})
    tensors = method.initial(weights(), 1)
    network = build_model(method, SPEC, tensors)
    factors = ("_A", "_B") if trains_down else ("_B",)
    freeze_outside(network, Window(first, SPEC.depth + 2), lambda name: name.endswith(factors) or name.startswith("head."))
    return network


@pytest.mark.parametrize("targets, trains_down", ALL_BLOCKS)
def test_a_block_keeps_what_the_formula_says(targets, trains_down):
    block, inputs = AdaptedBlock(3, targets, trains_down), tokens(2, 8)
    head = 4 * 16 * (2 * SPEC.width + 2)
    for first in range(1, SPEC.depth + 1):
        kept = saved_bytes(network_of(targets, trains_down, first), inputs, first)
        blocks = [block.kept(SPEC, leading=place == 0) for place in range(1 + SPEC.depth - first)]
        # a leading block's graph does without the block's input, which the step holds all the same (``steps.py``)
        assert kept == head + 4 * 16 * (sum(blocks) - SPEC.width)


def test_what_is_kept_by_hand():
    # d = 16, f = 64, H = 2, r = 3
    def kept(targets, trains_down):
        return AdaptedBlock(3, targets, trains_down).kept(SPEC, leading=False)

    assert kept(TARGETS, True) == 8 * 16 + 2 * 64 + 6 * 3 + 2 + 4
    assert kept(("q", "v"), True) == 7 * 16 + 64 + 2 * 3 + 2 + 4
    assert kept(TARGETS, False) == 6 * 16 + 64 + 6 * 3 + 2 + 4


@pytest.mark.parametrize("targets, trains_down", ALL_BLOCKS)
def test_flops_are_those_that_pytorch_counts(targets, trains_down, monkeypatch):
    monkeypatch.setattr(model_module.F, "scaled_dot_product_attention", explicit_attention)
    block = AdaptedBlock(3, targets, trains_down)
    for first in range(1, SPEC.depth + 1):
        network, x = network_of(targets, trains_down, first), tokens(2, 8)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            next_token_loss(network(x, first), x).backward()
        trained = 1 + SPEC.depth - first
        per_token = SPEC.depth * block.forward_flops(SPEC) + 6 * SPEC.width * SPEC.vocabulary
        per_token += sum(block.backward_flops(SPEC, leading=place == 0) for place in range(trained))
        assert counter.get_total_flops() == 16 * per_token


def test_flops_by_hand():
    # d = 16, f = 64, T = 8, r = 3: F = 24 d^2 + 4 T d = 6656; six targets have 18 d inputs and outputs together
    block, width = AdaptedBlock(3, TARGETS, True), 16
    assert block.forward_flops(SPEC) == 6656 + 2 * 3 * 18 * width
    assert block.backward_flops(SPEC, leading=False) == 24 * width**2 + 8 * 8 * width + 4 * 3 * 18 * width


def test_adapters_are_what_trains_and_all_else_lies_in_units_of_its_own():
    method = load_method("lora", {"rank": 3})
    table = table_of(method, SPEC)
    assert [unit.name for unit in table.trainable] == ["embedding", "block.0", "block.1", "block.2", "head"]
    assert [unit.name for unit in table][5:] == ["embedding.frozen", "block.0.frozen", "block.1.frozen", "block.2.frozen"]
    # 4 bytes of r (in + out) for q, k, v, proj: 2 d each; fc1, fc2: 5 d each
    assert table[2].bytes == 4 * 3 * 18 * SPEC.width and table[0].bytes == 0
    assert table.bytes == 4 * sum(t.numel() for t in weights().values()) + 3 * table[2].bytes
    headless = table_of(load_method("lora", {"head": False}), SPEC)
    assert headless[4].bytes == 0 and headless.window_bytes(headless.suffix(1)) == headless[3].bytes
