"""Permutations of hidden units: found by tracing, given by hand, function-preserving, and matched
back.
"""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from htv import UnsupportedError
from htv.methods import (
    LinearPath,
    PermutationSpec,
    UnitAxis,
    activation_correlations,
    evaluate_along,
    match_permutations,
    permute_model,
    random_permutations,
    trace_permutations,
)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs)
        self.down = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), norm(outputs))
            if stride > 1
            else None
        )

    def forward(self, x):
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        return F.relu(out + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), norm(8)
        self.blocks = nn.Sequential(
            Block(8, 8, 1, norm), Block(8, 12, 2, norm), Block(12, 12, 1, norm)
        )
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = self.blocks(self.norm(self.stem(x)).relu())
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Mobile(nn.Module):
    """Depthwise with a multiplier, squeeze-and-excite, PReLU, a transposed convolution, layer
    scale, channels last.
    """

    def __init__(self):
        super().__init__()
        self.expand, self.norm = nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.act = nn.PReLU(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.up = nn.ConvTranspose2d(12, 5, 2, stride=2)
        self.scale = nn.Parameter(torch.randn(5, 1, 1))
        self.wide = nn.LayerNorm(5)
        self.last = nn.Linear(5 * 16 * 16, 3)

    def forward(self, x):
        x = self.act(self.depth(F.hardtanh(self.norm(self.expand(x)))))
        gate = self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        x = self.scale * self.up(x * gate)
        return self.last(self.wide(x.permute(0, 2, 3, 1)).reshape(x.size(0), -1))


class Multiples(nn.Module):
    """6 channels twice meet 4 channels three times: two pieces of whole channels are left to
    exchange.
    """

    def __init__(self):
        super().__init__()
        self.six, self.twice = nn.Conv1d(2, 6, 1), nn.Conv1d(6, 12, 3, groups=6)
        self.four, self.thrice = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 12, 3, groups=4)
        self.norm, self.last = nn.GroupNorm(2, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.last(
            self.norm(self.twice(self.six(x).tanh()) + self.thrice(self.four(x))).amax(2)
        )


class Tokens(nn.Module):
    """Embeddings, pre-norm residuals, positions, and a head tied to the table."""

    def __init__(self):
        super().__init__()
        self.table, self.positions = nn.Embedding(9, 6), nn.Parameter(torch.randn(1, 4, 6))
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.rms, self.head = nn.RMSNorm(6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids) + self.positions
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(self.rms(x)[:, -1])


def stretched() -> nn.Module:
    """A shared layer, and one that gives a single unit."""

    class Stretched(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shared = nn.Linear(4, 6), nn.Linear(6, 6)
            self.gate, self.last = nn.Linear(6, 1), nn.Linear(6, 2)

        def forward(self, x):
            x = self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))
            return F.log_softmax(self.last(x * torch.sigmoid(self.gate(x))), dim=1)

    return Stretched()


def image(channels: int = 2) -> torch.Tensor:
    return torch.randn(8, channels, 8, 8)


GROUP = lambda channels: nn.GroupNorm(4, channels)
MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 9), nn.LayerNorm(9),
                                  nn.GELU(), nn.Linear(9, 3)), lambda: torch.randn(16, 4), 2),
    "convnet": (lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
                                      nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 8),
                                      nn.BatchNorm1d(8, affine=False), nn.Tanh(), nn.Linear(8, 3)),
                image, 2),
    "flattened norm": (lambda: nn.Sequential(nn.Conv1d(2, 5, 3), nn.InstanceNorm1d(5, affine=True),
                                             nn.Flatten(), nn.BatchNorm1d(20), nn.ReLU(),
                                             nn.Linear(20, 3)),
                       lambda: torch.randn(9, 2, 6), 1),
    "resnet": (ResNet, image, 5),
    "group norm": (lambda: ResNet(GROUP), image, 5),
    "mobile": (Mobile, image, 3),
    "multiples": (Multiples, lambda: torch.randn(9, 2, 5), 1),
    "tokens": (Tokens, lambda: torch.randint(9, (12, 4)), 2),
    "stretched": (stretched, lambda: torch.randn(16, 4), 1),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", MODELS)


