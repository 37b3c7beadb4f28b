"""One-line mistakes in how htv follows the batch and gathers contributions.

A row: the file, a line of it (without its indentation, there once), what it becomes, and what that
would do. A line that was rewritten is named by `make test-mutants`; choose another mistake of the
same kind then. Leave out mistakes that change nothing anybody can see.
"""

LAYOUT, GROUPS, MARKS = "htv/layout.py", "htv/groups.py", "htv/marks.py"
LEDGER, OPERATIONS, INTERCEPT = "htv/autograd/ledger.py", "htv/operations.py", "htv/intercept.py"

# The first of these that fails is enough.
TESTS = {
    LAYOUT: ["tests/test_provenance.py", "tests/test_probing.py", "tests/test_propagation.py"],
    OPERATIONS: ["tests/test_probing.py", "tests/test_propagation.py"],
    INTERCEPT: ["tests/test_probing.py", "tests/test_propagation.py"],
    MARKS: ["tests/test_provenance.py"],
    GROUPS: ["tests/test_groups.py", "tests/test_provenance.py", "tests/test_probing.py"],
    LEDGER: ["tests/test_aggregation.py"],
}

MUTANTS = [
    # -- places
    (
        GROUPS,
        "if self.dim != other.dim or self.size(num_units) != other.size(num_units):",
        "if self.dim != other.dim:",
        "places of other sizes are one",
    ),
    (
        GROUPS,
        "if self.dim != other.dim or self.size(num_units) != other.size(num_units):",
        "if self.size(num_units) != other.size(num_units):",
        "the batch in two dims is one",
    ),
    (
        GROUPS,
        "return (self.outer, self.times) == (other.outer, other.times) or num_units == 1",
        "return True",
        "the order of merged dims does not matter",
    ),
    (
        GROUPS,
        "return torch.equal(self.index(num_units).cpu(), other.index(num_units).cpu())",
        "return True",
        "the order of picked rows does not matter",
    ),
    (
        GROUPS,
        "return (torch.arange(self.size(num_units)) // self.times) % num_units",
        "return torch.arange(self.size(num_units)) % num_units",
        "rows of merged dims go to other units",
    ),
    (
        GROUPS,
        "return self if dim == self.dim else Place(dim, self.outer, self.times, self.units, "
        "self.guess)",
        "return self if dim == self.dim else Place(dim, self.times, self.outer, self.units, "
        "self.guess)",
        "a transposed tensor's rows go to other units",
    ),
    # -- groups and voters
    (
        GROUPS,
        "return self.keys is other.keys and self.count == other.count",
        "return self.count == other.count",
        "groups with ids join those without",
    ),
    (
        GROUPS,
        "return torch.equal(self.keys, other.keys)",
        "return self.count == other.count",
        "two forwards with other groups are added up",
    ),
    (
        GROUPS,
        "return same_mask and self.num_units == other.num_units",
        "return self.num_units == other.num_units",
        "tokens of other masks are added up",
    ),
    (
        GROUPS,
        'weights = None if weight == "size" else num_units / (len(sizes) * sizes.double())',
        'weights = None if weight == "size" else num_units / sizes.double()',
        "equal weights are not",
    ),
    (
        GROUPS,
        "return groups if self.order is None else torch.empty_like(groups).index_copy_(0, "
        "self.order, groups)",
        "return groups",
        "unsorted ids are taken for sorted ones",
    ),
    (
        GROUPS,
        "if place.units is None and place.outer == 1 and groups.order is None:",
        "if place.units is None:",
        "repeated batches are cut like one",
    ),
    (
        GROUPS,
        "self.offsets = groups.offsets if place.times == 1 else groups.offsets * place.times",
        "self.offsets = groups.offsets",
        "rows behind the first of a unit are another's",
    ),
    (
        GROUPS,
        "if groups.weights is None and groups.voting is None:",
        "if groups.voting is None:",
        "plain sums are weighted",
    ),
    (
        GROUPS,
        "return tensor.dim() > place.dim and tensor.shape[place.dim] == "
        "place.size(self.num_units)",
        "return tensor.dim() > place.dim",
        "every input is the batch's",
    ),
    # -- marks
    (
        MARKS,
        "if entry is not None and entry[0]() is tensor:",
        "if entry is not None:",
        "a new tensor inherits the mark of a freed one",
    ),
    (
        MARKS,
        "if entry[2] != version or graded > entry[3]:",
        "if False:",
        "what was written to a view's base is not seen",
    ),
    # -- following operations
    (
        LAYOUT,
        "return [LOST] * len(op.outputs)",
        "pass",
        "tokens are shuffled unseen",
    ),
    (
        LAYOUT,
        "if isinstance(mark, OfBatch):",
        "if isinstance(mark, OfBatch) and mark is not None and found is None:",
        "the first operand of an elementwise operation decides",
    ),
    (
        LAYOUT,
        "return found if found is not None and output.shape[found.dim] == found.size(units) "
        "else None",
        "return found",
        "a place is kept in an output that has another size",
    ),
    (
        LAYOUT,
        "return all(places[0].same(other, units) for other in places[1:])",
        "return True",
        "operands that disagree are taken to agree",
    ),
    (
        LAYOUT,
        "if where is None and (all_say or tensor.requires_grad) and not (couples and broadcast):",
        "if False:",
        "an operand that lost the batch has no say",
    ),
    (
        LAYOUT,
        "if where is None and (all_say or tensor.requires_grad) and not (couples and broadcast):",
        "if where is None and (all_say or tensor.requires_grad) and not couples:",
        "shared statistics excuse everything",
    ),
    (
        LAYOUT,
        "at = dim + output.dim() - tensor.dim()",
        "at = dim",
        "broadcasting does not shift dims",
    ),
    (
        LAYOUT,
        'return mark if op.argument(0, "dim", "axis", default=0) % tensor.dim() != dim else None',
        "return mark",
        "two batches one behind the other are one",
    ),
    (
        LAYOUT,
        "return mark if dim < tensor.dim() - 2 and tensor.dim() == output.dim() else None",
        "return mark",
        "attention mixes examples",
    ),
    (
        LAYOUT,
        "kept = dim == 0 if last is None else dim < tensor.dim() - last",
        "kept = True",
        "channels are taken for examples",
    ),
    (
        LAYOUT,
        "return mark.at(b if mark.dim == a else a if mark.dim == b else mark.dim)",
        "return mark.at(b)",
        "a transposition of other dims moves the batch",
    ),
    (
        LAYOUT,
        "return None if dims is None or mark.dim in dims else mark",
        "return mark",
        "softmax over examples keeps them apart",
    ),
    (
        LAYOUT,
        "return mark.at(mark.dim - sum(d < mark.dim for d in dims))",
        "return mark",
        "reduced dims before the batch are still there",
    ),
    (
        LAYOUT,
        'if output.dim() == tensor.dim() and op.name != "cosine_similarity":  # which keeps no '
        'dim',
        "if output.dim() == tensor.dim():",
        "similarities of all pairs are one example's each",
    ),
    (
        LAYOUT,
        "if mark.dim == contracted:",
        "if False:",
        "products over the batch keep it",
    ),
    (
        LAYOUT,
        "contracted = tensor.dim() - (1 if is_first else 2)",
        "contracted = tensor.dim() - 1",
        "of the second factor the columns are summed over",
    ),
    (
        LAYOUT,
        "from_end -= mark.dim < contracted",
        "pass",
        "products with a vector keep all dims",
    ),
    (
        LAYOUT,
        "if len(mine) != 1:",
        "if not mine:",
        "an einsum of a tensor with itself is read one way",
    ),
    (
        LAYOUT,
        "before *= mark.outer",
        "pass",
        "merged dims are taken apart wrongly",
    ),
    (
        LAYOUT,
        "if not cut and not remainder and outer and times:",
        "if not remainder and outer and times:",
        "reshapes that cut units are followed",
    ),
    (
        LAYOUT,
        "return replace(mark, dim=at, outer=mark.outer * sizes[at])",
        "return replace(mark, dim=at)",
        "repeated batches are one",
    ),
    (
        LAYOUT,
        "return None if removed == mark.dim else mark.at(mark.dim - (removed < mark.dim))",
        "return mark",
        "a selected dim is still there",
    ),
    (
        LAYOUT,
        "whole = item.indices(tensor.shape[old]) == (0, tensor.shape[old], 1)",
        "whole = True",
        "a part of the batch is all of it",
    ),
    (
        LAYOUT,
        "return found if sum(_is_advanced(item) for item in items) < 2 else None",
        "return found",
        "dims that several indices move to the front stay",
    ),
    (
        LAYOUT,
        "if bool(((along == found[:, None]) | (along < 0)).all()) and bool((found >= 0).all()):",
        "if bool((found >= 0).all()):",
        "any dim holds the batch",
    ),
    (
        LAYOUT,
        "(written == numbers).all()",
        "True",
        "writes of other units' values are followed",
    ),
    (
        LAYOUT,
        "if not places or (len(places) > 1 and not empty):",
        "if not places:",
        "a target that fits in two ways is fitted in one",
    ),
    (
        LAYOUT,
        "return None  # torch.embedding takes the table first, whose rows are picked",
        "pass",
        "rows picked of the batch are in order",
    ),
    (
        OPERATIONS,
        'for name in (*names, "axis") if "dim" in names else names:',
        "for name in names:",
        "NumPy's axis is not seen",
    ),
    (
        OPERATIONS,
        "return (*args, *(kwargs[n] for n in found)), rest",
        "return args, kwargs",
        "factors given by name are taken in the order of their names",
    ),
    (
        INTERCEPT,
        'return name.startswith("__i") and name not in ("__invert__", "__int__", "__index__")',
        'return name.startswith("__i")',
        "~mask is a constant",
    ),
    (
        INTERCEPT,
        "marks = [LOST] * len(outputs)",
        "pass",
        "transpose_ in place is followed after the fact",
    ),
    # -- ledgers
    (
        LEDGER,
        "self._parts.setdefault(current, []).append(factors)",
        "self._parts.setdefault(0, []).append(factors)",
        "passes of two threads are added up",
    ),
    (
        LEDGER,
        "self._parts.setdefault(current, []).append(factors)",
        "self._parts[current] = [factors]",
        "the last use of a parameter is all of them",
    ),
    (
        LEDGER,
        "parts = self._parts.pop(current, None)",
        "parts = self._parts.get(current)",
        "a second backward counts the first one's contributions",
    ),
    (
        LEDGER,
        "self.consumed = True",
        "pass",
        "later forwards join a hub that has run",
    ),
    (
        LEDGER,
        "if self.observes:",
        "if True:",
        "statistics are collected unasked",
    ),
    (
        LEDGER,
        "if born not in (-1, current):",
        "if born != -1:",
        "a pass runs inside itself",
    ),
    (
        LEDGER,
        "others = owner.settled | set(self._parts)",
        "others = set(self._parts)",
        "a reentrant pass after the rule is not refused",
    ),
    (
        LEDGER,
        "others = owner.settled | set(self._parts)",
        "others = owner.settled",
        "a reentrant pass before the rule is not refused",
    ),
    (
        LEDGER,
        "if any(other != current and owner.passes.related(other, current) for other in others):",
        "if any(other != current for other in others):",
        "two threads may not train side by side",
    ),
    (
        LEDGER,
        "while task in self.outer:",
        "if task in self.outer:",
        "passes nested twice are strangers",
    ),
    (
        LEDGER,
        "if grad is not None and grad.dtype != parameter.dtype:",
        "if False:",
        "gradients have another type",
    ),
    (
        LEDGER,
        "if not owner.passes.outer:",
        "if True:",
        "what a reentrant backward settled is forgotten in it",
    ),
    (
        LEDGER,
        "if sink.wanted():",
        "if True:",
        "factors nobody asked for are kept",
    ),
    (
        LEDGER,
        "self.ledger.record(factors if self._adapt is None else self._adapt(factors), self._born)",
        "self.ledger.record(factors, self._born)",
        "contributions to a derived tensor are its parameter's",
    ),
    (
        LEDGER,
        "return make(voters.all_alike(), *tensors).total() if needed else None",
        "return make(voters, *tensors).total() if needed else None",
        "plain gradients are weighted",
    ),
    (
        LEDGER,
        "owner.guard()",
        "pass",
        "a detached handle still records",
    ),
]  # fmt: skip
