"""Generated tasks: against solvers written another way, balanced, the same on every machine, and without overlap between splits."""

import statistics
import sys
from collections import deque
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from attnbench.errors import UserError
from attnbench.tasks import digits, images, listops, mqar, pathfinder, trained

SPLITS = ("train", "validation", "test")
DIGESTS = {
    "mqar": "17f0342bf482e1bb",
    "mqar:graded": "b8f984b1031f7f19",
    "listops": "9fa4b3150f554842",
    "pathfinder": "a45a2ece6ac41197",
    "pathfinder:easy": "a53d32d606bf2290",
    "pathfinder:intermediate": "59746dcb564d99ea",
}
"""of 5 training examples with seed 0: what was measured on one machine is drawn again on another"""
GENERATED = tuple(DIGESTS)
SIZES = {name: {"mqar": 256, "listops": 512}.get(name.partition(":")[0], 1024) for name in GENERATED}
LEVELS = {"easy": (6, 2), "intermediate": (9, 3), "hard": (14, 4)}
"""dashes of a long path and of a distractor"""


@pytest.mark.parametrize("name", GENERATED)
def test_a_batch_is_a_pure_function_and_never_changes(name):
    draw = trained.get(name).batch
    first = draw("train", 0, 5, SIZES[name], 0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert first.digest == draw("train", 0, 5, SIZES[name], 0).digest == DIGESTS[name]
    others = [draw("train", 1, 5, SIZES[name], 0), draw("train", 0, 5, SIZES[name], 1), draw("test", 0, 5, SIZES[name], 0)]
    assert len({x.digest for x in (first, *others)}) == 4


@pytest.mark.parametrize("name", GENERATED)
def test_splits_share_no_example(name):
    draw = trained.get(name).batch
    seen = {split: {x.numpy().tobytes() for i in range(4) for x in draw(split, i, 16, SIZES[name], 0).inputs} for split in SPLITS}
    assert all(len(x) == 64 for x in seen.values()), "an example came twice"
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


@pytest.mark.parametrize("name", GENERATED)
def test_batches_look_as_the_task_says(name):
    task = trained.get(name)
    batch = task.batch("train", 3, 7, SIZES[name], 2)
    assert batch.inputs.shape == batch.mask.shape == (7, SIZES[name])
    assert batch.targets.shape == batch.groups.shape == ((7, SIZES[name]) if task.per_token else (7,))
    assert batch.inputs.dtype == batch.targets.dtype == batch.groups.dtype == torch.long
    assert batch.mask.dtype == torch.bool
    assert 0 <= batch.inputs.min() <= batch.inputs.max() < task.vocabulary
    assert 0 <= batch.targets.min() <= batch.targets.max() < task.classes


# multi-query associative recall


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


# ListOps

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


# Pathfinder


def components(image, reach):
    """Number of each pixel's component, by flood fill over moves of at most `reach` pixels a side; 0 is blank."""
    found, number = np.zeros(image.shape, int), 0
    for start in zip(*np.nonzero(image), strict=True):
        if found[start]:
            continue
        number += 1
        queue = deque([start])
        found[start] = number
        while queue:
            y, x = queue.popleft()
            y0, x0 = max(0, y - reach), max(0, x - reach)
            window = image[y0 : y + reach + 1, x0 : x + reach + 1] & (found[y0 : y + reach + 1, x0 : x + reach + 1] == 0)
            for dy, dx in zip(*np.nonzero(window), strict=True):
                found[y0 + dy, x0 + dx] = number
                queue.append((y0 + dy, x0 + dx))
    return found


def dots(image, radius):
    """Centres of the discs of a radius that the image holds."""
    reach = int(radius)
    offsets = [(y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1) if y * y + x * x <= radius * radius]
    padded = np.pad(image, reach)
    side = len(image)
    hold = np.all([padded[reach + y : reach + y + side, reach + x : reach + x + side] for y, x in offsets], 0)
    clipped = np.pad(np.ones_like(image), reach)
    inside = np.sum([clipped[reach + y : reach + y + side, reach + x : reach + x + side] for y, x in offsets], 0)
    return list(zip(*np.nonzero(hold & (inside == len(offsets))), strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [256, 576, 1024, 4096])
def test_pathfinder_is_solved_by_flood_fill(n, level):
    side, sizes, solved = int(n**0.5), pathfinder.drawing(n, LEVELS[level][0]), 0
    batch = pathfinder.LEVELS[level].batch("train", 0, 32, n, 0)
    for tokens, target in zip(batch.inputs, batch.targets, strict=True):
        image = tokens.reshape(side, side).numpy().astype(bool)
        found = dots(image, sizes.radius)
        if len(found) == 2:  # a dot on the border is cut and not looked for
            paths = components(image, 2)
            assert int(paths[found[0]] == paths[found[1]]) == int(target)
            solved += 1
    assert solved > 8


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [1024, 4096])
def test_pathfinder_draws_two_long_paths_of_single_dashes(n, level):
    sizes, side, seen = pathfinder.drawing(n, LEVELS[level][0]), int(n**0.5), []
    assert (sizes.dashes, sizes.short, sizes.distractors) == (*LEVELS[level], 5)
    for tokens in pathfinder.LEVELS[level].batch("test", 0, 12, n, 0).inputs:
        image = tokens.reshape(side, side).numpy().astype(bool)
        paths = components(image, 2)
        pixels = np.bincount(paths.flatten())[1:]
        assert 2 <= len(pixels) <= 2 + sizes.distractors
        long = pixels >= sizes.dashes * sizes.dash
        assert long.sum() == 2, "two long paths, and distractors that are shorter"
        short = pixels[~long]
        assert set(short.tolist()) <= {sizes.short * sizes.dash}
        seen.append(len(short))
    assert max(seen) >= sizes.distractors - 1, "at the hard level some get stuck"


@pytest.mark.parametrize("level", LEVELS)
def test_pathfinder_is_balanced_and_the_distance_of_the_dots_tells_nothing(level):
    batches = [pathfinder.LEVELS[level].batch("train", i, 64, 1024, 0) for i in range(6)]
    targets, groups = torch.cat([x.targets for x in batches]), torch.cat([x.groups for x in batches])
    assert all(int(x.targets.sum()) == 32 for x in batches)
    best = max(float(((groups < cut) == targets.bool()).double().mean()) for cut in range(45))
    worst = min(float(((groups < cut) == targets.bool()).double().mean()) for cut in range(45))
    assert max(best, 1 - worst) < 0.58
    ink = torch.cat([x.inputs.sum(1) for x in batches]).double()
    difference = ink[targets == 1].mean() - ink[targets == 0].mean()
    assert abs(difference) < 4 * ink.std() * (4 / len(ink)) ** 0.5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [256, 1024, 4096])
