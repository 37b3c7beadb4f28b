"""Rules of one's own: a subclass of htv.Rule with reduce() serves every layer, or is refused."""

import copy
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import htv
from htv.ops import aggregate, functional, limits
from htv.ops.factors import EmbeddingFactors
from htv.rules import Rule, Statistic, refuse_open


class OwnMedian(htv.Rule):
    """As htv.Median."""

    def reduce(self, contributions):
        ranked = contributions.sort(dim=0).values
        lower, higher = ranked[(len(ranked) - 1) // 2], ranked[len(ranked) // 2]
        value = torch.where(lower == higher, lower, 0.5 * lower + 0.5 * higher)
        return torch.where(contributions.isnan().any(dim=0), torch.nan, value)


@dataclass(frozen=True)
class OwnAndMask(htv.Rule):
    """As htv.AndMask."""

    tau: float

    def reduce(self, contributions):
        groups, votes = len(contributions), contributions.sign().sum(dim=0).abs()
        kept = votes >= round(self.tau * groups, 6)
        return torch.where(kept, contributions.sum(dim=0) / groups, 0)


class Shifted(htv.Rule):
    """The mean and one: what nobody contributes to is not zero."""

    def reduce(self, contributions):
        return contributions.mean(dim=0) + 1


PAIRS = [(OwnMedian(), htv.Median()), (OwnAndMask(0.4), htv.AndMask(0.4))]
by_class = {"ids": lambda rule: type(rule).__name__}


class Sentences(nn.Module):
    """Embeddings of tokens and positions, some never looked up; tied with the head, or not."""

    def __init__(self, tied):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(30, 6), nn.Parameter(torch.randn(9, 6))
        self.norm, self.gain = nn.LayerNorm(6), nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(6, 30, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        return self.head(self.norm(x.tanh()) * self.gain)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 6, 2, groups=3),
        nn.Tanh(), nn.ConvTranspose2d(6, 3, 2), nn.Flatten(), nn.Linear(3 * 25, 2),
    )  # fmt: skip


MODELS = {
    "linear": lambda: (
        nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(8, 4, 5),
    ),
    "conv": lambda: (convolutions(), torch.randn(8, 2, 5, 5)),
    "embedding": lambda: (Sentences(tied=False), torch.randint(0, 12, (8, 4))),
    "tied": lambda: (Sentences(tied=True), torch.randint(0, 12, (8, 4))),
    "computed": lambda: (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 2)),
        torch.randn(8, 5),
    ),
    "attention": lambda: (
        nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), torch.randn(8, 3, 8),
    ),
    "recurrent": lambda: (Recurrent(), torch.randn(8, 3, 4)),
}  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def gradients(model, batch, rule, groups=None, **options):
    """Every parameter's .grad after one backward of an attached model."""
    model.zero_grad()
    with htv.attach(model, rule, **options) as handle:
        if groups is None:
            loss = model(batch).square().sum()
        else:
            with handle.groups(groups):
                loss = model(batch).square().sum()
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


IDS = torch.tensor([4, 1, 1, 2, 4, 4, 7, 2])


@pytest.mark.parametrize("groups", [None, IDS], ids=["each", "groups"])
@pytest.mark.parametrize("own, built_in", PAIRS, ids=["median", "and_mask"])
@pytest.mark.parametrize("name", MODELS)
def test_copies_of_htvs_rules_agree_with_them(name, own, built_in, groups):
    model, batch = MODELS[name]()
    model.double()
    batch = batch.double() if batch.is_floating_point() else batch
    assert htv.check(model, batch, own, groups=groups)
    found, expected = (gradients(model, batch, rule, groups) for rule in (own, built_in))
    for parameter, grad in found.items():
        torch.testing.assert_close(grad, expected[parameter], rtol=1e-9, atol=1e-11, msg=parameter)


@pytest.mark.parametrize("name", ["linear", "conv", "recurrent", "attention"])
def test_a_median_is_bit_for_bit_that_of_the_same_slices(name):
    model, batch = MODELS[name]()
    with htv.use_backend("reference"):
        found, expected = (gradients(model, batch, rule) for rule in PAIRS[0])
    assert all(torch.equal(grad, expected[parameter]) for parameter, grad in found.items())


@pytest.mark.parametrize("name", MODELS)
def test_what_nobody_contributes_to_is_reduced_too(name):
    """Rows of a table nobody looks up, positions beyond the last: reduce() of zeros is 1 there."""
    model, batch = MODELS[name]()
    plain = gradients(model, batch, htv.Mean())
    found = gradients(model, batch, Shifted())
    for parameter, grad in found.items():
        torch.testing.assert_close(grad, plain[parameter] + 8, rtol=1e-4, atol=1e-4, msg=parameter)
    if name in ("embedding", "tied"):
        assert (plain["positions"][4:] == 0).all() and (found["positions"][4:] == 8).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_htv_check_in_other_types(dtype):
    model, batch = MODELS["linear"]()
    assert htv.check(model, batch, OwnMedian(), dtype=dtype)
    assert htv.check(model, batch, OwnAndMask(0.4), dtype=dtype)


