"""Settings: every shipped config loads, values go round unchanged, and every slip is answered with what would be right."""

from pathlib import Path

import pytest
import yaml

from distfl import settings
from distfl.config import CompareConfig, PretrainConfig, TrainConfig
from distfl.errors import ConfigError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SMALLEST = "fleet: {groups: [{name: a, memory_mb: 10, share: 1}, {name: b, memory_mb: 20, share: 2}]}\ntraining: {steps: 2}\n"


@pytest.fixture
def load(tmp_path):
    """Load the smallest config, or another text, with overrides."""

    def load(*overrides: str, text: str | bytes = SMALLEST) -> TrainConfig:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return settings.load(TrainConfig, path, list(overrides))

    return load


def schema_of(path: Path) -> type:
    keys = yaml.safe_load(path.read_text())
    return TrainConfig if "fleet" in keys else CompareConfig if "scenarios" in keys else PretrainConfig


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_goes_round(path):
    config = settings.load(schema_of(path), path)
    assert settings.from_dict(schema_of(path), settings.to_dict(config)) == config
    assert settings.from_dict(schema_of(path), yaml.safe_load(settings.to_yaml(config))) == config


def test_some_configs_are_shipped():
    assert {"smoke", "pretrain"} <= {path.stem for path in CONFIGS}


def test_defaults_fill_what_is_left_out(load):
    config = load()
    assert (config.rounds, config.method.name, config.training.batch, config.training.steps) == (10, "caff", 8, 2)
    assert [group.memory_mb for group in config.fleet.groups] == [10.0, 20.0]


# --- overrides ---------------------------------------------------------------------------------------------------------------------


def test_overrides_replace_values_also_inside_lists_and_new_sections(load):
    config = load(
        "rounds=3",
        "fleet.groups.1.memory_mb=7.5",
        "run.folder=a b",
        "method.options.extra_blocks={b: 1}",
        "training.learning_rate=1e-3",
        "data.path=x=y",
        "fleet.participants=null",
        "model.depths=[3, 6]",
    )
    assert config.rounds == 3
    assert [group.memory_mb for group in config.fleet.groups] == [10.0, 7.5]
    assert (config.run.folder, config.data.path, config.fleet.participants, config.model.depths) == ("a b", "x=y", None, (3, 6))
    assert config.method.options == {"extra_blocks": {"b": 1}}
    assert config.training.learning_rate == 0.001  # YAML 1.1 alone would read it as text


def test_the_last_override_of_a_key_counts(load):
    assert load("rounds=3", "rounds=4").rounds == 4


@pytest.mark.parametrize(
    "override", ["rounds", "=3", "rounds.x=1", "fleet.groups.2.memory_mb=1", "fleet.groups.x.memory_mb=1", "fleet.groups.0=1", "seed=["]
)
def test_an_override_that_cannot_be_placed_is_named(load, override):
    with pytest.raises(ConfigError) as refused:
        load(override)
    assert override.partition("=")[0].partition(".")[0] in refused.value.asked or "overrides" in refused.value.asked


@pytest.mark.parametrize("text, value", [("on", "on"), ("off", "off"), ("true", "on"), ("'off'", "off"), ("auto", "auto"), ("'on'", "on")])
def test_switches_are_read_as_they_are_written(load, text, value):
    # YAML 1.1 reads a bare on or off as a truth value
    assert load(f"levers.recompute={text}").levers.recompute == value
    config = load(text=SMALLEST + f"levers: {{recompute: {text}}}\n")
    assert config.levers.recompute == value and config.levers.micro_batches == "auto"
    assert settings.from_dict(TrainConfig, yaml.safe_load(settings.to_yaml(config))) == config


@pytest.mark.parametrize("override", ["training.clip_norm=1", "levers.micro_batches=on"])
def test_a_fused_update_is_refused_where_gradients_must_be_kept(load, override):
    wanted = ["levers.fused_update=on", "training.clip_norm=null"]
    assert load(*wanted).levers.fused_update == "on"
    with pytest.raises(ConfigError) as refused:
        load(*wanted, override)
    assert "levers.fused_update" in refused.value.asked and "clip_norm" in str(refused.value)
    assert load("levers.fused_update=auto", override).levers.fused_update == "auto"


@pytest.mark.parametrize("enforce", ["auto", "rlimit", "cgroup", "cgroup-v1", "cgroup-v2", "report"])
def test_every_mechanism_can_be_named(load, enforce):
    assert load(f"memory.enforce={enforce}").memory.enforce == enforce


