"""Share of tokens that no expert of a trained model keeps, against sequence length."""

from attnbench.figures._panel import Across
from attnbench.figures._routed import Routed
from attnbench.metrics import METRICS

NAME = "pruned_length"
ALONG = Across()
_ROUTED = Routed(
    METRICS["pruned"],
    lambda training: {0: training.pruned} if training.pruned else {},
    ALONG,
    "Share of tokens of test examples that no expert of a head keeps, all layers together.",
)
data, build = _ROUTED.data, _ROUTED.build
