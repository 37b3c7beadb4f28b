"""What htv says of the batch in the results of torch's functions, against an oracle that changes
one example at a time (`support.operations`).
"""

import warnings

import pytest
import torch
from torch import Tensor

from htv.engine import torch_ops
from htv.engine.torch_ops import plain_name

pytest.importorskip("expecttest", reason="torch's own samples need it: the extra `test`")
from support import operations  # noqa: E402

TABLES = [
    "ALIASES ALONG BORROWING COMPARING CONCATENATING DIAGONALS ELEMENTWISE EXPANDING KEEPS_LAST",
    "LOSSES LOSSES_BY_TERMS LOSSES_OF_CLASSES MOVING MULTIPLYING OF_SEVERAL PAIRED PERMUTING",
    "REDUCING RESHAPING ROWWISE SHUFFLING TERMS UNARY",
]
# What torch calls so, but does not list among what a mode may see.
UNLISTED = set(
    """hardsigmoid hardswish itruediv rtruediv pos rand_like randn_like randint_like requires_grad_
    pack_padded_sequence vector_norm unsafe_view upsample mm dsmm spmm""".split()
)
# A few of every kind; all of them are tried by the slow test.
SAMPLE = set(
    """torch.add torch.Tensor.addcmul_ torch.linalg.solve torch.linalg.eigh torch.linalg.cross
    torch.fft.rfftn torch.special.xlogy torch.baddbmm torch.functional.cdist torch.quantile
    torch.std_mean torch.diagonal torch.scatter torch.Tensor.masked_scatter torch.renorm torch.kron
    torch.nn.functional.pad torch.nn.functional.grid_sample torch.nn.functional.interpolate
    torch.nn.functional.cross_entropy torch.nn.functional.batch_norm torch.functional.tensordot
    torch.nn.functional.kl_div torch.sort torch.cumsum torch.gather torch.stack""".split()
)


@pytest.fixture(scope="module")
def infos():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return operations.samples()


def mistaken(found: dict[str, operations.Judged]) -> dict[str, list[str]]:
    return {n: j.wrong for n, j in found.items() if j.wrong and n not in operations.RANDOM}


def test_every_name_in_the_tables_is_one_of_torchs():
    raw = {
        getattr(function, "__name__", "").strip("_").partition(".")[0]
        for function in operations.functions().values()
    } | {plain_name(function) for function in operations.functions().values()}
    unknown = {
        name: sorted(set(getattr(torch_ops, name)) - raw - UNLISTED)
        for line in TABLES
        for name in line.split()
    }
    assert {name: left for name, left in unknown.items() if left} == {}
    for name in UNLISTED:
        owners = (torch, Tensor, torch.nn.functional, torch.linalg, torch.ops.aten)
        written = (name, f"_{name}", f"__{name}__")
        assert any(hasattr(o, w) for o in owners for w in written) or name in (
            "pack_padded_sequence",
        ), name


def test_a_sample_of_functions_keeps_no_batch_that_is_not_there(infos):
    functions = operations.functions()
    assert SAMPLE <= functions.keys()
    found = {name: operations.judged(name, functions[name], infos) for name in sorted(SAMPLE)}
    assert mistaken(found) == {}
    kept = {name for name, judged in found.items() if judged.kept}
    assert SAMPLE - kept == {"torch.nn.functional.batch_norm"}  # whose statistics are the batch's


def test_the_oracle_notices_what_is_believed_by_mistake(infos, monkeypatch):
    """A table entry too many: of what sorts along dim 0, wherever the batch is."""
    monkeypatch.setattr(torch_ops, "UNARY", torch_ops.UNARY | {"msort"})
    from htv.engine import propagation

    monkeypatch.setattr(propagation, "BROADCASTING", torch_ops.BROADCASTING | {"msort"})
    judged = operations.judged("torch.msort", torch.msort, infos)
    assert judged.wrong


@pytest.mark.slow
def test_no_function_keeps_a_batch_that_is_not_there():
    verdicts, found = operations.all_verdicts()
    assert mistaken(found) == {}
    assert [name for name, value in verdicts.items() if value == operations.UNJUDGED] == []
    written = operations.PATH.read_text()
    if f"torch {torch.__version__.partition('+')[0]}." in written:  # another's functions differ
        assert kinds(operations.text(verdicts)) == kinds(written), (
            "run: PYTHONPATH=tests python -m support.operations"
        )


def kinds(text: str) -> dict[str, str]:
    """The verdict of every function, without in how many placements, which time decides."""
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {row[0]: row[1].removesuffix(" |").partition(",")[0] for row in rows}
