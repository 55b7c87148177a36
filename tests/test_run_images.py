"""`attnbench run images` on a folder that the tests make: alone, by several processes, and what is wrong in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import call
from PIL import Image
from training_support import model, noise, recipe, task

from attnbench import checkpoint, distributed, protocol, store, suite_file
from attnbench.cell import CellRunner
from attnbench.errors import UserError
from attnbench.nn import TinyTransformer
from attnbench.pretrained import open_checkpoint
from attnbench.recipe import DEIT, Recipe
from attnbench.record import Record, Status
from attnbench.tasks import images, models
from attnbench.train import Trainer

AXES = {"n": 4, "batch": 12, "steps": 4, "depth": 2, "dim": 8, "dtype": "float32"}
"""images of 32 x 32 pixels, a model 24 wide"""
COLOURS = ((20, 40, 200), (30, 180, 40), (210, 30, 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 40 noisy images, two of which are damaged."""
    path = tmp_path_factory.mktemp("images")
    for label, colour in enumerate(COLOURS):
        (path / f"class{label}").mkdir()
        for number in range(40):
            noisy = np.random.default_rng(number).integers(-20, 20, (30, 40, 3)) + np.array(colour)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path / f"class{label}" / f"{number}.png")
    names = [name for name, _ in images.open_folder(path).files["test"]]
    (path / names[0]).write_bytes(b"no image")
    (path / names[1]).write_bytes((path / names[1]).read_bytes()[:60])
    return path


def words(folder: Path | None, results: Path, methods: list[str], **axes: object) -> list[str]:
    command = ["run", "images", "--device", "cpu", "--results", str(results), *(["--data", str(folder)] if folder else [])]
    command += [w for name in methods for w in ("--method", name)]
    command += [w for name, value in {**AXES, **axes}.items() for w in ("--axis", f"{name}={value}")]
    return command + ["--set", "agent.landmarks=1"] * ("agent" in methods)


def records(results: Path) -> list[Record]:
    return [r for file in store.find(results) for r in store.read(file).records]


def test_the_command_trains_vision_transformers_and_resumes(folder: Path, tmp_path: Path) -> None:
    command = words(folder, tmp_path, ["softmax", "agent", "bra"])
    first = call(*command)
    assert first.exit_code == 0, first.stderr
    assert "2 ok, 1 unsupported" in first.stderr
    assert "3 settled before" in call(*command, "--resume").stderr
    assert len(records(tmp_path)) == 3
    found = {r.case.method: r for r in records(tmp_path)}
    assert "class and register tokens too" in found["bra"].reasons[0]
    bad = {name for name, _ in images.open_folder(folder).files["test"][:2]}
    for name in ("softmax", "agent"):
        record = found[name]
        assert record.case.data == f"images:{folder.resolve()}"
        assert any(note.startswith("skipped 2 images") and all(b in note for b in bad) for note in record.training.notes)
        assert record.training.recipe["betas"] == [0.9, 0.999]
        assert record.metrics["parameters"] == found["softmax"].metrics["parameters"]
        path = tmp_path / "images" / ".checkpoints" / record.case.case_id / "0.001.pt"
        trained, own = open_checkpoint(path, folder)
        assert trained.architecture.class_token
        assert trained.architecture.drop_path == 0.1
        assert own.classes == 3
    rows = call("capture", path, "--data", folder, "--out", tmp_path / "captured", "--device", "cpu").stdout.splitlines()
    assert len(rows) == AXES["depth"]


def test_resolutions_are_an_axis_and_presets_are_the_models_of_the_paper() -> None:
    cases = suite_file.load("images").expand()
    assert {(c.n, images.PATCH * c.n**0.5) for c in cases} == {(196, 224), (576, 384), (1024, 512)}
    for heads, millions in ((3, 5.7), (6, 22.0)):
        case = suite_file.load("images").override({"heads": [str(heads)], "n": ["196"]}, ["softmax"], {}).expand()[0]
        with torch.device("meta"):
            built = TinyTransformer(models.architecture(case, images.TASK))
        assert built.parameter_count / 1e6 == pytest.approx(millions, abs=0.06)  # Touvron et al. 2021, table 1: 5.7 and 22 million


def test_the_recipe_is_deits() -> None:
    """Warm-up over 5 epochs of 300 to 1e-3, then a cosine to 1e-5; all images of the test split."""
    epoch = 100
    own = Recipe(steps=300 * epoch, rate=1e-3, batch=1024, n=196, **DEIT)
    rates = np.array([own.rate_at(step) for step in range(own.steps)])
    assert rates.argmax() == 5 * epoch - 1
    assert rates.max() == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-3)
    half = 5 * epoch + 295 * epoch // 2
    assert rates[half] == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-3)
    assert own.batches("test", 50_000) * own.batch >= 50_000


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        (tmp_path / "bad" / name).mkdir(parents=True)
        for number in range(40):
            (tmp_path / "bad" / name / f"{number}.jpg").write_bytes(b"?")
    return tmp_path / "bad"


