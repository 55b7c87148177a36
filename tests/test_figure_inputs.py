"""The map of captured inputs beside generated ones: every number is a record's, and failures are letters."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import synthetic

from attnbench import frame, tables
from attnbench.figures import inputs

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

FILES = [f"file:somewhere/{i}-encoder.layer.{i}.safetensors" for i in (0, 2, 10)]


def table_of(folder: Path, profiles: list[str], seeds: tuple[int, ...] = (0,)) -> pd.DataFrame:
    records = []
    for i, profile in enumerate(profiles):
        for j, (label, params) in enumerate((("softmax", {}), ("linear", {}), ("mita", {"topk": 4}), ("mita", {"topk": 16}))):
            for seed in seeds:
                for n in (512, 1024):
                    made = replace(synthetic.case(label, params, n=n), task="fidelity", profile=profile, seed=seed)
                    if (label, i) == ("linear", 1):
                        records.append(synthetic.failed(made, "oom"))
                    elif n == 512 or not profile.startswith("file:"):
                        records.append(synthetic.ok(made, 1e-3, metrics={"rel_error": 0.01 * (1 + i) * (1 + j) + 0.001 * seed}))
    synthetic.write(folder, "activations", records)
    return frame.load(folder)[0]


def test_cells_are_the_records_at_the_length_of_the_files(tmp_path: Path) -> None:
    table = table_of(tmp_path, ["randn", *FILES], seeds=(0, 1, 2))
    drawn = inputs.data(table)
    assert set(drawn["n"]) == {512}
    assert set(drawn["profile"]) == {"randn", "layer 0", "layer 2", "layer 10"}
    assert not drawn["series"].str.contains("Softmax").any()
    for cell in drawn[drawn["status"] == "ok"].to_dict("records"):
        i = ["randn", *FILES].index(cell["source"])
        j = {"Linear": 1, "MiTA, topk=4": 2, "MiTA, topk=16": 3}[cell["series"]]
        assert cell["value"] == pytest.approx(0.01 * (1 + i) * (1 + j) + 0.001)  # the median of three seeds
    assert drawn.loc[drawn["status"] == "oom", "profile"].tolist() == ["layer 0"]


def test_the_picture_shows_them_in_order(tmp_path: Path) -> None:
    table = table_of(tmp_path, [*reversed(FILES), "local", "randn"])
    figure, drawn = inputs.build(table), inputs.data(table)
    assert figure is not None
    axes = figure.axes[0]
    across = [t.get_text() for t in axes.get_xticklabels()]
    down = [t.get_text() for t in axes.get_yticklabels()]
    assert across == ["randn", "local", "layer 0", "layer 2", "layer 10"]
    assert down == ["Linear", "MiTA, topk=4", "MiTA, topk=16"]
    said = {(down[round(t.get_position()[1])], across[round(t.get_position()[0])]): t.get_text() for t in axes.texts}
    for cell in drawn.to_dict("records"):
        assert said[cell["series"], cell["profile"]] == (f"{cell['value']:.3f}" if cell["status"] == "ok" else "O")
    shown = axes.images[0].get_array()
    assert shown[down.index("MiTA, topk=4"), across.index("local")] == pytest.approx(
        drawn.loc[(drawn["series"] == "MiTA, topk=4") & (drawn["profile"] == "local"), "value"].item()
    )
    assert "O out of memory" in figure.get_supxlabel()


def test_layers_of_two_models_keep_their_paths_and_no_capture_draws_nothing(tmp_path: Path) -> None:
    both = ["file:one/0-a.safetensors", "file:two/0-b.safetensors"]
    assert set(inputs.data(table_of(tmp_path / "two", both))["profile"]) == set(both)
    assert inputs.data(table_of(tmp_path / "none", ["randn"])).empty


def test_tables_call_layers_as_the_map_does_and_say_where_they_come_from(tmp_path: Path) -> None:
    (table,) = tables.report(table_of(tmp_path / "one", ["randn", *FILES]), [512])
    assert table.header[2:] == ("randn, N=512", "layer 0, N=512", "layer 2, N=512", "layer 10, N=512")
    assert table.caption.endswith("Layers: inputs that `attnbench capture` wrote to somewhere.")
    two = [FILES[0], FILES[0].replace("somewhere", "elsewhere")]
    (table,) = tables.report(table_of(tmp_path / "two", two), [512])
    assert sorted(table.header[2:]) == sorted(f"{path}, N=512" for path in two)
