"""Share of tokens that no expert of a trained model keeps, layer by layer."""

from attnbench.figures._panel import Across
from attnbench.figures._routed import Routed
from attnbench.metrics import METRICS

NAME = "pruned"
ALONG = Across("layer", powers=False)
_ROUTED = Routed(
    METRICS["pruned"],
    lambda training: {layer: (share,) for layer, share in enumerate(training.pruned)},
    ALONG,
    "Share of tokens of test examples that no expert of a head keeps.",
)
data, build = _ROUTED.data, _ROUTED.build
