"""Operators as torch sees them: well formed, without aliases, and without silent zeros where they have no derivative."""

import pytest
import torch
from triton_support import DEVICE, interpreter  # noqa: F401 (a fixture of every test here)

pytest.importorskip("triton", reason="Triton is not installed")
from attnbench.kernels import _define, gather, rows, ttt
from attnbench.kernels.blocks import _operator as blocks
from attnbench.kernels.compress import _operator as compress
from attnbench.kernels.mita import _operator as mita
from attnbench.kernels.spark import _list_operator as spark_lists
from attnbench.kernels.spark import _operator as spark

SHAPES = ("test_schema", "test_faketensor", "test_autograd_registration")
"""what does not compare two runs, of which the lists' unused parts are not equal"""


def drawn(*shapes, grad=True):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(DEVICE).requires_grad_(grad) for s in shapes]


def test_operators_of_lists_rows_and_scans_are_well_formed():
    q, k, v = drawn((1, 2, 9, 16), (1, 1, 9, 16), (1, 1, 9, 16))
    rate, factor, w, c, gamma, beta = drawn((1, 2, 9), (4,), (2, 16, 16), (2, 1, 16), (2, 1, 16), (2, 1, 16))
    index = torch.randint(9, (1, 2, 9, 3), dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        spark_lists.listed_forward, (q, k, v, torch.zeros(1, 2, 9, device=DEVICE), 8, 0.3, 0.3, 9, False), test_utils=SHAPES
    )
    torch.library.opcheck(rows.mix_rows_forward, (v, index, torch.rand(index.shape, device=DEVICE, requires_grad=True)))
    torch.library.opcheck(ttt.ttt_forward, (q, k, v, rate, factor, w, c, gamma, beta, True))


def finals():
    """A call of each operator of gradients, and of statistics."""
    q, k, v, grad = drawn((1, 2, 9, 32), (1, 1, 9, 32), (1, 1, 9, 32), (1, 2, 9, 32))
    index = torch.randint(9, (1, 2, 9, 3), dtype=torch.int32, device=DEVICE)
    routes = torch.zeros(1, 2, 9, 1, dtype=torch.int32, device=DEVICE)
    limit, none = torch.zeros(1, 2, 9, device=DEVICE), None
    scan = [*drawn((1, 2, 9), (4,)), *drawn((2, 32, 32), (2, 1, 32), (2, 1, 32), (2, 1, 32), grad=False)]
    share = torch.rand(index.shape, device=DEVICE)
    chosen = [9, 4, 2, 4, 2, 1, 1, False]
    setting = (2, 1, True, True, 0.2, 0.1, [0, 3, 3, 1, 2])
    with torch.no_grad():
        dense, lists = (
            spark.spark_forward(q, k, v, limit, 8, 0.3, 0.3, False),
            spark_lists.listed_forward(q, k, v, limit, 8, 0.3, 0.3, 9, False),
        )
        states = ttt.ttt_forward(q, k, v, *scan, True)[1]
        routed, short = blocks.blocks_forward(q, k, v, routes, none, 4, 0.2, False), compress.compressed_forward(q, k, v, chosen, 0.2)
        landed, listed = mita.mita_forward(q, k, v, none, *setting), gather.gather_forward(q, k, v, index, 0.2)
    return {
        "statistics": (spark.spark_statistics, (q, k, 8)),
        "spark": (spark.spark_backward, (grad, q, k, v, *dense, 8, 0.3, 0.3, False)),
        "lists": (spark_lists.listed_backward, (grad, q, k, v, list(lists), 8, 0.3, 0.3, False)),
        "ttt": (ttt.ttt_backward, (grad, q, k, v, *scan[:2], *scan[4:], states)),
        "rows": (rows.spread_rows, (grad, v, index, share)),
        "blocks": (blocks.blocks_backward, (grad, q, k, v, routes, none, list(routed), 4, 0.2, False)),
        "compress": (compress.compressed_backward, (grad, q, k, v, list(short[:3]), chosen, 0.2)),
        "gather": (gather.gather_backward, (grad, q, k, v, index, *listed, 0.2)),
        "mita": (mita.mita_backward, (grad, q, k, v, landed[0], list(landed[1:]), *setting)),
    }


def test_results_without_a_derivative_refuse_one_and_alias_nothing():
    for operator, arguments in finals().values():
        torch.library.opcheck(operator, arguments, test_utils=SHAPES)
        found = operator(*arguments)
        assert found[0].requires_grad
        with pytest.raises(RuntimeError, match="has no derivative"):
            torch.autograd.grad(found[0].sum(), arguments[0])


def test_an_operator_that_returns_its_argument_is_caught():
    def same(x: torch.Tensor) -> torch.Tensor:
        return x

    operator = _define.define("returns_its_argument")(same)
    with pytest.raises(Exception, match="alias"):
        torch.library.opcheck(operator, (torch.ones(2),), test_utils="test_schema")
