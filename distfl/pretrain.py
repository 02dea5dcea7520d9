"""Pretraining of a family: several depths, one tokenizer, data-parallel over all ranks.

Each rank computes the gradient of its part of the batch, gradients are summed, every rank takes
the same step. A deeper model may start from the next shallower one (``schedule.grow``): copies of
its blocks whose residual projections are zero are put between them, so that the deeper model
begins with exactly the shallower one's function (block expansion as in LLaMA Pro, Wu et al. 2024,
arXiv 2401.02415) and a deeper model is not worse than a shallower one for want of steps.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distfl import seeds
from distfl.config import PretrainConfig, PretrainSchedule
from distfl.corpora import cache_folder, read
from distfl.errors import CheckpointError, DataError
from distfl.family import FORMAT, Family, open_family, write_weights
from distfl.files import sha256, write_atomically, write_json
from distfl.model import IGNORED_TARGET, ModelSpec, TinyTransformer, from_tensors, initial_tensors, next_token_loss
from distfl.optimizers import AdamW, clip_gradients
from distfl.settings import to_dict
from distfl.shards import END_OF_TEXT, Sequences, ShardIndex, build
from distfl.transport.base import Transport


class _Log:
    """One JSON line per event in the output folder, and a line for people; rank 0 only."""

    def __init__(self, output: Path, rank: int):
        self._path, self._silent = output / "log.jsonl", rank != 0

    def __call__(self, event: str, **figures: object) -> None:
        if self._silent:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a") as file:
            file.write(json.dumps({"event": event} | figures) + "\n")
        print(f"{event}: " + ", ".join(f"{key} {value}" for key, value in figures.items()), flush=True)


IDENTITY = "pretraining.json"  # in the folder of an unfinished pretraining


@dataclass(frozen=True)
class Validation:
    """Held-out figures per token: mean loss in nats, accuracy of the most likely token."""

    loss: float
    accuracy: float
    tokens: int


def pretrain(config: PretrainConfig, transport: Transport, resume: bool) -> Family | None:
    """Train every depth and write the family folder; called by all ranks.

    Returns:
        The family on rank 0, None elsewhere.

    Raises:
        CheckpointError: the output folder holds a family, or half of one and ``resume`` is not set.
        DataError: the corpus has no validation or test split.
    """
    output = Path(config.output)
    log, prepared = _Log(output, transport.rank), None
    if transport.rank == 0:
        _refuse_overwriting(output, resume)
        prepared = _prepare_corpus(config, output)
    index = ShardIndex.from_json(transport.broadcast_value(prepared, "data"))
    train, held_out = index.train(0, config.architecture.context), index.test(0, config.architecture.context)
    unigram = unigram_loss(train, held_out, config.architecture.vocabulary)
    tensors, tokens_before, done = None, 0, {}
    for position, depth in enumerate(config.architecture.depths):
        spec = _spec(config, depth)
        task = _DepthTask(
            config.schedule, position, spec, config.seed, output / "unfinished" / f"depth-{depth:02d}.safetensors", tokens_before
        )
        start = grow(tensors, spec) if tensors is not None and config.schedule.grow else None
        tensors, tokens = task.run(start, train, held_out, transport, log)
        stored = {name: tensor.half().float() for name, tensor in tensors.items()}  # what the family will hold
        result = validate(from_tensors(spec, stored), held_out, None, transport)
        tokens_before = tokens_before + tokens if config.schedule.grow else 0
        done[depth] = {
            "file": f"depth-{depth:02d}.safetensors",
            "tokens_seen": tokens,
            "tokens_seen_with_shallower_starts": max(tokens, tokens_before),
            "validation_loss": round(result.loss, 4),
            "validation_accuracy": round(result.accuracy, 4),
        }
        if transport.rank == 0:
            write_weights(output / done[depth]["file"], tensors, torch.float16)
            log("depth finished", depth=depth, **done[depth])
    if transport.rank != 0:
        return None
    _write_manifest(config, output, done, index.checksum, unigram, len(train.tokens), len(held_out.tokens))
    return open_family(str(output))


def _refuse_overwriting(output: Path, resume: bool) -> None:
    if (output / "family.json").exists():
        raise CheckpointError(f"pretraining into {output}", "a finished family lies there", "set output to a new folder")
    if not resume and output.exists() and any(output.iterdir()):
        what = "an unfinished pretraining lies there" if (output / "unfinished").exists() else "the folder is not empty"
        raise CheckpointError(f"pretraining into {output}", what, "add --resume, or set output to a new folder")


def _prepare_corpus(config: PretrainConfig, output: Path) -> dict:
    """Rank 0: read the corpus, train the tokenizer or take that of the resumed pretraining, tokenise. Returns the shard index as JSON."""
    from tokenizers import Tokenizer  # only rank 0 reads text

    corpus = read(config.data)
    held_out = corpus.validation or corpus.test
    if held_out is None:
        raise DataError(
            f"pretraining on {corpus.name}", "no validation or test split", "put a valid.parquet or test.parquet beside the training file"
        )
    path = output / "tokenizer.json"
    trained = None if path.exists() else train_tokenizer(corpus.train.texts, config.architecture.vocabulary).to_str()
    _check_or_write_identity(config, {"name": corpus.name, "checksum": corpus.checksum}, output / "unfinished" / IDENTITY)
    if trained is not None:
        write_atomically(path, trained)
    index = build(
        [("corpus", corpus.train.texts, held_out.texts)],
        Tokenizer.from_file(str(path)),
        f"{corpus.checksum}/{sha256(path)}",
        cache_folder(config.data),
    )
    return asdict(index)


def _check_or_write_identity(config: PretrainConfig, corpus: dict, path: Path) -> None:
    """What a pretraining is of; a resumed one must be of the same (raises CheckpointError)."""
    values = to_dict(config)
    now = {"corpus": corpus, **{key: values[key] for key in ("architecture", "schedule", "seed")}}
    if not path.exists():
        write_json(path, now)
        return
    before = json.loads(path.read_text())
    different = [key for key in now if now[key] != before.get(key)]
    if different:
        raise CheckpointError(
            f"--resume of {path.parent}",
            f"{', '.join(different)} differ from before",
            "resume with those it was started with",
        )


def train_tokenizer(texts: list[str], vocabulary: int):
    """Byte-level BPE (as GPT-2's) of exactly ``vocabulary`` entries, the end-of-text token first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # see _prepare_corpus

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise DataError(
            f"a vocabulary of {vocabulary}", f"the corpus gives {tokenizer.get_vocab_size()} entries", "lower architecture.vocabulary"
        )
    return tokenizer


def grow(tensors: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Weights of a deeper model that computes the same function.

    Each new block is a copy of the block before it with both residual projections zero; new
    blocks are spread evenly, none before the first old block.
    """
    old_depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    grown = {name: tensor.clone() for name, tensor in tensors.items() if not name.startswith("blocks.")}
    previous = -1
    for index in range(spec.depth):
        source = index * old_depth // spec.depth
        for name, tensor in tensors.items():
            prefix = f"blocks.{source}."
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                silent = source == previous and rest.startswith(("proj.", "fc2."))
                grown[f"blocks.{index}.{rest}"] = torch.zeros_like(tensor) if silent else tensor.clone()
        previous = source
    return grown


class _DepthTask:
    """Training of one depth, with its checkpoint."""

    def __init__(self, schedule: PretrainSchedule, position: int, spec: ModelSpec, seed: int, checkpoint: Path, tokens_before: int):
        self.schedule, self.spec, self.seed, self.checkpoint = schedule, spec, seed, checkpoint
        tokens = schedule.tokens[position if len(schedule.tokens) > 1 else 0]
        self.steps = max(1, tokens // (schedule.batch * spec.context))
        self.tokens_before = tokens_before

    def run(
        self, start: dict[str, Tensor] | None, train: Sequences, held_out: Sequences, transport: Transport, log: _Log
    ) -> tuple[dict[str, Tensor], int]:
        """Train from ``start`` (None: random) or from the checkpoint; returns weights and tokens seen."""
        saved = self._load()
        first_step = int(saved["step"][0]) if saved else 0
        begin = start or initial_tensors(self.spec, torch.Generator().manual_seed(self.seed + self.spec.depth))
        begin = {name: saved[f"model/{name}"] for name in begin} if saved else {name: tensor.clone() for name, tensor in begin.items()}
        model = from_tensors(self.spec, begin)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim == 1]
        optimizers = [AdamW(decayed, (0.9, 0.95), self.schedule.weight_decay), AdamW(plain, (0.9, 0.95), 0.0)]
        if saved:
            _restore(optimizers, saved, first_step)
        gradient = _flat_gradient(model)
        began, losses = time.monotonic(), []
        for step in range(first_step, self.steps):
            losses.append(self._step(model, optimizers, gradient, train, transport, step))
            last = step + 1 == self.steps
            if (step + 1) % self.schedule.validate_every == 0 or last:
                result = validate(model, held_out, self.schedule.early_validation_sequences, transport)
                log(
                    "step",
                    depth=self.spec.depth,
                    step=step + 1,
                    of=self.steps,
                    training_loss=round(float(np.mean(losses)), 4),
                    validation_loss=round(result.loss, 4),
                    tokens=self._tokens(step + 1),
                    seconds=round(time.monotonic() - began, 1),
                )
                losses = []
            if transport.rank == 0 and ((step + 1) % self.schedule.checkpoint_every == 0 or last):
                self._save(model, optimizers, step + 1)
        return {name: tensor.clone() for name, tensor in model.named_tensors().items()}, self._tokens(self.steps)

    def _tokens(self, steps: int) -> int:
        return steps * self.schedule.batch * self.spec.context

    def _step(
        self, model: TinyTransformer, optimizers: list[AdamW], gradient: Tensor, train: Sequences, transport: Transport, step: int
    ) -> float:
        seen = self.tokens_before // self.spec.context + step * self.schedule.batch
        rows = _rows_of_step(self.seed, seen, self.schedule.batch, len(train))
        inputs, targets = train.batch(rows[transport.rank :: transport.size])
        gradient.zero_()
        if len(inputs):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.schedule.precision == "bf16"):
                logits = model(inputs)
            # over the targets of the whole batch, so that the sum over ranks is the gradient of its mean whoever has the short row
            loss = next_token_loss(logits.float(), targets, "sum") / train.targets_in(rows)
            loss.backward()
            gradient[-1] = loss.detach()
        transport.sum(gradient.numpy())
        loss_of_all = float(gradient[-1])
        clip_gradients(list(model.parameters()), self.schedule.clip_norm)
        for optimizer in optimizers:
            optimizer.step(self._learning_rate(step))
        return loss_of_all

    def _learning_rate(self, step: int) -> float:
        """Warm-up, plateau, linear decay to a twentieth."""
        schedule = self.schedule
        rising = min(1.0, (step + 1) / schedule.warmup_steps)
        falling = min(1.0, max(0.05, (self.steps - step) / (schedule.decay_fraction * self.steps)))
        return schedule.learning_rate * min(rising, falling)

    def _save(self, model: TinyTransformer, optimizers: list[AdamW], step: int) -> None:
        from safetensors.torch import save  # only rank 0 writes

        state = {f"model/{name}": tensor for name, tensor in model.named_tensors().items()}
        for number, optimizer in enumerate(optimizers):
            state |= {f"mean/{number}/{i}": tensor for i, tensor in enumerate(optimizer.means)}
            state |= {f"square/{number}/{i}": tensor for i, tensor in enumerate(optimizer.squares)}
        state["step"] = torch.tensor([step])
        write_atomically(self.checkpoint, save(state))

    def _load(self) -> dict[str, Tensor] | None:
        """The checkpoint's tensors, None where there is none (raises CheckpointError where it is damaged)."""
        from safetensors.torch import load_file  # nothing to load in most runs

        if not self.checkpoint.exists():
            return None
        try:
            return load_file(self.checkpoint)
        except Exception as error:  # safetensors' own type
            raise CheckpointError(
                f"--resume from {self.checkpoint}", f"damaged: {error}", "delete it to train this depth again from its start"
            ) from None


def _restore(optimizers: list[AdamW], saved: dict[str, Tensor], step: int) -> None:
    """Put the optimisers where the checkpoint left off."""
    for number, optimizer in enumerate(optimizers):
        count = len(optimizer.parameters)
        optimizer.means = [saved[f"mean/{number}/{i}"] for i in range(count)]
        optimizer.squares = [saved[f"square/{number}/{i}"] for i in range(count)]
        optimizer.steps = [torch.tensor(float(step)) for _ in range(count)]


def _spec(config: PretrainConfig, depth: int) -> ModelSpec:
    shape = config.architecture
    return ModelSpec(depth, shape.width, shape.heads, shape.context, shape.vocabulary)


def _flat_gradient(model: TinyTransformer) -> Tensor:
    """One buffer behind all gradients, and one more place for the loss, so that a step sums all in one collective."""
    flat = torch.zeros(sum(p.numel() for p in model.parameters()) + 1)
    offset = 0
    for parameter in model.parameters():
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    return flat


def _rows_of_step(seed: int, seen: int, batch: int, rows: int) -> list[int]:
    """The next ``batch`` rows after ``seen``, each pass over the corpus in its own random order."""
    epochs = range(seen // rows, (seen + batch - 1) // rows + 1)
    orders = {epoch: seeds.generator(seed, "pretraining order", epoch).permutation(rows) for epoch in epochs}
    return [int(orders[i // rows][i % rows]) for i in range(seen, seen + batch)]


def validate(model: TinyTransformer, held_out: Sequences, limit: int | None, transport: Transport, batch: int = 32) -> Validation:
    """Loss and accuracy over the first ``limit`` sequences (None: all), shared out over the ranks."""
    count = len(held_out) if limit is None else min(limit, len(held_out))
    sums = np.zeros(3, np.float64)
    with torch.no_grad():
        for start in range(transport.rank * batch, count, transport.size * batch):
            inputs, targets = held_out.batch(range(start, min(start + batch, count)))
            logits = model(inputs)
            sums[0] += float(next_token_loss(logits, targets, "sum"))
            sums[1] += int((logits.argmax(-1) == targets).sum())
            sums[2] += int((targets != IGNORED_TARGET).sum())
    total = np.sum(transport.broadcast_value(transport.gather(sums.tolist(), "losses"), "losses"), axis=0)
    return Validation(total[0] / total[2], total[1] / total[2], int(total[2]))


def unigram_loss(train: Sequences, held_out: Sequences, vocabulary: int) -> float:
    """Nats per held-out token of a model that knows only how frequent each token is in the training text."""
    counts = np.bincount(train.tokens, minlength=vocabulary) + 1.0
    return float(-np.mean(np.log(counts / counts.sum())[held_out.tokens[1:]]))


def _write_manifest(
    config: PretrainConfig, output: Path, depths: dict, tokens_checksum: str, unigram: float, train_tokens: int, held_out_tokens: int
) -> None:
    corpus = json.loads((output / "unfinished" / IDENTITY).read_text())["corpus"]
    shape = config.architecture
    write_json(
        output / "family.json",
        {
            "format": FORMAT,
            "architecture": {"width": shape.width, "heads": shape.heads, "context": shape.context, "vocabulary": shape.vocabulary},
            "depths": {str(depth): entry for depth, entry in depths.items()},
            "unigram_validation_loss": round(unigram, 4),
            "uniform_validation_loss": round(math.log(shape.vocabulary), 4),
            "corpus": corpus | {"train_tokens": train_tokens, "validation_tokens": held_out_tokens, "tokens_checksum": tokens_checksum},
            "command": shlex.join(["distfl", *sys.argv[1:]]),
            "config": to_dict(config) | {"data": to_dict(config.data) | {"cache": None}},
            "versions": {"torch": torch.__version__},
        },
    )
    for path in sorted((output / "unfinished").iterdir()):
        path.unlink()
    (output / "unfinished").rmdir()
