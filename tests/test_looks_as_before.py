"""An attached model looks and acts as before to those who read its forward, with the real
libraries.
"""

import importlib.util
import inspect
from types import MethodType

import pytest
import torch
from torch import nn

import htv


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 4)

    def forward(self, input_ids, labels=None, *, scale: float = 1.0):
        """Multiply."""
        return self.a(input_ids) * scale


def test_readers_of_the_forward_see_the_plain_one():
    model = Model()
    plain, signature = model.forward, inspect.signature(model.forward)
    with htv.attach(model, htv.Median()):
        assert inspect.signature(model.forward) == signature
        assert inspect.getfullargspec(model.forward).kwonlyargs == ["scale"]
        for name in (
            "__name__",
            "__qualname__",
            "__doc__",
            "__module__",
            "__code__",
            "__defaults__",
            "__kwdefaults__",
        ):
            assert getattr(model.forward, name) == getattr(plain, name), name
        assert model.forward.__wrapped__ == plain and inspect.unwrap(model.forward) == plain
        assert model.forward.__self__ is model and callable(model.forward)
        assert not hasattr(model.forward, "no_such_thing")
    assert model.forward == plain and "forward" not in vars(model)


def test_a_forward_wrapped_by_its_function_is_still_served():
    """As accelerate does for autocast: model.forward = MethodType(wrap(model.forward.__func__),
    model).
    """
    model, x = Model(), torch.randn(6, 5)
    with htv.attach(model, htv.AndMask(1.0)):
        model(x).square().sum().backward()
        expected, model.a.weight.grad = model.a.weight.grad, None
        function = model.forward.__func__
        model.forward = MethodType(
            lambda self, *args, **kwargs: function(self, *args, **kwargs), model
        )
        model(x).square().sum().backward()
        torch.testing.assert_close(model.a.weight.grad, expected)
    model.zero_grad()
    model(x).square().sum().backward()  # detached: whoever kept the forward gets the plain one
    assert not torch.equal(model.a.weight.grad, expected)


EXPORTERS = {
    "torch.jit.script": lambda model, x: torch.jit.script(model),
    "torch.jit.trace": lambda model, x: torch.jit.trace(model, x),
    "torch.export": lambda model, x: torch.export.export(model, (x,)),
}


@pytest.mark.parametrize("name", EXPORTERS)
def test_exporters_are_told_to_detach(name):
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU()), torch.randn(6, 5)
    handle = htv.attach(model, htv.Median())
    with pytest.raises(htv.UnsupportedError, match="cannot be exported or scripted.*detach"):
        EXPORTERS[name](model, x)
    model(x).sum().backward()  # usable again
    handle.detach()
    EXPORTERS[name](model, x)


def test_a_scripted_part_is_refused_unless_excluded():
    model = nn.ModuleDict({"a": nn.Linear(5, 4), "b": torch.jit.script(nn.Linear(4, 3))})
    model.forward = lambda x: model["b"](model["a"](x))
    with pytest.raises(
        htv.UnsupportedError, match="its part 'b' was compiled by torch.jit.*exclude='b'"
    ):
        htv.attach(model, htv.Median())
    with htv.attach(model, htv.Median(), exclude="b"):
        model(torch.randn(6, 5)).sum().backward()


def test_symbolic_traces_of_an_attached_model():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(6, 5)
    expected = model(x)
    with htv.attach(model, htv.Median()):
        traced = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(traced(x), expected)


def transformers_library():
    """The library, imported as the zoo does, beside a torchvision without its operators."""
    if not all(map(importlib.util.find_spec, ("transformers", "timm", "peft"))):
        pytest.skip("needs the extra `models`")
    return importlib.import_module("support.zoo").transformers


def test_generate_infers_the_padding_mask():
    transformers = transformers_library()
    torch.manual_seed(0)
    settings = dict(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5
    )
    config = transformers.GPT2Config(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.tensor([[0, 0, 0, 7, 8, 9], [3, 4, 5, 6, 7, 8]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    with htv.attach(model, htv.Median()):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_trainer_keeps_its_columns_and_its_accumulation_is_warned_of(tmp_path):
    transformers = transformers_library()
    pytest.importorskip("accelerate")
    model = Text()
    data = [
        {"input_ids": torch.randint(0, 50, (6,)), "labels": i % 2, "text_id": i} for i in range(32)
    ]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    with htv.attach(model, htv.WinsorizedMean(1)):
        with pytest.warns(UserWarning, match=r"accumulate\(\)"):
            transformers.Trainer(model, arguments, train_dataset=data).train()


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.l = nn.Embedding(50, 16), nn.Linear(16, 2)

    def forward(self, input_ids, labels=None):
        logits = self.l(self.e(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
