"""One-line mistakes in how htv follows the batch and gathers contributions.

A row: the file, a line of it (without its indentation, there once), what it becomes, and what that
would do. A line that was rewritten is named by `make test-mutants`; choose another mistake of the
same kind then. Leave out mistakes that change nothing anybody can see.
"""

GROUPS = "htv/groups.py"
PROVENANCE = "htv/engine/provenance.py"
TORCH_OPS = "htv/engine/torch_ops.py"
PROBING = "htv/engine/probing.py"
PROPAGATION = "htv/engine/propagation.py"
MODE = "htv/engine/mode.py"
RESULTS = "htv/engine/results.py"
USUAL = "htv/engine/usual.py"
PARAMETER = "htv/engine/parameter.py"
AGGREGATION = "htv/autograd/aggregation.py"

# The first of these that fails is enough.
TESTS = {
    GROUPS: [
        "tests/test_groups.py",
        "tests/test_provenance.py",
        "tests/test_probing.py",
        "tests/test_propagation.py",
    ],
    PROVENANCE: [
        "tests/test_provenance.py",
    ],
    TORCH_OPS: [
        "tests/test_probing.py",
        "tests/test_propagation.py",
    ],
    PROBING: [
        "tests/test_provenance.py",
        "tests/test_probing.py",
        "tests/test_propagation.py",
    ],
    PROPAGATION: [
        "tests/test_provenance.py",
        "tests/test_probing.py",
        "tests/test_propagation.py",
    ],
    MODE: [
        "tests/test_probing.py",
        "tests/test_propagation.py",
    ],
    RESULTS: [
        "tests/test_probing.py",
        "tests/test_propagation.py",
    ],
    AGGREGATION: [
        "tests/test_aggregation.py",
    ],
    USUAL: [
        "tests/test_usual.py",
    ],
    PARAMETER: [
        "tests/test_shared_nodes.py",
    ],
}

