"""Training methods of papers, and their diagnostics, on top of `htv.attach`. docs/methods tells how to use them."""

from htv.methods.attribution import (
    Attribution,
    Influence,
    LearntTracker,
    StepShares,
    adjusted_overfit,
    proper_accuracy,
)
from htv.methods.coherence import M3, Coherence, ModelCoherence, generalisation_bound, measure_coherence, winsorized
from htv.methods.difficulty import disjoint_subsets, easy_examples
from htv.methods.rolling import RA3, RM3

__all__ = [
    "M3",
    "RA3",
    "RM3",
    "Attribution",
    "Coherence",
    "Influence",
    "LearntTracker",
    "ModelCoherence",
    "StepShares",
    "adjusted_overfit",
    "disjoint_subsets",
    "easy_examples",
    "generalisation_bound",
    "measure_coherence",
    "proper_accuracy",
    "winsorized",
]
