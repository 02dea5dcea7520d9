"""What forked ranks do in the tests of the forking start: ``python forked_ranks.py FUNCTION``."""

import json
import os
import signal
import sys

from distfl import forking


def facts() -> int:
    """Say what this process is, as far as a launcher decides it."""
    own = ("PMIX_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PWD", "TOLD")
    umask = os.umask(0)
    found = {
        "environment": {name: os.environ.get(name) for name in own},
        "c environment": os.popen("echo $PMIX_RANK $TOLD $ABSENT").read(),
        "arguments": sys.argv[1:],
        "folder": os.getcwd(),
        "umask": umask,
        "cores": sorted(os.sched_getaffinity(0)),
        "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
        "ignored": [number for number in forking.PASSED_ON if signal.getsignal(number) is signal.SIG_IGN],
        "streams": [os.readlink(f"/proc/self/fd/{number}").rstrip("0123456789:[]") for number in range(3)],
        "path": sys.path,
        "leads its group": os.getpgid(0) == os.getpid(),
    }
    print(json.dumps(found), flush=True)
    return 0


def outlive() -> int:
    """Rank 1 is killed; the others hear of it, shrink and end well."""
    from distfl.transport.mpi import MPI

    MPI.Init_thread()
    world = MPI.COMM_WORLD
    world.Set_errhandler(MPI.ERRORS_RETURN)
    world.Barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        world.Barrier()
    except MPI.Exception:
        world.Revoke()
        smaller = world.Shrink()
        print("outlived", smaller.size, smaller.allreduce(1), flush=True)
        return 0
    return 1


if __name__ == "__main__":
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PMIX_RANK"]) % len(cores)]})  # as mpirun's binding would
    code = forking.launch(f"forked_ranks:{sys.argv[1]}") if "fork" in sys.argv else globals()[sys.argv[1]]()
    sys.exit(3 if code is None else code)
