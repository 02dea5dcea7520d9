"""Families: what a whole folder gives, and what a damaged one is refused with."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import SPEC, model, same_bits, tokenizer, tokens, weights, write_family
from safetensors.torch import load_file, save_file

from distfl.errors import FamilyError
from distfl.family import SHIPPED, open_family, write_weights
from distfl.files import sha256
from distfl.model import from_tensors

ONE, THREE = replace(SPEC, depth=1), SPEC


@pytest.fixture
def folder(tmp_path):
    write_family(tmp_path / "family", {THREE: weights(THREE), ONE: weights(ONE)})
    return tmp_path / "family"


def manifest(folder, change) -> None:
    """Rewrite the manifest: ``change`` edits it, or returns another."""
    values = json.loads((folder / "family.json").read_text())
    changed = change(values)
    values = values if changed is None else changed
    (folder / "family.json").write_text(values if isinstance(values, str) else json.dumps(values))


# --- whole -------------------------------------------------------------------------------------------------------------------------


def test_a_family_gives_back_its_depths_weights_and_tokenizer(folder):
    family = open_family(str(folder))
    assert family.depths == (1, 3)  # rising, whatever the manifest's order
    for spec in (ONE, THREE):
        assert family.spec(spec.depth) == spec
        assert same_bits(family.tensors(spec.depth), weights(spec))
    assert list(family.tensors(3)) == list(model(THREE).named_tensors())  # the model's order
    assert family.tokenizer().encode("the cat").ids == tokenizer().encode("the cat").ids
    assert family.tokenizer_checksum == sha256(folder / "tokenizer.json")


def test_half_precision_weights_are_read_as_float32(folder):
    write_weights(folder / "depth-01.safetensors", weights(ONE), torch.float16)
    assert all(tensor.dtype == torch.float16 for tensor in load_file(folder / "depth-01.safetensors").values())
    assert same_bits(open_family(str(folder)).tensors(1), {name: tensor.half().float() for name, tensor in weights(ONE).items()})


def test_only_the_depths_that_are_asked_for_must_be_there(folder):
    (folder / "depth-03.safetensors").unlink()
    assert open_family(str(folder), (1,)).spec(1) == ONE


def test_weights_that_are_not_contiguous_are_written_right(tmp_path):
    turned = torch.arange(6.0).view(2, 3).T
    write_weights(tmp_path / "new" / "file.safetensors", {"turned": turned}, torch.float32)
    assert torch.equal(load_file(tmp_path / "new" / "file.safetensors")["turned"], turned)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["file.safetensors"]


# --- refused -----------------------------------------------------------------------------------------------------------------------


def refusal(work) -> str:
    """The text of the FamilyError, which says what was asked, found and should change."""
    with pytest.raises(FamilyError) as caught:
        work()
    assert all((caught.value.asked, caught.value.found, caught.value.change))
    return str(caught.value)


def test_a_missing_family_is_refused(tmp_path):
    text = refusal(lambda: open_family(str(tmp_path / "nothing")))
    assert str(tmp_path / "nothing") in text and "model.family" in text and "distfl pretrain" in text
    (tmp_path / "empty").mkdir()
    assert "family.json" in refusal(lambda: open_family(str(tmp_path / "empty")))


def test_a_missing_depth_is_refused(folder):
    family = open_family(str(folder))
    for work in (lambda: open_family(str(folder), (1, 2)), lambda: family.spec(2), lambda: family.tensors(2)):
        text = refusal(work)
        assert "depth 2" in text and "[1, 3]" in text and "model.depths" in text


@pytest.mark.parametrize("file", ["depth-03.safetensors", "tokenizer.json"])
def test_a_missing_file_is_refused(folder, file):
    (folder / file).unlink()
    assert f"{file} is missing" in refusal(lambda: open_family(str(folder)))


def test_weights_that_vanished_after_opening_are_refused(folder):
    family = open_family(str(folder))
    (folder / "depth-03.safetensors").unlink()
    assert "depth-03.safetensors" in refusal(lambda: family.tensors(3))


@pytest.mark.parametrize("damage", ["truncated", "emptied", "garbage"])
def test_damaged_weights_are_refused(folder, damage):
    file = folder / "depth-03.safetensors"
    whole = file.read_bytes()
    before = open_family(str(folder))
    file.write_bytes({"truncated": whole[:-4], "emptied": b"", "garbage": b"\xff" * 100}[damage])
    assert "depth-03.safetensors" in refusal(lambda: open_family(str(folder)))  # a plan reads no weights, and still finds it
    assert "depth-03.safetensors" in refusal(lambda: before.tensors(3))
    family = open_family(str(folder), (1,))
    assert same_bits(family.tensors(1), weights(ONE))  # the other depth is whole


def test_weights_of_another_shape_are_refused(folder):
    tensors = weights(THREE)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "blocks.2.fc1.bias"}
    for wrong, name in (
        (tensors | {"head.norm.bias": torch.zeros(17)}, "head.norm.bias"),
        (lacking, "blocks.2.fc1.bias"),
        (tensors | {"extra": torch.zeros(1)}, "extra"),
    ):
        save_file(wrong, folder / "depth-03.safetensors")
        assert name in refusal(lambda: open_family(str(folder)).tensors(3))


def drop(key):
    return lambda values: values.pop(key) and None


@pytest.mark.parametrize(
    "change",
    [
        lambda _: "",
        lambda _: "{",
        lambda _: "null",
        lambda _: "[]",
        lambda _: "7",
        drop("depths"),
        drop("architecture"),
        lambda values: values | {"depths": {"three": {"file": "depth-03.safetensors"}}},
        lambda values: values | {"architecture": {"width": 16}},
        lambda values: values | {"architecture": [16]},
        lambda values: values | {"architecture": values["architecture"] | {"depth": 3}},
        lambda values: values | {"architecture": values["architecture"] | {"colour": 3}},
    ],
    ids=[
        "empty",
        "half",
        "null",
        "list",
        "number",
        "no depths",
        "no architecture",
        "depth no number",
        "little architecture",
        "architecture a list",
        "architecture with depth",
        "architecture with odd key",
    ],
)
def test_a_garbled_manifest_is_refused(folder, change):
    manifest(folder, change)
    assert "family.json" in refusal(lambda: open_family(str(folder)))


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values | {"depths": {"1": {}}},
        lambda values: values | {"depths": [1, 3]},
        lambda values: values | {"depths": {"01": {"file": "depth-01.safetensors"}}},
        lambda values: values | {"depths": {"1": {"file": 7}}},
        lambda values: values | {"depths": {}},
        lambda values: values | {"architecture": values["architecture"] | {"width": "wide"}},
        lambda values: values | {"architecture": values["architecture"] | {"heads": 0}},
        lambda values: values | {"architecture": values["architecture"] | {"heads": 3}},
    ],
    ids=["no file", "depths a list", "depth 01", "file a number", "no depth", "width a text", "no heads", "heads no divisor"],
)
def test_a_manifest_of_the_wrong_kinds_is_refused(folder, change):
    manifest(folder, change)
    assert "family.json" in refusal(lambda: open_family(str(folder)))


@pytest.mark.parametrize("found", [2, None, "1"])
def test_another_format_is_refused(folder, found):
    manifest(folder, lambda values: values | {"format": found})
    text = refusal(lambda: open_family(str(folder)))
    assert f"format {found!r}, 1 is read" in text


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in refusal(lambda: open_family(str(folder)).tokenizer())


# --- shipped -----------------------------------------------------------------------------------------------------------------------

needs_tiny = pytest.mark.skipif(not (SHIPPED / "tiny" / "family.json").is_file(), reason="the family `tiny` is not in this checkout")


@needs_tiny
def test_the_shipped_family_loads_and_computes():
    family = open_family("tiny")
    assert list(family.depths) == family.manifest["config"]["architecture"]["depths"]
    for depth in family.depths:
        spec = family.spec(depth)
        with torch.no_grad():
            logits = from_tensors(spec, family.tensors(depth))(tokens(1, spec.context, spec.vocabulary))
        assert logits.shape == (1, spec.context, spec.vocabulary) and logits.isfinite().all()
    assert family.tokenizer().get_vocab_size() == spec.vocabulary
    sentence = "It was the best of times, it was the worst of times."
    assert family.tokenizer().decode(family.tokenizer().encode(sentence).ids) == sentence


@needs_tiny
def test_the_shipped_family_is_better_the_deeper_it_is():
    family = open_family("tiny")
    losses = [family.manifest["depths"][str(depth)]["validation_loss"] for depth in family.depths]
    assert all(deeper < shallower for shallower, deeper in zip(losses, losses[1:]))
    assert losses[0] < family.manifest["unigram_validation_loss"] < family.manifest["uniform_validation_loss"]


@needs_tiny
def test_the_shipped_family_reads_english_better_than_by_token_frequency():
    family = open_family("tiny")
    text = "It was a cold morning, and the old man walked slowly down the street to the little house where he had lived as a boy."
    ids = torch.tensor([family.tokenizer().encode(text).ids])[:, : family.spec(family.depths[0]).context + 1]
    for depth in family.depths:
        with torch.no_grad():
            logits = from_tensors(family.spec(depth), family.tensors(depth))(ids[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item()
        assert loss < family.manifest["unigram_validation_loss"]


@needs_tiny
def test_the_shipped_family_is_small():
    files = [file for file in (SHIPPED / "tiny").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20e6
    assert not any("unfinished" in file.parts for file in files)
