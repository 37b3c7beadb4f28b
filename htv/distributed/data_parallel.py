"""One vote of all ranks under DistributedDataParallel: `htv.distributed.ddp`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from htv.autograd.tally import state_of
from htv.distributed import bucket_means, reduction
from htv.distributed import data_parallel_refusals as refusals
from htv.distributed.bucket_means import RankedField
from htv.distributed.mask_exchange import MaskedBuckets
from htv.distributed.rank_votes import LocalVotes, RankVotes, session_of
from htv.distributed.reduction import Field, Votes
from htv.distributed.rounds import VOTES, Electorate
from htv.engine.parameter import TrackedParameter
from htv.errors import UnsupportedError

__all__ = ["ddp"]

# Hooks that begin one collective, when they are called. Others may begin more of them later, and
# ranks would begin these and what tells the masks in different orders.
_OF_ONE_COLLECTIVE = (
    None,
    default_hooks.allreduce_hook,
    default_hooks.bf16_compress_hook,
    default_hooks.fp16_compress_hook,
)

Hook = Callable[[object, dist.GradBucket], torch.futures.Future[Tensor]]


def ddp(
    model: DistributedDataParallel,
    handle: object,
    hook: Hook | tuple[object, Hook] | None = None,
    vote: str = "examples",
) -> None:
    """Let the examples of all ranks vote together under DistributedDataParallel.

    Registers a communication hook. Buckets of gradients are summed over ranks as always, while
    backward runs; the votes travel beside them as integers (one byte per parameter for up to 127
    voters), and `.grad` holds the aggregate before anyone sees it. Micro-batches under
    ``model.no_sync()`` join the vote of the backward that synchronises.

    model:   what DistributedDataParallel(...) returned, around the attached model.
    handle:  what `htv.attach` returned, for the model before or after it was wrapped.
    hook:    another communication hook to reduce the sums with, such as bf16_compress_hook; with
             its state as (state, hook).
    vote:    "examples": every group of every rank votes; "ranks": every rank is one group;
             "local": each rank's groups vote alone and the ranks' aggregates are averaged, which
             is no vote.

    A loss is taken to be each rank's own mean, and the ranks' gradients are averaged, as
    DistributedDataParallel does: the aggregate is the one that one process gets for the batches of
    all ranks, if they are of one size.

    `MedianOfMeans(k)`, with k a multiple of the number of ranks, takes k / ranks buckets of each:
    its groups of one backward are cut into them, or each of so many micro-batches is one. Beside
    the sum their sums are kept, until they are on their way. Other order rules over examples
    exchange what layers recorded, in one backward.

    Raises TypeError or ValueError for bad arguments or ranks that attached different things,
    UnsupportedError where a setting of DistributedDataParallel hides gradients or an optimizer
    steps in backward, RuntimeError if the handle's examples vote over ranks already.

    >>> store = torch.distributed.HashStore()
    >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> model = torch.nn.Linear(2, 1)
    >>> handle = htv.attach(model, htv.AndMask(1.0))
    >>> model = torch.nn.parallel.DistributedDataParallel(model)
    >>> htv.distributed.ddp(model, handle)
    >>> x = torch.tensor([[1.0, 1.0], [3.0, -1.0]])
    >>> model(x).mean().backward()
    >>> model.module.weight.grad
    tensor([[2., 0.]])
    >>> torch.distributed.destroy_process_group()
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            "model must be a DistributedDataParallel that wraps the attached model, got "
            f"{type(model).__name__}"
        )
    if vote not in (*VOTES, "local"):
        raise ValueError(f"vote must be 'examples', 'ranks' or 'local', got {vote!r}")
    session = session_of(handle)
    state, inner = hook if isinstance(hook, tuple) else (None, hook)
    if inner is not None and not callable(inner):
        raise TypeError(f"hook must be a communication hook or (state, hook), got {hook!r}")
    refusals.refuse_hidden_gradients(model, session)
    refusals.refuse_early_steps(session)
    registered = _registered.get(model)
    others = [state for _, state in model._comm_hooks if not isinstance(state, _Registered)]
    if registered is None and model.logger is not None and others:
        raise UnsupportedError(
            "model has a communication hook already, and DistributedDataParallel takes one only. "
            "Remedy: htv.distributed.ddp(model, handle, hook=(state, that_hook)) in its place"
        )
    if vote != "local":
        refusals.refuse_early_hooks(session)
    if session.joint.of_ranks is not None:
        raise RuntimeError(
            "the handle's examples vote over ranks already: call this once, for one "
            "DistributedDataParallel. Remedy, where it is to be another: handle.detach(), then "
            "htv.attach and htv.distributed.ddp for that one"
        )
    if registered is not None and registered.votes.session.attached:
        raise UnsupportedError(
            "the examples of another handle vote under this DistributedDataParallel already, and "
            "it takes one. Remedy: one htv.attach for the whole model, with a callable "
            "(name, parameter) -> rule, or detach the other handle"
        )
    votes = (
        LocalVotes(session)
        if vote == "local"
        else DataParallelVotes(session, model, vote, state, inner)
    )
    if registered is None:
        registered = _registered[model] = _Registered()
        model.register_comm_hook(registered, _reduce)
    registered.votes, registered.model = votes, weakref.ref(model)
    registered.state, registered.inner = state, inner
    if vote != "local":
        model._lazy_init()  # looks for optimizers that step in backward, for which it has no hook
    votes.begin()


