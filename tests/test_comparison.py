"""A comparison's runs, learning rates, figures: on run folders that are written here, without training anything."""

import csv
import io
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from distfl import cli, comparison, comparison_pictures, comparison_tables, settings, standings
from distfl.comparison import Comparison, make, share_of
from distfl.config import CompareConfig, TrainConfig
from distfl.errors import EXIT_REQUEUE, CheckpointError, ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
TRAIN = {
    "fleet": {"groups": [{"name": "all", "memory_mb": 20, "share": 1}]},
    "training": {"steps": 2, "learning_rate": 1e-3, "final_learning_rate": 1e-4, "schedule": "cosine"},
    "rounds": 3,
}
COMPARE = {
    "train": "train.yaml",
    "seeds": [1, 2, 3],
    "methods": [{"method": "caff"}, {"method": "caff", "label": "wide", "options": {"extra_blocks": {"all": 1}}}],
    "scenarios": [
        {"name": "small", "overrides": ["fleet.groups.0.memory_mb=10"], "axis": "cap", "value": 10},
        {"name": "large", "axis": "cap", "value": 20, "rates_of": "small"},
    ],
    "tuning": {"learning_rates": [1e-3, 4e-3], "overrides": ["rounds=1"]},
}
DIVERGES = 9.0  # a learning rate
ACCURACY = {("caff", 1): 0.30, ("caff", 2): 0.32, ("caff", 3): 0.31, ("wide", 1): 0.28, ("wide", 2): 0.31, ("wide", 3): 0.27}


@pytest.fixture
def compare(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "why_not", lambda trial: None)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAIN))

    def made(**changes) -> Comparison:
        config = settings.from_dict(CompareConfig, COMPARE | {"output": str(tmp_path / "out")} | changes)
        return Comparison(tmp_path / "compare.yaml", config)

    return made


class Trainings:
    """Stands for the command: writes a run folder whose figures follow from its config."""

    def __init__(self, codes=(), tokens="t", weights="w", enforced_by="rlimit"):
        self.started, self._codes = [], list(codes)
        self.tokens, self.weights, self.enforced_by = tokens, weights, enforced_by

    def __call__(self, arguments: list[str], resume: bool) -> int:
        config = settings.load(TrainConfig, arguments[1], arguments[2:])
        self.started.append((config, resume))
        if self._codes and (code := self._codes.pop(0)):
            return code
        label = "wide" if config.method.options else "caff"
        rate, seed = config.training.learning_rate, config.seed
        accuracy = ACCURACY.get((label, seed), 0.1)
        loss = 2.0 + (rate != {"caff": 4e-3, "wide": 1e-3}[label]) - accuracy if rate != DIVERGES else math.nan
        folder = comparison.Path(config.run.folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(settings.to_yaml(config))
        starts = [
            {"torch": "1", "library": "first", "memory_enforced_by": "rlimit", "source_checksum": "a"},
            {"torch": "2", "library": "", "memory_enforced_by": self.enforced_by, "source_checksum": "b"},
        ]
        manifest = {"depth": 3, "groups": {"a": "all", "b": "all"}, "able": 1}
        manifest |= {"tokens_checksum": self.tokens, "weights_checksum": self.weights}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"starts": starts}))
        score = {"upload_bytes": 10, "download_bytes": 20, "first_download_bytes": 50, "flops": 30, "seconds": 4.0, "test_loss": loss}
        names = [group.name for group in config.fleet.groups]
        before = {name: {"accuracy": 0.05 * number} for number, name in enumerate(names)}
        after = {name: {"accuracy": accuracy - 0.1 * number} for number, name in enumerate(names)}
        rounds = [score | {"round": 0, "test_accuracy": 0.05, "groups": before}]
        rounds.append(score | {"round": 1, "test_accuracy": accuracy, "groups": after})
        report = {"blocks": 2, "memory_bytes": 100, "cause": None, "group": names[0], "upload_bytes": 900_000, "flops": 1_500_000_000}
        clients = [report | {"client": 0, "ok": True, "measured_peak_bytes": 80}]
        clients.append(report | {"client": 1, "ok": False, "measured_peak_bytes": 110, "cause": "over_cap"})
        for name, lines in (("rounds.jsonl", rounds), ("clients.jsonl", clients)):
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "finished").write_text("")
        return 0


