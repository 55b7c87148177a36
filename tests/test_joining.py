"""Records of different suites brought together: which ones, and what is said of them."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest
import synthetic

from attnbench import frame, joining

MITA = {"landmarks": 32, "shared": True, "topk": 32}


def rows(*cells: Any, suite: str = "speed", device: str = "a device") -> pd.DataFrame:
    made = [c if isinstance(c, synthetic.Record) else synthetic.ok(c, 1e-3, spread=0) for c in cells]
    return pd.DataFrame([frame._row(record, suite, {"device": device}) for record in made])


def wanted(**changes: Any) -> pd.DataFrame:
    return rows(synthetic.case("mita", MITA, n=256, task="accuracy", **changes), synthetic.case("softmax", n=256, task="accuracy"))


@pytest.mark.parametrize(
    ("other", "apart"),
    [
        (MITA, 0.0),
        ({**MITA, "topk": 64}, 1.0),
        ({**MITA, "topk": 64, "landmarks": 16}, 2.0),
        ({**MITA, "shared": False}, None),
        ({**MITA, "causal": True, "grid": "16x16"}, 0.0),
        ({"topk": 32, "landmarks": 32}, None),
    ],
)
def test_how_far_parameters_are_apart(other: dict[str, Any], apart: float | None) -> None:
    assert joining.distance(json.dumps({**MITA, "causal": False}), json.dumps(other)) == apart


def test_a_configuration_is_found_by_implementation_then_parameters_then_time() -> None:
    cells = [
        synthetic.ok(synthetic.case("softmax@math", n=256), 3e-3, spread=0),
        synthetic.ok(synthetic.case("softmax@flash", n=256), 1e-3, spread=0),
        synthetic.failed(synthetic.case("softmax@cudnn", n=256), "error"),
        synthetic.case("mita", {**MITA, "topk": 128}, n=256),
        synthetic.case("mita", {**MITA, "topk": 64}, n=256),
    ]
    source = joining.costs(rows(*cells), wanted(), 256)
    assert source is not None
    plain = json.dumps({"causal": False})
    assert source.find("softmax", "softmax", plain).rows["label"].tolist() == ["softmax@flash"]  # type: ignore[union-attr]
    assert source.find("softmax", "softmax@math", plain).median("time_s") == 3e-3  # type: ignore[union-attr]
    near = source.find("mita", "mita", json.dumps(MITA))
    assert near is not None
    assert near.differs == "topk=64"
    assert source.find("mita", "mita", json.dumps({**MITA, "shared": False})) is None
    assert source.find("linear", "linear", plain) is None


def test_a_failure_is_found_too_and_has_no_numbers() -> None:
    source = joining.costs(rows(synthetic.failed(synthetic.case("mita", MITA, n=256), "oom")), wanted(), 256)
    assert source is not None
    found = source.find("mita", "mita", json.dumps(MITA))
    assert found is not None
    assert found.status == "oom"
    assert pd.isna(found.median("time_s"))


def test_the_source_is_on_the_same_device_then_near_in_length_then_of_equal_form_and_parameters() -> None:
    def both(n: int, **changes: Any) -> list[Any]:
        return [synthetic.case("mita", {**MITA, **changes}, n=n), synthetic.case("softmax", {"causal": changes.get("causal", False)}, n=n)]

    elsewhere = rows(*both(256), device="another", suite="a")
    here = rows(*both(1024), *both(4096), *both(1024, causal=True), suite="b")
    other = rows(*both(1024, topk=64), suite="c")
    chosen = joining.costs(pd.concat([elsewhere, here, other]), wanted(), 256)
    assert chosen is not None
    assert (chosen.group.suite, chosen.n, chosen.causal, chosen.apart) == ("b", 1024, False, "N=1024")
    assert set(chosen.rows["n"]) == {1024}
    causal = rows(synthetic.case("mita", {**MITA, "causal": True}, n=4096, task="accuracy"))
    form = joining.costs(pd.concat([elsewhere, here, other]), causal, 4096)
    assert form is not None
    assert (form.n, form.causal, form.apart) == (4096, False, "the bidirectional form")
    only = joining.costs(elsewhere, wanted(), 256)
    assert only is not None
    assert "another" in str(only)


def test_a_group_with_few_of_the_methods_is_no_source_however_near() -> None:
    full = [synthetic.case(m, n=4096) for m in ("softmax", "linear", "topk", "mita")]
    trained = rows(*(synthetic.case(m, n=256, task="accuracy") for m in ("softmax", "linear", "topk", "mita")))
    source = joining.costs(pd.concat([rows(synthetic.case("linear", n=256), suite="a"), rows(*full, suite="b")]), trained, 256)
    assert source is not None
    assert source.group.suite == "b"


def test_nothing_to_join_is_none() -> None:
    backward = rows(synthetic.case("mita", MITA, n=256, mode="forward+backward"), synthetic.case("softmax", n=256, replicate=1))
    assert joining.costs(backward, wanted(), 256) is None
    assert joining.costs(rows(synthetic.case("linear", n=256)), wanted(), 256) is None
    assert joining.distances(rows(synthetic.case("mita", MITA, n=256)), wanted(), 256) is None


def test_distances_are_by_profile_and_over_seeds() -> None:
    cells = [
        synthetic.ok(synthetic.case("mita", MITA, n=256, task="fidelity", profile=p, seed=s), 1e-3, metrics={"rel_error": error})
        for p, s, error in (("randn", 0, 0.1), ("randn", 1, 0.3), ("needle", 0, 0.5))
    ]
    source = joining.distances(rows(*cells, suite="fidelity"), wanted(), 256)
    assert source is not None
    found = source.find("mita", "mita", json.dumps(MITA))
    assert found is not None
    assert found.by_profile("rel_error") == {"randn": pytest.approx(0.2), "needle": 0.5}


def test_what_was_joined_is_told_once_a_group_with_its_exceptions() -> None:
    told = joining.told("Time", [("N=1", "a", ""), ("N=2", "a", ""), ("N=4", "a", "N=8"), ("N=16", "b", "N=8")])
    assert told == ["Time: forward pass, a, at equal N; N=4 from N=8.", "Time: forward pass, b, N=16 from N=8."]
