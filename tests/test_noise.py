"""A/A comparisons on the committed records: the same cell against itself is called different at most once in twenty."""

from pathlib import Path

import numpy as np
import pytest

from attnbench import frame, series, stats
from attnbench.stats import Verdict

RESULTS = Path(__file__).parent.parent / "results"
KEYS = ["suite", "device", "env_id", "commit", "implementation", "label", "params", "task", "mode", "n", *series.CONDITIONS]
COMPARISONS = 1000


@pytest.fixture(scope="module")
def measured():
    table = frame.load(RESULTS)[0]
    return table[table["time_s"].notna()]


def differ(a, b, noise, seed):
    return stats.verdict(stats.ratio(a, b, resamples=200, seed=seed), noise) is not Verdict.NOT_SEPARABLE


def test_halves_of_one_cell_drawn_at_random_do_not_differ(measured):
    """The bootstrap interval alone, on recorded distributions with their heavy tails."""
    random = np.random.default_rng(0)
    cells = [samples for samples in measured["samples_s"] if len(samples) >= 6]
    called = 0
    for i in range(COMPARISONS):
        samples = random.permutation(cells[random.integers(len(cells))])
        called += differ(samples[: len(samples) // 2], samples[len(samples) // 2 :], None, i)
    assert called <= 0.05 * COMPARISONS


def test_a_cell_measured_twice_does_not_differ_beyond_the_floor_of_the_other_pairs(measured):
    """Recorded A/A pairs in turn, each resampled and held against the floor that the suite's other pairs give."""
    first, again = (measured[(measured["replicate"] > 0) == twice] for twice in (False, True))
    joined = first.merge(again, on=KEYS, suffixes=("_a", "_b"))
    cases = [case for _, rows in joined.groupby(["suite", "device", "mode"]) if len(rows) > 3 for case in held_out(rows)]
    assert len(cases) >= 20, "the committed results hold A/A pairs"
    random = np.random.default_rng(1)
    called = bare = 0
    for i in range(COMPARISONS):
        a, b, noise = cases[i % len(cases)]
        a, b = (random.choice(x, len(x)) for x in (a, b))
        called += differ(a, b, noise, i)
        bare += differ(a, b, None, i)
    assert called <= 0.05 * COMPARISONS
    assert bare > 0.2 * COMPARISONS, "without a floor, samples of one run pass for certainty: this is what the floor is for"


def held_out(rows):
    """Samples of both measurements of each pair, and the noise floor of the other pairs."""
    pairs = list(zip(rows["time_s_a"], rows["time_s_b"], strict=True))
    for i, (a, b) in enumerate(zip(rows["samples_s_a"], rows["samples_s_b"], strict=True)):
        yield a, b, stats.floor(pairs[:i] + pairs[i + 1 :], min(pairs[i]))
