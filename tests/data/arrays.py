"""What tests of sources share: an object that slices, arrays in files."""

import numpy as np

ROWS, WIDTH = 11, 3


class Sliced:
    """An own class that is read by slicing only, and counts how often."""

    def __init__(self, array, dtype=None):
        self.array, self.shape, self.reads = array, array.shape, []
        self.dtype = array.dtype if dtype is None else dtype

    def __getitem__(self, rows):
        self.reads.append((rows.start, rows.stop))
        return self.array[rows]


def saved(array, path, **options):
    np.save(path, array, **options)
    return path


def as_memmap(array, folder):
    return np.load(saved(array, folder / "map.npy"), mmap_mode="r")
