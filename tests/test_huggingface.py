"""Hugging Face folders: what we write transformers reads with the same numbers, and the other way round."""

import json
import resource
from dataclasses import replace

import pytest
import torch
from helpers import SPEC, TEXTS, model, same_bits, tokenizer, tokens, weights, write_family
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model

from distfl.errors import FamilyError
from distfl.huggingface import export, import_family
from distfl.model import from_tensors

DEEPER = replace(SPEC, depth=4)


@pytest.fixture
def family(tmp_path):
    return write_family(tmp_path / "family", {SPEC: weights(SPEC), DEEPER: weights(DEEPER, seed=1)})


def exported(family, depth: int, folder):
    export(family.spec(depth), family.tensors(depth), family.folder / "tokenizer.json", folder)
    return folder


def edit(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# --- out ---------------------------------------------------------------------------------------------------------------------------


def test_an_export_is_the_same_model_to_transformers(family, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(exported(family, 4, tmp_path / "gpt2")).eval()
    assert isinstance(theirs, GPT2LMHeadModel) and theirs.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens(2, 8)).logits, model(DEEPER, seed=1)(tokens(2, 8)), rtol=1e-5, atol=1e-5)


def test_an_export_has_the_same_tokenizer(family, tmp_path):
    theirs, ours = AutoTokenizer.from_pretrained(exported(family, 3, tmp_path / "gpt2")), family.tokenizer()
    for text in (*TEXTS, "", "  two  blanks\n\ttab ", "Zürich, 東京 <|endoftext|> 🙂"):
        ids = ours.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == ours.decode(ids, skip_special_tokens=False)
    assert theirs.eos_token == "<|endoftext|>" and theirs.eos_token_id == 0 == ours.token_to_id("<|endoftext|>")
    assert theirs.model_max_length == SPEC.context and len(theirs) == SPEC.vocabulary


def test_an_export_generates_text(family, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(exported(family, 3, tmp_path / "gpt2")).eval()
    prompt = tokens(1, 3)
    written = theirs.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert written.shape == (1, 7)
    with torch.no_grad():  # greedy: each next token is our most likely one
        for length in range(3, 7):
            assert model(SPEC)(written[:, :length])[0, -1].argmax() == written[0, length]


def test_an_export_overwrites_nothing(family, tmp_path):
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(FamilyError, match="(?s)gpt2.*exists.*new folder"):
        exported(family, 3, tmp_path / "gpt2")
    assert list((tmp_path / "gpt2").iterdir()) == []


# --- in ----------------------------------------------------------------------------------------------------------------------------


def test_importing_exports_gives_the_family_back(family, tmp_path):
    folders = [exported(family, depth, tmp_path / f"gpt2-{depth}") for depth in (4, 3)]
    again = import_family(folders, tmp_path / "again")
    assert again.depths == (3, 4)
    for depth in (3, 4):
        assert again.spec(depth) == family.spec(depth)
        assert same_bits(again.tensors(depth), family.tensors(depth))
    assert again.tokenizer_checksum == family.tokenizer_checksum


def foreign(folder, kind=GPT2LMHeadModel, **settings):
    """A random model as transformers saves it, with our tokenizer beside it."""
    torch.manual_seed(3)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 300, "initializer_range": 0.3}
    theirs = kind(GPT2Config(**shape | settings)).eval()
    theirs.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer().to_str())
    return theirs


def test_a_tied_gpt2_is_imported_with_an_output_layer_of_its_own(tmp_path):
    theirs = foreign(tmp_path / "gpt2")
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    family = import_family([tmp_path / "gpt2"], tmp_path / "family")
    tensors = family.tensors(2)
    assert torch.equal(tensors["head.output.weight"], tensors["embedding.token.weight"])
    ours = from_tensors(family.spec(2), tensors)
    assert ours.head.output.weight.data_ptr() != ours.embedding.token.weight.data_ptr()
    with torch.no_grad():
        wanted = theirs(tokens(2, 8)).logits
        assert wanted.std() > 0.5
        torch.testing.assert_close(ours(tokens(2, 8)), wanted, rtol=1e-5, atol=1e-5)


def test_an_untied_gpt2_keeps_its_output_layer(tmp_path):
    theirs = foreign(tmp_path / "gpt2", tie_word_embeddings=False)
    family = import_family([tmp_path / "gpt2"], tmp_path / "family")
    ours = from_tensors(family.spec(2), family.tensors(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens(2, 8)), theirs(tokens(2, 8)).logits, rtol=1e-5, atol=1e-5)


