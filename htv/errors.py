"""The errors htv raises beside Python's own, and what their messages say of a tensor."""

from torch import Tensor


class UnsupportedError(RuntimeError):
    """A registered parameter is used in a way whose per-group contributions htv does not know how to separate.

    module: the path of the innermost module in whose forward that was, "" for the model itself; None outside of any.
    """

    module: str | None = None

    def locate(self, path: str, kind: str) -> None:
        """Say which module it was; the first to say so is the innermost."""
        if self.module is None:
            self.module = path
            self.args = (f"{self} (in {f'module {path!r}, ' if path else 'the model, '}a {kind})",)


class CheckError(AssertionError):
    """`htv.check` found a parameter whose aggregated gradient differs from the one-group-at-a-time loop."""


def described(value: object) -> str:
    """What was given where a tensor of some shape and dtype is wanted."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"a {type(value).__name__}"
