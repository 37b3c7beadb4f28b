"""Rows stay with their examples, whatever the sampler does."""

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from htv.methods import Batches, ExampleTable

N = 23
WEIGHTS = torch.linspace(0.1, 1, N)
SAMPLERS = {
    "shuffled": None,
    "in order": lambda generator: range(N),
    "weighted": lambda generator: torch.multinomial(WEIGHTS, N, generator=generator),
    "with replacement": lambda generator: torch.randint(0, N, (200,), generator=generator),
}


class Named(Dataset):
    """x tells the id, which is not the index."""

    def __init__(self):
        self.ids = torch.randperm(N, generator=torch.Generator().manual_seed(5)).tolist()

    def __len__(self):
        return N

    def __getitem__(self, index):
        return (
            {"value": torch.tensor([float(self.ids[index])])},
            self.ids[index] % 3,
            self.ids[index],
        )


def plain():
    return TensorDataset(torch.arange(N).float()[:, None], torch.arange(N) % 3)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_every_row_belongs_to_its_example(sampler):
    for dataset, value in ((plain(), lambda x: x), (Named(), lambda x: x["value"])):
        batches, table = Batches(dataset, 3, 4, sampler, seed=1), ExampleTable(N)
        for x, y, ids in batches.from_step(0):
            assert torch.equal(value(x)[:, 0].long(), ids) and torch.equal(y, ids % 3)
            table.write(ids, 10 * value(x) + 1)
        assert torch.equal(table.complete()[:, 0], 10 * torch.arange(N) + 1.0)


class Scaled(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return 10 * x, y


def test_a_subclass_reads_its_examples_itself():
    x = torch.arange(N).float()[:, None]
    indices = torch.tensor([3, 1])
    assert torch.equal(Batches(Scaled(x, torch.arange(N)), 1, 4).read(indices)[0], 10 * x[indices])


def steps(batches, start=0):
    return [ids.tolist() for _, _, ids in batches.from_step(start)]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_step_t_is_always_the_same(sampler):
    batches = Batches(plain(), 3, 4, sampler, seed=1)
    whole = steps(batches)
    assert (
        whole
        == steps(batches)
        == [ids.tolist() for e in range(3) for _, _, ids in batches.epoch(e)]
    )
    for start in (0, 1, 5, 6, 7, len(whole) - 1, len(whole), len(whole) + 3):
        assert steps(batches, start) == whole[start:]
    if sampler is not SAMPLERS["in order"]:
        assert whole != steps(Batches(plain(), 3, 4, sampler, seed=2)) and whole[:5] != whole[-5:]


def test_of_repetitions_in_a_batch_the_last_counts():
    table = ExampleTable(3)
    table.write(torch.tensor([2, 0, 2, 1, 2]), torch.arange(5.0))
    assert table.complete().tolist() == [1.0, 3.0, 4.0]
    table.write(torch.tensor([0]), torch.tensor([7.0]))
    assert table.complete().tolist() == [7.0, 3.0, 4.0]


def test_mistakes_are_named():
    table = ExampleTable(5)
    table.write(torch.tensor([1, 3]), torch.zeros(2, 4))
    for ids, rows, message in (
        (torch.tensor([5]), torch.zeros(1, 4), r"ids must lie in \[0, 5\), got values from 5 to 5"),
        (torch.tensor([-1]), torch.zeros(1, 4), r"from -1 to -1"),
        (torch.tensor([1.0]), torch.zeros(1, 4), "tensor of integers"),
        ([1], torch.zeros(1, 4), "tensor of integers"),
        (torch.tensor([1, 2]), torch.zeros(1, 4), "names 2 examples, but the batch holds 1"),
        (torch.tensor([1]), torch.zeros(1, 3), r"rows must be \(B, \*\(4,\)\)"),
    ):
        with pytest.raises(ValueError, match=message):
            table.write(ids, rows)
    with pytest.raises(
        ValueError, match="3 of 5 examples have no row, ids 0, 2, 4: write them too"
    ):
        table.complete()
    with pytest.raises(ValueError, match="1000 of 1000 .* 7, ...: write"):
        ExampleTable(1000).complete()
    with pytest.raises(ValueError, match="at least 1"):
        ExampleTable(0)
    with pytest.raises(TypeError, match="map-style"):
        Batches(iter([]), 1, 1)
    with pytest.raises(ValueError, match="empty"):
        Batches(TensorDataset(torch.zeros(0)), 1, 1)
    with pytest.raises(ValueError, match="at least 1, got 1 and 0"):
        Batches(plain(), 1, 0)
    with pytest.raises(ValueError, match="sampler must give"):
        steps(Batches(plain(), 1, 4, lambda generator: []))
    with pytest.raises(ValueError, match="got 1 values"):
        steps(Batches(TensorDataset(torch.zeros(3)), 1, 1))