def test_htv_check_notices():
    class Drifts(htv.Rule):
        calls = 0

        def reduce(self, contributions):
            Drifts.calls += 1
            return contributions.mean(dim=0) * (1 + 0.01 * Drifts.calls)

    model, batch = MODELS["linear"]()
    with pytest.raises(htv.CheckError, match="under Drifts"):
        htv.check(model, batch, Drifts())


# -- boxes -----------------------------------------------------------------------------------------


class Recording(htv.Rule):
    """The mean, and what boxes it was shown."""

    def __init__(self):
        self.seen = []

    def reduce(self, contributions):
        contiguous = contributions.is_contiguous()
        self.seen.append((tuple(contributions.shape), contributions.dtype, contiguous))
        return contributions.mean(dim=0)


@pytest.mark.parametrize(
    "make, batch",
    [
        (lambda: nn.Linear(300, 400), torch.randn(40, 300)),
        (lambda: nn.Conv1d(64, 96, 9), torch.randn(24, 64, 12)),
        (lambda: nn.Bilinear(30, 40, 20), torch.randn(80, 30)),
        (lambda: nn.Embedding(3000, 64), torch.randint(0, 3000, (20, 200))),
    ],
    ids=["linear", "conv", "bilinear", "embedding"],
)
def test_boxes_stay_within_the_scratch_budget(make, batch):
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make()

        def forward(self, x):
            other = [x[:, :1] + torch.ones(40)] if isinstance(self.layer, nn.Bilinear) else []
            return self.layer(x, *other)

    rule, model = Recording(), Only()
    found = gradients(model, batch, lambda name, p: rule if name.endswith("weight") else None)
    weight = model.layer.weight
    assert len(rule.seen) > 1
    for shape, dtype, contiguous in rule.seen:
        assert shape[0] == len(batch) and len(shape) == 1 + weight.dim()
        assert dtype == torch.float32 and contiguous
        assert 4 * torch.Size(shape).numel() <= limits.SCRATCH_BYTES
    if not isinstance(
        model.layer, nn.Embedding
    ):  # of a table, rows nobody looked up are not looked at twice
        assert sum(torch.Size(shape[1:]).numel() for shape, _, _ in rule.seen) == weight.numel()
    plain = gradients(model, batch, htv.Mean())
    torch.testing.assert_close(found["layer.weight"], plain["layer.weight"], rtol=1e-3, atol=1e-3)


def test_boxes_have_the_dims_of_the_parameter():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.scalar, self.vector = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.randn(3))
            self.matrix, self.conv = nn.Linear(3, 2, bias=False), nn.Conv2d(1, 2, 3, bias=False)

        def forward(self, x):
            seen = self.conv(x[:, None]).sum(dim=(2, 3))
            return seen + self.matrix(x.mean(dim=1)[:, :3] * self.vector) * self.scalar

    rules = {}

    def rule_of(name, parameter):
        return rules.setdefault(name, Recording())

    model = Scales()
    with htv.attach(model, rule_of):
        model(torch.randn(5, 6, 5)).square().sum().backward()
    dims = {name: {len(shape) - 1 for shape, _, _ in rule.seen} for name, rule in rules.items()}
    assert dims == {"scalar": {0}, "vector": {1}, "matrix.weight": {2}, "conv.weight": {4}}


def test_what_is_kept_or_written_to_spoils_nothing():
    class Rude(htv.Rule):
        def reduce(self, contributions):
            contributions[0] = contributions.mean(dim=0)
            contributions[1:].fill_(torch.nan)
            return contributions[0]  # a view

    for name in ("linear", "embedding", "attention"):
        model, batch = MODELS[name]()
        found, plain = gradients(model, batch, Rude()), gradients(model, batch, htv.Mean())
        for parameter, grad in found.items():
            torch.testing.assert_close(grad, plain[parameter], rtol=1e-3, atol=1e-4, msg=parameter)


def test_random_numbers_are_drawn_for_rows_nobody_looked_up():
    class Noisy(htv.Rule):
        def reduce(self, contributions):
            return contributions.mean(dim=0) + torch.randn_like(contributions[0])

    bounds = torch.arange(5)
    part = EmbeddingFactors(torch.tensor([0, 1, 2, 1]), torch.randn(4, 3), bounds, 50)
    found = aggregate.aggregate([part], Noisy())
    assert found.unique().numel() == found.numel()