def trained(model: nn.Module) -> nn.Module:
    """With no two channels alike in anything that is per channel; some norms turn signs around."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 4)
        for buffer_name, b in model.named_buffers():
            if b.is_floating_point():
                b.copy_(
                    torch.rand_like(b) + 0.5 if "var" in buffer_name else torch.randn_like(b) / 4
                )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[0].neg_()
    return model.eval()


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@EVERY
def test_permutations_keep_the_function_and_are_matched_back(name):
    make, inputs, count = MODELS[name]
    model, x = trained(make()).double(), inputs()
    x = x.double() if x.is_floating_point() else x
    spec = trace_permutations(model, x)
    assert len(spec.units) == count, spec
    generator = torch.Generator().manual_seed(1)
    permutations = random_permutations(spec, generator)
    shuffled = permute_model(model, spec, permutations)
    torch.testing.assert_close(shuffled(x), model(x), rtol=1e-9, atol=1e-9)
    assert not same_state(shuffled, model)
    spec.check(model, x)

    pytest.importorskip("scipy")
    data = [x, inputs().to(x.dtype)]
    found = match_permutations(model, shuffled, data)
    assert same_state(found.model, model)
    for key, permutation in found.permutations.items():
        assert torch.equal(permutations[key][permutation], torch.arange(len(permutation)))
        assert found.after[key] == pytest.approx(1) and found.before[key] <= found.after[key]
    assert same_state(match_permutations(model, model, data, spec).model, model)


@EVERY
def test_every_hidden_layer_is_permuted_or_pinned(name):
    """What is left alone is exactly what the inputs and outputs are made of."""
    make, inputs, _ = MODELS[name]
    model = make()
    spec = trace_permutations(model, inputs())
    touched = {(axis.tensor, axis.dim) for units in spec.units for axis in units.axes}
    free = {
        "mlp": {("0.weight", 1), ("5.weight", 0), ("5.bias", 0)},
        "resnet": {("stem.weight", 1), ("head.weight", 0), ("head.bias", 0)},
        "tokens": {("table.weight", 0)},
    }.get(name)
    if free is not None:
        every = {
            (key, dim) for key, p in model.named_parameters() for dim in range(min(2, p.dim()))
        }
        every -= {("positions", 0), ("positions", 1)}
        assert every - touched == free


def test_what_torchvision_builds():
    import support.torchvision_operators  # noqa: F401, makes it importable beside a CPU's torch

    torchvision = pytest.importorskip("torchvision")
    pytest.importorskip("scipy")
    model, x = trained(torchvision.models.resnet18(num_classes=5)), torch.randn(3, 3, 32, 32)
    for module in model.modules():  # near what training leaves, so that activations stay in range
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1).mul_(torch.rand(module.num_features) + 0.5)
    nn.init.kaiming_normal_(model.conv1.weight)
    spec = trace_permutations(model, x)
    assert len(spec.units) == 4 + 8  # a residual stream per stage, an inner layer per block
    spec.check(model.double(), x.double())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, GROUP])
def test_matching_maximises_the_correlations(norm):
    pytest.importorskip("scipy")
    a, b = trained(ResNet(norm)), trained(ResNet(norm))
    data = [image() for _ in range(3)]
    found = match_permutations(a, b, data)
    x = torch.cat(data)
    torch.testing.assert_close(found.model(x), b(x), rtol=1e-3, atol=1e-4)
    correlations = activation_correlations(a, b, data, found.spec)
    again = activation_correlations(a, found.model, data, found.spec)
    for units in found.spec.units:
        best, p = correlations[units.name], found.permutations[units.name]
        torch.testing.assert_close(again[units.name], best[:, p], rtol=1e-3, atol=1e-4)
        generator = torch.Generator().manual_seed(0)
        score = best[torch.arange(units.size), p].mean()
        assert found.after[units.name] == pytest.approx(score.item())
        for _ in range(20):
            other = random_permutations(PermutationSpec((units,)), generator)[units.name]
            assert best[torch.arange(units.size), other].mean() <= score


def test_blocks_are_assigned_optimally():
    scipy = pytest.importorskip("scipy")
    del scipy
    from itertools import permutations

    from htv.methods.connectivity.matching import _assigned, _linear_sum_assignment
    from htv.methods.connectivity.permutations import Units

    scores = torch.randn(6, 6, dtype=torch.float64)
    units = Units("u", 6, (), (), blocks=3)
    found = _assigned(units, scores, _linear_sum_assignment())
    allowed = [
        p for p in permutations(range(6)) if all(p[i] // 2 == p[i + 1] // 2 for i in (0, 2, 4))
    ]
    best = max(allowed, key=lambda p: sum(scores[i, j] for i, j in enumerate(p)))
    assert len(allowed) == 48 and found.tolist() == list(best)


def test_correlations_are_those_of_the_activations():
    a, b = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2))
    with torch.no_grad():
        a[0].bias += 1e4  # large means must not cancel
        b[0].weight[2] = 0  # a unit that is constant
    data = [torch.randn(5, 3), (torch.randn(20, 3), None)]
    found = activation_correlations(a, b, data, trace_permutations(a, data[0]))["0"]
    x = torch.cat([data[0], data[1][0]])
    rows = torch.cat([a[0](x), b[0](x)], dim=1).double().detach()
    expected = torch.corrcoef(rows.T)[:4, 4:]
    expected[:, 2] = 0
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=2e-3
    )  # 1e4 leaves float32 three decimals
    assert (found[:, 2] == 0).all()


def test_a_linear_barrier_may_be_one_of_the_order_alone():
    pytest.importorskip("scipy")
    x = torch.randn(256, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    spec = trace_permutations(model, x)
    shuffled = permute_model(
        model, spec, random_permutations(spec, torch.Generator().manual_seed(0))
    )
    matched = match_permutations(model, shuffled, [x], spec).model
    heights = [
        evaluate_along(LinearPath(model, other), model, {"D": [(x, y)]}, 5).barriers["D"].height
        for other in (shuffled, matched)
    ]
    assert heights[0] > 0.2 and heights[1] == pytest.approx(0, abs=1e-6)


LAYERS = [
    {"name": "channels", "producers": ["0", "1"], "consumers": ["4"]},
    {"name": "hidden", "producers": ["4"], "consumers": ["6"]},
]


def convnet() -> nn.Module:
    return trained(nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
                                 nn.Linear(6 * 36, 8), nn.ReLU(), nn.Linear(8, 3)))  # fmt: skip


def test_specs_by_hand_are_those_of_tracing():
    model, x = convnet(), image()
    by_hand, traced = PermutationSpec.from_layers(model, LAYERS), trace_permutations(model, x)
    for a, b in zip(by_hand.units, traced.units, strict=True):
        assert (a.size, a.blocks, a.observed) == (b.size, b.blocks, tuple(
            type(o)(o.module, a.observed[0].dim, o.outer, o.inner)
            for o in b.observed))  # fmt: skip
        assert set(a.axes) >= set(b.axes)
        assert {axis.tensor for axis in a.axes} == {axis.tensor for axis in b.axes}
    by_hand.check(model, x)
    observed = PermutationSpec.from_layers(model, [LAYERS[0] | {"observe": ["0"]}, LAYERS[1]])
    assert [o.module for o in observed.units[0].observed] == ["0"]


def test_axes_by_hand():
    model = trained(Mobile())
    layers = [
        {"name": "a", "producers": ["expand", "norm", "depth", "act"], "consumers": ["squeeze"]},
    ]
    with pytest.raises(ValueError, match="parameter 'scale' is in no producers or consumers"):
        PermutationSpec.from_layers(model, layers)
    layers = [
        {
            "name": "up",
            "producers": ["up", UnitAxis("scale", 0), "wide"],
            "consumers": [UnitAxis("last.weight", 1, 256)],
        }
    ]
    leave = ["expand", "norm", "depth", "act", "squeeze", "excite"]
    PermutationSpec.from_layers(model, layers, leave).check(model, image())


def test_specs_that_do_not_fit_name_the_layer():
    model = convnet()
    read = lambda *layers, **kw: PermutationSpec.from_layers(model, layers, **kw)
    with pytest.raises(
        ValueError, match="layer '1', a BatchNorm2d, is in no producers or consumers"
    ):
        read({"name": "c", "producers": ["0"], "consumers": ["4"]}, LAYERS[1])
    with pytest.raises(ValueError, match="layer '6', a Linear, is in no producers"):
        read(LAYERS[0])
    read(LAYERS[0], leave=["6"])
    with pytest.raises(ValueError, match="leave names 'head'"):
        read(LAYERS[0], leave=["head"])
    with pytest.raises(ValueError, match="name a layer 'conv9' that the model does not have"):
        read({"name": "c", "producers": ["conv9"], "consumers": []})
    with pytest.raises(
        ValueError,
        match="layer '6' has 8 channels in dim 1 of '6.weight', which cannot be the 6 units",
    ):
        read({"name": "c", "producers": ["0", "1"], "consumers": ["4", "6"]})
    with pytest.raises(
        ValueError, match="layer '1' among the consumers of units 'c' is a BatchNorm2d"
    ):
        read({"name": "c", "producers": ["0"], "consumers": ["1"]})
    with pytest.raises(ValueError, match="dim 0 of '4.weight' is in units 'hidden' and 'again'"):
        read(*LAYERS, {"name": "again", "producers": ["4"], "consumers": ["6"]})
    with pytest.raises(ValueError, match="need name, producers and consumers"):
        read({"name": "c", "inputs": ["0"]})
    with pytest.raises(ValueError, match="hold no linear or convolutional layer"):
        read({"name": "c", "producers": ["1"], "consumers": ["4"]})


def test_a_spec_that_changes_the_function_is_noticed():
    pytest.importorskip("scipy")
    model, x = convnet(), image()
    wrong = PermutationSpec.from_layers(
        model, [LAYERS[0] | {"producers": ["0"]}, LAYERS[1]], leave=["1"]
    )
    with pytest.raises(ValueError, match="permuting units 'channels' changes the model's outputs"):
        match_permutations(model, copy.deepcopy(model), [x], wrong)


def test_a_check_leaves_no_unit_in_its_place():
    """Of two units, a permutation drawn uniformly is the identity half of the time."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)), torch.randn(5, 4)
    wrong = PermutationSpec.from_layers(
        model, [{"name": "pair", "producers": ["0"], "consumers": []}], leave=["2"]
    )
    for seed in range(20):
        with pytest.raises(ValueError, match="permuting units 'pair' changes the model's outputs"):
            wrong.check(model, x, seed=seed)


