"""The factor of cosine logits."""

import math

_BEST_ODDS = math.log(0.99 / 0.01)


def logit_scale(cfg, num_classes):
    """Factor of the logits of a Config: --scale, or by the number of classes C; 1 for inner products.

    At scale s an example that points at its own class row, at right angles to the C - 1 others, has the probability
    exp(s) / (exp(s) + C - 1). The scale is where that is 0.99. Lower scales cannot become certain; higher ones
    push against classes that are far already, and trained worse (docs/experiments.md). The bound is that of
    CosFace (Wang et al. 2018, equation 6).
    """
    if cfg.logits == "inner":
        return 1.0
    return cfg.scale or math.log(max(1, num_classes - 1)) + _BEST_ODDS
