"""Pickles of plain values and NumPy arrays, read without `pickle`: nothing they ask for is called.

The names that arrays are pickled with stand for records of what the file says about them; `array`
makes an array of a record once it has looked at all of it. Memory is bounded by the length of the
file and the number of its operations, never by a number in it.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MOST_BYTES = 1 << 29  # three times the largest batch that is published
MOST_OPERATIONS = 2_000_000  # four times as many as it has, as Python 3 writes it in protocol 2
MOST_DIMS = 8
LONGEST_KEY = 64
RECONSTRUCT, NDARRAY, DTYPE, ENCODE = "_reconstruct", "ndarray", "dtype", "encode"
NAMES = {
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): DTYPE,
    ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("_codecs", "encode"): ENCODE,  # how protocol 2 writes bytes in Python 3
}
TYPES = {*(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8"}


class PickleError(ValueError):
    """A pickle is damaged, or holds what is neither a plain value nor an array."""


@dataclass(frozen=True, eq=False)
class Name:
    """A name of `NAMES`."""

    name: str


@dataclass(eq=False, slots=True)
class Record:
    """What a file calls a name of `NAMES` with, and what it says of the result afterwards."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


def load(path: Path) -> Any:
    """Read a file's value: None, numbers, bytes, str, lists, tuples, dicts; `Record` for all else.

    Strings of Python 2 are bytes. Raises OSError, and PickleError for what is not such a pickle.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise PickleError("it is not a file")
    if size > MOST_BYTES:
        raise PickleError(f"it has {size} bytes, more than {MOST_BYTES}")
    with path.open("rb") as stream:
        return loads(stream.read(min(size, MOST_BYTES)))


def loads(data: bytes) -> Any:
    """Read the same of what a file holds."""
    reader = _Reader()
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MOST_OPERATIONS:
                raise PickleError(f"it has more than {MOST_OPERATIONS} operations")
            if operation.name == "STOP":
                return reader.stack.pop()
            reader.do(operation.name, argument)
    except PickleError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise PickleError(f"it is damaged ({type(error).__name__}: {str(error)[:200]})") from error
    raise PickleError("it ends before its end is said")


class _Reader:
    """The stack and memory of a pickle. What is between marks has a stack of its own."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memory: dict[int, Any] = {}

    def do(self, operation: str, argument: Any) -> None:
        stack = self.stack
        if operation in _VALUES:
            stack.append(argument)
        elif operation in _STRINGS:  # of Python 2
            stack.append(argument.encode("latin-1"))
        elif operation in _MEMORISE:
            self.memory[len(self.memory) if argument is None else argument] = stack[-1]
        elif operation in _RECALL:
            stack.append(self.memory[argument])
        elif operation in _CONSTANTS:
            stack.append(_CONSTANTS[operation])
        elif operation in _DO:
            _DO[operation](self, argument)
        elif operation not in ("PROTO", "FRAME"):
            raise PickleError(f"it does {operation}, which no batch of images needs")

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def list_since_mark(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append(items)

    def tuple_since_mark(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append(tuple(items))

    def mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise PickleError("it takes more than it has given")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise PickleError("it appends to what is no list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise PickleError("it sets items of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_key(key)] = value

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([key, value])

    def new_dict(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.update(items)

    def named(self, argument: str | None) -> None:
        """GLOBAL, whose argument is a module and a name with a blank between, and STACK_GLOBAL."""
        if argument is not None:
            module, _, name = argument.partition(" ")
        else:
            name, module = self.stack.pop(), self.stack.pop()
        if type(module) is not str or type(name) is not str:
            raise PickleError("it asks for what has no name")
        if (module, name) not in NAMES:
            asked = f"{module}.{name}"[:100]
            raise PickleError(f"it asks for {asked}, which no batch of images needs")
        self.stack.append(Name(NAMES[module, name]))

    def reduce(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if type(called) is not Name or type(arguments) is not tuple:
            raise PickleError("it calls what no batch of images needs")
        self.stack.append(Record(called.name, arguments))

    def build(self, _: Any) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is not Record or record.state is not None:
            raise PickleError("it gives a state to what has none")
        record.state = state


_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8",
}  # fmt: skip
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_MEMORISE = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_RECALL = {"GET", "BINGET", "LONG_BINGET"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_DO: dict[str, Callable[[_Reader, Any], object]] = {
    "MARK": _Reader.mark,
    "POP": lambda reader, _: reader.stack.pop(),
    "POP_MARK": lambda reader, _: reader.since_mark(),
    "EMPTY_LIST": lambda reader, _: reader.stack.append([]),
    "EMPTY_DICT": lambda reader, _: reader.stack.append({}),
    "LIST": _Reader.list_since_mark,
    "TUPLE": _Reader.tuple_since_mark,
    "TUPLE1": lambda reader, _: reader.tuple_of(1),
    "TUPLE2": lambda reader, _: reader.tuple_of(2),
    "TUPLE3": lambda reader, _: reader.tuple_of(3),
    "DICT": _Reader.new_dict,
    "APPEND": lambda reader, _: reader.extend([reader.stack.pop()]),
    "APPENDS": lambda reader, _: reader.extend(reader.since_mark()),
    "SETITEM": _Reader.set_item,
    "SETITEMS": lambda reader, _: reader.update(reader.since_mark()),
    "GLOBAL": _Reader.named,
    "STACK_GLOBAL": _Reader.named,
    "REDUCE": _Reader.reduce,
    "BUILD": _Reader.build,
}


def _key(key: Any) -> Any:
    """Of a dict; a plain one, for the hash of what is nested deeply takes as deep a recursion."""
    if type(key) is Record:
        key = raw(key, LONGEST_KEY)
    if type(key) not in (bytes, str, int):
        raise PickleError(f"a dict has a key of type {type(key).__name__}")
    return key


# ---- what records stand for ----


def raw(value: Any, longest: int = MOST_BYTES) -> bytes:
    """Return bytes, as they are or as Python 3 writes them in protocol 2: latin-1 to be encoded."""
    if type(value) is bytes:
        return value
    encoded = type(value) is Record and value.name == ENCODE and value.state is None
    if encoded and len(value.arguments) == 2:
        text, encoding = value.arguments
        if type(text) is str and encoding in ("latin1", "latin-1") and len(text) <= longest:
            return text.encode("latin-1")
    raise PickleError("something is not the bytes it should be")


def array(value: Any) -> np.ndarray:
    """Make the array of a `Record`, of numbers; it cannot be written to."""
    if type(value) is not Record or value.name != RECONSTRUCT:
        raise PickleError(f"something of type {type(value).__name__} is no array")
    state = value.state
    if type(state) is not tuple or len(state) != 5 or state[0] != 1:
        raise PickleError("an array says too little, or too much, of itself")
    _, shape, kind, by_columns, values = state
    whole = type(shape) is tuple and len(shape) <= MOST_DIMS
    if not whole or not all(type(n) is int and 0 <= n <= MOST_BYTES for n in shape):
        raise PickleError("an array has no shape")
    if type(by_columns) not in (bool, int):
        raise PickleError("an array does not say in which order its values are")
    dtype, values = _dtype(kind), raw(values)
    if math.prod(shape) * dtype.itemsize != len(values):
        raise PickleError("an array has more values than its shape, or less")
    return np.frombuffer(values, dtype).reshape(shape, order="F" if by_columns else "C")


def _dtype(value: Any) -> np.dtype:
    """The type of a `Record`, of plain numbers: no fields, no objects, no arrays as elements."""
    if type(value) is not Record or value.name != DTYPE or not value.arguments:
        raise PickleError("an array has no type")
    code, state = value.arguments[0], value.state
    code = code.decode("latin-1") if type(code) is bytes else code
    if type(code) is not str or code not in TYPES:
        raise PickleError("an array is not of plain numbers")
    if state is None:
        return np.dtype(code)
    if type(state) is not tuple or len(state) < 5 or any(part is not None for part in state[2:5]):
        raise PickleError("an array is not of plain numbers")
    order = state[1].decode("latin-1") if type(state[1]) is bytes else state[1]
    if type(order) is not str or order not in ("<", ">", "|", "="):
        raise PickleError("an array is of numbers in no known order of bytes")
    if order == "<":
        return np.dtype(code).newbyteorder("<")
    return np.dtype(code).newbyteorder(">") if order == ">" else np.dtype(code)
