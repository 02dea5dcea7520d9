"""The ``distfl`` command. Builds what the other modules need and calls them; nothing else knows all of them.

Heavy modules are imported inside the commands that need them: a launcher that only waits for
mpirun imports neither torch nor MPI, and a client rank imports no more than it trains with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from distfl import __version__, launching, settings, starting
from distfl.config import CompareConfig, PretrainConfig, TrainConfig
from distfl.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, EXIT_REFUSED, ConfigError, DistflError, TransportError
from distfl.run_folder import RunFolder
from distfl.signals import StopRequest, end_with_parent


def main(arguments: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        stop: the request to stop, if its signal is handled already.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options, rank = _parse(arguments), launching.launched_rank() or 0
    options.stop = stop
    if launching.TORCHRUN_VARIABLE in os.environ:
        end_with_parent()  # torchrun itself may be killed
    if rank and not options.takes_ranks:  # one rank does it, and says it once
        return 0
    try:
        code = options.run(options, arguments)
        sys.stdout.flush()
        return code
    except DistflError as error:
        if rank == 0:  # what is refused here is refused alike on all ranks
            print(f"distfl: {error}", file=sys.stderr, flush=True)
        return EXIT_REFUSED
    except BrokenPipeError:  # the reader, `head` for instance, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Overrides may stand anywhere among the options."""
    parser = command_line()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


