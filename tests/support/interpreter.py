"""What Triton's interpreter does again and again to no effect, done once.

A third of its time went to this; kernels compute the same. Where a Triton is made otherwise, it is
left as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools


def hasten() -> None:
    """Make Triton's interpreter faster in this process, if it is one."""
    from triton.runtime import interpreter

    with contextlib.suppress(AttributeError):
        _check_no_overflow_in_vain(interpreter)
    with contextlib.suppress(AttributeError):
        _patch_once_a_launch(interpreter)
    with contextlib.suppress(AttributeError):
        _look_up_types_once(interpreter)


def _check_no_overflow_in_vain(interpreter) -> None:
    """Every sum of integers is taken again in int64 to see whether it fits; what is found is looked
    at under `debug` only.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_once_a_launch(interpreter) -> None:
    """Triton's language is patched at every call of a function by a kernel. It stays so until the
    launch ends: once for all functions of a module is enough.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()

    def once(fn):
        if id(fn.__globals__) in done:
            return None
        scope = patch(fn)
        done.add(id(fn.__globals__))
        return scope

    def launched(self, *args, **options):
        done.clear()
        try:
            return launch(self, *args, **options)
        finally:
            done.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched


def _look_up_types_once(interpreter) -> None:
    """NumPy's type for a type of Triton's was found in a table that every call made anew."""
    find, language = interpreter._get_np_dtype, interpreter.tl
    known = functools.cache(find)

    def found(kind):
        scalar = kind.element_ty if isinstance(kind, language.block_type) else kind
        return known(scalar) if type(scalar) is language.dtype else find(scalar)

    interpreter._get_np_dtype = found
