"""A comparison of methods under equal caps: which runs it takes, and making those that are missing.

Every run is an ordinary one with a folder of its own, so that a comparison that was cut short goes on where it ended, one run
after another or many at once. Learning rates are tuned first: for every method and every scenario that tunes, each rate is run
once, with a seed of its own; the lowest loss on held-out text decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distfl import settings
from distfl.config import CompareConfig, ContenderConfig, ScenarioConfig, TrainConfig
from distfl.errors import EXIT_REQUEUE, CheckpointError, ConfigError, PlanError
from distfl.files import write_atomically
from distfl.reporting import Run, read_run

SIGNALLED = 128  # exit codes above say by which signal
REFUSED = "refused.txt"  # beside a run's folder: why no client of this method can take part
Start = Callable[[list[str], bool], int]  # arguments of a training, whether to resume -> exit code


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Args:
        learning_rate: None = that of the training config.
        arguments: config file and overrides of the training.
    """

    scenario: str
    contender: str
    seed: int
    learning_rate: float | None
    folder: Path
    arguments: tuple[str, ...]

    def config(self) -> TrainConfig:
        """What it is made with (raises ConfigError)."""
        return settings.load(TrainConfig, self.arguments[0], list(self.arguments[1:]))

    @property
    def refusal(self) -> str | None:
        """Why the method cannot take part in the scenario; None where it can, or nobody has tried."""
        path = self.folder.with_suffix(f".{REFUSED}")
        return path.read_text().strip() if path.is_file() else None

    def refuse(self, why: str) -> None:
        write_atomically(self.folder.with_suffix(f".{REFUSED}"), why + "\n")

    @property
    def is_settled(self) -> bool:
        """Nothing is left to be done (raises CheckpointError as ``run`` does)."""
        return self.refusal is not None or self.run() is not None

    def run(self) -> Run | None:
        """The finished run; None where there is none yet.

        Raises:
            CheckpointError: what lies in its folder is a run of another config.
        """
        if not (self.folder / "finished").is_file():
            return None
        run = read_run(self.folder)
        found, wanted = settings.to_dict(run.config), settings.to_dict(self.config())
        if different := [key for key in wanted if key not in ("run", "launch") and found[key] != wanted[key]]:
            raise CheckpointError(
                f"{self.contender} in {self.scenario}, seed {self.seed}, from {self.folder}",
                f"a run whose {different} differ",
                "set output to another folder, or delete that one",
            )
        return run


