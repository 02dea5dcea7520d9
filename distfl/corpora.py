"""Corpora: named or the user's own, read into rows of text with a client and a label where they have one.

Knows nothing of federation; ``partition.py`` deals the rows to clients.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import glob
import hashlib
import json
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from distfl.config import DataConfig
from distfl.errors import ConfigError, DataError
from distfl.files import write_atomically
from distfl.settings import expand

SPLITS = {"train": ("train",), "validation": ("validation", "valid"), "test": ("test",)}  # our name: names it may have in a folder
SUFFIXES = {"parquet": (".parquet",), "json": (".json", ".jsonl")}
BATCH = 1000  # rows read at a time
PYDOCS_EDITION = 1  # part of the cache's name: raise it when the extraction below changes
NOT_PROSE = {"__pycache__", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}  # folders left out


@dataclass(frozen=True)
class Rows:
    """One split: a text per row, and beside it the row's client and label where those columns were named."""

    texts: list[str]
    clients: list[str] | None = None
    labels: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Corpus:
    """All splits of a corpus; the checksum is SHA-256 over every text, client and label, in order."""

    name: str
    checksum: str
    train: Rows
    validation: Rows | None = None
    test: Rows | None = None


def read(data: DataConfig) -> Corpus:
    """Read the corpus that the config names.

    Raises:
        ConfigError: unknown corpus, missing ``data.path``, or an environment variable in it that is not set.
        DataError: missing file or column, unreadable or empty data, a row without text.
    """
    if data.corpus == "pydocs":
        return _corpus("pydocs", {"train": _pydocs(cache_folder(data))})
    if data.corpus == "shakespeare":
        data = replace(data, client_column=data.client_column or "client")
    readers = {"shakespeare": _read_files, "parquet": _read_files, "json": _read_files, "hub": _read_hub}
    if data.corpus not in readers:
        known = ["pydocs", *readers]
        close = difflib.get_close_matches(data.corpus, known, n=1)
        raise ConfigError(
            f"data.corpus = {data.corpus}",
            f"unknown{f'; did you mean {close[0]!r}?' if close else ''}",
            f"set data.corpus to one of: {', '.join(known)}",
        )
    if data.path is None:
        raise ConfigError(f"data.corpus = {data.corpus}", "data.path is not set", "set data.path to its file, folder or hub name")
    with _quiet():
        splits = readers[data.corpus](data)
    return _corpus("shakespeare" if data.corpus == "shakespeare" else data.path, splits)


