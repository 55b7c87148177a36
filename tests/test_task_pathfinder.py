"""Pathfinder: against a flood fill at every level, balanced, and with dots whose places tell nothing."""

from collections import deque

import numpy as np
import pytest
import torch

from attnbench.errors import UserError
from attnbench.tasks import pathfinder, trained

LEVELS = {"easy": (6, 2), "intermediate": (9, 3), "hard": (14, 4)}
"""dashes of a long path and of a distractor"""


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


@pytest.mark.parametrize("n", [1024, 4096])
def test_graded_pathfinder_has_paths_of_every_grade_and_says_which(n):
    side, batch, solved = int(n**0.5), trained.get("pathfinder:graded").batch("train", 0, 40, n, 0), []
    assert torch.bincount(batch.groups).tolist() == [0, 0, 0, 10, 10, 10, 10]
    assert torch.bincount(batch.groups[batch.targets == 1]).tolist() == [0, 0, 0, 5, 5, 5, 5], "as many of each class in every grade"
    assert (batch.groups[:10].unique()).numel() > 1, "grades are mixed: a part of a batch has of each"
    for tokens, target, dashes in zip(batch.inputs, batch.targets.tolist(), batch.groups.tolist(), strict=True):
        image, sizes = tokens.reshape(side, side).numpy().astype(bool), pathfinder.drawing(n, dashes)
        paths, found = components(image, 2), dots(image, sizes.radius)
        pixels = np.bincount(paths.flatten())[1:]
        assert (pixels >= sizes.dashes * sizes.dash).sum() == 2, "two long paths of so many dashes"
        if len(found) == 2:
            assert int(paths[found[0]] == paths[found[1]]) == target
            solved.append(dashes)
    assert set(solved) == {3, 4, 5, 6}


@pytest.mark.parametrize("size", [1, 2, 7])
def test_graded_pathfinder_fills_small_batches(size):
    batch = trained.get("pathfinder:graded").batch("train", 1, size, 256, 0)
    assert batch.inputs.shape == (size, 256)
    assert set(batch.groups.tolist()) == {pathfinder.drawing(256, 3).dashes}, "at 16 x 16 every path has the fewest dashes"
    seen = {g for i in range(4) for g in trained.get("pathfinder:graded").batch("train", i, size, 1024, 0).groups.tolist()}
    assert seen == set(pathfinder.GRADES), "batches too small for all grades take turns"


@pytest.mark.parametrize(("n", "words"), [(1000, "no square"), (100, "at least 16 x 16")])
def test_pathfinder_refuses_images_it_cannot_draw(n, words):
    with pytest.raises(UserError, match=words):
        pathfinder.TASK.batch("train", 0, 1, n, 0)


def test_levels_of_pathfinder_go_by_name():
    for level in ("easy", "intermediate", "graded"):
        task = trained.get(f"pathfinder:{level}")
        assert task is trained.get(f"pathfinder:{level}") is pathfinder.LEVELS[level]
        assert (task.name, task.stem) == (f"pathfinder:{level}", f"pathfinder-{level}")
        assert trained.by_name(task)
    assert trained.get("pathfinder:hard") is trained.get("pathfinder") is pathfinder.TASK, "the plain task is the hard one"
    assert len({pathfinder.LEVELS[level].batch("train", 0, 4, 1024, 0).digest for level in LEVELS}) == 3


EDGES = (2.5, 4, 6, 8, 11, 15)
"""pixels around a dot, from which to which ink is counted"""


def surroundings(split, batches):
    """Of each image: grade, distance of the dots, and ink in rings around the one with less of it and the other; classes; grades."""
    rows, classes, grades = [], [], []
    y, x = np.mgrid[:32, :32]
    for index in range(batches):
        batch = trained.get("pathfinder:graded").batch(split, index, 64, 1024, 0)
        for tokens, target, dashes in zip(batch.inputs, batch.targets.tolist(), batch.groups.tolist(), strict=True):
            image = tokens.reshape(32, 32).numpy().astype(bool)
            if len(found := dots(image, 1.5)) != 2:
                continue
            rings = [np.histogram(np.hypot(y - a, x - b)[image], EDGES)[0] for a, b in found]
            apart = np.subtract(*found)
            rows.append([*np.eye(4)[dashes - 3], np.hypot(*apart), np.abs(apart).max(), *np.min(rings, 0), *np.max(rings, 0)])
            classes.append(target)
            grades.append(dashes)
    return torch.tensor(np.array(rows), dtype=torch.float32), torch.tensor(classes), np.array(grades)


def test_ink_in_rings_around_the_dots_tells_the_class_of_short_paths_in_part():
    """What a model may know that follows no path: so much is bounded, and named where accuracies are read."""
    (inputs, targets, _), (others, wanted, grades) = surroundings("train", 40), surroundings("test", 20)
    mean, spread = inputs.mean(0), inputs.std(0)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(inputs.shape[1], 32), torch.nn.GELU(), torch.nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net((inputs - mean) / spread), targets).backward()
        optimizer.step()
    right = (net((others - mean) / spread).argmax(1) == wanted).double().numpy()
    by_grade = {dashes: round(float(right[grades == dashes].mean()), 3) for dashes in pathfinder.GRADES}
    print(f"rings around the dots tell {right.mean():.3f}, by dashes {by_grade}")
    assert right.mean() < 0.74
    assert by_grade[6] < 0.65
