"""``distfl calibrate``: predicted peaks against measured ones, of cases drawn at random."""

import json
import subprocess
import sys

import pytest

from distfl.calibration import CODECS, Case, Comparison, drawn, grid, line, sending, verdict
from distfl.config import TransportConfig
from distfl.costs import Costs
from distfl.encoding import encoding_of
from distfl.model import ModelSpec
from distfl.recipes import Recipe
from distfl.units import UnitTable

CASE = Case(ModelSpec(3, 64, 2, 32, 256), 8, "adamw", True, 2, Recipe(4), True)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [4, 5])
def test_predicted_peaks_are_the_measured_ones(seed, tmp_path):
    command = [sys.executable, "-m", "distfl", "calibrate", "--draw", "24", "--seed", str(seed), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = [json.loads(text) for text in (tmp_path / "out" / "calibration.jsonl").read_text().splitlines()]
    assert len(found) == 24 and (tmp_path / "out" / "calibration.png").stat().st_size > 10_000
    errors = sorted(case["error"] for case in found)
    for case in found:  # too low means a client that runs into its cap; of the smallest clients, 3 % are a few dozen pages
        assert case["error"] > -0.03 or case["measured_bytes"] - case["predicted_bytes"] < 250_000, done.stdout
    # the hole that the logits leave is now and then used after all, and the prediction that much too high
    assert errors[-1] < 0.15 and errors[-6] < 0.05, done.stdout
    assert sorted(map(abs, errors))[12] < 0.02, done.stdout


ENFORCED = """
import json, sys
from pathlib import Path
from distfl.allocator import exact_allocator, restart_prepared
restart_prepared()
import torch
from distfl.calibration import hosted, rank_of, sending
from distfl.caps.rlimit import Rlimit
from distfl.hosting import rehearse
torch.set_num_threads(1)
exact_allocator()
cap = Rlimit()
for case in list(sending())[::2]:
    state = rank_of(case, Path(sys.argv[1]))
    predicted = state.costs.peak(state.table.suffix(case.blocks), case.recipe).bytes
    cap.prove(predicted + 300_000)
    rehearse(state)
    report = hosted(state, case, cap, predicted + 300_000)
    print(json.dumps([case.codec, report.ok, report.reason, predicted, report.measured_peak_bytes]), flush=True)
"""


def test_a_client_that_holds_most_while_it_encodes_stays_within_an_enforced_cap_by_every_codec(tmp_path):
    script = tmp_path / "enforced.py"
    script.write_text(ENFORCED)
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = [json.loads(text) for text in done.stdout.splitlines()]
    assert [codec for codec, *_ in found] == list(CODECS)
    for codec, ok, reason, predicted, measured in found:
        assert ok, (codec, reason)
        assert -0.03 < predicted / measured - 1 < 0.03 and measured <= predicted + 100_000, done.stdout


def test_in_the_codecs_cases_encoding_is_the_fullest_moment():
    for case in sending():
        costs = Costs(UnitTable(case.spec), case.batch, 0, encoding=encoding_of(TransportConfig(codec=case.codec)))
        moments = costs.peak(costs.table.suffix(case.blocks), case.recipe).moments
        assert max(moments, key=moments.get) == "sending"


def test_the_grid_has_cases_enough_and_every_lever_alone_and_together():
    cases = list(grid())
    assert len(cases) == len(set(cases)) >= 100
    assert {case.spec.width for case in cases} == {128, 192, 256}
    recipes = {
        (case.recipe.micro_batch < case.batch, case.recipe.loss_chunk is not None, case.recipe.recomputed > 0, case.recipe.fused_update)
        for case in cases
    }
    assert {(True, False, False, False), (False, True, False, False), (True, True, True, False), (False, True, True, True)} <= recipes


def test_draws_are_repeatable_and_can_be_trained():
    cases = list(drawn(200, 7))
    assert cases == list(drawn(200, 7)) and len(set(cases)) > 190 and cases != list(drawn(200, 8))
    for case in cases:
        assert case.spec.width % case.spec.heads == 0
        assert 1 <= case.blocks <= case.spec.depth and case.recipe.recomputed <= case.blocks and case.recipe.micro_batch <= case.batch
        assert not case.recipe.fused_update or (case.recipe.micro_batch == case.batch and not case.clip)  # else it would change the result
        assert UnitTable(case.spec).trained_blocks(UnitTable(case.spec).suffix(case.blocks)) == case.blocks


def test_the_verdict_names_the_margin_that_would_have_been_enough():
    found = [Comparison(CASE, 10_000_000, 10_420_000), Comparison(CASE, 10_000_000, 9_600_000), Comparison(CASE, 10_000_000, 10_000_000)]
    text = verdict(found)
    assert "3 cases: median error 4.03 %" in text and "lowest -4.0 %, highest +4.2 %" in text and "memory.margin_mb=0.5 covers" in text
    assert "-4.0 %" in line(found[0]) and "micro-batches of 4" in line(found[0])
    assert "memory.margin_mb=0.0 covers" in verdict(found[1:])
