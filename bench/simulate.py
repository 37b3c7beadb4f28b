"""What one vote over many GPUs costs, by count: `htv bench --simulate`.

Bytes and memory follow from the model's sizes and how FSDP2 shards them; times from link rates and
arithmetic rates that are named, not measured. Nothing here has run on such a cluster.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from htv.bench.report import table
from htv.distributed.vote_types import vote_bytes

__all__ = ["CLUSTERS", "MODELS", "Cluster", "Cost", "Model", "costs", "model_of", "report"]


@dataclass(frozen=True)
class Model:
    """A decoder as Llama's: grouped-query attention, gated MLP, RMSNorm, no biases.

    width, hidden:  of the residual stream, and of the MLP.
    layers:         how many.
    keys:           width of keys and of values.
    vocabulary:     tokens.
    tied:           whether the head is the embedding.
    """

    name: str
    width: int
    hidden: int
    layers: int
    keys: int
    vocabulary: int
    tied: bool = False

    @property
    def per_layer(self) -> int:
        """Return the parameters of one layer's matrices."""
        attention = 2 * self.width * self.width + 2 * self.width * self.keys
        return attention + 3 * self.width * self.hidden

    @property
    def parameters(self) -> int:
        """Return how many parameters there are."""
        tables = self.vocabulary * self.width * (1 if self.tied else 2)
        norms = self.width * (2 * self.layers + 1)
        return self.layers * self.per_layer + tables + norms

    @property
    def exchanged_per_token(self) -> int:
        """Return the values that a layer records per token: inputs and outputs' gradients of its
        seven matrices.
        """
        queries_and_output, keys_and_values = 2 * 2 * self.width, 2 * (self.width + self.keys)
        return queries_and_output + keys_and_values + 3 * (self.width + self.hidden)


# One pass of a rule over a weight gradient's products, in units of the plain product's time: what
# docs/gpu.md expects of the kernels, by count.
PASS = 1.3

BUCKETS = 2  # of each rank, for a median of more means than ranks

MODELS = {
    "1B": Model("1B", 2048, 8192, 16, 512, 128256, tied=True),
    "8B": Model("8B", 4096, 14336, 32, 1024, 128256),
    "70B": Model("70B", 8192, 28672, 80, 1024, 128256),
}


@dataclass(frozen=True)
class Cluster:
    """GPUs and what links them.

    gpus:       how many, and per_node how many of them in one machine.
    inside:     bytes per second and GPU between GPUs of a machine, one way: NVLink 4.
    between:    the same between machines: InfiniBand NDR, 400 Gbit/s per GPU.
    reached:    the part of these rates that large collectives reach.
    flops:      dense bfloat16 operations per second and GPU: H100 SXM, as its data sheet says.
    used:       the part of them that training reaches.
    memory:     bytes per GPU.
    """

    gpus: int
    per_node: int = 8
    inside: float = 450e9
    between: float = 50e9
    reached: float = 0.8
    flops: float = 989e12
    used: float = 0.4
    memory: float = 80e9

    @property
    def rate(self) -> float:
        """Return bytes per second that one GPU sends in a ring over all of them."""
        link = self.inside if self.gpus <= self.per_node else self.between
        return link * self.reached


CLUSTERS = {str(gpus): Cluster(gpus) for gpus in (8, 64, 512)}


@dataclass(frozen=True)
class Cost:
    """One GPU's part of one step under a rule; bytes and seconds.

    sent:     over its links, and plain_sent what plain training sends.
    memory:   what the rule holds beside plain training, at most.
    compute:  forward and backward, and plain_compute without the rule.
    link:     what `sent` takes.
    choice:   how the library does it, or why it refuses.
    """

    rule: str
    voters: int
    sent: float
    plain_sent: float
    memory: float
    compute: float
    plain_compute: float
    link: float
    choice: str
    refused: bool = False

    @property
    def seconds(self) -> float:
        """Return the step's time where links and arithmetic overlap."""
        return max(self.compute, self.link)