def test_grouped_convolutions_and_others_are_refused_by_name():
    grouped = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1)
    )
    with pytest.raises(
        UnsupportedError, match="units of layer '0' .*layer '2', a Conv2d of 2 groups.*from_layers"
    ):
        trace_permutations(grouped, image())
    spec = trace_permutations(grouped, image(), on_unsupported="pinned")
    assert spec.units == () and "layer '2', a Conv2d of 2 groups" in spec.pinned["0"]
    layers = [{"name": "c", "producers": ["0"], "consumers": ["2"]}]
    with pytest.raises(
        ValueError, match="layer '2' among the consumers of units 'c' is a Conv2d of 2 groups"
    ):
        PermutationSpec.from_layers(grouped, layers)


class Functional(nn.Module):
    """Some operation between two layers."""

    def __init__(self, between, width: int = 8):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 8), nn.Linear(width, 3), between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


OPERATIONS = {
    "glu": (lambda x: F.glu(x), 4),
    "cat": (lambda x: torch.cat([x, x], 1), 16),
    "shuffle": (lambda x: x.view(-1, 2, 4).transpose(1, 2).flatten(1), 8),
    "matmul": (lambda x: x.T @ x, 8),
    "half": (lambda x: x[:, :4], 4),
    "chunk": (lambda x: x.chunk(2, 1)[1], 4),
    "flip": (lambda x: x.flip(1), 8),
    "sort": (lambda x: x.sort(1)[0], 8),
    "cumsum": (lambda x: x.cumsum(1), 8),
    "transposed": (lambda x: x.T.reshape(-1, 8), 8),
}


