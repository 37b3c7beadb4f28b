"""How every function of torch's is called, and an oracle for where its results hold the examples.

Calls come from the table torch tests its own operators with (`op_db`). The oracle says of each
tensor in turn that a dim of it holds examples, makes the call in an attached model's forward, and
compares the mark of every result with what changes when one example's part of the operand does.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import get_overridable_functions, resolve_name
from torch.utils import _pytree as pytree

from htv.engine.handlers import HANDLERS
from htv.engine.provenance import Lost
from htv.groups import BatchLayout
from support.layout_cases import Case, Operand, by_index, holding, marks_of, tensors

PATH = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
KEEPS, SERVES = "keeps the batch", "serves a parameter"
REFUSED, COUPLES = "refused by name", "couples examples"
NOT_OF_FLOATS, NO_RESULT = "not of floats", "not of floats (no tensor comes of it)"
UNJUDGED = "not yet judged"
VERDICTS = [KEEPS, SERVES, REFUSED, COUPLES, NOT_OF_FLOATS, UNJUDGED]
# Functions of other tensors than dense ones of floats on this machine.
ELSEWHERE = [
    (("quantize", "fbgemm", ".q_", "int_repr", "qscheme", "choose_qparams", "fake_quant"),
     "not of floats (quantized tensors)"),
    (("batch_norm_", "pin_memory", "miopen", "cudnn", "cuda", "mkldnn", "ipu", "xpu", "mtia"),
     "not of floats (other devices)"),
    (("sparse", "_nnz", "indices", "coalesce", "_values", ".values", "smm", "spmm", "hspmm",
      "native_norm", "sspaddmm", "_dimI", "_dimV"), "not of floats (sparse tensors)"),
    (("nested",), "not of floats (nested tensors)"),
    (("sym_",), "not of floats (sizes)"),
]  # fmt: skip
# What one example draws depends on how many numbers those before it drew, and on nothing else.
RANDOM = {"torch.rrelu", "torch.nn.functional.rrelu", "torch.rrelu_"}
HEADER = """\
# What htv does with every function of torch's

Written by `PYTHONPATH=tests python -m support.operations` with torch {version}. Each function that
torch lets a mode see is called with samples of torch's own tests, or with what it accepts; one dim
of its operands after the other is said to hold the examples. Which of them a result depends on is
found by changing them one at a time; a test fails where htv says another place than that.

- *keeps the batch*: htv knows where the examples are in the results. Where it loses them in some
  placements, the table says in how many it keeps them, of those where a dim of the result has one
  example at each index.
- *serves a parameter*: the same, and a parameter among its arguments votes.
- *refused by name*: the batch is lost although some dim holds it; the next layer refuses, and names
  this function.
- *couples examples*: the batch is lost, as no dim of the result had one example at each index in
  any call that was tried.
- *not of floats*: no result has a gradient.

How many there are:
"""

MOST_SAMPLES = 8  # of one function, of distinct shapes and options
MOST_ELEMENTS = 1500  # of a call's tensors
MOST_SECONDS = 3.0  # for one function; the sample under way is finished


@dataclass
class Recipe:
    """One way to call a function: `call(*tensors)`, with tensors whose values it accepts."""

    text: str
    call: Callable
    given: list[Tensor]


@dataclass
class Judged:
    """What was found for a function over all calls and all placements of the batch.

    kept, held:  in how many placements htv knows where the batch is, and in how many it could.
    wrong:       placements where htv says another place than what depends on what, or one where
                 there is none.
    lost:        placements where some dim holds the examples and htv lost them.
    """

    ran: bool = False
    kept: int = 0
    held: int = 0
    coupled: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def functions() -> dict[str, Callable]:
    """Every function torch lets a mode see, by its name."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for group in get_overridable_functions().values():
            for function in group:
                found.setdefault(resolve_name(function) or str(function), function)
    return found