@cache  # ranks that are forked from one process share it
def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distfl", description="Federated fine-tuning of tiny Transformers under enforced memory caps.")
    parser.add_argument("--version", action="version", version=f"distfl {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, config: bool = False, ranks: bool = False) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run, takes_ranks=ranks)
        if config:
            added.add_argument("config", help="YAML file, see configs/")
            added.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the config")
        if ranks:
            added.add_argument("--ranks", type=int, metavar="N", help="start N ranks with mpirun or torchrun (not needed under them)")
            added.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
        return added

    command("train", _train, "run a federated fine-tuning", config=True, ranks=True)
    command("plan", _plan, "print depth, windows and predicted costs; nothing is trained", config=True)
    command("pretrain", _pretrain, "train a family: several depths, one tokenizer", config=True, ranks=True)
    command("evaluate", _evaluate, "score a run's merged model on its test text").add_argument("folder", type=Path, help="run folder")
    export = command("export", _export, "write a Hugging Face folder")
    export.add_argument("source", help="run folder, or family")
    export.add_argument("output", type=Path, help="new folder")
    export.add_argument("--depth", type=int, help="which depth of a family")
    imports = command("import", _import, "make a family of Hugging Face GPT-2 folders")
    imports.add_argument("folders", nargs="+", type=Path, help="folders of models that differ in depth only")
    imports.add_argument("--output", type=Path, required=True, help="new family folder")
    command("report", _report, "make table and picture of a run again").add_argument("folder", type=Path, help="run folder")
    audited = command("audit", _audit, "train under Open MPI's monitoring and explain every byte on every link", config=True)
    audited.add_argument("--ranks", type=int, metavar="N", help="start N ranks; not needed where CONFIG is the folder of an audited run")
    scale = command(
        "scale", _scale, "a scaling study: the same config on several numbers of ranks, audited, table and picture", config=True
    )
    scale.add_argument(
        "--ranks",
        required=True,
        metavar="N,N,...",
        help="numbers of ranks; {ranks} and {clients} stand for N and N - 1 in overrides",
    )
    scale.add_argument("--collectives", default="gather,reduce", help="which to compare (gather,reduce)")
    scale.add_argument(
        "--output", type=Path, default=Path("runs/scaling"), help="folder of the runs, which are kept, and of table and picture"
    )
    compare = command("compare", _compare, "methods x scenarios x seeds under equal caps: make the missing runs, table, pictures", True)
    compare.add_argument("--stage", choices=("tuning", "runs", "report", "list"), help="only that; without it: tuning, runs, report")
    compare.add_argument("--task", type=int, default=0, metavar="K", help="make only the runs of the K-th worker of --tasks")
    compare.add_argument("--tasks", type=int, default=1, metavar="N", help="number of workers, see slurm/compare.sbatch")
    compare.add_argument(
        "--results",
        type=Path,
        action="append",
        metavar="CSV",
        help="report on this comparison.csv in place of run folders; its picture comes to lie beside it",
    )
    calibrate = command("calibrate", _calibrate, "compare predicted with measured peaks on this machine, some minutes")
    calibrate.add_argument("--output", type=Path, default=Path("runs/calibration"), help="folder for table and picture")
    calibrate.add_argument("--draw", type=int, metavar="COUNT", help="compare so many cases drawn at random in place of the grid")
    calibrate.add_argument("--seed", type=int, default=0, help="of the draws")
    command("doctor", _doctor, "say what works on this machine, and how to mend what does not")
    return parser


# --- train -----------------------------------------------------------------------------------


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    stop = options.stop or StopRequest()  # before the slow imports: from here on the signal does not end the process
    size = launching.launched_size()
    launching.threads_per_rank()  # refused here if it is no number
    if size is not None:
        _check_not_launched(options, size)
        from distfl.running import run_rank

        return run_rank(options, stop)
    config = settings.load(TrainConfig, options.config, options.overrides)
    if options.ranks is not None:
        return _train_on_ranks(config, options, arguments, stop)
    if config.transport.name in ("mpi", "torch"):
        raise ConfigError(f"transport.name = {config.transport.name}", "no launcher started this process", "add --ranks N")
    from distfl.running import run_locally

    return run_locally(options, stop)


def _train_on_ranks(config: TrainConfig, options: argparse.Namespace, arguments: list[str], stop: StopRequest) -> int:
    _check_ranks(options.ranks)
    if config.transport.name == "local":
        raise ConfigError("transport.name = local", f"--ranks {options.ranks} was given too", "leave one of them away")
    folder = RunFolder(config)
    folder.check(options.resume)  # cheap, and without the notices of a launcher
    flags = []
    if config.transport.name != "torch":
        flags = [*starting.flags(config.launch.start, options.ranks), *launching.recovery_flags(config.faults.recover)]
    launching.say(f"starting {options.ranks} ranks")
    code = launching.run_ranks(options.ranks, arguments, stop, config.transport.name, flags, folder.beginning())
    if code == EXIT_INTERRUPTED:
        launching.say(f"interrupted {folder.how_to_go_on()}")
    if code == 0 and not folder.is_finished:  # mpirun says so when it is ended from outside, or all ranks are killed
        launching.say(f"the ranks ended {folder.how_to_go_on()}")
        return 1
    return code


def _check_ranks(ranks: int | None) -> None:
    if ranks is None or ranks < 2:
        raise TransportError(
            "no --ranks" if ranks is None else f"--ranks {ranks}",
            "a run on ranks needs a server rank and at least one client rank",
            "use --ranks 2 or more (train without it runs in one process)",
        )


def _check_not_launched(options: argparse.Namespace, size: int) -> None:
    if options.ranks not in (None, size):  # the launcher of --ranks hands its own arguments on
        raise TransportError(f"--ranks {options.ranks}", f"a launcher has started {size} ranks already", "leave --ranks away")


# --- the other commands ----------------------------------------------------------------------


def _plan(options: argparse.Namespace, arguments: list[str]) -> int:
    from distfl.jobs import prepare
    from distfl.plans import describe

    print(describe(prepare(settings.load(TrainConfig, options.config, options.overrides))))
    return 0


def _pretrain(options: argparse.Namespace, arguments: list[str]) -> int:
    size = launching.launched_size()
    if size is not None:
        _check_not_launched(options, size)
    elif options.ranks is not None:
        settings.load(PretrainConfig, options.config, options.overrides)  # refused here, before any rank starts
        if options.ranks < 1:
            raise TransportError(f"--ranks {options.ranks}", "at least one rank is needed", "use --ranks 1 or more, or leave it away")
        code = launching.run_ranks(options.ranks, arguments)
        if code == EXIT_INTERRUPTED:
            launching.say("interrupted; continue with --resume")
        return code
    from distfl.running import run_pretraining

    return run_pretraining(options, launched=size is not None)


def _evaluate(options: argparse.Namespace, arguments: list[str]) -> int:
    from distfl.running import score_run

    print(json.dumps(score_run(options.folder), indent=1))
    return 0


def _export(options: argparse.Namespace, arguments: list[str]) -> int:
    from distfl import huggingface
    from distfl.running import load_model

    spec, tensors, tokenizer = load_model(options.source, options.depth)
    huggingface.export(spec, tensors, tokenizer, options.output)
    print(f"{options.output}: a GPT-2 of {spec.depth} blocks for transformers")
    return 0


def _import(options: argparse.Namespace, arguments: list[str]) -> int:
    from distfl.huggingface import import_family

    family = import_family(options.folders, options.output)
    print(f"{family.folder}: a family of depths {list(family.depths)}")
    return 0


def _report(options: argparse.Namespace, arguments: list[str]) -> int:
    from distfl import reporting

    run = reporting.read_run(options.folder)
    print(reporting.summary(run))
    print(f"\npicture: {reporting.picture(run)}")
    return 0


def _audit(options: argparse.Namespace, arguments: list[str]) -> int:
    from distfl.audit import audit

    if (Path(options.config) / "manifest.json").is_file():
        if options.overrides or options.ranks:
            found = " ".join([*options.overrides, *(["--ranks"] if options.ranks else [])])
            raise ConfigError(f"an audit of the run in {options.config}", f"also {found}", "leave that away, or name a config")
        return audit(Path(options.config))
    _check_starts_ranks("audit")
    _check_ranks(options.ranks)
    folder, code = _run_audited(options.config, options.overrides, options.ranks)
    return code or audit(folder)


def _check_starts_ranks(command: str) -> None:
    if (size := launching.launched_size()) is not None:
        raise TransportError(f"distfl {command}", f"a launcher has started {size} ranks already", "start it alone: it starts ranks itself")


AUDITED = ["run.keep_ledgers=true", "transport.name=mpi", "faults.recover=off"]  # ULFM would switch monitoring off


def _run_audited(config: str, overrides: list[str], ranks: int) -> tuple[Path, int]:
    """A run under monitoring; its folder and exit code."""
    from distfl.audit import links_prefix
    from distfl.links import monitoring_flags

    overrides = [*overrides, *AUDITED]
    loaded = settings.load(TrainConfig, config, overrides)
    folder = RunFolder(loaded)
    folder.check(resume=False)
    flags = [*starting.flags(loaded.launch.start, ranks), *monitoring_flags(links_prefix(folder.path))]
    return folder.path, launching.run_ranks(ranks, ["train", config, *overrides], flags=flags, has_begun=folder.beginning())


def _scale(options: argparse.Namespace, arguments: list[str]) -> int:
    from distfl import scaling

    def overrides(ranks: int, collective: str, folder: Path) -> list[str]:
        own = [word.replace("{ranks}", str(ranks)).replace("{clients}", str(ranks - 1)) for word in options.overrides]
        return [*own, f"transport.collective={collective}", f"run.folder={folder}"]

    def config_of(*run: Any) -> TrainConfig:
        return settings.load(TrainConfig, options.config, [*overrides(*run), *AUDITED])

    def start(ranks: int, collective: str, folder: Path) -> int:
        return _run_audited(options.config, overrides(ranks, collective, folder), ranks)[1]

    _check_starts_ranks("scale")
    ranks = options.ranks.split(",")
    if not all(word.isdecimal() for word in ranks):
        raise ConfigError(f"--ranks {options.ranks}", "not a list of numbers", "give numbers such as 3,5,9")
    points = scaling.study([*map(int, ranks)], options.collectives.split(","), options.output, config_of, start, launching.say)
    picture = scaling.write(points, options.output)
    print(f"{scaling.text(points)}\npicture: {picture}")
    return 1 if any(point.unexplained_bytes for point in points) else 0


def _compare(options: argparse.Namespace, arguments: list[str]) -> int:
    from distfl import comparison_pictures, comparison_tables, standings
    from distfl.comparison import Comparison, make, share_of

    _check_starts_ranks("compare")
    stop = options.stop or StopRequest()
    comparison = Comparison(Path(options.config), settings.load(CompareConfig, options.config, options.overrides))

    if options.tasks != 1 and options.stage in ("report", "list"):
        raise ConfigError(f"--tasks {options.tasks}", f"--stage {options.stage} is for one process", "leave --task and --tasks away")
    if options.results:
        if options.stage != "report":
            raise ConfigError("--results", f"--stage is {options.stage}, and only a report is made of results", "add --stage report")
        results = [result for path in options.results for result in comparison_tables.read_results(path)]
        found = standings.standings_of(comparison, results)
        print(comparison_tables.text(comparison, found))
        print(comparison_pictures.draw_overview(comparison, found, options.results[0].with_suffix(".png")))
        return 0

    def start(training: list[str], resume: bool) -> int:
        training = [*training, *(["--resume"] if resume else [])]
        if comparison.config.ranks:
            training += ["--ranks", str(comparison.config.ranks)]
        return launching.run_child(training)

    if options.stage == "list":
        trials = comparison.tuning()
        if tuned := all(trial.is_settled for trial in trials):
            trials += comparison.trials()
        for trial in trials:
            print("refused " if trial.refusal else "finished" if trial.is_settled else "open    ", trial.folder)
        if not tuned:
            print("the other runs follow once these learning rates are tuned")
        return 0
    if options.stage != "report":
        launching.say("trying every method in every scenario as far as a plan")
        comparison.check(options.task, options.tasks)
    for stage, trials_of in (("tuning", comparison.tuning), ("runs", comparison.trials)):
        if options.stage in (None, stage):
            failed, code = make(share_of(trials_of(), options.task, options.tasks), start, launching.say, stop)
            if failed:  # said also where a signal has ended it
                launching.say(f"failed: {', '.join(str(trial.folder) for trial in failed)}; start again to go on with them")
            if failed or code:
                return code or 1
    if options.stage in (None, "report"):
        found = standings.standings(comparison)
        print(comparison_tables.text(comparison, found))
        pictures = (comparison_pictures.draw_overview, "comparison.png"), (comparison_pictures.draw_rounds, "rounds.png")
        drawn = [draw(comparison, found, comparison.output / name) for draw, name in pictures]
        print("\n".join(map(str, [*comparison_tables.write(comparison, found), *drawn])))
    return 0


def _calibrate(options: argparse.Namespace, arguments: list[str]) -> int:
    import torch

    from distfl import calibration
    from distfl.allocator import exact_allocator

    if options.draw is not None and options.draw < 1:
        raise ConfigError(f"--draw {options.draw}", "not a number of cases", "give 1 or more, or leave --draw away for the grid")
    torch.set_num_threads(launching.threads_per_rank())
    exact_allocator()
    cases = calibration.grid() if options.draw is None else calibration.drawn(options.draw, options.seed)
    found = calibration.calibrate(cases, options.output, lambda text: print(text, flush=True))
    print(f"\n{calibration.verdict(found)}\npicture: {calibration.picture(found, options.output / 'calibration.png')}")
    return 0


def _doctor(options: argparse.Namespace, arguments: list[str]) -> int:
    from distfl.doctor import examine

    return examine()
