"""Public names are documented by one rule, and the examples in their docstrings do what they show.

A docstring starts with a verb and names every argument; that of a class names the arguments of its
constructor. Functions and classes show an example, which takes `torch` and `htv` as imported.
"""

import doctest
import inspect
import re

import pytest
import torch

import htv
import htv.data
import htv.integrations
import htv.methods

MODULES = [htv, htv.methods, htv.data, htv.distributed]
for _name in htv.integrations.__all__:
    try:
        MODULES.append(getattr(htv.integrations, _name))
    except ImportError:  # its trainer is not installed
        pass
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if callable(getattr(module, name))
}
VERBS = set(
    """Add Aggregate Apply Average Bound Choose Collect Compare Compute Copy Correlate Count Declare
    Draw Estimate Exchange Express Find Fine-tune Follow Give Go Guess Hold Infer Keep
    Lead Let Load Make Mask Measure Minimise Move Name Note Observe Overwrite Permute
    Prepare Put Raise Read Record Resolve Restore Return Reverse Say Search Serve Set Show Space
    Start Step Sum Take Tell Tint Train Update Weight Write Yield""".split()
)


def methods_of(cls):
    """Public functions and properties of a class that htv defines, by name; inherited ones too, but
    not what another package calls and documents.
    """
    others = [base for base in cls.__mro__[:-1] if not base.__module__.startswith("htv.")]
    for name in dir(cls):
        if any(name in vars(base) for base in others):
            continue
        member = inspect.getattr_static(cls, name)
        inner = getattr(member, "__func__", member)  # of static and class methods
        inner = inner.fget if isinstance(inner, property) else inner
        if not name.startswith("_") and inspect.isfunction(inner):
            if inspect.unwrap(inner).__module__.startswith("htv."):
                yield name, getattr(cls, name)


def arguments_of(function):
    """Names of the arguments that a docstring must tell of."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    return [name for name in parameters if name not in ("self", "args", "kwargs")]


def shortcomings(name, thing):
    """What a docstring lacks, in words."""
    text = inspect.getdoc(thing) or ""
    if not text:
        return [f"{name} has no docstring"]
    if isinstance(thing, property):
        return []
    found = []
    first = re.match(r"[\w-]*", text)[0]
    if first not in VERBS:
        found.append(f"{name} starts with {first!r}, not with a verb")
    if text.splitlines()[0][-1] not in ".:;":
        found.append(f"the first line of {name} is no sentence: {text.splitlines()[0]!r}")
    missing = [a for a in arguments_of(thing) if not re.search(rf"\b{re.escape(a)}\b", text)]
    return found + [f"{name} does not name its argument {argument!r}" for argument in missing]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_says_what_it_must(name):
    thing = PUBLIC[name]
    found = shortcomings(name, thing)
    if inspect.isclass(thing):
        for method, member in methods_of(thing):
            found += shortcomings(f"{name}.{method}", member)
    is_error = inspect.isclass(thing) and issubclass(thing, Exception)
    if not is_error and ">>>" not in (inspect.getdoc(thing) or ""):
        found.append(f"{name} shows no example")
    assert not found, "\n".join(found)


EXAMPLES = {}
for _name, _thing in PUBLIC.items():
    EXAMPLES[_name] = _thing
    if inspect.isclass(_thing):
        EXAMPLES |= {f"{_name}.{method}": member for method, member in methods_of(_thing)}
EXAMPLES = {n: inspect.getdoc(t) for n, t in EXAMPLES.items() if ">>>" in (inspect.getdoc(t) or "")}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_does_what_it_shows(name):
    torch.manual_seed(0)
    globs = {"torch": torch, "htv": htv}
    example = doctest.DocTestParser().get_doctest(EXAMPLES[name], globs, name, None, None)
    if all(doctest.SKIP in part.options for part in example.examples):
        pytest.skip("it takes a trainer, or several processes")
    assert any(part.want for part in example.examples), "it shows no result"
    said = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    runner.run(example, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


def test_the_rule_can_be_broken():
    def thing(a, b):
        """The sum of a and others"""

    assert len(shortcomings("thing", thing)) == 3  # no verb, no sentence, no b
    assert shortcomings("bare", lambda: None) == ["bare has no docstring"]
