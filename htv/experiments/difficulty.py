"""Easy and hard examples: does either kind generalise to its own kind?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from htv.data import DataError, Dataset
from htv.experiments import images
from htv.experiments.experiment import (
    Experiment,
    Finding,
    Progress,
    Records,
    Summary,
    Table,
    spread,
)
from htv.experiments.images import Training
from htv.methods import disjoint_subsets, easy_examples

KINDS = ("easy", "hard", "any")


@dataclass(frozen=True)
class Settings:
    """pool: of so many training images the easy and the hard ones are told apart; training: on some
    of one kind.
    """

    pool: int
    training: Training
    epochs: int = 2
    learning_rate: float = 0.02
    batch_size: int = 50
    network: str = "convnet"


def run_one(settings: Settings, variant: str, seed: int, data: Dataset, progress: Progress) -> dict:
    training = settings.training
    whole = images.make_task(data, replace(training, images=settings.pool), 0.0, seed)
    easy = easy_examples(images.make_network(settings.network, data, seed), whole.x, whole.true,
                         settings.epochs, settings.learning_rate, settings.batch_size,
                         seed)  # fmt: skip
    pools = {"easy": easy, "hard": ~easy, "any": torch.ones_like(easy)}
    size = min(
        training.images + training.test_images, *(int(pool.sum()) for pool in pools.values())
    )
    tested = size * training.test_images // (training.images + training.test_images)
    if tested < 10:
        raise DataError(
            f"{data.name}: {int((~easy).sum())} hard examples of {len(easy)} are too few to train "
            "and test on"
        )
    train, test = disjoint_subsets(pools[variant], (size - tested, tested), seed)
    task = replace(
        whole, x=whole.x[train], true=whole.true[train], noisy=whole.true[train],
        wrong=whole.wrong[train], test_x=whole.x[test], test_labels=whole.true[test],
    )  # fmt: skip
    network = images.make_network(
        settings.network, data, seed + 1000
    )  # not the weights that drew the line
    optimizer = torch.optim.SGD(network.parameters(), lr=training.learning_rate, momentum=0.9)
    curves = images.fit(network, task, optimizer, training, seed, progress)
    sizes = {
        "easy_share": easy.double().mean().item(),
        "train_images": len(train),
        "test_images": len(test),
    }
    return {**sizes, **images.last(curves), "curves": curves}


def summarise(records: Records) -> Summary:
    columns = {"training images": ("train_images", ".0f"),
               "training accuracy": ("train_accuracy", ".1%"),
               "test images": ("test_images", ".0f"),
               "test accuracy": ("test_accuracy", ".1%")}  # fmt: skip
    rows = [
        [v, *(spread(records.values(v, key), form) for key, form in columns.values())]
        for v in records.variants
    ]
    at = {v: records.mean(v, "test_accuracy") for v in KINDS}
    fitted = {v: records.mean(v, "train_accuracy") for v in KINDS}
    findings = [
        Finding(
            "Easy examples generalise among themselves better than hard ones do among themselves",
            f"test accuracy {at['easy']:.1%} (easy) and {at['hard']:.1%} (hard); any: "
            f"{at['any']:.1%}",
            at["easy"] > at["hard"] + 0.1,
        ),
        Finding(
            "though a network fits both",
            f"training accuracy {fitted['easy']:.1%} and {fitted['hard']:.1%}",
            min(fitted["easy"], fitted["hard"]) > 0.95,
        ),
    ]
    share = records.mean("easy", "easy_share")
    epochs = records.settings.epochs
    title = (
        f"Trained on one kind, tested on others of it; {share:.1%} of the examples are learnt in "
        f"{epochs} epochs"
    )
    return Summary([Table(["examples", *columns], rows, title)], findings)


def plot(records: Records, figure) -> None:
    axes = figure.subplots()
    for index, variant in enumerate(records.variants):
        curves = [result["curves"] for result in records.results(variant)]
        for key, style in {"train_accuracy": "--", "test_accuracy": "-"}.items():
            axes.plot(curves[0]["epoch"], images.seed_mean([c[key] for c in curves]), style,
                      color=f"C{index}",
                      label=f"{variant}, {key.removesuffix('_accuracy')}")  # fmt: skip
    images.share_axis(axes, "Trained on one kind, tested on others of it")
    axes.legend()


EXPERIMENT = Experiment(
    name="difficulty",
    title="Easy and hard examples",
    paper="Chatterjee 2020, arXiv 2002.10657, and its successors",
    full=Settings(10000,
                  Training(images=1000, epochs=40, learning_rate=0.02, batch_size=50,
                           test_images=500)),
    quick=Settings(
        1437,
        Training(images=200, epochs=40, learning_rate=0.02, batch_size=20, test_images=100,
                 looks=10),
    ),
    variants=lambda settings: KINDS,
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=3,
    images=True,
    size=(7, 4.2),
)  # fmt: skip