def samples() -> dict[str, list]:
    """op_db's entries by the names they are found under."""
    from torch.testing._internal.common_methods_invocations import op_db

    found: dict[str, list] = {}
    for info in op_db:
        if torch.float64 not in info.dtypes and torch.float32 not in info.dtypes:
            continue
        names = {info.name.replace("nn.functional.", ""), *(alias.name for alias in info.aliases)}
        for name in names:
            found.setdefault(name, []).append(info)
    return found


def name_of(full: str) -> str:
    """ "torch.Tensor.add_" -> "add", as op_db calls it."""
    for prefix in ("torch.Tensor.", "torch.nn.functional.", "torch.functional.", "torch."):
        if full.startswith(prefix):
            full = full.removeprefix(prefix)
            break
    return full.removesuffix(".__get__")


def unlike(drawn: list) -> list:
    """Samples in an order that soon shows unlike ones: those of most dims first, one of each
    combination of dims at a time.
    """
    kinds: dict[tuple, list] = {}
    for sample in drawn:
        leaves = pytree.tree_leaves(((sample.input, *sample.args), sample.kwargs))
        dims = tuple(t.dim() for t in leaves if isinstance(t, Tensor))
        options = tuple(v for v in leaves if isinstance(v, str))
        kinds.setdefault((dims, options, tuple(sample.kwargs)), []).append(sample)
    rows = [kinds[key] for key in sorted(kinds, key=lambda key: (key[0][::-1], key), reverse=True)]
    return [s for row in itertools.zip_longest(*rows) for s in row if s is not None]


