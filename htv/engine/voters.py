"""Who votes in a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from htv.autograd.aggregation import NestedBackwards
from htv.engine import inputs
from htv.engine.checkpointing import RecentForwards, in_backward, in_reentrant_checkpoint
from htv.engine.continuation import carried_marks
from htv.engine.group_spec import GroupSpec, add_members, groups_of, same_spec
from htv.engine.inputs import Batch
from htv.engine.provenance import FromParameters, Mark
from htv.groups import Groups

__all__ = ["Voters"]


class Voters:
    """Decides who votes in a forward: by its arguments, by the block of groups(), packed() or
    tokens() around it, and by earlier forwards that it goes on from.

    named:             the arguments that the user named as the batch.
    batch_dim:         where examples are in them.
    passes:            the backwards under way, which a forward begins anew.
    spec:              of the block that is open, or None.
    sizes:             of the batches since the last backward.
    source:            which argument the last forward took for the batch.
    recent:            the last forwards, of which a checkpoint may run parts again.
    backward_started:  whether a backward has reached a parameter: the forwards before it are done
                       with then.
    """

    def __init__(self, named: tuple[str, ...], batch_dim: int, passes: NestedBackwards):
        self.named, self.batch_dim, self._passes = named, batch_dim, passes
        self.spec: GroupSpec | None = None
        self._last_spec: GroupSpec | None = None
        self._specs: list[GroupSpec | None] = []  # since the last backward; at most two different
        self.sizes: set[int] = set()
        self.source = ""
        self.recent = RecentForwards()
        self.backward_started = False

    @contextmanager
    def voting(self, spec: GroupSpec) -> Iterator[None]:
        """Let forwards inside the block vote by `spec`."""
        if spec.weight not in ("size", "equal"):
            raise ValueError(f"weight must be 'size' or 'equal', got {spec.weight!r}")
        if self.spec is not None:
            raise RuntimeError("groups(), packed() and tokens() blocks cannot be nested")
        if isinstance(spec.value, Tensor):  # the one time that a device is waited for
            spec = replace(spec, value=spec.value.cpu())
        spec = replace(spec, also={n: torch.as_tensor(t).cpu() for n, t in spec.also.items()})
        try:
            self.spec = spec
            yield
        finally:
            self.spec = None

    def begin(self, graph: bool) -> GroupSpec | None:
        """Return who votes in the forward that starts now, and keep it for its checkpoints.

        graph: whether gradients are on. A reentrant checkpoint runs its first forward without, as
               an evaluation does.
        """
        if torch._C._current_graph_task_id() != -1:
            if len(self._specs) > 1 and in_reentrant_checkpoint():
                raise RuntimeError(
                    "a reentrant activation checkpoint runs a forward again, but since the last "
                    "backward there were forwards with different groups() or packed(): whose votes "
                    "these are cannot be told. Call backward() before the next forward, or "
                    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
                )
            return self._last_spec
        if graph:
            passes = self._passes
            passes.outer, passes.groups, passes.latest = {}, {}, (-1, None)
        if self.backward_started:
            self._specs, self.backward_started, self._last_spec = [], False, None
            self.sizes = set()
            self.recent.modes.clear()
        spec = self.spec
        if graph or spec is not None:
            self._last_spec = spec
            known = self._specs
            if not known:
                known.append(spec)
            elif len(known) < 2 and spec is not known[0] and not same_spec(spec, known[0]):
                known.append(spec)
        return spec

    def named_in(self, tensors: list) -> tuple[str, ...]:
        """Return the arguments that the user named as the batch, as far as a call with these
        `tensors` has them: a part of the model, say.
        """
        own = {inputs.argument_of(name) for name, _ in tensors}
        return tuple(name for name in self.named if inputs.argument_of(name) in own)

    def of_call(
        self,
        spec: GroupSpec | None,
        tensors: list,
        wanted: tuple[str, ...],
        own_marks: dict[int, FromParameters],
    ) -> tuple[Groups, Batch, dict[int, Mark]]:
        """Return groups, the call's batch, and what earlier forwards know of its tensors.

        spec:       what `begin` returned.
        tensors:    (argument, value) of the call.
        wanted:     the arguments that the user named as the batch.
        own_marks:  of the served parameters.
        """
        carried, earlier = carried_marks(tensors, own_marks, self.recent)
        fresh = [(name, t) for name, t in tensors if id(t) not in carried]
        others, also = fresh, () if spec is None else spec.also
        if also:
            others = [(name, t) for name, t in fresh if name not in also]
        dim = self.batch_dim
        kind, size = ("each", None) if spec is None else (spec.kind, spec.size())
        if earlier is not None:
            batch = inputs.fitting(earlier.groups.batch_size, dim, others, earlier.source)
            alike = spec is not None and spec is earlier.spec
            neither = spec is None and earlier.spec is None and not earlier.groups.rows_vote
            if alike or neither:
                add_members(batch, earlier.groups, spec, fresh)
                return earlier.groups, batch, carried
        elif in_backward() and len(self.sizes) == 1:  # a reentrant checkpoint's part
            batch = inputs.fitting(next(iter(self.sizes)), dim, fresh, self.source)
            if not batch.members:
                batch = inputs.choose(fresh, dim, wanted, kind=kind)
        else:
            batch = inputs.choose(others, dim, wanted, size, kind)
        groups = groups_of(spec, batch, fresh)
        add_members(batch, groups, spec, fresh)
        return groups, batch, carried