def silent(_: str) -> None:
    pass


def test_every_method_tries_the_same_rates_and_the_lowest_loss_decides(compare):
    made, start = compare(), Trainings()
    with pytest.raises(CheckpointError, match="tuning"):
        made.trials()
    assert make(made.tuning(), start, silent) == ([], 0)
    assert [(config.training.learning_rate, config.seed, config.rounds) for config, _ in start.started] == [
        (1e-3, 1000, 1),
        (4e-3, 1000, 1),
    ] * 2
    assert start.started[1][0].training.final_learning_rate == pytest.approx(4e-4)  # the schedule keeps its shape
    rates = {(trial.scenario, trial.contender): trial.config().training.learning_rate for trial in made.trials()}
    assert rates == {("small", "caff"): 4e-3, ("small", "wide"): 1e-3, ("large", "caff"): 4e-3, ("large", "wide"): 1e-3}


def test_a_rate_that_diverges_is_not_the_best(compare):
    made = compare(tuning={"learning_rates": [DIVERGES, 4e-3, 1e-3]})
    make(made.tuning(), Trainings(), silent)
    assert {trial.learning_rate for trial in made.trials() if trial.contender == "wide"} == {1e-3}


def test_rates_that_all_diverge_choose_none(compare):
    made = compare(tuning={"learning_rates": [DIVERGES]})
    make(made.tuning(), Trainings(), silent)
    with pytest.raises(CheckpointError, match="lower ones"):
        made.trials()


def test_a_result_that_is_no_number_is_told(compare):
    made = compare(tuning={})
    make(made.trials(), Trainings(), silent)
    results = [result for standing in standings.standings(made) for result in standing.results]
    lost = [replace(result, loss=math.nan) if (result.method, result.seed) == ("wide", 2) else result for result in results]
    (found, *_) = [standing for standing in standings.standings_of(made, lost) if standing.method == "wide"]
    assert found.loss_above.p_value is None and math.isnan(found.deviation("loss")) and found.accuracy_above.p_value is not None
    assert "nan" in comparison_tables.markdown([found], "caff")


def test_what_some_method_cannot_run_with_is_refused_before_the_first_run(compare, monkeypatch):
    made, tried = compare(), []

    def why_not(trial):
        tried.append((trial.scenario, trial.contender))
        if trial.contender == "wide" and trial.scenario == "large":
            raise ConfigError("transport.codec = intt8", "no such codec", "take another")

    monkeypatch.setattr(comparison, "why_not", why_not)
    with pytest.raises(ConfigError, match="intt8"):
        made.check()
    # a run and a rate of each in small, whose rates serve large
    assert tried == [("small", "caff")] * 2 + [("small", "wide")] * 2 + [("large", "caff"), ("large", "wide")]
    made.check(2, 4)  # the share of a worker without that place
    make(made.tuning(), Trainings(), silent)
    made.check()  # what has begun was checked
    monkeypatch.setattr(comparison, "why_not", lambda trial: "too small" if trial.scenario == "small" else None)
    with pytest.raises(ConfigError, match="rates_of"):
        compare(output=str(made.output / "other")).check()


def test_a_comparison_goes_on_where_it_ended(compare):
    made, start = compare(tuning={}), Trainings(codes=[0, 3, EXIT_REQUEUE])
    trials = made.trials()
    failed, code = make(trials, start, silent)
    assert ([trial.folder for trial in failed], code) == ([trials[1].folder], EXIT_REQUEUE)
    trials[2].folder.mkdir(parents=True)
    (trials[2].folder / "config.yaml").write_text("begun")
    again = Trainings()
    assert make(trials, again, silent) == ([], 0)
    assert len(again.started) == len(trials) - 1  # the first one was done
    assert [resume for _, resume in again.started] == [False, True, *[False] * (len(trials) - 3)]
    assert make(trials, Trainings(codes=[1] * 99), silent) == ([], 0)


