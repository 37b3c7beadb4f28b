"""Models as Hugging Face, timm and PEFT build them, against one example at a time under one rule of
every family.
"""

import pytest
import torch

import htv
import support.torchvision_operators  # noqa: F401, before what imports torchvision
from htv.tools.check import aggregated, one_group_at_a_time
from support.oracles import by_name

for name in ("peft", "timm", "transformers"):
    pytest.importorskip(name, reason="needs the extra `models`")

from support import zoo  # noqa: E402

RULES = [htv.Mean(), htv.AndMask(0.4), htv.Median(), htv.WinsorizedMean(1)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For calls this small more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rule", RULES, **by_name)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_model(name, rule):
    model, batch = zoo.MODELS[name]()
    report = htv.check(model, batch, rule)
    assert report.groups == zoo.N
    assert report.parameters == sum(p.requires_grad for p in model.parameters()) > 0
    assert report.ambiguous < 0.05


@pytest.mark.parametrize("name", zoo.TEXT)
def test_as_many_tokens_as_examples(name, monkeypatch):
    """Four of each, and as many heads: no size tells where the batch is."""
    monkeypatch.setattr(zoo, "N", 4)
    monkeypatch.setattr(zoo, "T", 4)
    assert htv.check(*zoo.MODELS[name](), htv.Median())


@pytest.mark.parametrize("name", zoo.MODELS)
def test_examples_vote_in_groups(name):
    model, batch = zoo.MODELS[name]()
    assert htv.check(model, batch, htv.Median(), groups=torch.tensor([8, 2, 5, 2, 8])).groups == 3


@pytest.mark.parametrize("name", ["gpt2-lora", "llama-lora"])
def test_only_adapters_train(name):
    model, batch = zoo.MODELS[name]()
    with htv.attach(model, htv.Median()):
        model(**batch).logits.square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_an_expert_few_examples_reach_has_no_median(name):
    """An expert that sees no token of an example is given zero by it."""
    model, batch = zoo.MODELS[name]()
    weight = model.double().model.layers[-1].mlp.experts.down_proj
    loss = lambda rows: (
        model(**{key: value[rows] for key, value in batch.items()}).logits.square().sum()
    )
    contributions = one_group_at_a_time(lambda e: loss(slice(e, e + 1)), {"weight": weight}, zoo.N)[
        "weight"
    ]
    examples = contributions.flatten(2).any(dim=2).sum(dim=0)  # that reach each expert
    few = (examples > 0) & (examples < zoo.N / 2)
    assert few.any()
    with htv.attach(model, htv.Median()):
        loss(slice(None)).backward()
    assert not weight.grad[few].any()
    torch.testing.assert_close(
        weight.grad, aggregated(contributions, htv.Median()), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "mixtral", "gpt2-lora"])
def test_gradient_checkpointing(name):
    """As Hugging Face's Trainer switches it on."""
    model, batch = zoo.MODELS[name]()
    model.double().train()  # no dropout in the zoo

    def gradients():
        model.zero_grad()
        with htv.attach(model, htv.Median()):
            model(**batch).logits.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter, grad in gradients().items():
        if grad is not None or expected[parameter] is not None:
            torch.testing.assert_close(
                grad, expected[parameter], rtol=1e-6, atol=1e-9, msg=parameter
            )
