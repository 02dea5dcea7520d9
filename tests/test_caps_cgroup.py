"""The cap by control group: clients in processes of their own, killed where they take too much, their results unchanged.

Version 1 for real where this process may make groups; version 2 on plain files that stand for its hierarchy.
"""

import faulthandler
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from distfl.caps import cgroup, choice
from distfl.caps.base import MemoryCap, Outcome
from distfl.caps.cgroup import CgroupV1, CgroupV2, open_cgroup
from distfl.caps.rlimit import Rlimit
from distfl.errors import CapError

torch.set_num_threads(1)  # a fork does not take threads along
MEGA = 10**6
NOTHING = Outcome([], {})


@pytest.fixture(scope="module")
def v1() -> CgroupV1:
    """In a folder of this process; the test is skipped where there is none."""
    try:
        return open_cgroup(1)
    except (CapError, OSError) as error:
        pytest.skip(f"no control groups of version 1: {getattr(error, 'found', error)}")


@pytest.fixture(autouse=True)
def no_folder_named(monkeypatch):
    monkeypatch.delenv(cgroup.FOLDER, raising=False)


def groups(cap: cgroup.Cgroup) -> list[str]:
    """Groups of this process that are still there."""
    return [folder.name for folder in cap.root.glob(f"distfl-*{os.getpid()}*")]


def take(megabytes: float) -> torch.Tensor:
    """A tensor whose pages are all touched."""
    return torch.ones(round(megabytes * MEGA / 4))


def taking(megabytes: float) -> Callable[[], Outcome]:
    return lambda: Outcome([], {"sum": float(take(megabytes)[:10].sum())})


# --- version 1: proof, peak, death -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("megabytes", [8, 32])
def test_the_cap_is_proven(v1, megabytes):
    v1.prove(megabytes * MEGA)
    assert groups(v1) == []


class Loose(CgroupV1):
    """Sabotaged: the limit stands in a file that nobody enforces."""

    limit_file = "memory.soft_limit_in_bytes"


def test_a_group_that_does_not_bite_is_found_out(v1):
    with pytest.raises(CapError, match="past it succeeded"):
        Loose(v1.root).prove(8 * MEGA)
    assert groups(v1) == []


@pytest.mark.parametrize("megabytes", [0, 5, 20])
def test_the_peak_is_what_the_client_touched(v1, megabytes):
    measured = v1.run(40 * MEGA, taking(megabytes) if megabytes else lambda: NOTHING)
    assert measured.killed == "" and measured.outcome is not None
    assert -0.1 < measured.peak_bytes / MEGA - megabytes < 2


def test_a_client_that_takes_too_much_is_killed_and_the_rank_lives_on(v1):
    measured = v1.run(10 * MEGA, taking(30))
    assert measured.outcome is None
    assert measured.killed == "killed by the kernel at the limit of its control group"
    assert 8 * MEGA < measured.peak_bytes <= 10 * MEGA
    assert groups(v1) == []
    again = v1.run(40 * MEGA, taking(30))  # nothing of the limit is left
    assert again.outcome == Outcome([], {"sum": 10.0})
    assert float(take(30)[-1]) == 1.0


def test_memory_of_the_parent_is_free_to_read_and_charged_when_written(v1):
    held = take(20)
    assert v1.run(8 * MEGA, lambda: Outcome([], {"sum": float(held.sum())})).outcome.facts == {"sum": 5e6}
    assert v1.run(8 * MEGA, lambda: Outcome([], {"sum": float(held.add_(1).sum())})).outcome is None
    assert float(held[0]) == 1.0


def test_charged_bytes_lower_the_limit_and_count_in_the_peak(v1):
    assert v1.run(24 * MEGA, taking(15)).outcome is not None
    killed = v1.run(24 * MEGA, taking(15), charged_bytes=14 * MEGA)  # 10 MB are left of 24
    assert killed.outcome is None and 22 * MEGA < killed.peak_bytes <= 24 * MEGA
    alive = v1.run(24 * MEGA, taking(5), charged_bytes=14 * MEGA)
    assert abs(alive.peak_bytes / MEGA - 19) < 2
    assert v1.run(24 * MEGA, taking(5), charged_bytes=99 * MEGA).outcome is None  # nothing is left


