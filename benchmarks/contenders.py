"""Ways to keep rows on disk, for ``benchmarks.store``: each is written whole and read by number."""

import os
import shutil

import numpy as np
import zarr
from safetensors.numpy import load_file, save_file

from cache import Store, digest
from cache.core.files import sync_folder


class Contender:
    """One way to keep rows. folder: where its files are, and nothing else.

    ``write`` takes rows of shape (n, *item) in the stored dtype and is durable on return. ``reader`` opens what was
    written and returns ``read(numbers, out)``, which fills ``out`` with one row for each number.
    """

    writes = reads = ""  # its name in the table

    def __init__(self, folder, layout):
        self.folder, self.layout = folder, layout

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def drop_from_page_cache(self):
        """Ask the kernel to forget the bytes of all files. It keeps those that a process has mapped."""
        for path in filter(os.path.isfile, self.folder.rglob("*")):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Raw(Contender):
    """The rows in one file, one after the other: nothing can be checked, added or shared."""

    writes, reads = "raw file", "memmap"

    def write(self, rows):
        with open(self.folder / "rows", "wb", buffering=0) as file:
            for row in rows:
                file.write(row)
            os.fsync(file.fileno())

    def mapped(self):
        return np.memmap(self.folder / "rows", self.layout.stored, "r").reshape(-1, *self.layout.shape)

    def reader(self, wanted=()):
        rows = self.mapped()

        def read(numbers, out):
            for place, number in enumerate(numbers):
                out[place] = rows[number]

        return read


class PlainArray(Raw):
    """The same map without np.memmap's class, which takes 2 microseconds for each row that is taken from it."""

    reads = "memmap as a plain ndarray"

    def mapped(self):
        return np.asarray(super().mapped())


class Ours(Contender):
    """The store, with the limits that a writer has by default."""

    writes = reads = "ours"

    def entries(self):
        recipe = {"kind": "benchmark", "dtype": self.layout.dtype, "shape": list(self.layout.shape)}
        return Store(self.folder / "store").entries(recipe)

    def write(self, rows):
        self.items = [digest(b"%d" % number) for number in range(len(rows))]
        with self.entries().writer() as writer:
            for item, row in zip(self.items, rows):
                writer.write(item, row)

    def reader(self, wanted=()):
        entries, items = self.entries(), self.items
        entries.prefetch([items[number] for number in wanted])
        return lambda numbers, out: entries.read_many([items[n] for n in numbers], out.view(self.layout.real))


class FilePerRow(Contender):
    """A safetensors file for each row."""

    writes = reads = "a safetensors file each"

    def path(self, number):
        return f"{self.folder}/{number}.safetensors"

    def write(self, rows):
        for number, row in enumerate(rows):
            save_file({"row": row}, self.path(number))
            with open(self.path(number), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(self.folder)

    def reader(self, wanted=()):
        def read(numbers, out):
            for place, number in enumerate(numbers):
                out[place] = load_file(self.path(number))["row"]

        return read


class Zarr(Contender):
    """Zarr's own reader, of the segments that ours has written. folder: that of ours."""

    reads = "zarr, of our segments"

    def reader(self, wanted=()):
        folders = sorted(self.folder.glob("store/entries/*/segments/*"))
        arrays = [zarr.open_array(folder, mode="r") for folder in folders]
        places = [(array, row) for array in arrays for row in range(array.shape[0])]

        def read(numbers, out):
            for place, number in enumerate(numbers):
                array, row = places[number]
                out[place] = array[row]

        return read