def test_nan_of_nothing_is_one_value():
    class Ratio(htv.Rule):
        def reduce(self, contributions):
            return contributions.sum(dim=0) / contributions.abs().sum(dim=0)

    part = EmbeddingFactors(torch.tensor([0, 2]), torch.ones(2, 3), torch.arange(3), 5)
    found = aggregate.aggregate([part], Ratio())
    assert found.isnan().all(dim=1).tolist() == [False, True, False, True, True]
    assert (found[[0, 2]] == 2).all()


# -- where else rules are taken --------------------------------------------------------------------


def test_linear_grad_and_stacked_contributions():
    x, g = torch.randn(9, 4), torch.randn(9, 3)
    torch.testing.assert_close(
        htv.linear_grad(x, g, OwnMedian()), htv.linear_grad(x, g, htv.Median())
    )
    grads = torch.randn(5, 2, 3, requires_grad=True)
    found = functional.apply_rule(grads, OwnAndMask(0.5))
    torch.testing.assert_close(found, htv.and_mask(grads, 0.5))
    (own,), (built_in,) = (
        torch.autograd.grad(value.sum(), grads) for value in (found, htv.and_mask(grads, 0.5))
    )
    torch.testing.assert_close(own, built_in)
    half = torch.randn(5, 3).bfloat16()
    assert functional.apply_rule(half, OwnMedian()).dtype == torch.bfloat16


def test_stats_keep_everything():
    model, batch = MODELS["linear"]()
    with htv.attach(model, OwnAndMask(0.9), stats=True) as handle:
        model(batch).square().sum().backward()
        own = handle.stats()
    with htv.attach(model, htv.AndMask(0.9), stats=True) as handle:
        model(batch).square().sum().backward()
        built_in = handle.stats()
    for name, found in own.items():
        assert found.kept_fraction == 1.0
        assert found.mean_agreement == pytest.approx(built_in[name].mean_agreement)
        assert found.m_coherence == pytest.approx(built_in[name].m_coherence)


