"""Margins: what is taken from the cosine of the right class before the softmax, to pull classes apart.

CosFace: Wang et al. 2018, eq. 4.  ArcFace: Deng et al. 2019, eq. 3.
"""

import math


def none(cosine, margin):
    return cosine


def cosface(cosine, margin):
    return cosine - margin


def arcface(cosine, margin):
    """cos(angle + margin), continued linearly past angle = pi - margin, where it would rise again."""
    sine = (1 - cosine * cosine).clamp(min=1e-12).sqrt()  # the floor keeps the gradient finite at cosine = 1
    shifted = cosine * math.cos(margin) - sine * math.sin(margin)
    return shifted.where(cosine > math.cos(math.pi - margin), cosine - margin * math.sin(margin))


# name -> f(cosine of the right class (N,), margin) -> (N,)
MARGINS = {"none": none, "cosface": cosface, "arcface": arcface}
