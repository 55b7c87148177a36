"""Append-only results: one JSON line an attempt, safe against kills, torn lines, full disks and a second writer."""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from attnbench import files
from attnbench.errors import UserError
from attnbench.record import SCHEMA, Record, Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from io import TextIOWrapper

    from attnbench.case import Case

RECORDS = "records.jsonl"
ENVIRONMENTS = "env.json"


def device_slug(name: str) -> str:
    """A device's name as a folder name: `NVIDIA H100 80GB HBM3` -> `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def folder(results: Path, suite: str, device: str) -> Path:
    """Where a suite's records of one kind of device lie."""
    return results / suite / device_slug(device)


@dataclass
class Loaded:
    """Records read back, and what had to be said about the file."""

    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    torn: int = 0
    """bytes of an unfinished last line"""


def read(path: Path) -> Loaded:
    """All records of one file, in order; a torn last line is left out and noted. Raises `UserError` for any other damage."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    result = Loaded()
    lines = raw.split(b"\n")
    last = lines.pop()
    if last:
        result.torn = len(last)
        result.notes.append(
            f"{path}: the last line was cut off after {len(last)} bytes and is left out; its cell will run again on --resume"
        )
    for number, line in enumerate(lines, 1):
        try:
            result.records.append(Record.from_json(line.decode()))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number} is not a record ({error}): delete that line to go on") from None
    return result


def find(results: Path) -> list[Path]:
    """Every records file below `results`, or that file itself. Raises `UserError` where there is none."""
    if not results.exists():
        raise UserError(f"{results} does not exist: run a suite first, or name the folder that --results wrote")
    found = [results] if results.is_file() else sorted(results.rglob(RECORDS))
    if not found:
        raise UserError(f"{results} holds no {RECORDS}: run a suite first, or name the folder that --results wrote")
    return found


def environments(records: Path) -> dict[str, dict[str, Any]]:
    """The environments beside a records file, by id; empty where there are none."""
    path = records.with_name(ENVIRONMENTS)
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if data.get("schema") != SCHEMA:
        raise UserError(f"{path} has schema {data.get('schema')}, this version reads {SCHEMA}: start a new results folder")
    return dict(data["environments"])


def latest(records: Iterable[Record]) -> list[Record]:
    """The last attempt at each (case, environment); an earlier `ok` outlives a later failure to try again."""
    kept: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record.case.case_id, record.env_id)
        before = kept.get(key)
        if before is None or record.status is Status.OK or before.status is not Status.OK:
            kept[key] = record
    return list(kept.values())


class Store:
    """The writer of one results folder. Use it as a context manager: it holds the folder's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self._lock: TextIOWrapper | None = None

    def __enter__(self) -> Self:
        files.hold_folder(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise UserError(f"cannot write results to {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"another run is writing to {self.path}: wait for it, or give this one its own --results folder") from None
        self._repair()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()

    @property
    def file(self) -> Path:
        """The records file."""
        return self.path / RECORDS

    def _repair(self) -> None:
        """Cut a torn last line off, and say so."""
        if self.file.exists():
            loaded = read(self.file)
            self.notes += loaded.notes
            if loaded.torn:
                os.truncate(self.file, self.file.stat().st_size - loaded.torn)

    def records(self) -> list[Record]:
        """What the folder holds."""
        return read(self.file).records if self.file.exists() else []

    def append(self, record: Record) -> None:
        """Write one record and wait until it is on disk. Raises `UserError` on a full disk, with the file as it was before."""
        line = (record.to_json() + "\n").encode()
        before = self.file.stat().st_size if self.file.exists() else 0
        try:
            with self.file.open("ab", buffering=0) as f:
                written = f.write(line)
                if written != len(line):
                    raise OSError(28, "No space left on device")  # noqa: TRY301
                os.fsync(f.fileno())
        except OSError as error:
            if self.file.exists():
                os.truncate(self.file, before)
            raise UserError(
                f"cannot write to {self.file}: {error.strerror}; free space and run again with --resume, nothing is lost"
            ) from None

    def save_environment(self, env_id: str, environment: Mapping[str, Any]) -> None:
        """Add or refresh one environment, atomically; what is known of it and not said now stays."""
        known = environments(self.file)
        known[env_id] = {**known.get(env_id, {}), **environment}
        text = json.dumps({"schema": SCHEMA, "environments": known}, indent=1, sort_keys=True) + "\n"
        files.write(self.path / ENVIRONMENTS, text)


def done(records: Iterable[Record], env_id: str, timeout_s: float) -> dict[str, Record]:
    """Cases that a resumed run need not try again, by id: measured, unsupported, diverged, too large, or too slow for this timeout."""
    final: dict[str, Record] = {}
    for record in latest(r for r in records if r.env_id == env_id):
        slow = record.status is Status.TIMEOUT and (record.limit_s or 0) >= timeout_s and record.kept_steps is None
        if slow or record.status in (Status.OK, Status.UNSUPPORTED, Status.OOM, Status.DIVERGED):
            final[record.case.case_id] = record
    return final


def merge(sources: Iterable[Path], target: Path) -> int:
    """Join results folders into `target`, each attempt once. Returns how many records were new."""
    added = 0
    for source in sources:
        for file in find(source):
            relative = file.parent.relative_to(source) if source.is_dir() else Path(file.parent.name)
            with Store(target / relative) as store:
                present = {r.to_json() for r in store.records()}
                for env_id, environment in environments(file).items():
                    store.save_environment(env_id, environment)
                for record in read(file).records:
                    if record.to_json() not in present:
                        store.append(record)
                        added += 1
    return added


def series_of(case: Case) -> str:
    """Key of a case's series: equal for cases that differ in length alone."""
    return case.series.case_id
