"""Margins: they lower the cosine of the target class before the softmax, which pulls the classes apart.

CosFace: Wang et al. 2018, eq. 4. ArcFace: Deng et al. 2019, eq. 3.
A new margin is a function, a line in MARGINS, and its name in xc/config.py.
"""

import math


def none(cosine, margin):
    """No margin."""
    return cosine


def cosface(cosine, margin):
    """The margin is subtracted from the cosine."""
    return cosine - margin


def arcface(cosine, margin):
    """cos(angle + margin), margin in radians; linear beyond angle = pi - margin, where the cosine would rise again."""
    sine = (1 - cosine * cosine).clamp(min=1e-12).sqrt()  # the bound keeps the gradient finite at cosine = 1
    shifted = cosine * math.cos(margin) - sine * math.sin(margin)
    return shifted.where(cosine > math.cos(math.pi - margin), cosine - margin * math.sin(margin))


# name -> f(cosine of the target class (N,), margin) -> (N,)
MARGINS = {"none": none, "cosface": cosface, "arcface": arcface}
