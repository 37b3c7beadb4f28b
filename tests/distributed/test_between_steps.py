"""Between the steps of many ranks, checkpoints, state_dict() and averages of weights do no harm."""

import pytest
import torch

import htv
from support import rank_misuse
from support.rank_jobs import looked_at
from support.rank_models import aggregated, assert_one_vote, contributions

AND = htv.AndMask(0.4)


@pytest.mark.parametrize("way", ["ddp", "fsdp", "accumulate"])
def test_what_is_looked_at_between_steps(ranks, way, tmp_path):
    alone = ranks.run(looked_at, 2, AND, way, None)
    for (plain, _, _), (found, states, average) in zip(
        alone, ranks.run(looked_at, 2, AND, way, str(tmp_path)), strict=True
    ):
        assert len(states) == 6
        for name, value in found.items():
            assert torch.equal(value, plain[name]), f"{name} was trained otherwise"
            assert torch.equal(states[-1][name], value)
            held = states[0][name]
            for state in states[1:]:
                held = 0.75 * held + 0.25 * state[name]
            torch.testing.assert_close(average[name], held, rtol=0, atol=1e-12)


def test_a_copy_of_the_wrapper_is_plain_and_may_vote(ranks):
    contributed = contributions("net", [6, 6])
    found = ranks.run(rank_misuse.copied_wrapper, 2)
    assert_one_vote([plain for plain, _ in found], aggregated(contributed, htv.Mean()))
    assert_one_vote([voted for _, voted in found], aggregated(contributed, AND))
