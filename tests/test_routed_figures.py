"""Figures of how trained models route: tokens that no expert keeps, loads, and maps of kept tokens, from made-up records."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import synthetic
import synthetic_trained
from figures_support import captioned

from attnbench import frame
from attnbench.errors import UserError
from attnbench.figures import _interactive, _kept, busiest, expert_load, kept, pruned, pruned_length
from attnbench.record import Record
from attnbench.tasks import routing, trained
from attnbench.trials import Training

if TYPE_CHECKING:
    import pandas as pd

    from attnbench.series import Group


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("results")
    synthetic.write(folder, "accuracy", synthetic_trained.records("accuracy", data=["pathfinder"], n=[1024], seed=[0, 1]))
    return frame.load(synthetic.write(folder, "pruning", synthetic_trained.records("pruning", data=["digits"], n=[1024], seed=[0, 1])))[0]


@pytest.fixture(scope="module")
def mapped(loaded: pd.DataFrame) -> Group:
    """Models of pictures, of which some drop tokens."""
    (group,) = kept.groups(loaded[loaded["suite"] == "accuracy"])
    assert group.place.endswith("pathfinder-1024")
    return group


def test_pruned_shares_are_those_of_the_records_by_layer_and_by_length(loaded: pd.DataFrame) -> None:
    rows = loaded[loaded["suite"] == "pruning"]
    drawn = pruned.data(rows)
    own = rows[(rows["data"] == "digits") & (rows["steps"] == 2000) & rows["budget"].map(lambda b: 32 in b) & (rows["method"] == "topk")]
    shares = np.array([t.pruned for t in own["training"]])
    found = drawn[(drawn["panel"] == "digits, steps=2000, N=1024") & (drawn["series"] == "Top-k, budget=32")].sort_values("n")
    assert found["value"].tolist() == pytest.approx(shares.mean(0).tolist())
    assert found["low"].tolist() == pytest.approx(shares.min(0).tolist())
    by_length = pruned_length.data(rows)
    whole = by_length[(by_length["panel"] == "digits, steps=2000") & (by_length["series"] == "Top-k, budget=32")]
    assert whole[["n", "value"]].to_numpy().tolist() == [[1024, pytest.approx(shares.mean())]]
    load = busiest.data(rows)
    assert set(load["n"]) == {0, 1, 2, 3}
    spread = expert_load.data(rows)
    ends = spread[spread["series"] == "MoBA, budget=64"].groupby("n")["value"].mean()
    assert (ends.index.min(), ends.index.max(), ends.is_monotonic_decreasing) == (0.0, 1.0, True)


def test_loads_stand_on_a_logarithmic_axis_that_ends_at_the_least(loaded: pd.DataFrame) -> None:
    rows = loaded[loaded["suite"] == "pruning"].copy()
    rows["training"] = [replace(t, loads=tuple((*x[:-1], 1e-5) for x in t.loads)) if t.loads else t for t in rows["training"]]
    assert expert_load.data(rows)["value"].min() == pytest.approx(1e-5), "what is drawn is told whole"
    figure = expert_load.build(rows)
    (axes, *_) = (a for a in figure.axes if a.get_lines() and a.axison)
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] == 0.01
    assert "Less than 0.01 is below the axes." in captioned(figure)
    pytest.importorskip("bokeh", reason="bokeh is an optional extra: pip install 'attnbench[report]'")
    assert _interactive._lines(expert_load.data(rows), expert_load.ALONG, expert_load.METRIC).y_range.start == 0.01
    assert "below the axes" not in captioned(busiest.build(rows))


def test_maps_of_kept_tokens_are_drawn_over_the_picture_from_records_alone(mapped: Group) -> None:
    drawn = kept.data(mapped.rows)
    assert set(drawn["method"]) == {"mita", "nsa", "topk"}, "what drops nothing has no map"
    figure = kept.build(mapped.rows)
    assert figure is not None
    task = trained.get("pathfinder")
    picture = task.batch("test", 0, 32, 1024, 0).inputs[0].reshape(32, 32).numpy()
    assert np.array_equal(figure.axes[0].images[0].get_array(), picture)
    first = drawn[(drawn["series"] == "MiTA") & (drawn["layer"] == 1)].iloc[0]
    share = routing.unpacked(first["kept"], 1024)[0].reshape(32, 32) / 2
    assert np.allclose(figure.axes[2].images[1].get_array()[..., 3], _kept.OPACITY * (1 - share))
    assert figure.axes[2].get_title() == f"layer 1: {first['pruned']:.0%}"
    assert "could not be read" not in captioned(figure)


def test_conditions_are_those_of_the_methods_that_are_drawn(mapped: Group) -> None:
    for method, told in (("nystromformer", False), ("mita", True)):
        here = mapped.rows["method"] != method
        rows = mapped.rows.assign(env_id=mapped.rows["env_id"].where(here, "elsewhere"))
        assert ("2 environments" in captioned(kept.build(rows))) == told, f"{method} is {'' if told else 'not '}drawn"


def test_maps_without_their_picture_say_so(mapped: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "picture", lambda *_: (_ for _ in ()).throw(UserError("its package is missing")))
    assert captioned(kept.build(mapped.rows)).endswith("The example itself could not be read here.")


def test_records_keep_maps_and_loads() -> None:
    one = next(r for r in synthetic_trained.records("pruning", data=["digits"], n=[1024], seed=[0]) if r.case.method == "mita")
    again = Record.from_json(one.to_json())
    assert again.training == one.training
    plain = {k: v for k, v in vars(Training((), 1.0, 1, 0, 8)).items() if k not in ("loads", "kept")}
    old = Training.from_dict(plain)
    assert (old.loads, old.kept) == ((), ())
