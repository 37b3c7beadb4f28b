"""BatchNorm, which couples the examples of a batch: exchanged for GroupNorm, frozen, or with shared
statistics.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import htv
from htv.tools.batchnorm import replace_batchnorm
from support.oracles import by_name, stat

RULES = [htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1), htv.Mean()]


class ConvNet(nn.Module):
    """Conv -> BatchNorm2d -> ReLU, twice by the same BatchNorm where asked, -> mean over space ->
    Linear.
    """

    def __init__(self, times: int = 1, bias: bool = True, **options):
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(6, **options)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        h = self.conv(x)
        for _ in range(self.times):
            h = F.relu(self.norm(h))
        return self.head(h.mean((2, 3)))


def mlp(**options):
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, **options), nn.ReLU(), nn.Linear(8, 4))


def used(model, *shape):
    """Let every BatchNorm have statistics and an affine map of its own."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for _ in range(3):
            model.train()(1 + 2 * torch.randn(shape, dtype=next(model.parameters()).dtype))
    return model


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def assert_same_statistics(model, expected, tolerance=0.0):
    assert {n for n, _ in model.named_buffers()} == set(expected)
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def gradients(model, x, y):
    loss = F.cross_entropy(model(x), y)
    return dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        )
    )


# -- replace_batchnorm -----------------------------------------------------------------------------


def test_every_batch_norm_becomes_a_group_norm_in_place():
    model = nn.Sequential(
        nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.BatchNorm2d(64, eps=0.1),
        nn.Sequential(nn.BatchNorm3d(256)), nn.SyncBatchNorm(48), nn.InstanceNorm2d(7),
        nn.BatchNorm2d(37, affine=False),
    )  # fmt: skip
    model[2].eval()
    assert replace_batchnorm(model) is model
    norms = [model[1], model[2], model[3][0], model[4], model[6]]
    assert all(type(norm) is nn.GroupNorm for norm in norms) and type(model[5]) is nn.InstanceNorm2d
    assert [norm.num_channels for norm in norms] == [32, 64, 256, 48, 37]
    assert [norm.num_groups for norm in norms] == [2, 16, 32, 3, 1]
    assert [norm.training for norm in norms] == [True, False, True, True, True]
    assert [norm.affine for norm in norms] == [True, True, True, True, False]
    assert (
        norms[1].eps == 0.1 and "affine=False" in repr(norms[4]) and "affine=True" in repr(norms[0])
    )
    assert [n for n, _ in model.named_buffers()] == []


@pytest.mark.parametrize(
    ("requested", "channels", "groups"),
    [(1, 12, 1), (5, 12, 4), (8, 12, 6), (12, 12, 12), (99, 12, 12), (32, 37, 1)],
)
def test_num_groups_is_the_largest_divisor_not_above(requested, channels, groups):
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm):
        assert replace_batchnorm(kind(channels), requested).num_groups == groups


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 12, 16, 31, 32, 40, 64, 512])
def test_groups_of_few_channels_are_no_default(channels):
    """A group of one value is constant: no default may lose inputs (N, C) or (N, C, 1, 1)."""
    alone, with_space = (
        replace_batchnorm(nn.BatchNorm1d(channels)),
        replace_batchnorm(nn.BatchNorm2d(channels)),
    )
    assert channels // alone.num_groups >= min(16, channels) and alone.num_groups <= 32
    assert channels // with_space.num_groups >= min(4, channels) and with_space.num_groups <= 32


def test_parameters_stay_the_same_objects_in_the_same_order():
    model = used(ConvNet().double(), 5, 3, 4, 4)
    model.norm.bias.requires_grad_(False)
    before, keys = list(model.named_parameters()), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_batchnorm(model)
    after = list(model.named_parameters())
    assert [n for n, _ in before] == [n for n, _ in after]
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))
    lost = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert list(model.state_dict()) == [key for key in keys if key not in lost]
    weight = model.norm.weight.detach().clone()
    model(torch.randn(5, 3, 4, 4).double()).square().sum().backward()
    optimizer.step()
    assert model.norm.weight.dtype == torch.float64 and not torch.equal(weight, model.norm.weight)