def test_where_the_dots_lie_tells_nothing(n, level):
    """Each connected image has one of the other class with dots as far from the middle and from each other, up to the tolerance."""
    side, batch = int(n**0.5), pathfinder.LEVELS[level].batch("train", 0, 64, n, 0)
    seen = {0: [], 1: []}
    for tokens, target in zip(batch.inputs, batch.targets.tolist(), strict=True):
        found = np.array(dots(tokens.reshape(side, side).numpy().astype(bool), pathfinder.drawing(n).radius)) - (side - 1) / 2
        if len(found) == 2:
            radii = np.sort(np.hypot(*found.T))
            seen[target].append([*radii, np.hypot(*(found[0] - found[1])) / 2**0.5])
    apart = np.abs(np.array(seen[1])[:, None] - np.array(seen[0])).max(-1).min(1)
    assert len(apart) > 24
    assert (apart <= 1.5 * side / 32).mean() > 0.9, "all but those whose partner has a crossing that looks like a dot"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_small_batches_of_pathfinder_are_balanced_too(size, level):
    counts = [int(pathfinder.LEVELS[level].batch("train", i, size, 256, 0).targets.sum()) for i in range(12)]
    assert set(counts) == {size // 2, (size + 1) // 2}


@pytest.mark.parametrize(("n", "words"), [(1000, "no square"), (100, "at least 16 x 16")])
def test_pathfinder_refuses_images_it_cannot_draw(n, words):
    with pytest.raises(UserError, match=words):
        pathfinder.TASK.batch("train", 0, 1, n, 0)


def test_levels_of_pathfinder_go_by_name():
    for level in ("easy", "intermediate"):
        task = trained.get(f"pathfinder:{level}")
        assert task is trained.get(f"pathfinder:{level}") is pathfinder.LEVELS[level]
        assert (task.name, task.stem) == (f"pathfinder:{level}", f"pathfinder-{level}")
        assert trained.by_name(task)
    assert trained.get("pathfinder:hard") is trained.get("pathfinder") is pathfinder.TASK, "the plain task is the hard one"
    assert len({pathfinder.LEVELS[level].batch("train", 0, 4, 1024, 0).digest for level in LEVELS}) == 3


def test_only_a_folder_is_a_folder():
    assert [trained.folder(name) for name in ("mqar", "pathfinder:easy", "images", "images:/a/b:c")] == ["", "", "", "/a/b:c"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pathfinder:eazy", "unknown level of pathfinder 'eazy': did you mean easy?"),
        ("pathfinder:7", "unknown level of pathfinder '7': choose from easy, hard, intermediate"),
        ("listops:easy", "task listops reads no folder and has no levels: leave out easy"),
    ],
)
def test_a_level_that_does_not_exist_is_one_line(name, message):
    with pytest.raises(UserError) as raised:
        trained.get(name)
    assert str(raised.value) == message


