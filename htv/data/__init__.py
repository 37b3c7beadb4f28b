"""Images, label noise, cues, and problems with environments or groups: nothing is downloaded."""

from htv.data.cifar import cifar_folder
from htv.data.cues import (
    BoxCue,
    DominoCue,
    HueCue,
    add_cue,
    counterfactuals,
    cue_mask,
    fine_tuning_parts,
)
from htv.data.dataset import DataError, Dataset
from htv.data.digits import digits
from htv.data.environments import Environments, linear_environments, patchwork, spirals
from htv.data.folder import read_folder
from htv.data.groups import Grouped, GroupedPart, backgrounds, flipped_shortcut
from htv.data.idx import idx_folder
from htv.data.noise import label_noise
from htv.data.regression import clean_curve, noisy_curve

__all__ = [
    "BoxCue",
    "DataError",
    "Dataset",
    "DominoCue",
    "Environments",
    "Grouped",
    "GroupedPart",
    "HueCue",
    "add_cue",
    "backgrounds",
    "cifar_folder",
    "clean_curve",
    "counterfactuals",
    "cue_mask",
    "digits",
    "fine_tuning_parts",
    "flipped_shortcut",
    "idx_folder",
    "label_noise",
    "linear_environments",
    "noisy_curve",
    "patchwork",
    "read_folder",
    "spirals",
]
