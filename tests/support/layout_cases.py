"""Cases for where the batch is in the results of one call, and an oracle that knows no layout.

A case names the call, where the batch is in its operands and where it must be in every result. The
oracle changes what one unit owns in the operands and looks which elements of the results change.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

import htv
from htv.engine.provenance import Lost
from htv.engine.torch_ops import plain_name
from htv.groups import BatchLayout

TRIALS = 24  # of other values: comparisons and choices do not change with every one


@dataclass
class Operand:
    """A tensor a call takes, the batch's at a place, or a constant where that is None."""

    layout: BatchLayout | None
    tensor: Tensor
    high: int | None = None  # ids are below it
    fixed: bool = False  # data whose dependence on other units is no concern of the gradient's

    def numbers(self, batch_size: int) -> Tensor:
        """The unit of every element."""
        shape = [1] * self.tensor.dim()
        shape[self.layout.dim] = -1
        return self.layout.index(batch_size).reshape(shape).expand(self.tensor.shape)

    def with_other(self, unit: int, batch_size: int) -> Tensor:
        """The tensor with other values where the unit is."""
        if self.layout is None or self.fixed:
            return self.tensor.detach()
        if self.high is None:
            other = values(self.tensor.shape)
        else:
            other = torch.randint(self.high, self.tensor.shape)
        return torch.where(self.numbers(batch_size) == unit, other, self.tensor.detach())


def values(shape) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 0.9 + 0.05


def given(layout: BatchLayout | int, *shape: int) -> Operand:
    """Something of the batch with a gradient."""
    layout = BatchLayout(layout) if isinstance(layout, int) else layout
    return Operand(layout, values(shape).requires_grad_())


def data(layout: BatchLayout | int, *shape: int, fixed: bool = False) -> Operand:
    """Something of the batch without a gradient."""
    layout = BatchLayout(layout) if isinstance(layout, int) else layout
    return Operand(layout, values(shape), fixed=fixed)


def ids(layout: BatchLayout | int, high: int, *shape: int) -> Operand:
    """Integers of the batch."""
    layout = BatchLayout(layout) if isinstance(layout, int) else layout
    return Operand(layout, torch.randint(high, shape), high)


def constant(*shape: int) -> Operand:
    return Operand(None, values(shape))


@dataclass
class Case:
    """One call. expected: of every result, or one for all of them.

    given_up:  why it is lost although some dim does hold the batch.
    silent:    whether results may not depend on what they are made of, as the zeros of zeros_like.
    """

    name: str
    call: Callable
    operands: tuple[Operand, ...]
    expected: BatchLayout | Lost | list[BatchLayout | Lost]
    given_up: str = ""
    silent: bool = False


def case(name, call, operands, expected, given_up="", silent=False) -> Case:
    operands = (operands,) if isinstance(operands, Operand) else tuple(operands)
    expected = BatchLayout(expected) if isinstance(expected, int) else expected
    return Case(name, call, operands, expected, given_up, silent)


class Probe(nn.Module):
    """Makes a call where an attached model would, on tensors that are said to be the batch's.

    They come in by no argument and no attribute: the model knows of x alone.
    """

    def __init__(self, call: Callable, operands: tuple[Operand, ...]):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.make = lambda mode: self._make(mode, call, operands)

    @staticmethod
    def _make(mode, call, operands):
        for operand in operands:
            if operand.layout is not None:
                mode.marks.put(operand.tensor, operand.layout)
        return call(*[operand.tensor for operand in operands])

    def forward(self, x):
        self.mode = _get_current_function_mode()
        return self.make(self.mode)


def tensors(results) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    if isinstance(results, (tuple, list)):
        return [t for result in results for t in tensors(result)]
    return []


def marks_of(c: Case, batch_size: int, tokens: bool = False, **options):
    """The results of the call in an attached model's forward, and their marks."""
    probe = Probe(c.call, c.operands)
    with htv.attach(probe, htv.Mean(), **options) as handle:
        x = torch.zeros(batch_size, 1)
        if tokens:
            with handle.tokens():
                results = tensors(probe(x))
        else:
            results = tensors(probe(x))
    return results, [probe.mode.mark(result) for result in results]