def recipes(function: Callable, infos: list, in_place: bool) -> Iterator[Recipe]:
    """Ways to call `function`, from samples of op_db's entries of its name."""
    seen = set()
    for info in infos:
        dtype = torch.float64 if torch.float64 in info.dtypes else torch.float32
        torch.manual_seed(0)
        try:
            drawn = list(itertools.islice(info.sample_inputs("cpu", dtype), 200))
        except Exception:
            continue
        for sample in unlike(drawn):
            values = (sample.input, *sample.args), sample.kwargs
            leaves, spec = pytree.tree_flatten(values)
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            given = [leaves[i].detach() for i in places]
            text = f"{[tuple(t.shape) for t in given]} " + ", ".join(
                [str(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]
                + list(map(str, sample.kwargs))
            )
            if text in seen or sum(t.numel() for t in given) > MOST_ELEMENTS or not given:
                continue
            seen.add(text)

            def call(*tensors, leaves=leaves, places=places, spec=spec):
                filled = list(leaves)
                for i, tensor in zip(places, tensors, strict=True):
                    filled[i] = tensor
                args, kwargs = pytree.tree_unflatten(filled, spec)
                if in_place:
                    args = (args[0] * 1, *args[1:])
                return function(*args, **kwargs)

            yield Recipe(text, call, given)
            if len(seen) >= MOST_SAMPLES:
                return


# Calls with several examples in front of functions whose samples have one, or none.
WINDOW = torch.ones(4, dtype=torch.float64)
PLACES = torch.arange(4)
SPD = lambda x: x @ x.mT + 3 * torch.eye(x.shape[-1], dtype=x.dtype)
OWN: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    **{f"max_pool{d}d": (lambda f, x: f(x, 2), [(3, 2, *(4,) * d)]) for d in (1, 2, 3)},
    **{f"max_unpool{d}d": (lambda f, x, d=d: f(x, PLACES[:2].reshape(1, 1, *(2,), *(1,) * (d - 1))
                           .expand(x.shape), 2), [(3, 2, *(2,) * d)]) for d in (1, 2, 3)},
    "fractional_max_pool2d": (lambda f, x: f(x, 2, 2), [(3, 2, 6, 6)]),
    "lp_pool3d": (lambda f, x: f(x, 2, 2), [(3, 2, 4, 4, 4)]),
    "local_response_norm": (lambda f, x: f(x, 2), [(3, 4, 5)]),
    "pixel_shuffle": (lambda f, x: f(x, 2), [(3, 4, 2, 2)]),
    "pixel_unshuffle": (lambda f, x: f(x, 2), [(3, 1, 4, 4)]),
    "native_channel_shuffle": (lambda f, x: f(x, 2), [(3, 4, 2, 2)]),
    "fold": (lambda f, x: f(x, 3, 2), [(3, 8, 4)]),
    "linalg.qr": (lambda f, x: f(x), [(4, 3, 3)]), "qr": (lambda f, x: f(x), [(4, 3, 3)]),
    "geqrf": (lambda f, x: f(x), [(4, 3, 3)]),
    "linalg.svdvals": (lambda f, x: f(x), [(4, 3, 3)]),
    "linalg.pinv": (lambda f, x: f(x), [(4, 3, 3)]),
    "linalg.norm": (lambda f, x: f(x, dim=-1), [(4, 3, 5)]),
    "linalg.cholesky": (lambda f, x: f(SPD(x)), [(4, 3, 3)]),
    "linalg.cholesky_ex": (lambda f, x: f(SPD(x)), [(4, 3, 3)]),
    "cholesky": (lambda f, x: f(SPD(x)), [(4, 3, 3)]),
    "linalg.lu_solve": (lambda f, a, b: f(*torch.linalg.lu_factor(SPD(a)), b),
                        [(4, 3, 3), (4, 3, 2)]),
    "grid_sampler": (lambda f, x, y: f(x, y, 0, 0, False), [(3, 2, 4, 4), (3, 2, 2, 2)]),
    "grid_sampler_3d": (lambda f, x, y: f(x, y, 0, 0, False), [(3, 2, 4, 4, 4), (3, 2, 2, 2, 3)]),
    "affine_grid": (lambda f, x: f(x, (4, 1, 2, 2), align_corners=False), [(4, 2, 3)]),
    "affine_grid_generator": (lambda f, x: f(x, (4, 1, 2, 2), False), [(4, 2, 3)]),
    "istft": (lambda f, x: f(torch.complex(x, x), 4, 2, window=WINDOW), [(3, 3, 5)]),
    "polygamma": (lambda f, x: f(1, x), [(4, 3)]),
    "special.polygamma": (lambda f, x: f(1, x), [(4, 3)]),
    "imag": (lambda f, x: f(torch.complex(x, x)), [(4, 3)]),
    "view_as_real": (lambda f, x: f(torch.complex(x, x)), [(4, 3)]),
    "view_as_real_copy": (lambda f, x: f(torch.complex(x, x)), [(4, 3)]),
    "view_as_complex_copy": (lambda f, x: f(x), [(4, 3, 2)]),
    "dropout": (lambda f, x: f(x, 0.3, True), [(4, 3)]),
    "native_dropout": (lambda f, x: f(x, 0.3, True), [(4, 3)]),
    "alpha_dropout": (lambda f, x: f(x, 0.3, True), [(4, 3)]),
    "feature_dropout": (lambda f, x: f(x, 0.3, True), [(4, 3)]),
    "feature_alpha_dropout": (lambda f, x: f(x, 0.3, True), [(4, 3)]),
    "instance_norm": (lambda f, x: f(x, None, None, None, None, True, 0.1, 1e-5, False),
                      [(3, 2, 5)]),
    "native_norm": (lambda f, x: f(x), [(4, 3)]),
    "convolution": (lambda f, x, w: f(x, w, None, [1], [0], [1], False, [0], 1),
                    [(3, 2, 5), (4, 2, 2)]),
    "conv_tbc": (lambda f, x, w, b: f(x, w, b), [(5, 3, 2), (2, 2, 4), (4,)]),
    "soft_margin_loss": (lambda f, x: f(x, torch.ones(x.shape, dtype=x.dtype), reduction="none"),
                         [(4, 3)]),
    "multilabel_soft_margin_loss": (lambda f, x: f(x, torch.ones(x.shape, dtype=x.dtype),
                                    reduction="none"), [(4, 3)]),
    "cosine_embedding_loss": (lambda f, x, y: f(x, y, torch.ones(len(x)), reduction=0),
                              [(4, 3), (4, 3)]),
    "margin_ranking_loss": (lambda f, x, y: f(x, y, torch.ones(len(x)), 0.0, 0), [(4,), (4,)]),
    "poisson_nll_loss": (lambda f, x, y: f(x, y, True, False, 1e-8, 0), [(4, 3), (4, 3)]),
    "ctc_loss": (lambda f, x: f(x.log_softmax(-1), torch.ones(3, 2, dtype=torch.int64),
                 torch.full((3,), 6), torch.full((3,), 2), reduction="none"), [(6, 3, 4)]),
    "torch.ctc_loss": (lambda f, x: f(x.log_softmax(-1), torch.ones(3, 2, dtype=torch.int64),
                       torch.full((3,), 6), torch.full((3,), 2), 0, 0), [(6, 3, 4)]),
    "torch.embedding_bag": (lambda f, w: f(w, torch.arange(4), torch.tensor([0, 2])), [(4, 3)]),
    "embedding_bag": (lambda f, w: f(torch.arange(6).reshape(2, 3) % 4, w), [(4, 3)]),
    "__setitem__": (lambda f, x, y: _written(f, x, 0, y), [(4, 3), (3,)]),
    "_autocast_to_full_precision": (lambda f, x: f(x, True, True), [(4, 3)]),
    "_autocast_to_reduced_precision": (lambda f, x: f(x, True, True, torch.float16,
                                       torch.bfloat16), [(4, 3)]),
    "unravel_index": (lambda f, x: f(x.long(), (2, 2)), [(4,)]),
    "one_hot": (lambda f, x: f(x.long(), 3), [(4,)]),
}  # fmt: skip
for _kind in ("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift", "gcd", "lcm",
              "bitwise_right_shift", "bitwise_not", "__invert__", "bincount"):  # fmt: skip
    OWN[_kind] = (
        lambda f, x, one=_kind in ("bitwise_not", "__invert__", "bincount"): f(
            *[x.long()] * (1 if one else 2)
        ),
        [(4,)],
    )


