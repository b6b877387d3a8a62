"""Pickles of plain data, read without Python's unpickler: dictionaries, lists, numbers, text, and arrays of bytes.

A pickle is a program. Of its instructions these few are carried out here, on plain values: nothing is imported or
called, nothing but text is used twice, and so what comes out is no larger than the file.
"""

import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_INSTRUCTIONS = 10**6  # CIFAR-10's files have 40,000

DTYPE, ARRAY, ENCODE = "numpy dtype", "numpy ndarray", "_codecs encode"
RECONSTRUCT = "numpy.core.multiarray _reconstruct"
NAMES = {name: name for name in (DTYPE, ARRAY, ENCODE, RECONSTRUCT)}
NAMES["numpy._core.multiarray _reconstruct"] = RECONSTRUCT  # of later versions of numpy


class Name(str):
    """One of ``NAMES``, which a pickle refers to."""


class Dtype:
    """That of unsigned bytes."""


class Array:
    """An array of bytes, once its state is known."""

    def __init__(self) -> None:
        self.values: NDArray[np.uint8] = np.empty(0, np.uint8)


class _Mark:
    pass


Stack = list[Any]


def read_plain(data: bytes) -> Any:
    """What the pickle ``data`` holds, text as bytes and arrays as :class:`Array`.

    Raises:
        ValueError: it is no pickle, or one of anything else.
    """
    stack: Stack = []
    memo: dict[int, Any] = {}
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if count > MOST_INSTRUCTIONS:
            raise ValueError(f"more than {MOST_INSTRUCTIONS} instructions")
        name = opcode.name
        try:
            if name == "STOP":
                break
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                if not isinstance(memo[argument], (bytes, Dtype)) and not isinstance(memo[argument], Name):
                    raise ValueError(f"uses a {type(memo[argument]).__name__} twice")
                stack.append(memo[argument])
            elif name in PUSH:
                stack.append(PUSH[name](argument))
            elif name in CHANGE:
                CHANGE[name](stack)
            elif name not in IGNORED:
                raise ValueError(f"has the instruction {name}, which no image needs")
        except (IndexError, KeyError) as error:
            raise ValueError(f"the instruction {name} lacks what it works on") from error
    if len(stack) != 1 or isinstance(stack[0], _Mark):
        raise ValueError("does not end with one value")
    return stack[0]


def _name(argument: str) -> Name:
    if argument not in NAMES:
        raise ValueError(f"refers to {argument.replace(' ', '.')}, which no image needs")
    return Name(NAMES[argument])


def _since_mark(stack: Stack) -> list[Any]:
    """The values above the last mark, taken off the stack with it."""
    start = next((i for i in range(len(stack) - 1, -1, -1) if isinstance(stack[i], _Mark)), None)
    if start is None:
        raise IndexError
    values = stack[start + 1 :]
    del stack[start:]
    return values


def _tuple_of(count: int) -> Callable[[Stack], None]:
    def change(stack: Stack) -> None:
        if len(stack) < count or any(isinstance(value, _Mark) for value in stack[-count:]):
            raise IndexError
        values = tuple(stack[-count:])
        del stack[-count:]
        stack.append(values)

    return change


def _marked_tuple(stack: Stack) -> None:
    stack.append(tuple(_since_mark(stack)))


def _append(stack: Stack, values: list[Any]) -> None:
    if not isinstance(stack[-1], list):
        raise ValueError(f"appends to a {type(stack[-1]).__name__}")
    stack[-1].extend(values)


def _set_items(stack: Stack, values: list[Any]) -> None:
    keys = values[::2]
    if not isinstance(stack[-1], dict) or len(values) % 2 or not all(type(key) is bytes for key in keys):
        raise ValueError("sets items that are not of a dictionary with text as keys")
    stack[-1].update(zip(keys, values[1::2], strict=True))


def _reduce(stack: Stack) -> None:
    arguments, function = stack.pop(), stack.pop()
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise ValueError("calls what is no function")
    if function == DTYPE:
        if not arguments or arguments[0] != b"u1":
            raise ValueError(f"an array of type {_text(arguments[0] if arguments else None)}, expected bytes")
        stack.append(Dtype())
    elif function == RECONSTRUCT:
        stack.append(Array())
    elif function == ENCODE and len(arguments) == 2 and arguments[1] == b"latin1" and type(arguments[0]) is bytes:
        stack.append(arguments[0].decode("utf-8").encode("latin1"))  # how Python 3 writes bytes for Python 2
    else:
        raise ValueError(f"calls {function.replace(' ', '.')}, which no image needs")


def _build(stack: Stack) -> None:
    state, target = stack.pop(), stack[-1]
    if isinstance(target, Dtype):
        return  # byte order and the like, of no matter for bytes
    if not isinstance(target, Array) or not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("sets the state of what has none")
    _, shape, dtype, column_order, values = state
    if not isinstance(dtype, Dtype) or column_order or not isinstance(values, bytes):
        raise ValueError("an array of another kind than rows of bytes")
    if not isinstance(shape, tuple) or len(shape) > 4 or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("an array of a shape that is no tuple of up to four sizes")
    target.values = np.frombuffer(values, np.uint8).reshape(shape)


def _text(value: Any) -> str:
    """``value`` for a message; of nested values only their kind."""
    if isinstance(value, bytes):
        return repr(value[:100].decode("latin1"))
    return repr(value) if isinstance(value, int) else type(value).__name__


def _as_bytes(argument: Any) -> bytes:
    """Text of Python 2, which ``pickletools`` decodes as Latin-1, and bytes."""
    return argument if isinstance(argument, bytes) else argument.encode("latin1")


IGNORED = ("PROTO", "FRAME")
PUSH: dict[str, Callable[[Any], Any]] = {
    "MARK": lambda _: _Mark(), "NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False,
    "EMPTY_DICT": lambda _: {}, "EMPTY_LIST": lambda _: [], "EMPTY_TUPLE": lambda _: (),
    "BININT": int, "BININT1": int, "BININT2": int, "GLOBAL": _name,
    "BINSTRING": _as_bytes, "SHORT_BINSTRING": _as_bytes, "BINBYTES": _as_bytes, "SHORT_BINBYTES": _as_bytes,
    "BINUNICODE": lambda text: text.encode("utf-8"), "SHORT_BINUNICODE": lambda text: text.encode("utf-8"),
}  # fmt: skip
CHANGE: dict[str, Callable[[Stack], None]] = {
    "TUPLE": _marked_tuple, "TUPLE1": _tuple_of(1), "TUPLE2": _tuple_of(2), "TUPLE3": _tuple_of(3),
    "APPEND": lambda stack: _append(stack, [stack.pop()]), "APPENDS": lambda stack: _append(stack, _since_mark(stack)),
    "SETITEM": lambda stack: _set_items(stack, [stack.pop(), stack.pop()][::-1]),
    "SETITEMS": lambda stack: _set_items(stack, _since_mark(stack)), "REDUCE": _reduce, "BUILD": _build,
}  # fmt: skip
