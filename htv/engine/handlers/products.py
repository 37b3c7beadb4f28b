"""Products of a parameter with the batch written out: matmul, addmm, einsum and their relatives, as
linear layers.
"""

from __future__ import annotations

import math
import string

import torch
import torch.nn.functional as F
from torch import Tensor

from htv.engine import expansion
from htv.engine.handlers.call import Operands, behind, handles
from htv.engine.propagation import einsum_terms
from htv.engine.protocols import ModeLike


def _served_product(mode: ModeLike, left: Tensor, right: Tensor) -> bool:
    operands = Operands(mode, left, right)
    return operands.meet and not all(operands.derived)


@handles(
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    Tensor.mm,
    torch.bmm,
    Tensor.bmm,
    torch.mv,
    Tensor.mv,
    torch.linalg.matmul,
    torch.sparse.mm,
)
def _matmul(mode: ModeLike, func, args, kwargs):
    left, right = (*args, *kwargs.values())[:2]
    if len(args) + len(kwargs) != 2 or not _served_product(mode, left, right):
        return NotImplemented
    with mode:
        left, right = (t.to_dense() if t.is_sparse else t for t in (left, right))
        return _laid_out(_product(mode, left, right), torch.matmul, left, right)


def _laid_out(made: Tensor, func, *operands: Tensor) -> Tensor:
    """A product, with the strides it would have if `func` had made it of `operands`: a model may
    view it.
    """
    if made.is_contiguous():
        return made
    with torch._C.DisableTorchFunction():
        like = func(*(torch.empty_strided(t.shape, t.stride(), device="meta") for t in operands))
    order = sorted(range(like.dim()), key=lambda d: (-like.stride(d), -like.shape[d]))
    if like.stride() == made.stride():
        return made
    return made.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])


@handles(Tensor.__rmatmul__)
def _rmatmul(mode: ModeLike, func, args, kwargs):
    return _matmul(mode, torch.matmul, args[::-1], {})


@handles(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
def _addmm(mode: ModeLike, func, args, kwargs):
    addend, left, right = args[:3]
    if len(args) > 3 or not _served_product(mode, left, right):
        return NotImplemented
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    with mode:
        if beta == alpha == 1 and addend.dim() == 1 and right.dim() == 2 and behind(mode, right):
            return F.linear(left, right.t(), addend)
        product = _product(mode, left, right).contiguous()
        return (addend if beta == 1 else beta * addend) + (
            product if alpha == 1 else alpha * product
        )


def _grouped_mm(mode: ModeLike, func, args, kwargs):
    """Rows (R, I) in stretches that end at offs, each by its own matrix of (B, I, O): the experts
    of a mixture.
    """
    rows, matrices, *rest = args
    offs = rest[0] if rest else kwargs.get("offs")
    if not _served_product(mode, rows, matrices) or behind(mode, rows):
        return NotImplemented
    with mode:
        if offs is None or rows.dim() != 2 or matrices.dim() != 3:
            return _product(mode, rows, matrices)
        ends = offs.tolist()
        return torch.cat(
            [
                rows[a:b] @ matrices[i]
                for i, (a, b) in enumerate(zip([0, *ends], ends, strict=False))
            ]
        )


handles(*(getattr(o, n) for o, n in ((F, "grouped_mm"), (torch, "_grouped_mm")) if hasattr(o, n)))(
    _grouped_mm
)


def _product(mode: ModeLike, left: Tensor, right: Tensor) -> Tensor:
    """left @ right, one of which is derived from served parameters."""
    if behind(mode, left):
        left = expansion.unexpanded(mode, left, right)
        if left.dim() == 1:
            return F.linear(right.mT, left.unsqueeze(0)).squeeze(-1)
        if left.dim() == 2:
            return F.linear(right.mT, left).mT if right.dim() > 1 else F.linear(right, left)
    else:
        right = expansion.unexpanded(mode, right, left)
        if right.dim() == 1:
            return F.linear(left, right.unsqueeze(0)).squeeze(-1)
        if right.dim() == 2:
            return F.linear(left, right.t())
    batch = string.ascii_uppercase[: max(left.dim(), right.dim()) - 2]
    terms = [batch[len(batch) - t.dim() + 2 :] + own for t, own in ((left, "ij"), (right, "jk"))]
    sizes = dict(zip(batch, torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), strict=True))
    operands = [_squeezed(t, term, sizes) for t, term in zip((left, right), terms, strict=True)]
    return _contract(mode, *map(list, zip(*operands, strict=True)), f"{batch}ik")


def _squeezed(tensor: Tensor, term: str, sizes: dict[str, int]) -> tuple[Tensor, str]:
    """Without the dims along which it is broadcast."""
    for c in [c for c in term if sizes.get(c, 1) != 1 and tensor.shape[term.index(c)] == 1]:
        tensor, term = tensor.squeeze(term.index(c)), term.replace(c, "")
    return tensor, term


@handles(torch.einsum)
def _einsum(mode: ModeLike, func, args, kwargs):
    equation, operands = args[0], list(args[1:])
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or not Operands(mode, *operands).meet:
        return NotImplemented
    return _einsum_of(mode, equation, operands)


