"""Worker processes that read, check and encode images; the results come in the order of the images."""

import hashlib
import itertools
import multiprocessing
import os
import signal
import stat
import threading
import warnings
import zlib
from collections import deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from data_tools.packing.encode import Encoding
from data_tools.packing.validate import check_image, check_visible
from xc.data import pack as layout
from xc.data.images import open_image
from xc.data.pack import PackError

CHUNK_RECORDS, CHUNK_BYTES = 64, 2**23  # images a worker gets at once, and bytes after which it returns the rest
KEPT = Encoding()  # images keep their bytes


def check_images(images, max_pixels, encoding, check):
    """[(bytes or None, crc32 or error)] of images; the list ends early after CHUNK_BYTES were read.

    images    [(path, None) or (any text, bytes)]; bytes that were given and do not change are not returned
    encoding  Encoding of the result
    check     how images that keep their bytes are checked: one of CHECKS
    """
    results, num_bytes = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata of images that decode
        for path, given in images:
            try:
                data = read_file(path) if given is None else given
                _check_size(len(data))
                if encoding == KEPT:
                    check_image(data, max_pixels, check)
                else:
                    image = open_image(data, max_pixels)
                    check_visible(image)
                    data = encoding.apply(image, data)
                    _check_size(len(data))
            except (OSError, ValueError) as error:
                results.append((None, getattr(error, "strerror", None) or str(error)))
                continue
            results.append((None if data is given else data, zlib.crc32(data)))
            num_bytes += len(data)
            if num_bytes >= CHUNK_BYTES:
                break
    return results


def content_hashes(paths):
    """[16 bytes, or None] of files: the hash of the content, None for a file that cannot be read."""
    return [_content_hash(path) for path in paths]


def _content_hash(path):
    try:
        return content_hash(read_file(path))
    except (OSError, ValueError):
        return None


def content_hash(data):
    return hashlib.blake2b(data, digest_size=16).digest()


def read_file(path):
    """The bytes of a file. OSError; ValueError where it is no file, too large, or changes meanwhile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else a pipe waits for its writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise ValueError("not a file")
        _check_size(status.st_size)
        parts, left = [], status.st_size + 1
        while part := os.read(descriptor, left):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(descriptor)
    if left != 1:
        raise ValueError(f"not the {status.st_size} bytes that it had before: it is being changed")
    return b"".join(parts)


def _check_size(num_bytes):
    if num_bytes > layout.MAX_RECORD_BYTES:
        raise ValueError(f"{num_bytes} bytes, more than {layout.MAX_RECORD_BYTES}")


def read_in_order(pool, window, roots, chunks, *options):
    """Yields (record, its bytes or None, crc32 or error) of lists of records, in their order.

    At most `window` lists are with the workers or wait to be written. options are those of check_images.
    """

    def start(chunk):
        images = [(os.path.join(roots[record.root], record.path), record.data) for record in chunk]
        return chunk, pool.submit(check_images, images, *options)

    chunks, pending = iter(chunks), deque()
    while True:
        for chunk in itertools.islice(chunks, window - len(pending)):
            pending.append(start(chunk))
        if not pending:
            return
        chunk, future = pending.popleft()
        results = result_of(future, chunk[0].path)
        if len(results) < len(chunk):
            pending.appendleft(start(chunk[len(results) :]))
        for record, (data, crc_or_reason) in zip(chunk, results, strict=False):
            yield record, data if isinstance(crc_or_reason, str) or data is not None else record.data, crc_or_reason


def result_of(future, path):
    """The result of a worker; PackError where the worker died on images from this path on."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise PackError(f"a worker died (out of memory, or a decoder crashed) at or soon after {path}") from error


class InProcess(Executor):
    """The pool of --workers 0: this process does the work."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def worker_pool(workers):
    """An executor with this number of processes; 0: it runs in this one."""
    if workers == 0:
        return InProcess()
    methods = multiprocessing.get_all_start_methods()  # not fork: HDF5 and threads break in the child
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    return ProcessPoolExecutor(workers, context, _start_worker)


def _start_worker():
    """A worker ignores Ctrl-C, which its parent handles, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
