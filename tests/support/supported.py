"""docs/supported.md: what is served exactly or refused clearly, and the test that shows it.

    PYTHONPATH=tests python -m support.supported     # writes it anew

Layers and refusals come from the tables the tests run over; other rows stand here.
"""

from __future__ import annotations

import ast
from pathlib import Path

from test_refusals import MIXING, REORDERED, SIZED, UNSUPPORTED

import htv  # noqa: F401, so that the tables find the package before the tests' folder does
from support.layer_table import TABLE

TESTS = Path(__file__).resolve().parents[1]
PATH = TESTS.parent / "docs" / "supported.md"
EXACT, REFUSED = "served exactly", "refused clearly"

Row = tuple[
    str, str, str
]  # what, EXACT or REFUSED or both, the tests as "file: function, function; file: ..."

WHO_VOTES: list[Row] = [
    ("every example", EXACT, "layers: test_layer"),
    ("groups by ids, unsorted, of unequal size", EXACT,
     "layers: test_layer_by_unsorted_groups_of_unequal_size"),
    ("environments whose means count once", EXACT,
     "voting: test_environments_whose_means_count_once"),
    ("packed sequences, (total, d) or (1, total, d)", EXACT,
     "attach: test_packed_sequences_in_both_layouts"),
    ("packed sequences whose means count once", EXACT,
     "voting: test_packed_sequences_whose_means_count_once"),
    ("every token, all or those of a mask", EXACT,
     "voting: test_every_token_votes, test_tokens_of_a_whole_model; layers: "
     "test_tokens_of_elementwise_parameters"),
    ("tokens taken out of their order, recurrent layers under tokens()", REFUSED,
     "refusals: test_tokens_out_of_their_order, test_recurrent_layers_where_tokens_vote, "
     "test_a_parameter_that_some_tokens_use_more_than_once"),
    ("inputs that have the batch's size by chance", f"{EXACT}, or refused",
     "refusals: test_positions_as_an_input, test_a_hidden_state_as_an_input"),
    ("programs of random operations, with sizes that coincide", f"{EXACT}, or refused",
     "layout: test_random_programs, test_views_of_what_is_written_to"),
    ("each of torch's functions before a layer: docs/operations.md", f"{EXACT}, or refused",
     "operations: test_no_function_keeps_a_batch_that_is_not_there"),
    ("operators and functions of other libraries named as torch's", REFUSED,
     "unseen: test_what_mixes_examples_unseen_is_refused"),
    ("tokens where a layer has none (convolutions, positions)", REFUSED,
     "voting: test_what_has_no_tokens_is_refused"),
    ("the batch in dim 1: sequence-first models", EXACT,
     "layers: test_sequence_first_models; voting: test_examples_in_dim_1"),
    ("a batch of one example", EXACT, "layers: test_layer_of_one_example"),
    ("padding masks", EXACT, "voting: test_padded_tokens_change_nothing; models: test_model"),
    ("excluded parameters beside served ones, whoever votes", EXACT,
     "voting: test_excluded_parameters_are_plain_whoever_votes; layers: "
     "test_excluded_parameters_beside_served_ones"),
    ("as many examples as tokens, features or heads", EXACT,
     "layers: test_layer_where_sizes_coincide"),
    ("constants of size 1 beside the batch, in any order; examples in containers and objects",
     EXACT,
     "batch_choice: test_size_one_beside_larger_sizes_is_a_constant, "
     "test_the_order_of_keyword_arguments_decides_nothing, test_examples_in_a_container"),
    ("arguments whose sizes disagree", f"{EXACT} once one is named, or refused",
     "batch_choice: test_sizes_that_disagree_are_refused_until_one_is_named, "
     "test_ids_say_how_many_examples_there_are"),
    ("one group alone under a rule that needs several", f"{REFUSED}, or {EXACT} with allow_single",
     "batch_choice: test_one_voter_is_refused_unless_it_is_meant"),
    ("a PackedSequence as the model's input, by example or by ids", EXACT,
     "batch_choice: test_the_examples_of_a_packed_sequence_vote, test_groups_of_packed_examples"),
    ("nested and sparse inputs", REFUSED,
     "batch_choice: test_layouts_without_rows_are_refused_by_name"),
    ("parts called one by one: by a training step, an agent, a closure, several models",
     f"{EXACT}, or refused",
     "parts_called_alone: test_a_forward_continues_what_an_earlier_one_knew, "
     "test_a_method_is_served_by_name, test_a_block_follows_what_is_computed_between_the_calls, "
     "test_a_closure_that_forward_returned, "
     "test_what_an_operation_between_forwards_loses_is_refused"),
    ("forwards of different numbers of voters under one loss", REFUSED,
     "parts_called_alone: "
     "test_forwards_of_different_numbers_of_voters_under_one_loss_are_refused_across_parameters"),
    ("torch.jit.script, custom Functions and writes in place inside a forward",
     f"{EXACT}, or refused",
     "unseen: test_what_mixes_examples_unseen_is_refused, "
     "test_what_is_declared_tried_or_told_by_its_graph_is_followed"),
    ("parameters written into the batch, what is computed from them written to in place, sparse "
     "weights, loops over the examples", EXACT, "written: test_as_one_example_at_a_time"),
    ("loops that bring examples together", REFUSED,
     "written: test_loops_that_bring_examples_together_are_refused"),
    ("hypernetworks, torch.func.functional_call, block_diag, complex scales and other idioms of "
     "model code", f"{EXACT}, or refused",
     "idioms: test_idioms_that_are_served, test_idioms_that_are_refused_and_their_remedies"),
    ("custom Functions of parameters alone (quantisation, straight-through)", EXACT,
     "unseen: test_a_function_of_parameters_alone_is_a_computed_weight"),
    ("torch.vmap and other transforms of torch.func, without parameters inside", EXACT,
     "refusals: test_what_is_mapped_without_parameters_is_followed"),
    ("served layers inside torch.vmap, torch.func.grad; torch.vmap over parameters", REFUSED,
     "refusals: test_what_a_transform_hides_is_refused_and_its_remedies_work"),
    ("similarities of all examples returned beside what the loss uses", EXACT,
     "unseen: test_a_pair_of_towers_whose_similarities_no_loss_uses"),
    ("bags given by offsets, of any length: as the batch, of packed() ids, beside other features",
     EXACT,
     "bags: test_bags_that_the_offsets_say, test_bags_that_packed_says, test_weights_of_ids, "
     "test_bags_of_several_tables_beside_dense_features, test_the_layer_alone_knows_its_batch"),
    ("bags that cut examples, where tokens vote or under torch.compile", REFUSED,
     "bags: test_ids_that_are_no_bags_are_refused_and_both_remedies_work, "
     "test_one_offset_more_than_bags_names_the_block_to_use, "
     "test_bags_where_tokens_vote_and_where_offsets_fall, "
     "test_a_compiled_model_refuses_bags_by_offsets"),
    ("ids or bounds that do not fit, an empty batch", REFUSED,
     "refusals: test_groups_and_packed_of_the_wrong_length, test_empty_batch_and_too_few_groups"),
]  # fmt: skip
TRAINING: list[Row] = [
    ("two forwards before one backward", EXACT,
     "attach: test_two_forwards_before_one_backward_are_one_vote"),
    ("two forwards with different groups under one loss", REFUSED,
     "refusals: test_two_forwards_with_different_groups_in_one_backward"),
    ("several backwards, retain_graph", EXACT,
     "attach: test_two_backwards_each_aggregate_and_accumulate; "
     "training: test_every_backward_of_its_own_is_a_vote_of_its_own"),
    ("DistributedDataParallel, FSDP2, DTensors: Mean()", EXACT,
     "ranks: test_data_parallel, test_the_mean_of_sharded_models_is_plain"),
    ("DistributedDataParallel with `htv.distributed.ddp`", EXACT,
     "distributed/data_parallel: test_streaming_rules, "
     "test_order_rules_over_the_examples_of_all_ranks, test_settings"),
    ("FSDP2 and HSDP with `htv.distributed.fsdp`", EXACT,
     "distributed/fully_sharded: test_streaming_rules, test_hybrid_sharding, test_settings"),
    ("a process group alone, `attach(process_group=...)`", EXACT,
     "distributed/process_group: test_rules"),
    ("pipelines, ScheduleGPipe and Schedule1F1B, with `htv.distributed.pipeline`", EXACT,
     "distributed/pipeline: test_micro_batches_vote_together"),
    ("Hugging Face Trainer, SFTTrainer of TRL, Accelerate, Lightning, with `htv.integrations`",
     EXACT,
     "integrations/huggingface: test_one_process; integrations/trl: test_one_process; "
     "integrations/accelerate: test_one_process; integrations/lightning: test_one_process"),
    ("the fused head of TRL, with `htv.integrations.trl.show_head`", f"{EXACT}, refused without",
     "integrations/trl: test_a_shown_head_votes, "
     "test_a_head_that_is_not_shown_is_refused_and_what_has_none_is_told"),
    ("nn.LinearCrossEntropyLoss, F.linear_cross_entropy, also in chunks", EXACT,
     "linear_cross_entropy: test_the_head_is_a_linear_layer, test_a_head_tied_to_the_embedding"),
    ("several ranks without these; FSDP1; tensor parallelism; every other misuse of ranks",
     REFUSED,
     "ranks: test_data_parallel, test_sharded_models; "
     "distributed/refusals: test_refused_on_all_ranks"),
    ("a rank that fails in backward", REFUSED,
     "distributed/refusals: test_a_failure_in_backward_ends_all_ranks"),
    ("a tensor that takes a parameter's place during the forward", REFUSED,
     "unseen: test_a_hook_that_exchanges_a_parameter_is_refused"),
    ("trainers' own accumulation: each micro-batch votes alone", "warned of once",
     "interrupted: test_a_backward_onto_an_aggregate_warns_once; "
     "looks_as_before: test_trainer_keeps_its_columns_and_its_accumulation_is_warned_of"),
    ("readers of the forward's signature and code; wrappers of it", EXACT,
     "looks_as_before: test_readers_of_the_forward_see_the_plain_one, "
     "test_a_forward_wrapped_by_its_function_is_still_served, "
     "test_generate_infers_the_padding_mask"),
    ("torch.jit.script, torch.jit.trace and torch.export of an attached model", REFUSED,
     "looks_as_before: test_exporters_are_told_to_detach"),
    ("interrupts and failures: the next step is right, nothing is kept", EXACT,
     "interrupted: test_an_interrupt_at_any_line_wedges_nothing, "
     "test_failed_backwards_keep_nothing, test_a_failed_micro_batch_leaves_no_half_counted_votes, "
     "test_a_detached_model_is_freed_at_once"),
    ("gradient accumulation, `with handle.accumulate():`, `handle.finish()`", EXACT,
     "accumulation: test_streaming_rules_equal_one_large_batch, test_a_long_block_with_finish, "
     "test_checkpoints_do_not_vote_twice"),
    ("rules of one's own (`htv.Rule.reduce`)", EXACT,
     "open_rules: test_copies_of_htvs_rules_agree_with_them, "
     "test_what_nobody_contributes_to_is_reduced_too, test_tokens_vote"),
    ("rules of one's own over micro-batches", REFUSED,
     "open_rules: test_accumulation_is_refused_by_name"),
    ("order rules over micro-batches", REFUSED,
     "accumulation: test_order_rules_are_refused_and_name_median_of_means"),
    ("torch.autograd.grad, of some parameters only", EXACT,
     "lifecycle: test_gradients_of_some_parameters_leave_no_factors_of_the_others"),
    ("gradients of the input", EXACT, "attach: test_input_gradients_stay_plain"),
    ("optimizers, clipping", EXACT, "attach: test_any_optimizer_and_clipping_work_unchanged"),
    ("several losses of one forward", EXACT,
     "training: test_several_losses_of_one_forward_are_one_vote"),
    ("autocast in bfloat16 and float16", EXACT,
     "training: test_autocast; attach: "
     "test_gradients_have_the_type_of_their_parameter_under_autocast"),
    ("GradScaler", EXACT,
     "training: test_gradient_scaling, test_a_scaled_step_with_infinities_is_skipped"),
    ("float32 and bfloat16 models", EXACT,
     "layers: test_layer_in_lower_types; check: test_whole_models_in_lower_types"),
    ("torch.compile(fullgraph=True)", EXACT,
     "compile: test_same_gradients, test_uses_of_parameters"),
    ("torch.compile before attach", EXACT, "compile: test_attach_what_was_compiled_before"),
    ("results of compiled models: dicts, dataclasses, caches of Hugging Face's models", EXACT,
     "compile: test_results, test_a_causal_model_returns_its_cache"),
    ("computed weights, rows picked by values, compiled without fullgraph: eagerly", EXACT,
     "compile: test_without_fullgraph_it_runs_eagerly"),
    ("the same with fullgraph=True", REFUSED, "compile: test_refused"),
    ("functions and parts of a model compiled by themselves: eagerly", EXACT,
     "compile: test_a_part_compiled_by_itself_runs_eagerly, "
     "test_a_compiled_helper_is_neither_traced_with_htv_nor_compiled_again"),
    ("torch.compile: groups, packed sequences, tokens, accumulation", EXACT,
     "compile: test_groups_change_without_compiling_again, "
     "test_packed_sequences_change_without_compiling_again, "
     "test_tokens_vote, test_accumulation"),
    ("weight averages (EMA, SWA)", EXACT,
     "training: test_averaged_copies_follow_an_attached_model"),
    ("activation checkpointing, non-reentrant", EXACT,
     "attach: test_activation_checkpointing; training: test_checkpointed_layers; "
     "lifecycle: test_a_layer_used_in_a_checkpoint_and_elsewhere"),
    ("checkpointed parts whose inputs have the batch in another dim",
     f"{EXACT}, reentrant ones refused",
     "training: test_checkpointed_blocks_with_the_batch_elsewhere"),
    ("gradient checkpointing as Hugging Face switches it on", EXACT,
     "models: test_gradient_checkpointing"),
    ("activation checkpointing, reentrant", f"{EXACT}, or refused",
     "lifecycle: test_reentrant_checkpoints_of_several_layers_and_inside_one_another, "
     "test_a_layer_used_in_a_checkpoint_and_elsewhere"),
    ("a checkpointed function that uses parameters directly", REFUSED,
     "lifecycle: test_recomputation_outside_the_mode_fails_loudly"),
    ("forwards under no_grad; eval mode", EXACT,
     "attach: test_forwards_without_gradient_are_untouched; layers: "
     "test_outputs_are_those_of_the_plain_model"),
    ("dropout", EXACT, "layers: test_noise_is_that_of_the_plain_model"),
    ("parameters frozen and unfrozen", EXACT, "attach: test_frozen_then_unfrozen_parameters"),
    ("excluded parameters, a rule for each", EXACT, "attach: test_exclude_and_callable_rules"),
    ("tensor hooks on parameters", EXACT,
     "lifecycle: test_tensor_hooks_on_parameters_act_once_on_the_gradient"),
    ("deepcopy, pickle and torch.save of an attached model", EXACT,
     "lifecycle: test_copies_of_an_attached_model_are_detached"),
    ("state_dict, and the model after detach", EXACT,
     "attach: test_detach_restores_the_model_exactly; "
     "training: test_state_dicts_pass_between_attached_and_plain_models"),
    ("parameters exchanged while attached", REFUSED,
     "lifecycle: test_parameters_replaced_while_attached"),
    ("derivatives of the input in the loss, of any order: differential equations, energies and "
     "forces, gradient penalties, score matching", EXACT,
     "input_derivatives: test_an_ordinary_differential_equation, test_second_derivatives, "
     "test_fourth_derivatives, test_energies_and_forces, test_gradient_penalty_of_a_critic, "
     "test_score_matching, test_slopes_at_the_embedded_tokens"),
    ("first and second derivatives by the inputs of all layers above that have a derivative", EXACT,
     "input_derivatives: test_layer"),
    ("the same by groups, packed sequences, tokens, micro-batches, in lower types", EXACT,
     "input_derivatives: test_groups_by_unsorted_ids, test_groups_whose_means_count_once, "
     "test_packed_sequences, test_every_point_votes, test_micro_batches, test_lower_types"),
    ("the same beside frozen and excluded parameters", EXACT,
     "input_derivatives: test_frozen_parameters, test_excluded_parameters, "
     "test_gradients_of_excluded_parameters_have_graphs_too"),
    ("derivatives of the input that a forward takes and goes on with", EXACT,
     "input_derivatives: test_derivatives_that_a_forward_goes_on_with"),
    ("derivatives of the input without create_graph=True: no votes", EXACT,
     "input_derivatives: test_derivatives_without_a_graph_are_no_votes"),
    ("derivatives of the input under DistributedDataParallel and process groups", EXACT,
     "distributed/input_derivatives: test_data_parallel, test_a_process_group_alone"),
    ("derivatives of what brings examples together; batches of derivatives", REFUSED,
     "input_derivatives: test_derivatives_of_what_mixes_examples, test_batches_of_gradients, "
     "test_derivatives_of_what_a_forward_mixes_are_lost"),
    ("derivatives of the input in sharded and in compiled models", REFUSED,
     "distributed/input_derivatives: test_sharded_models_are_refused; compile: test_refused"),
    ("create_graph=True by served parameters", REFUSED,
     "refusals: test_double_backward; input_derivatives: test_derivatives_by_parameters"),
    ("penalties on weights in the loss", REFUSED,
     "refusals: test_a_path_to_a_parameter_outside_the_forward"),
    ("custom autograd.Functions that use parameters", REFUSED,
     "refusals: test_a_custom_function_inside_the_forward"),
    ("losses that compare examples, behind the model", EXACT,
     "refusals: test_coupling_that_needs_no_parameter_to_follow"),
    ("distributions of which a parameter is learnt for all examples, with ratios and entropies",
     EXACT, "distributions: test_a_step_of_an_agent; layers: test_layer"),
    ("the entropy of a distribution that never meets the batch", REFUSED,
     "distributions: test_an_entropy_of_parameters_alone_is_no_examples"),
    ("contrastive losses, of towers, views and anchors (docs/contrastive.md)", EXACT,
     "contrastive: test_a_row_is_its_examples, test_similarities_inside_the_forward, "
     "test_two_views_of_an_image_vote_together, test_anchors_vote_as_micro_batches"),
    ("parameters on similarities of all examples with all", REFUSED,
     "contrastive: test_refusals_and_their_remedies, test_the_loss_inside_hugging_faces_model, "
     "test_a_layer_on_the_similarities_is_refused_at_once"),
    ("complex parameters", REFUSED, "refusals: test_complex_parameters"),
    ("integer parameters; lazy ones", f"{EXACT}, or refused",
     "lifecycle: test_integer_and_uninitialized_parameters"),
    ("threads", EXACT, "lifecycle: test_threads_are_served_apart"),
    ("exceptions in forward or backward, forwards without a backward: nothing leaks into the next "
     "step",
     EXACT,
     "training: test_nothing_of_a_failed_step_reaches_the_next"),
    (
        "handle.stats(), over micro-batches and ranks",
        EXACT,
        "attach: test_stats; accumulation: test_how_far_all_micro_batches_agree; "
        "distributed/agreement: test_rules_that_send_votes",
    ),
    (
        "state_dict(), checkpoints and averages of weights between the steps of many ranks",
        EXACT,
        "distributed/between_steps: test_what_is_looked_at_between_steps",
    ),
]  # fmt: skip
BATCH_NORM: list[Row] = [
    ("in eval mode", EXACT, "layers: test_layer"),
    ("in train mode", REFUSED, "refusals: test_batch_norm_in_train_mode"),
    ("in train mode, attach(..., batch_norm=\"frozen\")", EXACT,
     "batchnorm: test_frozen_is_eval_of_the_batch_norms"),
    ("in train mode, attach(..., batch_norm=\"shared\")", "rows' parts of the plain gradient",
     "batchnorm: test_shared_statistics"),
    ("exchanged for GroupNorm by htv.replace_batchnorm", EXACT,
     "batchnorm: test_a_replaced_model_is_served"),
    ("written by hand", REFUSED, "refusals: test_unsupported_use"),
]  # fmt: skip
MODELS: list[Row] = [
    ("MLP, language model with a tied head, ViT, ResNet-18 with GroupNorm", EXACT,
     "attach: test_whole_model"),
    ("the following with as many tokens as examples", EXACT,
     "models: test_as_many_tokens_as_examples"),
    ("the following by groups", EXACT, "models: test_examples_vote_in_groups"),
]  # fmt: skip


