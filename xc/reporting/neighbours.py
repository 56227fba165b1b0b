"""The nearest class rows of some class rows, by their cosine, over all classes."""

from dataclasses import replace

import torch

from xc.comm.shard import Shard
from xc.use.scores import best_classes


@torch.no_grad()
def nearest_rows(classes, trained, k, world):
    """The k other classes whose rows have the highest cosine to the row of each class, highest first. Collective.

    classes  list of n classes
    k        at most C - 1
    returns  (n, k) int64 classes, (n, k) float32 cosines
    """
    by_cosine = replace(trained, cfg=replace(trained.cfg, logits="cosine", margin="none", margin_size=0.0))
    with world.raise_on_all_ranks():
        rows = _rows(by_cosine, classes, world.device)  # (n, D)
    best, _ = best_classes(rows, by_cosine, k + 1, world)
    own = torch.tensor(classes, dtype=torch.int64, device=best.device)[:, None]
    # The class itself is not always the first: others may have an equal row. Without it k are left, or it is beyond.
    order = (best == own).to(torch.uint8).sort(dim=1, stable=True).indices[:, :k]
    best = best.gather(1, order)
    with world.raise_on_all_ranks():
        others = _rows(by_cosine, best.flatten().tolist(), world.device).view(*best.shape, rows.shape[1])
    return best.cpu(), (others @ rows[:, :, None])[:, :, 0].cpu()


def _rows(trained, classes, device):
    """(n, D) float32 rows of length 1 of these classes."""
    rows = [torch.zeros(0, trained.meta["feature_dim"], device=device)]
    for one in classes:
        rows += [row for _, row in trained.row_blocks(Shard(one, one + 1), device)]
    return torch.cat(rows)