def _einsum_of(mode: ModeLike, equation: str, operands: list[Tensor]):
    """An einsum of operands some of which are derived from parameters."""
    terms, result = einsum_terms(equation, operands)
    if any(len(set(term)) != len(term) for term in terms):
        return NotImplemented
    with mode:
        made = _contract(mode, operands, terms, result)
        return _laid_out(made, lambda *meta: torch.einsum(equation, *meta), *operands)


@handles(torch.linalg.multi_dot, torch.chain_matmul)
def _multi_dot(mode: ModeLike, func, args, kwargs):
    given = kwargs.get("tensors", args[0] if args else ())
    matrices = list(args) if isinstance(given, Tensor) else list(given)
    if len(kwargs) > (not args) or not Operands(mode, *matrices).meet:
        return NotImplemented
    with mode:
        product = matrices[0]
        for matrix in matrices[1:]:
            product = torch.matmul(product, matrix)
    return product


@handles(torch.inner, Tensor.inner)
def _inner(mode: ModeLike, func, args, kwargs):
    left, right = (*args, *kwargs.values())[:2]
    if len(args) + len(kwargs) != 2 or not _served_product(mode, left, right):
        return NotImplemented
    if "other" in kwargs and "input" in kwargs:
        left, right = kwargs["input"], kwargs["other"]
    if 0 in (left.dim(), right.dim()):
        with mode:
            return left * right
    return _tensordot_of(mode, left, right, [left.dim() - 1], [right.dim() - 1])


@handles(torch.tensordot)
def _tensordot(mode: ModeLike, func, args, kwargs):
    given = dict(zip(("a", "b", "dims"), args, strict=False)) | kwargs
    left, right, dims = given["a"], given["b"], given.get("dims", 2)
    if isinstance(dims, Tensor) or given.get("out") is not None:
        return NotImplemented
    if not _served_product(mode, left, right):
        return NotImplemented
    if isinstance(dims, int):
        dims = range(left.dim() - dims, left.dim()), range(dims)
    return _tensordot_of(mode, left, right, *dims)


def _tensordot_of(mode: ModeLike, left: Tensor, right: Tensor, of_left, of_right):
    """A product of two tensors summed over pairs of dims, all others side by side."""
    letters = iter(string.ascii_letters)
    terms = [[next(letters) for _ in range(t.dim())] for t in (left, right)]
    for i, j in zip(of_left, of_right, strict=True):
        terms[1][j] = terms[0][i]
    result = [c for c in terms[0] if c not in terms[1]] + [c for c in terms[1] if c not in terms[0]]
    equation = f"{''.join(terms[0])},{''.join(terms[1])}->{''.join(result)}"
    return _einsum_of(mode, equation, [left, right])


def _contract(mode: ModeLike, operands: list[Tensor], terms: list[str], result: str) -> Tensor:
    """An einsum with operands derived from parameters: first the product of one with the batch, and
    so on.
    """
    operands, terms = list(operands), list(terms)
    while len(operands) > 1:
        kinds = Operands(mode, *operands)
        if not kinds.meet:
            break
        w = kinds.derived.index(True)
        shared = lambda i: len(set(terms[i]) & set(terms[w]))
        x = max((i for i, is_batch in enumerate(kinds.of_batch) if is_batch), key=shared)
        others = {c for i, term in enumerate(terms) if i not in (w, x) for c in term} | set(result)
        kept = "".join(dict.fromkeys(c for c in terms[x] + terms[w] if c in others))
        pair = _pair(operands[x], terms[x], operands[w], terms[w], kept)
        rest = [i for i in range(len(operands)) if i not in (w, x)]
        operands, terms = [*(operands[i] for i in rest), pair], [*(terms[i] for i in rest), kept]
    return torch.einsum(f"{','.join(terms)}->{result}", *operands)


def _pair(x: Tensor, x_term: str, w: Tensor, w_term: str, result: str) -> Tensor:
    """einsum of two operands as a linear layer with weight w, or one for each index both and the
    result have.
    """
    for c in [c for c in x_term if c not in w_term + result]:
        x, x_term = x.sum(x_term.index(c)), x_term.replace(c, "")
    for c in [c for c in w_term if c not in x_term + result]:
        w, w_term = w.sum(w_term.index(c)), w_term.replace(c, "")
    sizes = dict(zip(x_term + w_term, (*x.shape, *w.shape), strict=True))
    blocks = [c for c in w_term if c in x_term and c in result]
    summed = [c for c in w_term if c in x_term and c not in result]
    made = [c for c in w_term if c not in x_term]
    rows = [c for c in x_term if c not in w_term]
    size = lambda letters: math.prod(sizes[c] for c in letters)
    if not summed:
        x = x.permute([x_term.index(c) for c in rows + blocks]).reshape(
            *(sizes[c] for c in rows + blocks), 1
        )
        w = w.permute([w_term.index(c) for c in blocks + made]).reshape(
            *(sizes[c] for c in blocks), size(made)
        )
        y = x * w
    else:
        x = x.permute([x_term.index(c) for c in rows + blocks + summed])
        x = x.reshape(*(sizes[c] for c in rows), size(blocks), size(summed))
        w = w.permute([w_term.index(c) for c in blocks + made + summed])
        w = w.reshape(size(blocks), size(made), size(summed))
        y = torch.stack([F.linear(x.select(-2, b), w[b]) for b in range(size(blocks))], -2)
    y = y.reshape(*(sizes[c] for c in rows + blocks + made))
    order = rows + blocks + made
    return y.permute([order.index(c) for c in result])
