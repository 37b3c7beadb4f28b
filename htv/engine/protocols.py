"""What the parts of the engine need of each other, where a plain import would run upwards.

A handler (`htv.engine.handlers`) sees the mode as a `ModeLike`, a tracked parameter and a stand-in
for a module's forward see the session as a `SessionLike`, and so on. Nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from htv.autograd.aggregation import NestedBackwards, ParameterArgument, UseRecorder
from htv.autograd.from_parameters import TensorFromParameters
from htv.groups import BatchLayout, GroupedRows, Groups
from htv.ops.factors import Factors
from htv.rules import Rule

__all__ = [
    "BlockSession",
    "ForwardLike",
    "GroupVotesLike",
    "ModeLike",
    "ModeSession",
    "ParameterLike",
    "RankVotesLike",
    "SessionLike",
    "VotersLike",
    "VotingSession",
]


class ParameterLike(Protocol):
    """Describes a tracked parameter, as the mode and handlers see it."""

    name: str
    parameter: Tensor
    rule: Rule
    refusal: str | None
    uses: set[str]

    def note(self, use: str) -> None:
        """Remember a kind of use, `use`."""

    def defer(self, message: str) -> None:
        """Refuse a use, with `message`, when a gradient comes by it."""

    def recorder(self, groups: Groups, born: int = -1) -> UseRecorder:
        """Return where the contributions of one more use under `groups` go; `born` is the backward
        pass that its forward runs in, or -1.
        """

    def argument(self, groups: Groups, born: int, small: bool) -> ParameterArgument:
        """Return what stands for the parameter in a layer's call, as `recorder`; `small` says that
        what the call records of a small parameter is small.
        """


class ForwardLike(Protocol):
    """Describes the stand-in for a module's forward, as checkpointing sees it."""

    batch_misplaced: bool


class RankVotesLike(Protocol):
    """Describes what lets the examples of several ranks vote together (`htv.distributed`).

    gathers:  whether backwards leave sums for the ranks to bring together.
    """

    gathers: bool

    def require_covered(self, module: nn.Module) -> None:
        """Refuse a forward of `module`, called outermost, whose gradients the ranks would not bring
        together.
        """

    def begin(self) -> None:
        """Gather contributions from now on."""

    def end(self) -> None:
        """Gather no more."""

    def waiting_backwards(self) -> int:
        """Return how many backwards of this rank have left contributions for a vote to come."""

    def require_met(self) -> None:
        """Raise RuntimeError where contributions wait for a backward in which ranks meet."""


class GroupVotesLike(Protocol):
    """Describes what lets the ranks of a process group meet at the end of `accumulate()`."""

    def begin(self) -> None:
        """Gather contributions from now on."""

    def end(self) -> None:
        """Gather no more, and drop what was gathered."""

    def waiting_backwards(self) -> int:
        """Return how many backwards of this rank have left contributions for a vote to come."""

    def waiting(self) -> bool:
        """Tell whether any rank gathered something since the last vote. All ranks ask."""

    def results(self) -> list[tuple[Any, Tensor | None]]:
        """Bring the ranks together; return (tracked parameter, aggregated gradient or None), and
        begin the next vote.
        """


class VotersLike(Protocol):
    """Describes who votes in the forwards of a session, as its parameters see it."""

    backward_started: bool


class VotingSession(Protocol):
    """Describes what votes over several backwards need of their session."""

    model: nn.Module
    attached: bool
    settings: Any

    def tracked(self) -> list:
        """Return all served parameters."""

    def require_several(self, count: int, source: str) -> None:
        """Refuse one group, a `count` of 1, where a rule needs several; `source` says of what."""


class BlockSession(Protocol):
    """Describes what a block of `Handle.forward` needs of its session."""

    root: Any
    thread: Any

    def require_attached(self, method: str) -> None:
        """Raise where `method` of a detached handle is called."""

    def running(self) -> Any:
        """Return the forward under way in this thread."""

    def open(self, forward: Any, args: tuple, kwargs: dict, names: tuple[str, ...] | None) -> Any:
        """Make the mode of `forward`, called with `args` and `kwargs`, which starts now."""

    def close(self, mode: Any, outer: Any) -> None:
        """End the forward of `mode`; `outer` is the one around it, or None."""


