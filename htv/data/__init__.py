"""Real images for the demo and the tests: nothing is downloaded."""

from htv.data.dataset import DataError, Dataset
from htv.data.digits import digits
from htv.data.idx import idx_folder
from htv.data.noise import label_noise

__all__ = ["DataError", "Dataset", "digits", "idx_folder", "label_noise"]
