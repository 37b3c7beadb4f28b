"""RM3 and RA3 against a loop over NumPy arrays, with everything an optimizer is expected to do."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from htv.methods import RA3, RM3

STATISTICS = {RM3: lambda kept: np.median(kept, axis=0), RA3: lambda kept: np.mean(kept, axis=0)}
BOTH = pytest.mark.parametrize("rolling", STATISTICS, ids=lambda cls: cls.__name__)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (5,), ()]
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]


def gradients(steps: int, seed: int = 1) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters()]
        for _ in range(steps)
    ]


def walk(optimizer, weights, grads) -> None:
    for step in grads:
        for p, g in zip(weights, step, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


@BOTH
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_against_a_loop(rolling, decay, maximize):
    weights = parameters()
    optimizer = rolling(torch.optim.SGD(weights, lr=0.1, weight_decay=decay, maximize=maximize))
    expected = [p.detach().numpy().copy() for p in weights]
    kept = [[] for _ in weights]
    for t, step in enumerate(gradients(7)):
        walk(optimizer, weights, [step])
        for i, grad in enumerate(step):
            kept[i].append((-1 if maximize else 1) * grad.numpy() + decay * expected[i])
            if t >= 2:
                expected[i] = expected[i] - 0.1 * STATISTICS[rolling](kept[i][-3:])
            np.testing.assert_allclose(weights[i].detach(), expected[i], rtol=1e-12, atol=1e-12)
            assert torch.equal(weights[i].grad, grad)  # as it was found


def test_the_first_two_steps_update_nothing():
    weights = parameters()
    before = [p.detach().clone() for p in weights]
    optimizer = RM3(torch.optim.SGD(weights, lr=0.1, weight_decay=0.1))
    walk(optimizer, weights, gradients(2))
    assert all(torch.equal(p, b) for p, b in zip(weights, before, strict=True))
    walk(optimizer, weights, gradients(1))
    assert not any(torch.equal(p, b) for p, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_the_median_is_a_true_one(order):
    inf, nan = float("inf"), float("nan")
    columns = [(1.0, inf, 2.0), (-inf, inf, 3.0), (inf, inf, 1.0), (1e-30, 1.0, 1e30),
               (1.0, 1e30, 1e30), (0.0, 0.0, 5.0), (5.0, nan, 1.0), (-1.0, -1.0, -1.0)]  # fmt: skip
    weight = nn.Parameter(torch.zeros(len(columns)))
    optimizer = RM3(torch.optim.SGD([weight], lr=1.0))
    rows = torch.tensor(columns).t()
    walk(optimizer, [weight], [[rows[i]] for i in order])
    expected = torch.tensor([-2.0, -3.0, -inf, -1.0, -1e30, 0.0, nan, 1.0])
    assert torch.equal(weight.isnan(), expected.isnan())
    assert torch.equal(weight.detach().nan_to_num(7), expected.nan_to_num(7))


def test_a_coordinate_that_one_minibatch_in_three_asks_for_stays():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = RM3(torch.optim.SGD([weight], lr=1.0))
    walk(optimizer, [weight], [[torch.tensor([float(t % 3 == 0), 1.0])] for t in range(9)])
    assert weight.tolist() == [0, -7]


@BOTH
def test_a_parameter_without_gradient_sits_out(rolling):
    grads = gradients(6)
    alone, weights = parameters(), parameters()
    optimizer = rolling(torch.optim.SGD(weights, lr=0.1))
    sparse = [
        [g if (t, i) not in {(1, 0), (4, 0)} else None for i, g in enumerate(s)]
        for t, s in enumerate(grads)
    ]
    walk(optimizer, weights, sparse)
    reference = rolling(torch.optim.SGD(alone, lr=0.1))
    walk(
        reference, alone, [[s[0], None, None] for s in sparse if s[0] is not None]
    )  # the first parameter's own time
    assert torch.equal(weights[0], alone[0])
    full = parameters()
    walk(rolling(torch.optim.SGD(full, lr=0.1)), full, grads)
    assert torch.equal(weights[1], full[1]) and not torch.equal(weights[0], full[0])


@BOTH
def test_other_optimizers_get_the_statistic_as_their_gradient(rolling):
    weights, twin = parameters(), parameters()
    optimizer = rolling(torch.optim.AdamW(weights, lr=0.1, betas=(0.0, 0.9), weight_decay=0.2))
    plain = torch.optim.AdamW(twin, lr=0.1, betas=(0.0, 0.9), weight_decay=0.2)
    grads = gradients(6)
    walk(optimizer, weights, grads)
    for t in range(2, 6):
        seen = [[grads[k][i] for k in (t - 2, t - 1, t)] for i in range(3)]
        walk(plain, twin, [[torch.from_numpy(np.asarray(STATISTICS[rolling](g))) for g in seen]])
    for p, q in zip(weights, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_momentum_is_refused_unless_it_is_meant():
    with pytest.raises(
        ValueError, match=r"RM3 is defined without momentum.*momentum=0\.9.*allow_momentum=True"
    ):
        RM3(torch.optim.SGD(parameters(), lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match=r"RA3.*betas\[0\]=0\.9"):
        RA3(torch.optim.Adam(parameters()))
    RM3(torch.optim.Adam(parameters(), betas=(0.0, 0.99)))
    weights = parameters()
    optimizer = RM3(torch.optim.SGD(weights, lr=0.1, momentum=0.9), allow_momentum=True)
    walk(optimizer, weights, gradients(4))
    assert optimizer.optimizer.state[weights[0]]["momentum_buffer"].abs().sum() > 0
    later = RM3(torch.optim.SGD(parameters(), lr=0.1))
    with pytest.raises(ValueError, match="without momentum"):
        later.add_param_group({"params": [nn.Parameter(torch.ones(2))], "momentum": 0.5})
    with pytest.raises(TypeError, match="complex"):
        later.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(later.param_groups) == 1
    later.param_groups[0]["momentum"] = 0.9  # as a scheduler might
    with pytest.raises(ValueError, match="without momentum"):
        later.step()


def test_what_cannot_be_wrapped_is_refused():
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer"):
        RM3(parameters())
    with pytest.raises(TypeError, match="cannot wrap LBFGS"):
        RM3(torch.optim.LBFGS(parameters()))
    with pytest.raises(TypeError, match="cannot wrap RM3"):
        RA3(RM3(torch.optim.SGD(parameters())))
    with pytest.raises(TypeError, match="complex"):
        RM3(torch.optim.SGD([nn.Parameter(torch.ones(2, dtype=torch.complex64))]))
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = RM3(torch.optim.SGD(table.parameters(), lr=0.1))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"):
        optimizer.step()


class Decaying(torch.optim.SGD):
    """Somebody's own optimizer: how it decays weights is not known."""