class ModeSession(Protocol):
    """Describes what the mode needs of the session it runs in."""

    own_marks: dict[int, Any]

    @property
    def passes_plainly(self) -> bool:
        """Tell whether uses that cannot be served are passed on plainly, with a warning."""

    @property
    def shares_statistics(self) -> bool:
        """Tell whether a contribution may include what passes through a BatchNorm's statistics."""

    def known_results(self, groups: Groups) -> dict[tuple, Any] | None:
        """Return the marks of results that earlier forwards of a batch with such `groups` found;
        None not to keep any.
        """

    def constants(self) -> Iterable[Tensor]:
        """Return the model's tensors that are not served."""

    def tracked_parameter(self, tensor: Tensor) -> ParameterLike | None:
        """Return the record of a served parameter, `tensor`, or None for anything else."""

    def stands_in(self, tensor: Tensor) -> str | None:
        """Return the name under which `tensor` took a parameter's place, or None."""

    def note_loss(self, lost: Any) -> None:
        """Remember where the batch was lost, at `lost`, once a parameter came to need it."""

    def unsupported(self, message: str, parameters: tuple[ParameterLike, ...]) -> None:
        """Refuse a use of `parameters` with `message`, or note that contributions are summed
        plainly.
        """


class SessionLike(ModeSession, Protocol):
    """Describes what a tracked parameter, and the stand-in for a forward, need of the session."""

    attached: bool
    model: nn.Module
    voters: VotersLike
    batch_norm: str
    collects_stats: bool
    differentiated: int
    examine: Callable[[str, list[Factors]], None] | None
    only_means: bool
    rules: list[Rule]
    passes: NestedBackwards
    told_of_sums: bool

    def sharing_node(self, tracked: Any, groups: Groups, matrices: bool) -> tuple:
        """Return the parameters that share a node with `tracked` for `groups`, itself among
        them; matrices do where `matrices` says so.
        """

    def warn_of_sums(self, tracked: Any) -> None:
        """Say once that several backwards were added up in `.grad` of `tracked`."""

    def forwards_of(self, module: nn.Module) -> list:
        """Return what stands in for methods of `module`."""

    def run(self, forward: Any, args: tuple, kwargs: dict) -> Any:
        """Run `forward(*args, **kwargs)`, a module's, under the mode where that is needed."""

    def run_compiled(self, forward: Any, args: tuple, kwargs: dict) -> Any:
        """Run `forward(*args, **kwargs)`, a module's, while torch.compile traces it."""


class ModeLike(Protocol):
    """Describes the mode a forward runs under, as handlers see it."""

    session: ModeSession
    own: dict[int, Any]
    task: int
    groups: Groups
    batch: Any
    batch_size: int
    marks: Any
    rows: dict[BatchLayout, GroupedRows]
    table: dict
    spec: Any

    def __enter__(self) -> Any: ...

    def __exit__(self, *args: Any) -> Any: ...

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Make one torch call, `func(*args, **kwargs)`, served where that is needed."""

    def general(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Run `func(*args, **kwargs)`, which no handler serves, and mark its results."""

    def tracked(self, tensor: Any) -> ParameterLike | None:
        """Return the record of a served parameter, `tensor`, or None for anything else."""

    def mark(self, tensor: Tensor | None) -> Any:
        """Return what `tensor` is to the batch."""

    def layout(self, x: Tensor, dim: int = 0, mark: Any = None) -> Any:
        """Return `mark` of `x`, or the place along `dim` where there is one example only."""

    def input(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return `x`, a layer's input, as the layer is to see it, and its `layout`."""

    def argument(self, value: Tensor | None, mark: Any = None) -> ParameterArgument:
        """Return `value`, a layer's parameter argument with such a `mark`: served, computed from
        served ones, or plain.
        """

    def derived(self, value: Tensor, mark: Any) -> TensorFromParameters:
        """Return `value`, which has the `mark` of a tensor from parameters, with the way back to
        them.
        """

    def unseen(self, tensor: Tensor) -> Any:
        """Tell what `tensor`, which has a graph, is that no call of this forward made."""

    def at(self, node: Any, number: int) -> Any:
        """Return what output `number` of a `node` of autograd is to the batch."""

    def why_not_batch(self, x: Tensor, mark: Any, features: int) -> str | None:
        """Return why a layer cannot tell the rows of `x`, its input with such a `mark`, apart
        before its last `features` dims; None if it can.
        """

    def refusal(self, op: str, parameters: tuple[ParameterLike, ...], why: str) -> str:
        """Return the message that refuses a use of `parameters` by `op`, because of `why`."""

    def refuse(self, op: str, parameters: tuple[ParameterLike, ...], why: str) -> None:
        """Refuse a use of `parameters` by `op`, because of `why`."""

    def batch_misplaced(self, tensor: Tensor) -> bool:
        """Tell whether `tensor` is not what it would be taken for as an input of the model."""
