"""Every setting of distfl: one frozen dataclass per section, its meaning beside each key.

Values are checked once, at construction, before any rank trains; ``settings.py`` reads and writes
them as YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from distfl.settings import require

Switch = Literal["auto", "on", "off"]  # auto is on wherever that is of use; what it depends on stands beside the key


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it is dealt to clients."""

    corpus: str = "pydocs"  # pydocs | shakespeare | parquet | json | hub
    path: str | None = None  # file or folder (train.*, test.*) of parquet/json; dataset name for hub; ${VARIABLES} are expanded
    text_column: str = "text"
    client_column: str | None = None  # needed by partition: by_column and selection: merge or choose
    label_column: str | None = None  # needed by partition: dirichlet
    partition: Literal["by_column", "iid", "dirichlet"] = "by_column"
    clients: int | None = None  # number of clients; None = as many as the client column names
    selection: Literal["largest", "random", "merge"] = "largest"  # by_column with fewer clients than names: choose or merge
    dirichlet_alpha: float = 0.5  # smaller = more skewed
    test_fraction: float = 0.2  # of each client's text, from its end, where the corpus brings no test split
    minimum_characters: int = 3000  # by_column: names with less training text are left out
    cache: str | None = None  # where tokenised shards lie; None = ${XDG_CACHE_HOME:-~/.cache}/distfl

    def __post_init__(self) -> None:
        require(self.clients is None or self.clients >= 1, "data.clients", self.clients, "at least 1")
        require(0 < self.test_fraction < 1, "data.test_fraction", self.test_fraction, "between 0 and 1")
        require(self.dirichlet_alpha > 0, "data.dirichlet_alpha", self.dirichlet_alpha, "above 0")
        require(self.minimum_characters >= 1, "data.minimum_characters", self.minimum_characters, "at least 1")


@dataclass(frozen=True)
class ModelConfig:
    """Which pretrained family, and which of its depths."""

    family: str = "tiny"  # a shipped family's name, or a family folder
    depths: tuple[int, ...] | None = None  # depths the planner may choose from; None = all of the family


@dataclass(frozen=True)
class GroupConfig:
    """Clients with the same budgets. Give share or count, for all groups alike."""

    name: str
    memory_mb: float  # peak memory above the process's baseline, 10^6 bytes
    upload_mb: float | None = None  # per round, 10^6 bytes; None = no limit
    gflops: float | None = None  # training work per round, 10^9 floating-point operations; None = no limit
    share: float | None = None  # part of all clients, relative to the sum of all groups' shares
    count: int | None = None  # number of clients

    def __post_init__(self) -> None:
        where = f"fleet.groups[{self.name}]"
        for key in ("memory_mb", "upload_mb", "gflops", "share", "count"):
            value = getattr(self, key)
            require(value is None or value > 0, f"{where}.{key}", value, "above 0")
        require(
            (self.share is None) != (self.count is None),
            f"{where}.share/count",
            (self.share, self.count),
            "given as either share or count, not both and not neither",
        )


@dataclass(frozen=True)
class FleetConfig:
    """All clients with their budgets, and who takes part."""

    groups: tuple[GroupConfig, ...]
    participants: int | None = None  # clients per round; None = all
    deal: Literal["shuffled", "in_order"] = "shuffled"  # how clients are dealt to groups

    def __post_init__(self) -> None:
        require(len(self.groups) >= 1, "fleet.groups", [], "at least one group")
        names = [group.name for group in self.groups]
        require(len(set(names)) == len(names), "fleet.groups", names, "a list of groups with different names")
        kinds = {group.share is None for group in self.groups}
        require(len(kinds) == 1, "fleet.groups", names, "all given by share or all by count")
        require(self.participants is None or self.participants >= 1, "fleet.participants", self.participants, "at least 1")


