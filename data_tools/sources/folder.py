"""Images in folders named after their classes."""

import os

from data_tools.common.progress import note
from data_tools.sources.base import Format, list_folder, walk
from data_tools.sources.names import (
    ARCHIVE_SUFFIXES,
    COMPANION_SUFFIXES,
    TABLE_SUFFIXES,
    claims_image,
    content_is_image,
    is_never_data,
)
from xc.data.pack import PackError


def records(root, how, skipped):
    """Yields the images of a tree, in a fixed order."""
    split_of = _splits_at_top(root, how.splits)
    doubled = _doubled(root, split_of, how.splits)
    seen = set()
    for folder, inner, names in walk(root, skipped):
        first, _, label = folder.partition("/") if split_of else ("", "", folder)
        split = split_of.get(first, "")
        if first in doubled:
            _, _, label = label.partition("/")
        if how.leaves_out(split):
            paths = (os.path.join(folder, name) for name in names if not is_never_data(name))
            yield from ((split, path, "", None) for path in paths
                        if claims_image(path) or content_is_image(os.path.join(root, path)))
            continue
        if any(part.startswith(".") for part in folder.split("/")):
            for path in images_in(root, folder, names, split, skipped):
                skipped.add(split, path, "its folder is hidden: the name begins with a dot")
            continue
        if folder and doubled.get(folder) is None:
            _check_no_splits(root, folder, inner, how.splits)
        for path in images_in(root, folder, names, split, skipped):
            if not label:
                raise PackError(f"{os.path.join(root, path)}: an image without a class; move it into a folder named "
                                f"after its class, or list the images in a manifest{_without(split)}")
            seen.add(split)
            yield split, path, label, None
    for folder, split in split_of.items():
        if split not in seen and not how.leaves_out(split):
            note(f"{os.path.join(root, folder)}: no images for split {split}")


def images_in(root, folder, names, split, skipped):
    """Yields the paths of the images among the files of a folder; others are reported."""
    stems, place = None, os.path.join(folder, "")
    for name in names:
        path, is_hidden = place + name, name.startswith(".")
        if not is_hidden and claims_image(name):  # nearly all
            yield path
            continue
        if is_never_data(name):
            continue
        if claims_image(name) or content_is_image(os.path.join(root, path)):
            if is_hidden:
                skipped.add(split, path, "hidden: its name begins with a dot")
            else:
                yield path
            continue
        stem, suffix = os.path.splitext(name)
        if name.lower().endswith(ARCHIVE_SUFFIXES):
            raise PackError(f"{os.path.join(root, path)}: an archive or a shard in a tree of images; unpack it, pack "
                            "it as a source of its own, or move it away")
        if suffix.lower() in COMPANION_SUFFIXES:
            if stems is None:
                stems = {os.path.splitext(other)[0] for other in names if claims_image(other)}
            if stem in stems:
                continue
        if not folder and name.lower().endswith(TABLE_SUFFIXES):
            continue
        is_broken = os.path.islink(os.path.join(root, path)) and not os.path.exists(os.path.join(root, path))
        skipped.add(split, path, "a link to nothing" if is_broken else "neither its name nor its content is that of an "
                                                                       "image")


def _splits_at_top(root, splits):
    """{folder at the top: split}; {} where these folders are classes. PackError where that is not clear."""
    folders = [folder for folder in list_folder(root)[0] if not folder.startswith(".")]
    named = {folder: split for folder in folders if (split := splits.of(folder))}
    others = [folder for folder in folders if folder not in named]
    if not named:
        _check_pairs(root, folders, splits)
        return {}
    told = any(map(splits.is_told, named))
    if others:
        if len(set(named.values())) == 1 and not told:
            [(folder, _), *more] = named.items()
            if not more and not list_folder(os.path.join(root, folder))[0]:
                return {}  # a class of this name, as train among bus and car
        raise PackError(f"{root}: {_listed(named)} name splits, but {_listed(others)} {_stand(others)} beside: leave "
                        f"it out (--without {others[0]}), say its split (--rename-split {others[0]}=train, val or "
                        "test), or move it away; if all are classes, list the images in a manifest")
    for split in sorted(set(named.values())):
        same = [folder for folder, of_folder in named.items() if of_folder == split]
        if len(same) > 1 and not any(map(splits.is_told, same)):
            raise PackError(f"{root}: {_listed(same)} are all split {split}; join them, or leave one out, as --without "
                            f"{same[1]} does")
    kept = {split for split in named.values() if not splits.leaves_out(split)}
    if "train" not in kept:
        raise PackError(f"{root}: {_listed(named)} name splits, but there is no split train, which gives the classes; "
                        f"name the folder of one split instead, or say which folder is train by "
                        "--rename-split")
    if any(folder != named[folder] for folder in named):
        note(f"{root}: splits {', '.join(f'{folder} = {split}' for folder, split in named.items())}")
    return named


def _check_pairs(root, folders, splits):
    """PackError where folders are classes of splits, as train_apple and test_apple."""
    found = {}  # {the other words of the name: (folder, split)}
    for folder in folders:
        split, rest = splits.and_rest(folder)
        if split:
            other, of_other = found.setdefault(rest, (folder, split))
            if split != of_other:
                raise PackError(f"{root}: {_listed([other, folder])} look like one class in two splits; move them to "
                                f"folders {of_other} and {split}, list the images in a manifest, or say by "
                                "--rename-split which folder is which split")


def _doubled(root, named, splits):
    """{folder: the only folder in it}, where that names the same split, as archives unpack to test_set/test_set."""
    found = {}
    for folder, split in named.items():
        inner, files = list_folder(os.path.join(root, folder))
        if len(inner) == 1 and splits.of(inner[0]) == split and not any(map(claims_image, files)):
            found[folder] = inner[0]
    return found


def _without(split):
    return f"; --without {split} leaves out that split" if split in ("val", "test") else ""


def _check_no_splits(root, folder, inner, splits):
    """PackError where the folders of a class are splits."""
    named = [name for name in inner if splits.of(name)]
    if len({splits.of(name) for name in named}) > 1 or named and len(named) == len(inner):
        place, first = os.path.join(root, folder), named[0]
        raise PackError(f"{place}: {_listed(named)} name splits below the folder of a class: name {place} as the "
                        f"source, or move {folder}/{first} to {splits.of(first)}/{folder}")


def _listed(names):
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _stand(names):
    return "stands" if len(names) == 1 else "stand"


FORMAT = Format(records, takes_files=False)
