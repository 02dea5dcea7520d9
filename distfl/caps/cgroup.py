"""A cap by control group: the client runs in a process of its own, in a group of its own, and the kernel kills it there.

The group counts what the client's pages are, touched or copied, page cache and kernel memory included, and
needs a folder of the hierarchy in which this process may make groups: with version 1 as root (or a delegated
folder), with version 2 a delegated group (``systemd-run --user --scope -p Delegate=yes``, ``DISTFL_CGROUP``), or root.

The rank forks for every client: the child inherits the replica, settles, reads its baseline, gets its limit,
works, and hands buffers and facts back through a pipe. The rank itself is never in danger.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import struct
import time
import traceback
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from distfl.allocator import fresh_heap
from distfl.caps.base import Measured, MemoryCap, Outcome, Work
from distfl.errors import CapError
from distfl.signals import end_with_parent

FOLDER = "DISTFL_CGROUP"
LEFT_AFTER_SECONDS = 60
ATTENTION_MILLISECONDS = 100
OUTER_LIMIT_BYTES = 2**20  # a client killed further below its limit than this was not killed by it
NEVER_JOINED, NEVER_BEGAN = 2**64 - 1, 2**64 - 2  # in place of a baseline
_BASELINE = struct.Struct("<Q")
_HEAD = struct.Struct("<QQ")  # bytes of the JSON part, bytes of the buffers


class Cgroup(MemoryCap):
    """What both versions do; they differ in the names of files.

    Args:
        root: the folder to make groups in.
    """

    enforced, in_this_process = True, False
    limit_file: str
    usage_file: str
    peak_file: str

    def __init__(self, root: Path):
        self.root = root

    @abstractmethod
    def kills(self, group: Path) -> int:
        """Processes of a group that the kernel has killed for memory."""

    def prepare(self, group: Path) -> None:
        """Shut other ways out than memory (swap)."""

    def run(
        self,
        budget_bytes: int,
        work: Work,
        charged_bytes: int = 0,
        settle: Callable[[], object] | None = None,
        attend: Callable[[], object] = lambda: None,
    ) -> Measured:
        group = self.root / f"distfl-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        group.mkdir()
        try:
            self.prepare(group)
            return self._run_in(group, budget_bytes, charged_bytes, work, settle, attend)
        finally:
            group.rmdir()

    def _run_in(
        self,
        group: Path,
        budget_bytes: int,
        charged_bytes: int,
        work: Work,
        settle: Callable[[], object] | None,
        attend: Callable[[], object],
    ) -> Measured:
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(readable)
                end_with_parent()  # a client whose rank is killed must not train on as an orphan
                code = self._be_the_client(group, budget_bytes - charged_bytes, work, settle, writable)
            finally:
                os._exit(code)  # whatever happens, the child is never the rank: neither MPI nor the exit handlers are its own
        os.close(writable)
        try:
            with open(readable, "rb") as pipe:
                _until_readable(pipe, attend)
                head = pipe.read(_BASELINE.size)
                _until_readable(pipe, attend)
                sent = pipe.read()
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        baseline = _BASELINE.unpack(head)[0] if len(head) == _BASELINE.size else NEVER_BEGAN
        if baseline == NEVER_JOINED:
            raise CapError(
                f"a client in a control group of {self.root}",
                sent.decode(errors="replace"),
                "see `distfl doctor`; memory.enforce=auto takes what can be proven",
            )
        if baseline == NEVER_BEGAN:
            raise RuntimeError(f"a client's process ended with {status}\n{sent.decode(errors='replace')}")
        peak = int((group / self.peak_file).read_text()) - baseline
        measured = max(0, peak) + charged_bytes
        if status == 0:
            return Measured(_unpack(sent), measured)
        if status == -signal.SIGKILL and self.kills(group):
            if measured < budget_bytes - OUTER_LIMIT_BYTES:
                raise RuntimeError(
                    f"a client's process was killed for memory at {measured} of its {budget_bytes} bytes: "
                    "a limit around it (the job's, the node's) is too small for all clients at once"
                )
            return Measured(None, measured, "killed by the kernel at the limit of its control group")
        raise RuntimeError(f"a client's process ended with {status}\n{sent.decode(errors='replace')}")

    def _be_the_client(self, group: Path, limit_bytes: int, work: Work, settle: Callable[[], object] | None, pipe: int) -> int:
        """The child's life; returns its exit code."""
        with open(pipe, "wb") as stream, contextlib.ExitStack() as stack:
            told = False
            try:
                torch.set_num_threads(1)  # the threads of the parent's pool do not live here
                if settle is not None:
                    settle()
                gc.collect()  # writes to every object: pages shared with the parent are copied here, not in the client's time
                stack.enter_context(fresh_heap())
                # Only now: pages touched before stay with the rank's group, and the peak needs no reset, which version 2
                # cannot do for other readers.
                try:
                    (group / "cgroup.procs").write_text(str(os.getpid()))
                    baseline = int((group / self.usage_file).read_text())
                    (group / self.limit_file).write_text(str(baseline + max(0, limit_bytes)))
                except OSError as error:
                    stream.write(_BASELINE.pack(NEVER_JOINED) + str(error).encode())
                    return 1
                stream.write(_BASELINE.pack(baseline))
                stream.flush()
                told = True
                for part in _pack(work()):
                    stream.write(part)
                return 0
            except BaseException:
                stream.write((b"" if told else _BASELINE.pack(NEVER_BEGAN)) + traceback.format_exc().encode())
                return 1


