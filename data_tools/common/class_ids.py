"""Lists of class ids on the command line, as 5-9,17,@file."""

import re


def intervals_of(text):
    """[(first, last), …], last included, of class ids such as 5-9,17,@file; a file has ids and ranges on any lines."""
    found = []
    for word in text.split(","):
        if word.startswith("@"):
            try:
                with open(word[1:], encoding="utf-8") as file:
                    for line in file:
                        found += map(_interval, line.replace(",", " ").split())
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"--classes {word}: {error}") from error
        else:
            found.append(_interval(word.strip()))
    if not found:
        raise ValueError(f"--classes {text} names no class")
    return found


def _interval(word):
    match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", word)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last:
        raise ValueError(f"--classes: {word[:40]!r} is neither a class id as 17 nor a range as 5-9")
    return first, last
