"""Accuracy as a task of a suite: cases and their ids, records, refusals, pruning, the suite."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_support import call
from training_support import case, model, task

from attnbench import store, suite, suite_file
from attnbench.batches import Prepared
from attnbench.case import Case
from attnbench.cell import CellRunner
from attnbench.cli._options import read_axes, read_budget, read_settings
from attnbench.errors import UserError
from attnbench.protocol import Protocol
from attnbench.record import Record, Status
from attnbench.tasks import accuracy, routing, trained
from attnbench.tasks.models import recipe
from attnbench.tasks.swapped import base

RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.rglob(store.RECORDS)), ids=lambda p: "-".join(p.parts[-3:-1]))
def test_cases_of_committed_records_keep_their_ids(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines
    assert all(Case.from_dict(line["case"]).case_id == line["case_id"] for line in lines)


def test_there_are_committed_records_of_speed_whose_ids_are_held() -> None:
    assert any("speed" in path.parts for path in RESULTS.rglob(store.RECORDS))


def test_a_case_that_trains_survives_its_json_form() -> None:
    made = case(positions="learned", trained_with="softmax")
    data = json.loads(json.dumps(made.as_dict()))
    assert Case.from_dict(data) == made
    assert data["positions"] == "learned"
    assert "positions" not in replace(made, positions="rotary").as_dict()


def test_a_record_of_training_is_read_back_as_it_was_written() -> None:
    record = accuracy.run(case(), "cpu")
    assert record.status is Status.OK, record.reasons
    assert Record.from_json(record.to_json()) == record


def test_the_record_holds_what_was_tried_and_what_was_chosen() -> None:
    record = accuracy.run(case("linformer", {"rank": 4}, rates="1e-9/0.001", steps=20), "cpu")
    training = record.training
    assert [trial.rate for trial in training.trials] == [1e-9, 0.001]
    assert training.rate in (1e-9, 0.001)
    assert {t.rate: t.steps for t in training.trials} == {training.rate: 20, 1e-9 if training.rate == 0.001 else 0.001: 7}
    assert all(len(t.losses) == t.steps == t.validation[-1][0] and t.tokens_per_s > 0 for t in training.trials)
    assert training.width == 8
    assert training.parameters == record.metrics["parameters"] > training.mixing_parameters == record.learned == 2 * 4 * 16
    assert training.group == "pairs"
    assert set(training.groups) <= {"1", "2", "4"}
    assert min(training.groups.values()) <= record.metrics["accuracy"] <= max(training.groups.values())
    assert training.data_hash == trained.get("mqar").batch("train", 0, 4, 16, 0).digest
    assert record.timing is None
    assert record.memory is None


def test_the_same_case_gives_the_same_record_and_another_seed_another() -> None:
    def curve(seed: int) -> object:
        record = accuracy.run(case(seed=seed), "cpu")
        return [trial.losses for trial in record.training.trials], record.metrics["test_loss"]

    assert curve(0) == curve(0) != curve(1)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: case("mita", {"causal": True, "landmarks": 4, "topk": 4}), "no causal form"),
        (
            lambda: case(params={"causal": True}, data="pathfinder", n=256),
            "pathfinder is a bidirectional task, and softmax with causal = true",
        ),
        (lambda: case(dtype="float16"), "models train in float32 or bfloat16, not in float16"),
        (
            lambda: case(trained_with="mita:landmarks=4:topk=4", params={"causal": True}),
            "trained with mita:landmarks=4:topk=4: .*no causal",
        ),
    ],
)
def test_what_cannot_be_trained_is_unsupported_with_a_reason(made, reason: str) -> None:
    record = accuracy.run(made(), "cpu")
    assert record.status is Status.UNSUPPORTED
    assert re.search(reason, "; ".join(record.reasons))
    assert record.training is None


def test_a_method_that_reads_later_tokens_is_unsupported_on_a_causal_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "get", lambda _: task(causal=True))
    record = accuracy.run(case(), "cpu")
    assert record.status is Status.UNSUPPORTED
    assert record.reasons == ("small is a causal task, and softmax with causal = false reads later tokens",)


def test_divergence_at_every_rate_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnbench.train import Trainer

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, batch: step(self, batch) * float("nan"))
    record = accuracy.run(case(rates="0.001/0.01"), "cpu")
    assert record.status is Status.DIVERGED
    assert [trial.diverged for trial in record.training.trials] == [True, True]
    assert not record.metrics
    again = Record.from_json(record.to_json())
    assert again.training.rate != again.training.rate  # no rate was chosen
    assert store.done([record], "", 1.0) == {record.case.case_id: record}


def test_a_cell_trains(tmp_path: Path) -> None:
    record = CellRunner("cpu", Protocol(), checkpoints=tmp_path).attempt(case())
    assert record.status is Status.OK, record.reasons
    assert not list(tmp_path.iterdir()), "checkpoints of a finished case are gone"


def test_a_case_goes_on_from_the_checkpoints_of_a_killed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnbench.train import Trainer

    made = case(rates="0.001/0.01")
    whole = accuracy.run(made, "cpu")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(accuracy, "_tested", killed)
        with pytest.raises(KeyboardInterrupt):
            accuracy.run(made, "cpu", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *_: pytest.fail("a finished rate was trained again"))
        again = accuracy.run(made, "cpu", tmp_path)
    assert again.metrics["accuracy"] == whole.metrics["accuracy"]
    assert again.metrics["test_loss"] == whole.metrics["test_loss"]


def test_the_share_of_pruned_tokens_is_a_brute_force_count() -> None:
    own = model("mita")
    inputs = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))
    batch = Prepared(inputs, torch.zeros(3), torch.zeros(3), None, None)
    found = routing.layers(own, batch)
    assert len(found) == 2
    seen: list[tuple[torch.Tensor, ...]] = []
    handles = [o.register_forward_pre_hook(lambda _, a: seen.append(a)) for o in own.operators]
    own.features(inputs)
    for handle in handles:
        handle.remove()
    for layer, (q, k, _) in zip(found, seen, strict=True):
        read = set()
        loads = {}
        landmarks = torch.nn.functional.adaptive_avg_pool1d(q.transpose(2, 3).flatten(0, 1), 4).transpose(1, 2).unflatten(0, q.shape[:2])
        for b in range(3):
            for h in range(2):
                for m in range(4):
                    scores = k[b, h] @ landmarks[b, h, m]
                    read |= {(b, h, int(t)) for t in scores.topk(4).indices}
                for t in range(16):
                    expert = int((landmarks[b, h] @ q[b, h, t]).argmax())
                    loads[b, h, expert] = loads.get((b, h, expert), 0) + 1
        assert layer.pruned == pytest.approx(1 - len(read) / (3 * 2 * 16))
        most = [max(loads.get((b, h, m), 0) for m in range(4)) for b in range(3) for h in range(2)]
        assert layer.busiest == pytest.approx(sum(most) / len(most) / (16 / 4))
    assert 0 < found[0].pruned < 1


def test_methods_whose_experts_hold_no_token_have_no_pruned_share() -> None:
    batch = Prepared(torch.zeros(2, 16, dtype=torch.long), torch.zeros(2), torch.zeros(2), None, None)
    assert [layer.pruned for layer in routing.layers(model("agent"), batch)] == [None, None]


GOOD = """
question = "Does it?"
task = "accuracy"
[fixed]
n = 16
steps = 4
depth = 1
rates = "1e-3"
[[point]]
data = "mqar"
[[point]]
data = "pathfinder"
n = 256
[[method]]
name = "softmax"
"""


def loaded(tmp_path: Path, text: str = GOOD) -> suite.Suite:
    path = tmp_path / "own.toml"
    path.write_text(text)
    return suite_file.load(str(path))


def test_points_are_products_of_their_own(tmp_path: Path) -> None:
    own = loaded(tmp_path)
    assert {(c.data, c.n) for c in own.expand()} == {("mqar", 16), ("pathfinder", 256)}
    assert {(c.data, c.n) for c in own.override({"n": ["64"]}, [], {}).expand()} == {("mqar", 64), ("pathfinder", 64)}
    assert {(c.data, c.n) for c in own.override({"data": ["pathfinder"]}, [], {}).expand()} == {("pathfinder", 256)}
    assert {(c.data, c.n) for c in own.override({"data": ["listops"]}, [], {}).expand()} == {("listops", 16)}
    both = own.override({"data": ["mqar"], "causal": ["true", "false"]}, [], {}).expand()
    assert {dict(c.params)["causal"] for c in both} == {True, False}


def test_a_length_selects_the_points_that_have_it() -> None:
    def sizes(**axes: list[str]) -> set[tuple[str, int, int]]:
        return {(c.data, c.n, c.batch) for c in suite_file.load("accuracy").override(axes, ["softmax"], {}).expand()}

    assert sizes(data=["mqar"], n=["256", "1024"]) == {("mqar", 256, 64), ("mqar", 1024, 32)}
    assert sizes(data=["mqar"], n=["32"]) == {("mqar", 32, 64)}, "no point has it: the first, at that length"
    assert sizes(n=["4096"]) == {("mqar", 4096, 16), ("pathfinder:easy", 4096, 16), ("listops", 4096, 32), ("digits", 4096, 16)}
    assert sizes(data=["digits"], n=["64"], batch=["8"]) == {("digits", 64, 8)}


def test_methods_with_a_grid_get_the_grid_of_the_image(tmp_path: Path) -> None:
    cases = loaded(tmp_path).override({}, ["mita"], {"mita": {"landmarks": ["4"], "topk": ["4"]}}).expand()
    assert {(c.data, dict(c.params)["grid"]) for c in cases} == {("mqar", "none"), ("pathfinder", "16x16")}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('data = "mqar"', 'data = "mqra"', "unknown trained task 'mqra': did you mean mqar"),
        ('rates = "1e-3"', 'rates = "fast"', "rates = 'fast' are no learning rates: write them as 3e-4/1e-3"),
        ('rates = "1e-3"', 'rates = "0"', "are no learning rates"),
        ('rates = "1e-3"', "", "task accuracy needs rates"),
        ("steps = 4", "steps = 0", "steps = 0 must be a whole number of at least 1"),
        ("n = 256", "n = 250", "N = 250 is no square"),
        ("depth = 1", 'depth = 1\npositions = "rotory"', "did you mean rotary"),
        ("depth = 1", 'depth = 1\ntrained_with = "mita:topk"', "'topk' sets no parameter"),
        ("depth = 1", 'depth = 1\ntrained_with = "mita:top=3"', "unknown parameter 'top' in mita"),
        ("depth = 1", 'depth = 1\ncausal = "perhaps"', "causal = 'perhaps' must be true or false"),
        ('data = "pathfinder"', 'data = "listops:/a/folder"', "task listops reads no folder"),
        ('data = "pathfinder"', 'data = "images:/not/there"', "/not/there"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        loaded(tmp_path, GOOD.replace(old, new, 1)).expand()
    assert "\n" not in str(raised.value)


def test_the_suite_asks_for_every_task_and_method_with_three_seeds() -> None:
    cases = suite_file.load("accuracy").expand()
    assert {c.seed for c in cases} == {0, 1, 2}
    assert {(c.data, c.n) for c in cases} == {
        *(("mqar", n) for n in (256, 1024, 4096)), ("listops", 2048),
        *((name, n) for name in ("pathfinder:easy", "digits") for n in (1024, 4096)),
    }  # fmt: skip
    assert len({c.rates for c in cases}) == 1, "the same learning rates for every method"
    assert {(dict(c.params)["shared"], dict(c.params)["routed"]) for c in cases if c.method == "mita"} == {
        (True, True), (False, True), (True, False),
    }  # fmt: skip


def test_models_that_are_swapped_are_those_of_the_suite_of_accuracy() -> None:
    swapped_in = {base(c).case_id for c in suite_file.load("swap_in").expand()}
    assert len(swapped_in) == 3 * (3 + 2), "seeds times lengths, of softmax and of MiTA"
    assert swapped_in < {c.case_id for c in suite_file.load("accuracy").expand()}


def test_models_that_are_pruned_are_trained_as_in_the_suite_of_accuracy() -> None:
    fields = ("data", "n", "seed", "batch", "steps", "rates", "depth", "positions", "short_conv", "heads", "dim", "dtype")
    pruned, earned = (
        {tuple(getattr(c, f) for f in fields) for c in suite_file.load(x).expand() if c.steps > 1} for x in ("pruning", "accuracy")
    )
    assert pruned < earned


def test_a_cell_that_misses_its_target_is_affordable() -> None:
    """Tokens that a cell reads at all its rates, at the 1.9e7 a second that models of softmax with two blocks take together on an H200."""
    for one in suite_file.load("accuracy").expand():
        settings = recipe(one, 1.0)
        tokens = (one.steps + (len(one.rates.split("/")) - 1) * settings.cut) * one.batch * one.n
        assert tokens * one.depth / 2 / 1.9e7 <= 45, one


def again(command: str) -> set[str]:
    """Ids of the cases that the command of a record runs."""
    words = command.split()
    values = {
        option: [words[i + 1] for i, word in enumerate(words) if word == option] for option in ("--axis", "--set", "--method", "--budget")
    }
    axes = read_axes(values["--axis"]) | read_budget(next(iter(values["--budget"]), None))
    own = suite_file.load(words[2]).override(axes, values["--method"], read_settings(values["--set"]))
    return {c.case_id for c in own.expand()}


def test_the_command_line_trains_at_toy_size_and_resumes(tmp_path: Path) -> None:
    words = ["run", "accuracy", "--device", "cpu", "--results", tmp_path, "--method", "softmax", "--method", "mita", "--quiet"]
    for axis in ("data=mqar", "n=32", "batch=4", "dim=4", "steps=3", "depth=1", "seed=0", "rates=1e-3", "budget=8", "dtype=float32"):
        words += ["--axis", axis]
    first = call(*words)
    assert first.exit_code == 0, first.stderr
    assert "5 ok, 3 unsupported" in first.stderr
    assert "8 settled before" in call(*words, "--resume").stderr
    folder = next((tmp_path / "accuracy").glob("*/records.jsonl"))
    records = store.read(folder).records
    assert {r.status for r in records} == {Status.OK, Status.UNSUPPORTED}
    trained_ones = [record for record in records if record.training]
    assert len(trained_ones) == 5
    for record in trained_ones:
        assert again(record.command) == {record.case.case_id}