def cache_folder(data: DataConfig) -> Path:
    """Where distfl keeps what it can build again: ``data.cache``, else ``${XDG_CACHE_HOME:-~/.cache}/distfl``."""
    if data.cache is not None:
        return expand(data.cache, "data.cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distfl"


def _corpus(name: str, splits: dict[str, Rows]) -> Corpus:
    if not len(splits["train"]):
        raise DataError(f"corpus {name}", "its train split holds no text", "set data.path or data.text_column to where the text is")
    filled = {split: rows for split, rows in splits.items() if len(rows)}
    return Corpus(name=name, checksum=_checksum(filled), **filled)


def _checksum(splits: dict[str, Rows]) -> str:
    """SHA-256 in hexadecimal; counts and lengths stand before what they count, so that no two corpora read alike."""
    digest = hashlib.sha256()
    for split in SPLITS:
        rows = splits.get(split)
        for column in (rows.texts, rows.clients, rows.labels) if rows else ():
            digest.update(f"{split} {-1 if column is None else len(column)}\n".encode())
            for value in column or ():
                encoded = value.encode("utf-8", "surrogatepass")
                digest.update(f"{len(encoded)} ".encode() + encoded)
    return digest.hexdigest()


# --- files and the hub, read by the datasets library -------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the datasets library: the server rank has its own."""
    import datasets  # here, not on top: it costs half a second, which only the server rank may pay

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _read_files(data: DataConfig) -> dict[str, Rows]:
    """A file (all of it train), or a folder with one file per split."""
    import datasets  # see _quiet

    # Streamed, so that no cache gets a second copy of the data; and not by load_dataset, which tells a counter on the network.
    # Without a batch_size the library fails on a parquet file of no rows.
    parquet = partial(datasets.IterableDataset.from_parquet, batch_size=BATCH)
    kind, opened = ("json", datasets.IterableDataset.from_json) if data.corpus == "json" else ("parquet", parquet)
    locks = str(cache_folder(data) / "datasets")  # the library makes lock files even so: not in the user's own cache of it
    splits = {}
    for split, file in _files(expand(data.path, "data.path"), kind).items():
        with _reading(str(file)):
            table = opened(glob.escape(str(file)), cache_dir=locks)  # the library takes paths for patterns
        splits[split] = _rows(table, data, str(file))
    return splits


def _files(path: Path, kind: str) -> dict[str, Path]:
    """The file of each split that there is, train among them."""
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise DataError(f"data.path = {path}", "there is no such file or folder", "set data.path to an existing one")
    found = {}
    for split, names in SPLITS.items():
        files = [path / f"{name}{suffix}" for name in names for suffix in SUFFIXES[kind]]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            raise DataError(
                f"data.path = {path}",
                f"more than one {split} file: {', '.join(file.name for file in files)}",
                "leave one of them there, or set data.path to a single file",
            )
        if files:
            found[split] = files[0]
    if "train" not in found:
        there = ", ".join(sorted(file.name for file in path.iterdir())[:20]) or "nothing"
        wanted = " or ".join(f"train{suffix}" for suffix in SUFFIXES[kind])
        raise DataError(
            f"data.path = {path}", f"no {wanted} in it, but: {there}", "set data.path to a folder with such a file, or to the file itself"
        )
    return found


def _read_hub(data: DataConfig) -> dict[str, Rows]:
    """A dataset of the Hugging Face hub, or a folder written by ``save_to_disk``."""
    import datasets  # see _quiet

    folder = expand(data.path, "data.path")
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    # A hub name goes to the library's own cache: a node without network finds there what the user downloaded before.
    with _reading(data.path):
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    tables = loaded if isinstance(loaded, dict) else {"train": loaded}
    splits = {split: next((tables[name] for name in names if name in tables), None) for split, names in SPLITS.items()}
    if splits["train"] is None:
        raise DataError(
            f"data.path = {data.path}",
            f"no split train, but: {', '.join(tables) or 'none'}",
            "set data.path to a dataset with a train split",
        )
    return {split: _rows(table, data, f"{data.path}, split {split}") for split, table in splits.items() if table is not None}


def _rows(table: Any, data: DataConfig, where: str) -> Rows:
    """The named columns of one split as strings; rows of white space only are left out.

    Args:
        table: a ``Dataset`` or ``IterableDataset``.
        where: file or split, for messages.
    """
    wanted = {key: getattr(data, key) for key in ("text_column", "client_column", "label_column") if getattr(data, key) is not None}
    columns: dict[str, list[str]] = {key: [] for key in wanted}
    with _reading(where):
        there = table.column_names or list(next(iter(table), {}))  # streamed JSON knows its columns by its rows only
        for key, column in wanted.items():
            if there and column not in there:
                raise DataError(f"data.{key} = {column}", f"{where} has the columns {', '.join(there)}", f"set data.{key} to one of them")
        number = 0
        for batch in table.select_columns(sorted(set(wanted.values()))).iter(batch_size=BATCH) if there else ():
            for values in zip(*(batch[column] for column in wanted.values()), strict=True):
                row = dict(zip(wanted, values, strict=True))
                _check(row, wanted, number, where)
                number += 1
                if row["text_column"].strip():
                    for key, value in row.items():
                        columns[key].append(str(value))
    return Rows(columns["text_column"], columns.get("client_column"), columns.get("label_column"))


def _check(row: dict[str, Any], wanted: dict[str, str], number: int, where: str) -> None:
    """Refuse a row in which a needed value is missing, or whose text is not text (``number`` counts from 0)."""
    for key, value in row.items():
        if value is None or key == "text_column" and not isinstance(value, str):
            raise DataError(
                f"data.{key} = {wanted[key]}",
                f"row {number} of {where} has a value of type {type(value).__name__} there",
                f"mend or remove the row, or set data.{key} to a column that every row fills",
            )


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """A failure of the datasets library becomes a DataError."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError, KeyError, StopIteration) as error:
        # pyarrow's errors are ValueErrors; a StopIteration is what the library makes of a file of 0 bytes.
        raise DataError(
            f"reading {where}", f"{type(error).__name__}: {error}", "mend what is there, or set data.corpus and data.path to fit it"
        ) from error


# --- pydocs: the docstrings of the running interpreter's standard library ---------------------------------------------------------


def _pydocs(folder: Path) -> Rows:
    """The rows from the cache, built anew where the cache has none or a damaged one; one client per top-level module."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    place = hashlib.sha256(str(stdlib).encode()).hexdigest()[:8]  # two interpreters of one version may bring different modules
    version = ".".join(map(str, sys.version_info[:3]))
    cache = folder / f"pydocs-{sys.implementation.name}-{version}-{place}-{PYDOCS_EDITION}.jsonl"
    rows = _cached(cache)
    if rows is None:
        pairs = [(module, text) for module, file in _sources(stdlib) for text in _docstrings(file)]
        if not pairs:
            raise DataError(
                "data.corpus = pydocs",
                f"no Python sources in {stdlib}",
                "use a Python with its standard library's sources, or another data.corpus",
            )
        rows = Rows([text for _, text in pairs], [module for module, _ in pairs])
        _store(cache, rows)
    return rows


def _sources(stdlib: Path) -> Iterator[tuple[str, Path]]:
    """(top-level module, file) of all sources of the standard library, in the order of their paths."""
    for file in sorted(stdlib.rglob("*.py"), key=lambda file: file.relative_to(stdlib).as_posix()):
        parts = file.relative_to(stdlib).with_suffix("").parts
        # The list of names keeps out what else is installed there (site-packages, a distributor's sitecustomize).
        if parts[0] in sys.stdlib_module_names and not NOT_PROSE.intersection(parts):
            yield parts[0], file


def _docstrings(file: Path) -> list[str]:
    """The docstrings of a source file in the order of their lines; it is parsed, never imported."""
    with tokenize.open(file) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own strings are not the user's concern
        tree = ast.parse(source.read())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # the module itself has no line
    texts = (ast.get_docstring(node, clean=True) for node in nodes)
    return [text for text in texts if text and text.strip()]


def _cached(file: Path) -> Rows | None:
    """The rows in a cache file; None where there is none or its content does not fit its checksum."""
    try:
        head, *lines = file.read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines]
        rows = Rows([text for _, text in pairs], [module for module, _ in pairs])
        return rows if json.loads(head)["checksum"] == _checksum({"train": rows}) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing or garbled in any way: it is built again
        return None


def _store(file: Path, rows: Rows) -> None:
    """Write the cache file, its checksum on the first line."""
    lines = [json.dumps({"checksum": _checksum({"train": rows})}), *map(json.dumps, zip(rows.clients, rows.texts, strict=True))]
    try:
        write_atomically(file, "\n".join(lines) + "\n")
    except OSError as error:
        raise DataError(
            f"the cache file {file}", f"it cannot be written: {error}", "set data.cache to a folder that can be written"
        ) from error