def test_it_normalises_scales_and_shifts():
    norm = used(nn.BatchNorm1d(32), 7, 32)
    group_norm = replace_batchnorm(norm)
    for x in (torch.randn(6, 32), torch.randn(6, 32, 5)):
        grouped = x.reshape(6, 2, -1)
        x_hat = (grouped - grouped.mean(-1, keepdim=True)) * (
            grouped.var(-1, keepdim=True, correction=0) + 1e-5
        ).rsqrt()
        shape = (1, 32) + (1,) * (x.dim() - 2)
        expected = x_hat.reshape(x.shape) * norm.weight.reshape(shape) + norm.bias.reshape(shape)
        torch.testing.assert_close(group_norm(x), expected)


def test_weight_without_bias():
    norm = nn.BatchNorm2d(8)
    norm.bias = None
    replaced = replace_batchnorm(norm)
    assert replaced.weight is norm.weight and replaced.bias is None and replaced.affine
    assert replaced(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)


def test_device_and_dtype_are_kept():
    model = nn.Sequential(nn.BatchNorm2d(8, device="meta"), nn.BatchNorm1d(8, dtype=torch.bfloat16))
    replace_batchnorm(model)
    assert model[0].weight.is_meta and model[1].weight.dtype == torch.bfloat16


def test_a_root_that_is_a_batch_norm_is_returned_anew():
    norm = nn.BatchNorm2d(8)
    replaced = replace_batchnorm(norm)
    assert type(replaced) is nn.GroupNorm and replaced.weight is norm.weight


def test_a_shared_module_is_exchanged_for_the_same_one_everywhere():
    norm = nn.BatchNorm1d(8)
    model = nn.ModuleDict(
        {"a": norm, "b": nn.Sequential(norm, nn.Linear(8, 8), norm), "c": nn.ModuleList([norm])}
    )
    replace_batchnorm(model)
    assert type(model["a"]) is nn.GroupNorm
    assert model["a"] is model["b"][0] is model["b"][2] is model["c"][0]


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8))
    model[1].weight = model[0].weight
    replace_batchnorm(model)
    assert (
        model[0] is not model[1]
        and model[0].weight is model[1].weight
        and model[0].bias is not model[1].bias
    )


def test_a_model_without_batch_norm_is_returned_as_it_is():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = list(model)
    assert replace_batchnorm(model) is model and list(model) == before


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with its activation in it, as timm has it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Checked(nn.BatchNorm2d):
    """A subclass that does nothing more in its forward."""

    def _check_input_dim(self, input):
        assert input.shape[1] == self.num_features


def with_hook(norm):
    norm.register_forward_hook(lambda *_: None)
    return norm


def parametrized(norm):
    return torch.nn.utils.parametrizations.weight_norm(norm, dim=None)


def patched(norm):
    norm.forward = lambda x: 2 * x
    return norm


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (NormAct(8), "NormAct with a forward of its own"),
        (patched(nn.BatchNorm2d(8)), "BatchNorm2d with a forward of its own"),
        (with_hook(nn.BatchNorm2d(8)), "BatchNorm2d with hooks"),
        (parametrized(nn.BatchNorm2d(8)), "parametrization"),
    ],
    ids=["fused activation", "patched forward", "hook", "parametrization"],
)
def test_a_batch_norm_that_does_more_is_refused(norm, why):
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ModuleDict({"norm": norm}))
    before = list(model.modules())
    with pytest.raises(htv.UnsupportedError, match=f"module '1.norm' is a .*{why}.*replace="):
        replace_batchnorm(model)
    assert list(model.modules()) == before, "it must change nothing before it raises"


def test_a_subclass_without_a_forward_of_its_own_is_replaced():
    assert type(replace_batchnorm(Checked(8))) is nn.GroupNorm


def test_replace_decides_module_by_module():
    model = nn.Sequential(
        NormAct(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8).eval(), nn.Sequential(NormAct(8))
    )
    kept, seen = model[2], []

    def replace(name, module):
        seen.append(name)
        if isinstance(module, NormAct):
            return nn.Sequential(nn.GroupNorm(2, module.num_features), module.act)
        return None if module.training else module

    replace_batchnorm(model, num_groups=4, replace=replace)
    assert seen == ["0", "1", "2", "3.0"]
    assert model[2] is kept and type(model[1]) is nn.GroupNorm and model[1].num_groups == 4
    assert isinstance(model[0][1], nn.SiLU) and isinstance(model[3][0][0], nn.GroupNorm)
    assert htv.check(model, torch.randn(5, 8, 4, 4), htv.Median())