ALLOWED = {
    "moved": (lambda x: x.unsqueeze(1).transpose(1, 2).squeeze(2), 8),
    "expanded": (lambda x: x[:, None].expand(-1, 3, -1).mean(1), 8),
    "repeated": (lambda x: x.repeat(1, 2), 16),
    "with pixels": (lambda x: x.view(-1, 8, 1).repeat(1, 1, 3).flatten(1), 24),
    "pixels first": (
        lambda x: x.view(-1, 8, 1).repeat(1, 1, 3).permute(0, 2, 1).reshape(x.shape[0], -1),
        24,
    ),
    "both": (lambda x: x.repeat(1, 2).unsqueeze(2).expand(-1, -1, 2).flatten(1), 32),
    "split": (lambda x: x.unsqueeze(1).repeat(1, 4, 1).chunk(2, 1)[1][:, 0], 8),
    "gated": (lambda x: x * x.softmax(1) + x.clamp(min=0).add_(x), 8),
    "reduced": (lambda x: x.sum(1, keepdim=True).expand(-1, 8), 8),
    "pooled": (lambda x: F.max_pool1d(x.unsqueeze(2).repeat(1, 1, 4), 2).amax(-1), 8),
    "masked": (lambda x: torch.where(x > 0, x, 0.5), 8),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_operations_that_keep_units_apart_are_followed(name):
    between, width = ALLOWED[name]
    model, x = trained(Functional(between, width)).double(), torch.randn(8, 4).double()
    spec = trace_permutations(model, x)
    assert [units.name for units in spec.units] == ["first"]
    moved = permute_model(model, spec, random_permutations(spec, torch.Generator().manual_seed(5)))
    torch.testing.assert_close(moved(x), model(x), rtol=1e-12, atol=1e-12)
    assert not torch.equal(moved.first.weight, model.first.weight)
    assert torch.equal(moved.last.weight, model.last.weight) == (name == "reduced")


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_that_mix_units_are_refused(name):
    between, width = OPERATIONS[name]
    model = Functional(between, width)
    with pytest.raises(
        UnsupportedError, match="units of layer 'first' cannot be followed through operation"
    ):
        trace_permutations(model, torch.randn(8, 4))
    spec = trace_permutations(model, torch.randn(8, 4), on_unsupported="pinned")
    assert not spec.units


def test_what_meets_inputs_is_pinned():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return self.net[2](x + self.net[1](self.net[0](x)))

    spec = trace_permutations(Skip(), torch.randn(5, 4))
    assert not spec.units and "meet 'x'" in spec.pinned["net.0"]


def test_layers_no_forward_reaches_and_untraceable_models():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.aux = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x)
            return self.last(x) if not self.training else (self.last(x), self.aux(x))

    with pytest.raises(UnsupportedError, match="layer 'aux', a Linear, was not reached"):
        trace_permutations(Aux(), torch.randn(2, 4))

    class Dynamic(Aux):
        def forward(self, x):
            return self.last(self.first(x)) if x.sum() > 0 else self.aux(self.first(x))

    with pytest.raises(UnsupportedError, match="torch.fx cannot trace the model.*from_layers"):
        trace_permutations(Dynamic(), torch.randn(2, 4))


