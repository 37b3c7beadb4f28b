"""Memorization-aware training: the loss is shifted by what predictions for examples a model has not
seen already say.

A network that reaches zero loss can do so by a spurious cue for most examples and by memorising the
rest. Held-out predictions, of a model that did not learn the example, show what the cue says. Added
to the logits while training, and left out at test, they take the reward for the cue away. Bayat et
al. 2024, "The pitfalls of memorization: when memorization hurts generalization", arXiv 2412.07684.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from htv.ops.cross_entropy import shifted_cross_entropy

__all__ = [
    "MemorizationAwareLoss",
    "calibration_matrix",
    "class_prior_shift",
    "shifted_cross_entropy",
]

CALIBRATIONS = ("global", "batch", "none")


def class_prior_shift(counts: Tensor, *, tau: float = 1.0, pseudo_count: float = 0.0) -> Tensor:
    """Compute the shift of logit adjustment, ``tau * log(share of the class)``.

    It is for `shifted_cross_entropy`.

    counts:        (K,) how many training examples each class has.
    tau:           the strength of the adjustment.
    pseudo_count:  is added to every count. Classes without an example need one: their shift would
                   be -inf.

    Returns (K,) float32, or float64 for float64 counts. Raises ValueError naming the classes whose
    count, pseudo_count included, is not above 0 and finite.

    Menon et al. 2020, "Long-tail learning via logit adjustment", arXiv 2007.07314.

    >>> htv.methods.class_prior_shift(torch.tensor([3, 1])).exp()
    tensor([0.7500, 0.2500])
    """
    if counts.dim() != 1 or len(counts) == 0:
        raise ValueError(f"counts must be (K,), one for each class, got {tuple(counts.shape)}")
    total = counts.double() + pseudo_count
    bad = torch.nonzero(~((total > 0) & total.isfinite())).flatten().tolist()
    if bad:
        raise ValueError(
            f"counts of classes {_listed(bad)} are not above 0 and finite: for 0 give a "
            "pseudo_count, such as 1"
        )
    return (tau * (total / total.sum()).log()).to(torch.promote_types(counts.dtype, torch.float32))


def calibration_matrix(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Estimate how often the class is c where the held-out prediction is h: p(y = c | h).

    probabilities:  (N, K) of the held-out predictions.
    targets:        (N,) int64 in 0 to K - 1.

    Returns C (K, K) in the type of probabilities, each row a distribution:
    C[h, c] = J[h, c] / sum_c J[h, c] with J[h, c] the sum of probabilities[i, h] over examples i of
    class c. A class h that no prediction gives any probability has the shares of the classes for
    its row; with N = 0 all of C is 0. Targets on the CPU that are no classes raise ValueError.

    Bayat et al. 2024, "The pitfalls of memorization", arXiv 2412.07684.

    >>> predictions = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> htv.methods.calibration_matrix(predictions, torch.tensor([0, 1, 1]))
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    wrong = _outside(targets, probabilities.shape[1])
    if wrong is not None:
        raise ValueError(f"targets must be in 0 to {probabilities.shape[1] - 1}, got {wrong}")
    joint = probabilities.new_zeros(probabilities.shape[1], probabilities.shape[1])
    joint.index_add_(0, targets, probabilities)  # (c, h)
    joint, tiny = joint.T, torch.finfo(joint.dtype).tiny
    mass, shares = joint.sum(dim=1, keepdim=True), joint.sum(dim=0)
    return torch.where(
        mass > tiny, joint / mass.clamp_min(tiny), shares / shares.sum().clamp_min(tiny)
    )


class MemorizationAwareLoss(nn.Module):
    """Compute the mean of CE(logits + shift), with shifts from held-out predictions.

    This is the loss of memorization-aware training, with constants

        q = softmax(heldout[ids] / temperature)        shift = log(q @ C + eps)

    heldout:          (N, K) logits by example id, each of a model that was not trained on the
                      example.
    targets:          (N,) int64, the classes of the same examples, from which C is estimated.
    temperature:      > 0; small ones (.001 to .1) make held-out predictions decide.
    calibration:      what C is. "global": `calibration_matrix` of all N examples, estimated here.
                      "batch": that of each batch. "none": the identity; with ``eps=0`` the loss is
                      CE(logits + heldout / temperature), and takes no memory beyond the logits'
                      gradient however many classes there are.
    eps:              >= 0, bounds shifts by log(eps) from below.
    num_classes:      K, where you want it checked.
    missing:          "error", or "allow": some ids have no held-out predictions, marked by NaN in
                      their rows. They take no part in C. To meet such an id in forward is an error.
    weight:           (K,) of the classes, or None, as for `shifted_cross_entropy`.
    reduction:        "mean", "sum" or "none", likewise.
    label_smoothing:  in [0, 1], likewise.
    ignore_index:     examples with this target count for nothing, and take no part in C.

    `state_dict` holds ``heldout`` and, for "global", ``calibration_matrix``. Held-out logits are
    kept as they come: half precision halves their memory. Shifts are computed in float32, float64
    for float64 predictions.

    A class that no example of the training set (of the batch, for "batch") has: q @ C is 0 there,
    so its shift is log(eps). The loss then does not push its logits down, as no example could have
    it; in a batch of one class that leaves next to no gradient. For "global" a warning names such
    classes.

    Raises ValueError and TypeError for shapes and types other than these, for ids without
    predictions, and for "global" where no example has both a class and a prediction.

    Bayat et al. 2024, "The pitfalls of memorization", arXiv 2412.07684.

    >>> heldout, targets = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    >>> criterion = htv.methods.MemorizationAwareLoss(heldout, targets, temperature=1.0,
    ...                                               calibration="none")
    >>> loss = criterion(torch.zeros(2, 2), targets, ids=torch.arange(2))
    >>> round(loss.item(), 4)
    0.1269
    """

    heldout: Tensor
    calibration_matrix: Tensor | None

    def __init__(
        self,
        heldout: Tensor,
        targets: Tensor,
        *,
        temperature: float = 0.1,
        calibration: str = "global",
        eps: float = 1e-6,
        num_classes: int | None = None,
        missing: str = "error",
        weight: Tensor | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ):
        super().__init__()
        _check_heldout(heldout, targets, num_classes, ignore_index)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite, got {temperature!r}")
        if calibration not in CALIBRATIONS:
            raise ValueError(
                f"calibration must be one of {', '.join(CALIBRATIONS)}, got {calibration!r}"
            )
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be at least 0 and finite, got {eps!r}")
        if missing not in ("error", "allow"):
            raise ValueError(f"missing must be 'error' or 'allow', got {missing!r}")
        self.temperature, self.calibration, self.eps = float(temperature), calibration, float(eps)
        self.reduction, self.label_smoothing, self.ignore_index = (
            reduction,
            label_smoothing,
            ignore_index,
        )
        self.register_buffer("heldout", heldout.detach())
        self.register_buffer("weight", weight, persistent=False)
        without = _without_predictions(heldout)
        if missing == "error" and len(without):
            raise ValueError(
                f"heldout has no predictions for ids {_listed(without.tolist())}: their rows hold "
                "NaN, infinity or nothing but -inf. Predict them, or say missing='allow' if no "
                "batch will contain them"
            )
        found = None
        if calibration == "global":
            known = targets != ignore_index
            known[without] = False
            found = self._calibrated(self._probabilities(heldout[known].double()), targets[known])
        self.register_buffer("calibration_matrix", found)

    def forward(self, logits: Tensor, targets: Tensor, ids: Tensor) -> Tensor:
        """Return the loss of a batch; at test, use the logits as they are.

        logits:   (B, K), with a graph.
        targets:  (B,) int64.
        ids:      (B,) int64, which examples. They may be on the CPU, wherever the rest is: there
                  those outside of 0 to N - 1 raise.

        Ids without held-out predictions raise ValueError if these are on the CPU; on a GPU, where
        looking would wait for the device, the loss is NaN.
        """
        for name, tensor in (("logits", logits), ("targets", targets)):
            if tensor.device != self.heldout.device:
                raise ValueError(
                    f"{name} are on {tensor.device}, heldout on {self.heldout.device}: move them, "
                    "or this loss by .to()"
                )
        if logits.dim() != 2 or logits.shape[1] != self.heldout.shape[1]:
            raise ValueError(
                f"logits must be (B, K) with K = {self.heldout.shape[1]} classes, as heldout has, "
                f"got {tuple(logits.shape)}"
            )
        common: dict[str, Any] = {
            "weight": self.weight,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
        }
        if self.calibration == "none" and self.eps == 0:
            rows = self._rows(ids, targets)
            return shifted_cross_entropy(
                logits, targets, rows, temperature=self.temperature, **common
            )
        return shifted_cross_entropy(logits, targets, self.shift(ids, targets), **common)

    @torch.no_grad()
    def shift(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return what is added to the logits of a batch, (B, K).

        ids:      (B,) int64, which examples.
        targets:  (B,) int64, their classes, which count for calibration="batch" alone.
        """
        probabilities = self._probabilities(self._rows(ids, targets))
        matrix = self.calibration_matrix
        if self.calibration == "batch":
            known = targets != self.ignore_index
            counted = torch.where(known.unsqueeze(1), probabilities, 0)
            matrix = calibration_matrix(counted, torch.where(known, targets, 0))
        if matrix is not None:
            with torch.autocast(probabilities.device.type, enabled=False):
                probabilities = probabilities @ matrix.to(probabilities.dtype)
        return (probabilities + self.eps).log()

    def extra_repr(self) -> str:
        """Return what the module's repr says of its settings."""
        examples, classes = self.heldout.shape
        settings = (
            f"temperature={self.temperature:g}, calibration={self.calibration!r}, eps={self.eps:g}"
        )
        return f"{examples} examples, {classes} classes, {settings}"

    def _probabilities(self, logits: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (wide / self.temperature).softmax(dim=1)

    def _calibrated(self, probabilities: Tensor, targets: Tensor) -> Tensor:
        if len(targets) == 0:
            raise ValueError(
                "no example has both a class and a held-out prediction: with nothing to calibrate "
                "by, shifts would be the same for all classes. Predict some examples, or take "
                "calibration='batch' or 'none'"
            )
        counts = torch.bincount(targets, minlength=probabilities.shape[1])
        absent = torch.nonzero(counts == 0).flatten().tolist()
        if absent:
            warnings.warn(
                f"classes {_listed(absent)} have no example with a held-out prediction: their "
                "shift is log(eps) everywhere, and nothing is learnt about their logits",
                stacklevel=3,
            )
        dtype = torch.promote_types(self.heldout.dtype, torch.float32)
        return calibration_matrix(probabilities, targets).to(dtype)

    def _rows(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The held-out logits of a batch, (B, K)."""
        if not isinstance(ids, Tensor):
            raise TypeError(f"ids must be a tensor, (B,) int64, got {type(ids).__name__}")
        if ids.dtype != torch.int64 or ids.dim() != 1 or ids.shape != targets.shape:
            raise ValueError(
                f"ids must be (B,) int64, one for each target, got {ids.dtype} {tuple(ids.shape)} "
                f"for targets {tuple(targets.shape)}"
            )
        wrong = _outside(ids, len(self.heldout))
        if wrong is not None:
            raise ValueError(f"heldout has {len(self.heldout)} rows, there is none for id {wrong}")
        rows = self.heldout.index_select(0, ids.to(self.heldout.device))
        if _seen(rows):
            without = _without_predictions(rows)
            if len(without):
                raise ValueError(
                    f"heldout has no predictions for ids {_listed(ids[without].tolist())}"
                )
        return rows


def _check_heldout(
    heldout: Tensor, targets: Tensor, num_classes: int | None, ignore_index: int
) -> None:
    for name, value in (("heldout", heldout), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if heldout.dim() != 2 or not heldout.is_floating_point() or heldout.shape[1] == 0:
        raise ValueError(
            f"heldout must be (N, K) logits, floating point, got {heldout.dtype} of shape "
            f"{tuple(heldout.shape)}"
        )
    if num_classes is not None and num_classes != heldout.shape[1]:
        raise ValueError(
            f"heldout has {heldout.shape[1]} columns, but num_classes is {num_classes}"
        )
    if targets.dtype != torch.int64 or targets.shape != heldout.shape[:1]:
        raise ValueError(
            f"targets must be ({len(heldout)},) int64, one for each row of heldout, got "
            f"{targets.dtype} of shape {tuple(targets.shape)}"
        )
    if targets.device != heldout.device:
        raise ValueError(
            f"targets are on {targets.device}, heldout on {heldout.device}: move one of them"
        )
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= heldout.shape[1]))]
    if len(wrong):
        raise ValueError(
            f"targets must be in 0 to {heldout.shape[1] - 1} or ignore_index, got {int(wrong[0])}"
        )


def _seen(tensor: Tensor) -> bool:
    """Whether its values are at hand: on a GPU looking would wait for the device, and a graph has
    none.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _outside(numbers: Tensor, size: int) -> int | None:
    """The first that is not in 0 to size - 1, where that can be seen."""
    if (
        not _seen(numbers)
        or len(numbers) == 0
        or 0 <= int(numbers.min()) <= int(numbers.max()) < size
    ):
        return None
    return int(numbers[(numbers < 0) | (numbers >= size)][0])


def _without_predictions(heldout: Tensor) -> Tensor:
    """The rows whose softmax is not a distribution: with NaN or infinity, or -inf alone."""
    return torch.nonzero(~heldout.amax(dim=1).isfinite()).flatten()


def _listed(numbers: list[int], most: int = 5) -> str:
    return ", ".join(map(str, numbers[:most])) + (
        f" and {len(numbers) - most} more" if len(numbers) > most else ""
    )
