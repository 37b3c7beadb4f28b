"""The operations of a forward: what kind each is, by its name, and one call with its operands'
marks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from htv.engine.provenance import Mark


@lru_cache(maxsize=4096)
def plain_name(func) -> str:
    """Name what `func` does: `Tensor.__add__`, `add_` and `torch.add` -> "add"; a property getter
    -> the property's name.
    """
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(func.__self__, "__name__", name)
    return name.strip("_").partition(".")[0]  # aten.transpose.int


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Broadcasting arithmetic: an expanded operand's gradient is its stack of contributions.
ELEMENTWISE = _names(
    "add sub subtract rsub mul multiply div divide true_divide truediv rdiv rtruediv pow rpow "
    "radd rmul iadd isub imul itruediv maximum minimum where lerp addcmul addcdiv atan2 hypot "
    "logaddexp"
)
COMPARING = _names(
    "eq ne lt le gt ge isclose equal logical_and logical_or logical_xor logical_not and or xor "
    "invert bitwise_and bitwise_or bitwise_not isnan isinf isfinite floor_divide floordiv "
    "remainder fmod mod rmod rfloordiv"
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
    "polygamma lgamma digamma sinc heaviside"
)
BROADCASTING = ELEMENTWISE | COMPARING | UNARY

# Functions of (N, C, *space) or (*, features) that compute every example by itself, whatever their
# other arguments.
ROWWISE = _names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution "
    "max_pool1d max_pool2d max_pool3d boolean_dispatch fn avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate upsample pad "
    "grid_sample pixel_shuffle pixel_unshuffle channel_shuffle fold batch_norm group_norm "
    "instance_norm layer_norm rms_norm local_response_norm linear embedding embedding_bag one_hot "
    "prelu bilinear tril triu view_as_real view_as_complex"
)
# How many dims at the end some of them may mix; the others need the batch in dim 0.
KEEPS_LAST = {
    "layer_norm": 1, "rms_norm": 1, "linear": 1, "bilinear": 1, "pad": 1, "embedding": 0,
    "one_hot": 0, "tril": 2, "triu": 2, "view_as_real": 0, "view_as_complex": 1,
}  # fmt: skip

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
}  # fmt: skip

# Reductions: where the dims stand after the tensor.
REDUCING = {
    "sum": 0, "nansum": 0, "mean": 0, "nanmean": 0, "amax": 0, "amin": 0, "max": 0, "min": 0,
    "median": 0, "std": 0, "var": 0, "prod": 0, "logsumexp": 0, "argmax": 0, "argmin": 0, "any": 0,
    "all": 0, "norm": 1, "vector_norm": 1, "linalg_norm": 1, "linalg_vector_norm": 1,
    "cosine_similarity": 1, "count_nonzero": 0,
}  # fmt: skip

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
    "index_add index_reduce"
)
# They only move elements, so running them on the examples' numbers shows where a batch went that
# they cut or permute.
MOVING = _names(
    "getitem flip roll index_select narrow chunk split split_with_sizes tensor_split gather "
    "take_along_dim repeat_interleave masked_select cat concat concatenate select unbind unfold "
    "pack_padded_sequence"
)
# The names of the tensors that come first, in their order; NumPy's are accepted as well.
INPUT_FIRST = dict.fromkeys(ROWWISE | set(ALONG) | set(REDUCING) | SHUFFLING, ("input", "x", "a"))
INPUT_FIRST |= dict.fromkeys(
    ("scatter_add", "scatter_reduce", "index_put", "index_reduce"), ("input",)
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