class SharedTwice(nn.Module):
    """A layer is called on units, and again on what is not permuted, or cannot be followed."""

    def __init__(self, again):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.other = nn.Linear(6, 2)
        self.again = again

    def forward(self, x):
        h = self.shared(torch.tanh(self.first(x)))
        return self.last(torch.tanh(h)) + self.other(self.shared(self.again(x, h)))


@pytest.mark.parametrize("again", [
    lambda x, h: F.pad(x, (0, 2)),  # not permuted
    lambda x, h: h.cumsum(1),  # not followed
    lambda x, h: (h.T @ h)[:1],
])  # fmt: skip
def test_layers_used_twice_are_permuted_only_if_both_uses_allow_it(again):
    model, x = trained(SharedTwice(again)), torch.randn(8, 4)
    spec = trace_permutations(model, x, on_unsupported="pinned")
    assert ("shared.weight", 1) not in {
        (axis.tensor, axis.dim) for units in spec.units for axis in units.axes
    }
    spec.check(model, x)


def test_parameters_used_by_name_are_permuted_only_if_that_allows_it():
    model, ids = trained(Tokens()), torch.randint(9, (7, 4))

    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, ids):
            return self.net(ids) + F.linear(F.pad(ids.float(), (0, 2)), self.net.table.weight)

    assert {units.name for units in trace_permutations(model, ids).units} == {"table", "up"}
    spec = trace_permutations(ByName(), ids)
    assert [units.name for units in spec.units] == ["net.up"] and "net.table" in spec.pinned
    spec.check(ByName(), ids)


