"""The tiny Transformer: GPT-2's numbers, windows that change no gradient and keep nothing for the frozen prefix."""

import math

import pytest
import torch
from helpers import SPEC, model, same_bits, tokenizer, tokens, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distfl.costs import WholeBlock
from distfl.files import write_atomically
from distfl.huggingface import export
from distfl.model import IGNORED_TARGET, ModelSpec, from_tensors, initial_tensors, next_token_loss, skeleton
from distfl.units import UnitTable, Window, freeze_outside

EVERY_PREFIX = range(SPEC.depth + 2)  # 0 = nothing frozen .. depth + 1 = only the head trains


def gradients(network) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write_atomically(folder / "tokenizer.json", tokenizer().to_str())
    export(SPEC, weights(), folder / "tokenizer.json", folder / "gpt2")
    return folder


# --- against transformers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("length", [1, 5, SPEC.context])
def test_logits_and_gradients_are_those_of_gpt2(exported, tmp_path, attention, length):
    theirs = AutoModelForCausalLM.from_pretrained(exported / "gpt2", attn_implementation=attention).eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel" and theirs.config._attn_implementation == attention
    ours = model()
    inputs, targets = tokens(3, length), tokens(3, length, seed=1)
    ours_logits, their_logits = ours(inputs), theirs(inputs).logits
    assert ours_logits.std() > 0.5  # logits that are all alike would prove nothing
    torch.testing.assert_close(ours_logits, their_logits, rtol=1e-5, atol=1e-5)
    for logits in (ours_logits, their_logits):
        next_token_loss(logits, targets).backward()
    # Written like weights, our gradients carry GPT-2's names and GPT-2's transposed layout.
    export(SPEC, gradients(ours), exported / "tokenizer.json", tmp_path / "gradients")
    found, wanted = load_file(tmp_path / "gradients" / "model.safetensors"), gradients(theirs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_output_layer_is_not_tied(exported):
    theirs = AutoModelForCausalLM.from_pretrained(exported / "gpt2")
    assert not torch.equal(theirs.lm_head.weight, theirs.transformer.wte.weight)
    assert torch.equal(theirs.lm_head.weight, weights()["head.output.weight"])


def test_no_position_sees_later_tokens():
    inputs = tokens(1, 6)
    changed = inputs.clone()
    changed[0, 4] = (changed[0, 4] + 1) % SPEC.vocabulary
    with torch.no_grad():
        before, after = model()(inputs), model()(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4], after[:, 4]) and not torch.equal(before[:, 5], after[:, 5])


# --- windows -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_gradients():
    network = model()
    next_token_loss(network(tokens(2, 8)), tokens(2, 8, seed=1)).backward()
    return gradients(network)


@pytest.mark.parametrize("frozen", EVERY_PREFIX)
def test_a_window_has_the_gradients_of_full_backpropagation(full_gradients, frozen):
    network = model()
    trainable = freeze_outside(network, Window(frozen, SPEC.depth + 2))
    next_token_loss(network(tokens(2, 8), frozen), tokens(2, 8, seed=1)).backward()
    inside = {tensor.name for unit in list(UnitTable(SPEC))[frozen:] for tensor in unit.tensors}
    found = gradients(network)
    assert found.keys() == inside  # nothing outside the window, all inside it
    assert same_bits(found, {name: full_gradients[name] for name in inside})
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert [id(p) for p in trainable] == [id(p) for name, p in network.named_parameters() if name in inside]


@pytest.mark.parametrize("frozen", EVERY_PREFIX)
def test_a_frozen_prefix_changes_no_logit(frozen):
    with torch.no_grad():
        assert torch.equal(model()(tokens(2, 8), frozen), model()(tokens(2, 8)))


def saved_bytes(network, inputs: torch.Tensor, frozen: int) -> int:
    """Bytes that autograd keeps for the backward of one forward pass, each storage once, parameters apart."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = network(inputs, frozen)
    assert logits.shape == (*inputs.shape, network.spec.vocabulary)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("spec", [SPEC, ModelSpec(depth=4, width=32, heads=4, context=16, vocabulary=320)], ids=["16 wide", "32 wide"])
def test_trained_blocks_keep_what_the_formula_says_and_the_prefix_keeps_nothing(spec):
    per_token = WholeBlock().kept(spec, leading=True)
    if spec is SPEC:
        assert per_token == 8 * 16 + 2 * 64 + 2 + 4 == 262  # 8 d + 2 f + H + 4
    inputs, count = tokens(2, spec.context), 2 * spec.context
    # The head keeps its norm's input and output and two statistics: 2 d + 2 for each token, 4 bytes each.
    head = 4 * count * (2 * spec.width + 2)
    for blocks in range(spec.depth + 1):
        network, frozen = model(spec), 1 + spec.depth - blocks
        freeze_outside(network, Window(frozen, spec.depth + 2))
        assert saved_bytes(network, inputs, frozen) == head + blocks * 4 * count * per_token
        network.requires_grad_(True)  # the prefix runs without gradient whatever its tensors say
        assert saved_bytes(network, inputs, frozen) == head + blocks * 4 * count * per_token


# --- loss --------------------------------------------------------------------------------------------------------------------------


def test_ignored_targets_do_not_count():
    # Two classes. Position 0: logits (0, ln 3), target 1, probability 3/4. Position 1: (0, 0), target 0, 1/2. Position 2 has no target.
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [5.0, -5.0]]], requires_grad=True)
    targets = torch.tensor([[1, 0, IGNORED_TARGET]])
    assert next_token_loss(logits, targets, "sum").item() == pytest.approx(math.log(4 / 3) + math.log(2))
    mean = next_token_loss(logits, targets)
    assert mean.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    mean.backward()
    # softmax minus one-hot, over the two positions that count
    torch.testing.assert_close(logits.grad, torch.tensor([[[0.125, -0.125], [-0.25, 0.25], [0.0, 0.0]]]))


def test_ignored_targets_leave_every_gradient_alone():
    inputs, targets = tokens(2, 8), tokens(2, 8, seed=1)
    targets[1, 3:] = IGNORED_TARGET  # as padding does: only the end of a row
    changed = inputs.clone()
    changed[1, 3:] = 0
    results = []
    for batch in (inputs, changed):
        network = model()
        next_token_loss(network(batch), targets).backward()
        results.append(gradients(network))
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=0, atol=1e-6)


# --- weights -----------------------------------------------------------------------------------------------------------------------


def test_a_model_of_tensors_uses_their_memory():
    given = weights()
    network = from_tensors(SPEC, given)
    assert all(tensor.data_ptr() == given[name].data_ptr() for name, tensor in network.named_tensors().items())
    assert all(not tensor.requires_grad for tensor in network.named_tensors().values())
    assert all(parameter.is_meta for parameter in skeleton(SPEC).parameters())


def test_random_starts_are_those_of_gpt2_and_repeat_with_their_generator():
    spec = ModelSpec(depth=2, width=64, heads=2, context=8, vocabulary=300)
    first, again, other = (initial_tensors(spec, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert same_bits(first, again) and not same_bits(first, other)
    for name, tensor in first.items():
        if name.endswith("bias"):
            assert not tensor.any()
        elif ".norm" in name:
            assert (tensor == 1).all()
        else:  # 0.02, and 0.02 / sqrt(2 * 2 blocks) = 0.01 where a branch joins the residual stream; 512 values or more: 10 %
            wanted = 0.01 if name.endswith(("proj.weight", "fc2.weight")) else 0.02
            assert tensor.std().item() == pytest.approx(wanted, rel=0.1), name
