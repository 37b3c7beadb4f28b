"""How consistent a minimum is: do environments agree where it is flat?

``N_e`` is the path-connected region around trained parameters theta* where environment e's loss
stays within eps of its value there. The inconsistency is how far the loss of some environment e'
departs within the region of some e::

    I(theta*) = max_{e, e'} max_{theta in N_e} |L_e'(theta) - L_e(theta*)|

The ILC score is minus its mean over initialisations. Parascandolo et al. 2020, "Learning
explanations that are hard to vary", arXiv 2009.00329, sections 2.1 to 2.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "Inconsistency",
    "arithmetic_mean_hessian",
    "environment_losses",
    "geometric_mean_hessian",
    "inconsistency",
    "inconsistency_bound",
    "quadratic_inconsistency",
]

Loss = Callable[[Tensor], Tensor]  # (P,) parameters -> a scalar


@dataclass(frozen=True, eq=False)
class Inconsistency:
    """Hold the largest departure of a loss that `inconsistency` found.

    value:   |L_e'(theta) - L_e(theta*)|.
    within:  the environment e, in whose region theta lies.
    of:      the environment e', whose loss it is.
    theta:   (P,), where.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> losses = [lambda theta: theta.square().sum()] * 2
    >>> found = htv.methods.inconsistency(losses, torch.zeros(1), eps=0.5, steps=2)
    >>> isinstance(found, htv.methods.Inconsistency), round(found.value, 3)
    (True, 0.5)
    """

    value: float
    within: int
    of: int
    theta: Tensor


def environment_losses(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    environments: Sequence[tuple[Tensor, Tensor]],
) -> tuple[list[Loss], Tensor]:
    """Express a model's loss in every environment as a function of one vector of parameters.

    model:         left alone; put it in eval mode before if it has dropout or BatchNorm.
    criterion:     (outputs, targets) -> a scalar.
    environments:  (inputs, targets) of each.

    Returns the losses, functions of (P,), and the parameters as they are, (P,) float64.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> environments = [(torch.ones(1, 1), torch.zeros(1, 1))]
    >>> criterion = torch.nn.functional.mse_loss
    >>> (loss,), theta = htv.methods.environment_losses(model, criterion, environments)
    >>> loss(torch.tensor([2.0])).item(), theta.shape
    (4.0, torch.Size([1]))
    """
    named = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    theta = torch.cat([p.double().flatten() for p in named.values()])

    def parameters(vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([p.numel() for p in named.values()])
        return {
            name: part.view(p.shape).to(p.dtype)
            for (name, p), part in zip(named.items(), parts, strict=True)
        }

    def loss_of(inputs: Tensor, targets: Tensor) -> Loss:
        return lambda vector: criterion(
            torch.func.functional_call(model, (parameters(vector), buffers), (inputs,)), targets
        )

    return [loss_of(inputs, targets) for inputs, targets in environments], theta


def inconsistency(
    losses: Sequence[Loss],
    theta: Tensor,
    eps: float,
    *,
    steps: int = 60,
    walkers: int = 32,
    points: int = 16,
    radius: float = 1e3,
    seed: int = 0,
) -> Inconsistency:
    """Search for the largest inconsistency of a minimum theta*: a lower bound, for small models.

    The region of an environment is where its loss stays within `eps` of its value at theta*, and
    that is connected with theta*. Walkers start at theta* and go along straight lines, each checked
    at `points` places and cut off, by bisection, where it leaves the region; so whatever is reached
    is connected with theta*, up to that resolution. Half of the steps take random directions to a
    random place on the line; the others climb (or descend) the loss of another environment along
    the border of the region. The more parameters, the more steps it takes.

    losses:   of each environment, (P,) -> a scalar; differentiable, and fit for `torch.func.vmap`.
    theta:    (P,), the trained parameters theta*; float64 is best.
    eps:      > 0, what the loss may change within a region.
    steps:    how many each walker makes.
    walkers:  how many there are for each pair of environments.
    points:   places of a line that are looked at.
    radius:   no walker goes farther from theta* than this; where a region is unbounded, the result
              is that of the part within.
    seed:     decides the walks; torch's global generator is not touched.

    Returns an `Inconsistency`. Raises ValueError for no losses, losses that are not finite scalars
    at theta*, and anything out of range.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> steep, flat = (lambda t: 4 * t.square().sum()), (lambda t: t.square().sum())
    >>> theta = torch.zeros(1, dtype=torch.float64)
    >>> found = htv.methods.inconsistency([steep, flat], theta, eps=1.0, steps=4)
    >>> round(found.value, 3), found.within, found.of
    (4.0, 1, 0)
    """
    losses = list(losses)
    if not losses:
        raise ValueError("losses is empty: give one for each environment")
    if theta.dim() != 1 or not theta.dtype.is_floating_point:
        raise ValueError(
            f"theta must be (P,) floating point, got shape {tuple(theta.shape)} and dtype "
            f"{theta.dtype}"
        )
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be above 0 and finite, got {eps!r}")
    for name, value in (("steps", steps), ("walkers", walkers), ("points", points)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not radius > 0:
        raise ValueError(f"radius must be above 0, got {radius!r}")
    theta = theta.detach()
    for index, loss in enumerate(losses):
        if loss(theta).dim() != 0:
            raise ValueError(
                f"losses[{index}] must return a scalar, got shape {tuple(loss(theta).shape)}"
            )
        if not torch.isfinite(loss(theta)):
            raise ValueError(f"losses[{index}] is not finite at theta")
    generator = torch.Generator(theta.device).manual_seed(seed)
    best = Inconsistency(0.0, 0, 0, theta)
    for within, of in ((e, f) for e in range(len(losses)) for f in range(len(losses))):
        walk = _Walk(losses[within], losses[of], theta, eps, walkers, points, radius, generator)
        for step in range(steps):
            walk.step(climb=step % 2 == 1)
        if walk.value > best.value:
            best = Inconsistency(walk.value, within, of, walk.best)
    return best


class _Walk:
    """Walkers inside the region of `within` that look for where `of` departs most."""

    def __init__(
        self,
        within: Loss,
        of: Loss,
        theta: Tensor,
        eps: float,
        walkers: int,
        points: int,
        radius: float,
        generator: torch.Generator,
    ):
        self._within, self._of = torch.func.vmap(within), torch.func.vmap(of)
        self._slopes = (
            torch.func.vmap(torch.func.grad(within)),
            torch.func.vmap(torch.func.grad(of)),
        )
        self._home, self._level, self._eps, self._radius = theta, within(theta), eps, radius
        self._points, self._generator = points, generator
        self._at = theta.repeat(walkers, 1)
        self._reach = self._at.new_ones(walkers, 1)
        self.value, self.best = 0.0, theta
        self._note(self._at[:1])

    def step(self, climb: bool) -> None:
        directions = self._uphill() if climb else self._random(self._at)
        longest = self._longest(directions)
        self._reach = torch.where(
            longest >= self._reach, 2 * self._reach, longest.clamp(min=1e-9) * 1.5
        )
        share: float | Tensor = 1.0
        if not climb:
            share = torch.rand(
                longest.shape,
                generator=self._generator,
                dtype=longest.dtype,
                device=longest.device,
            )
        ends = self._at + longest * directions
        self._note(ends)
        self._at = torch.where(
            self._inside(ends), self._at + share * longest * directions, self._at
        )

    def _random(self, like: Tensor) -> Tensor:
        return _unit(
            torch.randn(like.shape, generator=self._generator, dtype=like.dtype, device=like.device)
        )

    def _uphill(self) -> Tensor:
        """Where the loss of e' departs faster: half of the walkers straight on, half along the
        border of the region.
        """
        border, slope = (slopes(self._at) for slopes in self._slopes)
        slope = slope * torch.where(self._of(self._at) >= self._level, 1.0, -1.0)[:, None]
        border = _unit(border)
        along = slope - (slope * border).sum(dim=1, keepdim=True) * border
        half = len(slope) // 2
        directions = torch.cat(
            [
                slope[:half],
                along[half:] - 0.1 * along[half:].norm(dim=1, keepdim=True) * border[half:],
            ]
        )
        return torch.where(
            directions.norm(dim=1, keepdim=True) > 1e-12, _unit(directions), self._random(slope)
        )

    def _longest(self, directions: Tensor) -> Tensor:
        """(W, 1): how far each walker can go without leaving the region, up to its reach."""
        shares = torch.linspace(
            0, 1, self._points + 1, dtype=self._at.dtype, device=self._at.device
        )[1:]
        places = self._at[:, None] + (self._reach * shares)[:, :, None] * directions[:, None]
        inside = self._inside(places.flatten(0, 1)).view(len(places), -1)
        good = inside.cumprod(dim=1).sum(dim=1, keepdim=True)
        low, high = self._reach * good / self._points, self._reach * (good + 1) / self._points
        for _ in range(20):
            middle = (low + high) / 2
            fits = self._inside(self._at + middle * directions)
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.where(good == self._points, self._reach, low)

    def _inside(self, places: Tensor) -> Tensor:
        """(W, P) -> (W, 1) bool; a loss that is not finite is outside."""
        distances: Tensor = (places - self._home).norm(dim=1)
        near = distances <= self._radius
        return (near & ((self._within(places) - self._level).abs() <= self._eps))[:, None]

    def _note(self, places: Tensor) -> None:
        places = places[self._inside(places)[:, 0]]
        if len(places):
            departures = (self._of(places) - self._level).abs().nan_to_num(-1.0)
            index = int(departures.argmax())
            if departures[index] > self.value:
                self.value, self.best = float(departures[index]), places[index].clone()


def _unit(vectors: Tensor) -> Tensor:
    norms: Tensor = vectors.norm(dim=1, keepdim=True)
    return vectors / norms.clamp(min=torch.finfo(vectors.dtype).tiny)


# -- quadratic losses: L_e = (theta - theta*)^T H_e (theta - theta*) / 2 ---------------------------


def quadratic_inconsistency(hessian_a: Tensor, hessian_b: Tensor, eps: float) -> float:
    """Compute the inconsistency of two quadratic losses with the same minimum and value there.

    It is eps times the largest ratio of their curvatures.

    hessian_a:  (P,) the diagonal, >= 0, or (P, P) symmetric positive definite.
    hessian_b:  likewise, of the same shape.
    eps:        > 0, what the loss may change within a region.

    Returns a float: infinite for a direction that is flat in one environment only, eps for equal
    Hessians. Raises ValueError for anything else.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> a, b = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 1.0])
    >>> htv.methods.quadratic_inconsistency(a, b, eps=0.1)
    0.4
    """
    a, b = _pair(hessian_a, hessian_b, eps)
    if a.dim() == 1:
        curved = (a > 0) | (b > 0)
        ratios = (a / b)[curved]
    else:
        ratios = torch.linalg.eigvalsh(_whitened(b, a))
    largest: float = max([1.0, *ratios.tolist(), *(1 / ratios).tolist()])
    return eps * largest


def arithmetic_mean_hessian(hessians: Tensor) -> Tensor:
    """Compute the mean of Hessians, which is the Hessian of the pooled loss.

    hessians:  (E, P) diagonals >= 0, or (E, P, P) symmetric positive definite.

    Returns (P,) or (P, P) float64. Raises ValueError for other Hessians.

    >>> htv.methods.arithmetic_mean_hessian(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
    tensor([2., 2.], dtype=torch.float64)
    """
    return _hessians(hessians).mean(dim=0)


def geometric_mean_hessian(
    hessians: Tensor, tolerance: float = 1e-12, max_steps: int = 500
) -> Tensor:
    """Compute the Karcher mean of Hessians, the matrix closest to all of them in their geometry.

    It is the symmetric positive definite X with ``sum_e log(X^-1/2 H_e X^-1/2) = 0``; diagonal
    Hessians have the geometric mean of every coordinate.

    hessians:   (E, P) diagonals >= 0, or (E, P, P) symmetric positive definite.
    tolerance:  the norm of the mean logarithm, per row, at which the iteration stops.
    max_steps:  of the iteration.

    Returns (P,) or (P, P) float64. Raises ValueError for other Hessians, and RuntimeError where the
    iteration does not converge to `tolerance` within `max_steps`.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> htv.methods.geometric_mean_hessian(torch.tensor([[1.0, 2.0], [4.0, 8.0]]))
    tensor([2., 4.], dtype=torch.float64)
    """
    hessians = _hessians(hessians)
    if hessians.dim() == 2:
        return hessians.log().mean(dim=0).exp()
    mean = _spectral(
        torch.stack([_spectral(h, torch.log) for h in hessians]).mean(dim=0), torch.exp
    )
    rate, before, size = 1.0, float("inf"), float("inf")
    for _ in range(max_steps):
        try:
            root, inverse_root = (
                _spectral(mean, torch.sqrt),
                _spectral(mean, lambda values: values.rsqrt()),
            )
            logs = torch.stack(
                [_spectral(inverse_root @ h @ inverse_root, torch.log) for h in hessians]
            ).mean(dim=0)
            size = logs.norm().item()
            if size <= tolerance * len(mean):
                return mean
            if size >= before:
                rate /= 2
            before = size
            mean = _symmetric(root @ _spectral(rate * logs, torch.exp) @ root)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            break  # something is no longer finite
    raise RuntimeError(
        f"the geometric mean did not converge to {tolerance} in {max_steps} steps (it is at "
        f"{size:.1e}): the Hessians are too ill-conditioned; add a little to their diagonals, or "
        "allow a larger tolerance"
    )


def inconsistency_bound(hessian_a: Tensor, hessian_b: Tensor, eps: float) -> float:
    """Bound `quadratic_inconsistency` from above by the determinants of the Hessians' means.

    The bound is ``4 * eps * (det arithmetic / det geometric)**2``. The ratio is 1 for equal
    Hessians only. The factor is 4, as the square is ``(1 + r)**2 / (4 r)`` for a direction with
    curvatures of ratio r: half of it would not do where r exceeds 1 + sqrt(2).

    hessian_a:  (P,) the diagonal, >= 0, or (P, P) symmetric positive definite.
    hessian_b:  likewise, of the same shape.
    eps:        > 0, what the loss may change within a region.

    Returns a float. Raises ValueError for anything else.

    Parascandolo et al. 2020, "Learning explanations that are hard to vary", arXiv 2009.00329.

    >>> a, b = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 1.0])
    >>> round(htv.methods.inconsistency_bound(a, b, eps=0.1), 4)
    0.625
    """
    a, b = _pair(hessian_a, hessian_b, eps)
    both = torch.stack([a, b])
    if a.dim() == 1:
        curved = (a > 0) | (b > 0)
        return (
            4
            * eps
            * float(
                (arithmetic_mean_hessian(both) / geometric_mean_hessian(both))[curved].prod() ** 2
            )
        )
    arithmetic = torch.linalg.slogdet(arithmetic_mean_hessian(both))[1]
    geometric = (
        torch.linalg.slogdet(a)[1] + torch.linalg.slogdet(b)[1]
    ) / 2  # that of the geometric mean
    return 4 * eps * float((2 * (arithmetic - geometric)).exp())


def _pair(hessian_a: Tensor, hessian_b: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    a, b = _hessian("hessian_a", hessian_a), _hessian("hessian_b", hessian_b)
    if a.shape != b.shape:
        raise ValueError(
            f"hessian_a and hessian_b differ in shape, {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be above 0 and finite, got {eps!r}")
    return a, b


def _hessian(name: str, hessian: Tensor) -> Tensor:
    hessian = torch.as_tensor(hessian).double()
    if not bool(hessian.isfinite().all()):
        raise ValueError(f"{name} must be finite")
    if hessian.dim() == 1:
        if not bool((hessian >= 0).all()):
            raise ValueError(
                f"{name} must have no negative entry: the point would not be a minimum"
            )
        return hessian
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"{name} must be (P,) or (P, P), got shape {tuple(hessian.shape)}")
    scale = hessian.abs().max()
    if not bool(((hessian - hessian.mT).abs() <= 1e-8 * scale).all()):
        raise ValueError(f"{name} must be symmetric")
    if not bool((torch.linalg.eigvalsh(hessian) > 0).all()):
        raise ValueError(f"{name} must be positive definite; add a little to its diagonal")
    return _symmetric(hessian)


def _hessians(hessians: Tensor) -> Tensor:
    hessians = torch.as_tensor(hessians)
    if hessians.dim() not in (2, 3) or len(hessians) == 0:
        raise ValueError(
            f"hessians must be (E, P) or (E, P, P) with E >= 1, got shape {tuple(hessians.shape)}"
        )
    return torch.stack([_hessian(f"hessians[{index}]", h) for index, h in enumerate(hessians)])


def _symmetric(matrix: Tensor) -> Tensor:
    symmetric: Tensor = (matrix + matrix.mT) / 2
    return symmetric


def _spectral(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of a symmetric matrix: of its eigenvalues."""
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    result: Tensor = (vectors * function(values)) @ vectors.mT
    return result


def _whitened(b: Tensor, a: Tensor) -> Tensor:
    """B^-1/2 A B^-1/2, which has the eigenvalues of B^-1 A."""
    inverse_root = _spectral(b, lambda values: values.rsqrt())
    return _symmetric(inverse_root @ a @ inverse_root)
