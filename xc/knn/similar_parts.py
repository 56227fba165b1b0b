"""Cuts features, or centroids, into parts of similar ones."""

import torch


def similar_parts(features, num_parts):
    """The part (G,) of each of these features (G, D), as whole numbers: num_parts near-equal parts, a power of two.

    A part is halved at the median along the line between two features that are far from each other. Features are
    rounded to 8 bits, and float64 sums of whole numbers are exact, so every rank cuts alike.
    """
    if num_parts == 1:
        return torch.zeros(len(features), dtype=torch.int64, device=features.device)
    codes = (features.double() * (127 / features.abs().max().clamp_(min=1e-30))).round_() if len(features) else features
    parts = [torch.arange(len(features), device=features.device)]
    while len(parts) < num_parts:
        halves = []
        for part in parts:
            if len(part) > 1:
                of_part = codes[part]
                one = (of_part @ of_part[0]).argmin()
                other = (of_part @ of_part[one]).argmin()
                part = part[(of_part @ (of_part[one] - of_part[other])).argsort(stable=True)]
            halves += [part[: len(part) // 2], part[len(part) // 2 :]]
        parts = halves
    part_of = torch.empty(len(features), dtype=torch.int64, device=features.device)
    for i, part in enumerate(parts):
        part_of[part] = i
    return part_of