def test_a_gpt2_without_head_is_imported_as_a_tied_one(tmp_path):
    theirs = foreign(tmp_path / "gpt2", kind=GPT2Model)  # its tensors lack the prefix `transformer.`
    family = import_family([tmp_path / "gpt2"], tmp_path / "family")
    with torch.no_grad():
        wanted = theirs(tokens(2, 8)).last_hidden_state @ theirs.wte.weight.T
        torch.testing.assert_close(from_tensors(family.spec(2), family.tensors(2))(tokens(2, 8)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 48},
    ],
    ids=lambda change: "{} {}".format(*next(iter(change.items()))),
)
def test_other_arithmetic_is_refused(family, tmp_path, change):
    edit(exported(family, 3, tmp_path / "gpt2"), **change)
    ((key, value),) = change.items()
    with pytest.raises(FamilyError, match=f"(?s)gpt2.*{key} = {value!r}"):
        import_family([tmp_path / "gpt2"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "change",
    [{"n_embd": 32, "n_inner": 128}, {"n_layer": 4}, {"vocab_size": 301}, {"n_positions": 9}],
    ids=lambda change: next(iter(change)),
)
def test_weights_that_do_not_fit_their_config_are_refused(family, tmp_path, change):
    edit(exported(family, 3, tmp_path / "gpt2"), **change)
    with pytest.raises(FamilyError, match="(?s)transformer.*gpt2.*is needed"):
        import_family([tmp_path / "gpt2"], tmp_path / "again")


def test_blocks_beyond_the_config_are_refused(family, tmp_path):
    edit(exported(family, 4, tmp_path / "gpt2"), n_layer=3)
    with pytest.raises(FamilyError):
        import_family([tmp_path / "gpt2"], tmp_path / "again")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_or_garbled_file_is_refused(family, tmp_path, file):
    folder = exported(family, 3, tmp_path / "gpt2")
    if file != "tokenizer.json":
        (folder / file).write_text("{")
        with pytest.raises(FamilyError, match="(?s)gpt2.*config.json, model.safetensors and tokenizer.json"):
            import_family([folder], tmp_path / "again")
    (folder / file).unlink()
    with pytest.raises(FamilyError, match=f"(?s)gpt2.*{file}"):
        import_family([folder], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_models_that_are_no_family_are_refused(family, tmp_path):
    three, four = (exported(family, depth, tmp_path / f"gpt2-{depth}") for depth in (3, 4))
    other = replace(SPEC, depth=5, context=9)
    export(other, weights(other), family.folder / "tokenizer.json", tmp_path / "longer")
    for folders in ([three, tmp_path / "longer"], [three, four, three], []):
        with pytest.raises(FamilyError, match="differ in depth only"):
            import_family(folders, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_models_of_different_tokenizers_are_refused(family, tmp_path):
    three, four = (exported(family, depth, tmp_path / f"gpt2-{depth}") for depth in (3, 4))
    other = json.loads((four / "tokenizer.json").read_text())
    vocabulary = other["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (four / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(FamilyError, match="tokenizer"):
        import_family([three, four], tmp_path / "again")


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(tmp_path):
    foreign(tmp_path / "gpt2", vocab_size=299)
    with pytest.raises(FamilyError, match="(?s)300.*299|299.*300"):
        import_family([tmp_path / "gpt2"], tmp_path / "family")


def test_an_import_overwrites_nothing(family, tmp_path):
    folder = exported(family, 3, tmp_path / "gpt2")
    with pytest.raises(FamilyError, match="(?s)exists.*new folder"):
        import_family([folder], family.folder)
    assert family.depths == (3, 4)


def test_what_cannot_be_written_is_named_and_leaves_nothing(family, tmp_path):
    folder = exported(family, 3, tmp_path / "gpt2")
    for write in (lambda: exported(family, 3, tmp_path / "file" / "out"), lambda: import_family([folder], tmp_path / "file" / "out")):
        (tmp_path / "file").touch()
        with pytest.raises(FamilyError, match="file/out"):
            write()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # stands in for a full disk
    try:
        with pytest.raises(FamilyError, match="again"):
            import_family([folder], tmp_path / "again")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} >= {"gpt2"} and not list(tmp_path.glob("*again*"))


def test_heads_that_do_not_divide_the_width_are_blamed_on_the_input(family, tmp_path):
    edit(exported(family, 3, tmp_path / "gpt2"), n_head=3)
    with pytest.raises(FamilyError, match="(?s)import of .*gpt2.*n_head"):
        import_family([tmp_path / "gpt2"], tmp_path / "again")
    assert not (tmp_path / "again").exists()