def test_replace_may_wrap_the_module():
    model = nn.Sequential(nn.BatchNorm2d(8).eval())
    norm = model[0]
    replace_batchnorm(model, replace=lambda name, module: nn.Sequential(module, nn.ReLU()))
    assert model[0][0] is norm


def test_bad_arguments():
    with pytest.raises(TypeError, match="torch.nn.Module, got list"):
        replace_batchnorm([nn.BatchNorm1d(3)])
    for num_groups in (0, -1, 2.0, True, "32"):
        with pytest.raises(ValueError, match="num_groups must be a positive int"):
            replace_batchnorm(mlp(), num_groups)
    with pytest.raises(TypeError, match="replace must be a callable"):
        replace_batchnorm(mlp(), replace=8)
    model = mlp()
    with pytest.raises(
        TypeError, match="replace must return a module or None; for module '1' it returned 3"
    ):
        replace_batchnorm(model, replace=lambda name, module: 3)
    assert type(model[1]) is nn.BatchNorm1d


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}], ids=str
)
def test_lazy_modules_need_to_know_their_channels(options):
    model = nn.Sequential(nn.Linear(5, 16), nn.LazyBatchNorm1d(**options))
    with pytest.raises(
        RuntimeError,
        match="module '1' is a LazyBatchNorm1d that does not know its.*Run the model once",
    ):
        replace_batchnorm(model)
    model(torch.randn(4, 5))
    if len(options) < 2:
        assert replace_batchnorm(model)[1].num_channels == 16
    else:  # torch calls it a BatchNorm1d now, of no channels
        with pytest.raises(RuntimeError, match="module '1' is a BatchNorm1d.*num_features"):
            replace_batchnorm(model)


def test_an_attached_model_is_refused():
    model = nn.Sequential(mlp(), nn.Linear(4, 4))
    for part, name in ((model, "the model"), (model[0], "module '0'")):
        with (
            htv.attach(part, htv.Median()),
            pytest.raises(RuntimeError, match=f"{name} is attached: call detach"),
        ):
            replace_batchnorm(model)
    assert type(replace_batchnorm(model)[0][1]) is nn.GroupNorm


@pytest.mark.parametrize("rule", [htv.AndMask(0.4), htv.Median()], **by_name)
def test_a_replaced_model_is_served(rule):
    for model, x in ((mlp(), torch.randn(7, 5)), (ConvNet(times=2), torch.randn(7, 3, 5, 5))):
        with pytest.raises(htv.UnsupportedError):
            htv.check(model, x, rule)
        report = htv.check(replace_batchnorm(model), x, rule)
        assert report.parameters == 6 and report.groups == 7


# -- attach(..., batch_norm="error") ---------------------------------------------------------------


def test_the_default_names_module_and_remedies():
    model = nn.Sequential(nn.Linear(4, 4), mlp())
    before = statistics(model)
    with htv.attach(model, htv.Median()), pytest.raises(htv.UnsupportedError) as error:
        model(torch.randn(6, 4))
    for part in (
        "module '1.1'",
        "batch_norm='frozen'",
        "htv.replace_batchnorm",
        "batch_norm='shared'",
        ".eval()",
    ):
        assert part in str(error.value)
    assert_same_statistics(model, before)


def test_unknown_choices_are_refused():
    with pytest.raises(
        ValueError, match="batch_norm must be 'error', 'frozen' or 'shared', got 'eval'"
    ):
        htv.attach(mlp(), htv.Median(), batch_norm="eval")


# -- attach(..., batch_norm="frozen") --------------------------------------------------------------

FROZEN = {
    "batch norm 1d": lambda: (used(mlp().double(), 9, 5), torch.randn(7, 5).double()),
    "batch norm 2d": lambda: (
        used(ConvNet(times=2).double(), 9, 3, 5, 5),
        torch.randn(7, 3, 5, 5).double(),
    ),
    "not affine": lambda: (used(mlp(affine=False).double(), 9, 5), torch.randn(7, 5).double()),
}
Y = torch.tensor([0, 1, 2, 3, 1, 2, 0])


