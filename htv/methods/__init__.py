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
from htv.methods.consistency import (
    Inconsistency,
    arithmetic_mean_hessian,
    environment_losses,
    geometric_mean_hessian,
    inconsistency,
    inconsistency_bound,
    quadratic_inconsistency,
)
from htv.methods.difficulty import disjoint_subsets, easy_examples
from htv.methods.environments import (
    environment_batches,
    environment_groups,
    join_environments,
    require_environments,
)
from htv.methods.masks import masked_noise, masked_noise_bound, mean_noise, survival_probability
from htv.methods.rolling import RA3, RM3
from htv.methods.temporal import TemporalAndMaskAdam

__all__ = [
    "M3",
    "RA3",
    "RM3",
    "Attribution",
    "Coherence",
    "Inconsistency",
    "Influence",
    "LearntTracker",
    "ModelCoherence",
    "StepShares",
    "TemporalAndMaskAdam",
    "adjusted_overfit",
    "arithmetic_mean_hessian",
    "disjoint_subsets",
    "easy_examples",
    "environment_batches",
    "environment_groups",
    "environment_losses",
    "generalisation_bound",
    "geometric_mean_hessian",
    "inconsistency",
    "inconsistency_bound",
    "join_environments",
    "masked_noise",
    "masked_noise_bound",
    "mean_noise",
    "measure_coherence",
    "proper_accuracy",
    "quadratic_inconsistency",
    "require_environments",
    "survival_probability",
    "winsorized",
]