class Comparison:
    """A comparison's runs.

    Raises:
        ConfigError: some run's config cannot be.
    """

    def __init__(self, path: Path, config: CompareConfig):
        self.config, self.output = config, Path(config.output)
        self._train = path.parent / config.train
        self._base = settings.load(TrainConfig, self._train)
        for scenario in config.scenarios:
            for contender in self.contenders(scenario):
                self._trial(scenario, contender, config.seeds[0], None, "runs").config()  # refused before anything runs

    @property
    def labels(self) -> list[str]:
        return [label(contender) for contender in self.config.methods]

    def contenders(self, scenario: ScenarioConfig) -> list[ContenderConfig]:
        """Methods that are compared in a scenario."""
        return [contender for contender in self.config.methods if scenario.methods is None or label(contender) in scenario.methods]

    def tuning(self) -> list[Trial]:
        """The runs that choose learning rates."""
        pairs = {  # where rates are tuned, and for whom: once, however many scenarios take them from there
            (scenario.rates_of or scenario.name, label(contender)): contender
            for scenario in self.config.scenarios
            for contender in self.contenders(scenario)
        }
        where = {scenario.name: scenario for scenario in self.config.scenarios}
        return [trial for (name, _), contender in pairs.items() for trial in self._tuning_of(where[name], contender)]

    def trials(self) -> list[Trial]:
        """The runs that are compared, seed by seed, so that a first picture is there early.

        Raises:
            CheckpointError: a run that chooses a learning rate is missing.
        """
        return [
            self._trial(scenario, contender, seed, self.learning_rate(scenario, contender), "runs")
            for seed in self.config.seeds
            for scenario in self.config.scenarios
            for contender in self.contenders(scenario)
        ]

    def learning_rate(self, scenario: ScenarioConfig, contender: ContenderConfig) -> float | None:
        """The tuned one; the first of the list where the method cannot take part, None where none is tuned."""
        where = next(one for one in self.config.scenarios if one.name == (scenario.rates_of or scenario.name))
        losses = {}
        for trial in self._tuning_of(where, contender):
            if trial.refusal:
                return trial.learning_rate
            if (run := trial.run()) is None:
                raise CheckpointError(
                    f"the learning rate of {label(contender)} in {scenario.name}",
                    f"{trial.folder} is not finished",
                    "run the tuning first: distfl compare CONFIG --stage tuning",
                )
            losses[trial.learning_rate] = run.evaluated[-1]["test_loss"]
        return min(losses, key=losses.get, default=None)

    def _tuning_of(self, scenario: ScenarioConfig, contender: ContenderConfig) -> list[Trial]:
        tuning = self.config.tuning
        return [
            self._trial(scenario, contender, tuning.seed, rate, "tuning", f"-rate-{rate:g}", tuning.overrides)
            for rate in tuning.learning_rates
        ]

    def _trial(
        self,
        scenario: ScenarioConfig,
        contender: ContenderConfig,
        seed: int,
        rate: float | None,
        stage: str,
        suffix: str = "",
        more: Sequence[str] = (),
    ) -> Trial:
        folder = self.output / stage / scenario.name / label(contender) / f"seed-{seed}{suffix}"
        overrides = [*scenario.overrides, *contender.overrides, *more, f"seed={seed}", f"run.folder={folder}"]
        overrides += [f"method.name={contender.method}", f"method.options={json.dumps(contender.options)}"]
        if rate is not None:
            overrides.append(f"training.learning_rate={rate}")
            if (last := self._base.training.final_learning_rate) is not None:  # the schedule keeps its shape
                overrides.append(f"training.final_learning_rate={rate * last / self._base.training.learning_rate}")
        return Trial(scenario.name, label(contender), seed, rate, folder, (str(self._train), *overrides))


def label(contender: ContenderConfig) -> str:
    """What tables and folders call it."""
    return contender.label or contender.method


def share_of(trials: Sequence[Trial], task: int, tasks: int) -> list[Trial]:
    """Those of one of several workers (raises ConfigError)."""
    if not 0 <= task < tasks:
        raise ConfigError(f"--task {task} of --tasks {tasks}", "tasks count from 0", f"give a number from 0 to {tasks - 1}")
    return list(trials[task::tasks])


def make(trials: Sequence[Trial], start: Start, say: Callable[[str], None]) -> tuple[list[Trial], int]:
    """Make the runs that are missing, one after another.

    Returns:
        Those that failed, and the exit code that asked to stop: 0, or that of a run ended by a signal.
    """
    failed = []
    for number, trial in enumerate(trials, start=1):
        what = f"{number} of {len(trials)}: {trial.scenario}, {trial.contender}, seed {trial.seed}"
        what += f", learning rate {trial.learning_rate:g}" if trial.learning_rate is not None else ""
        if trial.is_settled:
            continue
        if why := why_not(trial):
            say(f"{what}: cannot take part: {why}")
            trial.refuse(why)
            continue
        say(what)
        begun = (trial.folder / "config.yaml").is_file()
        code = start(["train", *trial.arguments], begun)
        if code == EXIT_REQUEUE or code > SIGNALLED:
            return failed, code
        if code:
            say(f"{what}: exit code {code}")
            failed.append(trial)
    return failed, 0


def why_not(trial: Trial) -> str | None:
    """Why no client can take part, in a line; None where some can."""
    from distfl.jobs import prepare

    try:
        prepare(trial.config())
    except PlanError as error:
        return f"{error.asked}: {error.found}"
    return None