def test_workers_share_the_runs(compare):
    trials = compare(tuning={}).trials()
    parts = [share_of(trials, task, 5) for task in range(5)]
    assert sorted(trial.folder for part in parts for trial in part) == sorted(trial.folder for trial in trials)
    for task in (-1, 5):
        with pytest.raises(ConfigError, match="--task"):
            share_of(trials, task, 5)


def test_means_deviations_and_paired_differences(compare):
    made = compare()
    make(made.tuning(), Trainings(), silent)
    make(made.trials(), Trainings(), silent)
    by_place = {(one.scenario, one.method): one for one in standings.standings(made)}
    wide = by_place["small", "wide"]
    assert wide.mean("accuracy") == pytest.approx((0.28 + 0.31 + 0.27) / 3)
    assert wide.deviation("accuracy") == pytest.approx(0.0208167, rel=1e-5)
    assert wide.accuracy_above.values == pytest.approx((-0.02, -0.01, -0.04))
    assert wide.accuracy_above.p_value == pytest.approx(0.11807, abs=1e-4)  # t = -2.6458 with 2 degrees of freedom: 1 - t / sqrt(2 + t^2)
    (result, *_) = by_place["small", "caff"].results
    assert (result.peak_share, result.part_share, result.over_cap) == (1.1, 0.5, 1)
    assert result.slack_share == pytest.approx(1 - (0.8 + 1.1) / 2)
    assert (result.upload_bytes, result.download_bytes, result.first_download_bytes, result.flops, result.seconds) == (20, 40, 100, 60, 8.0)
    assert (result.upload_share, result.flops_share, result.lowest_group, result.gain_gap) == (None, None, None, None)
    rows = list(csv.DictReader(io.StringIO(comparison_tables.comma_separated(by_place.values()))))
    assert len(rows) == 12 and float(rows[0]["accuracy"]) == 0.30
    assert [rows[0][key] for key in ("torch", "tokens_checksum", "weights_checksum", "source_checksum")] == ["2", "t", "w", "b"]
    text = comparison_tables.markdown(list(by_place.values()), "caff")
    assert "| wide | 28.67 ± 2.08 | -2.33 ± 1.53 | 0.118 | 1.7133 | +0.0233 ± 0.0153 | 0.118 |" in text
    assert "| caff | 31.00 ± 1.00 |  |  | 1.6900 |  |  |" in text
    found = list(by_place.values())
    paths = [
        *comparison_tables.write(made, found),
        comparison_pictures.draw_overview(made, found, made.output / "comparison.png"),
        comparison_pictures.draw_rounds(made, found, made.output / "rounds.png"),
    ]
    assert all(path.stat().st_size > 0 for path in paths) and {path.suffix for path in paths} == {".md", ".csv", ".png"}


@pytest.mark.parametrize("t, freedom, p", [(4.30265, 2, 0.05), (2.77645, 4, 0.05), (63.6567, 1, 0.01), (0.0, 3, 1.0), (-2.2281, 10, 0.05)])
def test_p_values_are_those_of_the_tables(t, freedom, p):
    assert standings.two_sided_p(t, freedom) == pytest.approx(p, abs=1e-5)


