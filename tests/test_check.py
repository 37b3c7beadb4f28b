"""htv.check must fail when something is wrong, and name it."""

import pytest
import torch
from torch import nn

import htv
from htv.bench.models import mlp, whole_models
from htv.ops import aggregate
from htv.tools.check import aggregated
from support.layer_table import Module
from support.oracles import RULES, by_name


def replace_aggregate(monkeypatch, function):
    """Let `function(parts, rule)` aggregate every parameter, alone in its node or not."""
    monkeypatch.setattr(aggregate, "aggregate", function)
    monkeypatch.setattr(
        aggregate, "aggregate_together", lambda parts, rule: [function(p, rule) for p in parts]
    )


@pytest.mark.parametrize("broken", ["3.weight", "0.bias"])
def test_names_the_first_wrong_parameter(broken, monkeypatch):
    model = mlp()
    shape = tuple(model.get_parameter(broken).shape)
    honest = aggregate.aggregate

    def slightly_wrong(parts, rule):
        grad = honest(parts, rule)
        if tuple(grad.shape) == shape and not slightly_wrong.done:
            slightly_wrong.done = True
            grad.flatten()[5] += 1e-6
        return grad

    slightly_wrong.done = False
    replace_aggregate(monkeypatch, slightly_wrong)
    with pytest.raises(htv.CheckError, match="differs from one group at a time under Median"):
        htv.check(model, torch.randn(6, 12), htv.Median())
    assert slightly_wrong.done


def _drop(stacked):
    stacked[2] = 0


def _twice(stacked):
    stacked[2] *= 2


def _another(stacked):
    stacked[2] = stacked[3]


def _together(stacked):
    stacked[2] += stacked[3]
    stacked[3] = 0


BROKEN = {
    "dropped": _drop,
    "counted twice": _twice,
    "another's": _another,
    "given to another": _together,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rule", [htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1), htv.TrimmedMean(1)], ids=repr
)
def test_one_group_s_wrong_contribution_is_caught_in_every_type(dtype, rule, monkeypatch):
    model, x = mlp(), torch.randn(6, 12)
    for name, breaks in [("honest", None), *BROKEN.items()]:

        def wrong(parts, rule, breaks=breaks):
            stacked = torch.stack(
                [sum(part.contribution(e) for part in parts) for e in range(parts[0].count)]
            )
            if breaks is not None:
                breaks(stacked)
            return aggregated(stacked, rule).to(parts[0].dtype)

        replace_aggregate(monkeypatch, wrong)
        if breaks is None:
            assert htv.check(model, x, rule, dtype=dtype)
        else:
            with pytest.raises(htv.CheckError, match="differs from one group at a time"):
                htv.check(model, x, rule, dtype=dtype)
                raise AssertionError(f"a contribution {name} went unnoticed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES, **by_name)
@pytest.mark.parametrize("name", ["mlp", "language model"])
def test_whole_models_in_lower_types(name, rule, dtype):
    model, batch = whole_models()[name]()
    assert htv.check(model, batch, rule, dtype=dtype).parameters == len(list(model.parameters()))


def test_a_lost_gradient_is_an_error(monkeypatch):
    monkeypatch.setattr(
        "htv.autograd.aggregation.ContributionBuffer.taken", lambda self, current: None
    )
    with pytest.raises(htv.CheckError, match="'0.weight' has no gradient when attached"):
        htv.check(mlp(), torch.randn(6, 12), htv.Median())


def test_batches_as_tuples_and_dicts_and_shared_inputs():
    model = Module(lambda m, x, scale: m.layer(x) * scale, layer=nn.Linear(4, 3))
    scale = torch.rand(3)
    report = htv.check(model, (torch.randn(6, 4), scale), htv.Median(), batch_argument="args[0]")
    assert report.groups == 6 and report.batch == "'args[0]' of shape (6, 4), examples in dim 0"

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs, scale):
            return {"logits": self.layer(inputs) * scale, "size": len(inputs)}

    batch = {"inputs": torch.randn(6, 4), "scale": scale}
    assert htv.check(Named(), batch, htv.AndMask(0.5), batch_argument="inputs")
    with pytest.raises(ValueError, match="'inputs' of shape .* 'scale' of shape"):
        htv.check(Named(), batch, htv.AndMask(0.5))


def test_the_model_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    before = [p.clone() for p in model.parameters()]
    assert htv.check(model, torch.randn(6, 4), htv.AndMask(0.4))
    assert model[1].training and all(
        p.grad is None and p.dtype == torch.float32 for p in model.parameters()
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_coupled_examples_are_told():
    model = Module(lambda m, x: m.layer(x - x.mean(0, keepdim=True)), layer=nn.Linear(4, 3))
    with pytest.raises(ValueError, match="'layer.weight' is not the sum of its groups' gradients"):
        htv.check(model, torch.randn(6, 4), htv.Median())


def test_batch_norm_in_train_mode_is_refused_as_attaching_does():
    with pytest.raises(htv.UnsupportedError, match="BatchNorm"):
        htv.check(
            nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(6, 4), htv.Median()
        )


def test_bad_batches():
    with pytest.raises(ValueError, match="at least one tensor"):
        htv.check(mlp(), (), htv.Median())
    with pytest.raises(ValueError, match="no differentiable tensor"):
        htv.check(
            Module(lambda m, x: (m.p * x).sum(), p=torch.randn(4)), torch.randn(3, 4), htv.Median()
        )


def test_the_batch_in_another_dim():
    model = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3)
    for x in (torch.randn(4, 5, 6), torch.randn(5, 5, 6)):
        assert htv.check(model, x, htv.Median(), batch_dim=1).groups == 5
        ids = torch.tensor([3, 1, 3, 3, 2])
        assert (
            htv.check(
                model, x, htv.AndMask(0.4), groups=ids, batch_dim=1, dtype=torch.float32
            ).groups
            == 3
        )
    last = Module(
        lambda m, x: m.r(x)[0][-1], r=nn.GRU(6, 3)
    )  # the batch is in dim 0 of what it returns
    assert htv.check(last, torch.randn(4, 5, 6), htv.Median(), batch_dim=1).groups == 5
    with pytest.raises(ValueError, match="the batch in dim 1"):
        htv.check(mlp(), torch.randn(5), htv.Median(), batch_dim=1)


def test_frozen_batch_norm():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    model(torch.randn(9, 4))  # statistics other than 0 and 1
    running = model[1].running_mean.clone()
    assert htv.check(model, torch.randn(6, 4), htv.Median(), batch_norm="frozen")
    assert model[1].training and torch.equal(model[1].running_mean, running)
    with pytest.raises(ValueError, match="shared"):
        htv.check(model, torch.randn(6, 4), htv.Median(), batch_norm="shared")


def test_every_call_starts_from_the_same_buffers():
    """A power iteration per forward, say, is the same for the whole batch and for each group."""
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert htv.check(model, torch.randn(5, 6), htv.Median()).error < 1e-12
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_types_that_do_not_hold_fractions():
    with pytest.raises(ValueError, match="dtype must be one of.*torch.float64"):
        htv.check(mlp(), torch.randn(5, 12), htv.Median(), dtype=torch.int32)
