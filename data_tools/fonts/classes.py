"""Groups glyphs to classes and chooses the typefaces for test, by the rules in data_tools/glyphs.py."""

from collections import Counter, defaultdict

from data_tools.fonts.faces import GlyphError


def common_code_points(owned, min_faces):
    """Sorted code points that at least min_faces of the collections in owned have."""
    counts = Counter(code for code_points in owned for code in code_points)
    return sorted(code for code, count in counts.items() if count >= min_faces)


def merge(images, code_points):
    """{founder: [its code points]} of the classes.

    images       {face name: {code point: PNG bytes}}
    code_points  sorted
    """
    classes, founders = {}, defaultdict(list)  # founders by (face, image)
    for code in code_points:
        own = {name: of_face[code] for name, of_face in images.items() if code in of_face}
        alike = sorted({founder for drawn in own.items() for founder in founders[drawn]})
        same = (f for f in alike if all(images[name].get(f, image) == image for name, image in own.items()))
        founder = next(same, None)
        if founder is not None:
            classes[founder].append(code)
            continue
        classes[code] = [code]
        for drawn in own.items():
            founders[drawn].append(code)
    return classes


def class_name(code):
    return f"U+{code:05X}"  # five digits: the planes that need six are private


def typefaces(faces, images):
    """[set of names of faces that are one design]."""
    groups = []
    for face in faces:
        joined = {face.name}
        for group in list(groups):
            if any(other.name in group and one_design(face, other, images) for other in faces):
                joined |= group
                groups.remove(group)
        groups.append(joined)
    return groups


def one_design(face, other, images):
    """Whether two faces are of one typeface."""
    if face.family == other.family:
        return True
    common = images[face.name].keys() & images[other.name].keys()
    return 2 * sum(images[face.name][code] == images[other.name][code] for code in common) > len(common)


def split_class(founder, images, held_out):
    """({face: image}, {face: image}) of one class, for train and for test."""
    train, test = {}, {}
    for name, of_face in images.items():
        if founder in of_face:
            (test if name in held_out else train)[name] = of_face[founder]
    known = set(train.values())
    return train, {name: image for name, image in test.items() if image not in known}


def split_classes(classes, images, held_out, min_faces):
    """{founder: (train, test) of split_class} of the classes that keep at least half of min_faces faces in train."""
    splits = {founder: split_class(founder, images, held_out) for founder in classes}
    return {founder: split for founder, split in splits.items() if 2 * len(split[0]) >= min_faces}


def hold_out(groups, classes, images, num_faces, min_faces):
    """Names of at least num_faces faces for test; groups are the typefaces."""
    def worth(group):
        splits = split_classes(classes, images, held_out | group, min_faces)
        lost, tested = len(classes) - len(splits), sum(bool(test) for _, test in splits.values())
        return tested - lost, -len(group), min(group)

    held_out = set()
    while len(held_out) < num_faces:
        room = [group for group in groups if not group & held_out and 2 * len(group | held_out) <= len(images)]
        if not room:
            check_test_faces(num_faces, len(held_out), len(images))
        held_out |= max(room, key=worth)
    return held_out


def check_test_faces(num_faces, most, all_faces):
    if num_faces > most:
        raise GlyphError(f"--test-faces {num_faces}: of the {all_faces} faces found, at most {most} can be held out as "
                         "whole typefaces; ask for fewer or name folders with more fonts by --fonts")
