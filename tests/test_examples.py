"""Pictures of a task's examples and of the tokens that experts keep: exactly what a model gets and does."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from cli_support import call

from attnbench import checkpoint
from attnbench.errors import UserError
from attnbench.figures import _examples, _kept
from attnbench.nn import Architecture, TinyTransformer
from attnbench.tasks import images, routing, trained
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


def test_a_level_is_drawn_into_files_without_a_colon(tmp_path):
    lines = call("plot", "--examples", "pathfinder:easy", "--out", tmp_path).stdout.splitlines()
    assert [line.rpartition("/")[2] for line in lines if line.endswith("png")] == [
        f"examples-pathfinder-easy-{n}.png" for n in (1024, 4096)
    ]
    assert set(pd.read_csv(tmp_path / "examples-pathfinder-easy-1024.csv")["task"]) == {"pathfinder:easy"}


@pytest.mark.parametrize(
    ("task", "words"),
    [("mqar", "are sequences, not pictures"), ("pathfindr", "unknown trained task"), ("pathfinder:eas", "did you mean easy?")],
)
def test_a_task_without_pictures_is_refused_in_one_line(tmp_path, task, words):
    result = call("plot", "--examples", task, "--out", tmp_path)
    assert result.exit_code == 2
    assert words in result.stderr


PIXELS = {"vocabulary": 2, "classes": 2, "tokens": 256, "grid": (16, 16), "dim": 16, "heads": 2, "depth": 3}


def model_of(method, **params):
    torch.manual_seed(0)
    return TinyTransformer(Architecture(method=method, params=params, **PIXELS)).eval()


@pytest.mark.parametrize("class_token", [False, True])
def test_maps_show_what_experts_keep_and_captions_what_they_prune(class_token):
    task = trained.get("pathfinder")
    torch.manual_seed(0)
    model = TinyTransformer(Architecture(method="mita", params={"landmarks": 9, "topk": 4}, class_token=class_token, **PIXELS)).eval()
    batch = task.batch("test", 0, 2, 256, 0)
    found = routing.layers(model, batch)
    maps = _kept.shares(task, batch, found)
    assert maps.shape == (3, 2, 16, 16)
    for layer, own in zip(found, maps, strict=True):
        for example in range(2):
            for token in range(256):
                heads = [bool(layer.kept[example, head, token + class_token]) for head in range(2)]
                assert own[example, token // 16, token % 16] == sum(heads) / 2
    figure = _kept.build(task, batch, found)
    panels = [[image.get_array() for image in panel.images] for panel in figure.axes]
    titles = [panel.get_title() for panel in figure.axes[1:4]]
    plt.close(figure)
    assert all(np.array_equal(images[0], batch.inputs[0].reshape(16, 16)) for images in panels[:4]), "over the picture"
    assert np.allclose(np.stack([images[1][..., 3] for images in panels[1:4]]), _kept.OPACITY * (1 - maps[:, 0]))
    assert titles == [f"layer {i}: {1 - x.mean():.0%} pruned" for i, x in enumerate(maps)]
    table = _kept.data(task, batch, found)
    assert table["kept"].sum() == pytest.approx(maps.sum())
    assert table.query("layer == 2 and example == 1 and row == 3 and column == 5")["kept"].item() == maps[2, 1, 3, 5]


def test_models_whose_experts_hold_no_tokens_have_no_map():
    task = trained.get("pathfinder")
    batch = task.batch("test", 0, 1, 256, 0)
    with pytest.raises(UserError, match="nothing is kept or pruned"):
        _kept.shares(task, batch, routing.layers(model_of("agent", landmarks=9), batch))
    with pytest.raises(UserError, match="are sequences"):
        _kept.shares(trained.get("mqar"), batch, [])


def test_the_command_draws_the_map_of_a_checkpoint(tmp_path):
    model = model_of("mita", landmarks=9, topk=4)
    state = {"architecture": model.architecture.as_dict(), "task": "pathfinder", "model": model.state_dict()}
    checkpoint.save(tmp_path / "small.pt", state)
    lines = call("plot", "--kept", tmp_path / "small.pt", "--out", tmp_path).stdout.splitlines()
    assert [line.rpartition("/")[2] for line in lines] == [f"kept-small.{kind}" for kind in ("pdf", "png", "csv")]
    assert len(pd.read_csv(tmp_path / "kept-small.csv")) == 3 * 4 * 256


def test_what_records_keep_of_routing_is_what_the_layers_say():
    task = trained.get("pathfinder")
    batch = task.batch("test", 0, 3, 256, 0)
    found = routing.layers(model_of("mita", landmarks=9, topk=4), batch)
    kept = routing.summary(found, 256, pictures=True)
    assert kept["pruned"] == tuple(layer.pruned for layer in found)
    for text, loads, busiest, layer in zip(kept["kept"], kept["loads"], kept["busiest"], found, strict=True):
        assert np.array_equal(routing.unpacked(text, 256), layer.kept[: routing.PICTURED].sum(1).numpy())
        ranked = (layer.load / layer.load.double().mean(-1, keepdim=True)).sort(-1, descending=True).values.mean((0, 1)).tolist()
        assert len(loads) == routing.LEVELS
        assert (loads[0], loads[-1], loads[5]) == pytest.approx((ranked[0], ranked[-1], ranked[4]))
        assert loads[0] == busiest
    assert routing.summary(found, 256, pictures=False)["kept"] == ()
    assert routing.summary([routing.Layer(None, None)], 256, pictures=True) == {"pruned": (), "busiest": (), "loads": (), "kept": ()}