def test_unknown_decay_must_be_told():
    with pytest.raises(ValueError, match="cannot tell whether Decaying adds weight_decay=0.1"):
        RM3(Decaying(parameters(), lr=0.1, weight_decay=0.1))
    weights, twin = parameters(), parameters()
    told = RM3(Decaying(weights, lr=0.1, weight_decay=0.1), decay_first=True)
    known = RM3(torch.optim.SGD(twin, lr=0.1, weight_decay=0.1))
    for optimizer, at in ((told, weights), (known, twin)):
        walk(optimizer, at, gradients(5))
    assert all(torch.equal(p, q) for p, q in zip(weights, twin, strict=True))
    assert told.param_groups[0]["weight_decay"] == 0.1


def test_groups_schedulers_closures_and_zero_grad():
    weights = parameters()
    optimizer = RM3(torch.optim.SGD(weights[:1], lr=0.1))
    optimizer.add_param_group({"params": weights[1:], "lr": 0.5})
    assert (
        optimizer.param_groups is optimizer.optimizer.param_groups
        and len(optimizer.param_groups) == 2
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    def closure():
        optimizer.zero_grad()
        assert all(p.grad is None for p in weights)
        loss = sum(p.square().sum() for p in weights)
        loss.backward()
        return loss

    losses = []
    for _ in range(4):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[0] == losses[1] == losses[2] > losses[3]
    assert optimizer.optimizer.param_groups[1]["lr"] == pytest.approx(0.5**5)
    assert "SGD" in repr(optimizer)


@BOTH
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_checkpoints_go_on_bit_by_bit(rolling, stop):
    make = lambda at: rolling(torch.optim.Adagrad(at, lr=0.1, weight_decay=0.01))
    grads, whole, first, second = gradients(7), parameters(), parameters(), parameters(seed=9)
    walk(make(whole), whole, grads)
    before = make(first)
    walk(before, first, grads[:stop])
    file = io.BytesIO()
    torch.save([before.state_dict(), first], file)
    file.seek(0)
    state, saved = torch.load(file, weights_only=False)
    for p, q in zip(second, saved, strict=True):
        p.data.copy_(q)
    after = make(second)
    after.load_state_dict(state)
    assert after.param_groups is after.optimizer.param_groups
    walk(after, second, grads[stop:])
    assert all(torch.equal(p, q) for p, q in zip(second, whole, strict=True))


@BOTH
def test_half_precision_keeps_what_decay_adds(rolling):
    """A decay of 1e-4, less than bfloat16 tells beside 1, is all that gradients 1 and -1 leave."""
    decay, grads = 1e-4, [[torch.tensor(g)] for g in ([1.0, 0.125], [-1.0, 0.25], [0.0, 0.0])]
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    make = lambda: rolling(torch.optim.SGD([weight], lr=0.0, weight_decay=decay))
    seen = []
    optimizer = make()
    optimizer.optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))
    for step in grads:
        walk(optimizer, [weight], [[step[0].bfloat16()]])
        state = optimizer.state_dict()
        loaded = make()
        loaded.load_state_dict(state)
        for name, kept in optimizer.state[weight].items():
            assert kept.dtype == torch.float32 and torch.equal(kept, loaded.state[weight][name])
    kept = np.stack([step[0].double().numpy() for step in grads]) + decay
    assert seen[0].dtype == torch.bfloat16
    np.testing.assert_allclose(seen[0].double(), STATISTICS[rolling](kept), rtol=4e-3, atol=1e-7)