DERIVATIVES = """
## Derivatives of the input in more detail

    x.requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (slope - f(u)).square().mean().backward()

- The derivative uses the model's parameters once more. These uses vote together with those of the
  forward: one vote per parameter, in the loss's own backward. Derivatives of derivatives (`u_xx`)
  are taken alike, in a loss or inside a forward.
- An example's contribution is what flows through its rows, here as everywhere. So differentiate a
  sum of what each example has: `u.sum()`, `energy.sum()`. Where examples are brought together
  before that (the square of a sum, a norm or a softmax over the batch, similarities), it is
  refused, as far as the graph shows it. What multiplies an example's row by its neighbour's
  (`u * u.roll(1, 0)`) is not noticed: contributions then are those of rows, and no example's own.
- Refused: `create_graph=True` by served parameters, `is_grads_batched=True` and `vectorize=True`
  of `torch.autograd.functional` (without it `jacobian` and `hessian` are served), sharded and
  compiled models. Torch itself refuses torch.func and reentrant checkpoints.
- Torch's attention has a second derivative under `sdpa_kernel(SDPBackend.MATH)` alone.
- Torch's `layer_norm` and `instance_norm` have wrong third derivatives, as a loss of second ones
  needs them: mean and standard deviation are taken for constants there. Those of a layer norm with
  a served scale or shift are right; without these parameters, and in an instance norm, they are
  torch's.
"""

