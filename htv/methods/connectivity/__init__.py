"""Mode connectivity: paths through weight space, what lies on them, and permutations that models
are equal up to.
"""

from htv.methods.connectivity.along import (
    Barrier,
    Invariance,
    MechanisticSimilarity,
    PathProfile,
    barrier,
    evaluate_along,
    mechanistic_similarity,
)
from htv.methods.connectivity.matching import Matching, activation_correlations, match_permutations
from htv.methods.connectivity.paths import (
    Bezier,
    LinearPath,
    PathProbe,
    PolygonalChain,
    QuadraticBezier,
    WeightPath,
)
from htv.methods.connectivity.permutations import (
    PermutationSpec,
    UnitAxis,
    permute_model,
    random_permutations,
)
from htv.methods.connectivity.samplers import (
    path_grid,
    sample_clipped_normal,
    sample_truncated_normal,
    sample_uniform,
)
from htv.methods.connectivity.statistics import reestimate_batchnorm
from htv.methods.connectivity.tracing import trace_permutations
from htv.methods.connectivity.training import train_curve

__all__ = [
    "Barrier",
    "Bezier",
    "Invariance",
    "LinearPath",
    "Matching",
    "MechanisticSimilarity",
    "PathProbe",
    "PathProfile",
    "PermutationSpec",
    "PolygonalChain",
    "QuadraticBezier",
    "UnitAxis",
    "WeightPath",
    "activation_correlations",
    "barrier",
    "evaluate_along",
    "match_permutations",
    "mechanistic_similarity",
    "path_grid",
    "permute_model",
    "random_permutations",
    "reestimate_batchnorm",
    "sample_clipped_normal",
    "sample_truncated_normal",
    "sample_uniform",
    "trace_permutations",
    "train_curve",
]