def test_what_settles_is_the_child_s_and_not_charged(v1):
    seen, kept = [], []
    measured = v1.run(
        10 * MEGA, lambda: Outcome([], {"seen": seen, "kept": len(kept)}), settle=lambda: (seen.append(os.getpid()), kept.append(take(30)))
    )
    child = measured.outcome.facts["seen"]
    assert len(child) == 1 and child != [os.getpid()] and measured.outcome.facts["kept"] == 1
    assert seen == [] and kept == []
    assert measured.peak_bytes < 3 * MEGA  # 30 MB were there before the limit


def test_an_error_in_the_child_is_raised_here_with_its_traceback(v1):
    def fail() -> Outcome:
        raise ZeroDivisionError("client number 7")

    with pytest.raises(RuntimeError, match=r"(?s)ended with 1\n.*in fail.*ZeroDivisionError: client number 7"):
        v1.run(20 * MEGA, fail)
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1\nTraceback.*in fail.*ZeroDivisionError"):
        v1.run(20 * MEGA, lambda: NOTHING, settle=fail)
    assert groups(v1) == []


def test_what_json_cannot_hold_is_an_error_and_not_a_wrong_fact(v1):
    with pytest.raises(RuntimeError, match="not JSON serializable"):
        v1.run(20 * MEGA, lambda: Outcome([], {"value": torch.ones(1)}))


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_dies_otherwise_is_not_taken_for_one_over_its_cap(v1, signal_):
    def die() -> Outcome:
        faulthandler.disable()  # pytest's would tell of it at length
        os.kill(os.getpid(), signal_)

    with pytest.raises(RuntimeError, match=f"ended with -{int(signal_)}"):
        v1.run(20 * MEGA, die)
    assert groups(v1) == []


def test_the_child_neither_runs_exit_handlers_nor_returns_into_the_rank(v1):
    def leave() -> Outcome:
        raise SystemExit(0)  # a child that ended here would be a second rank

    with pytest.raises(RuntimeError, match="SystemExit"):
        v1.run(20 * MEGA, leave)


# --- version 1: what comes back ----------------------------------------------------------------------------------------------------


def same_outcome(left: Outcome, right: Outcome) -> bool:
    blocks = zip(left.blocks, right.blocks, strict=True)
    return left.facts == right.facts and all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in blocks)


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [np.empty(0, np.uint8)],
        [np.arange(5, dtype=np.uint8), np.empty(0, np.float32), np.arange(3, dtype=np.float64), np.empty(0, np.int64)],
        [np.arange(3_000_001, dtype=np.uint32)],  # far more than a pipe holds
        [np.array([1.5, np.nan, -0.0, np.inf], np.float16), np.array([True, False]), np.arange(7, dtype=">i8")],
    ],
    ids=["none", "empty", "mixed", "12 MB", "kinds"],
)
def test_buffers_and_facts_come_back_unchanged(v1, blocks):
    sent = Outcome(blocks, {"trained": {"loss": 0.1 + 0.2, "steps": 3, "none": None}, "text": "Übung \n", "list": [1, 2.5, True]})
    measured = v1.run(80 * MEGA, lambda: sent)
    assert same_outcome(measured.outcome, sent)
    assert all(block.flags.aligned for block in measured.outcome.blocks)


def test_handing_over_takes_no_copies_of_everything(v1):
    # 10 MB of buffers within 16 MB: the work fits, so must its way out
    measured = v1.run(16 * MEGA, lambda: Outcome([np.ones(10 * MEGA, np.uint8)], {}))
    assert measured.outcome is not None and measured.outcome.blocks[0].all()


