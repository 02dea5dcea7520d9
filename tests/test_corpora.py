"""Corpora: what is read from files, folders and the standard library, and what is refused."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from distfl import corpora
from distfl.config import DataConfig
from distfl.corpora import Rows, cache_folder, read
from distfl.errors import ConfigError, DataError

SPEECHES = [
    {"who": "ann", "text": "one", "kind": 1},
    {"who": "bob", "text": " \n", "kind": 2},
    {"who": "ann", "text": "two\nlines", "kind": 2},
]


def write(file: Path, rows: list[dict]) -> Path:
    """Rows as parquet or JSON lines, by the file's suffix."""
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to connect fails the test."""

    def refuse(*_args, **_options):
        pytest.fail("reading local data opened a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test writes into the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


# --- parquet and JSON ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, suffix", [("parquet", ".parquet"), ("json", ".jsonl"), ("json", ".json")])
def test_one_file_is_the_train_split(tmp_path, no_network, kind, suffix):
    folder = tmp_path / "odd [1] *"  # the datasets library takes such characters for patterns
    folder.mkdir()
    file = write(folder / f"speeches{suffix}", SPEECHES)
    corpus = read(DataConfig(corpus=kind, path=str(file), client_column="who", label_column="kind"))
    assert corpus.train == Rows(["one", "two\nlines"], ["ann", "ann"], ["1", "2"])  # bob's row is white space only
    assert len(corpus.train) == 2 and corpus.validation is None and corpus.test is None
    assert [file.name for file in folder.iterdir()] == [f"speeches{suffix}"]  # nothing written beside the source


def test_a_json_list_is_read_like_json_lines(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(SPEECHES))
    assert read(DataConfig(corpus="json", path=str(tmp_path / "list.json"))).train.texts == ["one", "two\nlines"]


@pytest.mark.parametrize("validation", ["valid", "validation"])
def test_a_folder_brings_its_splits(tmp_path, monkeypatch, validation):
    for split, text in (("train", "a"), (validation, "b"), ("test", "c")):
        write(tmp_path / f"{split}.parquet", [{"text": text}])
    (tmp_path / "README.md").write_text("not data")
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    corpus = read(DataConfig(corpus="parquet", path="${SOME_DATA}"))
    assert (corpus.train, corpus.validation, corpus.test) == (Rows(["a"]), Rows(["b"]), Rows(["c"]))
    assert corpus.name == "${SOME_DATA}"  # as written: names of private folders stay out of the records


def test_shakespeare_names_its_columns_itself(tmp_path):
    write(tmp_path / "train.parquet", [{"client": "hamlet__HORATIO", "text": "Friends to this ground."}])
    corpus = read(DataConfig(corpus="shakespeare", path=str(tmp_path)))
    assert corpus.name == "shakespeare" and corpus.train == Rows(["Friends to this ground."], ["hamlet__HORATIO"])


@pytest.mark.skipif("DISTFL_DATA" not in os.environ, reason="DISTFL_DATA does not name the folder with the real corpora")
def test_the_real_shakespeare():
    corpus = read(DataConfig(corpus="shakespeare", path="${DISTFL_DATA}/shakespeare"))
    assert len(corpus.train) == 24_172 and len(corpus.test) == 6_934
    assert len(set(corpus.train.clients)) == 1_044
    assert sum(map(len, corpus.train.texts)) == 3_401_443


def test_the_checksum_tells_apart_what_differs(tmp_path):
    def checksum(rows, **columns):
        return read(DataConfig(corpus="json", path=str(write(tmp_path / "rows.jsonl", rows)), **columns)).checksum

    two = [{"who": "a", "text": "one"}, {"who": "b", "text": "two"}]
    assert checksum(two) == checksum(two) and re.fullmatch("[0-9a-f]{64}", checksum(two))
    sums = [
        checksum(two),
        checksum(two[::-1]),
        checksum(two, client_column="who"),
        checksum(two, label_column="who"),
        checksum([{"text": "onetwo"}]),
        checksum([{"text": "one\ntwo"}]),
        checksum([{"text": "onet"}, {"text": "wo"}]),
    ]
    assert len(set(sums)) == len(sums)


def test_a_split_more_changes_the_checksum(tmp_path):
    write(tmp_path / "train.jsonl", SPEECHES)
    sums = {read(DataConfig(corpus="json", path=str(tmp_path))).checksum}
    write(tmp_path / "test.jsonl", SPEECHES)
    sums.add(read(DataConfig(corpus="json", path=str(tmp_path))).checksum)
    (tmp_path / "test.jsonl").rename(tmp_path / "valid.jsonl")
    sums.add(read(DataConfig(corpus="json", path=str(tmp_path))).checksum)
    assert len(sums) == 3


# --- the hub ---------------------------------------------------------------------------------------------------------------------------


def test_a_folder_saved_by_the_datasets_library(tmp_path, no_network):
    train, test = datasets.Dataset.from_list(SPEECHES), datasets.Dataset.from_list(SPEECHES[:1])
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "both")
    corpus = read(DataConfig(corpus="hub", path=str(tmp_path / "both"), client_column="who"))
    assert corpus.train == Rows(["one", "two\nlines"], ["ann", "ann"]) and corpus.test == Rows(["one"], ["ann"])

    train.save_to_disk(tmp_path / "one")
    assert read(DataConfig(corpus="hub", path=str(tmp_path / "one"), client_column="who")).train == corpus.train

    datasets.DatasetDict(test=test).save_to_disk(tmp_path / "no_train")
    with pytest.raises(DataError, match="no split train, but: test"):
        read(DataConfig(corpus="hub", path=str(tmp_path / "no_train")))


def test_progress_bars_are_as_before(tmp_path):
    file = write(tmp_path / "rows.jsonl", SPEECHES)
    assert datasets.is_progress_bar_enabled()
    read(DataConfig(corpus="json", path=str(file)))
    assert datasets.is_progress_bar_enabled()


# --- refusals --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, suffix", [("parquet", ".parquet"), ("json", ".jsonl")])
@pytest.mark.parametrize("setting", ["text_column", "client_column", "label_column"])
def test_a_missing_column_is_named_with_the_columns_there_are(tmp_path, kind, suffix, setting):
    file = write(tmp_path / f"rows{suffix}", SPEECHES)
    with pytest.raises(DataError, match=f"data.{setting} = speech") as caught:
        read(DataConfig(corpus=kind, path=str(file), **{setting: "speech"}))
    assert "who, text, kind" in caught.value.found and f"data.{setting}" in caught.value.change


@pytest.mark.parametrize("kind, suffix", [("parquet", ".parquet"), ("json", ".jsonl")])
@pytest.mark.parametrize("setting, value", [("text_column", None), ("text_column", 7), ("client_column", None)])
def test_a_row_without_a_value_is_refused(tmp_path, kind, suffix, setting, value):
    good = {"text": value, "who": "a", "body": "b"} if value == 7 else {"text": "a", "who": "a"}
    bad = {**good, "text" if setting == "text_column" else "who": value}
    file = write(tmp_path / f"rows{suffix}", [good, bad])
    row = 0 if value == 7 else 1
    with pytest.raises(DataError, match=f"row {row} of .* has a value of type {type(value).__name__}"):
        read(DataConfig(corpus=kind, path=str(file), client_column="who"))


@pytest.mark.parametrize("kind, suffix", [("parquet", ".parquet"), ("json", ".jsonl")])
@pytest.mark.parametrize("content", [b"", b"neither parquet nor JSON", b"PAR1\0\0\0\0PAR1", b"\xff\xfe\x00"])
def test_a_broken_file_is_refused(tmp_path, kind, suffix, content):
    (tmp_path / f"train{suffix}").write_bytes(content)
    with pytest.raises(DataError):
        read(DataConfig(corpus=kind, path=str(tmp_path)))


def test_an_empty_corpus_is_refused(tmp_path):
    file = tmp_path / "none.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), file)
    with pytest.raises(DataError, match="holds no text"):
        read(DataConfig(corpus="parquet", path=str(file)))
    with pytest.raises(DataError, match="holds no text"):
        read(DataConfig(corpus="json", path=str(write(tmp_path / "blank.jsonl", [{"text": " "}]))))


def test_an_empty_test_split_counts_as_none(tmp_path):
    write(tmp_path / "train.parquet", [{"text": "a"}])
    write(tmp_path / "test.parquet", [{"text": " "}])
    assert read(DataConfig(corpus="parquet", path=str(tmp_path))).test is None


def test_missing_or_doubled_files_are_refused(tmp_path):
    tmp_path = tmp_path / "corpus"
    tmp_path.mkdir()
    with pytest.raises(DataError, match="no such file or folder"):
        read(DataConfig(corpus="parquet", path=str(tmp_path / "nowhere")))
    write(tmp_path / "test.parquet", SPEECHES)
    with pytest.raises(DataError, match="no train.parquet in it, but: test.parquet"):
        read(DataConfig(corpus="parquet", path=str(tmp_path)))
    write(tmp_path / "train.json", SPEECHES)
    write(tmp_path / "train.jsonl", SPEECHES)
    with pytest.raises(DataError, match="more than one train file: train.json, train.jsonl"):
        read(DataConfig(corpus="json", path=str(tmp_path)))


def test_unusable_settings_are_refused(monkeypatch):
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    with pytest.raises(ConfigError, match="did you mean 'shakespeare'"):
        read(DataConfig(corpus="shakespear"))
    with pytest.raises(ConfigError, match="data.path is not set"):
        read(DataConfig(corpus="shakespeare"))
    with pytest.raises(ConfigError, match="NO_SUCH_FOLDER"):
        read(DataConfig(corpus="parquet", path="${NO_SUCH_FOLDER}/x"))


# --- pydocs ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A standard library of five files in place of the interpreter's own, so that every docstring is known."""
    root = tmp_path / "stdlib"
    sources = {
        "json/__init__.py": '"""Package."""\n',
        "json/decoder.py": 'class Decoder:\n    """Class."""\n    def decode(self):\n        """Method\n\n        of two paragraphs."""\n',
        "abc.py": 'raise RuntimeError("imported")\ndef late(): pass\nasync def later():\n    def inner():\n        "Inner."\n',
        "json/tests/test_decoder.py": '"""A test."""\n',
        "site-packages/other.py": '"""Installed."""\n',
        "sitecustomize.py": '"""Not of the library."""\n',
    }
    for name, source in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda _: str(root))
    return root