def test_a_method_that_cannot_take_part_is_said_and_not_run(compare, monkeypatch):
    made, start = compare(tuning={}), Trainings()
    monkeypatch.setattr(
        comparison, "why_not", lambda trial: "too small" if (trial.scenario, trial.contender) == ("small", "wide") else None
    )
    make(made.trials(), start, silent)
    assert len(start.started) == 9
    monkeypatch.setattr(comparison, "why_not", lambda trial: pytest.fail("asked twice"))
    make(made.trials(), start, silent)
    found = standings.standings(made)
    assert [one.refusal for one in found] == [None, "too small", None, None]
    larger = [COMPARE["scenarios"][0] | {"overrides": ["fleet.groups.0.memory_mb=12"]}, COMPARE["scenarios"][1]]
    assert all(trial.refusal is None for trial in compare(tuning={}, scenarios=larger).trials())  # another config: to be tried again
    assert "| wide | cannot take part: too small |" in comparison_tables.markdown(found, "caff")


def test_whether_a_method_can_take_part_is_asked_anew_of_another_version(compare, monkeypatch):
    monkeypatch.setattr(comparison, "why_not", lambda trial: "too small")
    (trial, *_) = compare(tuning={}).trials()
    make([trial], Trainings(), silent)
    assert trial.refusal == "too small"
    assert trial.is_settled
    monkeypatch.setattr(comparison, "source_checksum", lambda: "other")
    assert not trial.is_settled and trial.refusal == "too small"  # tables still have it


def test_what_a_label_does_not_say_stands_above_the_tables(compare):
    methods = [{"method": "caff"}, {"method": "lora", "label": "wide", "options": {"rank": 3}, "overrides": ["model.depths=[3]"]}]
    assert comparison_tables._legend(compare(methods=methods)) == "`wide`: lora, rank 3, model.depths=[3].\n\n"
    assert comparison_tables._legend(compare(methods=[{"method": "caff"}])) == ""
    assert "ensemble" in comparison_tables._legend(compare(methods=[{"method": "caff"}, {"method": "depthfl"}]))


def test_failed_tuning_ends_a_comparison_and_names_what_failed(compare, tmp_path, monkeypatch, capsys):
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(COMPARE | {"output": str(tmp_path / "out")}))
    monkeypatch.setattr(cli.launching, "run_child", lambda arguments: 3)
    compare()  # writes the config of its runs
    assert cli.main(["compare", str(path)]) == 1
    assert "failed: " in (said := capsys.readouterr().err) and "rate-0.004" in said
    assert not (tmp_path / "out" / "comparison.md").exists()
    assert cli.main(["compare", str(path), "--stage", "report", "--tasks", "2"]) == 2
    assert "one process" in capsys.readouterr().err


def test_no_method_runs_with_a_rate_that_nobody_tuned(compare, monkeypatch):
    made, start = compare(), Trainings()
    monkeypatch.setattr(comparison, "why_not", lambda trial: "no" if (trial.scenario, trial.contender) == ("small", "wide") else None)
    make(made.tuning(), start, silent)
    assert len(start.started) == 2
    with pytest.raises(ConfigError, match=r"wide in large.*rates_of small"):
        made.trials()
    monkeypatch.setattr(comparison, "why_not", lambda trial: "no" if trial.contender == "wide" else None)
    assert [trial.learning_rate for trial in made.trials() if trial.contender == "wide"] == [1e-3] * 6  # none of them will run


def test_a_trial_that_cannot_be_does_not_keep_the_others(compare, monkeypatch):
    made, start, said = compare(tuning={}), Trainings(), []

    def asked(trial):
        if trial.contender == "wide":
            raise ConfigError("this", "that", "something")

    monkeypatch.setattr(comparison, "why_not", asked)
    failed, code = make(made.trials(), start, said.append)
    assert (len(failed), len(start.started), code) == (6, 6, 0) and any("something" in line for line in said)


def test_a_request_to_stop_is_heard_between_two_runs(compare):
    start, answers = Trainings(), iter([False, False, True])
    assert make(compare(tuning={}).trials(), start, silent, lambda: next(answers)) == ([], EXIT_REQUEUE)
    assert len(start.started) == 2


