"""Jobs of ranks that decide masks together, buffer by buffer."""

from __future__ import annotations

import functools

import torch

import htv
from htv.distributed import mask_exchange, reduction
from htv.distributed.reduction import Field
from htv.distributed.rounds import Electorate


def fields_of(sizes: tuple[int, ...]) -> list[Field]:
    """Two rules and none, in turn."""
    rules = [htv.AndMask(0.5), None, htv.XorMask(0.25)]
    found, offset = [], 0
    for number, size in enumerate(sizes):
        found.append(Field(rules[number % 3], offset, size, size, size))
        offset += size
    return found


def exchanged(rank: int, world: int, sizes: tuple[int, ...], dtype: torch.dtype):
    """What all ranks find of two buffers, by bits and by all votes."""
    group = torch.distributed.group.WORLD
    random = torch.Generator().manual_seed(rank)
    electorate = Electorate((5,) * world, (1,) * world, "examples")
    masks, found, expected = mask_exchange.MaskedBuckets(group), [], []
    for _ in range(2):
        fields = fields_of(sizes)
        votes = torch.randint(-5, 6, (sum(sizes),), generator=random).to(dtype)
        sums = torch.randn(sum(sizes), generator=random, dtype=torch.float64)
        sums[0] = torch.nan
        whole, plain = votes.clone(), sums.clone()
        reduction.all_reduce(whole, group).wait()
        reduction.all_reduce(plain, group).wait()
        reduction.apply_rules(plain, fields, reduction.Votes(whole), electorate)
        expected.append(plain)
        begin = functools.partial(reduction.all_reduce, sums, group)
        found.append(masks.add(votes, fields, electorate, begin))
    masks.tell()
    return [f.wait() for f in found], expected


def failing(rank: int, world: int):
    """Bits told beside a reduction of sums that fails."""
    masks = mask_exchange.MaskedBuckets(torch.distributed.group.WORLD)
    broken: torch.futures.Future = torch.futures.Future()
    broken.set_exception(ValueError("no sums"))
    votes, electorate = (
        torch.ones(3, dtype=torch.int8),
        Electorate((1,) * world, (1,) * world, "examples"),
    )
    masked = masks.add(votes, fields_of((3,)), electorate, lambda: broken)
    masks.tell()
    try:
        masked.wait()
    except Exception as error:
        return str(error)
    return None