def dependence(c: Case, batch_size: int) -> list[Tensor]:
    """(units, *shape) of every result: whether an element changes with what a unit owns."""

    def run(operands):
        torch.default_generator.manual_seed(7)  # dropout and its like draw the same
        with torch.no_grad():
            return tensors(c.call(*operands))

    plain = run([operand.tensor.detach() for operand in c.operands])
    found = [torch.zeros(batch_size, *result.shape, dtype=torch.bool) for result in plain]
    for trial in range(TRIALS):
        if trial > 3 and all(bool(seen.any(0).all()) for seen in found):
            break
        for unit in range(batch_size):
            torch.default_generator.manual_seed(1000 + trial * batch_size + unit)
            changed = run([operand.with_other(unit, batch_size) for operand in c.operands])
            for seen, before, after in zip(found, plain, changed, strict=True):
                seen[unit] |= torch.ne(before, after) & ~(before.isnan() & after.isnan())
    return found


def by_index(seen: Tensor, dim: int) -> Tensor:
    """(units, size of the dim): which unit something changes with at an index."""
    seen = seen.movedim(1 + dim, 1)
    return seen.reshape(*seen.shape[:2], math.prod(seen.shape[2:])).any(2)


def holding(seen: Tensor) -> list[int]:
    """The dims each of whose indices depends on one unit, and on one only."""
    dims = [d for d in range(seen.dim() - 1) if seen.shape[1 + d]]
    return [d for d in dims if bool((by_index(seen, d).sum(0) == 1).all())]


def same_place(found: BatchLayout, expected: BatchLayout) -> bool:
    """Whether they are written the same way."""
    if found.dim != expected.dim or found.guess != expected.guess:
        return False
    if found.examples is None or expected.examples is None:
        pattern = found.examples is expected.examples
        return pattern and (found.outer, found.times) == (expected.outer, expected.times)
    return found.examples.tolist() == expected.examples.tolist()


def assert_all_marks(cases, batch_size: int, **options) -> None:
    """`require` of all; names every case that fails."""
    failures = []
    for c in cases:
        try:
            assert_mark(c, batch_size, **options)
        except Exception as error:
            failures.append(f"{c.name}: {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


def assert_mark(c: Case, batch_size: int, **options) -> None:
    """The marks are those expected, and the oracle agrees."""
    for operand in c.operands:
        size = None if operand.layout is None else operand.layout.size(batch_size)
        assert size is None or operand.tensor.shape[operand.layout.dim] == size, "the case itself"
    results, marks = marks_of(c, batch_size, **options)
    expected = c.expected if isinstance(c.expected, list) else [c.expected] * len(results)
    assert results and len(expected) == len(results)
    found = zip(marks, expected, dependence(c, batch_size), strict=True)
    for number, (mark, layout, seen) in enumerate(found):
        where = f"{c.name}, result {number} of shape {tuple(seen.shape[1:])}: {mark}"
        if isinstance(layout, Lost):
            assert isinstance(mark, Lost), where
            assert bool(holding(seen)) == bool(c.given_up), f"{where}; held along {holding(seen)}"
            continue
        assert isinstance(mark, BatchLayout) and same_place(mark, layout), f"{where}, not {layout}"
        along = by_index(seen, layout.dim)
        others = torch.arange(batch_size)[:, None] != layout.index(batch_size)
        assert not bool((along & others).any()), f"{where}: another unit's"
        assert c.silent or bool((along | others).all()), f"{where}: nobody's"


def assert_all_of_one(c: Case) -> None:
    """All there is is the one unit's, wherever that may be."""
    results, marks = marks_of(c, 1)
    for result, mark in zip(results, marks, strict=True):
        if result.dim() == 0 or not result.is_floating_point():
            continue
        assert isinstance(mark, BatchLayout) and same_place(
            mark, BatchLayout(0, times=result.shape[0])
        ), c.name


class Names(TorchFunctionMode):
    """Collects the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(plain_name(func))
        return func(*args, **(kwargs or {}))


def names_in(cases: list[Case]) -> set[str]:
    with Names() as names:
        for c in cases:
            c.call(*[operand.tensor for operand in c.operands])
    return names.seen