COMPILED = """
## torch.compile in more detail

- Before or after `attach`, also with `fullgraph=True`. Where Dynamo gives the graph up (without \
`fullgraph`), the
  forward runs eagerly as a whole.
- Compiled once for each shape of the inputs; torch's `recompile_limit` (8) applies. New values \
in `groups`, `packed`
  and `tokens` do not compile again; they are checked in backward.
- What it cannot trace htv says before anything is compiled. With `fullgraph=True` that is an
  error; without, the forward runs eagerly, served as always, and `TORCH_LOGS=graph_breaks` shows
  why: layers that compute with a computed weight (weight norm, merged adapters, einsum with a
  block per head); rows picked by the values of a tensor; bags given by offsets; convolutions with
  a weight for every example; derivatives of the input; global tensors and tensors in lists;
  forwards that set attributes of modules; results other than tensors and constants in tuples,
  lists, dicts, dataclasses and objects that the forward made of them, as caches are; a rule of
  your own.
- Functions and parts of a model that are compiled by themselves run eagerly inside an attached
  model's eager forward, as if under `torch.compiler.set_stance("force_eager")`: compile the whole
  model for speed.
- Two compiled forwards under one loss are refused, unless one compiled function calls both.
- Dynamo itself refuses `nn.LSTM`, `nn.GRU` and `nn.RNN` unless `torch._dynamo.config.allow_rnn = \
True`.
- Attributes of modules that are tensors, numbers, strings, booleans or None are guarded; after a \
change inside
  another object (a config, a list) call `torch._dynamo.reset()`.
- Errors raised while compiling carry htv's words inside Dynamo's exception types. Inside \
`accumulate()` `.grad` holds
  zeros until the block ends.
"""


