"""Training methods of papers, and their diagnostics, on top of `htv.attach`. docs/methods tells how to use them."""

from htv.methods.attribution import (
    Attribution,
    Influence,
    LearntTracker,
    StepShares,
    adjusted_overfit,
    proper_accuracy,
)
from htv.methods.batches import Batches, ExampleTable
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
from htv.methods.heldout import Draw, KFold, Twins, best_draw, class_balanced_loss, cross_mistakes
from htv.methods.masks import masked_noise, masked_noise_bound, mean_noise, survival_probability
from htv.methods.memorization import (
    MemorizationAwareLoss,
    calibration_matrix,
    class_prior_shift,
    shifted_cross_entropy,
)
from htv.methods.penalties import (
    DomainAdversary,
    GroupDRO,
    environment_means,
    fishr_penalty,
    iga_penalty,
    irm_penalty,
    l1_penalty,
    l2_penalty,
    reverse_gradient,
)
from htv.methods.rolling import RA3, RM3
from htv.methods.temporal import TemporalAndMaskAdam

__all__ = [
    "M3",
    "RA3",
    "RM3",
    "Attribution",
    "Batches",
    "Coherence",
    "DomainAdversary",
    "Draw",
    "ExampleTable",
    "GroupDRO",
    "Inconsistency",
    "Influence",
    "KFold",
    "LearntTracker",
    "MemorizationAwareLoss",
    "ModelCoherence",
    "StepShares",
    "TemporalAndMaskAdam",
    "Twins",
    "adjusted_overfit",
    "arithmetic_mean_hessian",
    "best_draw",
    "calibration_matrix",
    "class_balanced_loss",
    "class_prior_shift",
    "cross_mistakes",
    "disjoint_subsets",
    "easy_examples",
    "environment_batches",
    "environment_groups",
    "environment_losses",
    "environment_means",
    "fishr_penalty",
    "generalisation_bound",
    "geometric_mean_hessian",
    "iga_penalty",
    "inconsistency",
    "inconsistency_bound",
    "irm_penalty",
    "join_environments",
    "l1_penalty",
    "l2_penalty",
    "masked_noise",
    "masked_noise_bound",
    "mean_noise",
    "measure_coherence",
    "proper_accuracy",
    "quadratic_inconsistency",
    "require_environments",
    "reverse_gradient",
    "shifted_cross_entropy",
    "survival_probability",
    "winsorized",
]
