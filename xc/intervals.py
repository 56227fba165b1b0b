"""Times of a run as people give them: 0.5epochs, 500steps, 64000examples, 5%."""

import re


def interval(text):
    """(number, unit) of a time such as 0.5epochs, 500steps, 1e6examples, 5% (of the run) or 0.5, which are epochs.

    The units are epochs, steps, examples and percent. None where the text is no time. Numbers have up to 15 digits.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{0,15})?(?:e\d)?) ?(?:(epoch|step|example)s?|(%?))", text)
    if not match:
        return None
    return float(match[1]), f"{match[2]}s" if match[2] else {"": "epochs", "%": "percent"}[match[3]]
