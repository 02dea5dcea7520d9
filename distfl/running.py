"""Commands that train or score, from config to exit code: which half this process runs, and how it ends."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from distfl import checkpoints, settings
from distfl.allocator import exact_allocator
from distfl.checkpoints import ServerState
from distfl.config import PretrainConfig, TrainConfig
from distfl.errors import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_REQUEUE, ConfigError, DataError, DistflError, RankLost, StartError
from distfl.files import write_atomically, write_json
from distfl.hosting import RankState, rank_state
from distfl.launching import launched_rank, launcher, say, threads_per_rank
from distfl.messages import RankStart, Score
from distfl.methods.base import Method, build_model, load_method, table_of
from distfl.model import ModelSpec
from distfl.recovery import ABORT, REPEAT, lost_ranks
from distfl.rounds import dismiss, introduce, join, refuse, serve, work
from distfl.signals import StopRequest
from distfl.transport.base import Transport

if TYPE_CHECKING:
    from distfl.family import Family
    from distfl.jobs import Job
    from distfl.reporting import Run
    from distfl.run_folder import RunFolder

WHAT_BECOMES = {
    REPEAT: "MPI reports dead ranks (ULFM): the round is repeated without them",
    ABORT: "a rank that dies ends the job; continue with --resume",
}
LAUNCHER_SECONDS = 5  # in which a launcher that saw a rank fail ends the others
TURN_SECONDS, LAST_TURN = 0.3, 15  # of each living rank to end the others, by rank


def run_locally(options: argparse.Namespace, stop: StopRequest) -> int:
    """Server and one client rank as threads of this process."""
    from distfl.transport.local import group

    server, client = group(2, taking_turns=True)

    def run_client() -> None:
        try:
            _run_client(client)
        finally:
            client.leave()

    thread = threading.Thread(target=run_client, name="client rank", daemon=True)
    thread.start()
    try:
        return _run_server(server, options, stop)
    finally:
        server.leave()
        thread.join()


def run_rank(options: argparse.Namespace, stop: StopRequest) -> int:
    """This process's half of a run under a launcher."""
    backend = "auto"
    if launched_rank() == 0:
        with suppress(DistflError):  # what is wrong with the config is said when it is read again, to all ranks
            backend = settings.load(TrainConfig, options.config, options.overrides).transport.backend
    transport = _launched_transport(2, backend)
    code = _run_server(transport, options, stop) if transport.rank == 0 else _run_client(transport)
    return transport.leave(code)


def _launched_transport(smallest: int, backend: str = "auto") -> Transport:
    """That of the launcher that started this process.

    Args:
        backend: of torch.distributed; what rank 0 gives counts.
    """
    if launcher() == "mpi":
        from distfl.transport.mpi import world

        return world(smallest)
    from distfl.transport.torch_dist import TorchTransport

    return TorchTransport(smallest, backend)


def _end_after_loss(transport: Transport, error: RankLost) -> NoReturn:
    """Whoever ended first has said why and ends the job: this rank speaks only where no launcher sees to it. Where the launcher
    lets the others go on, the first living rank speaks and ends them."""
    time.sleep(min(transport.rank, LAST_TURN) * TURN_SECONDS if transport.recovers else LAUNCHER_SECONDS)
    print(f"distfl: rank {transport.rank}: {error}", file=sys.stderr, flush=True)
    transport.abort(1)


def _run_client(transport: Transport) -> int:
    """A client rank's life. Anything that escapes ends the whole job."""
    try:
        torch.set_num_threads(threads_per_rank())
        exact_allocator()
        gc.freeze()  # what the imports made lives as long as the process: no collection need look at it
        joined = join(transport)
        if joined is None:
            return EXIT_REFUSED
        state, cap = joined
        finished = work(state, cap)
        _keep_ledger(state)
        return 0 if finished else EXIT_REQUEUE
    except threading.BrokenBarrierError:  # local transport: the server has ended and said why
        return 1
    except RankLost as error:
        _end_after_loss(transport, error)
    except DistflError as error:
        print(f"distfl: rank {transport.rank}: {error}", file=sys.stderr, flush=True)
        transport.abort(EXIT_REFUSED)
    except KeyboardInterrupt:  # the server says it
        transport.abort(EXIT_INTERRUPTED)
    except BaseException:
        traceback.print_exc()
        transport.abort(1)


