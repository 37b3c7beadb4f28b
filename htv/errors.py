"""The errors htv raises beside Python's own."""


class UnsupportedError(RuntimeError):
    """A registered parameter is used in a way whose per-group contributions htv does not know how to separate."""


class CheckError(AssertionError):
    """`htv.check` found a parameter whose aggregated gradient differs from the one-group-at-a-time loop."""
