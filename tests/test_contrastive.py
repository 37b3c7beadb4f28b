"""docs/contrastive.md: the numbers it prints, and every sentence about what votes and what is
refused, by an oracle that holds the embeddings of all other examples fixed.
"""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import htv
from htv.tools.check import aggregated

TEXT = (Path(__file__).parents[1] / "docs" / "contrastive.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)
RULES = [htv.Mean(), htv.AndMask(0.6), htv.Median(), htv.WinsorizedMean(1)]
E = 5
NAMED = ("images", "texts")


def test_the_example_prints_what_the_page_says():
    program, printed = BLOCKS[0][1], BLOCKS[1][1]
    found = io.StringIO()
    with redirect_stdout(found):
        exec(compile(program, "docs/contrastive.md", "exec"), {"__name__": "contrastive"})
    assert found.getvalue() == printed


class Pair(nn.Module):
    """Two towers; `where` the temperature is."""

    def __init__(self, where="rows", bias=False):
        super().__init__()
        self.image, self.text = nn.Linear(3, 2, bias=False), nn.Linear(4, 2)
        self.scale, self.where = nn.Parameter(torch.tensor(1.0)), where
        self.bias = nn.Parameter(torch.tensor(-0.5)) if bias else None

    def forward(self, images, texts):
        a = F.normalize(self.image(images), dim=-1)
        b = F.normalize(self.text(texts), dim=-1)
        if self.where == "rows":
            return self.scale.exp() * a, b
        if self.where == "both":
            return (self.scale / 2).exp() * a, (self.scale / 2).exp() * b
        logits = (
            self.scale.exp() * (a @ b.T) if self.where == "after" else self.scale.exp() * a @ b.T
        )
        return logits if self.bias is None else logits + self.bias


def anchors(a, b):
    """The terms of the loss, pair by pair."""
    logits, own = a @ b.T, torch.arange(len(a))
    one, other = (F.cross_entropy(s, own, reduction="none") for s in (logits, logits.T))
    return (one + other) / (2 * len(a))


def sigmoids(a, b):
    return -F.logsigmoid((2 * torch.eye(len(a), dtype=a.dtype) - 1) * (a @ b.T)).mean()


def triplets(a, b):
    return F.triplet_margin_loss(a, b, b.roll(1, 0), margin=3.0)


LOSSES = {
    "CLIP's": lambda a, b: anchors(a, b).sum(),
    "SigLIP's": sigmoids,
    "triplets of the batch": triplets,
}


def through_rows(embed, loss, parameter, ids):
    """(groups, *shape): the gradient through the rows of one group at a time."""
    found = []
    for e in ids.unique():
        mine = (ids == e)[:, None]
        rows = [torch.where(mine, t, t.detach()) for t in embed()]
        found.append(torch.autograd.grad(loss(*rows), parameter)[0])
    return torch.stack(found)


def assert_votes(model, embed, loss, rule, ids):
    for name, p in model.named_parameters():
        parts = through_rows(embed, loss, p, ids)
        torch.testing.assert_close(p.grad, aggregated(parts, rule), msg=name)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("where", ["rows", "both"])
def test_a_row_is_its_examples(where, loss, rule):
    model, loss = Pair(where).double(), LOSSES[loss]
    images, texts = torch.randn(E, 3).double(), torch.randn(E, 4).double()
    for options in ({}, dict(batch=NAMED)):
        model.zero_grad()
        with htv.attach(model, rule, **options):
            loss(*model(images, texts)).backward()
        assert_votes(model, lambda: model(images, texts), loss, rule, torch.arange(E))
    plain = torch.autograd.grad(loss(*model(images, texts)), model.scale)[0]
    parts = through_rows(lambda: model(images, texts), loss, model.scale, torch.arange(E))
    torch.testing.assert_close(parts.sum(0), plain)  # complete


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_similarities_inside_the_forward(rule):
    """Of rows that were scaled before; both inputs have to be named."""
    model = Pair("inside").double()
    images, texts = torch.randn(E, 3).double(), torch.randn(E, 4).double()
    loss = lambda s: F.cross_entropy(s, torch.arange(E))
    with htv.attach(model, rule, batch=NAMED):
        loss(model(images, texts)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.where = "rows"
    for name, p in model.named_parameters():
        parts = through_rows(
            lambda: model(images, texts), lambda a, b: loss(a @ b.T), p, torch.arange(E)
        )
        torch.testing.assert_close(found[name], aggregated(parts, rule), msg=name)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("how", ["one batch", "two forwards"])
def test_two_views_of_an_image_vote_together(how, rule):
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    first, second = torch.randn(E, 6).double(), torch.randn(E, 6).double()
    ids = torch.arange(E).repeat(2)

    def loss(z):
        z = F.normalize(z, dim=-1)
        scores = (4 * z @ z.T).masked_fill(torch.eye(2 * E, dtype=torch.bool), -torch.inf)
        return F.cross_entropy(scores, (torch.arange(2 * E) + E) % (2 * E))

    with htv.attach(model, rule) as handle:
        if how == "one batch":
            with handle.groups(ids):
                z = model(torch.cat([first, second]))
        else:
            z = torch.cat([model(first), model(second)])
        loss(z).backward()
    embed = lambda: (model(torch.cat([first, second])),)
    assert_votes(model, embed, loss, rule, ids)


def test_anchors_vote_as_micro_batches():
    """The page's second program."""
    model, rule = Pair().double(), htv.AndMask(0.6)
    images, texts = torch.randn(E, 3).double(), torch.randn(E, 4).double()
    program = next(text for _, text in BLOCKS[2:] if "handle.accumulate" in text)
    exec(program, dict(htv=htv, torch=torch, model=model, rule=rule, images=images, texts=texts,
                       anchors=anchors))  # fmt: skip
    for name, p in model.named_parameters():
        terms = anchors(*model(images, texts))
        parts = [torch.autograd.grad(t, p, retain_graph=True)[0] for t in terms]
        torch.testing.assert_close(p.grad, aggregated(torch.stack(parts), rule), msg=name)
        rows = through_rows(
            lambda: model(images, texts), lambda a, b: anchors(a, b).sum(), p, torch.arange(E)
        )
        assert not torch.allclose(rows, torch.stack(parts))  # they are other parts of one sum
        torch.testing.assert_close(rows.sum(0), torch.stack(parts).sum(0))


def test_a_layer_on_the_similarities_is_refused_at_once():
    class Scored(Pair):
        def __init__(self):
            super().__init__("inside")
            self.head = nn.Linear(E, 2)

        def forward(self, images, texts):
            return self.head(super().forward(images, texts))

    model = Scored().double()
    images, texts = torch.randn(E, 3).double(), torch.randn(E, 4).double()
    with htv.attach(model, htv.Median(), batch=NAMED):
        with pytest.raises(htv.UnsupportedError, match="'head.weight'.*'matmul' at.*exclude="):
            model(images, texts)
    with htv.attach(model, htv.Median(), batch=NAMED, exclude="head"):
        model(images, texts).square().sum().backward()


REFUSED = {
    "two inputs, not named": (
        dict(where="inside"), {}, "matmul: 'texts', an input", dict(batch=NAMED)),
    "a temperature times the similarities": (
        dict(where="after"), dict(batch=NAMED), "'scale' is used by mul.*'matmul' at",
        dict(batch=NAMED, exclude="scale")),
    "a bias on the similarities": (
        dict(where="inside", bias=True), dict(batch=NAMED), "'bias' is used by add.*'matmul' at",
        dict(batch=NAMED, exclude="bias")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_and_their_remedies(name):
    made, options, words, remedy = REFUSED[name]
    model = Pair(**made).double()
    images, texts = torch.randn(E, 3).double(), torch.randn(E, 4).double()
    loss = lambda s: F.cross_entropy(s, torch.arange(E))
    with htv.attach(model, htv.Median(), **options):
        with pytest.raises(htv.UnsupportedError, match=words):
            loss(model(images, texts)).backward()
    plain = dict(
        zip(
            [n for n, _ in model.named_parameters()],
            torch.autograd.grad(loss(model(images, texts)), list(model.parameters())),
            strict=True,
        )
    )
    model.zero_grad()
    with htv.attach(model, htv.Median(), **remedy):
        loss(model(images, texts)).backward()
    excluded = remedy.get("exclude")
    for n, p in model.named_parameters():
        agrees = torch.allclose(p.grad, plain[n])
        assert agrees == (n == excluded), n


def test_the_loss_inside_hugging_faces_model():
    import support.torchvision_operators  # noqa: F401, makes CLIP importable beside a CPU's torch

    transformers = pytest.importorskip("transformers", reason="needs hard-to-vary[models]")
    sizes = dict(hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = transformers.CLIPTextConfig(
        vocab_size=31, max_position_embeddings=8, eos_token_id=2, bos_token_id=1, pad_token_id=0,
        **sizes,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=6
    )
    model = transformers.CLIPModel(config).double()
    ids = torch.randint(3, 31, (E, 7))
    ids[:, -1] = 2
    pixels = torch.randn(E, 3, 8, 8).double()
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    with htv.attach(model, htv.Median(), batch=tuple(batch)):
        with pytest.raises(htv.UnsupportedError, match="'logit_scale' is used by mul"):
            model(**batch, return_loss=True).loss.backward()
    model.zero_grad()
    with htv.attach(model, htv.Median(), batch=tuple(batch), exclude="logit_scale"):
        model(**batch, return_loss=True).loss.backward()
    weight = model.visual_projection.weight
    found = weight.grad.clone()

    def embed():
        output = model(**batch)
        return output.text_embeds, output.image_embeds

    def loss(texts, images):
        return E * anchors(model.logit_scale.exp().detach() * texts, images).mean()

    expected = aggregated(through_rows(embed, loss, weight, torch.arange(E)), htv.Median())
    torch.testing.assert_close(found, expected)
    model.zero_grad()
    with htv.attach(model, htv.Median(), exclude="logit_scale"):  # the loss outside
        loss(*embed()).backward()
    torch.testing.assert_close(weight.grad, expected)


def test_what_check_says():
    images, texts = torch.randn(E, 3), torch.randn(E, 4)
    assert htv.check(Pair(), (images, texts), htv.Median(), batch_argument=NAMED).groups == E
    for where in ("inside", "after"):
        with pytest.raises(ValueError, match="couples the examples"):
            htv.check(
                Pair(where), (images, texts), htv.Median(), batch_argument=NAMED, exclude="scale"
            )
