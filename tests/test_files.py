"""Checksums of folders."""

from distfl.files import sha256_below


def test_a_folders_checksum_depends_on_the_names_and_the_contents_of_what_matches(tmp_path):
    source = tmp_path / "one" / "inner"
    source.mkdir(parents=True)
    (source / "a.py").write_text("first")
    (tmp_path / "one" / "b.py").write_text("second")
    before = sha256_below(tmp_path, "*.py")
    (source / "a.pyc").write_text("compiled")
    assert sha256_below(tmp_path, "*.py") == before
    (source / "a.py").rename(source / "c.py")
    assert sha256_below(tmp_path, "*.py") != before
    (source / "c.py").rename(source / "a.py")
    (source / "a.py").write_text("other")
    assert sha256_below(tmp_path, "*.py") != before
    (source / "a.py").write_text("first")
    assert sha256_below(tmp_path, "*.py") == before