# --- refusals ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, key, nearest",
    [
        ("training.bacth=4", "training.bacth", "batch"),
        ("fleet.groups.0.memory=1", "fleet.groups[0].memory", "memory_mb"),
        ("round=1", "round", "rounds"),
        ("method.nam=caff", "method.nam", "name"),
        ("levers.micro_batch=on", "levers.micro_batch", "micro_batches"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(load, override, key, nearest):
    with pytest.raises(ConfigError) as refused:
        load(override)
    assert key in refused.value.asked.split() and f"did you mean '{nearest}'" in refused.value.found


def test_a_key_like_no_other_is_answered_with_all(load):
    with pytest.raises(ConfigError) as refused:
        load("zzz=1")
    assert "did you mean" not in refused.value.found and "rounds" in refused.value.change


@pytest.mark.parametrize(
    "override",
    [
        "rounds=many",
        "rounds=2.5",
        "rounds=true",
        "rounds=[1]",
        "rounds=null",
        "training.learning_rate=fast",
        "training.learning_rate=true",
        "training.betas=[0.9]",
        "training.betas=[0.9, x]",
        "fleet.groups.0.memory_mb=10MB",
        "data.corpus=7",
        "method.options=[1]",
        "data=x",
        "training.optimizer=adam",
        "memory.enforce=false",
        "memory.enforce=cgroup-v3",
        "levers.recompute=yes please",
        "levers.recompute=1",
        "levers.micro_batches=null",
        "model.depths=[3, deep]",
        "fleet.groups.0.memory_mb=.nan",
    ],
)
def test_a_wrong_type_is_refused_with_its_key(load, override):
    with pytest.raises(ConfigError) as refused:
        load(override)
    key = override.partition("=")[0].replace("groups.0", "groups[0]")
    assert refused.value.asked.startswith(key)


@pytest.mark.parametrize(
    "override",
    [
        "fleet.groups.0.memory_mb=-1",
        "fleet.groups.0.memory_mb=0",
        "fleet.groups.0.upload_mb=-0.5",
        "fleet.groups.1.gflops=-2",
        "fleet.groups.1.share=-1",
        "memory.margin_mb=-1",
        "rounds=0",
        "seed=-1",
        "training.batch=0",
        "training.steps=-1",
        "training.learning_rate=0",
        "training.momentum=1",
        "data.test_fraction=1",
        "evaluation.every=0",
        "evaluation.sequences=0",
        "run.keep_checkpoints=0",
        "fleet.participants=0",
        "training.epochs=1",
        "fleet.groups.0.count=2",
    ],
)
def test_a_senseless_value_is_refused_with_its_key(load, override):
    with pytest.raises(ConfigError) as refused:
        load(override)
    assert override.partition("=")[0].split(".")[-1] in refused.value.asked


@pytest.mark.parametrize(
    "text, missing", [("training: {steps: 1}", "fleet"), ("fleet: {groups: [{memory_mb: 1, share: 1}]}\ntraining: {steps: 1}", "name")]
)
def test_a_missing_key_is_named(load, text, missing):
    with pytest.raises(ConfigError, match=f"the key {missing} is missing"):
        load(text=text)


def test_groups_share_or_count_alike_and_differ_in_name(load):
    for groups in (
        "[{name: a, memory_mb: 1, share: 1}, {name: b, memory_mb: 1, count: 1}]",
        "[{name: a, memory_mb: 1, share: 1}, {name: a, memory_mb: 1, share: 1}]",
        "[]",
        "[{name: a, memory_mb: 1}]",
    ):
        with pytest.raises(ConfigError, match="fleet.groups"):
            load(text=f"fleet: {{groups: {groups}}}\ntraining: {{steps: 1}}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just words",
        "- 1",
        "{a: b",
        "a: [",
        "\ta: 1",
        "? [a]\n: 1",
        "rounds: !!python/object/apply:os.system [true]",
        "a: &x [*x]",
        "%garbage",
        b"\xff\xfe\x00\x81",
        "seed: 2001-99-99",
        "[" * 3000,
    ],
)
def test_garbage_is_a_config_error(load, text):
    with pytest.raises(ConfigError):
        load(text=text)


@pytest.mark.parametrize(
    "override", ["fleet.groups.0.memory_mb=.inf", "training.learning_rate=.inf", "fleet.groups.0.share=.inf", "fleet.groups.0.gflops=1e999"]
)
def test_infinite_values_are_refused(load, override):
    with pytest.raises(ConfigError):
        load(override)


def test_a_key_that_stands_twice_is_refused(load):
    with pytest.raises(ConfigError, match="'steps' stands twice"):
        load(text=SMALLEST.replace("{steps: 2}", "{steps: 2, batch: 4, steps: 3}"))


def test_refusals_are_in_plain_words_and_name_the_bad_override_itself(load):
    with pytest.raises(ConfigError, match="(?s)nothing .null. where a whole number is needed"):
        load("rounds=null")
    with pytest.raises(ConfigError) as refused:
        load("rounds=3", "seed=[")
    assert refused.value.asked == "override seed=["
    with pytest.raises(ConfigError, match="not a readable text file"):
        load(text=b"\xff\xfe\x00")


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="no such file"):
            settings.load(TrainConfig, path)


# --- paths with variables ----------------------------------------------------------------------------------------------------------


def test_a_variable_in_a_path_is_filled_in(monkeypatch):
    monkeypatch.setenv("DISTFL_TEST_DATA", "/somewhere")
    assert settings.expand("${DISTFL_TEST_DATA}/books", "data.path") == Path("/somewhere/books")


def test_a_variable_that_is_not_set_is_refused_with_its_key(monkeypatch):
    monkeypatch.delenv("DISTFL_TEST_DATA", raising=False)
    with pytest.raises(ConfigError) as refused:
        settings.expand("${DISTFL_TEST_DATA}/books", "data.path")
    assert "data.path" in refused.value.asked and "DISTFL_TEST_DATA" in refused.value.asked