@pytest.mark.parametrize(
    ("data", "axes", "message"),
    [
        (None, {}, "reads a folder of images: give it with --data PATH"),
        ("nowhere", {}, "is no folder: give one that holds a folder of images for each class"),
        ("empty", {}, "has no classes but no folders: put the images of each class into a folder of its own"),
        ("folder", {"n": 5}, "N = 5 is no square"),
        ("folder", {"model": "vitt"}, "unknown value of model 'vitt'"),
        ("a,b", {}, "a comma separates values of an axis"),
    ],
)
def test_a_mistake_is_one_line_and_trains_nothing(
    folder: Path, tmp_path: Path, data: str | None, axes: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("x", "y"):
        (tmp_path / "a,b" / name).mkdir(parents=True)
        for number in range(40):
            (tmp_path / "a,b" / name / f"{number}.png").touch()
    path = folder if data == "folder" else tmp_path / data if data else None
    result = call(*words(path, tmp_path / "results", ["softmax"], **axes))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_a_suite_without_such_a_task_takes_no_folder(folder: Path) -> None:
    for name in ("quick", "accuracy"):
        result = call("plan", name, "--data", folder)
        assert result.exit_code == 2
        assert "leave --data out, or add --axis data=images" in result.stderr


def cell(folder: Path, checkpoints: Path | None = None) -> Record:
    axes = {name: [str(value)] for name, value in AXES.items()} | {"data": [f"images:{folder}"]}
    (case,) = suite_file.load("images").override(axes, ["softmax"], {}).expand()
    return CellRunner("cpu", protocol.Protocol(), checkpoints=checkpoints).attempt(case)


def test_a_folder_without_one_good_image_is_a_failed_cell(damaged: Path) -> None:
    record = cell(damaged)
    assert record.status is Status.ERROR
    assert "can be decoded: check the files" in record.reasons[0]


def test_a_checkpoint_of_another_architecture_is_a_failed_cell(folder: Path, tmp_path: Path) -> None:
    record = cell(folder, tmp_path)
    assert record.status is Status.OK
    path = tmp_path / record.case.case_id / "0.001.pt"
    state = checkpoint.load(path)
    checkpoint.save(path, {**state, "architecture": {**state["architecture"], "depth": 5}})
    again = cell(folder, tmp_path)
    assert again.status is Status.ERROR
    assert again.reasons == (f"{path} is of another architecture (depth = 5 there, 2 here): delete it, or train into another folder",)


# --- several processes ---


def launched(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Two processes under torch's launcher, which accelerate uses too."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *command],
        capture_output=True, text=True, env=environment, timeout=200, check=False, cwd=cwd,
    )  # fmt: skip


def test_a_share_is_the_rows_of_a_process() -> None:
    whole = task(batch=noise_rows).batch("train", 3, 8, 4, 0)
    parts = [distributed.Group(rank, 2).share(task(batch=noise_rows), 8).batch("train", 3, 8, 4, 0) for rank in (0, 1)]
    assert torch.equal(torch.cat([p.inputs for p in parts]), whole.inputs)
    with pytest.raises(UserError, match="batch = 9 cannot be shared by 2 processes: give a multiple of 2"):
        distributed.Group(0, 2).share(task(), 9)


def noise_rows(split: Any, index: int, size: int, n: int, seed: int) -> Any:
    """Batches whose rows depend on their number alone, as those of a finite data set."""
    rows = [noise(split, number, 1, n, seed) for number in range(index * size, (index + 1) * size)]
    return rows[0].__class__(*(torch.cat([getattr(r, name) for r in rows]) for name in ("inputs", "targets", "mask", "groups")))


def losses() -> tuple[list[float], float, float]:
    """Training loss of each step, accuracy and loss on the test split."""
    own = task(batch=first_token)
    trainer = Trainer(model(), own, recipe(steps=6))
    return [x for _, x in trainer.run().losses], trainer.evaluate("test").accuracy, trainer.evaluate("test").loss


def first_token(*arguments: Any) -> Any:
    batch = noise_rows(*arguments)
    return batch.__class__(batch.inputs, batch.targets[:, 0], torch.ones_like(batch.mask), batch.groups[:, 0])


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from attnbench import distributed\n"
        "from test_run_images import losses\n"
        "distributed._meet()\n"
        "distributed._work_together('cpu')\n"
        "found = losses()\n"
        "open(f'{distributed.rank()}.txt', 'w').write(repr(found))\n"
        "distributed.depart()\n"
    )
    done = launched(str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {rank: eval((tmp_path / f"{rank}.txt").read_text()) for rank in ("0", "1")}
    assert found["0"] == found["1"]
    alone, accuracy_alone, loss = losses()
    eps = 2.0**-23 * 2**8  # rounding of float32 over six updates
    assert found["0"][0] == pytest.approx(alone, rel=eps)
    assert found["0"][1] == accuracy_alone
    assert found["0"][2] == pytest.approx(loss, rel=eps)


def test_drawn_tasks_are_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    case = suite_file.load("accuracy").expand()[0]
    with pytest.raises(UserError, match="2 processes train together only on what a folder holds, not on mqar"):
        distributed.begin(case, "cpu", None)


def test_a_launcher_runs_the_suite_once_and_all_processes_train(folder: Path, tmp_path: Path) -> None:
    done = launched("--module", "attnbench", *words(folder, tmp_path / "results", ["softmax", "agent"]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = records(tmp_path / "results")
    assert sorted(r.case.method for r in found) == ["agent", "softmax"]
    assert all("2 processes train together" in r.training.notes for r in found)
