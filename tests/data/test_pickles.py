"""Pickles are read without calling anything, in memory bounded by what a file holds, or refused."""

import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from htv.data import pickles
from htv.data.pickles import PickleError, array, loads, raw


@pytest.mark.parametrize("protocol", range(5))
def test_plain_values_read_as_pickle_reads_them(protocol):
    key = b"k" if protocol > 2 else "k"
    value = {"a": [1, -2, 2**40, 2**70, 0.5, None, True, False], key: (), 7: ("x", ["y"] * 3)}
    assert loads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i2", "<f4"])
def test_arrays(dtype, protocol):
    six = np.arange(6).astype(dtype)
    for value in (six.reshape(2, 3), six.reshape(3, 2).T):
        found = array(loads(pickle.dumps(value, protocol)))
        assert found.dtype == value.dtype and np.array_equal(found, value)


def test_bytes_as_python_3_writes_them_in_protocol_2():
    value = {b"data": bytes(range(256))}
    found = loads(pickle.dumps(value, 2))
    assert raw(found[b"data"]) == value[b"data"]


def python_2(data: bytes, rows: int, columns: int) -> bytes:
    """What cPickle of Python 2 wrote of {'data': uint8 array, 'labels': [..]} in protocol 2."""
    text = lambda words: b"U" + bytes([len(words)]) + words
    number = lambda n: b"M" + struct.pack("<H", n)
    return (
        b"\x80\x02}q\x01(" + text(b"labels") + b"q\x02]q\x03(K\x06K\x09e" + text(b"data") + b"q\x04"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85" + text(b"b")
        + b"\x87Rq\x07(K\x01" + number(rows) + number(columns) + b"\x86cnumpy\ndtype\nq\x08"
        + text(b"u1") + b"K\x00K\x01\x87Rq\x09(K\x03" + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", len(data)) + data
        + b"tbu."
    )  # fmt: skip


def test_what_python_2_wrote():
    data = np.random.default_rng(0).integers(0, 256, (2, 300), dtype=np.uint8)
    content = python_2(data.tobytes(), 2, 300)
    assert pickle.loads(content, encoding="bytes").keys() == {b"data", b"labels"}  # it is one
    found = loads(content)
    assert found[b"labels"] == [6, 9] and np.array_equal(array(found[b"data"]), data)


