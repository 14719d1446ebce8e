"""Whoever requires constant time gets it, or an error before a byte changes."""

from __future__ import annotations

import numpy as np
import pytest
from processes import run
from support import make_schedule, painted

from deeplock_kernels.errors import ParameterError, UnsupportedTierError
from deeplock_kernels.locking import lock, substitute, unlock
from deeplock_kernels.runtime import tiers
from deeplock_kernels.runtime.tiers import TIERS, active_tier, use_tier
from deeplock_kernels.tensors import lock_tensors

CONSTANT_TIME = [tier.name for tier in TIERS if tier.supported and tier.constant_time]
HERE = ", ".join(CONSTANT_TIME) or "none"
REFUSED = rf"^{{}}: got 'portable', which is not constant-time, and that is required; constant-time here: {HERE}$"
needs_one = pytest.mark.skipif(not CONSTANT_TIME, reason="no tier of this machine is constant-time")


@pytest.fixture(autouse=True)
def nothing_stays_required():
    before = tiers._forced, tiers._required
    yield
    assert (tiers._forced, tiers._required) == before


@pytest.fixture
def portable_alone(monkeypatch):
    """Take away what every other tier needs."""
    tiers._default.cache_clear()
    monkeypatch.setattr(tiers, "host_features", frozenset)
    yield
    tiers._default.cache_clear()


def refuses(argument):
    return pytest.raises(UnsupportedTierError, match=REFUSED.format(argument))


@needs_one
def test_a_constant_time_tier_does_the_work_and_no_other():
    with use_tier(require_constant_time=True) as best:
        assert best.name == CONSTANT_TIME[0]
        for name in CONSTANT_TIME:
            with use_tier(name) as tier:
                assert tier is active_tier()
                assert tier.name == name
        with refuses("name"):
            use_tier("portable")
        with refuses("name"):
            use_tier("portable", require_constant_time=True)
        assert active_tier() is best


@needs_one
def test_the_requirement_outlives_other_calls_and_ends_with_its_block():
    with use_tier("portable"):
        with use_tier(None, require_constant_time=True):
            use_tier(None)
            use_tier(CONSTANT_TIME[-1])
            with refuses("name"):
                use_tier("portable")
            assert active_tier().name == CONSTANT_TIME[-1]
            with use_tier("portable", require_constant_time=False):
                assert active_tier().name == "portable"
                use_tier("portable")
            with refuses("name"):
                use_tier("portable")
        assert active_tier().name == "portable"
        use_tier("portable")


def test_a_tier_that_is_forced_stays_where_the_requirement_cannot_be_met():
    with use_tier("portable"):
        with refuses("name"):
            use_tier("portable", require_constant_time=True)
        assert active_tier().name == "portable"
        use_tier("portable")


def test_where_only_the_portable_tier_runs_the_requirement_is_refused_at_once(portable_alone):
    words = "^tier: got 'portable', which is not constant-time, and that is required; constant-time here: none$"
    for _ in range(2):
        with pytest.raises(UnsupportedTierError, match=words):
            use_tier(require_constant_time=True)
    assert active_tier().name == "portable"


@pytest.mark.parametrize("name", ["portable", None])
def test_nothing_is_changed_where_the_requirement_is_not_met(name, portable_alone, monkeypatch):
    monkeypatch.setattr(tiers, "_required", True)
    keys, data = make_schedule("counter", 128), painted(100)
    for use in (
        lambda: lock(data, keys, out=data),
        lambda: unlock(data, keys, out=data),
        lambda: lock(data, make_schedule("expansion", 128), out=data),
        lambda: substitute(data, "sm4", out=data),
        lambda: lock_tensors({"w": data}, bytes(16)),
        lambda: keys.keystream(10),
        lambda: use_tier(name),
        lambda: tiers.warmup(),
    ):
        with pytest.raises(UnsupportedTierError, match=r"^(tier|name): got 'portable', which is not"):
            use()
        assert np.array_equal(data, painted(100))


PROGRAM = """
import sys
from deeplock_kernels import CounterSchedule, DeepLockError, lock, use_tier
from deeplock_kernels.runtime.tiers import active_tier

data = bytearray(100)
for name in sys.argv[1:] or [""]:
    try:
        if name:
            use_tier(name, require_constant_time=False)
        lock(data, CounterSchedule(bytes(16), bytes(16)), out=data)
        print(active_tier().name)
    except DeepLockError as error:
        assert not any(data)
        print(type(error).__name__, error)
"""
NAMES = """
from deeplock_kernels import tiers
print(*[tier.name for tier in tiers() if tier.supported and tier.constant_time] or ["none"], sep=", ")
"""
REQUIRED = {"DEEPLOCK_REQUIRE_CONSTANT_TIME": "1"}


@needs_one
def test_the_variable_leaves_constant_time_tiers():
    assert run(PROGRAM, **REQUIRED) == f"{CONSTANT_TIME[0]}\n"
    assert run(PROGRAM, CONSTANT_TIME[-1], **REQUIRED) == f"{CONSTANT_TIME[-1]}\n"


@pytest.mark.parametrize(
    ("argument", "arguments", "environment"),
    [
        ("DEEPLOCK_TIER", [], {"DEEPLOCK_TIER": "portable"}),
        ("name", ["portable", "portable"], {}),
        ("tier", [], {"NUMBA_DISABLE_JIT": "1"}),
        ("name", ["portable"], {"NUMBA_DISABLE_JIT": "1"}),
    ],
    ids=["variable", "call", "no_compiler", "no_compiler_call"],
)
def test_the_variable_is_taken_back_by_nothing(argument, arguments, environment):
    names = run(NAMES, **environment).strip()
    assert names == "none" or "NUMBA_DISABLE_JIT" not in environment
    words = f"{argument}: got 'portable', which is not constant-time, and that is required; constant-time here: {names}"
    wanted = f"UnsupportedTierError {words}\n" * max(len(arguments), 1)
    assert run(PROGRAM, *arguments, **REQUIRED, **environment) == wanted


@pytest.mark.parametrize("value", ["", "0"])
def test_the_variable_switched_off(value):
    found = run(PROGRAM, "portable", DEEPLOCK_REQUIRE_CONSTANT_TIME=value)
    assert found == "portable\n"


def test_the_variable_with_another_value_is_an_error():
    words = "ParameterError DEEPLOCK_REQUIRE_CONSTANT_TIME: got 'yes', accepted are 0 and 1\n"
    assert run(PROGRAM, DEEPLOCK_REQUIRE_CONSTANT_TIME="yes", DEEPLOCK_TIER="portable") == words
    assert issubclass(ParameterError, ValueError)
