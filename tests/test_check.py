"""htv.check must fail when something is wrong, and name it."""

import pytest
import torch
from layer_table import Module
from torch import nn

import htv
from htv.ops import aggregate
from models import mlp


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
    monkeypatch.setattr(aggregate, "aggregate", slightly_wrong)
    with pytest.raises(htv.CheckError, match="differs from one group at a time under Median"):
        htv.check(model, torch.randn(6, 12), htv.Median())
    assert slightly_wrong.done


def test_a_lost_gradient_is_an_error(monkeypatch):
    monkeypatch.setattr("htv.autograd.ledger.Ledger.settle", lambda self, *parameter: None)
    with pytest.raises(htv.CheckError, match="'0.weight' has no gradient when attached"):
        htv.check(mlp(), torch.randn(6, 12), htv.Median())


def test_batches_as_tuples_and_dicts_and_shared_inputs():
    model = Module(lambda m, x, scale: m.layer(x) * scale, layer=nn.Linear(4, 3))
    scale = torch.rand(3)
    assert htv.check(model, (torch.randn(6, 4), scale), htv.Median()).groups == 6

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs, scale):
            return {"logits": self.layer(inputs) * scale, "size": len(inputs)}

    assert htv.check(Named(), {"inputs": torch.randn(6, 4), "scale": scale}, htv.AndMask(0.5))


def test_the_model_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    before = [p.clone() for p in model.parameters()]
    assert htv.check(model, torch.randn(6, 4), htv.AndMask(0.4))
    assert model[1].training and all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_coupled_examples_are_told():
    model = Module(lambda m, x: m.layer(x - x.mean(0, keepdim=True)), layer=nn.Linear(4, 3))
    with pytest.raises(ValueError, match="'layer.weight' is not the sum of its groups' gradients"):
        htv.check(model, torch.randn(6, 4), htv.Median())


def test_batch_norm_in_train_mode_is_refused_as_attaching_does():
    with pytest.raises(htv.UnsupportedError, match="BatchNorm"):
        htv.check(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.randn(6, 4), htv.Median())


def test_bad_batches():
    with pytest.raises(ValueError, match="at least one tensor"):
        htv.check(mlp(), (), htv.Median())
    with pytest.raises(ValueError, match="no differentiable tensor"):
        htv.check(Module(lambda m, x: (m.p * x).sum(), p=torch.randn(4)), torch.randn(3, 4), htv.Median())
