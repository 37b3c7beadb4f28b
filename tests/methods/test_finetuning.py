"""The baselines train what they should and leave the rest alone."""

import copy

import pytest
import torch
from torch import nn

import htv
from htv.methods.finetuning import NAIVE_RATES, fine_tune, reset_parameters, retrain_last_layer


def made():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3)
    )


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 20, 5, generator=generator)
    return [(part, part[:, :3].argmax(1)) for part in x]


def accuracy(model):
    model.eval()
    return torch.cat([model(x).argmax(1) == y for x, y in batches()]).double().mean().item()


def test_fine_tuning_is_sgd_along_a_cosine():
    model, data, seen = made(), batches(), []
    same = copy.deepcopy(model)
    torch.manual_seed(2)
    fine_tune(model, data, 3, 0.1, on_epoch=lambda epoch, loss: seen.append((epoch, loss)))
    assert [epoch for epoch, _ in seen] == [1, 2, 3] and model.training
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(same.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for step in range(18):
        optimizer.param_groups[0]["lr"] = 0.05 * (
            1 + torch.tensor(torch.pi * step / 18).cos().item()
        )
        x, y = data[step % 6]
        optimizer.zero_grad()
        nn.functional.cross_entropy(same(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), same.state_dict())
    assert NAIVE_RATES == {"S": 0.001, "M": 0.01, "L": 0.1}


def test_only_a_new_last_layer_is_trained():
    model = made()
    model[0].weight.requires_grad_(False)
    model[3].eval()
    before, modes = (
        copy.deepcopy(model.state_dict()),
        [module.training for module in model.modules()],
    )
    retrain_last_layer(model, batches(), 30, 0.1)
    after = model.state_dict()
    assert all(
        torch.equal(after[name], before[name]) for name in before if not name.startswith("4.")
    )
    assert not torch.equal(after["4.weight"], before["4.weight"])
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert [module.training for module in model.modules()] == modes
    assert accuracy(model) > 0.6  # the features are good for something

    class Stop(Exception):
        pass

    def stop(epoch, loss):
        raise Stop

    with pytest.raises(Stop):
        retrain_last_layer(model, batches(), 1, 0.1, on_epoch=stop)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]


def test_the_last_layer_starts_anew():
    model = made()
    with torch.no_grad():
        model[4].weight.fill_(100.0)
    retrain_last_layer(model, batches(), 1, 0.0)
    assert model[4].weight.abs().max() < 1
    retrain_last_layer(model, batches(), 1, 0.0, head="0")
    with pytest.raises(ValueError, match="a ReLU, has no reset_parameters"):
        retrain_last_layer(model, batches(), 1, head="2")


def test_a_head_of_computed_weights_that_cannot_start_anew_is_refused():
    model = made()
    nn.utils.parametrizations.weight_norm(model[4])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match="'parametrizations.weight', a .*, has no reset_parameters"
    ):
        retrain_last_layer(model, batches(), 1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_from_scratch_is_a_model_never_trained():
    model = made()
    fine_tune(model, batches(), 2, 0.1)
    torch.manual_seed(0)
    assert reset_parameters(model) is model
    torch.testing.assert_close(model.state_dict(), made().state_dict(), rtol=0, atol=0)
    model.append(nn.PReLU())
    model[5].__class__ = type("Own", (nn.Module,), {})
    with pytest.raises(ValueError, match="module '5', a Own, has no reset_parameters"):
        reset_parameters(model)


def test_attention_starts_anew_as_it_is_made():
    attention = nn.MultiheadAttention(8, 2)
    nn.init.ones_(attention.out_proj.bias)
    reset_parameters(attention)
    assert not attention.out_proj.bias.any()


def test_a_rule_holds_while_fine_tuning():
    model = nn.Linear(5, 3)
    other = copy.deepcopy(model)
    with htv.attach(model, htv.AndMask(1.0)):
        fine_tune(model, batches(), 1, 0.1, weight_decay=0.0)
    fine_tune(other, batches(), 1, 0.1, weight_decay=0.0)
    assert not torch.equal(model.weight, other.weight)


def test_bad_batches_are_named():
    with pytest.raises(TypeError, match="batches is an iterator"):
        fine_tune(made(), iter(batches()), 1)
    with pytest.raises(ValueError, match="batches is empty"):
        fine_tune(made(), [], 1)
    with pytest.raises(ValueError, match="every parameter of model is frozen"):
        fine_tune(made().requires_grad_(False), batches(), 1)
    for epochs in (-1, 1.5):
        with pytest.raises(ValueError, match="epochs must be an int of at least 0"):
            fine_tune(made(), batches(), epochs)
    model, other = made(), made()
    with pytest.raises(ValueError, match="batches is empty"):
        retrain_last_layer(model, [], 1)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