def _until_readable(pipe: BinaryIO, attend: Callable[[], object]) -> None:
    """Wait for the client's next words, or its end."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while not poll.poll(ATTENTION_MILLISECONDS):
        attend()


def _pack(outcome: Outcome) -> Iterator[bytes | memoryview]:
    """What goes through the pipe; the buffers as they are, for a copy would be the client's memory."""
    shapes = [(block.dtype.str, block.nbytes) for block in outcome.blocks]
    text = json.dumps([outcome.facts, shapes]).encode()
    yield _HEAD.pack(len(text), sum(block.nbytes for block in outcome.blocks)) + text
    for block in outcome.blocks:
        if block.nbytes:
            yield memoryview(block).cast("B")


def _unpack(sent: bytes) -> Outcome:
    text, buffers = _HEAD.unpack_from(sent)
    if len(sent) != _HEAD.size + text + buffers:
        raise RuntimeError(f"a client's process sent {len(sent)} bytes of {_HEAD.size + text + buffers}")
    facts, shapes = json.loads(sent[_HEAD.size : _HEAD.size + text])
    place, blocks = _HEAD.size + text, []
    for kind, bytes_ in shapes:
        blocks.append(np.frombuffer(sent, np.uint8, bytes_, place).copy().view(kind))  # a copy is aligned, and may be written to
        place += bytes_
    return Outcome(blocks, facts)


class CgroupV1(Cgroup):
    """The memory controller of version 1."""

    name = "cgroup-v1"
    limit_file, usage_file, peak_file = "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.max_usage_in_bytes"

    def prepare(self, group: Path) -> None:
        with contextlib.suppress(OSError):
            (group / "memory.swappiness").write_text("0")

    def kills(self, group: Path) -> int:
        return _counter(group / "memory.oom_control", "oom_kill")


class CgroupV2(Cgroup):
    """The unified hierarchy."""

    name = "cgroup-v2"
    limit_file, usage_file, peak_file = "memory.max", "memory.current", "memory.peak"

    def prepare(self, group: Path) -> None:
        if not (group / self.limit_file).exists():
            raise CapError(f"a group in {self.root}", "it has no memory controller", "write +memory into its cgroup.subtree_control")
        with contextlib.suppress(OSError):
            (group / "memory.swap.max").write_text("0")

    def kills(self, group: Path) -> int:
        return _counter(group / "memory.events", "oom_kill")


def _counter(file: Path, key: str) -> int:
    return next((int(line.split()[1]) for line in file.read_text().splitlines() if line.split()[:1] == [key]), 0)


def open_cgroup(version: int, proc: Path = Path("/proc/self")) -> Cgroup:
    """The mechanism of one version, in the first folder where groups can be made.

    Raises:
        CapError: there is none; says which were tried and what to do.
    """
    tried = []
    for folder in _folders(version, proc):
        _sweep(folder)
        group = folder / f"distfl-{os.getpid()}-probe"
        try:
            group.mkdir()
        except OSError as error:
            tried.append(f"{folder}: {error.strerror}")
            continue
        try:
            kind = CgroupV1 if version == 1 else CgroupV2
            missing = [name for name in (kind.limit_file, kind.peak_file) if not (group / name).exists()]
            if not missing:
                return kind(folder)
            tried.append(
                f"{folder}: groups in it have no memory controller"
                if kind.limit_file in missing
                else f"{folder}: this kernel has no {kind.peak_file} (Linux 5.19 brought it)"
            )
        finally:
            group.rmdir()
    raise CapError(
        f"memory.enforce = cgroup-v{version}",
        "; ".join(tried) or f"no hierarchy of version {version} with a memory controller is mounted",
        f"start it as root, or under systemd-run --user --scope -p Delegate=yes, or name a delegated group in {FOLDER}",
    )


def _sweep(folder: Path) -> None:
    """Remove groups left by ranks that were killed; one that is in use cannot be removed."""
    for group in folder.glob("distfl-*-*"):
        with contextlib.suppress(OSError):
            if not Path("/proc", group.name.split("-")[1]).exists() and time.time() - group.stat().st_mtime > LEFT_AFTER_SECONDS:
                group.rmdir()


def _folders(version: int, proc: Path) -> list[Path]:
    """Where this process might make groups: the named folder, its own group, the one above (version 2 allows no
    groups below one with processes)."""
    if named := os.environ.get(FOLDER):
        is_v1 = (Path(named) / CgroupV1.limit_file).exists()
        return [Path(named)] if is_v1 == (version == 1) else []
    mount = _mounted(version, proc)
    if mount is None:
        return []
    own = ""
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (version == 2 and controllers == "") or (version == 1 and "memory" in controllers.split(",")):
            own = path.lstrip("/")
    folders = [mount / own, (mount / own).parent, mount] if own else [mount]  # in a container the path may be the host's
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _mounted(version: int, proc: Path) -> Path | None:
    for line in (proc / "mounts").read_text().splitlines():
        _, place, kind, options = line.split()[:4]
        if (version == 2 and kind == "cgroup2") or (version == 1 and kind == "cgroup" and "memory" in options.split(",")):
            return Path(place)
    return None
