"""The MPI transport under a real mpirun: the same verbs on 1, 2 and 3 ranks, large blocks, waiting, abort."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from contract import ABORT, START, check_verbs, check_waiting

from distfl.errors import TransportError
from distfl.launching import mpirun_path

pytestmark = pytest.mark.mpi
ROOT = Path(__file__).parents[2]
OPENING = "from distfl.transport.mpi import world\n"


def mpirun(ranks: int, script: str, *arguments: str) -> subprocess.CompletedProcess:
    flags = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = [
        mpirun_path(),
        "-n",
        str(ranks),
        *flags,
        "--bind-to",
        "none",
        "--map-by",
        ":OVERSUBSCRIBE",
        sys.executable,
        "-c",
        script,
        *arguments,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_verb_moves_the_right_values_and_counts_its_bytes(ranks):
    check_verbs(mpirun, OPENING, ranks)


def test_waiting_leaves_the_core_to_others():
    check_waiting(mpirun, OPENING)


def test_too_few_ranks_are_refused():
    done = mpirun(1, OPENING + START, "2")
    assert done.returncode != 0
    assert TransportError.__name__ in done.stderr and "at least 2 ranks" in done.stderr


def test_abort_ends_every_rank():
    began = time.monotonic()
    done = mpirun(2, OPENING + ABORT, "1")
    assert done.returncode == 3, done.stderr
    assert time.monotonic() - began < 30


BTL = "import os\n" + OPENING + "world(1)\nprint(os.environ.get('OMPI_MCA_btl'))"


def alone(script: str) -> subprocess.CompletedProcess:
    """A rank that no mpirun has told what stands in files, as under srun."""
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_the_layer_that_sleeps_as_it_closes_is_left_out_unless_somebody_chooses_layers(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OMPI_MCA_btl", raising=False)
    parameters = tmp_path / ".openmpi" / "mca-params.conf"
    parameters.parent.mkdir()
    parameters.write_text("# btl = tcp\nmpi_param_check = 1\n")
    assert mpirun(1, BTL).stdout.split() == alone(BTL).stdout.split() == ["^ofi"]
    parameters.write_text("btl = self,sm,tcp\n")
    assert mpirun(1, BTL).stdout.split() == ["self,sm,tcp"] and alone(BTL).stdout.split() == ["None"]
    monkeypatch.setenv("OMPI_MCA_btl", "self,tcp")
    assert mpirun(1, BTL).stdout.split() == alone(BTL).stdout.split() == ["self,tcp"]
