"""What is written is the state of one step, bit for bit, whatever changes meanwhile."""

import threading

import pytest
import torch

from xc.checkpoint import snapshot as snapshots
from xc.checkpoint.snapshot import Snapshot


def tables_of(num_rows, generator):
    rows = torch.randn(num_rows, 5, generator=generator)
    return {"momentum": rows.bfloat16(), "weight": rows.clone()}


def read(snapshot, tables, at_block=lambda i: None):
    """The tables that the pieces make up. at_block is called with a count before each block."""
    found, count = {}, 0
    for name, table in tables.items():
        data = []
        for piece in snapshot.pieces(name):
            data.append(torch.from_numpy(piece.copy()))
            at_block(count := count + 1)
        found[name] = torch.cat(data).view(table.dtype).view(table.shape) if data else table[:0]
    return found


def change(snapshot, tables, rows):
    snapshot.before_update(rows)
    for table in tables.values():
        table[rows] += 1


@pytest.fixture(params=[1, 7, 1000])
def block(request, monkeypatch):
    """Rows of a block."""
    monkeypatch.setattr(snapshots, "_BLOCK_BYTES", 20 * request.param)
    monkeypatch.setattr(snapshots, "_BLOCKS_OF_SECTION", 3)


@pytest.mark.parametrize("num_rows", [0, 1, 100, 101])
def test_rows_are_those_of_the_begin_whatever_changes(num_rows, block):
    """Some rows change before every block, a few of them many times, all of them in the end."""
    generator = torch.Generator().manual_seed(num_rows)
    tables = tables_of(num_rows, generator)
    before = {name: table.clone() for name, table in tables.items()}
    snapshot = Snapshot(tables, 2**20)

    def at_block(count):
        change(snapshot, tables, torch.randint(num_rows, (9,), generator=generator).unique())
        if count % 5 == 4:
            change(snapshot, tables, slice(num_rows // 3, num_rows))

    if num_rows:
        at_block(0)
    found = read(snapshot, tables, at_block)
    assert all(torch.equal(found[name], before[name]) for name in tables)
    assert snapshot._kept_bytes == 0 and not any(snapshot._kept.values())
    snapshot.before_update(slice(0, num_rows))  # nothing is kept for nobody
    assert snapshot._kept_bytes == 0


@pytest.mark.parametrize("most_bytes", [0, 30 * 30])
def test_updates_wait_where_there_is_no_room(most_bytes, block):
    """A thread that reads, and updates of all rows: no more than the room is kept, and nothing is lost."""
    tables = tables_of(300, torch.Generator().manual_seed(1))
    before = {name: table.clone() for name, table in tables.items()}
    snapshot, found, most = Snapshot(tables, most_bytes), {}, []

    def at_block(count):
        most.append(snapshot._kept_bytes)

    begun = threading.Event()

    def work():
        begun.wait(20)
        found.update(read(snapshot, tables, at_block))

    thread = threading.Thread(target=work)
    thread.start()
    threading.Timer(0.05, begun.set).start()  # by then, the first update waits or is done
    change(snapshot, tables, torch.arange(0, 300, 100))
    for _ in range(3):
        change(snapshot, tables, slice(0, 300))
    thread.join()
    assert all(torch.equal(found[name], before[name]) for name in tables)
    assert max(most) <= max(most_bytes, 30) + 30


def test_a_snapshot_that_is_closed_lets_updates_go_on():
    tables = tables_of(50, torch.Generator().manual_seed(1))
    snapshot = Snapshot(tables, 0)
    threading.Timer(0.3, snapshot.close).start()
    change(snapshot, tables, slice(0, 50))
    assert snapshot._kept_bytes <= 30
