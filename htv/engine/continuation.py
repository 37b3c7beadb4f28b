"""What earlier forwards know of the tensors that a later one is called with."""

from __future__ import annotations

from torch import Tensor

from htv.engine import graph_reading
from htv.engine.checkpointing import RecentForwards, in_backward
from htv.engine.graph_reading import Knowledge
from htv.engine.group_spec import UNKNOWN
from htv.engine.provenance import FromParameters, Mark, OfBatch

__all__ = ["carried_marks"]


def carried_marks(
    tensors: list[tuple[str, object]], own_marks: dict[int, FromParameters], recent: RecentForwards
) -> tuple[dict[int, Mark], Knowledge | None]:
    """Read what earlier forwards know of a call's tensors off their autograd graphs.

    tensors:    (name, tensor or packed sequence) of the call's arguments.
    own_marks:  those of the parameters, by identity.
    recent:     forwards of which a checkpoint may run parts again by themselves.

    Returns the marks by identity, and what the forward knew that tells where the batch is, if any.
    """
    carried: dict[int, Mark] = {}
    earlier: list[Knowledge] = []
    graphed = [(n, t) for n, t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]
    checkpointed = _checkpointed_nodes(recent) if graphed and in_backward() else {}
    for name, tensor in graphed:
        reader = _Reader(own_marks, checkpointed)
        node, number = tensor.grad_fn, tensor.output_nr
        mark = graph_reading.mark_at(node, number, reader.batch_size, reader.known)
        sizes = {k.groups.batch_size for k in (*earlier, *reader.met)}
        if len(sizes) > 1:
            raise ValueError(
                f"argument {name!r} comes from forwards of "
                f"{' and '.join(map(str, sorted(sizes)))} examples: whose rows are whose cannot "
                "be told. Remedy: run the calls of one step inside `with handle.forward(batch):`"
            )
        if isinstance(mark, FromParameters) and mark.source is None:
            mark = FromParameters(mark.parameters, tensor)
        if isinstance(mark, (OfBatch, FromParameters)):
            carried[id(tensor)] = mark
            earlier += reader.met
    return carried, earlier[0] if earlier else None


def _checkpointed_nodes(recent: RecentForwards) -> dict[tuple[int, int], tuple]:
    return {
        (id(node), number): (node, mark, Knowledge(mode.groups, mode.spec, mode.batch.source))
        for node, number, mark, mode in recent.nodes()
    }


class _Reader:
    """Knows the marks that earlier forwards, of this handle or another, noted at one graph's nodes.

    met:  what the forwards met on the way knew.
    """

    def __init__(
        self, own_marks: dict[int, FromParameters], checkpointed: dict[tuple[int, int], tuple]
    ):
        self._own_marks, self._checkpointed = own_marks, checkpointed
        self.met: list[Knowledge] = []

    def batch_size(self) -> int:
        """Return how many examples there are, once something of the batch was met."""
        return self.met[0].groups.batch_size

    def known(self, node, number: int) -> Mark | None:
        """Return the mark of output `number` of `node`, where it is known without the node's
        inputs.
        """
        found = self._checkpointed.get((id(node), number))
        if found is not None:
            self.met.append(found[2])
            return found[1]
        noted = graph_reading.remembered(node, number)
        if noted is not None:
            self.met.append(noted[0])
            return noted[1]
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            return self._own_marks.get(id(leaf))
        grouped_rows = graph_reading.grouped_rows_of(node, number)
        if grouped_rows is not None:  # inside an earlier forward, which did not return this tensor
            self.met.append(
                Knowledge(grouped_rows.groups, UNKNOWN, "the batch of an earlier forward")
            )
            return grouped_rows.layout
        return None
