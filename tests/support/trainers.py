"""What tests of trainers share: an oracle that takes one example at a time, and ranks that run a
test file as a script.
"""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

import htv
import support.torchvision_operators  # noqa: F401, before any trainer is imported
from htv.integrations.voting import measurements
from support import oracles

TESTS = Path(__file__).parents[1]
CANCELLED = 1e-18  # what is left of plain sums of float64 that cancel, as those of keys' biases do


def vote(rule, model, losses, plain=()):
    """Return the aggregated gradient of every parameter.

    losses:  of one example each, as parts of the loss of all; functions of the model.
    plain:   parameters whose gradient is the sum.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    found = {name: [] for name in names}
    for loss in losses:
        model.zero_grad(set_to_none=True)
        loss(model).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                grad = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
                found[name].append(grad)
    model.zero_grad(set_to_none=True)
    result = {}
    for name, parts in found.items():
        stacked = torch.stack(parts).double()
        if name in plain:
            result[name] = stacked.sum(0)
        else:
            each = stacked.flatten(1).numpy()
            aggregate = len(each) * np.asarray(oracles.stat(rule, each))
            result[name] = torch.from_numpy(aggregate).reshape(parts[0].shape)
    return result


def logged(rule, model, loss, exclude=()):
    """Return the numbers for a logger of one process that has all examples in one batch.

    loss:  of all, a function of the model.
    """
    with htv.attach(model, rule, exclude=exclude, stats=True) as handle:
        loss(model).backward()
        return measurements(handle)


def assert_logged(found, expected):
    """Compare numbers for a logger, of which `found` may have others."""
    assert expected and set(expected) <= set(found)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name


def clipped(grads, norm):
    """Return gradients as torch's clip_grad_norm_ leaves them."""
    total = torch.cat([g.flatten() for g in grads.values()]).norm()
    return {name: g * min(1.0, float(norm / (total + 1e-6))) for name, g in grads.items()}


def differences(found, expected):
    """Return the largest error, as a share of the parameter's largest value, and the share of
    coordinates that are zero in one of the two only.
    """
    worst, zeros, count = 0.0, 0, 0
    for name, wanted in expected.items():
        got = found[name]
        got = torch.zeros_like(wanted) if got is None else got.double()
        scale = wanted.abs().max().clamp(min=1e-12)
        worst = max(worst, float((got - wanted).abs().max() / scale))
        differ = ((got == 0) != (wanted == 0)) & ((got - wanted).abs() > CANCELLED)
        zeros += int(differ.sum())
        count += wanted.numel()
    return worst, zeros / count


def assert_close(found, expected, error=0.05, zeros=0.05):
    """Compare gradients of a low precision: a few votes may differ, and no more."""
    differing = differences(found, expected)[1]
    apart = whole = 0.0
    for name, wanted in expected.items():
        got = found[name].double()
        both = (got == 0) == (wanted == 0)
        apart += float((got - wanted)[both].square().sum())
        whole += float(wanted[both].square().sum())
    apart = (apart / whole) ** 0.5
    told = f"error {apart:.1e}, zero-ness differs on {differing:.2%}"
    assert apart <= error and differing <= zeros, told


def assert_same(found, expected, error=1e-9, zeros=0.0):
    worst, apart = differences(found, expected)
    assert worst <= error and apart <= zeros, f"error {worst:.1e}, zero-ness differs on {apart:.2%}"


def watch(optimizer, model, into):
    """Append (parameters, gradients) to a list whenever the optimizer steps."""

    optimizer.register_step_pre_hook(lambda *_: into.append(at_step(model)))


def at_step(model):
    """Return copies of a model's parameters and gradients, by name."""
    named = dict(model.named_parameters())
    parameters = {n: _whole(p.detach()).clone() for n, p in named.items()}
    grads = {n: None if p.grad is None else _whole(p.grad).clone() for n, p in named.items()}
    return parameters, grads


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def launch(script, *arguments, ranks=2, timeout=120, **variables):
    """Run a file as a script on several ranks, each a new process; return what each found.

    The file calls `answer` when it is run as a script. Further arguments are variables of the
    environment.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        started = []
        for rank in range(ranks):
            environment = {
                **os.environ, **variables,
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks), "NODE_RANK": "0", "GROUP_RANK": "0",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
                "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
            }  # fmt: skip
            command = [sys.executable, str(script), f"{folder}/{rank}", *arguments]
            with open(f"{folder}/{rank}.log", "wb") as log:
                started.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
                )
        try:
            codes = [process.wait(timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        logs = [Path(f"{folder}/{rank}.log").read_text()[-3000:] for rank in range(ranks)]
        assert not any(codes), "\n".join(logs)
        return [pickle.loads(Path(f"{folder}/{rank}").read_bytes()) for rank in range(ranks)]


def answer(jobs):
    """Run the named jobs of a script that `launch` started, and leave what they return."""
    torch.set_num_threads(1)
    found = {}
    for name in sys.argv[2:] or jobs:
        try:
            found[name] = jobs[name]()
        except Exception as error:  # for the test to look at
            found[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
    Path(sys.argv[1]).write_bytes(pickle.dumps(found))


class Net(torch.nn.Module):
    """A small model of vectors."""

    def __init__(self, inputs=8, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = torch.nn.Linear(inputs, 12), torch.nn.LayerNorm(12)
        self.last = torch.nn.Linear(12, classes)

    def forward(self, x):
        return self.last(self.norm(self.first(x).relu()))


def vectors(count, inputs=8, classes=5, seed=1):
    """Return (x, y) of a classification, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (count,), generator=generator)


def logged_of_vectors(rule, parameters, x, y):
    """Return the numbers for a logger of one classification of all examples."""
    model = Net().double()
    model.load_state_dict({n: p.double() for n, p in parameters.items()})
    return logged(rule, model, lambda m: torch.nn.functional.cross_entropy(m(x), y))


def vote_of_vectors(rule, parameters, x, y):
    """Return the vote of a classification's examples about the mean loss of all."""
    model = Net().double()
    model.load_state_dict({n: p.double() for n, p in parameters.items()})
    losses = [
        lambda m, e=e: torch.nn.functional.cross_entropy(m(x[e : e + 1]), y[e : e + 1]) / len(x)
        for e in range(len(x))
    ]
    return vote(rule, model, losses)
