"""The errors htv raises beside Python's own, and what their messages say of a tensor."""

from importlib.util import find_spec

from torch import Tensor

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # of modules that are called otherwise


class UnsupportedError(RuntimeError):
    """Say that a parameter is used in a way whose per-group contributions htv cannot separate.

    Its attribute `module` is the path of the innermost module in whose forward that was, "" for the
    model itself; None outside of any.
    """

    module: str | None = None

    def locate(self, path: str, kind: str) -> None:
        """Note which module it was; the first call, of the innermost module, counts.

        path:  of the module, "" for the model itself.
        kind:  the name of its class.
        """
        if self.module is None:
            self.module = path
            self.args = (f"{self} (in {f'module {path!r}, ' if path else 'the model, '}a {kind})",)


class CheckError(AssertionError):
    """Say that `htv.check` found a gradient that differs from the one-group-at-a-time loop."""


class MissingExtraError(ImportError):
    """Say that a command or a function lacks a package that an extra brings; names both."""


def require(user: str, extra: str, *modules: str) -> None:
    """Raise `MissingExtraError` unless all modules are installed; none is imported.

    user:     the command or function that needs them, as the message calls it.
    extra:    which brings them: one of `hard-to-vary`'s extras, or several separated by commas.
    modules:  as they are imported, such as "sklearn".
    """
    missing = [_DISTRIBUTIONS.get(name, name) for name in modules if not _installed(name)]
    if missing:
        needed = ", ".join(missing)
        raise MissingExtraError(f'{user} needs {needed}: pip install "hard-to-vary[{extra}]"')


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what an import hook may say
        return False


def described(value: object) -> str:
    """What was given where a tensor of some shape and dtype is wanted."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"a {type(value).__name__}"
