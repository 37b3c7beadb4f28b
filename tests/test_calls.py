"""How many calls of Python the bookkeeping makes: on small models that is what a step costs.

Calls are counted, not timed, by profile functions; so the numbers are those of any machine.
"""

import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import htv
from htv.bench import breakdown, models
from htv.engine.usual import compiled

needs_compiled = pytest.mark.skipif(compiled is None, reason="htv is built without compiled code")
ROOT = str(Path(htv.__file__).parent)
# Once torch.compile was used in a process, a forward keeps compiled functions eager: calls of htv,
# and all.
OWN_WHERE_COMPILED, ALL_WHERE_COMPILED = 3, 12


def was_compiled() -> bool:
    return "torch._dynamo" in sys.modules


def calls(function) -> Counter:
    """Count the calls of Python functions that a call makes, in all threads: by whether htv's."""
    found = Counter()

    def note(frame, event, _):
        if event == "call":
            found[frame.f_code.co_filename.startswith(ROOT)] += 1

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


def settled(model, x):
    """Run a few steps, so that what is found once is found."""
    for _ in range(3):
        model(x).square().mean().backward()
        model.zero_grad()


@needs_compiled
@pytest.mark.parametrize(("bias", "forward", "backward"), [(True, 45, 40), (False, 40, 25)])
def test_one_layer(bias, forward, backward):
    model, x, out = nn.Linear(64, 32, bias=bias), torch.randn(16, 64), []
    with htv.attach(model, htv.AndMask(0.4)):
        settled(model, x)
        allowed = forward + OWN_WHERE_COMPILED * was_compiled()
        assert calls(lambda: out.append(model(x)))[True] <= allowed
        loss = out[0].square().mean()
        assert calls(loss.backward)[True] <= backward


def encoder():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


# A step's budget: all calls of Python in it, those of torch's functions and of builtins, too. Plain
# steps take 1748, 1176 and 1410.
MODELS = {
    "resnet18": (
        lambda: models.ResNet18(width=8, classes=10, norm_groups=2),
        lambda: torch.randn(4, 3, 32, 32),
        6000,
    ),
    "transformer": (
        lambda: models.transformer(64, 64, 4, 4),
        lambda: torch.randint(0, 64, (4, 16)),
        5000,
    ),
    "four encoder layers": (encoder, lambda: torch.randn(4, 8, 64), 6000),
}


@needs_compiled
@pytest.mark.parametrize("name", MODELS)
def test_a_step(name):
    make, batch, budget = MODELS[name]
    model, x = make(), batch()

    def step():
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()

    with htv.attach(model, htv.AndMask(0.4)):
        for _ in range(3):  # so that what is found once is found
            step()
        assert breakdown.calls(step) <= budget + ALL_WHERE_COMPILED * was_compiled()


def test_what_is_counted_can_exceed_a_budget():
    """A call that is not looked up costs several times as many."""
    x = torch.randn(6, 5)
    model = models.mlp()
    with htv.attach(nn.Sequential(nn.Linear(5, 12), model), htv.AndMask(0.4)) as handle:
        first = calls(lambda: handle.model(x))[True]
        handle.model(x)
        assert first > 1.2 * calls(lambda: handle.model(x))[True]
