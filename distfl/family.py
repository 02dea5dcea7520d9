"""A family: pretrained models of one shape and several depths, with their tokenizer, in a folder.

``family.json`` (the manifest), ``tokenizer.json`` and one ``depth-NN.safetensors`` per depth.
Hugging Face GPT-2 folders are read and written too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distfl.errors import FamilyError
from distfl.files import sha256
from distfl.model import ModelSpec, skeleton

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHIPPED = Path(__file__).parent / "families"
FORMAT = 1


@dataclass(frozen=True)
class Family:
    """An opened family folder; weights are read when asked for."""

    folder: Path
    manifest: dict

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(sorted(int(depth) for depth in self.manifest["depths"]))

    def spec(self, depth: int) -> ModelSpec:
        """Shape of the model of this depth (raises FamilyError where there is none)."""
        if depth not in self.depths:
            raise FamilyError(
                f"depth {depth} of {self.folder}", f"it holds depths {list(self.depths)}", "set model.depths to depths the family holds"
            )
        return ModelSpec(depth=depth, **self.manifest["architecture"])

    def tensors(self, depth: int) -> dict[str, Tensor]:
        """Weights of one depth as float32, checked against the shape the manifest promises."""
        from safetensors.torch import load_file  # client ranks receive weights, they never read them

        spec, path = self.spec(depth), self.folder / self.manifest["depths"][str(depth)]["file"]
        try:
            stored = load_file(path)
        except Exception as error:  # safetensors raises its own type for damage, OSError for absence
            raise _damaged(path, error) from None
        wanted = {name: tuple(parameter.shape) for name, parameter in skeleton(spec).named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        if wanted != found:
            wrong = sorted(set(wanted.items()) ^ set(found.items()))[:3]
            raise FamilyError(
                f"weights {path}", f"tensors differ from the manifest's shape, for instance {wrong}", "pretrain or import the family again"
            )
        return {name: stored[name].float() for name in wanted}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that all depths share."""
        from tokenizers import Tokenizer  # only the server rank reads text

        try:
            return Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # the library raises nothing more special
            raise FamilyError(f"tokenizer {self.folder / 'tokenizer.json'}", str(error), "restore the file") from None

    @property
    def tokenizer_checksum(self) -> str:
        return sha256(self.folder / "tokenizer.json")


def open_family(name: str, depths: tuple[int, ...] | None = None) -> Family:
    """Open a shipped family by name or any family or Hugging Face folder by path.

    Args:
        name: for instance ``tiny`` or ``path/to/folder``.
        depths: depths that must be there; None asks for none in particular.

    Raises:
        FamilyError: no such family, a damaged manifest, a missing file or depth.
    """
    folder = next((path for path in (SHIPPED / name, Path(name).expanduser()) if (path / "family.json").is_file()), None)
    if folder is None:
        shipped = sorted(path.parent.name for path in SHIPPED.glob("*/family.json"))
        raise FamilyError(
            f"family {name!r}",
            f"neither a shipped family ({', '.join(shipped) or 'none'}) nor a folder with family.json",
            "set model.family to one of these, or make one with `distfl pretrain` or `distfl import`",
        )
    try:
        manifest = json.loads((folder / "family.json").read_text())
        found = manifest.get("format")
        if found != FORMAT:
            raise ValueError(f"format {found!r}, {FORMAT} is read")
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FamilyError(
            f"manifest {folder / 'family.json'}", f"{type(error).__name__}: {error}", "restore it, or pretrain or import the family again"
        ) from None
    family = Family(folder, manifest)
    held = family.depths
    for depth in depths or held:
        family.spec(depth)
    for file in ["tokenizer.json", *(manifest["depths"][str(depth)]["file"] for depth in depths or held)]:
        if not (folder / file).is_file():
            raise FamilyError(
                f"family {folder}", f"{file} is missing", "restore the file, or set model.depths to the depths that are there"
            )
    for depth in depths or held:
        _check_whole(folder / manifest["depths"][str(depth)]["file"])
    return family


def _check_whole(path: Path) -> None:
    """Refuse a file that does not hold what its header promises: costs no reading of weights (raises FamilyError)."""
    from safetensors import safe_open  # see Family.tensors

    try:
        with safe_open(path, "pt"):
            pass
    except Exception as error:  # safetensors raises its own type for damage
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> FamilyError:
    return FamilyError(f"weights {path}", f"{type(error).__name__}: {error}", "restore the file, or leave its depth out of model.depths")


def _check_manifest(manifest: dict) -> None:
    """Raises ValueError or KeyError where the architecture or a depth's entry makes no sense."""
    shape = ModelSpec(depth=1, **manifest["architecture"])
    numbers = (shape.width, shape.heads, shape.context, shape.vocabulary)
    if not all(type(number) is int and number > 0 for number in numbers) or shape.width % shape.heads:
        raise ValueError(f"an architecture of width, heads, context, vocabulary {numbers}")
    if not manifest["depths"]:
        raise ValueError("no depth")
    for depth, entry in manifest["depths"].items():
        if str(int(depth)) != depth or int(depth) < 1 or not isinstance(entry["file"], str):
            raise ValueError(f"an entry {entry!r} for depth {depth!r}")


def write_weights(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Store weights, atomically."""
    from safetensors import SafetensorError  # see Family.tensors
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, temporary)
    except SafetensorError as error:
        raise OSError(str(error)) from None  # what it is: the library's own type says no more
    temporary.replace(path)
