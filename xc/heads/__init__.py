"""Classifier heads by name: which classes take part in a step."""

from xc.heads.base import Head

HEADS = {"full": Head}


def build(cfg, num_classes, world):
    """The head that a Config asks for; ValueError where there is none of that name."""
    if cfg.head not in HEADS:
        raise ValueError(f"--head {cfg.head} is not known: {', '.join(HEADS)}")
    return HEADS[cfg.head](
        num_classes, cfg.feature_dim, world, cosine=cfg.logits == "cosine", scale=cfg.scale, margin=cfg.margin,
        margin_size=cfg.margin_size, logits_mb=cfg.logits_mb, seed=cfg.seed)
