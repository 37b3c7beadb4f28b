"""What determines the contributions of every group to one parameter, without storing them.

Each kind of factors can write the contributions of a box of coordinates (a range of dim 0 by a
range of dim 1 of the parameter, all of its further dims), give those of one group, and, where a
layer allows it cheaply, their plain sum. Any rule then works for any layer: see
`htv.ops.aggregate`.
"""

from htv.ops.factors.base import Factors, StackedFactors, two_dims
from htv.ops.factors.computed import GroupwiseFactors, View, ViewFactors
from htv.ops.factors.conv import ConvFactors, ConvGeometry
from htv.ops.factors.embedding import EmbeddingFactors, Pairs
from htv.ops.factors.linear import BilinearFactors, LinearFactors

__all__ = [
    "BilinearFactors",
    "ConvFactors",
    "ConvGeometry",
    "EmbeddingFactors",
    "Factors",
    "GroupwiseFactors",
    "LinearFactors",
    "Pairs",
    "StackedFactors",
    "View",
    "ViewFactors",
    "two_dims",
]