def zoo() -> list[str]:
    """Names of the models in zoo.py, which needs more than the tests do to be imported."""
    dicts = {
        target.id: node.value
        for node in ast.parse((TESTS / "support" / "zoo.py").read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assigned = [
        d for name in ("TEXT", "MODELS") for d in ast.walk(dicts[name]) if isinstance(d, ast.Dict)
    ]
    return [ast.literal_eval(key) for d in assigned for key in d.keys]


def text() -> str:
    """What docs/supported.md should hold."""
    lines = [
        "# What is supported",
        "",
        "Written by `PYTHONPATH=tests python -m support.supported` from the tables the tests run "
        "over; a test fails where it is not current.",
        "",
        f"*{EXACT.capitalize()}*: the gradient is that of one group at a time, by the rules, in "
        "float64 to rounding;",
        f"outputs are those of the plain model. *{REFUSED.capitalize()}*: an error names "
        "parameter, operation and",
        "remedy before any gradient is touched.",
    ]
    for section, rows in TABLE.items():
        lines += _section(section, [(name, EXACT, "layers: test_layer") for name in rows])
    reordered = [(name, EXACT, "refusals: test_examples_in_another_order") for name in REORDERED]
    lines += _section("Examples in another order", reordered)
    lines += _section(
        "Uses that are not served",
        [(n, REFUSED, "refusals: test_unsupported_use") for n in UNSUPPORTED],
    )
    mixing = [(name, REFUSED, "refusals: test_unsupported_use") for name in MIXING]
    mixing += [
        (name, REFUSED, "refusals: test_a_parameter_that_meets_the_batch_s_dim") for name in SIZED
    ]
    lines += _section("Examples mixed inside the model", mixing)
    for section, rows in (
        ("Who votes", WHO_VOTES), ("Ways to train", TRAINING), ("BatchNorm", BATCH_NORM), 
        ("Real models", MODELS + [(name, EXACT, "models: test_model") for name in zoo()]),
    ):  # fmt: skip
        lines += _section(section, rows)
    return "\n".join(lines) + "\n" + DERIVATIVES + COMPILED


def _section(title: str, rows: list[Row]) -> list[str]:
    lines = ["", f"## {title}", "", "| what | | shown by |", "|---|---|---|"]
    for what, how, tests in rows:
        shown = ", ".join(f"{file}::{name}" for file, name in named(tests))
        lines.append(f"| {what.replace('|', chr(92) + '|')} | {how} | {shown} |")
    return lines


def named(tests: str) -> list[tuple[str, str]]:
    """ "layers: test_a, test_b; voting: test_c" -> [("test_layers.py", "test_a"), ...]; files of
    folders are "distributed/pipeline".
    """
    found = []
    for part in tests.split("; "):
        file, _, names = part.partition(": ")
        folder, slash, file = file.rpartition("/")
        found += [(f"{folder}{slash}test_{file}.py", name) for name in names.split(", ")]
    return found


def missing() -> list[str]:
    """Tests the table names that do not exist."""
    shown = {
        line.rsplit("| ", 1)[1].removesuffix(" |") for line in text().splitlines() if "::" in line
    }
    names = {name for cell in shown for name in cell.split(", ")}
    defined = {
        f"{path.relative_to(TESTS).as_posix()}::{node.name}"
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    return sorted(names - defined)


if __name__ == "__main__":
    PATH.write_text(text())
