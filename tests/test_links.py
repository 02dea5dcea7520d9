"""Links: profiles read and refused, and what the collectives must move between pairs of ranks."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distfl.errors import TransportError
from distfl.links import (
    broadcast_links,
    differences,
    ledger_links,
    monitoring_flags,
    read_profiles,
)

# As Open MPI 5.0.11 writes them, with a histogram cut to 8 columns: rank 0 sent rank 1 three messages of 4 bytes itself, and
# collectives sent 40 and 4000 bytes to both others; rank 1 put 400 bytes to rank 2 and got 200 from rank 0.
ASKED = "# COLLECTIVES\n{c}D\tMPI_COMM_SELF\tprocs: {r}\n{o}D\tMPI_COMM_WORLD\tprocs: 0,1,2\n{o}"
SENT = [
    "E\t0\t1\t12 bytes\t3 msgs sent\t0,0,0,3,0,0,1,1\n"
    "I\t0\t1\t4040 bytes\t2 msgs sent\n"
    "I\t0\t2\t4040 bytes\t2 msgs sent\t0,0,0,0,0,0,1,1\n",
    "",
    "",
]
ONE_SIDED = ["", "S\t1\t0\t0 bytes\t1 msgs sent\nR\t1\t0\t200 bytes\t1 msgs sent\nS\t1\t2\t400 bytes\t1 msgs sent\n", ""]

RANKS = st.integers(1, 80)
BYTES = st.integers(0, 10**9)


def text(rank: int) -> str:
    words = {
        "r": rank,
        "c": f"C\t{rank}\t1\t4040 bytes\t2 msgs sent\n",
        "o": "".join(f"{kind}\t{rank}\t8080 bytes\t2 msgs sent\n" for kind in ("O2A", "A2O", "A2A")),
    }
    return f"# POINT TO POINT\n{SENT[rank]}# OSC\n{ONE_SIDED[rank]}{ASKED.format(**words)}"


@pytest.fixture
def prefix(tmp_path):
    """Three whole files, below a prefix that is a glob pattern too."""
    path = tmp_path / "run[1]"
    for rank in range(3):
        path.with_name(f"run[1].{rank}.prof").write_text(text(rank))
    return path


def damage(prefix, rank: int, old: str, new: str) -> None:
    path = prefix.with_name(f"{prefix.name}.{rank}.prof")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_kinds_are_kept_apart_and_summed(prefix):
    profile = read_profiles(prefix, 3)
    assert profile.collective.bytes == {(0, 1): 4040, (0, 2): 4040} and profile.collective.messages == {(0, 1): 2, (0, 2): 2}
    assert profile.point_to_point.bytes == {(0, 1): 12} and profile.point_to_point.messages == {(0, 1): 3}
    assert profile.one_sided.bytes == Counter({(0, 1): 200, (1, 2): 400})  # a get moves bytes from the peer
    assert profile.total.bytes == {(0, 1): 4252, (0, 2): 4040, (1, 2): 400}
    assert profile.total.messages == {(0, 1): 6, (0, 2): 2, (1, 2): 1, (1, 0): 1}


def test_no_profiles_name_the_component(tmp_path):
    with pytest.raises(TransportError, match="pml monitoring"):
        read_profiles(tmp_path / "absent" / "run", 3)


def test_a_missing_rank_is_refused(prefix):
    prefix.with_name("run[1].1.prof").unlink()
    with pytest.raises(TransportError, match=r"run\[1\].1.prof .*1 of 3"):
        read_profiles(prefix, 3)


def test_files_of_a_larger_job_are_refused(prefix):
    prefix.with_name("run[1].3.prof").write_text(text(2))
    with pytest.raises(TransportError, match="prefix of its own"):
        read_profiles(prefix, 3)


@pytest.mark.parametrize(
    ("rank", "old", "new", "why"),
    [
        (0, "4040 bytes\t2 msgs sent\t0", "4040 bytes\t3 msgs sent\t0", "by size"),  # a message too many
        (0, "I\t0\t1\t4040 bytes\t2 msgs sent\n", "", "by size"),  # a line lost
        (0, "I\t0\t1", "I\t0\t3", "of 3 ranks"),
        (0, "I\t0\t1", "I\t1\t1", "from rank 1"),
        (0, "4040 bytes", "4040 KB", "number of bytes"),
        (0, "4040 bytes", "-4040 bytes", "number of bytes"),
        (1, "S\t1\t2\t400 bytes\t1 msgs sent\n", "S\t1\t2\n", "range"),
        (1, "S\t1\t2", "X\t1\t2", "unknown kind"),
        (2, "procs: 0,1,2", "procs: 0,1,2,3", "ranks 0,1,2,3"),
        (2, "D\tMPI_COMM_WORLD\tprocs: 0,1,2\n", "", "too early"),
    ],
)
def test_a_damaged_file_is_refused(prefix, rank, old, new, why):
    damage(prefix, rank, old, new)
    with pytest.raises(TransportError, match=why) as refusal:
        read_profiles(prefix, 3)
    assert f"run[1].{rank}.prof" in refusal.value.asked


@pytest.mark.parametrize("rank", range(3))
def test_a_file_cut_anywhere_is_refused(prefix, rank):
    path = prefix.with_name(f"run[1].{rank}.prof")
    whole = path.read_text()
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(TransportError):
            read_profiles(prefix, 3)


def test_the_flags_name_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = monitoring_flags(tmp_path.relative_to(tmp_path) / "run")
    assert flags[flags.index("pml_monitoring_filename") + 1] == str(tmp_path / "run")


def test_small_broadcasts_by_hand():
    assert broadcast_links(4, 8, root=2).bytes == {(2, 0): 8, (2, 1): 8, (2, 3): 8}  # straight from the root
    assert broadcast_links(6, 8).bytes == {(0, 1): 8, (0, 2): 8, (1, 3): 8, (0, 4): 8, (1, 5): 8}  # 5 = 101 from 001
    assert broadcast_links(5, 8, root=2).bytes == {(2, 1): 8, (2, 0): 8, (1, 3): 8, (2, 4): 8}  # 0 and 2 change places
    assert broadcast_links(5, 8, calls=3).messages == {(0, 1): 3, (0, 2): 3, (1, 3): 3, (0, 4): 3}
    assert not broadcast_links(5, 0).messages


@given(RANKS, BYTES, st.data())
def test_every_rank_but_the_root_receives_a_broadcast_once(ranks, bytes_, data):
    root = data.draw(st.integers(0, ranks - 1))
    links = broadcast_links(ranks, bytes_, root).bytes
    assert links.total() == (ranks - 1) * bytes_
    if bytes_:
        assert sorted(destination for _, destination in links) == [rank for rank in range(ranks) if rank != root]
        reached, sources = {root}, dict((destination, source) for source, destination in links)
        for rank in sources:
            path = [rank]
            while path[-1] != root:
                path.append(sources[path[-1]])
                assert len(path) <= ranks  # no circle: what a rank passes on came from the root
            reached.update(path)
        assert reached == set(range(ranks))


@given(st.integers(5, 80), st.integers(1, 10**9))
def test_no_rank_sends_a_broadcast_more_often_than_the_tree_is_high(ranks, bytes_):
    sent = Counter(source for source, _ in broadcast_links(ranks, bytes_).bytes)
    assert sent[0] == (ranks - 1).bit_length() == max(sent.values())


def test_ledgers_explain_links():
    ledgers = [
        {"direct": {"1": 10, "2": 20}, "broadcast_bytes": 112},
        {"direct": {"0": 15}, "broadcast_bytes": 112},
        {"direct": {"0": 7, "1": 3}, "broadcast_bytes": 112},
    ]
    assert ledger_links(ledgers) == {(0, 1): 122, (0, 2): 132, (1, 0): 15, (2, 0): 7, (2, 1): 3}


def test_differences_have_a_sign():
    counted, expected = Counter({(0, 1): 5, (1, 0): 7, (0, 2): 3}), Counter({(0, 1): 5, (1, 0): 9, (2, 0): 4})
    assert differences(counted, expected) == {(0, 2): 3, (1, 0): -2, (2, 0): -4}
    assert differences(counted, counted) == {}