def test_pydocs_takes_docstrings_in_order_without_importing(library, tmp_path):
    corpus = read(DataConfig(cache=str(tmp_path / "cache")))
    assert corpus.name == "pydocs" and corpus.test is None
    assert corpus.train == Rows(["Inner.", "Package.", "Class.", "Method\n\nof two paragraphs."], ["abc", "json", "json", "json"])


def test_pydocs_is_built_once(library, tmp_path, monkeypatch):
    config = DataConfig(cache=str(tmp_path / "deep" / "cache"))
    first = read(config)
    (file,) = cache_folder(config).iterdir()  # nothing temporary is left
    assert ".".join(map(str, sys.version_info[:3])) in file.name
    monkeypatch.setattr(corpora, "_docstrings", lambda _: pytest.fail("built again"))
    assert read(config) == first


@pytest.mark.parametrize(
    "garble",
    [
        lambda content: b"",
        lambda content: b"\xff\n" + content,
        lambda content: content[: len(content) // 2],  # cut short, as by a full disk
        lambda content: content.replace(b"Inner", b"Outer"),  # still valid JSON
        lambda content: b"[]\n" + content,
        lambda content: content + b"7\n",
        lambda content: content + b'["abc", 7]\n',
    ],
)
def test_a_garbled_cache_is_built_again(library, tmp_path, garble):
    config = DataConfig(cache=str(tmp_path / "cache"))
    first = read(config)
    (file,) = cache_folder(config).iterdir()
    content = file.read_bytes()
    file.write_bytes(garble(content))
    assert read(config) == first
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_refused(library, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written") as caught:
        read(DataConfig(cache=str(tmp_path / "file" / "cache")))
    assert "data.cache" in caught.value.change


def test_a_library_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda _: str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="no Python sources"):
        read(DataConfig(cache=str(tmp_path)))


def test_the_real_pydocs_is_large_enough_for_the_default(tmp_path):
    corpus = read(DataConfig(cache=str(tmp_path)))
    characters: dict[str, int] = {}
    for module, text in zip(corpus.train.clients, corpus.train.texts, strict=True):
        characters[module] = characters.get(module, 0) + len(text)
    assert sum(count >= 3000 for count in characters.values()) >= 64  # clients of the 64-rank example
    assert "argparse" in characters and not {"test", "idlelib", "turtledemo"} & characters.keys()


def test_the_cache_lies_where_the_desktop_convention_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path / "distfl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(DataConfig()) == Path.home() / ".cache" / "distfl"
    assert cache_folder(DataConfig(cache="${HOME}/x")) == Path.home() / "x"


def test_pydocs_does_not_pay_for_the_datasets_library(tmp_path):
    program = (
        "import sys; from distfl.config import DataConfig; from distfl.corpora import read\n"
        f"read(DataConfig(cache={str(tmp_path)!r}))\n"
        "assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