def test_a_loaded_learning_rate_is_the_wrapped_optimizers():
    one, two = (
        RM3(torch.optim.SGD(parameters(), lr=0.1)),
        RM3(torch.optim.SGD(parameters(), lr=0.9)),
    )
    two.load_state_dict(one.state_dict())
    assert two.optimizer.param_groups[0]["lr"] == 0.1
    torch.optim.lr_scheduler.StepLR(two, 1)  # finds initial_lr where it looks
    assert two.optimizer.param_groups[0]["initial_lr"] == 0.1


def test_another_optimizers_state_is_refused_before_any_change():
    weights = parameters()
    mine = RM3(torch.optim.SGD(weights, lr=0.1))
    walk(mine, weights, gradients(3))
    before = copy.deepcopy(mine.state_dict())
    sgd = torch.optim.SGD(parameters(), lr=0.1)
    shaped = RM3(torch.optim.SGD([nn.Parameter(torch.ones(9)) for _ in range(3)], lr=0.1))
    for p in shaped.param_groups[0]["params"]:
        p.grad = torch.ones(9)
    shaped.step()
    others = {
        "not of RM3 around SGD, but of another optimizer": sgd,
        "of RA3 around SGD, this is RM3 around SGD": RA3(torch.optim.SGD(parameters(), lr=0.1)),
        "of RM3 around Adagrad, this is RM3 around SGD": RM3(torch.optim.Adagrad(parameters())),
        r"groups of \[2\] parameters, this optimizer has groups of \[3\]": RM3(
            torch.optim.SGD(parameters()[:2], lr=0.1)
        ),
        r"'newer' of shape \(9,\) for parameter 0, whose shape is \(3, 4\)": shaped,
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            mine.load_state_dict(other.state_dict())
        for key, kept in before["state"].items():
            assert all(
                torch.equal(mine.state_dict()["state"][key][name], t) for name, t in kept.items()
            )


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_copies_are_whole(through):
    weights = parameters()
    optimizer = RM3(torch.optim.SGD(weights, lr=0.1))
    walk(optimizer, weights, gradients(4))
    copied, at = through((optimizer, weights))
    assert copied.param_groups is copied.optimizer.param_groups
    walk(optimizer, weights, gradients(3, seed=5))
    walk(copied, at, gradients(3, seed=5))
    assert all(torch.equal(p, q) for p, q in zip(weights, at, strict=True))
