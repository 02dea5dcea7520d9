"""Units: every tensor in exactly one, in the model's order; windows at the output side; what is frozen."""

import pytest
from helpers import SPEC, model

from distfl.model import ModelSpec, skeleton
from distfl.units import UnitTable, Window, freeze_outside

TWO = ModelSpec(depth=2, width=4, heads=2, context=3, vocabulary=5)  # f = 16


def test_units_cover_all_tensors_once_and_in_order():
    spec = ModelSpec(depth=11, width=4, heads=2, context=3, vocabulary=5)  # block 10 must not come between 1 and 2
    table = UnitTable(spec)
    assert [tensor.name for unit in table for tensor in unit.tensors] == [name for name, _ in skeleton(spec).named_parameters()]
    assert [unit.name for unit in table] == ["embedding", *(f"block.{i}" for i in range(11)), "head"]
    assert [unit.index for unit in table] == list(range(13)) and len(table) == 13
    for unit in table:
        prefix = unit.name.replace("block.", "blocks.") + "."
        assert all(tensor.name.startswith(prefix) for tensor in unit.tensors)


def test_bytes_are_four_for_each_element():
    table = UnitTable(TWO)
    # embedding 5*4 + 3*4 = 32; block 12 d^2 + 13 d = 192 + 52 = 244; head 2*4 + 5*4 = 28
    assert [unit.elements for unit in table] == [32, 244, 244, 28]
    assert [unit.bytes for unit in table] == [128, 976, 976, 112]
    assert table.bytes == 4 * sum(p.numel() for p in skeleton(TWO).parameters()) == 2192
    assert table.window_bytes(Window(2, 4)) == 976 + 112
    assert table.window_bytes(Window(0, 4)) == 2192
    assert table.window_bytes(Window(2, 2)) == 0


def test_tensors_of_a_unit_lie_one_after_another():
    for unit in UnitTable(TWO):
        end = 0
        for tensor in unit.tensors:
            assert tensor.offset == end
            end += tensor.elements
        assert end == unit.elements
    assert [(t.name, t.shape, t.offset) for t in UnitTable(TWO)[3].tensors] == [
        ("head.norm.weight", (4,), 0),
        ("head.norm.bias", (4,), 4),
        ("head.output.weight", (5, 4), 8),
    ]


@pytest.mark.parametrize("blocks", range(SPEC.depth + 1))
def test_a_suffix_window_is_the_last_blocks_and_the_head(blocks):
    table = UnitTable(SPEC)
    window = table.suffix(blocks)
    names = [table[unit].name for unit in window.units]
    assert names == [*(f"block.{i}" for i in range(SPEC.depth - blocks, SPEC.depth)), "head"]
    assert table.trained_blocks(window) == blocks
    assert 0 not in window and SPEC.depth + 1 in window and SPEC.depth + 2 not in window


def test_trained_blocks_count_neither_embedding_nor_head():
    table = UnitTable(TWO)
    windows = {Window(0, 4): 2, Window(0, 1): 0, Window(3, 4): 0, Window(0, 2): 1, Window(1, 3): 2, Window(2, 2): 0}
    assert {window: table.trained_blocks(window) for window in windows} == windows


@pytest.mark.parametrize("window", [Window(0, 5), Window(2, 5), Window(4, 5), Window(1, 3), Window(5, 5)])
def test_only_the_window_trains(window):
    network = model()
    freeze_outside(network, Window(0, 5))  # what another window left behind must not matter
    trainable = freeze_outside(network, window)
    parts = [network.embedding, *network.blocks, network.head]
    for index, part in enumerate(parts):
        assert part.training == (index in window)
        assert all(parameter.requires_grad == (index in window) for parameter in part.parameters())
    assert [id(p) for p in trainable] == [id(p) for index in window.units for p in parts[index].parameters()]


def test_a_table_of_other_tensors_holds_just_those():
    shapes = {f"{unit}.lora": (2, rank) for rank, unit in enumerate(["embedding", "blocks.0", "blocks.1", "head"])}
    table = UnitTable(TWO, shapes)
    assert [[(t.name, t.shape, t.offset) for t in unit.tensors] for unit in table] == [[(name, shape, 0)] for name, shape in shapes.items()]


def test_a_unit_without_shared_tensors_keeps_its_place():
    table = UnitTable(TWO, {"blocks.0.lora": (2, 3), "blocks.1.lora": (2, 5), "head.lora": (2, 7)})  # as of LoRA: no embedding
    assert table.window_bytes(table.suffix(1)) == 4 * (10 + 14)
