"""Images, label noise, and problems with environments: nothing is downloaded."""

from htv.data.dataset import DataError, Dataset
from htv.data.digits import digits
from htv.data.environments import Environments, linear_environments, patchwork, spirals
from htv.data.idx import idx_folder
from htv.data.noise import label_noise

__all__ = [
    "DataError",
    "Dataset",
    "Environments",
    "digits",
    "idx_folder",
    "label_noise",
    "linear_environments",
    "patchwork",
    "spirals",
]