def test_second_inputs_of_a_module_are_seen():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.both = nn.Linear(4, 6), nn.Bilinear(4, 6, 2)

        def forward(self, x):
            return self.both(x, self.first(x))

    with pytest.raises(UnsupportedError, match="units of layer 'first' .*layer 'both', a Bilinear"):
        trace_permutations(Two(), torch.randn(3, 4))


def test_examples_without_a_batch_are_refused():
    with pytest.raises(
        ValueError, match="example must hold a batch in dim 0, but layer '0', a Conv2d"
    ):
        trace_permutations(
            nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)), torch.randn(2, 4, 4)
        )


def test_computed_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    torch.nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(UnsupportedError, match="units of layer '0'"):
        trace_permutations(model, torch.randn(3, 4))
    assert not trace_permutations(model, torch.randn(3, 4), on_unsupported="pinned").units


def test_bad_permutations_are_refused():
    model = ResNet(GROUP)
    spec = trace_permutations(model, image())
    name, size = spec.units[0].name, spec.units[0].size
    with pytest.raises(ValueError, match="no units 'nowhere'"):
        permute_model(model, spec, {"nowhere": torch.arange(3)})
    with pytest.raises(ValueError, match=f"'{name}'. is no permutation of its {size} units"):
        permute_model(model, spec, {name: torch.zeros(size, dtype=torch.long)})
    with pytest.raises(ValueError, match="takes apart some of its 4 blocks"):
        permute_model(model, spec, {name: torch.arange(size).roll(1)})


def test_matching_refuses_what_it_cannot_compare(monkeypatch):
    pytest.importorskip("scipy")
    a, x = convnet(), image()
    with pytest.raises(ValueError, match=r"model is of another architecture: '0.weight' has shape"):
        match_permutations(a, nn.Sequential(nn.Conv2d(2, 7, 3), *convnet()[1:]), [x])
    with pytest.raises(ValueError, match="data gives no batch"):
        match_permutations(a, convnet(), [])
    with pytest.raises(TypeError, match="data is an iterator"):
        match_permutations(a, convnet(), iter([x]))
    with pytest.raises(ValueError, match="forward= needs a spec"):
        match_permutations(a, convnet(), [x], forward=lambda model, batch: model(batch))
    with pytest.raises(ValueError, match="not finite"):
        match_permutations(a, convnet(), [x * float("nan")])
    broken = convnet()
    broken[1].running_mean.fill_(float("nan"))
    with pytest.raises(ValueError, match="activations of units '0' are not finite"):
        match_permutations(broken, a, [x])
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r'needs scipy: pip install "hard-to-vary\[methods\]"'):
        match_permutations(a, convnet(), [x])
