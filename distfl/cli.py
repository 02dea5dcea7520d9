"""The ``distfl`` command. Builds what the other modules need and calls them; nothing else knows all of them.

Heavy modules are imported inside the commands that need them: a launcher that only waits for
mpirun imports neither torch nor MPI, and a client rank imports no more than it trains with.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from distfl import launching, settings
from distfl.config import PretrainConfig, TrainConfig
from distfl.errors import EXIT_REFUSED, ConfigError, DistflError, TransportError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    try:
        return options.run(options, arguments)
    except DistflError as error:
        print(f"distfl: {error}", file=sys.stderr, flush=True)
        return EXIT_REFUSED


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Overrides may stand anywhere among the options."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distfl", description="Federated fine-tuning of tiny Transformers under enforced memory caps.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, config: bool = False, ranks: bool = False) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        if config:
            added.add_argument("config", help="YAML file, see configs/")
            added.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the config")
        if ranks:
            added.add_argument("--ranks", type=int, metavar="N", help="start N ranks with mpirun (not needed under mpirun or srun)")
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
    command("doctor", _doctor, "say what works on this machine, and how to mend what does not")
    return parser


# --- train -----------------------------------------------------------------------------------


def _train(options: argparse.Namespace, arguments: list[str]) -> int:
    size = launching.launched_size()
    if size is None:
        config = settings.load(TrainConfig, options.config, options.overrides)
        if options.ranks is not None:
            _check_ranks(config, options.ranks)
            return launching.run_ranks(options.ranks, arguments)
        if config.transport.name == "mpi":
            raise ConfigError(
                "transport.name = mpi", "this process was not started by an MPI launcher", "add --ranks N, or start it with mpirun -n N"
            )
    stop = launching.StopRequest()  # before the slow imports: from here on the signal does not end the process
    from distfl.running import run_locally, run_rank

    return run_locally(options, stop) if size is None else run_rank(options, stop)


def _check_ranks(config: TrainConfig, ranks: int) -> None:
    if ranks < 2:
        raise TransportError(
            f"--ranks {ranks}",
            "a run needs a server rank and at least one client rank",
            "use --ranks 2 or more, or leave it away to run in one process",
        )
    if config.transport.name == "local":
        raise ConfigError("transport.name = local", f"--ranks {ranks} was given too", "leave one of them away")


# --- the other commands ----------------------------------------------------------------------


def _plan(options: argparse.Namespace, arguments: list[str]) -> int:
    from distfl.jobs import prepare
    from distfl.plans import describe

    print(describe(prepare(settings.load(TrainConfig, options.config, options.overrides))))
    return 0


def _pretrain(options: argparse.Namespace, arguments: list[str]) -> int:
    size = launching.launched_size()
    if size is None and options.ranks is not None:
        settings.load(PretrainConfig, options.config, options.overrides)  # refused here, before any rank starts
        if options.ranks < 1:
            raise TransportError(f"--ranks {options.ranks}", "at least one rank is needed", "use --ranks 1 or more, or leave it away")
        return launching.run_ranks(options.ranks, arguments)
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


def _doctor(options: argparse.Namespace, arguments: list[str]) -> int:
    from distfl.doctor import examine

    return examine()