def _written(function: Callable, target: Tensor, index: int, value: Tensor) -> Tensor:
    target = target * 1
    function(target, index, value)
    return target


def own(function: Callable, full: str, name: str) -> Iterator[Recipe]:
    """The way of `OWN` to call the function of that name."""
    if full not in OWN and name not in OWN:
        return
    call, shapes = OWN.get(full) or OWN[name]
    torch.manual_seed(0)
    given = [torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1 for shape in shapes]
    yield Recipe(f"{shapes}", lambda *tensors: call(function, *tensors), given)


# Shapes of the operands that functions without samples are tried with, and what follows them.
SHAPES = [[(4, 3, 4)], [(4, 3, 4)] * 2, [(4, 4)], [(4, 4)] * 2, [(4,)], [(3, 2, 6, 6)], [(3, 2, 6)]]
FOLLOWING = [(), (2,), (1,), (0, 1), (1, 0, 2), ((2, 2),), (1, 0), (0, 0, 1)]


def guessed(function: Callable, in_place: bool) -> Iterator[Recipe]:
    """Ways to call a function nobody wrote samples for: those of many that it accepts."""
    for shapes in SHAPES:
        torch.manual_seed(0)
        given = [torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1 for shape in shapes]
        for more in FOLLOWING:

            def call(*tensors, more=more):
                if in_place:
                    tensors = (tensors[0] * 1, *tensors[1:])
                return function(*tensors, *more)

            try:
                call(*given)
            except Exception:
                continue
            yield Recipe(f"{shapes} {more}", call, given)
            break  # of these shapes


