"""Load of the busiest expert of a trained model, layer by layer."""

from attnbench.figures._panel import Across
from attnbench.figures._routed import Routed
from attnbench.metrics import Metric

NAME = "busiest"
ALONG = Across("layer", powers=False)
METRIC = Metric("busiest", "busiest", "queries of the busiest expert / of a mean one", "", "lower")
_ROUTED = Routed(METRIC, lambda training: {layer: (load,) for layer, load in enumerate(training.busiest)}, ALONG, "")
data, build = _ROUTED.data, _ROUTED.build