class _Registered:
    """Is the state of the one hook that a model takes: what the last call of `ddp` asked for.

    A copy of the model, or a pickle, has one that nobody calls: the copy's hook is to be registered
    yet.
    """

    model: Callable[[], DistributedDataParallel]
    votes: DataParallelVotes | LocalVotes
    state: object
    inner: Hook | None

    def __deepcopy__(self, memo: dict) -> _Registered:
        return _Registered()

    def __reduce__(self):
        return _Registered, ()


_registered: weakref.WeakKeyDictionary[DistributedDataParallel, _Registered] = (
    weakref.WeakKeyDictionary()
)


def _reduce(registered, bucket):  # DistributedDataParallel refuses annotations that are strings
    """The communication hook: (_Registered, GradBucket) -> Future[Tensor]."""
    votes = registered.votes
    if isinstance(votes, DataParallelVotes) and votes.session.attached:
        return votes.reduce(bucket)
    return _averaged(registered.inner, registered.state, registered.model(), bucket)


def _averaged(
    inner: Hook | None, state: object, model: DistributedDataParallel, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """Average a bucket over ranks, as the model would without htv."""
    if inner is not None:
        return inner(state, bucket)
    group = model.process_group
    summed = reduction.all_reduce(bucket.buffer().div_(group.size()), group)
    return summed.then(lambda done: _tensor_of(done.value()))


class DataParallelVotes(RankVotes):
    """Votes beside the buckets of one DistributedDataParallel.

    model:         it, if it is still there.
    state, inner:  the hook that reduces sums, with its state; None for a plain average.
    """

    gathers = True
    sums_stay = True

    def __init__(self, session, model: DistributedDataParallel, vote: str, state, inner):
        group = model.process_group
        super().__init__(session, group, vote, 1 / group.size(), "under DistributedDataParallel")
        # The model keeps its hook's state, this, where Python's collector does not look.
        self._model = weakref.ref(model)
        self._state, self._inner = state, inner
        self._by_id = {id(t.parameter): t for t in session.tracked()}
        self._reduced: set[int] = set()  # which of them the model brings together
        self._masks = MaskedBuckets(group)
        # How many backwards there were before a forward whose own was to synchronise.
        self._to_meet: int | None = None
        self._armed = False  # whether the model waits for gradients to bring together

    @property
    def model(self) -> DistributedDataParallel:
        return self._model()

    def require_covered(self, module: nn.Module) -> None:
        """Refuse a forward of `module` that DistributedDataParallel does not see: nobody would
        bring its gradients together.
        """
        self._refuse_others()
        inside = DistributedDataParallel._active_ddp_module is self.model
        if not inside and module is not self.model:
            raise RuntimeError(
                "the attached model was called by itself, but its ranks vote together under "
                "DistributedDataParallel, which would not see this forward: call what "
                "DistributedDataParallel(...) returned, or torch.no_grad() if no gradient is "
                "wanted, or detach the handle"
            )
        self._refuse_early()
        self.drop_zeroed()
        before = len(self.rounds.batches)
        if self._to_meet is not None and before > self._to_meet:
            raise RuntimeError(
                "the last backward was to bring the ranks together, and did not reach all of the "
                "model's parameters: plain sums are left in .grad. Remedy: "
                "find_unused_parameters=True if some parameters have no part in the loss"
            )
        self._to_meet = before if self.model.require_backward_grad_sync else None
        self._armed = self._armed or self._to_meet is not None

    def _refuse_others(self) -> None:
        """Raise where another DistributedDataParallel, called around the forward that begins, would
        bring the same gradients together: its average of plain sums would take the aggregate's
        place.
        """
        for other in refusals.called_now():
            if other is self.model:
                continue
            if any(id(p) in self._by_id for p in other._module_parameters):
                raise RuntimeError(
                    "another DistributedDataParallel was called around the attached model than the "
                    "one that htv.distributed.ddp was called with, where its votes are counted: it "
                    "would leave averages of the ranks' plain sums in .grad. Remedy: call that one "
                    "alone, or handle.detach(), then htv.attach and htv.distributed.ddp for this "
                    "one"
                )

    def _refuse_early(self) -> None:
        """Raise where something takes gradients before the ranks have met."""
        refusals.refuse_early_steps(self.session)
        refusals.refuse_early_hooks(self.session)

    def pass_ended(self) -> None:
        self.remember_sums()
        # Some (Lightning, by hand) decide at the backward whether it synchronises.
        if not self.model.require_backward_grad_sync:
            self._to_meet = None
        elif self.rounds.batches:
            # Behind DistributedDataParallel's own calls at the end of the pass.
            torch.autograd.Variable._execution_engine.queue_callback(self._require_met_now)

    def _require_met_now(self) -> None:
        """Raise where the backward that ends was to bring the ranks together and did not."""
        if not self.rounds.batches:
            return
        if self._armed:
            raise RuntimeError(
                "this backward was to bring the ranks together, and did not reach all of the "
                "model's parameters: plain sums of this rank are left in .grad. Remedy: "
                "find_unused_parameters=True if some parameters have no part in the loss; one "
                "backward for the sum of the losses if there are several"
            )
        raise RuntimeError(
            "this backward was outside no_sync(), but DistributedDataParallel did not bring its "
            "gradients together: it does so once per forward, for the first backward after it, and "
            "never where the forward was inside no_sync(). .grad holds plain sums of this rank. "
            "Remedy: one backward for the sum of the losses, and forward and backward either both "
            "inside no_sync() or both outside"
        )

    def require_meeting(self) -> None:
        if not self.model.require_backward_grad_sync:
            raise UnsupportedError(
                "order rules need the contributions of all micro-batches at once, and no_sync() "
                "keeps ranks from exchanging them. Remedy: larger batches without no_sync(), "
                f"MedianOfMeans({self.rounds.size}), or vote='ranks'"
            )

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Bring one bucket of all ranks together, and apply the rules to it."""
        self._refuse_micro_batch()
        buffer, parameters = bucket.buffer(), bucket.parameters()
        gradients = [
            _as_laid_out(p, flat) for p, flat in zip(parameters, bucket.gradients(), strict=True)
        ]
        tracked = [self._by_id.get(id(p)) for p in parameters]
        self._reduced.update(map(id, parameters))
        if bucket.index() == 0:
            self._masks.clear()
        if bucket.is_last():
            self._refuse_unfrozen()
            self._refuse_early()
        fields = _fields(gradients, buffer, [self.rule_of_votes(t) for t in tracked])
        ordered = _fields(gradients, buffer, [self.rule_of_ranks(t) for t in tracked])
        members = [
            RankedField(one, field, one.gathering, _writer(gradient, field))
            for field, one, gradient in zip(ordered, tracked, gradients, strict=True)
            if field.rule is not None
        ]
        observed = []
        if self.agreements is not None:
            placed = [(t, f) for t, f in zip(tracked, fields, strict=True) if t is not None]
            self.observe_sums([(t, f.of(buffer)) for t, f in placed])
            observed = [(t, f) for t, f in placed if self.is_told_by_sums(t)]
        ruled = any(field.rule is not None for field in fields)
        electorate = self.rounds.called() if ruled or members or bucket.is_last() else None
        votes = self._own_votes(buffer, gradients, tracked, fields, electorate)
        if not members and self.masks_suffice(fields):
            reduced = self._masks.add(votes.votes, fields, electorate, lambda: self._sums(bucket))
        else:
            reduced = self._in_full(bucket, fields, members, votes, electorate, observed)
        if bucket.is_last():
            self._masks.tell()
            self._to_meet, self._armed = None, False
            self.met(None)
        return reduced

    def masks_suffice(self, fields: Sequence[Field]) -> bool:
        return self._inner in _OF_ONE_COLLECTIVE and super().masks_suffice(fields)

    def _sums(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        return _averaged(self._inner, self._state, self.model, bucket)

    def _in_full(
        self,
        bucket: dist.GradBucket,
        fields: Sequence[Field],
        members: Sequence[RankedField],
        votes: Votes,
        electorate: Electorate | None,
        observed: Sequence[tuple[TrackedParameter, Field]],
    ) -> torch.futures.Future[Tensor]:
        """Bring sums, votes and what goes with them together, and apply the rules on all ranks.

        fields:    of the bucket, with the rules that go by votes.
        members:   those that have a rule of ranks' sums.
        votes:     of this rank.
        observed:  what sums and votes tell of for `Handle.stats`.
        """
        buffer, group, agreements = bucket.buffer(), self.rounds.group, self.agreements
        ordered = [member.field for member in members]
        ranked = None
        if members:
            ranked = bucket_means.rank_whole(
                buffer, members, self.rounds, self.fraction, self.agreements
            )
        waited = [reduction.all_reduce(t, group) for t in votes]
        by_votes = bool(waited)
        if ranked is not None:
            waited.append(ranked[0])
        if bucket.is_last():
            own = self.own_agreements(buffer.device)
            if own is not None:
                waited.append(reduction.all_reduce(own, group))
            self.tell(own)
        needed = len(ordered) < len(fields) or self._inner is not None
        if needed:  # else all that comes of the sums is ranked
            waited.append(self._sums(bucket))

        def finish(done: torch.futures.Future[list]) -> Tensor:
            reduced = _tensor_of(done.value()[-1].value()) if needed else buffer
            for one, field in observed:
                found = reduction.agreement_sums(field, reduced, votes, electorate, self.fraction)
                agreements.add_whole(one, found)
            if by_votes:
                reduction.apply_rules(reduced, fields, votes, electorate)
            if ranked is not None:
                for field in ordered:
                    field.of(reduced).copy_(field.of(ranked[1]))
            return reduced

        return torch.futures.collect_all(waited).then(finish)

    def _refuse_micro_batch(self) -> None:
        """Raise where DistributedDataParallel brings together what no_sync() was to keep apart."""
        if not self.model.require_backward_grad_sync:
            raise RuntimeError(
                "this backward is under no_sync(), but DistributedDataParallel was about to bring "
                "the ranks together in it, in the middle of a step: a forward outside no_sync(), "
                "with gradients on, tells it to do so in the next backward. That was an "
                "evaluation, which no backward followed, or this micro-batch's own forward. "
                "Remedy: torch.no_grad() around forwards without a backward; forward and backward "
                "of a micro-batch both under no_sync()"
            )

    def _refuse_unfrozen(self) -> None:
        """Raise where a parameter that was frozen when the model was wrapped wants a gradient."""
        for tracked in self._by_id.values():
            if tracked.parameter.requires_grad and id(tracked.parameter) not in self._reduced:
                raise UnsupportedError(
                    f"parameter {tracked.name!r} was frozen when DistributedDataParallel wrapped "
                    "the model, which does not bring its gradient together now that it is not. "
                    "Remedy: wrap the model again whenever parameters are unfrozen (detach the "
                    "handle, and call htv.attach and htv.distributed.ddp again), or freeze them "
                    "after it was wrapped, with find_unused_parameters=True"
                )

    def _own_votes(
        self,
        buffer: Tensor,
        gradients: Sequence[Tensor],
        tracked: Sequence[TrackedParameter | None],
        fields: Sequence[Field],
        electorate: Electorate | None,
    ) -> Votes:
        """Lay out what this rank has to say of a bucket, before its sums are touched."""
        if electorate is None or all(field.rule is None for field in fields):
            return Votes()
        state = {name for f in fields if f.rule is not None for name in state_of(f.rule)}
        votes = Votes.empty(buffer, buffer.numel(), electorate.count, state)
        for gradient, one, field in zip(gradients, tracked, fields, strict=True):
            counts = None if field.rule is None else self.counts_of(one, gradient)
            if counts is not None:
                votes.put(counts, _writer(gradient, field))
        return votes


def _as_laid_out(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient as it lies in its bucket: torch lays it out as the parameter (channels_last, say),
    and shows it as if it were contiguous.
    """
    dense = torch.empty_like(parameter, device="meta").stride()  # its own, unless it has gaps
    if dense != parameter.stride():
        return gradient
    return gradient.as_strided(parameter.shape, parameter.stride(), gradient.storage_offset())


def _fields(gradients: Sequence[Tensor], buffer: Tensor, rules: Sequence) -> list[Field]:
    """Where the parameters of a bucket are in its buffer."""
    found = []
    for gradient, rule in zip(gradients, rules, strict=True):
        offset = gradient.storage_offset() - buffer.storage_offset()
        size = gradient.numel()
        found.append(Field(rule, offset, size, size, size))
    return found


def _writer(gradient: Tensor, field: Field) -> Callable[[Tensor, Tensor], None]:
    """What writes a tensor of the parameter's shape where the bucket has its gradient, whose
    memory format is the parameter's.
    """

    def write(value: Tensor, into: Tensor) -> None:
        begin = into.storage_offset() + field.offset
        into.as_strided(gradient.shape, gradient.stride(), begin).copy_(value)

    return write


def _tensor_of(value: Tensor | list[Tensor]) -> Tensor:
    return value[0] if isinstance(value, (list, tuple)) else value