MUTANTS = [
    # -- htv/groups.py
    (
        GROUPS,
        "if self.dim != other.dim or self.size(batch_size) != other.size(batch_size):",
        "if self.dim != other.dim:",
        "layouts of other sizes are one",
    ),
    (
        GROUPS,
        "if self.dim != other.dim or self.size(batch_size) != other.size(batch_size):",
        "if self.size(batch_size) != other.size(batch_size):",
        "the batch in two dims is one",
    ),
    (
        GROUPS,
        "return (self.outer, self.times) == (other.outer, other.times) or batch_size == 1",
        "return True",
        "the order of merged dims does not matter",
    ),
    (
        GROUPS,
        "return torch.equal(self.index(batch_size).cpu(), other.index(batch_size).cpu())",
        "return True",
        "the order of picked rows does not matter",
    ),
    (
        GROUPS,
        "return (torch.arange(self.size(batch_size)) // self.times) % batch_size",
        "return torch.arange(self.size(batch_size)) % batch_size",
        "rows of merged dims go to other examples",
    ),
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
        "return same_mask and self.batch_size == other.batch_size",
        "return self.batch_size == other.batch_size",
        "tokens of other masks are added up",
    ),
    (
        GROUPS,
        'weights = None if weight == "size" else batch_size / (len(sizes) * sizes.double())',
        'weights = None if weight == "size" else batch_size / sizes.double()',
        "equal weights are not",
    ),
    (
        GROUPS,
        "if layout.examples is None and layout.outer == 1 and groups.order is None:",
        "if layout.examples is None:",
        "repeated batches are cut like one",
    ),
    (
        GROUPS,
        "self.offsets = groups.offsets if layout.times == 1 else groups.offsets * layout.times",
        "self.offsets = groups.offsets",
        "rows behind the first of a example are another's",
    ),
    (
        GROUPS,
        "if groups.weights is None and groups.voting is None:",
        "if groups.voting is None:",
        "plain sums are weighted",
    ),
    (
        GROUPS,
        "else BatchLayout(dim, self.outer, self.times, self.examples, self.guess)",
        "else BatchLayout(dim, self.times, self.outer, self.examples, self.guess)",
        "a transposed tensor's rows go to other examples",
    ),
    (
        GROUPS,
        "if self.order is None",
        "if True",
        "unsorted ids are taken for sorted ones",
    ),
    (
        GROUPS,
        "return tensor.dim() > layout.dim and tensor.shape[layout.dim] == layout.size(",
        "return tensor.dim() > layout.dim and 0 <= layout.size(",
        "every input is the batch's",
    ),
    # -- htv/engine/provenance.py
    (
        PROVENANCE,
        "if entry is not None and entry[0]() is tensor:",
        "if entry is not None:",
        "a new tensor inherits the mark of a freed one",
    ),
    (
        PROVENANCE,
        "if entry[2] != version or graded > entry[3]:",
        "if False:",
        "what was written to a view's base is not seen",
    ),
    # -- htv/engine/torch_ops.py
    (
        TORCH_OPS,
        'for name in (*names, "axis") if "dim" in names else names:',
        "for name in names:",
        "NumPy's axis is not seen",
    ),
    (
        TORCH_OPS,
        "return (*args, *(kwargs[n] for n in found)), rest",
        "return args, kwargs",
        "factors given by name are taken in the order of their names",
    ),
    # -- htv/engine/probing.py
    (
        PROBING,
        "if bool(((along == found[:, None]) | (along < 0)).all()) and bool((found >= 0).all()):",
        "if bool((found >= 0).all()):",
        "any dim holds the batch",
    ),
    (
        PROBING,
        "if not layouts or (len(layouts) > 1 and not empty):",
        "if not layouts:",
        "a target that fits in two ways is fitted in one",
    ),
    (
        PROBING,
        ") and bool((written == numbers).all()):",
        "):",
        "writes of other examples' values are followed",
    ),
    # -- htv/engine/propagation.py
    (
        PROPAGATION,
        "return [LOST] * len(op.outputs)",
        "pass",
        "tokens are shuffled unseen",
    ),
    (
        PROPAGATION,
        "if isinstance(mark, OfBatch):",
        "if isinstance(mark, OfBatch) and mark is not None and found is None:",
        "the first operand of an elementwise operation decides",
    ),
    (
        PROPAGATION,
        "return all(layouts[0].same(other, batch_size) for other in layouts[1:])",
        "return True",
        "operands that disagree are taken to agree",
    ),
    (
        PROPAGATION,
        "if where is None and (all_say or tensor.requires_grad) and not (couples and broadcast):",
        "if False:",
        "an operand that lost the batch has no say",
    ),
    (
        PROPAGATION,
        "if where is None and (all_say or tensor.requires_grad) and not (couples and broadcast):",
        "if where is None and (all_say or tensor.requires_grad) and not couples:",
        "shared statistics excuse everything",
    ),
    (
        PROPAGATION,
        "at = dim + output.dim() - tensor.dim()",
        "at = dim",
        "broadcasting does not shift dims",
    ),
    (
        PROPAGATION,
        'return mark if op.argument(0, "dim", "axis", default=0) % tensor.dim() != dim else None',
        "return mark",
        "two batches one behind the other are one",
    ),
    (
        PROPAGATION,
        "return mark if dim < tensor.dim() - 2 and tensor.dim() == output.dim() else None",
        "return mark",
        "attention mixes examples",
    ),
    (
        PROPAGATION,
        "kept = dim == 0 if last is None else dim < tensor.dim() - last",
        "kept = True",
        "channels are taken for examples",
    ),
    (
        PROPAGATION,
        "return None if dims is None or mark.dim in dims else mark",
        "return mark",
        "softmax over examples keeps them apart",
    ),
    (
        PROPAGATION,
        "return mark.at(mark.dim - sum(d < mark.dim for d in dims))",
        "return mark",
        "reduced dims before the batch are still there",
    ),
    (
        PROPAGATION,
        'if output.dim() == tensor.dim() and op.name != "cosine_similarity":  # which keeps no dim',
        "if output.dim() == tensor.dim():",
        "similarities of all pairs are one example's each",
    ),
    (
        PROPAGATION,
        "if mark.dim == contracted:",
        "if False:",
        "products over the batch keep it",
    ),
    (
        PROPAGATION,
        "contracted = tensor.dim() - (1 if is_first else 2)",
        "contracted = tensor.dim() - 1",
        "of the second factor the columns are summed over",
    ),
    (
        PROPAGATION,
        "from_end -= mark.dim < contracted",
        "pass",
        "products with a vector keep all dims",
    ),
    (
        PROPAGATION,
        "if len(mine) != 1:",
        "if not mine:",
        "an einsum of a tensor with itself is read one way",
    ),
    (
        PROPAGATION,
        "before *= mark.outer",
        "pass",
        "merged dims are taken apart wrongly",
    ),
    (
        PROPAGATION,
        "if not cut and not remainder and outer and times:",
        "if not remainder and outer and times:",
        "reshapes that cut examples are followed",
    ),
    (
        PROPAGATION,
        "return replace(mark, dim=at, outer=mark.outer * sizes[at])",
        "return replace(mark, dim=at)",
        "repeated batches are one",
    ),
    (
        PROPAGATION,
        "return None if removed == mark.dim else mark.at(mark.dim - (removed < mark.dim))",
        "return mark",
        "a selected dim is still there",
    ),
    (
        PROPAGATION,
        "whole = item.indices(tensor.shape[old]) == (0, tensor.shape[old], 1)",
        "whole = True",
        "a part of the batch is all of it",
    ),
    (
        PROPAGATION,
        "return found if sum(_is_advanced(item) for item in items) < 2 else None",
        "return found",
        "dims that several indices move to the front stay",
    ),
    (
        PROPAGATION,
        "return None  # torch.embedding takes the table first, whose rows are picked",
        "pass",
        "rows picked of the batch are in order",
    ),
    (
        PROPAGATION,
        "found if found is not None and output.shape[found.dim] == found.size(batch_size) "
        "else None",
        "found",
        "a layout is kept in an output that has another size",
    ),
    (
        PROPAGATION,
        "return mark.at(mark.dim)",
        "return mark.at(b)",
        "a transposition of other dims moves the batch",
    ),
    # -- htv/engine/mode.py
    (
        TORCH_OPS,
        'return name.startswith("__i") and name not in ("__invert__", "__int__", "__index__")',
        'return name.startswith("__i")',
        "~mask is a constant",
    ),
    (
        RESULTS,
        "marks = [LOST] * len(outputs)",
        "pass",
        "transpose_ in layout is followed after the fact",
    ),
    # -- htv/autograd/aggregation.py
    (
        AGGREGATION,
        "parts = self._parts.pop(current, None)",
        "parts = self._parts.get(current)",
        "a second backward counts the first one's contributions",
    ),
    (
        AGGREGATION,
        "self.consumed = True",
        "pass",
        "later forwards join a hub that has run",
    ),
    (
        AGGREGATION,
        "if self.observes:",
        "if True:",
        "statistics are collected unasked",
    ),
    (
        AGGREGATION,
        "others = owner.settled | set(self._parts)",
        "others = set(self._parts)",
        "a reentrant pass after the rule is not refused",
    ),
    (
        AGGREGATION,
        "others = owner.settled | set(self._parts)",
        "others = owner.settled",
        "a reentrant pass before the rule is not refused",
    ),
    (
        AGGREGATION,
        "if any(other != current and owner.passes.related(other, current) for other in others):",
        "if any(other != current for other in others):",
        "two threads may not train side by side",
    ),
    (
        AGGREGATION,
        "while task in self.outer:",
        "if task in self.outer:",
        "passes nested twice are strangers",
    ),
    (
        AGGREGATION,
        "if grad.dtype != parameter.dtype:",
        "if False:",
        "gradients have another type",
    ),
    (
        AGGREGATION,
        "if recorder.wanted():",
        "if True:",
        "factors nobody asked for are kept",
    ),
    (
        AGGREGATION,
        "return make(grouped_rows.ungrouped(), *tensors).total() if needed else None",
        "return make(grouped_rows, *tensors).total() if needed else None",
        "plain gradients are weighted",
    ),
    (
        AGGREGATION,
        "owner.guard()",
        "pass",
        "a detached handle still records",
    ),
    (
        AGGREGATION,
        "parts = self._parts.pop(current, None)",
        "parts = self._parts.pop(next(iter(self._parts), None), None)",
        "passes of two threads are added up",
    ),
    (
        AGGREGATION,
        "self._parts[current].append(factors)",
        "self._parts[current] = [factors]",
        "the last use of a parameter is all of them",
    ),
    (
        AGGREGATION,
        "if born != -1 and born != current:",
        "if born != -1:",
        "a pass runs inside itself",
    ),
    (
        AGGREGATION,
        "if owner.passes.outer:",
        "if False:",
        "what a reentrant backward settled is forgotten in it",
    ),
    (
        AGGREGATION,
        "self.buffer.record(factors if self._adapt is None else self._adapt(factors), self.born)",
        "self.buffer.record(factors, self.born)",
        "contributions to a derived tensor are its parameter's",
    ),
    # -- htv/engine/usual.py
    (
        USUAL,
        "same = entry[2] == tensor._version and tensor.requires_grad <= entry[3]",
        "same = tensor.requires_grad <= entry[3]",
        "what is written to in place keeps its mark",
    ),
    (
        USUAL,
        "same = entry[2] == tensor._version and tensor.requires_grad <= entry[3]",
        "same = entry[2] == tensor._version",
        "what got a gradient keeps its mark",
    ),
    (
        USUAL,
        "if expected != (gradient.data_ptr(), gradient._version):",
        "if expected is None:",
        "any gradient passes the guard once",
    ),
    (
        USUAL,
        "again = task in self._deliveries",
        "again = False",
        "two aggregates in one backward are summed",
    ),
    # -- htv/engine/parameter.py
    (
        PARAMETER,
        "if buffer.dtype != p.dtype or buffer.device != p.device:  # `.to` since, in the forward",
        "if False:",
        "the gradient of a parameter moved in the forward goes astray",
    ),
    (
        PARAMETER,
        "if sharing[1:] and self._is_hooked():",
        "if False:",
        "hooks see None for a gradient",
    ),
]