def costs(model: Model, cluster: Cluster, sequences: int, tokens: int) -> list[Cost]:
    """Return the cost of every kind of rule under FSDP2.

    Parameters are gathered in bfloat16 for forward and again for backward, sums are reduced in
    float32. The weights' gradients are a third of a step's arithmetic: one pass over their products
    yields sums and votes, squares and logarithms, in `PASS` times the plain product's time; order
    rules over examples are counted as one more. Sums of buckets are the plain product's, in parts.

    sequences, tokens:  per GPU and step, and per sequence; each sequence is a group.
    """
    ranks, size = cluster.gpus, model.parameters
    passed = (ranks - 1) / ranks
    plain_sent = passed * size * (2 + 2 + 4)
    arithmetic = 6 * (size - model.vocabulary * model.width) * sequences * tokens
    plain_compute = arithmetic / (cluster.flops * cluster.used)
    voters = ranks * sequences
    unit = max(model.per_layer, model.vocabulary * model.width)

    def cost(
        rule: str,
        per_value: float,
        choice: str,
        voters: int = voters,
        factor: float = PASS,
        held: float | None = None,
    ) -> Cost:
        sent = plain_sent + passed * size * per_value
        compute = plain_compute * (2 + factor) / 3
        if held is None:  # what was counted of a unit, laid out to be sent, and its shard
            held = unit * per_value * (2 + 1 / ranks)
        link = sent / cluster.rate
        return Cost(rule, voters, sent, plain_sent, held, compute, plain_compute, link, choice)

    def means(rule: str, each: int, choice: str, voters: int) -> Cost:
        # Of a unit: what all ranks have at one's share, and of several buckets their sums (as
        # gradients are, in bfloat16) and one of them laid out to be sent.
        own = 0 if each == 1 else 2 * each + 4
        return cost(rule, 4 * (each - 1), choice, voters, 1, held=unit * (4 * each + own))

    beside = vote_bytes(voters)
    found = [
        cost("Mean", 0, "plain: sums alone", factor=1),
        cost("AndMask, XorMask", beside, f"votes in {_bytes(beside)} beside the sums"),
        cost("GeometricMean", beside + 4, "votes and logarithms beside the sums"),
        cost("SandMask", beside + 8, "votes and squares beside the sums"),
        cost("AndMask of ranks", vote_bytes(ranks), "signs of ranks' sums beside them", ranks, 1),
        means("order rules of ranks", 1, "an all-to-all takes the reduce-scatter's place", ranks),
    ]
    if sequences % BUCKETS == 0:
        how = f"{BUCKETS} means of each rank, by as many all-to-alls"
        found.append(means(f"MedianOfMeans({BUCKETS * ranks})", BUCKETS, how, voters))
    rows = ranks * sequences * tokens
    values, limit = rows * (model.width + model.hidden), 4 * model.width * model.hidden
    refused = values > limit
    choice = (
        f"refused: {values:,} values per MLP matrix, limit {limit:,}; MedianOfMeans({ranks})"
        if refused
        else "what layers recorded is exchanged"
    )
    sent = plain_sent + 2 * passed * rows * model.exchanged_per_token * model.layers
    found.append(
        Cost(
            "order rules of examples",
            voters,
            sent,
            plain_sent,
            2.0 * values,
            plain_compute * 4 / 3,
            plain_compute,
            sent / cluster.rate,
            choice,
            refused,
        )  # fmt: skip
    )
    return found


def _bytes(count: int) -> str:
    return f"{count} byte{'s' * (count > 1)}"


def model_of(text: str) -> Model:
    """Return a model by its name, or from a JSON file of `Model`'s fields. Raises ValueError."""
    if text in MODELS:
        return MODELS[text]
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"{text!r} is no model (have {', '.join(MODELS)}) and no JSON file")
    try:
        given = json.loads(path.read_text())
        return replace(Model(path.stem, 0, 0, 0, 0, 0), **given)
    except (ValueError, TypeError) as error:
        wanted = ", ".join(asdict(MODELS["1B"]))
        raise ValueError(f"{path}: {error}; wanted a JSON object of {wanted}") from error


def report(models: list[Model], clusters: list[Cluster], sequences: int, tokens: int) -> str:
    """Return tables of what every rule costs, as Markdown."""
    one = clusters[0]
    lines = [
        f"FSDP2, {sequences} sequences of {tokens:,} tokens per GPU and step, each a group. Rates: "
        f"{one.inside / 1e9:.0f} GB/s per GPU inside a machine of {one.per_node}, "
        f"{one.between / 1e9:.0f} GB/s between machines, {one.reached:.0%} of them reached; "
        f"{one.flops / 1e12:.0f} TFLOP/s in bfloat16, {one.used:.0%} reached. Counted, not "
        "measured.",
    ]
    head = ["rule", "E", "GB sent", "more", "GB held", "s", "over plain", "how"]
    for model in models:
        for cluster in clusters:
            rows = []
            for cost in costs(model, cluster, sequences, tokens):
                plain = max(cost.plain_compute, cost.plain_sent / cluster.rate)
                numbers = [
                    f"{cost.sent / 1e9:.1f}",
                    f"{cost.sent / cost.plain_sent - 1:+.1%}",
                    f"{cost.memory / 1e9:.2f}",
                    f"{cost.seconds:.2f}",
                    f"{cost.seconds / plain:.2f}",
                ]
                shown = ["-"] * 5 if cost.refused else numbers
                rows.append([cost.rule, f"{cost.voters:,}", *shown, cost.choice])
            size = f"{model.parameters / 1e9:.2f} billion parameters"
            lines += ["", f"**{model.name}** ({size}), {cluster.gpus} GPUs", ""]
            lines.append(table(head, rows) or "")
    return "\n".join(lines)