@dataclass(frozen=True)
class MethodConfig:
    """Which method; its options are checked by the method's own Options."""

    name: str = "caff"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingConfig:
    """Local training of one client in one round."""

    batch: int = 8  # sequences per step
    epochs: int | None = None  # passes over the client's data; give epochs or steps
    steps: int | None = None  # optimiser steps
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    final_learning_rate: float | None = None  # reached in the last round; None = learning_rate
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # over rounds
    weight_decay: float = 0.0
    momentum: float = 0.0  # sgd
    betas: tuple[float, float] = (0.9, 0.999)  # adamw
    clip_norm: float | None = 1.0  # None = no gradient clipping

    def __post_init__(self) -> None:
        require(self.batch >= 1, "training.batch", self.batch, "at least 1")
        require(
            (self.epochs is None) != (self.steps is None),
            "training.epochs/steps",
            (self.epochs, self.steps),
            "given as either epochs or steps (set the other to null: training.steps=null), not both and not neither",
        )
        for key in ("epochs", "steps"):  # 0 steps is allowed: a round without training, for measuring
            value = getattr(self, key)
            require(value is None or value >= 0, f"training.{key}", value, "0 or more")
        require(self.learning_rate > 0, "training.learning_rate", self.learning_rate, "above 0")
        require(
            self.final_learning_rate is None or self.final_learning_rate >= 0,
            "training.final_learning_rate",
            self.final_learning_rate,
            "0 or more",
        )
        require(self.weight_decay >= 0, "training.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.momentum < 1, "training.momentum", self.momentum, "in [0, 1)")
        require(all(0 <= beta < 1 for beta in self.betas), "training.betas", self.betas, "in [0, 1)")
        require(self.clip_norm is None or self.clip_norm > 0, "training.clip_norm", self.clip_norm, "above 0")


@dataclass(frozen=True)
class LeversConfig:
    """Ways to train more blocks within a budget; all but frozen_precision give the gradient of plain training.
    auto: where it costs time, only as far as a budget makes it useful; else on."""

    micro_batches: Switch = "auto"  # activations of few sequences at a time; on = of one
    loss_chunks: Switch = "auto"  # logits of 128 tokens at a time; auto = on
    recompute: Switch = "auto"  # first blocks of the window computed again in backward; on = all of them
    fused_update: Switch = "auto"  # optimiser steps inside backward; not with clip_norm, nor with micro-batches

    frozen_precision: Literal["fp32", "bf16", "int8"] = "fp32"  # of matrices below the window; the one lever that changes results
    mapped_prefix: Switch = "auto"  # frozen tensors used where the node holds them, charged to the budget all the same; auto = on
    prefix_features: Switch = "auto"  # outputs of frozen units kept on the node's disk (TMPDIR), not computed again; auto = on


@dataclass(frozen=True)
class ServerConfig:
    """What the server does with the averaged update."""

    optimizer: Literal["average", "momentum", "adam"] = "average"
    learning_rate: float | None = None  # None = 1.0 for momentum, 0.01 for adam; average has none
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        require(self.learning_rate is None or self.learning_rate > 0, "server.learning_rate", self.learning_rate, "above 0")
        require(0 <= self.momentum < 1, "server.momentum", self.momentum, "in [0, 1)")
        require(all(0 <= beta < 1 for beta in self.betas), "server.betas", self.betas, "in [0, 1)")
        require(self.epsilon > 0, "server.epsilon", self.epsilon, "above 0")


@dataclass(frozen=True)
class MemoryConfig:
    """How budgets are enforced."""

    enforce: Literal["auto", "rlimit", "cgroup", "cgroup-v1", "cgroup-v2", "report"] = "auto"
    margin_mb: float = 1.0  # kept free by the planner; `distfl calibrate` says how far predictions are off on a machine

    def __post_init__(self) -> None:
        require(self.margin_mb >= 0, "memory.margin_mb", self.margin_mb, "0 or more")


@dataclass(frozen=True)
class TransportConfig:
    """How ranks talk."""

    name: Literal["auto", "local", "mpi", "torch"] = "auto"  # auto = what started this process; with --ranks mpi
    backend: Literal["auto", "gloo", "nccl"] = "auto"  # of torch; auto = nccl for broadcasts where every rank has a GPU of its own
    codec: str = "exact"  # exact | bf16 | int8 | int4 | int2 | top_k: how updates are written; see codecs/
    codec_options: dict[str, Any] = field(default_factory=dict)  # checked by the codec's own Options
    deltas: Switch = "auto"  # send differences from the round's shared tensors; auto = on for codecs that lose something
    error_feedback: Switch = "auto"  # what is lost goes into the client's next update; auto = on for biased codecs (top_k)
    collective: Literal["gather", "reduce", "auto"] = "gather"  # how updates reach the server; auto: what it takes in fewer bytes by
    sums: Literal["fixed", "float"] = "fixed"  # of reduce: 8 bytes a value and the same bits on any ranks, or 4 bytes


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss and accuracy of the merged model."""

    every: int = 1  # rounds; the first and the last are always evaluated
    batch: int = 16
    sequences: int | None = None  # of each client's held-out text, from its start; null: all

    def __post_init__(self) -> None:
        require(self.every >= 1, "evaluation.every", self.every, "at least 1")
        require(self.batch >= 1, "evaluation.batch", self.batch, "at least 1")
        require(self.sequences is None or self.sequences >= 1, "evaluation.sequences", self.sequences, "at least 1, or null for all")


@dataclass(frozen=True)
class RunConfig:
    """The run folder."""

    folder: str = "runs/default"
    checkpoint_every: int = 1  # rounds
    keep_checkpoints: int = 2
    picture: bool = True  # draw summary.png at the end
    keep_ledgers: bool = False  # every rank writes all it counted to ledgers/ at its end: what `distfl audit` reads

    def __post_init__(self) -> None:
        require(self.checkpoint_every >= 1, "run.checkpoint_every", self.checkpoint_every, "at least 1")
        require(self.keep_checkpoints >= 1, "run.keep_checkpoints", self.keep_checkpoints, "at least 1")


@dataclass(frozen=True)
class LaunchConfig:
    """How ``--ranks`` starts ranks under MPI."""

    # fork = from one parent per node; auto = where `distfl doctor`, or the first start of 8 ranks or more, has proven that it works
    start: Literal["plain", "fork", "auto"] = "auto"


@dataclass(frozen=True)
class FaultsConfig:
    """What becomes of a run when a rank dies or a client is late."""

    recover: Switch = "auto"  # go on without dead ranks; auto = where MPI reports them (Open MPI under mpirun --with-ft ulfm, see --ranks)
    deadline_seconds: float | None = None  # of a client in a round, and of the server's waits until it asks who lives; None = for ever
    late: Literal["contribute", "leave_out"] = "contribute"  # a late client stops before its next batch, and sends what it has, or nothing
    grace_seconds: float = 30.0  # a rank that has not answered then is killed; it answers between two batches

    def __post_init__(self) -> None:
        for key in ("deadline_seconds", "grace_seconds"):
            value = getattr(self, key)
            require(value is None or value > 0, f"faults.{key}", value, "above 0")


@dataclass(frozen=True)
class TrainConfig:
    """A federated run: what ``distfl train`` and ``distfl plan`` read."""

    fleet: FleetConfig
    training: TrainingConfig
    rounds: int = 10
    seed: int = 1
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    levers: LeversConfig = LeversConfig()
    server: ServerConfig = ServerConfig()
    memory: MemoryConfig = MemoryConfig()
    transport: TransportConfig = TransportConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    launch: LaunchConfig = LaunchConfig()
    faults: FaultsConfig = FaultsConfig()

    def __post_init__(self) -> None:
        require(self.rounds >= 1, "rounds", self.rounds, "at least 1")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        if self.levers.fused_update == "on":
            hint = "off or auto with training.clip_norm (set that to null) and with levers.micro_batches=on"
            require(self.training.clip_norm is None and self.levers.micro_batches != "on", "levers.fused_update", "on", hint)


@dataclass(frozen=True)
class ArchitectureConfig:
    """The shape that all depths of a family share."""

    depths: tuple[int, ...] = (3, 6, 9, 12)
    width: int = 128
    heads: int = 4
    context: int = 128
    vocabulary: int = 2048

    def __post_init__(self) -> None:
        require(
            len(self.depths) >= 1 and all(d >= 1 for d in self.depths), "architecture.depths", self.depths, "a list of numbers of blocks"
        )
        require(list(self.depths) == sorted(set(self.depths)), "architecture.depths", self.depths, "in rising order, each once")
        require(self.width % self.heads == 0, "architecture.width", self.width, f"a multiple of heads ({self.heads})")
        require(300 <= self.vocabulary <= 65536, "architecture.vocabulary", self.vocabulary, "between 300 and 65536")
        require(self.context >= 2, "architecture.context", self.context, "at least 2")


@dataclass(frozen=True)
class PretrainSchedule:
    """Optimisation of each depth."""

    tokens: tuple[int, ...] = (20_000_000,)  # per depth, in the order of depths; one number = for all
    batch: int = 32  # sequences per optimiser step, over all ranks
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_fraction: float = 0.4  # of the steps, at the end, linearly to a twentieth
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 = autocast of the matrix products; weights stay fp32
    grow: bool = True  # a deeper model starts as the next shallower one with identity blocks inserted
    validate_every: int = 200  # steps
    checkpoint_every: int = 200  # steps
    early_validation_sequences: int = 256  # used while training; the manifest's loss is over all of the validation text

    def __post_init__(self) -> None:
        require(all(tokens > 0 for tokens in self.tokens), "schedule.tokens", self.tokens, "above 0")
        require(self.batch >= 1, "schedule.batch", self.batch, "at least 1")
        require(self.learning_rate > 0, "schedule.learning_rate", self.learning_rate, "above 0")
        require(0 < self.decay_fraction <= 1, "schedule.decay_fraction", self.decay_fraction, "in (0, 1]")
        require(self.weight_decay >= 0, "schedule.weight_decay", self.weight_decay, "0 or more")
        require(self.clip_norm > 0, "schedule.clip_norm", self.clip_norm, "above 0")
        for key in ("warmup_steps", "validate_every", "checkpoint_every", "early_validation_sequences"):
            require(getattr(self, key) >= 1, f"schedule.{key}", getattr(self, key), "at least 1")


@dataclass(frozen=True)
class PretrainConfig:
    """A family to be pretrained: what ``distfl pretrain`` reads."""

    output: str
    data: DataConfig
    architecture: ArchitectureConfig = ArchitectureConfig()
    schedule: PretrainSchedule = PretrainSchedule()
    seed: int = 1

    def __post_init__(self) -> None:
        tokens, depths = self.schedule.tokens, self.architecture.depths
        require(len(tokens) in (1, len(depths)), "schedule.tokens", tokens, f"one number, or one for each of the {len(depths)} depths")


@dataclass(frozen=True)
class ContenderConfig:
    """One method of a comparison."""

    method: str
    label: str | None = None  # what tables and folders call it; None = the method's name
    options: dict[str, Any] = field(default_factory=dict)  # method.options
    overrides: tuple[str, ...] = ()  # key=value, after those of the scenario


@dataclass(frozen=True)
class ScenarioConfig:
    """One setting in which all methods are compared."""

    name: str
    overrides: tuple[str, ...] = ()  # key=value, of the training config
    axis: str | None = None  # scenarios with the same axis make one picture, for instance "memory cap, MB"
    value: float | None = None  # where on the axis
    rates_of: str | None = None  # take the learning rates that were tuned in this scenario; None = tune here
    methods: tuple[str, ...] | None = None  # labels of those that are compared here; None = all

    def __post_init__(self) -> None:
        require((self.axis is None) == (self.value is None), f"scenarios[{self.name}].axis/value", self.axis, "given both or not at all")


@dataclass(frozen=True)
class TuningConfig:
    """Learning rates: every method tries the same ones, as often and as long, with a seed that no result is of."""

    learning_rates: tuple[float, ...] = ()  # none = that of the training config, for all methods
    seed: int = 1000
    overrides: tuple[str, ...] = ()  # key=value, for instance rounds=5

    def __post_init__(self) -> None:
        named = [f"{rate:g}" for rate in self.learning_rates]  # they become folders
        require(len(set(named)) == len(named), "tuning.learning_rates", self.learning_rates, "a list without repetition, to six digits")


@dataclass(frozen=True)
class CompareConfig:
    """Methods x scenarios x seeds: what ``distfl compare`` reads."""

    train: str  # config file of every run, seen from this file
    methods: tuple[ContenderConfig, ...]
    scenarios: tuple[ScenarioConfig, ...]
    output: str = "runs/comparison"
    ranks: int | None = None  # of every run; None = in one process
    seeds: tuple[int, ...] = (1, 2, 3)
    reference: str = "caff"  # label of the method that all others are held against
    tuning: TuningConfig = TuningConfig()

    def __post_init__(self) -> None:
        labels, names = [one.label or one.method for one in self.methods], [scenario.name for scenario in self.scenarios]
        for key, given in (("methods", labels), ("scenarios", names), ("seeds", list(self.seeds))):
            require(given and len(set(given)) == len(given), key, given, "a list without repetition")
        for name in (*labels, *names):  # they become folders
            plain = name.strip(".") and all(letter.isalnum() or letter in "-_." for letter in name)
            require(bool(plain), "name or label", name, "of letters, digits and -_. only, and not of dots alone")
        require(self.reference in labels, "reference", self.reference, f"one of {labels}")
        require(self.ranks is None or self.ranks >= 2, "ranks", self.ranks, "2 or more")
        require(self.tuning.seed not in self.seeds, "tuning.seed", self.tuning.seed, "none of seeds")
        for scenario in self.scenarios:
            given = scenario.methods if scenario.methods is not None else labels
            rule = f"labels among {labels}, with {self.reference}"
            require(self.reference in given and {*given} <= {*labels}, f"scenarios[{scenario.name}].methods", given, rule)
            tuned = [other.name for other in self.scenarios if other.rates_of is None]
            require(scenario.rates_of in (None, *tuned), f"scenarios[{scenario.name}].rates_of", scenario.rates_of, f"one of {tuned}")
