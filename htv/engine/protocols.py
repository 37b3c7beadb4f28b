"""What the parts of the engine need of each other, where a plain import would run upwards.

A handler (`htv.engine.handlers`) sees the mode as a `ModeLike`, a tracked parameter and a stand-in
for a module's forward see the session as a `SessionLike`, and so on. Nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from htv.autograd.aggregation import NestedBackwards, ParameterArgument, UseRecorder
from htv.groups import BatchLayout, GroupedRows, Groups
from htv.ops.factors import Factors
from htv.rules import Rule

__all__ = ["ForwardLike", "ModeLike", "ModeSession", "ParameterLike", "SessionLike"]


class ParameterLike(Protocol):
    """A tracked parameter, as the mode and handlers see it."""

    name: str
    parameter: Tensor
    rule: Rule
    refusal: str | None
    uses: set[str]

    def note(self, use: str) -> None:
        """Remember a kind of use."""

    def defer(self, message: str) -> None:
        """Refuse a use when a gradient comes by it."""

    def recorder(self, groups: Groups, born: int = -1) -> UseRecorder:
        """Return where the contributions of one more use go."""


class ForwardLike(Protocol):
    """The stand-in for a module's forward, as checkpointing sees it."""

    batch_misplaced: bool


class ModeSession(Protocol):
    """What the mode needs of the session it runs in."""

    own_marks: dict[int, Any]

    @property
    def passes_plainly(self) -> bool:
        """Whether uses that cannot be served are passed on plainly, with a warning."""

    @property
    def shares_statistics(self) -> bool:
        """Whether a contribution may include what passes through a BatchNorm's statistics."""

    def known_results(self, groups: Groups) -> dict[tuple, Any] | None:
        """Return the marks of results that earlier forwards of such a batch found; None not to keep
        any.
        """

    def constants(self) -> Iterable[Tensor]:
        """Return the model's tensors that are not served."""

    def tracked_parameter(self, tensor: Tensor) -> ParameterLike | None:
        """Return the record of a served parameter, or None for anything else."""

    def stands_in(self, tensor: Tensor) -> str | None:
        """Return the name under which a tensor took a parameter's place, or None."""

    def note_loss(self, lost: Any) -> None:
        """Remember where the batch was lost, once a parameter came to need it."""

    def unsupported(self, message: str, parameters: tuple[ParameterLike, ...]) -> None:
        """Refuse a use of parameters, or note that its contributions are summed plainly."""


class SessionLike(ModeSession, Protocol):
    """What a tracked parameter, and the stand-in for a forward, need of the session."""

    attached: bool
    backward_started: bool
    batch_norm: str
    collects_stats: bool
    examine: Callable[[str, list[Factors]], None] | None
    only_means: bool
    rules: list[Rule]
    passes: NestedBackwards
    told_of_sums: bool

    def sharing_node(self, tracked: Any, groups: Groups) -> tuple:
        """Return the parameters that share a node with this one, itself among them."""

    def warn_of_sums(self, tracked: Any) -> None:
        """Say once that several backwards were added up in `.grad`."""

    def forwards_of(self, module: nn.Module) -> list:
        """Return what stands in for methods of a module."""

    def run(self, forward: Any, args: tuple, kwargs: dict) -> Any:
        """Run a module's forward, under the mode where that is needed."""

    def run_compiled(self, forward: Any, args: tuple, kwargs: dict) -> Any:
        """Run a module's forward while torch.compile traces it."""


class ModeLike(Protocol):
    """The mode a forward runs under, as handlers see it."""

    session: ModeSession
    own: dict[int, Any]
    task: int
    groups: Groups
    batch: Any
    marks: Any
    spec: Any

    def __enter__(self) -> Any: ...

    def __exit__(self, *args: Any) -> Any: ...

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Make one torch call of the forward, served where that is needed."""

    def general(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a call that no handler serves, and mark its results."""

    def tracked(self, tensor: Any) -> ParameterLike | None:
        """Return the record of a served parameter, or None for anything else."""

    def mark(self, tensor: Tensor | None) -> Any:
        """Return what a tensor is to the batch."""

    def layout(self, x: Tensor, dim: int = 0, mark: Any = None) -> Any:
        """Return `mark` of x, or the place along a dim where there is one example only."""

    def input(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return a layer's input as the layer is to see it, and its `layout`."""

    def grouped_rows(self, layout: BatchLayout) -> GroupedRows:
        """Return who votes with the indices of a tensor that has the batch there."""

    def argument(self, value: Tensor | None, mark: Any = None) -> ParameterArgument:
        """Return a layer's parameter argument: served, computed from served ones, or plain."""

    def why_not_batch(self, x: Tensor, mark: Any, features: int) -> str | None:
        """Return why a layer cannot tell its input's rows apart; None if it can."""

    def refuse(self, op: str, parameters: tuple[ParameterLike, ...], why: str) -> None:
        """Refuse a use of parameters."""

    def with_copies(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict,
        tensors: list,
        ndim: int,
        layout: BatchLayout,
    ) -> Any:
        """Make a call with what comes from parameters replaced by its copies per example."""

    def unexpanded(self, w: Tensor, x: Tensor) -> Tensor:
        """Return a factor of a product without leading dims along which it only repeats."""

    def batch_misplaced(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is not what it would be taken for as an input of the model."""