@pytest.mark.parametrize("other", [{"tokens": "other"}, {"weights": "other"}])
def test_runs_on_other_data_or_weights_are_not_compared(compare, other):
    made = compare(tuning={})
    trials = made.trials()
    make(trials[:1], Trainings(), silent)
    make(trials[1:], Trainings(**other), silent)
    with pytest.raises(CheckpointError, match="checksum differ"):
        standings.standings(made)


def test_groups_caps_and_what_was_not_enforced_are_told(compare):
    groups = [{"name": name, "memory_mb": 10, "upload_mb": 1, "gflops": 2, "share": 1} for name in ("weak", "strong")]
    methods = [{"method": "caff"}, {"method": "allsmall"}]
    scenarios = [{"name": "two", "overrides": [f"fleet.groups={json.dumps(groups)}"]}]
    made = compare(tuning={}, seeds=[1, 2], methods=methods, scenarios=scenarios)
    make(made.trials(), Trainings(enforced_by="report"), silent)
    found = standings.standings(made)
    (result, _) = found[0].results
    assert (result.peak_share, result.upload_share, result.flops_share) == (1.1, 0.9, 0.75)
    assert result.slack_share == pytest.approx(1 - (0.9 + 1.1) / 2)
    assert (result.lowest_group, result.group_gap) == pytest.approx((0.2, 0.1))
    assert (result.lowest_gain, result.gain_gap) == pytest.approx((0.15, 0.15))
    text = comparison_tables.markdown(found, "caff")
    assert "| caff (caps NOT enforced) | 31.00 ± 1.41 |" in text and "| upload/cap | FLOP/cap |" in text


def test_tables_are_made_of_a_table_of_results_too(compare, tmp_path):
    made = compare()
    make(made.tuning(), start := Trainings(), print)
    make(made.trials(), start, print)
    found = standings.standings(made)
    path = comparison_tables.write(made, found)[1]
    results = comparison_tables.read_results(path)
    assert results == [result for standing in found for result in standing.results]
    assert all((made.output / result.folder / "finished").is_file() for result in results)
    assert str(tmp_path) not in path.read_text()  # tables are passed on
    assert standings.standings_of(made, results[::-1]) == found
    # one result less: that seed has no partner any more
    less = [result for result in results if (result.method, result.seed) != ("caff", 2)]
    assert [len(standing.accuracy_above.values) for standing in standings.standings_of(made, less)] == [2, 2, 2, 2]


@pytest.mark.parametrize("wrong, word", [("twice", "second"), ("scenario", "no such"), ("seed", "no such"), ("data", "differ")])
def test_results_that_cannot_be_of_the_comparison_are_refused(compare, wrong, word):
    made = compare()
    make(made.tuning(), start := Trainings(), print)
    make(made.trials(), start, print)
    results = [result for standing in standings.standings(made) for result in standing.results]
    changes = {"twice": {}, "scenario": {"scenario": "gone"}, "seed": {"seed": 9}, "data": {"tokens_checksum": "other"}}
    broken = replace(results[0], **changes[wrong])
    with pytest.raises(CheckpointError, match=word):
        standings.standings_of(made, [*results, broken] if wrong == "twice" else [broken, *results[1:]])


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "scenario,method\nsmall,caff\n",
        "HEAD\nsmall,caff,one\n",
        "HEAD\n",
        "HEAD\nsmall\n",
        "HEAD\n" + "1," * 31 + "1\n",
        "HEAD\n" + "1," * 29 + "1\n",
        "HEAD\n\x00",
    ],
)
def test_what_is_no_table_of_results_is_refused(tmp_path, text):
    path = tmp_path / "results.csv"
    if text is not None:
        path.write_text(text.replace("HEAD", ",".join(field.name for field in fields(standings.Result))))
    with pytest.raises(ConfigError, match="results.csv"):
        comparison_tables.read_results(path)


def test_results_are_for_a_report_alone(tmp_path, capsys):
    assert cli.main(["compare", str(CONFIGS / "compare-pydocs.yaml"), "--results", str(tmp_path / "results.csv")]) == 2
    assert "--stage report" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((CONFIGS / "results").glob("*.csv")), ids=lambda path: path.stem)
