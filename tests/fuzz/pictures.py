"""Traces and fonts."""

import json
import os

import data_tools.show
from data_tools.fonts import faces as font_faces
from tests.fuzz.case import command
from tests.fuzz.changes import change_bytes, change_json_file, one_of


def make_trace(folder):
    import matplotlib.pyplot  # noqa: F401  its first import makes folders of its own

    events = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "rank 0"}}]
    for step in range(3):
        for lane, name, tid in (("step", f"step {step}", 0), ("compute", "forward", 1000), ("network", "sum", 2000)):
            events.append({"ph": "X", "pid": 0, "tid": tid, "cat": lane, "name": name, "ts": 1e3 * step, "dur": 9e2})
    (folder / "trace.json").write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def change_trace(random, folder):
    change_json_file(random, folder / "trace.json")


def read_trace(folder, out):
    command(data_tools.show.main, folder / "trace.json", "--json")


def make_fonts(folder):
    from fontTools import subset, ttLib
    from matplotlib import get_data_path

    for name, text in ("DejaVuSans", "Ab%é"), ("STIXGeneral", "xyz"):
        font, some = ttLib.TTFont(f"{get_data_path()}/fonts/ttf/{name}.ttf"), subset.Subsetter()
        some.populate(text=text)
        some.subset(font)
        font.save(folder / f"{name}.ttf")
    assert len(font_faces.find_faces([folder])[0]) == 2


def change_fonts(random, folder):
    path = one_of(random, folder)
    if random.randrange(10):
        change_bytes(random, path)
    else:
        path.unlink()
        random.choice((os.mkfifo, os.mkdir, lambda name: os.symlink("/dev/zero", name)))(path)


def read_fonts(folder, out):
    faces, _ = font_faces.find_faces([folder])
    for face in faces:
        font = font_faces.open_face(face.path, face.index, 64)
        for code in face.code_points[:20]:
            font_faces.draw(font, chr(code), 32)
