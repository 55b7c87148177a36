"""Pictures of a task's examples: exactly what a model gets."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from cli_support import call

from attnbench.figures import _examples
from attnbench.tasks import images, trained
from attnbench.tasks.images import patches


def test_pictures_are_the_examples_in_order():
    task = trained.get("pathfinder")
    figure, batch = _examples.build(task, 256), task.batch("test", 0, _examples.COUNT, 256, 0)
    shown = [panel.images[0].get_array() for panel in figure.axes]
    titles = [panel.get_title() for panel in figure.axes]
    plt.close(figure)
    assert np.array_equal(np.stack(shown), batch.inputs.reshape(-1, 16, 16).numpy())
    assert titles == [str(x) for x in batch.targets.tolist()]
    table = _examples.data(task, 256)
    assert table["class"].tolist() == batch.targets.tolist()
    assert set(table["hash"]) == {batch.digest}


def test_patches_are_put_together_again():
    image = torch.rand(3, 48, 48)
    image[0, 0, 0], image[0, 0, 1] = 0, 1
    assert np.array_equal(_examples.picture(images.TASK, patches(image).numpy(), 9), image.permute(1, 2, 0).numpy())


def test_the_command_draws_every_usual_length(tmp_path):
    lines = call("plot", "--examples", "pathfinder", "--out", tmp_path).stdout.splitlines()
    assert [line.rpartition("/")[2] for line in lines] == [
        f"examples-pathfinder-{n}.{kind}" for n in (1024, 4096) for kind in ("pdf", "png", "csv")
    ]
    assert len(pd.read_csv(tmp_path / "examples-pathfinder-4096.csv")) == _examples.COUNT


@pytest.mark.parametrize(("task", "words"), [("mqar", "are sequences, not pictures"), ("pathfindr", "unknown trained task")])
def test_a_task_without_pictures_is_refused_in_one_line(tmp_path, task, words):
    result = call("plot", "--examples", task, "--out", tmp_path)
    assert result.exit_code == 2
    assert words in result.stderr
