"""What the benchmarks are run over, how long, and the facts that go into the results beside the times."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest

from benchmarks import environment
from benchmarks.models import NETWORKS, ONE_TENSOR, Model, flat
from benchmarks.operations import KEY_LENGTHS, OPERATIONS
from benchmarks.peers import PEERS
from benchmarks.rounds import FULL, QUICK, Rounds, Settings
from benchmarks.workspace import Workspace, available_memory
from deeplock_kernels.kernels.signatures import KernelName, every_name
from deeplock_kernels.runtime.pool import get_num_threads
from deeplock_kernels.runtime.tiers import TIERS, Tier, active_tier, use_tier

_FACTS = pytest.StashKey[dict[str, Any]]()
_NOT_MEASURED = pytest.StashKey[list[dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deeplock", "benchmarks of deeplock_kernels")
    group.addoption(
        "--quick", action="store_true", help="run everything once at tiny sizes; the figures mean nothing"
    )
    group.addoption(
        "--largest-gib", type=int, default=0, metavar="N", help="add flat buffers of 1, 2, 4, ... up to N GiB"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FACTS] = environment.describe(quick=config.getoption("quick"))
    config.stash[_NOT_MEASURED] = []


# ------------------------------------------------------------------------------
# What to run over


def networks(config: pytest.Config) -> Sequence[Model]:
    """Real networks: the models whose tensors are locked by name."""
    return NETWORKS[:2] if config.getoption("quick") else NETWORKS


def sizes(config: pytest.Config) -> Sequence[Model]:
    """The models that are locked as one flat buffer."""
    powers = [1 << i for i in range(max(config.getoption("largest_gib"), 0).bit_length())]
    return (ONE_TENSOR, *networks(config), *(flat(f"{power} GiB", power << 30) for power in powers))


def long_sizes(config: pytest.Config) -> Sequence[Model]:
    """The models that are long enough for several threads."""
    return [model for model in sizes(config) if model is not ONE_TENSOR]


def thread_counts(config: pytest.Config) -> Sequence[int]:
    """Numbers of threads up to all: the powers of two, and all."""
    most = get_num_threads()
    if config.getoption("quick"):
        return sorted({1, most})
    return sorted({most, *(1 << i for i in range(most.bit_length()))})


def tier_forms(_config: pytest.Config) -> Sequence[tuple[Tier, str]]:
    """Every tier with every form in which it applies an S-Box."""
    return [(tier, form) for tier in TIERS for form in tier.forms]


def tier_kernels(config: pytest.Config) -> Sequence[tuple[Tier, KernelName]]:
    """All kernels of the tier in use, and one of each operation of the others."""
    chosen = []
    for tier in TIERS:
        names = every_name(tier.forms)
        if config.getoption("quick"):
            names = [name for name in names if name.operation == "xor"]
        elif tier is not active_tier():
            names = [
                name
                for name in names
                if name.bits in (0, 128) and name.form in ("", tier.forms[1]) and name.direction != "unlock"
            ]
        chosen += [(tier, name) for name in names]
    return chosen


def latency_sizes(config: pytest.Config) -> Sequence[int]:
    """Bytes of short calls."""
    return (64, 4096, 65536) if config.getoption("quick") else tuple(1 << i for i in range(6, 17))


def threshold_sizes(config: pytest.Config) -> Sequence[int]:
    """Bytes around the point from which the package uses several threads."""
    middle = 200 * active_tier().pace
    factors = (
        (0.5, 2) if config.getoption("quick") else (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 1.25, 2, 4, 8)
    )
    return [int(middle * factor) // 4096 * 4096 or 4096 for factor in factors]


_PARAMETERS: dict[str, tuple[Callable[[pytest.Config], Sequence[Any]], Callable[[Any], str]]] = {
    "network": (networks, lambda model: model.name),
    "model": (sizes, lambda model: model.name),
    "long_model": (long_sizes, lambda model: model.name),
    "operation": (lambda _: OPERATIONS, lambda operation: operation.name),
    "key_length": (lambda _: KEY_LENGTHS, lambda operation: operation.name),
    "peer": (lambda _: PEERS, lambda peer: peer.name),
    "tier": (lambda _: TIERS, lambda tier: tier.name),
    "tier_form": (tier_forms, lambda pair: f"{pair[0].name}-{pair[1]}"),
    "tier_kernel": (tier_kernels, lambda pair: f"{pair[0].name}-{pair[1]}"),
    "thread_count": (thread_counts, lambda count: f"threads-{count}"),
    "latency_size": (latency_sizes, str),
    "threshold_size": (threshold_sizes, str),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, (values, identify) in _PARAMETERS.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values(metafunc.config), ids=identify)


# ------------------------------------------------------------------------------
# Fixtures


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    """How long to measure."""
    return QUICK if request.config.getoption("quick") else FULL


@pytest.fixture(scope="session")
def memory() -> int:
    """Bytes that the run may use."""
    return int(0.9 * available_memory())


@pytest.fixture(scope="session")
def workspace(request: pytest.FixtureRequest, memory: int) -> Workspace:
    """Memory for the largest of all buffers that fits."""
    needed = [model.arena_bytes for model in sizes(request.config) if model.arena_bytes <= memory]
    return Workspace(max([1 << 26, *needed]))


@pytest.fixture
def rounds(benchmark: Any, workspace: Workspace, settings: Settings) -> Rounds:
    """Measure something and its references in turn."""
    return Rounds(benchmark, workspace, settings)


@pytest.fixture
def threads() -> int:
    """All threads that a call of the package uses here."""
    return get_num_threads()


@pytest.fixture
def need_memory(memory: int) -> Callable[[int], None]:
    """Skip what the machine has not the memory for."""

    def check(nbytes: int) -> None:
        if nbytes > memory:
            pytest.skip(f"it takes {nbytes / 2**30:.1f} GiB of memory, and {memory / 2**30:.1f} may be used")

    return check


@pytest.fixture
def forced_tier() -> Any:
    """Use a tier until the test ends, or skip it where the processor cannot run it."""
    yield (
        lambda tier: (
            use_tier(tier.name)
            if tier.supported
            else pytest.skip(f"this processor cannot run tier {tier.name}")
        )
    )
    use_tier(None)


# ------------------------------------------------------------------------------
# Results


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not report.passed:
        reason = "it failed"
        if report.skipped:
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = text.removeprefix("Skipped: ")
        item.config.stash[_NOT_MEASURED].append({"name": item.name, "reason": reason})
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Sequence[Any], output_json: dict[str, Any]
) -> None:
    output_json["machine_info"].pop("node", None)  # the machine's name is nobody's business
    for benchmark in output_json["benchmarks"]:
        benchmark["params"] = None  # whole models; their names are in `param`
    output_json["deeplock"] = {
        "environment": config.stash[_FACTS],
        "peers": {peer.name: peer.does for peer in PEERS},
        "not_measured": config.stash[_NOT_MEASURED],
    }


def pytest_report_header(config: pytest.Config) -> list[str]:
    facts = config.stash[_FACTS]
    missing = [peer.name for peer in PEERS if peer.version is None]
    lines = [f"measured on: {environment.line(facts)}"]
    if missing:
        lines.append(f"not installed, so not measured: {', '.join(missing)}")
    if (facts["load"] or 0) > 0.5 and not facts["quick"]:
        lines.append(f"warning: other work keeps this machine busy (load {facts['load']:.1f})")
    if os.environ.get("DEEPLOCK_CACHE") == "0":
        lines.append("note: DEEPLOCK_CACHE=0, so kernels are compiled in each process")
    return lines