def is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def placements(given: list[Tensor]) -> Iterator[tuple[int | None, ...]]:
    """Dims that may hold the batch, for every tensor: of one alone, and of all that have its size
    as counted from the front or from the end.
    """
    found = set()
    for i, tensor in enumerate(given):
        if not is_float(tensor):
            continue
        for dim, size in enumerate(tensor.shape):
            if size < 2:
                continue
            alone = tuple(dim if j == i else None for j in range(len(given)))
            front = tuple(dim if t.dim() > dim and t.shape[dim] == size else None for t in given)
            back = dim - tensor.dim()
            end = tuple(
                t.dim() + back if t.dim() >= -back and t.shape[back] == size else None
                for t in given
            )
            floats = [
                tuple(d if is_float(t) else None for d, t in zip(dims, given, strict=True))
                for dims in (front, end)
            ]
            found |= {alone, front, end, *floats}
    return iter(sorted(found, key=str))


def changes(part: Tensor, other: Tensor) -> list[Tensor]:
    """Other values for one example's part that functions of narrow domains may still accept."""
    return [other, part * 40, part + 0.01 * torch.randn(part.shape, dtype=part.dtype)]


def differs(before: Tensor, after: Tensor) -> Tensor:
    if not is_float(before):
        return before != after
    nan = before.isnan() & after.isnan()
    return ~(torch.isclose(before, after, rtol=1e-7, atol=1e-9) | nan)


def dependence(recipe: Recipe, dims, size: int) -> list[Tensor] | None:
    """(units, *shape) of every result: whether an element changes with what an example owns. None
    where no change was accepted, or a result changes its shape.
    """

    def run(given):
        torch.default_generator.manual_seed(7)
        with torch.no_grad():
            return [t.clone() for t in tensors(recipe.call(*given))]

    plain = run(recipe.given)
    found = [torch.zeros(size, *t.shape, dtype=torch.bool) for t in plain]
    for unit in range(size):
        accepted = False
        for kind in range(3):
            given = []
            for tensor, dim in zip(recipe.given, dims, strict=True):
                if dim is not None and is_float(tensor):
                    tensor = tensor.clone()
                    part, other = tensor.select(dim, unit), tensor.select(dim, (unit + 1) % size)
                    part.copy_(changes(part.clone(), other.clone())[kind])
                given.append(tensor)
            try:
                changed = run(given)
            except Exception:
                continue
            if [t.shape for t in changed] != [t.shape for t in plain]:
                return None
            accepted = True
            for seen, before, after in zip(found, plain, changed, strict=True):
                seen[unit] |= differs(before, after)
        if not accepted:
            return None
    return found


def judge(recipe: Recipe, so_far: Judged) -> None:
    """Add what is found for one call to `so_far`."""
    try:
        graded = [t.clone().requires_grad_() if is_float(t) else t for t in recipe.given]
        results = tensors(recipe.call(*graded))
    except Exception as error:
        so_far.errors.append(f"{recipe.text}: {type(error).__name__}: {error}"[:160])
        return
    so_far.ran = True
    if not any(result.requires_grad for result in results):
        return
    for dims in placements(recipe.given):
        size = next(t.shape[d] for t, d in zip(recipe.given, dims, strict=True) if d is not None)
        operands = tuple(
            Operand(
                None if d is None else BatchLayout(d),
                t.clone().requires_grad_() if d is not None and is_float(t) else t.clone(),
            )
            for t, d in zip(recipe.given, dims, strict=True)
        )
        where = f"{recipe.text}, batch in {dims}"
        try:
            case = Case("", recipe.call, operands, Lost())
            results, marks = marks_of(case, size)
            seen = dependence(recipe, dims, size)
        except Exception as error:
            so_far.errors.append(f"{where}: {type(error).__name__}: {error}"[:200])
            continue
        if seen is None or len(seen) != len(results):
            if any(isinstance(m, BatchLayout) for m in marks):
                so_far.errors.append(f"{where}: kept, but not judged")
            continue
        for number, (result, mark, found) in enumerate(zip(results, marks, seen, strict=True)):
            if not result.requires_grad or not bool(found.any()):
                continue
            held = holding(found)
            so_far.held += bool(held)
            so_far.coupled += not held
            if isinstance(mark, BatchLayout):
                others = torch.arange(size)[:, None] != mark.index(size)
                if bool((by_index(found, mark.dim) & others).any()):
                    so_far.wrong.append(f"{where}, result {number}: {mark}")
                so_far.kept += 1
            elif held:
                so_far.lost.append(f"{where}, result {number}: held along {held}")