POINTER = struct.pack("<Q", 0x4141414141414141)
OBJECTS = b"cnumpy\nndarray\n((K\x01tcnumpy\ndtype\n(U\x02O8K\x00K\x01tRC\x08" + POINTER + b"tR"
REFUSED = {
    "a call": (b"cos\nsystem\n(S'true'\ntR.", "asks for os.system, which no batch of images needs"),
    "a call by names on the stack": (
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        "asks for os.system",
    ),
    "an attribute of one": (
        b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.",
        "asks for numpy.ndarray.dump",
    ),
    "a name of megabytes": (b"c" + b"m" * 3_000_000 + b"\nx\n.", "asks for m{100}, which"),
    "what was made is called": (b"cnumpy\ndtype\n)R)R.", "calls what no batch of images needs"),
    "an object": (b"\x80\x02cnumpy\nndarray\n)\x81.", "it does NEWOBJ"),
    "an entry of a registry": (b"\x80\x02\x82\x01.", "damaged|EXT1"),
    "somebody's own id": (b"Px\n.", "it does PERSID"),
    "a state of a list": (b"]]b.", "gives a state to what has none"),
    "items of a list": (b"]K\x01K\x02s.", "sets items of what is no dict"),
    "a key that is a list": (b"}]K\x01s.", "a dict has a key of type list"),
    "a key nested deeply": (
        b"})" + b"\x85" * 200_000 + b"K\x01s.",
        "a dict has a key of type tuple",
    ),
    "nothing": (b"", "damaged"),
    "an empty stack": (b".", "damaged"),
    "an end within": (pickle.dumps([1, 2, b"three"])[:-4], "damaged"),
    "a mark too few": (b"t.", "damaged"),
    "memory that nothing was put into": (b"h\x05.", "damaged"),
    "a number of five thousand digits": (b"L" + b"9" * 5000 + b"L\n.", "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    content, message = REFUSED[name]
    with pytest.raises(PickleError, match=message) as caught:
        loads(content)
    assert len(str(caught.value)) < 400


HUGE = {
    "memory at a large index": b"\x80\x02Nr\xff\xff\xff\x1f.",  # nine bytes
    "bytes": b"\x80\x03B\xff\xff\xff\xff.",
    "bytes, 8 of length": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "text, 8 of length": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b".",
    "a string": b"T\xff\xff\xff\x7f.",
    "an integer": b"\x8b\xff\xff\xff\x7f.",
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.",
}


@pytest.mark.parametrize("name", HUGE)
def test_what_a_number_announces_takes_no_memory(name):
    tracemalloc.start()
    try:
        loads(HUGE[name])
    except PickleError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def of_array(
    shape=b"K\x02\x85", dtype=b"cnumpy\ndtype\nU\x02u1\x85R", order=b"\x89", values=b"U\x02ab"
):
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + shape + dtype + order + values + b"tb."
    )


def test_arrays_are_looked_at():
    assert array(loads(of_array())).tolist() == [97, 98]
    large = b"\x8a\x08" + struct.pack("<q", 1 << 62)
    state = b"(K\x03U\x01|N%sNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    for content, message in {
        OBJECTS + b".": "type Record is no array",
        of_array(dtype=b"cnumpy\ndtype\nU\x02O8\x85R"): "not of plain numbers",
        of_array(dtype=b"cnumpy\ndtype\nU\x02V8\x85R"): "not of plain numbers",
        of_array(
            dtype=b"cnumpy\ndtype\nU\x02u1\x85R" + state % b"U\x01a\x85"
        ): "not of plain numbers",  # fields
        of_array(dtype=b"U\x02u1"): "has no type",
        of_array(dtype=b"cnumpy\ndtype\n)R"): "has no type",
        of_array(shape=b"K\x03\x85"): "more values than its shape, or less",
        of_array(shape=large + b"\x85"): "has no shape",
        of_array(shape=b"(" + 9 * b"K\x01" + b"t"): "has no shape",
        of_array(shape=b"J\xff\xff\xff\xff\x85"): "has no shape",
        of_array(shape=b"]"): "has no shape",
        of_array(order=b"U\x01C"): "in which order",
        of_array(values=b"]"): "not the bytes",
        of_array(
            values=b"c_codecs\nencode\nX\x02\x00\x00\x00abX\x05\x00\x00\x00rot13\x86R"
        ): "not the bytes",
        of_array()[:-3] + b"N" + of_array()[-3:]: "says too little, or too much",
    }.items():
        with pytest.raises(PickleError, match=message):
            array(loads(content))


def test_a_batch_nested_deeply_goes_away_quietly():
    found = loads(b"\x80\x02)" + b"\x85" * 300_000 + b".")
    assert type(found) is tuple
    del found
    chain = b"h\x00" * 100_000 + b")" + b"R\x85" * 100_000 + b"."
    assert type(loads(b"cnumpy\ndtype\nq\x000" + chain)) is tuple


def test_operations_and_bytes_are_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(pickles, "MOST_OPERATIONS", 1000)
    assert loads(b"]" * 999 + b".") == []
    with pytest.raises(PickleError, match="more than 1000 operations"):
        loads(b"]" * 1000 + b".")
    monkeypatch.setattr(pickles, "MOST_BYTES", 100)
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(b"x" * 100))
    with pytest.raises(PickleError, match="bytes, more than 100"):
        pickles.load(path)
    with pytest.raises(PickleError, match="not a file"):
        pickles.load(tmp_path)
    with pytest.raises(OSError):
        pickles.load(tmp_path / "none")
