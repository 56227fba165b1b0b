"""Settings that make a run fit its memory, or its steps shorter: {field: value}, and the flags that say the same."""

from xc.comm.short_rows import bits_of


def saving_memory(cfg):
    """Changes each of which takes less memory than a Config does. The numbers of a run differ with all of them."""
    changes = [{"head_momentum": 0.0}, {"row_dtype": "bfloat16"}]
    changes += [{"head": "knn", "active_classes": share} for share in (0.1, 0.01)] if cfg.head == "full" else []
    return [change for change in changes if any(getattr(cfg, name) != value for name, value in change.items())]


def in_micro_batches(cfg, doublings):
    """Changes to so many times as many micro-batches: less memory, and features that travel unseen."""
    return [{"micro_batches": cfg.micro_batches * 2**i} for i in range(1, doublings + 1)]


def sending_less(cfg, num_ranks, ranks_per_host):
    """Changes each of which sends less, in steps of so many ranks."""
    widths = {ranks_per_host} | {num_ranks // n for n in (2, 4, 8) if num_ranks % n == 0}
    changes = [{"model_parallel_size": width} for width in sorted(widths) if 1 <= width < num_ranks]
    changes += [{"exchange": name} for name in ("dgc", "dgc-hier", "powersgd") if cfg.exchange != name]
    changes += [{"feature_bits": bits} for bits in (16, 8) if bits < bits_of(cfg)]
    return changes + [{"gradient_bits": 16}] * (cfg.gradient_bits != 16)


def flags_of(change):
    """As they are written on a command line."""
    return " ".join(f"--{name.replace('_', '-')} {value:g}" if isinstance(value, float) else
                    f"--{name.replace('_', '-')} {value}" for name, value in change.items())
