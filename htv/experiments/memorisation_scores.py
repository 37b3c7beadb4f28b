"""Who is learnt by heart: scores from many networks on subsets, and gradient norms of one network
in their place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htv.data import Dataset
from htv.demo.training import Task
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
from htv.methods import SubsetScores, squared_gradient_norms, train_on_subsets

RATES = {"labels as given": 0.0, "10% wrong labels": 0.1}
CLEAN, NOISY = RATES
MEMORISED, INFLUENTIAL = 0.25, 0.25  # far above what chance gives hundreds of networks


@dataclass(frozen=True)
class Settings:
    # looks are at the gradient norms of one network, at epochs 0, 1, 2, 4, ... and the last
    training: Training
    models: int = 512
    at_once: int = 64
    share: float = 0.7
    width: int = 128
    momentum: float = 0.9


def run_one(settings: Settings, variant: str, seed: int, data: Dataset, progress: Progress) -> dict:
    task = images.make_task(data, settings.training, RATES[variant], seed, kind="other")
    scores = subset_scores(settings, task, seed, progress)
    memorisation = scores.memorisation()
    norms = gradient_norms(settings, task, seed)
    strong = scores.influence() >= INFLUENTIAL
    result = {
        "memorised": (memorisation >= MEMORISED).double().mean().item(),
        "right": memorisation[~task.wrong].mean().item(),
        "wrong": memorisation[task.wrong].mean().item(),
        "pairs": int(strong.sum()),
        "pairs_memorised": int((strong & (memorisation >= MEMORISED)).sum()),
        "epochs": list(norms),
        "correlations": [correlation(memorisation, found) for found in norms.values()],
        "scores": [round(value, 4) for value in memorisation.tolist()],
        "mislabelled": task.wrong.nonzero().flatten().tolist(),
    }
    result["correlation"], epoch = max(zip(result["correlations"], norms, strict=True))
    result |= {
        "best_epoch": epoch,
        "norms": [float(f"{value:.3g}") for value in norms[epoch].tolist()],
    }
    if variant == NOISY:
        result |= {
            "found_by_scores": area(memorisation, task.wrong),
            "found_by_norms": area(norms[epoch], task.wrong),
        }
    return result


def subset_scores(settings: Settings, task: Task, seed: int, progress: Progress) -> SubsetScores:
    scores = SubsetScores(len(task.x), len(task.test_x))
    while scores.models < settings.models:
        train_on_subsets(
            scores,
            lambda: network(settings, task),
            (task.x, task.noisy),
            (task.test_x, task.test_labels),
            lambda parameters: sgd(settings, parameters),
            models=min(settings.at_once, settings.models - scores.models),
            epochs=settings.training.epochs,
            batch_size=settings.training.batch_size,
            share=settings.share,
            seed=seed,
        )
        progress(scores.models / settings.models, f"{scores.models} networks")
    return scores


def gradient_norms(settings: Settings, task: Task, seed: int) -> dict[int, Tensor]:
    """Squared norms of all training examples' gradients by epoch, of one network trained on all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(settings, task)
    optimizer, found = sgd(settings, model.parameters()), {}
    last = settings.training.epochs
    due = {0, last} | {2**power for power in range(last.bit_length())}

    def look(epoch: int) -> None:
        if epoch in due:
            losses = lambda ids: F.cross_entropy(
                model(task.x[ids]), task.noisy[ids], reduction="none"
            )
            found[epoch] = squared_gradient_norms(
                model, torch.arange(len(task.x)).split(256), losses
            )

    look(0)
    for epoch, batches in enumerate(images.epochs(len(task.x), settings.training, seed), start=1):
        for ids in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(task.x[ids]), task.noisy[ids]).backward()
            optimizer.step()
        look(epoch)
    return found


def network(settings: Settings, task: Task) -> nn.Sequential:
    pixels = task.x.shape[1]
    return nn.Sequential(
        nn.Linear(pixels, settings.width), nn.ReLU(), nn.Linear(settings.width, task.num_classes)
    )


def sgd(settings: Settings, parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=settings.training.learning_rate, momentum=settings.momentum
    )


def correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, of ranks."""
    from scipy.stats import spearmanr

    return float(spearmanr(one.numpy(), other.numpy()).statistic)


def area(values: Tensor, positive: Tensor) -> float:
    """Under the ROC curve: how often a positive example has the larger value."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive.numpy(), values.numpy()))


def summarise(records: Records) -> Summary:
    share = lambda variant: (
        sum(records.values(variant, "pairs_memorised"))
        / max(1, sum(records.values(variant, "pairs")))
    )
    columns = {
        f"memorisation >= {MEMORISED:g}": "memorised",
        "mean, labels right": "right",
        "mean, labels wrong": "wrong",
        "rank correlation with gradient norms": "correlation",
    }
    rows = [
        [
            variant,
            *(spread(records.values(variant, key), ".2f")
              if key != "wrong" or variant == NOISY else ""
              for key in columns.values()),
            ", ".join(str(epoch) for epoch in records.values(variant, "best_epoch")),
        ]
        for variant in records.variants
    ]  # fmt: skip
    at = lambda key: records.mean(NOISY, key)
    memorised = records.mean(CLEAN, "memorised")
    findings = [
        Finding(
            "A tail of examples is learnt by heart, labelled as they are",
            f"{memorised:.1%} have a memorisation of {MEMORISED:g} or more",
            0.002 < memorised < 0.3,
        ),
        Finding(
            "Examples that influence a test example are learnt by heart themselves",
            f"{share(CLEAN):.1%} of pairs with an influence of {INFLUENTIAL:g} or more",
            share(CLEAN) > 0.5,
        ),
        Finding(
            "Wrong labels are learnt by heart",
            f"memorisation {at('wrong'):.2f} of wrong labels, {at('right'):.2f} of right ones",
            at("wrong") > 0.5 and at("right") < 0.25,
        ),
        *(
            Finding(
                f"Gradient norms of one network rank examples much as {records.settings.models} "
                f"networks do: {variant}",
                f"rank correlation {records.mean(variant, 'correlation'):.2f}",
                records.mean(variant, "correlation") > 0.5,
            )
            for variant in RATES
        ),
        Finding(
            "and find wrong labels as well",
            f"area under ROC {at('found_by_norms'):.3f}, by memorisation "
            f"{at('found_by_scores'):.3f}",
            at("found_by_norms") > at("found_by_scores") - 0.05,
        ),
    ]
    return Summary([Table(["", *columns, "at epoch"], rows)], findings)


def plot(records: Records, figure) -> None:
    left, right = figure.subplots(1, 2)
    result = records.results(NOISY)[0]
    wrong = torch.zeros(len(result["scores"]), dtype=torch.bool)
    wrong[result["mislabelled"]] = True
    scores, norms = torch.tensor(result["scores"]), torch.tensor(result["norms"])
    for tag, color, label in ((~wrong, "C0", "label right"), (wrong, "C3", "label wrong")):
        left.plot(
            scores[tag], norms[tag].clamp(min=1e-12), ".", color=color, markersize=3, label=label
        )
    left.set(title=f"{NOISY}, epoch {result['best_epoch']}", xlabel="memorisation",
             ylabel="squared gradient norm", yscale="log")  # fmt: skip
    left.legend()
    for variant in RATES:
        found = records.results(variant)
        right.plot(range(len(found[0]["epochs"])),
                   images.seed_mean([r["correlations"] for r in found]), "o-",
                   label=variant)  # fmt: skip
    right.set_xticks(range(len(result["epochs"])), result["epochs"])
    right.set(title="memorisation and gradient norms", xlabel="epoch", ylabel="rank correlation")
    right.grid(alpha=0.3)
    right.legend()


EXPERIMENT = Experiment(
    name="memorisation-scores",
    title="Memorisation scores and gradient norms",
    paper="Feldman, Zhang 2020, arXiv 2008.03703",
    full=Settings(
        Training(images=1000, epochs=30, learning_rate=0.1, batch_size=50, test_images=1000)
    ),
    quick=Settings(
        Training(images=400, epochs=16, learning_rate=0.1, batch_size=50, test_images=200),
        models=64,
        width=64,
    ),
    variants=lambda settings: list(RATES),
    run_one=run_one,
    summarise=summarise,
    plot=plot,
    seeds=3,
    images=True,
    needs=("scipy", "sklearn"),
)
