"""Several ranks without `htv.distributed`: each would vote alone, so every rule but Mean raises, in
whatever order things are wrapped.
"""

import pytest

import htv
from support.rank_alone import trained_alone
from support.ranks import Raised, Ranks

pytest.importorskip("torch.distributed")


@pytest.fixture(scope="module")
def ranks():
    processes = Ranks()
    yield processes
    processes.close()


@pytest.mark.parametrize("order", ["before", "after", "wrapper"])
def test_data_parallel(ranks, order):
    for result in ranks.outcomes(trained_alone, 2, "ddp", order, htv.AndMask(0.4)):
        assert "DistributedDataParallel on 2 ranks: each rank would vote alone" in result.message
        assert "htv.distributed.ddp(ddp_model, handle)" in result.message
    assert ranks.run(trained_alone, 2, "ddp", order, htv.Mean()) == [True, True]


def test_sharded_models(ranks):
    for order in ("before", "after"):
        for result in ranks.outcomes(trained_alone, 2, "fsdp2", order, htv.AndMask(0.4)):
            assert "htv.distributed.fsdp(model, handle)" in result.message
        for result in ranks.outcomes(trained_alone, 2, "tensor parallel", order, htv.AndMask(0.4)):
            assert "sharded over ranks" in result.message


@pytest.mark.parametrize("stack", ["fsdp2", "tensor parallel"])
def test_sharded_after_attaching_the_mean(ranks, stack):
    for result in ranks.outcomes(trained_alone, 2, stack, "before", htv.Mean()):
        assert isinstance(result, Raised)
        assert "parameters changed while attached" in result.message


@pytest.mark.parametrize("stack", ["fsdp2", "tensor parallel"])
def test_the_mean_of_sharded_models_is_plain(ranks, stack):
    assert ranks.run(trained_alone, 2, stack, "after", htv.Mean()) == [True, True]


def test_accumulation_over_ranks(ranks):
    for result in ranks.outcomes(trained_alone, 2, "accumulate", "before", htv.Mean()):
        assert "accumulate() with 2 ranks" in result.message
        assert "process_group=" in result.message