def judged(full: str, function: Callable, infos: dict[str, list]) -> Judged:
    """What is found for the function of that name, with `samples()`."""
    name, found = name_of(full), Judged()
    in_place = name.endswith("_") and not name.endswith("__")
    started = time.monotonic()
    known = recipes(function, infos.get(name.removesuffix("_"), []), in_place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = name.removesuffix("_") if in_place else name
        for more in (
            itertools.chain(own(function, full, plain), known),
            guessed(function, in_place),
        ):
            for recipe in more:
                judge(recipe, found)
                if time.monotonic() - started > MOST_SECONDS:
                    break
            if found.held or found.coupled:
                break
    return found


# What is not tried: it has effects beyond its result.
NOT_TRIED = {
    f"torch.{name}": NO_RESULT
    for name in """autocast Tensor.backward Tensor.share_memory_ Tensor.__array__
    Tensor.__array_wrap__ Tensor.__bool__ Tensor.__complex__ Tensor.__deepcopy__ Tensor.__dlpack__
    Tensor.__float__ Tensor.__format__ Tensor.__index__ Tensor.__int__ Tensor.__long__
    Tensor.__nonzero__ Tensor.__setstate__ Tensor.is_nonzero is_nonzero Tensor.module_load
    Tensor.numpy Tensor.record_stream Tensor.register_hook Tensor.retain_grad Tensor.apply_
    Tensor.register_post_accumulate_grad_hook Tensor.map_ Tensor.map2_""".split()
}
NOT_TRIED["torch.view_as_complex_copy"] = NOT_OF_FLOATS  # torch gives it no gradient
# They change what memory a tensor shows, or draw for half a minute: no table has them.
NOT_TRIED |= {
    f"torch.{name}": REFUSED
    for name in """Tensor.set_ Tensor.resize Tensor.resize_ Tensor.resize_as_ Tensor._to_dense
    lobpcg""".split()
}


def verdict(full: str, function: Callable, found: Judged) -> str:
    """What htv does with the batch in a function's results."""
    served = function in HANDLERS
    if full in NOT_TRIED:
        return NOT_TRIED[full]
    if found.kept:
        part = "" if found.kept >= found.held else f", in {found.kept} of {found.held} placements"
        return (SERVES if served else KEEPS) + part
    if served:
        return SERVES
    if found.held:
        return REFUSED
    if found.coupled:
        return COUPLES
    if found.ran:
        return NOT_OF_FLOATS
    return next((why for words, why in ELSEWHERE if any(w in full for w in words)), UNJUDGED)


def text(found: dict[str, str]) -> str:
    """What docs/operations.md should hold, of the verdicts by function."""
    lines = [*HEADER.format(version=torch.__version__.partition("+")[0]).splitlines(), ""]
    for sort in VERDICTS:
        count = sum(value.startswith(sort) for value in found.values())
        lines.append(f"- {sort}: {count}")
    lines += ["", "| function | what htv does |", "|---|---|"]
    lines += [f"| `{name}` | {value} |" for name, value in sorted(found.items())]
    return "\n".join(lines) + "\n"


def all_verdicts() -> tuple[dict[str, str], dict[str, Judged]]:
    """The verdict and what it rests on, for every function."""
    infos = samples()
    found = {
        name: Judged() if name in NOT_TRIED else judged(name, function, infos)
        for name, function in functions().items()
    }
    return {name: verdict(name, functions()[name], j) for name, j in found.items()}, found


if __name__ == "__main__":
    torch.set_num_threads(1)
    verdicts, evidence = all_verdicts()
    mistaken = {name: j.wrong for name, j in evidence.items() if j.wrong and name not in RANDOM}
    if mistaken:
        raise SystemExit(f"htv is mistaken about the batch: {mistaken}")
    PATH.write_text(text(verdicts))