json_facts = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
buffers = arrays.arrays(st.sampled_from([np.uint8, np.int16, np.uint32, np.float32, np.float64, np.bool_]), st.integers(0, 40))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(buffers, max_size=5), st.dictionaries(st.text(max_size=5), json_facts, max_size=4))
def test_whatever_is_packed_is_unpacked(blocks, facts):
    sent = Outcome(blocks, facts)
    assert same_outcome(cgroup._unpack(packed(sent)), sent)


def packed(outcome: Outcome) -> bytes:
    """What goes through the pipe."""
    sent = cgroup._pack(outcome)
    return sent if isinstance(sent, bytes) else b"".join(sent)


def test_a_cut_message_is_refused():
    sent = packed(Outcome([np.arange(9, dtype=np.uint8)], {"a": 1}))
    with pytest.raises(RuntimeError, match=f"sent {len(sent) - 1} bytes"):
        cgroup._unpack(sent[:-1])


# --- version 2, on files -----------------------------------------------------------------------------------------------------------

FILES = {
    "memory.max": "max",
    "memory.current": "7000000",
    "memory.peak": "7000000",
    "memory.events": "low 0\nhigh 0\nmax 3\noom 0\noom_kill 0\noom_group_kill 0\n",
    "memory.swap.max": "max",
    "cgroup.procs": "",
}


@pytest.fixture
def hierarchy(monkeypatch):
    """Folders named distfl-* get the files of a group with the memory controller, and can be removed with them."""
    make, remove = Path.mkdir, Path.rmdir

    def mkdir(self: Path, *arguments, **named) -> None:
        make(self, *arguments, **named)
        if self.name.startswith("distfl-"):
            for name, text in FILES.items():
                (self / name).write_text(text)

    def rmdir(self: Path) -> None:
        if self.name.startswith("distfl-"):
            for file in self.iterdir():
                file.unlink()
        remove(self)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)


def in_group(root: Path, file: str) -> Path:
    (group,) = root.glob("distfl-*")
    return group / file


def test_version_2_limits_what_is_above_the_baseline(hierarchy, tmp_path):
    def work() -> Outcome:
        seen = {name: in_group(tmp_path, name).read_text() for name in ("memory.max", "memory.swap.max", "cgroup.procs", "memory.peak")}
        in_group(tmp_path, "memory.peak").write_text("12000000\n")
        return Outcome([], seen | {"pid": os.getpid()})

    measured = CgroupV2(tmp_path).run(20 * MEGA, work, charged_bytes=3 * MEGA)
    facts = measured.outcome.facts
    assert facts["memory.max"] == "24000000"  # 7 MB there before + 20 MB - 3 MB charged
    assert facts["memory.swap.max"] == "0"
    assert facts["cgroup.procs"] == str(facts["pid"]) != str(os.getpid())
    assert measured.peak_bytes == 8 * MEGA  # 12 - 7 + 3
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_cannot_be_joined_is_refused_and_not_a_result(hierarchy, tmp_path, monkeypatch):
    write = Path.write_text

    def write_text(self: Path, text: str, *arguments) -> int:
        if self.name == "cgroup.procs" and text:  # the first writing makes the file
            raise PermissionError(13, "Permission denied")
        return write(self, text, *arguments)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(CapError, match="Permission denied"):
        CgroupV2(tmp_path).run(20 * MEGA, lambda: NOTHING)


def test_a_kill_far_below_the_limit_was_another_limits(hierarchy, tmp_path):
    def die() -> Outcome:
        in_group(tmp_path, "memory.events").write_text("oom_kill 1\n")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="a limit around it"):
        CgroupV2(tmp_path).run(20 * MEGA, die)


def test_a_kernel_without_a_peak_is_refused(hierarchy, tmp_path, monkeypatch):
    monkeypatch.setattr(CgroupV2, "peak_file", "memory.no_such_peak")
    with pytest.raises(CapError, match="this kernel has no memory.no_such_peak"):
        open_cgroup(2, proc_of(tmp_path, "/"))


def test_an_error_that_cannot_be_told_still_ends_the_child(v1):
    def break_the_pipe() -> Outcome:
        for descriptor in range(3, 64):  # also the pipe to the rank
            try:
                os.close(descriptor)
            except OSError:
                continue
        raise ZeroDivisionError

    with pytest.raises(RuntimeError, match="ended with 1"):
        v1.run(20 * MEGA, break_the_pipe)


