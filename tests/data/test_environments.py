"""Problems with environments: what they share and what they do not."""

import pytest
import torch

from htv.data import linear_environments


def test_linear_environments_are_those_of_the_paper():
    x, y = linear_environments()
    assert x.shape == (4, 5) and torch.equal(y, torch.ones(4, 1))
    assert torch.equal(x[:, :4], 3 * torch.eye(4))
    torch.testing.assert_close(x[:, 4], torch.full((4,), 0.3))
    # both the own features alone and the shared one alone explain everything
    for weights in (torch.tensor([1 / 3] * 4 + [0.0]), torch.tensor([0.0] * 4 + [1 / 0.3])):
        torch.testing.assert_close(x @ weights, y[:, 0])


def test_no_environments_are_refused():
    with pytest.raises(ValueError, match="count must be at least 1 environment, got 0"):
        linear_environments(0)
