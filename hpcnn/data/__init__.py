"""Labelled images: sets of them, their order, and the batches that reach a rank. Knows rank numbers, not MPI."""

from hpcnn.data.dataset import DataSet, MemoryDataSet
from hpcnn.data.sources import open_data

__all__ = ["DataSet", "MemoryDataSet", "open_data"]
