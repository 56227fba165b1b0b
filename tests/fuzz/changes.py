"""Changes of bytes, text and JSON."""

import json

INTEGERS = (0, 1, -1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 + 1, 2**53, 2**62, 2**63 - 1, -(2**63))
TEXTS = ("", " ", "0", "-1", "9" * 5000, "1e999", "nan", "inf", "..", "../../outside.png", "/etc/hostname",
         "a/../../b", "a\0b", "\0", "\n", "\r", "\t", '"', "'", '""', "\\", "\ufeff", "\udc80", "\u202e\x1b[31m",
         "é\u0301", "x" * 300, "x" * 200_000, "@", "--", "#", "%s", "{}", "%", ",", ";", "$\\frac$", "train", "🂡")
VALUES = (None, True, False, 0, -1, 0.5, 2**31, 2**63, -(2**64), 10**400, 1e308, float("nan"), float("inf"), [], {},
          [[]], [None], {"": 0}, "DEEP", "DIGITS", *TEXTS)


def change_bytes(random, path):
    """Flip, overwrite, insert, cut, repeat at random places of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(content) + 1)
        some = random.choice((1, 2, 4, 8, 64, 1000))
        kind = random.randrange(7)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            content[place : place + 1] = bytes([random.choice((0, 1, 127, 128, 255, random.randrange(256)))])
        elif kind == 2:
            width, order = random.choice((2, 4, 8)), random.choice(("little", "big"))
            number = random.choice(INTEGERS) % 256**width
            content[place : place + width] = number.to_bytes(width, order)
        elif kind == 3:
            content[place:place] = bytes(random.randrange(256) for _ in range(min(some, 8)))
        elif kind == 4:
            del content[place : place + some]
        elif kind == 5:
            content[place:place] = content[place : place + some]
        elif random.randrange(4) == 0:
            del content[place:]
    path.write_bytes(content)


def change_text(random, path):
    """Odd words and repeated, missing, exchanged lines in a text."""
    lines = path.read_bytes().split(b"\n")
    for _ in range(random.randint(1, 3)):
        number = random.randrange(len(lines))
        line, kind = lines[number], random.randrange(6)
        text = random.choice(TEXTS).encode(errors="surrogateescape")
        place = random.randrange(len(line) + 1)
        if kind == 0:
            lines[number] = line[:place] + text + line[place:]
        elif kind == 1:
            lines[number] = text
        elif kind == 2:
            separator = random.choice((b",", b" ", b"=", b"\t"))
            words = line.split(separator)
            words[random.randrange(len(words))] = text
            lines[number] = separator.join(words)
        elif kind == 3 and len(lines) > 1:
            del lines[number]
        elif kind == 4:
            lines.insert(number, lines[random.randrange(len(lines))])
        else:
            mixed = line[:1000]  # hypothesis draws no longer samples
            lines[number] = bytes(random.sample(list(mixed), len(mixed))) + line[1000:]
    path.write_bytes(b"\n".join(lines))


def change_json(random, value, changes=2):
    """The text of a JSON value with some of its parts replaced, renamed, left out or repeated."""
    for _ in range(random.randint(1, changes)):
        owner, key = None, None
        inside = value
        while isinstance(inside, dict | list) and inside and (owner is None or random.randrange(4)):
            owner, key = inside, random.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
            inside = owner[key]
        kind = random.randrange(6)
        if owner is None:
            value = random.choice(VALUES)
        elif kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[random.choice(TEXTS)] = owner.pop(key)
        elif kind == 2 and isinstance(owner, list):
            owner.insert(key, inside)
        elif kind == 3 and isinstance(inside, int):
            owner[key] = random.choice(INTEGERS)
        else:
            owner[key] = random.choice(VALUES)
    if random.randrange(20) == 0:
        value = "DEEP"
    return (json.dumps(value).replace('"DEEP"', "[" * 100_000 + "]" * 100_000)
            .replace('"DIGITS"', "9" * 5000))


def change_json_file(random, path):
    if random.randrange(3) == 0:
        random.choice((change_bytes, change_text))(random, path)
    else:
        path.write_text(change_json(random, json.loads(path.read_text())))


def one_of(random, folder, pattern="*"):
    return random.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))
