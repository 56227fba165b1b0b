"""Exact top-1 and top-5 over all classes."""

import torch

from xc.run import watchdog


@torch.no_grad()
def evaluate(backbone, head, batches, world, stopped=lambda: False):
    """Shares of the examples whose label is the best or among the five best of ALL classes; the same at any W.

    batches  of (images, labels), as many on every rank; a rank's may be empty
    stopped  asked before every batch, answers alike on all ranks; where it is true, there is no result
    returns  dict of top1, top5 (shares) and examples; or None

    Collective.
    """
    training = backbone.training
    backbone.eval()
    hits = torch.zeros(3, dtype=torch.int64)  # best, among the five best, examples
    for images, labels in batches:
        watchdog.note("evaluation")
        if stopped():
            backbone.train(training)
            return None
        # Not every network takes an empty batch.
        features = backbone(images) if len(images) else torch.zeros(0, head.feature_dim, device=world.device)
        above = head.num_scores_above_target(features, labels)
        hits += torch.tensor([(above < 1).sum(), (above < 5).sum(), len(above)])
    backbone.train(training)
    top1, top5, examples = world.everyone.all_reduce(hits).tolist()
    return {"top1": top1 / max(1, examples), "top5": top5 / max(1, examples), "examples": examples}