@pytest.mark.parametrize("rule", RULES, **by_name)
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_is_eval_of_the_batch_norms(name, rule):
    model, x = FROZEN[name]()
    model.insert(0, nn.Dropout(0.5)) if isinstance(model, nn.Sequential) else None
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    assert htv.check(twin, x, rule), "one example at a time agrees with the twin"
    with htv.attach(twin, rule):
        torch.manual_seed(0)
        expected = gradients(twin, x, Y)
    before, modes = statistics(model), [m.training for m in model.modules()]
    during = []
    with htv.attach(model, rule, batch_norm="frozen"):
        torch.manual_seed(0)
        found = gradients(model, x, Y)
        hook = model[-1] if isinstance(model, nn.Sequential) else model.head
        hook = hook.register_forward_pre_hook(
            lambda *_: during.extend(m.training for m in model.modules())
        )
        for _ in range(2):
            model(x)
        hook.remove()
    for parameter, grad in expected.items():
        torch.testing.assert_close(found[parameter], grad, rtol=1e-12, atol=1e-14, msg=parameter)
    assert_same_statistics(model, before)
    assert [m.training for m in model.modules()] == modes == [True] * len(modes)
    assert during.count(False) == 2, "only the BatchNorm itself is in eval mode meanwhile"


def test_frozen_restores_the_modes_after_an_error():
    model = nn.Sequential(mlp(), nn.BatchNorm1d(4).eval())
    before = statistics(model)
    with htv.attach(model, htv.Median(), batch_norm="frozen"):
        hook = model[0][2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(6, 5))
        assert [m.training for m in model.modules()] == [True] * 6 + [False]
        hook.remove()
        model(torch.randn(6, 5)).sum().backward()
    assert [m.training for m in model.modules()] == [True] * 6 + [False]
    assert_same_statistics(model, before)


def test_frozen_refuses_a_batch_norm_without_running_statistics():
    for mode in (True, False):
        model = mlp(track_running_stats=False).train(mode)
        with (
            htv.attach(model, htv.Median(), batch_norm="frozen"),
            pytest.raises(htv.UnsupportedError, match="BatchNorm"),
        ):
            model(torch.randn(6, 5))


def test_frozen_after_detach_is_train_mode_again():
    model = mlp()
    with htv.attach(model, htv.Median(), batch_norm="frozen"):
        model(torch.randn(6, 5))
    assert model[1].num_batches_tracked == 0
    model(torch.randn(6, 5))
    assert model[1].num_batches_tracked == 1


def test_frozen_by_groups():
    model, x = FROZEN["batch norm 2d"]()
    ids = torch.tensor([2, 0, 2, 1, 0, 0, 1])
    twin = copy.deepcopy(model).eval()
    assert htv.check(twin, x, htv.Median(), groups=ids)
    with htv.attach(twin, htv.Median()) as handle, handle.groups(ids):
        expected = gradients(twin, x, Y)
    with htv.attach(model, htv.Median(), batch_norm="frozen") as handle, handle.groups(ids):
        found = gradients(model, x, Y)
    for parameter, grad in expected.items():
        torch.testing.assert_close(found[parameter], grad, rtol=1e-12, atol=1e-14, msg=parameter)


# -- attach(..., batch_norm="shared")
# ---------------------------------------------------------------------------------  The oracle:
# every example gets a copy of every parameter, and plain autograd differentiates by the copies.
# Statistics are those of the whole batch, so the gradient of a copy includes what passes through
# them.


def normed(z, own, prefix):
    """BatchNorm of z (N, C, *space) by the batch's statistics; scale and shift (N, C), each example
    its own.
    """
    shape = (*z.shape[:2], *(1,) * (z.dim() - 2))
    z = F.batch_norm(z, None, None, training=True, eps=1e-5)
    for operation, name in ((torch.mul, f"{prefix}.weight"), (torch.add, f"{prefix}.bias")):
        if name in own:
            z = operation(z, own[name].reshape(shape))
    return z


def by_example(layer, x, own, prefix, **options):
    biases = own.get(f"{prefix}.bias", [None] * len(x))
    each = zip(x, own[f"{prefix}.weight"], biases, strict=True)
    return torch.cat([layer(row[None], weight, bias, **options) for row, weight, bias in each])


def mlp_by_example(own, x):
    h = torch.einsum("noi,ni->no", own["0.weight"], x) + own["0.bias"]
    h = F.relu(normed(h, own, "1"))
    return torch.einsum("noi,ni->no", own["3.weight"], h) + own["3.bias"]


