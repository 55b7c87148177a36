"""Load of a trained model's experts, from the busiest to the idlest."""

from attnbench.figures._panel import Across
from attnbench.figures._routed import Routed
from attnbench.metrics import Metric

NAME = "expert_load"
ALONG = Across("experts, busiest (0) to idlest (1)", powers=False, curves=True)
METRIC = Metric("expert_load", "loads", "queries of an expert / of a mean one", "", "lower", least=0.01)
_ROUTED = Routed(
    METRIC,
    lambda training: {
        place / (len(training.loads[0]) - 1): [layer[place] for layer in training.loads]
        for place in range(len(training.loads[0]) if training.loads else 0)
    },
    ALONG,
    "Bands reach over layers and seeds.",
)
data, build = _ROUTED.data, _ROUTED.build
