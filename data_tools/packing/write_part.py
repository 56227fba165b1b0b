"""Writes the shards of one part of a pack: the second stage, which an interrupted process resumes."""

import os

from data_tools.common.progress import Progress
from data_tools.packing.list_images import shown_path
from data_tools.packing.skipped import Skipped
from data_tools.packing.workers import CHUNK_BYTES, CHUNK_RECORDS, read_in_order, worker_pool
from data_tools.packing.writer import ShardWriter


def write_part(journal, catalogue, roots, options):
    """Writes the shards of the part of the catalogue that the options name, from where its journal ends.

    roots    folders in which the paths of the images start
    options  Options of the pack
    """
    split, writer, taken = None, None, journal.taken
    os.makedirs(journal.folder, exist_ok=True)
    with Skipped(os.path.join(journal.folder, "skipped.tsv"), options.max_skipped, catalogue.total, catalogue.skipped,
                 journal.skipped) as skipped:

        def end_shard(start):
            journal.add(split, writer and writer.write(), start, skipped.state(), taken)

        chunks = catalogue.chunks(options.number, options.parts, CHUNK_RECORDS, CHUNK_BYTES, journal.start)
        with (worker_pool(options.workers) as pool,
              Progress("packing", catalogue.expected(options.number, options.parts), done=taken) as progress):
            images = read_in_order(pool, 2 * options.workers + 1, roots, chunks, options.max_pixels, options.encoding,
                                   options.check)
            for record, data, crc_or_reason in images:
                if data is None:
                    path = shown_path(record.path, roots[record.root], record.data, roots)
                    skipped.add(record.split, path, crc_or_reason)
                else:
                    if writer and not (split == record.split and writer.fits(data)):
                        end_shard(record.place)
                    if split != record.split:
                        split = record.split
                        writer = ShardWriter(os.path.join(journal.folder, split), options.shard_mb * 1e6,
                                             catalogue.has_weights, len(journal.shards.get(split, ())))
                    writer.add(data, crc_or_reason, record.label, record.weight)
                taken += 1
                progress.add(1)
        end_shard(None)