def _run_server(transport: Transport, options: argparse.Namespace, stop: StopRequest) -> int:
    """The server rank's life: refuse what cannot work before any rank trains, then serve."""
    folder, introduced = None, False
    try:
        torch.set_num_threads(threads_per_rank())
        exact_allocator()
        # imported here: a client rank runs this module too and must not pay for data and records
        from distfl.jobs import prepare
        from distfl.run_folder import RunFolder

        config = settings.load(TrainConfig, options.config, options.overrides)
        folder = RunFolder(config)
        if config.transport.name not in ("auto", transport.name):
            found = f"what started the ranks uses {transport.name}"
            raise ConfigError(f"transport.name = {config.transport.name}", found, "set transport.name=auto")
        folder.check(options.resume)
        say(f"reading the data ({config.data.corpus}) and choosing the depth")
        job = prepare(config)
        if options.resume:
            folder.check_same(job)
        with folder.claimed(options.resume):
            state = rank_state(transport, job.config, job.spec, job.shards)
            server = _server_state(job, state, folder, options.resume)
            if config.transport.collective == "auto":
                say(f"transport.collective: {job.config.transport.collective}; {job.collective_reason}")
            say(f"depth {job.selection.depth}, {len(job.clients)} clients; proving the memory caps")
            introduced = True
            ranks = introduce(job, state)
            losses = lost_ranks(job.config.faults, transport)
            if transport.name != "local":
                say(f"faults: {WHAT_BECOMES[losses]}")
            folder.begin(job, transport, ranks, losses, server.round if options.resume else None)
            return _serve_to_the_end(job, state, server, ranks, folder, stop)
    except RankLost as error:
        _end_after_loss(transport, error)
    except DistflError as error:
        print(f"distfl: {error}", file=sys.stderr, flush=True)
        if not introduced:
            refuse(transport)
        elif not isinstance(error, StartError):  # the ranks are in the middle of something
            transport.abort(1)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        say(f"interrupted {folder.how_to_go_on() if folder else 'before anything began'}")
        transport.abort(EXIT_INTERRUPTED)
    except threading.BrokenBarrierError:  # local transport: the client has ended and said why
        return 1
    except BaseException:
        traceback.print_exc()
        transport.abort(1)


def _keep_ledger(state: RankState) -> None:
    """Write what this rank has counted, if it is to be kept: nothing is sent after this."""
    run = state.config.run
    if run.keep_ledgers:
        write_json(Path(run.folder) / "ledgers" / f"{state.transport.rank}.json", state.transport.ledger.whole_run())


def _server_state(job: Job, state: RankState, folder: RunFolder, resume: bool) -> ServerState:
    """Where the last checkpoint left off; the pretrained model for a new run, or one that ended before its first checkpoint."""
    if resume and folder.last_checkpoint() is not None:
        server = checkpoints.load(folder.checkpoints, state.replica)
        say(f"resuming after round {server.round} of {job.config.rounds}")
        return server
    if resume:
        say("resuming before round 0: nothing was recorded yet")
    state.replica.fill(job.method.initial(job.family.tensors(job.selection.depth), job.config.seed))
    return ServerState(-1, state.replica)


def _serve_to_the_end(job: Job, state: RankState, server: ServerState, ranks: list[RankStart], folder: RunFolder, stop: StopRequest) -> int:
    """All rounds, then table and picture, then the mark."""
    from distfl import reporting
    from distfl.recording import Recorder

    recorder = Recorder(folder, server, job.clients)
    if server.round < 0 and not stop():
        say("scoring the pretrained model")
    finished = serve(job, state, server, ranks, recorder, recorder.fault, stop)
    if not finished and server.round >= 0:
        recorder.checkpoint()  # it may not have been due
    recorder.close()
    if not finished:
        dismiss(state.transport, finished)
        say(f"stopped on request {folder.how_to_go_on()}")
        return EXIT_REQUEUE
    run = reporting.read_run(folder.path)
    text = reporting.summary(run)
    write_atomically(folder.path / "summary.txt", text + "\n")
    folder.finish()
    dismiss(state.transport, finished)
    _keep_ledger(state)
    print(f"\n{text}\n", flush=True)
    if job.config.run.picture:
        _draw(run)
    return 0