def test_the_results_page_has_the_tables_of_the_published_results(path, monkeypatch):
    monkeypatch.setenv("DISTFL_DATA", "/nowhere")  # no data is opened
    config = CONFIGS / f"compare-{path.stem}.yaml"
    made = Comparison(config, settings.load(CompareConfig, config))
    found = standings.standings_of(made, comparison_tables.read_results(path))
    assert all(len(standing.results) == len(made.config.seeds) for standing in found)
    page = (CONFIGS / "RESULTS.md").read_text()
    for table in comparison_tables.markdown(found, made.config.reference).split("\n\n### "):
        assert table in page


def test_a_method_looks_the_same_in_all_pictures_and_like_no_other(compare):
    labels = [f"caff-{number}" for number in range(14)]
    made = compare(methods=[{"method": "caff", "label": label} for label in labels], reference="caff-0")
    styles = [comparison_pictures._style(made, label) for label in labels]
    assert len({(style["color"], style["marker"]) for style in styles}) == len(labels)


def test_a_run_of_another_config_is_not_taken_for_this_one(compare):
    make(compare(tuning={}).trials(), Trainings(), silent)
    other = compare(tuning={}, scenarios=[{"name": "small", "overrides": ["rounds=7"]}])
    with pytest.raises(CheckpointError, match="rounds"):
        standings.standings(other)


@pytest.mark.parametrize(
    "change",
    [
        {"reference": "lora"},
        {"seeds": [1, 1]},
        {"seeds": []},
        {"ranks": 1},
        {"methods": [{"method": "caff"}, {"method": "caff"}]},
        {"methods": [{"method": "caff", "label": "a/b"}], "reference": "a/b"},
        {"scenarios": [{"name": "a", "rates_of": "b"}]},
        {"scenarios": [{"name": "a", "axis": "cap"}]},
        {"scenarios": [{"name": "a", "overrides": ["rounds=none"]}]},
        {"scenarios": [{"name": "a", "overrides": ["roundz=3"]}]},
        {"tuning": {"seed": 2}},
        {"tuning": {"learning_rates": [-1.0]}},
        {"tuning": {"learning_rates": [1e-3], "overrides": ["roundz=1"]}},
        {"tuning": {"learning_rates": [1e-3], "overrides": ["training.learning_rate=1"]}},
        {"seeds": [1, -1]},
        {"methods": [{"method": "caff"}, {"method": "lorra"}]},
        {"methods": [{"method": "caff"}, {"method": "lora", "options": {"rnak": 3}}]},
        {"methods": [{"method": "caff"}, {"method": "lora", "overrides": ["fleet.groups.0.memory_mb=200"]}]},
        {"methods": [{"method": "caff"}, {"method": "lora", "overrides": ["data.clients=3"]}]},
        {"methods": [{"method": "caff"}, {"method": "lora", "overrides": ["rounds=50"]}]},
        {"methods": [{"method": "caff"}, {"method": "lora", "overrides": ["training.batch=2"]}]},
        {"methods": [{"method": "caff"}, {"method": "lora", "overrides": ["memory.margin_mb=0"]}]},
        {"methods": [{"method": "caff"}, {"method": "lora", "overrides": ["training={batch: 2}"]}]},
        {"scenarios": [{"name": "a", "overrides": ["run={folder: x}"]}]},
        {"tuning": {"learning_rates": [1e-3, 1.00000001e-3]}},
        {"scenarios": [{"name": "a", "methods": []}]},
        {"scenarios": [{"name": ".."}]},
        {"scenarios": [{"name": ""}]},
        {"scenarios": [{"name": "a", "overrides": ["seed=4"]}]},
    ],
)
def test_bad_input_is_refused_before_anything_runs(compare, change):
    with pytest.raises(ConfigError):
        compare(**change)
