"""Whether the file of a graph computes what PyTorch computes from the run: the largest difference."""

from dataclasses import dataclass

import torch

from xc.data.augment import norm_of, prepared
from xc.data.images import decode
from xc.errors import UserError

_BATCHES = [slice(0, 1), slice(1, 3), slice(3, 10)]  # images that are computed at once: 1, 2 and 7
_IMAGES = _BATCHES[-1].stop
_MOST_TRIED = 10 * _IMAGES  # records of a pack in which so many images are looked for


@dataclass(frozen=True)
class Sample:
    """Images and what PyTorch makes of them.

    what     "random" or "from the pack"
    pixels   (n, channels, size, size) uint8
    outputs  {"features": (n, D), "probabilities": (n, C)}; the latter where the graph has class rows
    """

    what: str
    pixels: torch.Tensor
    outputs: dict


@torch.no_grad()
def samples_of(graph, trained, pack):
    """[Sample] of random images, and of the first images of a Pack that can be used; pack: None without one."""
    cfg, shape = trained.cfg, (trained.cfg.channels, trained.cfg.image_size, trained.cfg.image_size)
    random = torch.Generator().manual_seed(0)
    found = [("random", torch.randint(0, 256, (_IMAGES, *shape), dtype=torch.uint8, generator=random))]
    if pack and (real := _images_of(pack, cfg)):
        found.append(("from the pack", torch.stack(real)))
    samples = []
    for what, pixels in found:
        inputs = prepared(pixels.clone(), norm=norm_of(cfg.input_norm, cfg.channels))
        features = trained.directions(graph.backbone(inputs))
        outputs = {"features": features}
        if graph.rows is not None:
            outputs["probabilities"] = (trained.scale * features @ graph.rows.T).softmax(1)
        samples.append(Sample(what, pixels, outputs))
    return samples


def _images_of(pack, cfg):
    """Pixels of the first images of a Pack that can be used."""
    found = []
    for record in range(min(len(pack), _MOST_TRIED)):
        try:
            found.append(torch.from_numpy(decode(pack.read([record])[0][0], cfg.image_size, cfg.channels)))
        except ValueError:
            continue  # damaged; the number of images that were used is told
        if len(found) == _IMAGES:
            break
    return found


def largest_differences(name, run, samples, tolerance):
    """{output: {difference, of}}: how far a file is from PyTorch on all samples, in batches of 1, 2 and 7 images.

    name        of the file
    run         pixels -> [output], as `GraphFile.open` gives
    tolerance   that is allowed in a batch, as a share of its largest value
    difference  the largest absolute one
    of          the largest absolute value of that output

    UserError where a difference is larger.
    """
    largest = {output: {"difference": 0.0, "of": 0.0} for output in samples[0].outputs}
    for sample in samples:
        for batch in _BATCHES:
            if not len(sample.pixels[batch]):  # of a small pack
                continue
            found = run(sample.pixels[batch])
            for (output, expected), values in zip(sample.outputs.items(), found, strict=True):
                expected = expected[batch]
                difference, of = (numbers.abs().max().item() for numbers in (values - expected, expected))
                if not difference <= tolerance * of:  # of numbers that are not finite, too
                    raise UserError(f"{name}: its {output} differ from PyTorch's by {difference:.1e} of {of:.2g} on "
                                    f"images that are {sample.what}, and {tolerance:g} of it is allowed: leave its "
                                    "format out of --formats, or raise --tolerance")
                seen = largest[output]
                seen["difference"], seen["of"] = max(seen["difference"], difference), max(seen["of"], of)
    return largest