@pytest.mark.parametrize("kills", [0, 1])
def test_a_kill_counts_as_the_cap_s_where_the_kernel_says_so(hierarchy, tmp_path, kills):
    def die() -> Outcome:
        in_group(tmp_path, "memory.events").write_text(f"max 5\noom 1\noom_kill {kills}\noom_group_kill 9\n")
        in_group(tmp_path, "memory.peak").write_text("11000000")
        os.kill(os.getpid(), signal.SIGKILL)

    if kills:
        measured = CgroupV2(tmp_path).run(4 * MEGA, die)
        assert measured.outcome is None and measured.killed and measured.peak_bytes == 4 * MEGA
    else:
        with pytest.raises(RuntimeError, match="ended with -9"):
            CgroupV2(tmp_path).run(4 * MEGA, die)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_before_the_limit_stands_is_no_result(hierarchy, tmp_path):
    def die() -> None:
        in_group(tmp_path, "memory.events").write_text("oom_kill 1\n")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="ended with -9"):
        CgroupV2(tmp_path).run(4 * MEGA, lambda: NOTHING, settle=die)


def test_a_group_without_the_memory_controller_is_refused(tmp_path):
    with pytest.raises(CapError, match=r"write \+memory into its cgroup.subtree_control"):
        CgroupV2(tmp_path).run(4 * MEGA, lambda: NOTHING)
    assert list(tmp_path.iterdir()) == []


# --- which folder ------------------------------------------------------------------------------------------------------------------


def proc_of(tmp_path: Path, own: str, version: int = 2, controllers: str = "memory", mounted: bool = True) -> Path:
    """A folder that stands for /proc/self, the hierarchy being mounted at ``tmp_path/mount``."""
    proc, mount = tmp_path / "proc", tmp_path / "mount"
    proc.mkdir()
    mount.mkdir()
    kind = "cgroup2" if version == 2 else "cgroup"
    lines = [f"cgroup {tmp_path}/cpu cgroup rw,relatime,cpu 0 0"]
    if mounted:
        lines.append(f"cgroup {mount} {kind} rw,relatime,{controllers if version == 1 else 'nsdelegate'} 0 0")
    (proc / "mounts").write_text("\n".join(lines) + "\n")
    entry = f"0::{own}" if version == 2 else f"4:{controllers}:{own}"
    (proc / "cgroup").write_text(f"9:name=systemd:/elsewhere\n1:cpu:/elsewhere\n{entry}\n")
    return proc


@pytest.mark.parametrize("version, controllers", [(2, ""), (1, "memory"), (1, "hugetlb,memory")])
def test_a_process_s_own_group_is_tried_first_and_then_the_one_above(tmp_path, version, controllers):
    proc, own = proc_of(tmp_path, "/user/job", version, controllers), tmp_path / "mount/user/job"
    own.mkdir(parents=True)
    assert cgroup._folders(version, proc) == [own, own.parent, tmp_path / "mount"]
    assert cgroup._folders(3 - version, proc) == []


def test_in_the_root_group_the_mount_itself_is_tried(tmp_path):
    assert cgroup._folders(2, proc_of(tmp_path, "/")) == [tmp_path / "mount"]


def test_folders_that_a_container_does_not_see_are_not_tried(tmp_path):
    proc = proc_of(tmp_path, "/docker/0123")
    (tmp_path / "mount/docker").mkdir()
    assert cgroup._folders(2, proc) == [tmp_path / "mount/docker", tmp_path / "mount"]
    (tmp_path / "mount/docker").rmdir()
    assert cgroup._folders(2, proc) == [tmp_path / "mount"]  # the path was the host's, the mount is the container's own group


def test_the_first_folder_where_groups_can_be_made_is_taken(hierarchy, tmp_path):
    proc = proc_of(tmp_path, "/user/job")
    (tmp_path / "mount/user/job").mkdir(parents=True)
    found = open_cgroup(2, proc)
    assert isinstance(found, CgroupV2) and found.root == tmp_path / "mount/user/job"
    assert list(found.root.iterdir()) == []  # the probe is gone


