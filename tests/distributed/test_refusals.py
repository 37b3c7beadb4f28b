"""What several ranks get wrong is refused on all of them, and a failure never becomes a vote."""

from functools import partial

import pytest
import torch

import htv
from support import rank_misuse
from support.rank_models import aggregated, assert_one_vote, contributions
from support.ranks import Raised

# What every rank does, and what the error on each says.
REFUSED = {
    "not_served": r"htv.distributed.ddp\(ddp_model, handle\)",
    "different_rules": r"rank 0 has parameter 'a.weight'.*AndMask\(tau=0.4.*rank 1.*tau=0.5",
    "different_models": "rank 0 serves 2 parameters, rank 1 4",
    "different_votes": "rank 0 has vote='examples'; rank 1 has vote='ranks'",
    "different_stats": "rank 0 has vote='examples', stats=True; rank 1 has vote='examples'",
    "around_the_wrapper": "called by itself.*call what DistributedDataParallel",
    "a_hook_before": r"hook=\(state, that_hook\)",
    "called_twice": "call this once",
    "stepping_in_backward": "'c.weight' has a hook.*before the ranks have met",
    "stepping_in_backward_later": "'c.weight' has a hook.*before the ranks have met",
    "optimizer_in_backward_before_wrapping": "'c.weight' has an optimizer that steps in backward",
    "optimizer_in_backward_before": "'c.weight' has an optimizer.*after backward; or FSDP2",
    "optimizer_in_backward_before_local": "'c.weight' has an optimizer that steps in backward",
    "optimizer_in_backward_after": "'c.weight' has an optimizer that steps in backward",
    "optimizer_in_backward_after_a_step": "'c.weight' has an optimizer that steps in backward",
    "optimizer_in_backward_of_excluded": "'c.weight' has an optimizer that steps in backward",
    "second_wrapper": "another DistributedDataParallel was called around.*Remedy: call that one",
    "second_wrapper_of_more": "another DistributedDataParallel was called around",
    "wrapper_in_wrapper": "another DistributedDataParallel was called around.*that one alone",
    "second_wrapper_asked": r"call this once, for one.*handle.detach\(\), then htv.attach and",
    "served_inside_accumulate": r"inside handle.accumulate\(\).*before training, outside",
    "not_zeroed": r"\.grad of 'c.*' holds the aggregate of an earlier step.*zero_grad",
    "accumulated": r"accumulate\(\) where ranks vote together.*no_sync",
    "tokens": r"cannot be joined with tokens\(\)",
    "groups_on_two_ranks": "the group with id 0 has rows on ranks 0 and 1",
    "order_rule_without_meeting": r"order rules need.*no_sync\(\).*MedianOfMeans\(2\)",
    "order_rule_of_many_rows": r"would send 320,000 values.*1,600.*MedianOfMeans\(2\)",
    "group_of_order_rules": r"Median.*all.*accumulate\(\) has 2 backwards.*MedianOfMeans\(2\)",
    "group_of_order_rules_first": r"came after the ranks had counted.*MedianOfMeans\(2\)",
    "own_rule": "Own, the rule of parameter 'a.weight', is one of your own",
    "waiting_at_finish": r"wait for one in which the ranks meet \(1 so far\).*leave no_sync",
    "saved_in_a_step": r"state_dict\(\) in the middle of a step: 1 backward has",
    "buckets_of_unequal_ranks": "2 buckets of each rank.*equally many groups.*they have 4, 2",
    "buckets_of_unequal_size": r"2 buckets of each.*5 groups.*cannot be cut.*MedianOfMeans\(2\)",
    "a_bucket_without_groups": r"MedianOfMeans\(k=4\) needs at least 4 groups, got 2",
    "micro_batches_of_other_number": "2 micro-batches with equally.*rank 0 had 3 micro-batches",
    "micro_batches_of_unequal_size": "rank 1 had micro-batches of different sizes.*2 micro-batches",
    "buckets_reduced_by_parts": "set_requires_gradient_sync",
    "votes_after_the_count": r"came after the ranks had counted.*MedianOfMeans\(2\)",
    "order_rule_met_late": r"'b\..*under Distrib.* has 2 backwards.*MedianOfMeans\(2\)",
    "median_of_unequal_buckets": "equally many groups on all ranks, but they have 2, 3",
    "ignored_parameters": "parameter 'c.weight' is served, but DistributedDataParallel does not",
    "group_outside_accumulate": "with handle.accumulate",
    "old_sharding": "FullyShardedDataParallel.*Remedy: FSDP2",
    "not_sharded": "call fully_shard first",
    "sharded_but_not_served": r"htv.distributed.fsdp\(model, handle\)",
    "sharded_and_reentrant": "reentrant activation checkpoint under FSDP2.*use_reentrant=False",
    "replicas_of_order_rules": r"order rules over ranks with replicas \(HSDP\)",
    "replicas_of_voters": "vote='ranks' with replicas that are not sharded.*a mesh of one dim",
    "voters_reduced_by_parts": "each rank is one voter.*set_requires_gradient_sync",
    "a_part_not_sharded": "parameter 'n.weight' is served, but in no unit of fully_shard",
    "one_rank_skips_a_step": "ranks are at different steps",
    "backward_again": "outside no_sync.*once per forward",
    "two_forwards_first": "outside no_sync.*once per forward",
    "forward_alone_in_no_sync": "outside no_sync.*never where the forward was inside",
    "evaluated_with_gradients": r"under no_sync\(\), but.*an evaluation.*torch.no_grad\(\)",
    "backward_alone_in_no_sync": r"under no_sync\(\), but.*forward and backward.*both under",
    "layer_skipped_on_one_rank": "ranks are at different parameters.*the same layers to run",
    "part_sharded_late": "fully_shard was called on part 'c' after htv.distributed.fsdp.*in this",
    "root_sharded_late": "fully_shard was called on the model after htv.distributed.fsdp",
    "sharded_and_failed": "an earlier backward under FSDP2 failed part-way.*from a checkpoint",
    "sharded_and_failed_first": "an earlier backward under FSDP2 failed part-way",
    "sharded_whole_and_failed": "an earlier backward under FSDP2 failed part-way",
    "sharded_and_failed_in_micro_batch": "an earlier backward under FSDP2 failed part-way",
    "wrapped_and_failed": "Expected to have finished reduction",  # DistributedDataParallel's own
    "one_backward_per_head": "did not reach all of the model's parameters.*sum of the losses",
    "two_handles": "another handle vote under this DistributedDataParallel already",
    "unfrozen_after_wrapping": "'b.weight' was frozen when DistributedDataParallel wrapped",
    "dropped_in_part": "'b.weight' was changed while sums and votes of 1 backward.*whole model",
    "dropped_before_its_backward": "is gone, while their votes are counted",
    "unit_left_out_of_the_last": "parameters b.bias, b.weight had a gradient in some micro-batch",
    "layers_take_turns": "parameters a.bias, a.weight, b.bias, b.weight had a gradient in some",
    "shards_dropped": r"changed, by zero_grad\(\) perhaps, between micro-batches",
    "shards_zeroed": r"changed, by zero_grad\(\) perhaps, between micro-batches",
    "divide_factor_after": r"changed after htv.distributed.fsdp\(.*set a divide factor before",
    "all_reduce_hook_after": r"changed after htv.distributed.fsdp\(",
    "group_not_zeroed": "holds the aggregate of an earlier vote already",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_all_ranks(ranks, name):
    found = ranks.outcomes(getattr(rank_misuse, name), 2)
    for rank, result in enumerate(found):
        assert isinstance(result, Raised), f"rank {rank} went on"
        assert pytest.RaisesExc(Exception, match=f"(?s){REFUSED[name]}").matches(
            Exception(result.message)
        ), result.message


def test_one_voter_in_all_is_refused(ranks):
    found = ranks.outcomes(rank_misuse.one_example_in_all, 1)
    assert "all groups of a step, on 1 rank, together" in found[0].message


@pytest.mark.parametrize("name", ["one_rank_raises", "one_rank_dies"])
def test_a_failure_in_backward_ends_all_ranks(ranks, name):
    found = ranks.outcomes(getattr(rank_misuse, name), 2, patience=8)
    assert isinstance(found[0], Raised)
    assert found[1] is None if name == "one_rank_dies" else found[1].kind == "ZeroDivisionError"


def test_after_detach(ranks):
    contributed = contributions("net", [6, 6])
    found = ranks.run(rank_misuse.after_detach, 2)
    assert_one_vote([plain for plain, _ in found], aggregated(contributed, htv.Mean()))
    assert_one_vote([voted for _, voted in found], aggregated(contributed, rank_misuse.AND))


def test_a_second_wrapper_after_detach(ranks):
    expected = aggregated(contributions("net", [6, 6]), rank_misuse.AND)
    assert_one_vote(ranks.run(rank_misuse.second_wrapper_after_detach, 2), expected)


@pytest.mark.parametrize("set_to_none", [True, False], ids=["to None", "to zeros"])
@pytest.mark.parametrize("views", [False, True], ids=["", "views of buckets"])
def test_a_micro_batch_that_zero_grad_drops_has_no_votes(ranks, set_to_none, views):
    job = partial(rank_misuse.dropped_micro_batch, set_to_none=set_to_none, views=views)
    contributed = contributions("net", [6, 6])
    assert_one_vote(ranks.run(job, 2), aggregated(contributed, rank_misuse.AND))


def test_groups_of_one_rank_each(ranks):
    found = ranks.run(rank_misuse.groups_on_one_rank_each, 2)
    contributed = {k: c.unflatten(0, (6, 2)).sum(1) for k, c in contributions("net").items()}
    assert_one_vote(found, aggregated(contributed, rank_misuse.AND))


@pytest.mark.parametrize("examples", [126, 128, 254, 256, 2048, 2050, 4096])
def test_numbers_of_voters_that_outgrow_a_type(ranks, examples):
    """SignSum is the votes themselves: equal to the bit to those of one process."""
    for found, alone in ranks.run(rank_misuse.many_voters, 2, examples):
        for name, votes in alone.items():
            assert torch.equal(found[name], votes)
