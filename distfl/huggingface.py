"""Hugging Face GPT-2 folders, in and out. Files are read and written directly: ``transformers`` is not imported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from distfl.errors import FamilyError
from distfl.family import FORMAT, Family, open_family, write_weights
from distfl.files import new_folder, sha256, write_json
from distfl.model import ModelSpec, skeleton
from distfl.shards import END_OF_TEXT

# ours -> GPT-2's; GPT-2 stores the weights of these four linears transposed
_BLOCK = {"norm1": "ln_1", "qkv": "attn.c_attn", "proj": "attn.c_proj", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
_TRANSPOSED = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")


def _foreign_name(name: str) -> str:
    fixed = {
        "embedding.token.weight": "transformer.wte.weight",
        "embedding.position.weight": "transformer.wpe.weight",
        "head.norm.weight": "transformer.ln_f.weight",
        "head.norm.bias": "transformer.ln_f.bias",
        "head.output.weight": "lm_head.weight",
    }
    if name in fixed:
        return fixed[name]
    _, index, part, kind = name.split(".")
    return f"transformer.h.{index}.{_BLOCK[part]}.{kind}"


def export(spec: ModelSpec, tensors: dict[str, Tensor], tokenizer: Path, folder: Path) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer`` load, whole or not at all.

    Raises:
        FamilyError: the folder is there already or cannot be written.
    """
    with _written(folder, "export to") as new:
        _write_gpt2(spec, tensors, tokenizer, new)


@contextmanager
def _written(folder: Path, what: str) -> Iterator[Path]:
    """``new_folder`` with errors of the family kind."""
    if folder.exists():
        raise FamilyError(f"{what} {folder}", "it exists", "name a new folder")
    try:
        with new_folder(folder) as new:
            yield new
    except OSError as error:
        raise FamilyError(f"{what} {folder}", f"{type(error).__name__}: {error}", "name a folder that can be written, with room") from None


def _write_gpt2(spec: ModelSpec, tensors: dict[str, Tensor], tokenizer: Path, folder: Path) -> None:
    from tokenizers import Tokenizer  # only exporting and importing read one here

    end_of_text = Tokenizer.from_file(str(tokenizer)).token_to_id(END_OF_TEXT)
    foreign = {_foreign_name(name): tensor.T if name.endswith(_TRANSPOSED) else tensor for name, tensor in tensors.items()}
    write_weights(folder / "model.safetensors", foreign, torch.float32)
    write_json(
        folder / "config.json",
        {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "vocab_size": spec.vocabulary,
            "n_positions": spec.context,
            "n_embd": spec.width,
            "n_layer": spec.depth,
            "n_head": spec.heads,
            "n_inner": spec.feedforward,
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": False,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "bos_token_id": end_of_text,
            "eos_token_id": end_of_text,
            "dtype": "float32",
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "model_max_length": spec.context,
        },
    )
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


def import_family(folders: list[Path], output: Path) -> Family:
    """Make a family of GPT-2 folders of the same shape and different depth. A tied output layer becomes a copy of its own.

    Raises:
        FamilyError: not GPT-2, other arithmetic than ours, shapes that differ, or ``output`` exists or cannot be written.
    """
    if output.exists():  # before anything is read
        raise FamilyError(f"import into {output}", "it exists", "name a new folder")
    loaded = [_read(folder) for folder in folders]
    shapes = {(spec.width, spec.heads, spec.context, spec.vocabulary) for spec, _ in loaded}
    depths = [spec.depth for spec, _ in loaded]
    if len(shapes) != 1 or len(set(depths)) != len(depths):
        raise FamilyError(
            f"one family of {[str(folder) for folder in folders]}",
            f"shapes {sorted(shapes)}, depths {depths}",
            "give models that differ in depth only",
        )
    if len({sha256(folder / "tokenizer.json") for folder in folders}) != 1:
        raise FamilyError(
            f"one family of {[str(folder) for folder in folders]}", "their tokenizer.json differ", "give models of one tokenizer"
        )
    with _written(output, "import into") as new:
        _write_family(loaded, folders, new)
    return open_family(str(output))


def _write_family(loaded: list[tuple[ModelSpec, dict[str, Tensor]]], folders: list[Path], output: Path) -> None:
    for spec, tensors in loaded:
        write_weights(output / f"depth-{spec.depth:02d}.safetensors", tensors, torch.float32)
    shutil.copyfile(folders[0] / "tokenizer.json", output / "tokenizer.json")
    write_json(
        output / "family.json",
        {
            "format": FORMAT,
            "architecture": {"width": spec.width, "heads": spec.heads, "context": spec.context, "vocabulary": spec.vocabulary},
            "depths": {
                str(spec.depth): {"file": f"depth-{spec.depth:02d}.safetensors", "imported_from": str(folder)}
                for (spec, _), folder in zip(loaded, folders)
            },
        },
    )


def _read(folder: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    from safetensors.torch import load_file  # see family.py
    from tokenizers import Tokenizer

    try:
        config = json.loads((folder / "config.json").read_text())
        foreign = load_file(folder / "model.safetensors")
        _check_arithmetic(config, folder)
        spec = ModelSpec(config["n_layer"], config["n_embd"], config["n_head"], config["n_positions"], config["vocab_size"])
        numbers = (spec.depth, spec.width, spec.heads, spec.context, spec.vocabulary)
        if not all(type(number) is int and number > 0 for number in numbers) or spec.width % spec.heads:
            raise ValueError(f"n_layer, n_embd, n_head, n_positions, vocab_size = {numbers}")
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError("tokenizer.json is missing; AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one")
        entries = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
        if entries > spec.vocabulary:
            raise ValueError(f"tokenizer.json has {entries} entries, the model {spec.vocabulary}")
        blocks = {name.partition("h.")[2].partition(".")[0] for name in foreign if name.startswith(("h.", "transformer.h."))}
        if len(blocks) > spec.depth:
            raise ValueError(f"{len(blocks)} blocks in the weights, n_layer = {spec.depth}")
    except FamilyError:
        raise
    except Exception as error:  # files, JSON, safetensors and missing keys alike
        raise FamilyError(
            f"import of {folder}",
            f"{type(error).__name__}: {error}",
            "give a folder with config.json, model.safetensors and tokenizer.json",
        ) from None
    return spec, _convert(spec, foreign, folder)


def _convert(spec: ModelSpec, foreign: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    foreign = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor for name, tensor in foreign.items()}
    foreign.setdefault("lm_head.weight", foreign.get("transformer.wte.weight"))
    tensors = {}
    for name, parameter in skeleton(spec).named_parameters():
        tensor = foreign.get(_foreign_name(name))
        tensor = tensor.T if tensor is not None and name.endswith(_TRANSPOSED) else tensor
        if tensor is None or tensor.shape != parameter.shape:
            found = None if tensor is None else tuple(tensor.shape)
            raise FamilyError(
                f"{_foreign_name(name)} of {folder}", f"shape {found}, {tuple(parameter.shape)} is needed", "give a plain GPT-2 model"
            )
        tensors[name] = tensor.float().clone()
    return tensors


def _check_arithmetic(config: dict, folder: Path) -> None:
    wanted = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "n_inner": (None, 4 * config.get("n_embd", 0)),
    }
    defaults = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    for key, allowed in wanted.items():
        found = config.get(key, defaults.get(key))
        if found not in allowed:
            raise FamilyError(f"import of {folder}", f"{key} = {found!r}", f"give a model with {key} = {allowed[0]!r}")