@pytest.fixture
def refusing(tmp_path, monkeypatch) -> Path:
    """A stand-in for /proc whose process is in /user/job, a group that lets nobody make groups in it."""
    proc, make = proc_of(tmp_path, "/user/job"), Path.mkdir
    (tmp_path / "mount/user/job").mkdir(parents=True)

    def mkdir(self: Path, *arguments, **named) -> None:
        if self.parent.name == "job":
            raise PermissionError(13, "Permission denied")
        make(self, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    return proc


def test_a_folder_that_refuses_groups_is_passed_over(hierarchy, refusing, tmp_path):
    assert open_cgroup(2, refusing).root == tmp_path / "mount/user"


def test_without_a_folder_the_refusal_says_what_was_tried_and_what_to_do(refusing, tmp_path):
    with pytest.raises(CapError) as refusal:
        open_cgroup(2, refusing)
    assert refusal.value.asked == "memory.enforce = cgroup-v2"
    without = "groups in it have no memory controller"
    tried = f"{tmp_path}/mount/user/job: Permission denied; {tmp_path}/mount/user: {without}; {tmp_path}/mount: {without}"
    assert refusal.value.found == tried
    assert "Delegate=yes" in refusal.value.change and "DISTFL_CGROUP" in refusal.value.change
    assert list((tmp_path / "mount/user").iterdir()) == [tmp_path / "mount/user/job"]


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_hierarchy_the_refusal_says_so(tmp_path, version):
    with pytest.raises(CapError, match=f"no hierarchy of version {version} with a memory controller is mounted"):
        open_cgroup(version, proc_of(tmp_path, "/", version, mounted=False))


def test_a_named_folder_comes_before_all_others(hierarchy, tmp_path, monkeypatch):
    proc, named = proc_of(tmp_path, "/"), tmp_path / "delegated"
    named.mkdir()
    monkeypatch.setenv("DISTFL_CGROUP", str(named))
    assert open_cgroup(2, proc).root == named
    assert cgroup._folders(1, proc) == []  # it is not of version 1
    (named / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert cgroup._folders(1, proc) == [named]
    assert cgroup._folders(2, proc) == []


def test_a_named_folder_that_is_not_there_is_named_in_the_refusal(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTFL_CGROUP", str(tmp_path / "gone"))
    with pytest.raises(CapError, match="gone: No such file or directory"):
        open_cgroup(2, proc_of(tmp_path, "/"))


def test_groups_of_dead_ranks_are_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {"left": dead.pid, "new": dead.pid, "alive": os.getpid()}
    groups = {name: tmp_path / f"distfl-{pid}-{name}" for name, pid in names.items()}
    for name, group in groups.items():
        group.mkdir()
        if name != "new":
            os.utime(group, (0, 0))
    cgroup._sweep(tmp_path)
    assert [name for name, group in groups.items() if group.exists()] == ["new", "alive"]


def test_every_version_1_name_exists_in_a_real_group(v1):
    group = v1.root / f"distfl-names-{os.getpid()}"
    group.mkdir()
    try:
        assert all((group / name).exists() for name in (v1.limit_file, v1.usage_file, v1.peak_file, "memory.oom_control", "cgroup.procs"))
        assert v1.kills(group) == 0
    finally:
        group.rmdir()


# --- which mechanism ---------------------------------------------------------------------------------------------------------------


class Pretended(MemoryCap):
    """Proves as told."""

    enforced = True

    def __init__(self, name: str, proven: bool):
        self.name, self.proven, self.budgets = name, proven, []

    def run(self, budget_bytes, work, charged_bytes=0, settle=None, attend=None):
        raise AssertionError("only proven here")

    def prove(self, budget_bytes: int) -> None:
        self.budgets.append(budget_bytes)
        if not self.proven:
            raise CapError("a cap", f"{self.name} does not bite", "see above")


@pytest.fixture
def mechanisms(monkeypatch) -> Callable[..., dict[str, Pretended]]:
    """Put these mechanisms in the place of the real ones: True proves, False does not, None is not to be had."""

    def install(**proven: bool | None) -> dict[str, Pretended]:
        caps = {name: Pretended(name, value) for name, value in proven.items() if value is not None}

        def opened(version: int) -> Pretended:
            if f"v{version}" not in caps:
                raise CapError(f"memory.enforce = cgroup-v{version}", f"no version {version}", "mount it")
            return caps[f"v{version}"]

        monkeypatch.setattr(choice, "open_cgroup", opened)
        monkeypatch.setattr(choice, "Rlimit", lambda: caps["rlimit"])
        monkeypatch.setattr(choice, "Report", lambda: pytest.fail("auto never only measures"))
        monkeypatch.setattr(choice.sys, "platform", "linux")
        return caps

    return install


@pytest.mark.parametrize(
    "proven, wanted",
    [
        ({"rlimit": True, "v2": True, "v1": True}, "rlimit"),
        ({"rlimit": False, "v2": True, "v1": True}, "v2"),
        ({"rlimit": False, "v2": False, "v1": True}, "v1"),
        ({"rlimit": False, "v2": None, "v1": True}, "v1"),
    ],
)
def test_auto_takes_the_first_mechanism_that_is_proven(proven, wanted, mechanisms):
    caps = mechanisms(**proven)
    assert choice.make_cap("auto") is caps[wanted]
    assert caps[wanted].budgets == [choice.PROOF_BYTES]


def test_auto_refuses_where_nothing_is_proven(mechanisms):
    mechanisms(rlimit=False, v2=False, v1=None)
    with pytest.raises(CapError) as refusal:
        choice.make_cap("auto")
    assert refusal.value.found == "rlimit: rlimit does not bite; cgroup-v2: v2 does not bite; cgroup-v1: no version 1"
    assert "memory.enforce=report" in refusal.value.change


@pytest.mark.parametrize("enforce, wanted", [("rlimit", "rlimit"), ("cgroup", "v2"), ("cgroup-v1", "v1"), ("cgroup-v2", "v2")])
def test_a_named_mechanism_is_taken_without_a_choice(enforce, wanted, mechanisms):
    caps = mechanisms(rlimit=False, v2=False, v1=False)
    assert choice.make_cap(enforce) is caps[wanted]
    assert not any(cap.budgets for cap in caps.values())


def test_cgroup_takes_version_1_where_there_is_no_version_2(mechanisms):
    caps = mechanisms(rlimit=True, v2=None, v1=True)
    assert choice.make_cap("cgroup") is caps["v1"]


@pytest.mark.parametrize("enforce, missing", [("cgroup-v2", "no version 2"), ("cgroup-v1", "no version 1"), ("cgroup", "no version 1")])
def test_a_named_mechanism_that_is_not_to_be_had_is_refused(enforce, missing, mechanisms):
    mechanisms(rlimit=True, v2=None, v1=None)
    with pytest.raises(CapError, match=missing):
        choice.make_cap(enforce)


@pytest.mark.parametrize("enforce", ["auto", "rlimit", "cgroup", "cgroup-v1", "cgroup-v2"])
def test_elsewhere_than_linux_only_a_measurement_is_to_be_had(enforce, monkeypatch):
    monkeypatch.setattr(choice.sys, "platform", "darwin")
    with pytest.raises(CapError, match="platform darwin"):
        choice.make_cap(enforce)
    assert choice.make_cap("report").enforced is False


def test_an_rlimit_that_does_not_bite_gives_way_to_a_control_group(v1, monkeypatch):
    monkeypatch.setattr(Rlimit, "set_limit", lambda self, bytes_: None)
    cap = choice.make_cap("auto")
    assert cap.name.startswith("cgroup-") and cap.enforced and not cap.in_this_process
    with pytest.raises(CapError, match="past it succeeded"):
        choice.make_cap("rlimit").prove(8 * MEGA)
