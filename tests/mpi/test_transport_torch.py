"""The torch.distributed transport: the verbs of all transports on 1, 2 and 3 gloo ranks, broken connections, the choice of NCCL."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import hear_sigint
from contract import ABORT, START, check_verbs, check_waiting

from distfl.transport.torch_dist import why_not_nccl

ROOT = Path(__file__).parents[2]
OPENING = "from distfl.transport.torch_dist import TorchTransport as world\n"

# In place of a GPU: another tensor on the CPU, moved by gloo.
STAGED = """
import torch
from distfl.transport.torch_dist import TorchTransport

def world(smallest):
    transport = TorchTransport(smallest)
    transport._device = torch.device("cpu")
    return transport
"""


def start(ranks: int, script: str, *arguments: str) -> list[subprocess.Popen]:
    """The ranks as srun starts them; quicker than torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SLURM_STEP_NUM_TASKS": str(ranks)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": hear_sigint}
    return [
        subprocess.Popen([sys.executable, "-c", script, *arguments], env=os.environ | common | {"SLURM_PROCID": str(rank)}, **pipes)
        for rank in range(ranks)
    ]


def run(ranks: int, script: str, *arguments: str) -> subprocess.CompletedProcess:
    processes = start(ranks, script, *arguments)
    try:
        ends = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    code = next((process.returncode for process in processes if process.returncode), 0)
    return subprocess.CompletedProcess([], code, *("".join(texts) for texts in zip(*ends)))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_verb_moves_the_right_values_and_counts_its_bytes(ranks):
    check_verbs(run, OPENING, ranks)


def test_arrays_staged_through_a_device_are_the_same_and_counted_alike():
    check_verbs(run, STAGED, 2)


def test_waiting_leaves_the_core_to_others():
    check_waiting(run, OPENING)


def test_too_few_ranks_are_refused():
    done = run(1, OPENING + START, "2")
    assert done.returncode != 0
    assert "TransportError" in done.stderr and "at least 2 ranks" in done.stderr


def test_a_meeting_place_that_no_one_knows_is_refused_at_once():
    done = run(1, "import os\nos.environ['MASTER_ADDR'] = 'no-such-host.invalid'\n" + OPENING + START, "1")
    assert "no-such-host.invalid" in done.stderr and "let it name rank 0's host" in done.stderr


def test_nccl_without_a_gpu_is_refused_by_all_ranks():
    done = run(
        2,
        "from functools import partial\nimport torch\ntorch.cuda.is_available = lambda: False\n"
        + OPENING
        + "world = partial(world, backend='nccl')\n"
        + START,
        "2",
    )
    assert done.returncode != 0
    assert done.stderr.count("TransportError: TransportError") == 2 and "rank 0 on" in done.stderr and "has no GPU" in done.stderr


def test_an_ended_rank_is_seen_by_those_that_wait_for_it():
    began = time.monotonic()
    ranks = start(2, OPENING + ABORT, "1")
    ends = [process.communicate(timeout=30) for process in ranks]
    assert [process.returncode for process in ranks] == [1, 3]
    assert "RankLost" in ends[0][1] and "continue with --resume" in ends[0][1]
    assert time.monotonic() - began < 20


def test_a_signal_reaches_a_rank_that_waits():
    script = OPENING + START + "if not first: print('there', flush=True); time.sleep(60)\ntransport.gather(0, 'reports')"
    server, client = ranks = start(2, script, "2")
    try:
        assert client.stdout.readline() == "there\n"
        time.sleep(0.5)
        server.send_signal(2)
        assert "KeyboardInterrupt" in server.communicate(timeout=10)[1]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def test_nccl_is_taken_where_every_rank_has_a_gpu_of_its_own():
    assert why_not_nccl([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-3")]) == ""
    assert why_not_nccl([("a", "GPU-1"), ("b", None)]) == "rank 1 on b has no GPU that its torch can use with NCCL"
    assert why_not_nccl([("a", "GPU-1"), ("a", "GPU-2"), ("a", "GPU-1")]) == "ranks 0 and 2 on a would share a GPU"