# digits


@pytest.fixture
def handwriting(monkeypatch):
    """A stand-in of the data set, of the same size and range, where scikit-learn is absent; 17 grey levels that tell images apart."""
    rng = np.random.default_rng(0)
    data = SimpleNamespace(images=rng.integers(0, 17, (1797, 8, 8)).astype(float), target=np.arange(1797) % 10)
    module = ModuleType("sklearn.datasets")
    module.load_digits = lambda: data
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)
    digits._load.cache_clear()
    yield data
    digits._load.cache_clear()


def test_digits_go_once_through_every_image_of_a_split_in_an_epoch():
    seen = {split: np.concatenate([digits.places(split, i, 50, 3) for i in range(count // 50)]) for split, count in digits.SIZES.items()}
    assert {split: len(set(x.tolist())) for split, x in seen.items()} == {"train": 1150, "validation": 300, "test": 300}
    assert not set(seen["train"].tolist()) & set(seen["test"].tolist())
    assert not set(seen["validation"].tolist()) & set(seen["test"].tolist())
    epochs = [digits.places("train", epoch, 1197, 3) for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert not np.array_equal(*epochs)
    assert np.array_equal(digits.places("test", 0, 300, 0), digits.places("test", 1, 300, 9)), "the split is fixed"


def test_digits_at_their_own_size_are_the_images_and_larger_ones_lie_between_them(handwriting):
    batch = digits.TASK.batch("test", 0, 20, 64, 0)
    chosen = digits.places("test", 0, 20, 0)
    assert torch.equal(batch.inputs.reshape(20, 8, 8), torch.from_numpy(handwriting.images[chosen] / 8 - 1).float())
    assert batch.targets.tolist() == handwriting.target[chosen].tolist()
    larger = digits.TASK.batch("test", 0, 20, 1024, 0).inputs.reshape(20, 32, 32)
    at = ((np.arange(32) + 0.5) / 4 - 0.5).clip(0, 7)  # where the middle of a new pixel lies among the old ones
    weights = torch.from_numpy(np.stack([np.interp(at, np.arange(8), row) for row in np.eye(8)], 1)).float()
    torch.testing.assert_close(larger, weights @ batch.inputs.reshape(20, 8, 8) @ weights.T)
    assert batch.digest == digits.TASK.batch("test", 0, 20, 64, 5).digest


def test_digits_without_the_package_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._load.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'attnbench\[tasks\]'"):
        digits.TASK.batch("train", 0, 1, 64, 0)


def test_digits_are_balanced_in_every_split():
    pytest.importorskip("sklearn", reason="the real images come with scikit-learn, which no other test needs")
    digits._load.cache_clear()
    for split, count in digits.SIZES.items():
        shares = torch.bincount(digits.TASK.batch(split, 0, count, 64, 0).targets, minlength=10) / count
        assert shares.min() > 0.07
        assert shares.max() < 0.13


def test_images_need_a_folder():
    with pytest.raises(UserError, match="--data PATH"):
        images.TASK.batch("train", 0, 1, 196, 0)
