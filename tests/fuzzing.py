"""How the fuzz tests damage files, and what they hold against a loader.

The cases follow from each test's code, so that every run sees the same ones. DRIFT_FUZZ_CASES says how many; what
once failed stands as an ``@example`` or a test of its own beside them.
"""

import copy
import faulthandler
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("DRIFT_FUZZ_CASES", "60"))
SECONDS = 10.0  # that one case may take; the slowest that is known takes a few tenths
MEGABYTES = 400  # that all cases of a test may add to the peak of memory

fuzzed = settings(
    max_examples=CASES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)

# What Python reports to audit hooks when code is about to reach beyond the file that is read.
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "pickle.find_class",
    "socket.",
    "ctypes.",
)


class Watch:
    """Counts what became of a test's cases, and fails one that hangs, executes something or raises the wrong error.

    Whether a refusal or an acceptance was due is for the test to say.
    """

    _active: "Watch | None" = None
    _hooked = False

    def __init__(self, name: str, *refusals: type[Exception]) -> None:
        self.name, self.refusals = name, refusals
        self.accepted = self.refused = 0
        self.slowest = 0.0
        self.executed: list[str] = []

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> tuple[Any, Exception | None]:
        """What the function returns, or None and the refusal that it raises; any other error fails the test."""
        started = time.perf_counter()
        try:
            with self._guarded():
                result = function(*arguments, **keywords)
        except self.refusals as refusal:
            assert str(refusal).strip(), f"a {type(refusal).__name__} that says nothing"
            self.refused += 1
            return None, refusal
        finally:
            self.slowest = max(self.slowest, time.perf_counter() - started)
            assert not self.executed, f"{self.name} executes {self.executed}"
        self.accepted += 1
        return result, None

    @contextmanager
    def _guarded(self):
        if not Watch._hooked:
            sys.addaudithook(_report)
            Watch._hooked = True
        before = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        faulthandler.dump_traceback_later(10 * SECONDS, exit=True)  # of code that no signal handler interrupts
        Watch._active = self
        try:
            yield
        finally:
            Watch._active = None
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@contextmanager
def watching(name: str, *refusals: type[Exception]):
    """A :class:`Watch`; afterwards, that memory was bounded, and that there were good cases and bad ones."""
    watch = Watch(name, *refusals)
    before = _peak_megabytes()
    yield watch
    growth = _peak_megabytes() - before
    print(
        f"{name}: {watch.accepted + watch.refused} cases, {watch.accepted} accepted, {watch.refused} refused, "
        f"slowest {watch.slowest:.2f} s, peak of memory +{growth:.0f} MB"
    )
    assert growth < MEGABYTES
    assert watch.accepted and watch.refused, "cases of one kind only: they show nothing"


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _report(event: str, arguments: tuple[Any, ...]) -> None:
    if Watch._active is not None and event.startswith(FORBIDDEN):
        Watch._active.executed.append(f"{event} {arguments!r}"[:200])


class TookTooLong(BaseException):
    """Not an Exception, of which a loader might make a refusal."""


def _too_long(*_: Any) -> None:
    raise TookTooLong(f"more than {SECONDS} s")


# ------------------------------------------------------------------------------------------------------- bytes

INTERESTING = [
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b"\xff" * 8,
    b"\x00" * 8,
    b"[" * 3000,
    b"0" * 300,
]

Change = tuple[str, int, int, bytes]
changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "delete", "insert", "repeat", "move"]),
        st.integers(0, 2**16),
        st.integers(0, 2**10),
        st.sampled_from(INTERESTING) | st.binary(min_size=1, max_size=12),
    ),
    max_size=5,
)


def damaged(content: bytes, edits: list[Change]) -> bytes:
    """``content`` after the ``edits``; positions are taken modulo its length, half of them near its beginning."""
    for kind, place, count, new in edits:
        if not content:
            return new
        at = (place % 2**8 if place % 2 else place) % len(content)
        if kind == "flip":
            content = content[:at] + bytes([content[at] ^ (1 << count % 8)]) + content[at + 1 :]
        elif kind == "set":
            content = content[:at] + new + content[at + len(new) :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "delete":
            content = content[:at] + content[at + 1 + count % 16 :]
        elif kind == "insert":
            content = content[:at] + new + content[at:]
        elif kind == "repeat":
            content = content[:at] + content[at : at + 1 + count % 64] * 2 + content[at + 1 + count % 64 :]
        else:
            end = at + 1 + count % 64
            content = content[:at] + content[end:] + content[at:end]
    return content


# -------------------------------------------------------------------------------------------------------- JSON

scalars = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        4,
        7,
        8,
        64,
        -1,
        1000,
        10**9,
        2**31,
        2**40,
        2**63,
        10**30,
        10**400,
        0.0,
        0.5,
        1.0,
        -2.5,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "1",
        "gen",
        "mae",
        "classifier",
        "../x",
        "/dev/zero",
        "\x00",
        "é\ud800",
    ]
)
json_values = scalars | st.recursive(
    scalars, lambda of: st.lists(of, max_size=4) | st.dictionaries(st.text(max_size=4), of, max_size=3), max_leaves=6
)
json_edits = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["set", "delete", "add"]), json_values), max_size=3
)


def edited(tree: Any, edits: list[tuple[int, str, Any]]) -> Any:
    """``tree`` of dictionaries and lists after the ``edits``, each at one of its places."""
    tree = copy.deepcopy(tree)
    for number, kind, value in edits:
        places = list(_places(tree))
        if not places:
            break
        parent, key = places[number % len(places)]
        if kind == "set":
            parent[key] = copy.deepcopy(value)
        elif kind == "delete":
            del parent[key]
        elif isinstance(parent, dict):
            parent[f"{key}x"] = copy.deepcopy(value)
        else:
            parent.append(copy.deepcopy(value))
    return tree


def _places(tree: Any):
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