def conv_net_by_example(own, x, times=1):
    h = by_example(F.conv2d, x, own, "conv", padding=1)
    for _ in range(times):
        h = F.relu(normed(h, own, "norm"))
    return torch.einsum("noi,ni->no", own["head.weight"], h.mean((2, 3))) + own["head.bias"]


def sequence_by_example(own, x):
    h = F.relu(normed(by_example(F.conv1d, x, own, "0"), own, "1"))
    return torch.einsum("noi,ni->no", own["4.weight"], h.mean(2)) + own["4.bias"]


def sequence():
    pool = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten())
    return nn.Sequential(nn.Conv1d(3, 6, 2), nn.BatchNorm1d(6), nn.ReLU(), pool, nn.Linear(6, 4))


SHARED = {
    "linear, batch norm 1d": (mlp, mlp_by_example, (5,)),
    "linear, batch norm 1d without affine": (lambda: mlp(affine=False), mlp_by_example, (5,)),
    "linear, batch norm 1d without running statistics": (
        lambda: mlp(track_running_stats=False),
        mlp_by_example,
        (5,),
    ),
    "linear, batch norm 1d with a cumulative average": (
        lambda: mlp(momentum=None),
        mlp_by_example,
        (5,),
    ),
    "conv1d, batch norm 1d": (sequence, sequence_by_example, (3, 6)),
    "conv2d, batch norm 2d": (ConvNet, conv_net_by_example, (3, 5, 5)),
    "conv2d without bias": (lambda: ConvNet(bias=False), conv_net_by_example, (3, 5, 5)),
    "one batch norm used twice": (
        lambda: ConvNet(times=2),
        lambda own, x: conv_net_by_example(own, x, times=2),
        (3, 5, 5),
    ),
}


def shared_case(name):
    """A model, its batch, and the contributions of every example to every parameter."""
    make, forward, shape = SHARED[name]
    model, x = used(make().double(), 9, *shape), 1 + 2 * torch.randn(7, *shape).double()
    own = {
        n: p.detach().expand(7, *p.shape).clone().requires_grad_()
        for n, p in model.named_parameters()
    }
    loss = F.cross_entropy(forward(own, x), Y)
    torch.testing.assert_close(
        loss, F.cross_entropy(copy.deepcopy(model)(x), Y), rtol=1e-12, atol=1e-12
    )
    contributions = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
    return model, x, {n: c.numpy() for n, c in contributions.items()}


def assert_aggregated(found, contributions, rule):
    scale = max(np.abs(c).max() for c in contributions.values())
    for name, c in contributions.items():
        expected = torch.from_numpy(np.asarray(len(c) * stat(rule, c)))
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12 * scale, msg=name)


@pytest.mark.parametrize("rule", RULES, **by_name)
@pytest.mark.parametrize("name", SHARED)
def test_shared_statistics(name, rule):
    model, x, contributions = shared_case(name)
    twin = copy.deepcopy(model)
    plain = gradients(twin, x, Y)
    with htv.attach(model, rule, batch_norm="shared"):
        found = gradients(model, x, Y)
    assert_aggregated(found, contributions, rule)
    for parameter, grad in plain.items():
        total = torch.from_numpy(contributions[parameter].sum(0))
        torch.testing.assert_close(total, grad, rtol=1e-9, atol=1e-13)
        if rule == htv.Mean():
            torch.testing.assert_close(found[parameter], grad, rtol=1e-9, atol=1e-13)
    assert_same_statistics(
        model, statistics(twin), tolerance=1e-13
    )  # as one plain step leaves them
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("rule", RULES, **by_name)
@pytest.mark.parametrize("name", SHARED)
def test_shared_statistics_by_groups(name, rule):
    model, x, contributions = shared_case(name)
    ids = torch.tensor([5, 1, 5, 2, 1, 9, 9])
    sums = {
        n: np.stack([c[ids.numpy() == e].sum(0) for e in (1, 2, 5, 9)])
        for n, c in contributions.items()
    }
    with htv.attach(model, rule, batch_norm="shared") as handle, handle.groups(ids):
        found = gradients(model, x, Y)
    assert_aggregated(found, sums, rule)


