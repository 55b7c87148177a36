"""Parts of a sweep for job arrays: every cell in exactly one part, series whole, merged results the same as undivided ones."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cli_support import call

from attnbench import store
from attnbench.errors import UserError
from attnbench.shard import Shard
from attnbench.suite_file import load

if TYPE_CHECKING:
    from attnbench.case import Case


@pytest.fixture(scope="module")
def planned() -> dict[Case, tuple[int, ...]]:
    return load("speed").planned()


@pytest.mark.parametrize("count", [1, 3, 7, 200])
def test_the_parts_are_a_partition_by_series(planned: dict[Case, tuple[int, ...]], count: int) -> None:
    series = {c: store.series_of(c) for c in planned}
    parts = [Shard(i, count).take(planned) for i in sorted({1, 2, 3, count // 2, count} & set(range(1, count + 1)))]
    order = {c: i for i, c in enumerate(planned)}
    for part in parts:
        ours = {series[c] for c in part}
        assert set(part) == {c for c in planned if series[c] in ours}, "all lengths and repeats of a series stay together"
        assert list(part) == sorted(part, key=order.__getitem__)
        assert all(planned[c] == budgets for c, budgets in part.items())
    sizes = [len({series[c] for c in part}) for part in parts]
    assert max(sizes) - min(sizes) <= 1, "series are dealt evenly"
    if count <= 3:
        assert sorted(order[c] for part in parts for c in part) == list(range(len(planned)))
    for a, b in itertools.combinations(parts, 2):
        assert not set(a) & set(b)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/2/3", ""])
def test_what_is_no_part_is_a_mistake(text: str) -> None:
    with pytest.raises(UserError, match="write it as I/N with I from 1 to N"):
        Shard.parse(text)


def test_merged_parts_are_the_whole(suite: Path, tmp_path: Path) -> None:
    words = ["run", suite, "--device", "cpu", "--quiet", "--json"]
    for i in (1, 2):
        assert call(*words, "--shard", f"{i}/2", "--results", tmp_path / str(i)).exit_code == 0
    assert call("merge", tmp_path / "1", tmp_path / "2", "--into", tmp_path / "all").exit_code == 0
    (file,) = store.find(tmp_path / "all")
    merged = store.read(file).records
    assert len({r.case.case_id for r in merged}) == len(merged) == 8
    again = call(*words, "--resume", "--results", tmp_path / "all")
    assert "8 settled before" in again.stderr, "an undivided run knows the cells of the parts"


@pytest.mark.skipif(shutil.which("bash") is None, reason="job scripts are written for bash")
def test_the_job_array_of_the_readme_runs(suite: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(#!.*?)```", readme, re.DOTALL)
    (merge,) = re.findall(r"`attnbench (merge .*?)`", readme)
    (tmp_path / "job.sh").write_text(script.replace("run speed", f"run {suite} --device cpu --quiet"), encoding="utf-8")
    for i in ("1", "2"):
        jobs = {"SLURM_ARRAY_TASK_ID": i, "SLURM_ARRAY_TASK_COUNT": "2", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-eu", "job.sh"], cwd=tmp_path, env={**os.environ, **jobs}, check=True, capture_output=True, timeout=120)
    subprocess.run(
        ["bash", "-eu", "-c", f"attnbench {merge}"], cwd=tmp_path, env={**os.environ, "PATH": jobs["PATH"]}, check=True, timeout=60
    )
    (file,) = store.find(tmp_path / "results")
    assert len(store.read(file).records) == 8
