"""What a launcher says of a process: torchrun, srun, mpirun, or nothing."""

import os

import pytest

from distfl import launching
from distfl.errors import TransportError

MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "10001"}
POD = {**MEETING, "RANK": "0", "WORLD_SIZE": "1"}  # a container that was made for PyTorch
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}
CASES = {
    "nothing": ({}, (None, None, None)),
    "torchrun": ({**MEETING, "RANK": "5", "WORLD_SIZE": "9", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, ("torch", 5, 9)),
    "srun with a meeting place": ({**SRUN, **MEETING}, ("torch", 2, 4)),
    "srun with PMIx": ({**SRUN, "PMIX_RANK": "2"}, ("mpi", 2, 4)),
    "mpirun": (MPIRUN, ("mpi", 1, 3)),
    "mpirun in a container made for PyTorch": ({**POD, **MPIRUN}, ("mpi", 1, 3)),
    "a batch shell that exports a meeting place": ({**MEETING, "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (None, None, None)),
}


@pytest.fixture
def environment(monkeypatch):
    def be(variables: dict[str, str]) -> None:
        monkeypatch.setattr(os, "environ", variables)

    return be


@pytest.mark.parametrize("variables, expected", CASES.values(), ids=CASES.keys())
def test_launcher_rank_and_size(environment, variables, expected):
    environment(variables)
    assert (launching.launcher(), launching.launched_rank(), launching.launched_size()) == expected


def test_local_rank(environment):
    environment({**SRUN, **MEETING})
    assert launching.local_rank() == 1


def test_srun_without_pmix_or_meeting_place_is_refused(environment):
    environment(SRUN)
    with pytest.raises(TransportError, match="MASTER_ADDR"):
        launching.launched_size()