def _draw(run: Run) -> None:
    """The picture; the run is done and its model is safe, whatever ails the drawing."""
    from distfl import reporting

    try:
        print(f"picture: {reporting.picture(run)}", flush=True)
    except Exception as error:
        print(f"distfl: no picture: {type(error).__name__}: {error}; try `distfl report {run.folder}`", file=sys.stderr, flush=True)


def run_pretraining(options: argparse.Namespace, launched: bool) -> int:
    """Pretrain a family in this process, or on all ranks the launcher started; rank 0 reads the config."""
    from distfl.pretrain import pretrain

    if launched:
        torch.set_num_threads(threads_per_rank())
        transport = _launched_transport(1)
    else:
        from distfl.transport.local import group

        transport = group(1)[0]
    try:
        values = None
        if transport.rank == 0:
            values = settings.to_dict(settings.load(PretrainConfig, options.config, options.overrides))
        config = settings.from_dict(PretrainConfig, transport.broadcast_value(values, "start"))
        family = pretrain(config, transport, options.resume)
    except RankLost as error:
        _end_after_loss(transport, error)
    except DistflError as error:
        print(f"distfl: {error}", file=sys.stderr, flush=True)
        transport.abort(EXIT_REFUSED)
    except KeyboardInterrupt:
        say("interrupted; continue with --resume")
        transport.abort(EXIT_INTERRUPTED)
    except BaseException:
        traceback.print_exc()
        transport.abort(1)
    if family is not None:
        print(f"family {family.folder}: depths {list(family.depths)}", flush=True)
    return transport.leave(0)


def load_model(source: str, depth: int | None) -> tuple[ModelSpec, dict[str, Tensor], Path]:
    """Shape, weights and tokenizer file of a run's merged model, as a plain one, or of one depth of a family.

    Raises:
        DistflError: neither a run nor a family, or the depth is missing.
    """
    from distfl.family import open_family

    folder = Path(source)
    if (folder / "manifest.json").is_file():
        if depth is not None:
            raise ConfigError(f"--depth {depth} of {folder}", "a run, whose model has one depth", "leave --depth away, or name a family")
        method, spec, tensors, family = _merged_model(folder)
        return spec, method.deployed(tensors), family.folder / "tokenizer.json"
    family = open_family(source)
    depth = depth or family.depths[-1]
    return family.spec(depth), family.tensors(depth), family.folder / "tokenizer.json"


def _merged_model(folder: Path) -> tuple[Method, ModelSpec, dict[str, Tensor], Family]:
    """Method, shape, shared tensors and family of a run, as its newest checkpoint has them (raises DistflError)."""
    from distfl.family import open_family
    from distfl.replica import Replica

    manifest = json.loads((folder / "manifest.json").read_text())
    family = open_family(manifest["family"])
    spec = family.spec(manifest["depth"])
    config = settings.load(TrainConfig, folder / "config.yaml")
    method = load_method(config.method.name, config.method.options)
    server = checkpoints.load(folder / "checkpoints", Replica(table_of(method, spec)))
    return method, spec, server.replica.tensors, family


def score_run(folder: Path) -> dict:
    """Loss and accuracy of a run's newest merged model on its clients' test text, total and per budget group."""
    from distfl.jobs import tokenised
    from distfl.reporting import read_run
    from distfl.training import evaluate

    run = read_run(folder)
    say("reading the data and scoring the newest merged model")
    method, spec, tensors, family = _merged_model(folder)
    shards = tokenised(run.config, family)
    if shards.checksum != run.manifest["tokens_checksum"]:
        raise DataError(f"evaluation of {folder}", "the data differs from that of the run", "restore the data the run was made with")
    model, total, groups = build_model(method, spec, tensors), Score(0.0, 0, 0), {}
    batch, most = run.config.evaluation.batch, run.config.evaluation.sequences
    for client, group in enumerate(run.manifest["groups"].values()):
        score = evaluate(model, shards.test(client, spec.context).in_order(batch, most))
        total, groups[group] = total + score, groups.get(group, Score(0.0, 0, 0)) + score
    return {
        "loss": total.loss,
        "accuracy": total.accuracy,
        "tokens": total.tokens,
        "groups": {group: {"loss": score.loss, "accuracy": score.accuracy} for group, score in groups.items()},
    }
