"""Images, label noise, cues, and problems with environments: nothing is downloaded."""

from htv.data.cifar import cifar_folder
from htv.data.cues import BoxCue, DominoCue, HueCue, add_cue, counterfactuals, cue_mask, fine_tuning_parts
from htv.data.dataset import DataError, Dataset
from htv.data.digits import digits
from htv.data.environments import Environments, linear_environments, patchwork, spirals
from htv.data.folder import read_folder
from htv.data.idx import idx_folder
from htv.data.noise import label_noise

__all__ = [
    "BoxCue",
    "DataError",
    "Dataset",
    "DominoCue",
    "Environments",
    "HueCue",
    "add_cue",
    "cifar_folder",
    "counterfactuals",
    "cue_mask",
    "digits",
    "fine_tuning_parts",
    "idx_folder",
    "label_noise",
    "linear_environments",
    "patchwork",
    "read_folder",
    "spirals",
]