def test_shared_contributions_are_not_those_of_frozen_statistics():
    """What passes through the statistics matters: leaving it out would be another gradient."""
    model, x, contributions = shared_case("linear, batch norm 1d")
    mean, var = (h := model[0](x).detach()).mean(0), h.var(0, correction=0)
    own = {
        n: p.detach().expand(7, *p.shape).clone().requires_grad_()
        for n, p in model.named_parameters()
    }
    h = torch.einsum("noi,ni->no", own["0.weight"], x) + own["0.bias"]
    h = F.relu((h - mean) * (var + 1e-5).rsqrt() * own["1.weight"] + own["1.bias"])
    logits = torch.einsum("noi,ni->no", own["3.weight"], h) + own["3.bias"]
    (without,) = torch.autograd.grad(F.cross_entropy(logits, Y), own["0.weight"])
    assert (
        np.abs(without.numpy() - contributions["0.weight"]).max()
        > 0.1 * np.abs(contributions["0.weight"]).max()
    )


def test_shared_takes_several_steps_as_plain_training_does():
    """With Mean() nothing differs: parameters, statistics and input gradients over several steps of
    an optimizer.
    """
    model = used(ConvNet().double(), 9, 3, 5, 5)
    twin = copy.deepcopy(model)
    batches = [
        (torch.randn(7, 3, 5, 5).double().requires_grad_(), torch.randint(0, 4, (7,)))
        for _ in range(4)
    ]

    def train(model):
        optimizer, inputs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
        for x, y in batches:
            optimizer.zero_grad()
            x.grad = None
            F.cross_entropy(model(x), y).backward()
            inputs.append(x.grad.clone())
            optimizer.step()
        return inputs

    plain = train(twin)
    with htv.attach(model, htv.Mean(), batch_norm="shared"):
        found = train(model)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_shared_in_eval_mode_is_eval_mode():
    model, x = FROZEN["batch norm 2d"]()
    model.eval()
    before = statistics(model)
    with htv.attach(model, htv.Median()):
        expected = gradients(model, x, Y)
    with htv.attach(model, htv.Median(), batch_norm="shared"):
        found = gradients(model, x, Y)
    assert all(torch.equal(found[n], g) for n, g in expected.items())
    assert_same_statistics(model, before)


# -- what is still to do ---------------------------------------------------------------------------


def test_frozen_statistics_stay_as_they_are_without_gradients():
    model = used(mlp(), 9, 5)
    before = statistics(model)
    with htv.attach(model, htv.Median(), batch_norm="frozen"):
        with torch.no_grad():
            y = model(torch.ones(6, 5))
        torch.testing.assert_close(model(torch.ones(6, 5)), y)
    assert_same_statistics(model, before)
    assert model[1].training


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_frozen_modules_without_parameters_that_are_checkpointed(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = (
                nn.Linear(5, 8),
                nn.BatchNorm1d(8, affine=False),
                nn.Linear(8, 4),
            )

        def forward(self, x):
            return self.last(checkpoint(self.norm, self.first(x), use_reentrant=use_reentrant))

    model, x = used(Checkpointed().double(), 9, 5), torch.randn(7, 5).double()
    twin = copy.deepcopy(model).eval()
    before = statistics(model)
    for m, batch_norm in ((model, "frozen"), (twin, "error")):
        with htv.attach(m, htv.Median(), batch_norm=batch_norm):
            F.cross_entropy(m(x), Y).backward()
    assert_same_statistics(model, before)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_half_precision_inputs_of_a_single_precision_batch_norm(training):
    model, x = nn.BatchNorm2d(4).train(training), torch.randn(6, 4, 3, 3).bfloat16()
    plain = model(x)
    with htv.attach(model, htv.Median(), batch_norm="shared"):
        assert model(x).dtype == plain.dtype == torch.bfloat16


def test_torch_batch_norm_is_refused_as_well():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(
                torch.batch_norm(self.first(x), None, None, None, None, True, 0.1, 1e-5, False)
            )

    model = Direct()
    with (
        htv.attach(model, htv.Median()),
        pytest.raises(htv.UnsupportedError, match="BatchNorm in train mode"),
    ):
        model(torch.randn(6, 5))


@pytest.mark.parametrize("keepdim", [False, True])
def test_normalising_over_the_batch_by_hand_is_refused_as_well(keepdim):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = self.first(x)
            return self.last(h - h.mean(0, keepdim=keepdim))

    model = Centred()
    with (
        htv.attach(model, htv.Median()),
        pytest.raises(htv.UnsupportedError, match="'last.weight'"),
    ):
        model(torch.randn(6, 5))
