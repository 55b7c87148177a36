"""The append-only store: nothing lost, nothing doubled, whatever happens to the file, the disk or the other writer."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from disk_support import file_size_limit
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench import store
from attnbench.case import Case
from attnbench.errors import UserError
from attnbench.record import SCHEMA, Gate, Memory, Record, Status, Timing
from attnbench.store import Store

numbers = st.floats(allow_nan=False)
timings = st.builds(Timing, st.lists(st.floats(0, 10), min_size=1, max_size=4).map(tuple), st.floats(0, 10), st.just("cpu"))
gates = st.builds(
    Gate,
    st.booleans(),
    st.dictionaries(st.text('ab "é\n', max_size=3), numbers, max_size=2),
    st.just({}),
    st.just(9),
    st.just(9),
    st.just(2),
    st.booleans(),
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    case = Case(task="speed", method=draw(st.sampled_from(["softmax", "topk"])), params=(("causal", False),), n=draw(st.integers(1, 4)))
    status = draw(st.sampled_from(Status))
    timing = draw(timings) if status is Status.OK else None
    memory = Memory(1, 2, 3, 4, 5, "counted") if status is Status.OK else None
    reasons = tuple(draw(st.lists(st.text('ab "é\n', max_size=5), max_size=2)))
    env_id = draw(st.sampled_from(["e1", "e2"]))
    return Record(
        case,
        status,
        env_id,
        reasons=reasons,
        timing=timing,
        memory=memory,
        gate=draw(st.none() | gates),
        wanted_bytes=draw(st.none() | st.just(7)),
    )


def record(n: int = 64, status: Status = Status.UNSUPPORTED, env: str = "e", **more: object) -> Record:
    return replace(Record(Case(task="speed", method="softmax", n=n), status, env), **more)


def lines(folder: Path) -> list[str]:
    return [line for file in store.find(folder) for line in file.read_text().splitlines()]


def fill(folder: Path, found: list[Record]) -> Path:
    with Store(folder / "suite" / "device") as target:
        target.save_environment("e", {"device": folder.name})
        for each in found:
            target.append(each)
    return folder


@given(records())
def test_a_record_survives_its_line(one: Record) -> None:
    text = one.to_json()
    assert "\n" not in text
    assert json.loads(text)["case_id"] == one.case.case_id
    again = Record.from_json(text)
    assert again.to_json() == text
    assert (again.case, again.status, again.timing, again.memory, again.reasons) == (
        one.case,
        one.status,
        one.timing,
        one.memory,
        one.reasons,
    )


def test_numbers_that_json_lacks_survive() -> None:
    one = record(gate=Gate(False, {"out": float("inf"), "dq": float("nan")}, {"out": 0.0}, 9, 9, 2, True))
    again = Record.from_json(one.to_json())
    assert again.gate is not None
    assert again.gate.errors["out"] == float("inf")
    assert again.gate.errors["dq"] != again.gate.errors["dq"]


@given(records())
def test_a_sweep_keeps_seven_digits_of_what_was_measured_and_all_of_the_case(one: Record) -> None:
    kept = one.rounded()
    assert kept.rounded() == kept == Record.from_json(kept.to_json())
    assert kept.case == one.case
    counted = replace(one, status=Status.OK, metrics={"parameters": 22050664.0, "accuracy": 1 / 3}).rounded()
    assert counted.metrics == {"parameters": 22050664.0, "accuracy": 0.3333333}
    if one.timing is not None:
        assert kept.timing is not None
        assert kept.timing.samples_s == pytest.approx(one.timing.samples_s, rel=0.5e-6, abs=0)


def unique(found: list[Record]) -> list[Record]:
    """An attempt is one line; two of the same instant and content do not happen."""
    return list({r.to_json(): r for r in found}.values())


@settings(max_examples=25)
@given(st.lists(records(), max_size=4), st.lists(records(), max_size=4))
def test_merge_is_idempotent_and_commutative(a: list[Record], b: list[Record]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sources = [fill(root / "a", [record(9), *unique(a)]), fill(root / "b", [record(9), *unique(b)])]
        added = store.merge(sources, root / "ab")
        store.merge(reversed(sources), root / "ba")
        once = lines(root / "ab")
        assert store.merge(sources, root / "ab") == 0
        assert lines(root / "ab") == once, "a second merge adds nothing"
        assert set(once) == set(lines(root / "ba")) == set(lines(sources[0])) | set(lines(sources[1]))
        assert added == len(once) == len(set(once)), "an attempt that both sources hold is taken once"


def test_merge_keeps_the_environments_of_all_sources(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with Store(tmp_path / name / "suite" / "device") as target:
            target.save_environment(name, {"device": name})
            target.append(record(env=name))
    store.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert store.environments(tmp_path / "c" / "suite" / "device" / store.RECORDS) == {"a": {"device": "a"}, "b": {"device": "b"}}


@pytest.mark.parametrize("keep", [1, 20, -1])
def test_a_torn_last_line_is_cut_off_and_said(tmp_path: Path, keep: int) -> None:
    with Store(tmp_path) as target:
        target.append(record(1))
    whole = target.file.read_bytes()
    torn = record(2).to_json().encode()[:keep]
    target.file.write_bytes(whole + torn)
    read = store.read(target.file)
    assert [r.case.n for r in read.records] == [1]
    assert f"cut off after {len(torn)} bytes" in read.notes[0]
    assert "--resume" in read.notes[0]
    with Store(tmp_path) as again:
        assert again.notes == read.notes
        assert again.file.read_bytes() == whole
        again.append(record(2))
    assert [r.case.n for r in store.read(target.file).records] == [1, 2]
    assert store.read(target.file).notes == []


def test_damage_elsewhere_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / store.RECORDS
    file.write_text(record(1).to_json() + "\n{half\n" + record(2).to_json() + "\n")
    with pytest.raises(UserError, match=r"records.jsonl, line 2 is not a record"):
        store.read(file)
    with pytest.raises(UserError, match="line 2"), Store(tmp_path):
        pass


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [('"n":2', '"n":"two"', "case field n is 'two', no whole number"), ('"timing":null', '"timing":"fast"', "items")],
)
def test_a_record_with_something_else_in_a_field_is_refused_with_its_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    file, line = tmp_path / store.RECORDS, record(2).to_json()
    assert old in line
    file.write_text(record(1).to_json() + "\n" + line.replace(old, new) + "\n")
    with pytest.raises(UserError, match=r"line 2 is not a record \(.*\): delete that line to go on") as raised:
        store.read(file)
    assert words in str(raised.value)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path) as target:
        target.append(record())
        target.save_environment("e", {})
    other = target.file.read_text().replace(f'"schema":{SCHEMA}', '"schema":99')
    target.file.write_text(other)
    with pytest.raises(UserError, match=r"line 1: record has schema 99, this version reads"):
        store.read(target.file)
    path = tmp_path / store.ENVIRONMENTS
    path.write_text(path.read_text().replace(f'"schema": {SCHEMA}', '"schema": 99'))
    with pytest.raises(UserError, match=r"env.json has schema 99"):
        store.environments(target.file)


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(UserError, match="another run is writing to"), Store(tmp_path):
        pass
    with Store(tmp_path) as later:
        later.append(record())


def test_readers_do_not_wait_for_the_writer(tmp_path: Path) -> None:
    with Store(tmp_path) as target:
        target.append(record(5))
        assert [r.case.n for r in store.read(target.file).records] == [5]


@pytest.mark.parametrize("room", [0, 40], ids=["no byte fits", "half a line fits"])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, room: int) -> None:
    with Store(tmp_path) as target:
        target.append(record(1))
        before = target.file.read_bytes()
        with file_size_limit(len(before) + room), pytest.raises(UserError, match="free space and run again with --resume"):
            target.append(record(2))
        assert target.file.read_bytes() == before
        target.append(record(2))
    assert [r.case.n for r in store.read(target.file).records] == [1, 2]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: name a folder"), Store(tmp_path / "file" / "below"):
        pass


def test_find_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no records.jsonl: run a suite first"):
        store.find(tmp_path)
    with pytest.raises(UserError, match="does not exist: run a suite first"):
        store.find(tmp_path / "absent")


def test_the_last_attempt_counts_but_no_failure_takes_a_measurement_away() -> None:
    ok = record(1, Status.OK, timing=Timing((1.0,), 1.0, "cpu"))
    better = record(1, Status.OK, timing=Timing((0.5,), 1.0, "cpu"))
    failed = record(1, Status.ERROR)
    assert store.latest([failed, ok]) == [ok]
    assert store.latest([ok, failed]) == [ok]
    assert store.latest([ok, better]) == [better]
    assert store.latest([ok, record(1, env="other")]) == [ok, record(1, env="other")]


@pytest.mark.parametrize(
    ("status", "final"),
    [("ok", True), ("unsupported", True), ("oom", True), ("timeout", True), ("error", False), ("incorrect", False), ("skipped", False)],
)
def test_resume_tries_again_what_may_come_out_otherwise(status: str, final: bool) -> None:
    one = record(1, Status(status), limit_s=10.0)
    assert (one.case.case_id in store.done([one], "e", 10.0)) == final
    assert one.case.case_id not in store.done([one], "another environment", 10.0)


def test_a_timeout_is_tried_again_with_more_time() -> None:
    assert not store.done([record(1, Status.TIMEOUT, limit_s=10.0)], "e", 20.0)


def test_device_names_become_folder_names() -> None:
    assert store.device_slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
