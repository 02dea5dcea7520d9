"""A comparison of methods under equal caps: which runs it takes, and making those that are missing.

Every run is an ordinary one with a folder of its own, so that a comparison that was cut short goes on where it ended, one run
after another or many at once. Learning rates are tuned first: for every method and every scenario that tunes, each rate is run
once, with a seed of its own; the lowest loss on held-out text decides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from distfl import settings
from distfl.config import CompareConfig, ContenderConfig, ScenarioConfig, TrainConfig
from distfl.errors import EXIT_REQUEUE, CheckpointError, ConfigError, DistflError, PlanError
from distfl.files import write_json
from distfl.reporting import Run, read_run
from distfl.run_folder import source_checksum

SIGNALLED = 128  # exit codes above say by which signal
REFUSED = ".refused.json"  # beside a run's folder: why no client of this method can take part, and with which config
OWN_KEYS = ("seed", "run.folder", "method")  # what a comparison sets itself
# what must be the same for all methods of a scenario: caps, text, family, rounds and their size
ALIKE = ("fleet", "memory", "faults", "data", "model.family", "evaluation", "rounds", "training.batch", "training.epochs", "training.steps")
T = TypeVar("T")
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
        """Why the method cannot take part in the scenario; None where it can, or nobody has tried with this config."""
        if not self._refused.is_file():
            return None
        refused = json.loads(self._refused.read_text())
        return None if self._differences(refused["config"]) else refused["why"]

    def refuse(self, why: str) -> None:
        refused = {"why": why, "source_checksum": source_checksum(), "config": settings.to_dict(self.config())}
        write_json(self._refused, refused)

    @property
    def _refused(self) -> Path:
        return self.folder.with_name(self.folder.name + REFUSED)

    @property
    def is_settled(self) -> bool:
        """Nothing is left to be done (raises CheckpointError as ``run`` does). Another version of the package may plan otherwise, so
        a refusal is good for its own alone."""
        if self.run() is not None:
            return True
        return self.refusal is not None and json.loads(self._refused.read_text()).get("source_checksum") == source_checksum()

    @property
    def has_begun(self) -> bool:
        """Whether there is a run in its folder, or a refusal, of whatever config."""
        return (self.folder / "config.yaml").is_file() or self._refused.is_file()

    def run(self) -> Run | None:
        """The finished run; None where there is none yet.

        Raises:
            CheckpointError: what lies in its folder is a run of another config.
        """
        if not (self.folder / "finished").is_file():
            return None
        run = read_run(self.folder)
        if different := self._differences(settings.to_dict(run.config)):
            raise CheckpointError(
                f"{self.contender} in {self.scenario}, seed {self.seed}, from {self.folder}",
                f"a run whose {different} differ",
                "set output to another folder, or delete that one",
            )
        return run

    def _differences(self, found: dict) -> list[str]:
        """Sections of a config that are not as wanted; where a run lies and how it is started does not matter."""
        found, wanted = json.loads(json.dumps(found)), json.loads(json.dumps(settings.to_dict(self.config())))
        return [key for key in wanted if key not in ("run", "launch") and found.get(key) != wanted[key]]


class Comparison:
    """A comparison's runs.

    Raises:
        ConfigError: some run's config cannot be.
    """

    def __init__(self, path: Path, config: CompareConfig):
        from distfl.methods.base import load_method

        self.config, self.output = config, Path(config.output)
        self._train = path.parent / config.train
        self._base = settings.load(TrainConfig, self._train)
        _refuse_keys("tuning.overrides", config.tuning.overrides, self._set_keys)
        for contender in config.methods:
            load_method(contender.method, contender.options)
            _refuse_keys(f"overrides of the method {label(contender)}", contender.overrides, (*self._set_keys, *ALIKE))
        for scenario in config.scenarios:
            _refuse_keys(f"overrides of the scenario {scenario.name}", scenario.overrides, self._set_keys)
            for contender in self.contenders(scenario):  # refused before anything runs
                for seed in config.seeds:
                    self._trial(scenario, contender, seed, None, "runs").config()
        for trial in self.tuning():
            trial.config()

    def check(self, task: int = 0, tasks: int = 1) -> None:
        """Try every method in every scenario that has not begun, as far as a plan: what would only come to light hours later.

        Args:
            task, tasks: as of ``share_of``.

        Raises:
            DistflError: some run cannot be; that a method cannot take part is no error, unless its learning rate comes from there.
        """
        reasons: dict[Path, str | None] = {}  # rates of one scenario may serve many
        for scenario, contender in share_of(self._pairs, task, tasks):
            where = self._rates_from(scenario)
            run, tuning = self._trial(scenario, contender, self.config.seeds[0], None, "runs"), self._tuning_of(where, contender)
            if any(trial.has_begun for trial in (run, *tuning)):
                continue
            for trial in (run, *tuning[:1]):
                if trial.folder not in reasons:
                    reasons[trial.folder] = why_not(trial)
            if scenario is not where and reasons[run.folder] is None and tuning and reasons[tuning[0].folder] is not None:
                raise _untuned(scenario, where, contender)

    @property
    def _set_keys(self) -> tuple[str, ...]:
        tuned = ("training.learning_rate", "training.final_learning_rate") if self.config.tuning.learning_rates else ()
        return (*OWN_KEYS, *tuned)

    @property
    def labels(self) -> list[str]:
        return [label(contender) for contender in self.config.methods]

    @property
    def places(self) -> list[tuple[str, str]]:
        """Scenarios with each method that is compared there, in the order of the config."""
        return [(scenario.name, label(contender)) for scenario, contender in self._pairs]

    @property
    def _pairs(self) -> list[tuple[ScenarioConfig, ContenderConfig]]:
        return [(scenario, contender) for scenario in self.config.scenarios for contender in self.contenders(scenario)]

    def contenders(self, scenario: ScenarioConfig) -> list[ContenderConfig]:
        """Methods that are compared in a scenario."""
        return [contender for contender in self.config.methods if scenario.methods is None or label(contender) in scenario.methods]

    def tuning(self) -> list[Trial]:
        """The runs that choose learning rates."""
        pairs = {  # where rates are tuned, and for whom: once, however many scenarios take them from there
            (scenario.rates_of or scenario.name, label(contender)): contender for scenario, contender in self._pairs
        }
        where = {scenario.name: scenario for scenario in self.config.scenarios}
        return [trial for (name, _), contender in pairs.items() for trial in self._tuning_of(where[name], contender)]

    def trials(self) -> list[Trial]:
        """The runs that are compared, seed by seed, so that a first picture is there early.

        Raises:
            CheckpointError: a run that chooses a learning rate is missing, or all of them diverged.
            ConfigError: a method takes its learning rate from a scenario in which it cannot take part.
        """
        rated = [(*pair, self.learning_rate(*pair)) for pair in self._pairs]
        return [self._trial(*one, seed, rate, "runs") for seed in self.config.seeds for *one, rate in rated]

    def learning_rate(self, scenario: ScenarioConfig, contender: ContenderConfig) -> float | None:
        """The tuned one; the first of the list where the method cannot take part, None where none is tuned (raises as ``trials``)."""
        where = self._rates_from(scenario)
        losses = {}
        for trial in self._tuning_of(where, contender):
            if (run := trial.run()) is not None:
                loss = run.evaluated[-1]["test_loss"]
                losses[trial.learning_rate] = loss if math.isfinite(loss) else math.inf
            elif trial.refusal:
                self._check_refused(scenario, where, contender, trial.learning_rate)
                return trial.learning_rate
            else:
                raise CheckpointError(
                    f"the learning rate of {label(contender)} in {scenario.name}",
                    f"{trial.folder} is not finished",
                    "run the tuning first: distfl compare CONFIG --stage tuning",
                )
        if losses and not math.isfinite(min(losses.values())):
            raise CheckpointError(
                f"the learning rate of {label(contender)} in {where.name}",
                f"with all of {sorted(losses)} the loss is not finite",
                "add lower ones to tuning.learning_rates",
            )
        return min(losses, key=losses.get, default=None)

    def _check_refused(self, scenario: ScenarioConfig, where: ScenarioConfig, contender: ContenderConfig, rate: float) -> None:
        """That a method without a tuned rate does not run with one that nobody tuned."""
        own = self._trial(scenario, contender, self.config.seeds[0], rate, "runs")
        if scenario is not where and own.refusal is None and why_not(own) is None:
            raise _untuned(scenario, where, contender)

    def _rates_from(self, scenario: ScenarioConfig) -> ScenarioConfig:
        """Where its learning rates are tuned."""
        return next(one for one in self.config.scenarios if one.name == (scenario.rates_of or scenario.name))

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


def _untuned(scenario: ScenarioConfig, where: ScenarioConfig, contender: ContenderConfig) -> ConfigError:
    return ConfigError(
        f"the learning rate of {label(contender)} in {scenario.name}, rates_of {where.name}",
        "in that scenario it cannot take part, so no rate of it can be tuned there",
        f"leave rates_of of {scenario.name} away, or name a scenario in which every method can take part",
    )


def label(contender: ContenderConfig) -> str:
    """What tables and folders call it."""
    return contender.label or contender.method


def _refuse_keys(what: str, overrides: Sequence[str], keys: Sequence[str]) -> None:
    """Refuse overrides of settings that are the comparison's own, or that must be the same for all."""
    for override in overrides:
        name = override.partition("=")[0].strip()
        if found := [key for key in keys if name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.")]:
            raise ConfigError(
                f"{what}: {override}", f"{found[0]} is for the comparison to set, alike for all methods", f"leave {name} away there"
            )


def share_of(work: Sequence[T], task: int, tasks: int) -> list[T]:
    """Those of one of several workers (raises ConfigError)."""
    if not 0 <= task < tasks:
        raise ConfigError(f"--task {task} of --tasks {tasks}", "tasks count from 0", f"give a number from 0 to {tasks - 1}")
    return list(work[task::tasks])


def make(
    trials: Sequence[Trial], start: Start, say: Callable[[str], None], stop: Callable[[], bool] = lambda: False
) -> tuple[list[Trial], int]:
    """Make the runs that are missing, one after another.

    Args:
        stop: asked before each of them.

    Returns:
        Those that failed, and the exit code that asked to stop: 0, or that of a run ended by a signal.
    """
    failed = []
    for number, trial in enumerate(trials, start=1):
        if stop():
            return failed, EXIT_REQUEUE
        what = f"{number} of {len(trials)}: {trial.scenario}, {trial.contender}, seed {trial.seed}"
        what += f", learning rate {trial.learning_rate:g}" if trial.learning_rate is not None else ""
        if trial.is_settled:
            continue
        try:
            why = why_not(trial)
        except DistflError as error:  # of this one alone: the others go on
            say(f"{what}: {error}")
            failed.append(trial)
            continue
        if why:
            say(f"{what}: cannot take part: {why}")
            trial.refuse(why)
            continue
        say(what)
        code = start(["train", *trial.arguments], (trial.folder / "config.yaml").is_file())
        if code == EXIT_REQUEUE or code > SIGNALLED:
            return failed, code
        if code:
            say(f"{what}: exit code {code}")
            failed.append(trial)
    return failed, 0


def why_not(trial: Trial) -> str | None:
    """Why no client can take part, in a line; None where some can (raises DistflError where no run can be at all)."""
    from distfl.jobs import prepare

    try:
        prepare(trial.config())
    except PlanError as error:
        return f"{error.asked}: {error.found}"
    return None