def test_tokens_vote():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    x, found = torch.randn(4, 3, 5), []
    for rule in (OwnMedian(), htv.Median()):
        model.zero_grad()
        with htv.attach(model, rule) as handle, handle.tokens():
            model(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for own, built_in in zip(*found, strict=True):
        torch.testing.assert_close(own, built_in, rtol=1e-4, atol=1e-5)


def test_half_precision_is_reduced_in_single():
    rule, model = Recording(), nn.Linear(4, 3).bfloat16()
    found = gradients(model, torch.randn(6, 4).bfloat16(), rule)
    assert {dtype for _, dtype, _ in rule.seen} == {torch.float32}
    assert {grad.dtype for grad in found.values()} == {torch.bfloat16}


# -- what kind of class a rule may be --------------------------------------------------------------


class Scaled(htv.Rule):
    def __init__(self, scale):
        self.scale = scale

    def reduce(self, contributions):
        return self.scale * contributions.mean(dim=0)


def test_two_rules_of_one_plain_class_are_two():
    model, batch = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(6, 4)
    plain = gradients(model, batch, htv.Mean())
    found = gradients(model, batch, lambda name, p: Scaled(2.0 if name.startswith("0") else 3.0))
    for name, grad in found.items():
        torch.testing.assert_close(grad, plain[name] * (2 if name.startswith("0") else 3))
    assert Scaled(1.0) != Scaled(1.0) and repr(Scaled(1.0)) == "Scaled(scale=1.0)"


def test_a_rule_that_changes_is_followed():
    model, batch, rule = nn.Linear(4, 3), torch.randn(6, 4), Scaled(1.0)
    plain = gradients(model, batch, htv.Mean())
    for rule.scale in (1.0, 5.0):
        torch.testing.assert_close(
            gradients(model, batch, rule)["weight"], rule.scale * plain["weight"]
        )


def test_a_rule_that_resolves_itself_otherwise_every_time_is_followed():
    class Annealed(htv.Rule):
        tau = 0.0

        def statistic(self, num_groups):
            return htv.AndMask(self.tau).statistic(num_groups)

    @dataclass(frozen=True)
    class Scheduled(htv.Rule):
        taus: list

        def statistic(self, num_groups):
            return htv.AndMask(self.taus[-1]).statistic(num_groups)

    x, g, rule = torch.randn(6, 4), torch.randn(6, 3), Annealed()
    scheduled = Scheduled([])
    for rule.tau in (0.0, 0.7, 0.3):
        scheduled.taus.append(rule.tau)
        expected = htv.linear_grad(x, g, htv.AndMask(rule.tau))
        assert torch.equal(htv.linear_grad(x, g, rule), expected)
        assert torch.equal(htv.linear_grad(x, g, scheduled), expected)


def test_a_rule_that_cannot_be_hashed():
    @dataclass
    class Unhashable(htv.Rule):
        values: list = field(default_factory=list)

        def reduce(self, contributions):
            return contributions.mean(dim=0)

    with pytest.raises(TypeError):
        hash(Unhashable())
    x, g = torch.randn(6, 4), torch.randn(6, 3)
    torch.testing.assert_close(htv.linear_grad(x, g, Unhashable()), g.T @ x)


def test_reduce_wins_over_what_it_inherits():
    class OwnMean(htv.Mean):
        def reduce(self, contributions):
            return 7 * contributions.mean(dim=0)

    x, g = torch.randn(6, 4), torch.randn(6, 3)
    assert OwnMean.is_open and not OwnMean.streaming and not htv.Mean.is_open
    torch.testing.assert_close(htv.linear_grad(x, g, OwnMean()), 7 * g.T @ x)


def test_copies_and_pickles():
    for rule in (OwnAndMask(0.3), Scaled(2.0)):
        for twin in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
            assert vars(twin) == vars(rule) and type(twin) is type(rule)


# -- refusals --------------------------------------------------------------------------------------


def returns(value):
    return type(
        "Returns", (htv.Rule,), {"reduce": lambda self, contributions: value(contributions)}
    )()


@pytest.mark.parametrize(
    "value, error, message",
    [
        (
            lambda c: c,
            ValueError,
            r"Returns.reduce\(\) must return \(\*box\), \(3, 4\).*\(6, 3, 4\)",
        ),
        (lambda c: c.mean(), ValueError, r"Returns.reduce\(\) must return .*got \(\)"),
        (
            lambda c: c.mean(0).double(),
            TypeError,
            r"dtype .*float32, got torch.float64.*\.to\(cont",
        ),
        (lambda c: c[0] > 0, TypeError, "Returns.reduce.*got torch.bool"),
        (
            lambda c: c.mean(0).to("meta"),
            ValueError,
            "on cpu, as the contributions are, got one on meta",
        ),
        (lambda c: None, TypeError, "Returns.reduce.. must return a tensor, got NoneType"),
    ],
)
def test_what_reduce_returns_is_looked_at(value, error, message):
    with pytest.raises(error, match=message):
        htv.linear_grad(torch.randn(6, 4), torch.randn(6, 3), returns(value))


def test_an_incomplete_rule_is_refused_at_attach():
    class Incomplete(htv.Rule):
        pass

    with pytest.raises(
        TypeError, match=r"Incomplete is not a complete rule: define Incomplete.reduce"
    ):
        htv.attach(nn.Linear(3, 2), Incomplete())


def test_a_statistic_htv_does_not_have():
    class Krum(Rule):
        def statistic(self, num_groups):
            return Statistic("krum")

    class Nothing(Rule):
        def statistic(self, num_groups):
            return "median"

    with pytest.raises(
        TypeError, match=r"Krum.statistic\(\) names 'krum'.*define Krum.reduce\(self"
    ):
        functional.apply_rule(torch.randn(5, 3), Krum())
    model = nn.Linear(3, 2)
    with htv.attach(model, Krum()), pytest.raises(TypeError, match="define Krum.reduce"):
        model(torch.randn(5, 3)).sum().backward()
    with pytest.raises(
        TypeError, match=r"Nothing.statistic\(\) must return an htv.rules.Statistic"
    ):
        functional.apply_rule(torch.randn(5, 3), Nothing())


def test_accumulation_is_refused_by_name():
    with htv.attach(nn.Linear(3, 2), OwnMedian()) as handle:
        with pytest.raises(
            ValueError, match="OwnMedian, the rule of parameter 'weight', is one of your"
        ):
            handle.accumulate().__enter__()


def test_others_refuse_by_name():
    refuse_open([htv.Median()], "a compiled model", "run it without torch.compile")
    with pytest.raises(
        htv.UnsupportedError, match="OwnMedian is a rule of your own, and a compiled"
    ):
        refuse_open([htv.Median(), OwnMedian()], "a compiled model", "run it without torch.compile")


def test_one_group_alone_is_refused_unless_the_rule_says_otherwise():
    model = nn.Linear(3, 2)
    with htv.attach(model, OwnMedian()), pytest.raises(ValueError, match="one group alone votes"):
        model(torch.randn(1, 3))

    class Lonely(OwnMedian):
        needs_several = False

    gradients(model, torch.randn(1, 3), Lonely())
