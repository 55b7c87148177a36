"""Recall and ListOps: against a dictionary and recursive descent, and with the shares of their laws."""

import statistics
from collections import deque

import numpy as np
import pytest
import torch

from attnbench.errors import UserError
from attnbench.tasks import listops, mqar, trained


@pytest.mark.parametrize("n", [16, 256, 1024])
@pytest.mark.parametrize("name", ["mqar", "mqar:graded"])
def test_recall_is_answered_by_a_dictionary_that_reads_from_the_left(name, n):
    batch = trained.get(name).batch("train", 0, 10, n, 0)
    for tokens, targets, mask, groups in zip(batch.inputs.tolist(), batch.targets.tolist(), batch.mask.tolist(), batch.groups, strict=True):
        known, answers = {}, {}
        for at, token in enumerate(tokens):
            if at + 1 < n and token < 4096 and token in known and tokens[at + 1] == mqar.MASK:
                answers[at] = known[token]
            if token and token < 4096 and at + 1 < n:
                known.setdefault(token, tokens[at + 1])
        assert answers == {at: target for at, (target, asked) in enumerate(zip(targets, mask, strict=True)) if asked}
        assert len(answers) == int(groups[0])
        assert groups.unique().numel() == 1


def test_recall_asks_each_key_once_and_hides_the_answers():
    n, count = 256, 64
    batch = mqar.TASK.batch("test", 0, 5, n, 0)
    tokens, mask = batch.inputs[4], batch.mask[4]
    assert batch.groups[:, 0].tolist() == [4, 8, 16, 32, count] == list(mqar.pairs(n))
    keys, values = tokens[0 : 2 * count : 2], tokens[1 : 2 * count : 2]
    assert keys.unique().numel() == values.unique().numel() == count
    assert keys.max() < 4096 <= values.min()
    assert torch.equal(tokens[mask].sort().values, keys.sort().values)
    assert (tokens[1:][mask[:-1]] == mqar.MASK).all()
    assert int((tokens != mqar.MASK).sum()) == 3 * count, "all but pairs and questions is empty"


@pytest.mark.parametrize(("n", "pairs"), [(4, [1]), (16, [4]), (64, [4, 8, 16]), (1024, [4, 8, 16, 32, 64, 128, 256])])
def test_graded_recall_doubles_the_pairs_from_four_on(n, pairs):
    task = trained.get("mqar:graded")
    assert task.alike
    assert task.batch("train", 0, 2 * len(pairs), n, 0).mask.sum(1).tolist() == 2 * pairs


def test_recall_gaps_follow_the_power_law():
    """The mean logarithm of the first gap drawn, of one that is drawn alone, against that of the law."""
    n, count, space = 64, 1, 31
    first = []
    for index in range(40):
        batch = mqar.TASK.batch("train", index, 50, n, 0)
        alone = batch.groups[:, 0] == count
        first += ((batch.mask[alone].int().argmax(1) - 2) // 2).tolist()
    law = np.arange(1, space + 1) ** (mqar.POWER - 1.0)
    law, logs = law / law.sum(), np.log(np.arange(1, space + 1))
    mean = (law * logs).sum()
    error = ((law * logs**2).sum() - mean**2) ** 0.5 / len(first) ** 0.5
    assert abs(np.log(np.array(first) + 1).mean() - mean) < 4 * error


@pytest.mark.parametrize("n", [255, 2, 16384])
def test_recall_refuses_lengths_it_cannot_fill(n):
    with pytest.raises(UserError, match="even N"):
        mqar.TASK.batch("train", 0, 1, n, 0)


OPERATIONS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda x: int(statistics.median(x)),
    "[SM": lambda x: sum(x) % 10,
}


def evaluate(words):
    """Value and depth of an expression, by recursive descent; checks the number of arguments."""
    word = words.popleft()
    if word not in OPERATIONS:
        return int(word), 1
    arguments, depths = [], []
    while words[0] != "]":
        value, depth = evaluate(words)
        arguments.append(value)
        depths.append(depth)
    words.popleft()
    assert 2 <= len(arguments) <= listops.ARGUMENTS
    return OPERATIONS[word](arguments), 1 + max(depths)


@pytest.mark.parametrize("n", [32, 200, 2048])
def test_listops_is_valued_by_recursive_descent(n):
    batch, longest = listops.TASK.batch("train", 0, 24, n, 0), min(n, 2000)
    for tokens, mask, target, group in zip(batch.inputs, batch.mask, batch.targets, batch.groups, strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert not tokens[length:].any()
        assert longest // 4 < length < longest
        assert int(group) <= length < int(group) + longest // 8
        words = deque(listops.TOKENS[i] for i in tokens[:length])
        value, depth = evaluate(words)
        assert not words
        assert value == int(target)
        assert depth <= listops.DEPTH


def test_listops_has_the_shares_of_its_grammar():
    targets = torch.cat([listops.TASK.batch("train", i, 64, 2048, 0).targets for i in range(10)])
    shares = torch.bincount(targets, minlength=10) / len(targets)
    assert shares.min() > 0.04
    assert shares.max() < 0.22
    inputs = torch.cat([listops.TASK.batch("test", i, 64, 2048, 0).inputs for i in range(4)])
    counts = torch.bincount(inputs.flatten(), minlength=16)
    assert torch.allclose(counts[1:11] / counts[1:11].sum(), torch.full((10,), 0.1), atol=4 * 0.3 / float(counts[1:11].sum()) ** 0.5)
    assert torch.allclose(counts[11:15] / counts[11:15].sum(), torch.full((4,), 0.25), atol=4 * 0.44 / float(counts[11:15].sum()) ** 0.5)
    assert counts[11:15].sum() == counts[15]


def test_listops_refuses_lengths_without_room():
    with pytest.raises(UserError, match="at least 32"):
        listops.TASK.batch("train", 0, 1, 16, 0)
