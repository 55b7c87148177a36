"""Accuracy as a task: cases and their ids, records, refusals, divergence, checkpoints, pruning."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_support import case, model, task

from attnbench import store
from attnbench.batches import Prepared
from attnbench.case import Case
from attnbench.cell import CellRunner
from attnbench.protocol import Protocol
from attnbench.record import Record, Status
from attnbench.tasks import accuracy, learning, routing, trained

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


def test_the_record_holds_what_was_tried_and_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnbench.race.learned", lambda *_: True)
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


@pytest.mark.parametrize(("recipe", "where"), [("small", "beside"), ("deit", "in turn")])
def test_models_that_draw_random_numbers_train_in_turn_since_they_share_a_state(
    monkeypatch: pytest.MonkeyPatch, recipe: str, where: str
) -> None:
    monkeypatch.setattr(learning, "_side_by_side", lambda *_: "beside")
    monkeypatch.setattr(learning, "_in_turn", lambda *_: "in turn")
    monkeypatch.setattr(learning, "Data", lambda *_: None)
    made = case(rates="0.001/0.01", data="digits", n=1024, recipe=recipe)
    assert learning.train(made, trained.get("digits"), "cuda", None) == where


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
