"""The operations of a forward: what kind each is, by its name, and one call with its operands'
marks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType

import torch
from torch import Tensor

from htv.engine.provenance import Mark

OWN_NAMESPACES = ("aten", "prims")  # of torch's operators

# Other names of the same operation. What only copies what another shows as a view is one as well.
ALIASES = dict(
    pair.split("=")
    for pair in """
    arccos=acos arccosh=acosh arcsin=asin arcsinh=asinh arctan=atan arctan2=atan2 arctanh=atanh
    dsmm=mm spmm=mm
    fix=trunc greater=gt greater_equal=ge less=lt less_equal=le not_equal=ne ravel=flatten
    ger=outer trapz=trapezoid row_stack=vstack pinverse=linalg_pinv inverse=linalg_inv
    det=linalg_det slogdet=linalg_slogdet matrix_exp=linalg_matrix_exp
    matrix_power=linalg_matrix_power cholesky=linalg_cholesky qr=linalg_qr svd=linalg_svd
    orgqr=linalg_householder_product linalg_matmul=matmul
    special_digamma=digamma special_psi=digamma special_erf=erf special_erfc=erfc
    special_erfinv=erfinv special_exp2=exp2 special_expm1=expm1 special_gammaln=lgamma
    special_i0=i0 special_log1p=log1p special_logit=logit special_multigammaln=mvlgamma
    special_polygamma=polygamma special_round=round special_sinc=sinc special_softmax=softmax
    special_log_softmax=log_softmax special_logsumexp=logsumexp special_xlogy=xlogy
    special_gammainc=igamma special_gammaincc=igammac
    alias_copy=alias detach_copy=detach expand_copy=expand permute_copy=permute t_copy=t
    transpose_copy=transpose squeeze_copy=squeeze unsqueeze_copy=unsqueeze view_copy=view
    unbind_copy=unbind unfold_copy=unfold diagonal_copy=diagonal narrow_copy=narrow
    select_copy=select split_copy=split split_with_sizes_copy=split_with_sizes
    unsafe_chunk=chunk unsafe_split=split unsafe_split_with_sizes=split_with_sizes
    native_channel_shuffle=channel_shuffle affine_grid_generator=affine_grid
    native_dropout=dropout as_strided_copy=as_strided constant_pad_nd=pad grid_sampler=grid_sample
    grid_sampler_2d=grid_sample grid_sampler_3d=grid_sample view_as_real_copy=view_as_real
    view_as_complex_copy=view_as_complex
    """.split()
)


@lru_cache(maxsize=4096)
def plain_name(func) -> str:
    """Name what `func` does: `Tensor.__add__`, `add_` and `torch.add` -> "add"; a property getter
    -> the property's name; what has several names -> the one these tables use. The name of what is
    not torch's own has its owner's in front, so that no table has it: a library's softmax may do
    anything.
    """
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(func.__self__, "__name__", name)
    name = name.strip("_").partition(".")[0]  # aten.transpose.int
    owner = _stranger(func)
    return f"{owner}.{name}" if owner else ALIASES.get(name, name)


def _stranger(func) -> str:
    """Return who defined `func`, "" if torch did."""
    if isinstance(func, torch._ops.OpOverload):
        return "" if func.namespace in OWN_NAMESPACES else func.namespace
    if isinstance(func, torch._ops.OpOverloadPacket):
        namespace = func._qualified_op_name.partition("::")[0]
        return "" if namespace in OWN_NAMESPACES else namespace
    if isinstance(func, FunctionType):
        module = func.__module__ or ""
        return "" if module.partition(".")[0] == "torch" else module or "a function"
    return ""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Broadcasting arithmetic: an expanded operand's gradient is its stack of contributions.
ELEMENTWISE = _names(
    "add sub subtract rsub mul multiply div divide true_divide truediv rdiv rtruediv pow rpow "
    "radd rmul iadd isub imul itruediv maximum minimum where lerp addcmul addcdiv atan2 hypot "
    "logaddexp logaddexp2 copysign float_power fmax fmin igamma igammac ldexp nextafter xlogy "
    "special_xlog1py special_zeta complex polar"
)
COMPARING = _names(
    "eq ne lt le gt ge isclose equal logical_and logical_or logical_xor logical_not and or xor "
    "invert bitwise_and bitwise_or bitwise_not isnan isinf isfinite isposinf isneginf isreal "
    "signbit floor_divide floordiv remainder fmod mod rmod rfloordiv"
)
UNARY = _names(
    "abs absolute neg negative positive pos exp exp2 expm1 log log2 log10 log1p sqrt rsqrt square "
    "reciprocal sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sigmoid logit erf "
    "erfc erfinv sign sgn floor ceil round trunc frac clamp clamp_min clamp_max clip nan_to_num "
    "relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign tanhshrink softshrink "
    "hardshrink hardtanh hardsigmoid hardswish threshold rrelu log_sigmoid dropout alpha_dropout "
    "feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d masked_fill bernoulli to "
    "float half bfloat16 double int long bool type type_as contiguous clone detach requires_grad_ "
    "requires_grad data real imag conj cpu cuda zeros_like ones_like empty_like full_like "
    "rand_like randn_like randint_like zero fill uniform normal copy alias special_expit "
    "polygamma lgamma digamma sinc heaviside angle cdouble cfloat chalf conj_physical deg2rad "
    "rad2deg frexp i0 resolve_conj resolve_neg mvlgamma special_entr special_erfcx special_i0e "
    "special_i1 special_i1e special_log_ndtr special_ndtr special_ndtri"
)
BROADCASTING = ELEMENTWISE | COMPARING | UNARY

# Functions of (N, C, *space) or (*, features) that compute every example by itself, whatever their
# other arguments.
ROWWISE = _names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d lp_pool3d interpolate upsample "
    "pad affine_grid grid_sample pixel_shuffle pixel_unshuffle channel_shuffle fold batch_norm "
    "group_norm instance_norm layer_norm rms_norm local_response_norm linear embedding "
    "embedding_bag one_hot prelu bilinear tril triu view_as_real view_as_complex max_unpool1d "
    "max_unpool2d max_unpool3d fractional_max_pool2d fractional_max_pool3d max_pool1d_with_indices "
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d_with_indices "
    "adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices "
    "fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices"
)
# How many dims at the end some of them may mix; the others need the batch in dim 0.
KEEPS_LAST = {
    "layer_norm": 1, "rms_norm": 1, "linear": 1, "bilinear": 1, "embedding": 0,
    "one_hot": 0, "tril": 2, "triu": 2, "view_as_real": 0, "view_as_complex": 1,
    "pixel_shuffle": 3, "pixel_unshuffle": 3,
}  # fmt: skip
# Those of which other tensors than the first hold examples, too, and in how many of them.
OF_SEVERAL = {"grid_sample": 2, "bilinear": 2}

NOWHERE = 99  # where an argument stands that is given by name only, or not at all

# Operations along dims, which keep the number of dims: where the dim stands after the tensor, and
# its default.
ALONG = {
    "softmax": (0, None), "log_softmax": (0, None), "softmin": (0, None), "gumbel_softmax": (3, -1),
    "cumsum": (0, None), "cumprod": (0, None), "cummax": (0, None), "cummin": (0, None),
    "logcumsumexp": (0, None), "flip": (0, None), "roll": (1, None), "sort": (0, -1),
    "argsort": (0, -1), "topk": (1, -1), "gather": (0, None), "index_select": (0, None),
    "index_fill": (0, None), "take_along_dim": (1, None), "chunk": (1, 0), "split": (1, 0),
    "split_with_sizes": (1, 0), "tensor_split": (1, 0), "narrow": (0, None), "normalize": (1, 1),
    "glu": (0, -1), "repeat_interleave": (1, None), "diff": (1, -1), "unfold": (0, None),
    "rot90": (1, (0, 1)), "cross": (1, None), "linalg_cross": (NOWHERE, -1),
    "cumulative_trapezoid": (NOWHERE, -1), "gradient": (NOWHERE, None), "msort": (NOWHERE, 0),
    "flipud": (NOWHERE, 0), "fliplr": (NOWHERE, 1),
    "vsplit": (NOWHERE, 0), "hsplit": (NOWHERE, 1), "dsplit": (NOWHERE, 2),
    "fft_fftshift": (0, None), "fft_ifftshift": (0, None),
}  # fmt: skip
_TRANSFORMS = _names("fft ifft rfft irfft hfft ihfft")
ALONG |= {f"fft_{name}": (1, -1) for name in _TRANSFORMS}
ALONG |= {f"fft_{name}2": (1, (-2, -1)) for name in _TRANSFORMS}
ALONG |= {f"fft_{name}n": (1, None) for name in _TRANSFORMS}

# Reductions: where the dims stand after the tensor, and their default.
REDUCING = {
    "sum": (0, None), "nansum": (0, None), "mean": (0, None), "nanmean": (0, None),
    "amax": (0, None), "amin": (0, None), "max": (0, None), "min": (0, None),
    "aminmax": (NOWHERE, None), "median": (0, None), "nanmedian": (0, None), "std": (0, None),
    "var": (0, None), "std_mean": (0, None), "var_mean": (0, None), "prod": (0, None),
    "logsumexp": (0, None), "argmax": (0, None), "argmin": (0, None), "any": (0, None),
    "all": (0, None), "count_nonzero": (0, None), "norm": (1, None), "vector_norm": (1, None),
    "linalg_norm": (1, None), "linalg_vector_norm": (1, None),
    "linalg_matrix_norm": (1, (-2, -1)), "quantile": (1, None), "nanquantile": (1, None),
    "kthvalue": (1, -1), "mode": (0, -1), "cosine_similarity": (1, 1),
    "linalg_vecdot": (NOWHERE, -1), "trapezoid": (NOWHERE, -1), "pairwise_distance": (NOWHERE, -1),
}  # fmt: skip
# Those of both that take several tensors of the same dims, each of which may hold examples.
PAIRED = _names(
    "cross linalg_cross cumulative_trapezoid cosine_similarity linalg_vecdot trapezoid "
    "pairwise_distance"
)

# Functions of the last dims of each operand, written as einsum does: a dim whose letter the result
# lacks is mixed, and of results with other dims "..." comes first.
TERMS = {
    name: written
    for names, written in {
        "linalg_inv linalg_inv_ex linalg_pinv linalg_det logdet linalg_slogdet linalg_matrix_exp "
        "linalg_matrix_power linalg_matrix_rank linalg_cond linalg_cholesky linalg_cholesky_ex "
        "linalg_qr linalg_svd linalg_svdvals linalg_eig linalg_eigvals linalg_eigh linalg_eigvalsh "
        "lu linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_ldl_factor linalg_ldl_factor_ex "
        "geqrf cholesky_inverse": "A|input ...ij -> ...",
        "lu_unpack": "LU_data ...ij, LU_pivots ...k -> ...",
        "linalg_solve linalg_solve_ex": "A ...ij, B ...jk -> ...",
        "linalg_lstsq": "A|input ...ij, B|b ...ik -> ...",
        "linalg_solve_triangular": "A ...ij, B ...jk -> ...",
        "triangular_solve": "b|input ...ij, A ...jk -> ...",
        "cholesky_solve": "B|input ...ij, L|input2 ...jk -> ...",
        "lu_solve": "b|input ...ij, LU_data ...kl, LU_pivots ...m -> ...",
        "linalg_lu_solve": "LU ...ij, pivots ...k, B ...lm -> ...",
        "linalg_ldl_solve": "LD ...ij, pivots ...k, B ...lm -> ...",
        "linalg_householder_product": "A|input ...ij, tau|input2 ...k -> ...",
        "ormqr": "input ...ij, tau|input2 ...k, other|input3 ...lm -> ...",
        "linalg_vander": "x ...i -> ...",
        "cdist": "x1 ...ik, x2 ...jk -> ...ij",
        "outer": "input|self i, vec2|other j -> ij",
        "addr": "input ij, vec1 i, vec2 j -> ij",
        "addmv": "input i, mat ij, vec j -> i",
        "addbmm": "input ij, batch1 bik, batch2 bkj -> ij",
        "triplet_margin_loss": "anchor ...i, positive ...i, negative ...i -> ...",
        "cosine_embedding_loss": "input1 ...i, input2 ...i, target ... -> ...",
        "multilabel_soft_margin_loss": "input ...i, target ...i -> ...",
        "multi_margin_loss": "input ...i, target ... -> ...",
        "multilabel_margin_loss": "input ...i, target ...i -> ...",
    }.items()
    for name in names.split()
}
# Losses, of which only the argument reduction="none" keeps examples apart: then they broadcast, go
# by their terms above, or lack dim 1 of their input.
LOSSES = _names(
    "l1_loss mse_loss smooth_l1_loss huber_loss binary_cross_entropy kl_div "
    "binary_cross_entropy_with_logits poisson_nll_loss soft_margin_loss hinge_embedding_loss "
    "margin_ranking_loss gaussian_nll_loss"
)
LOSSES_BY_TERMS = _names(
    "triplet_margin_loss cosine_embedding_loss multilabel_soft_margin_loss multi_margin_loss "
    "multilabel_margin_loss"
)
LOSSES_OF_CLASSES = _names("nll_loss cross_entropy")
DIAGONALS = {"diagonal": (0, 1), "linalg_diagonal": (-2, -1), "diag_embed": (-2, -1)}

PERMUTING = _names("transpose swapaxes swapdims permute movedim moveaxis t T mT H mH adjoint")
RESHAPING = _names("reshape view flatten unflatten squeeze view_as reshape_as unsafe_view")
EXPANDING = _names("expand expand_as broadcast_to")
MULTIPLYING = _names("matmul rmatmul mm bmm mv baddbmm addmm")
CONCATENATING = _names("cat concat concatenate")
# In place they change a tensor's shape before its old one can be seen.
RESHAPED_IN_PLACE = RESHAPING | PERMUTING | _names("unsqueeze resize set as_strided resize_as")
# They may take tokens out of their order.
SHUFFLING = _names(
    "flip roll gather take_along_dim index_select sort topk masked_select scatter index_copy "
    "index_add index_reduce msort flipud fliplr rot90 take put masked_scatter as_strided "
    "fft_fftshift fft_ifftshift"
)
# They only move elements, so running them on the examples' numbers shows where a batch went that
# they cut or permute.
MOVING = _names(
    "getitem flip roll index_select narrow chunk split split_with_sizes tensor_split gather "
    "take_along_dim repeat_interleave masked_select cat concat concatenate stack select unbind "
    "unfold pack_padded_sequence flipud fliplr rot90 vsplit hsplit dsplit take diagonal "
    "linalg_diagonal as_strided fft_fftshift fft_ifftshift"
)
JOINING = CONCATENATING | {"stack"}
# The names of the tensors that come first, in their order; NumPy's are accepted as well.
INPUT_FIRST = dict.fromkeys(ROWWISE | set(ALONG) | set(REDUCING) | SHUFFLING, ("input", "x", "a"))
INPUT_FIRST |= dict.fromkeys(
    "scatter_add scatter_reduce index_put index_reduce put masked_scatter select_scatter "
    "slice_scatter diagonal_scatter kron inner".split(),
    ("input",),
)
INPUT_FIRST |= dict.fromkeys(
    MULTIPLYING, ("input", "x", "a", "x1", "mat1", "batch1", "mat2", "batch2", "other", "x2", "vec")
)
# One tensor only lends its dtype, device or shape to the other.
BORROWING = _names("type_as to expand_as view_as reshape_as")
# They hand out values without a gradient, or no tensor at all.
QUERIES = _names("detach data size dim numel stride is_floating_point is_complex data_ptr")
MAKING = _names(  # a tensor only lends its dtype and device, or a size
    "new_zeros new_ones new_empty new_full new_tensor zeros ones empty full arange linspace eye "
    "rand randn randint"
)


@dataclass
class Operation:
    """Describes one call: its name, function, arguments, tensor operands with their marks, and
    outputs.
    """

    name: str
    func: Callable
    args: tuple
    kwargs: dict
    operands: list[tuple[Tensor, Mark | None]]
    outputs: list[Tensor]

    def argument(self, position: int, *names: str, default=None):
        """Return an argument after the first tensor, by `position` or `names`, or `default`;
        NumPy's axis is any dim.
        """
        for name in (*names, "axis") if "dim" in names else names:
            if name in self.kwargs:
                return self.kwargs[name]
        return self.args[1 + position] if len(self.args) > 1 + position else default

    def again(self, replaced: dict[int, Tensor]):
        """Make the call with some tensors `replaced`, by identity."""
        return self.func(
            *replace_tensors(self.args, replaced), **replace_tensors(self.kwargs, replaced)
        )


@lru_cache(maxsize=4096)
def writes(func) -> bool:
    """Tell whether a call of `func` changes its first argument."""
    return in_place(func) or plain_name(func) == "setitem"


@lru_cache(maxsize=4096)
def in_place(func) -> bool:
    """Tell whether `func` is an operation in place, by its name."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__invert__", "__int__", "__index__")
    return name.endswith("_")


def is_reordered(func, args: tuple) -> bool:
    """Tell whether a call of `func` with keywords may have tensors among them that come before
    those in `args`.
    """
    return not args or plain_name(func) in MULTIPLYING


def in_order(name: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return `args` and `kwargs` of the operation `name`, with the tensors whose order tells what
    they are by position.
    """
    names = INPUT_FIRST.get(name, ())
    found = [n for n in names if n in kwargs]
    if not found or (args and name not in MULTIPLYING):
        return args, kwargs
    rest = {n: value for n, value in kwargs.items() if n not in found}
    return (*args, *(kwargs[n] for n in found)), rest


def replace_tensors(value, replaced: dict[int, Tensor]):
    """Return the structure of `value` with some tensors `replaced`, by identity."""
    if isinstance(value, Tensor):
        return replaced.get(id(value), value)
    if isinstance(value, dict):
        return {key: replace_tensors(item, replaced) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(replace_tensors(item, replaced) for item in value)
    return value


def tensors_in(args, kwargs) -> list[Tensor]:
    """List the tensors among `args` and `kwargs`, in order, looking into lists and tuples."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(tensors_in(value, None))
    return found
