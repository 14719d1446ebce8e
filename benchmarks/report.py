"""Turn the JSON of a run into tables and charts.

`python -m benchmarks.report RESULTS.json [--out DIR] [--readme README.md]`

It writes `report.md` and its charts into DIR, and between the two markers of a README the chart and the table
that belong there. Nothing is written without the line that says on what machine the figures were measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.charts import SPEED, Charts, Points
from benchmarks.results import (
    Measurement,
    Results,
    Spread,
    model_text,
    number_text,
    seconds_text,
    size_text,
)
from benchmarks.rounds import LIMIT

DEFAULT_FOLDER = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
_NOTHING = "Nothing of this was measured in this run."
_HEADLINE_PEERS = ("cryptography AES-CTR", "cryptography AES-GCM", "pyaegis AEGIS-128X4", "NumPy S[x ^ k]")


def write_report(results: Results, folder: Path) -> Path:
    """Write the report and its charts into a folder and give the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = "QUICK RUN, ITS FIGURES MEAN NOTHING; " if results.environment["quick"] else ""
    charts = Charts(folder, mark + environment.line(results.environment))
    parts = ["# Benchmarks", _opening(results)]
    parts += [f"## {title}\n\n{section(results, charts)}" for title, section in SECTIONS.items()]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def update_readme(results: Results, readme: Path, folder: Path) -> None:
    """Replace what stands between the markers of a README.

    Raises
    ------
    ValueError
        It has not exactly one pair of markers.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme}: accepted is a file with one {BEGIN} and one {END} behind it")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(
        f"{before}{BEGIN}\n{readme_block(results, readme, folder)}\n{END}{after}", encoding="utf-8"
    )


def readme_block(results: Results, readme: Path, folder: Path) -> str:
    """Give the chart and the table of a README."""
    chart = Path(os.path.relpath(folder / "throughput.svg", readme.resolve().parent)).as_posix()
    report = Path(os.path.relpath(folder / "report.md", readme.resolve().parent)).as_posix()
    return "\n\n".join(
        [
            _opening(results),
            f"![Speed of locking against model size, beside the limit and other packages]({chart})",
            _headline_table(results),
            _start_sentence(results),
            f"All tables and charts: [{report}]({report}).",
        ]
    )


# ------------------------------------------------------------------------------
# Pieces of Markdown


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table: the first column to the left, the others to the right."""
    lines = [" | ".join(titles), " | ".join([":--", *["--:"] * (len(titles) - 1)])]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {text} |" for text in lines)


def _image(name: str, chart: str) -> str:
    return f"![{name}]({chart})"


def _range(spread: Spread, text: Callable[[float], str] = number_text) -> str:
    return f"{text(spread.middle)} [{text(spread.low)} to {text(spread.high)}]"


def _speed_and_ratio(entry: Measurement) -> str:
    return f"{number_text(entry.speed.middle)} ({entry.ratio().middle:.2f})"


def _opening(results: Results) -> str:
    lines = [f"Measured on: {environment.line(results.environment)}."]
    if results.environment["quick"]:
        lines.append("**A quick run at tiny sizes, to see that everything works: its figures mean nothing.**")
    return "\n\n".join(lines)


def _matrix(results: Results, section: str, rows: str, **wanted: Any) -> str:
    """Give a table with a row for each value of a detail and a column for each model."""
    models = results.models(section)
    lines = []
    for value in results.distinct(section, rows):
        found = results.select(section, **{rows: value}, **wanted)
        lines.append(
            [str(value), *_cells(models, {entry["model"]: _speed_and_ratio(entry) for entry in found})]
        )
    limits = results.limits(section, **wanted)
    numbers = {model: number_text(spread.middle) for model, spread in limits.items()}
    lines.append(["*the limit*", *_cells(models, numbers)])
    return _table(["", *_titles(models)], lines)


def _cells(models: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """Give the cells of a row, with a dash for a model that is not known."""
    return [known.get(model, "–") for model in models]


def _titles(models: Mapping[str, int]) -> list[str]:
    return [model_text(model, nbytes) for model, nbytes in models.items()]


def _series(results: Results, section: str, detail: str) -> dict[str, Points]:
    return {
        str(value): results.speeds(section, **{detail: value}) for value in results.distinct(section, detail)
    }


# ------------------------------------------------------------------------------
# Sections


def _reading(_results: Results, _charts: Charts) -> str:
    return (
        "Speeds are in GB/s, 10^9 bytes of the model a second: the median of all rounds, and where there "
        "is room [lowest to highest]. In each round the limit and the work ran one after the other; the "
        "number in parentheses is the median of the rounds' ratios of speed, so 1.00 means as fast as this "
        "machine changes bytes in memory at all. The limit is an XOR with a constant, in place, by the "
        "widest vectors, on the same threads in the same pieces; for a buffer that is one piece, it is the "
        "bare kernel. Buffers start at a random multiple of 64 bytes in their page, a new one each round. "
        "Unless a line says otherwise: in place, counter schedule, 128-bit keys, S-Box of AES, all "
        "threads. A ratio above 1 is possible: work that writes elsewhere can go past the caches, and "
        "peers use their one thread without a pool."
    )


def _throughput(results: Results, charts: Charts) -> str:
    models = results.models("operations")
    if not models:
        return _NOTHING
    series: dict[str, Points] = {
        "lock": results.speeds("operations", operation="lock"),
        "unlock": results.speeds("operations", operation="unlock"),
        "lock_tensors": results.speeds("tensors", operation="lock_tensors, counter"),
        "memcpy by the same pool": results.speeds("peers", operation="memcpy by the same pool"),
    }
    series |= {name: results.speeds("peers", operation=name) for name in _HEADLINE_PEERS}
    chart = charts.against_models(
        "throughput",
        "Locking a model, against its size",
        models,
        series,
        results.limits("operations", operation="lock"),
    )
    return "\n\n".join([_image("Throughput against model size", chart), _headline_table(results)])


def _headline_table(results: Results) -> str:
    rows = []
    names = ("cryptography AES-CTR", "NumPy S[x ^ k]")
    for model, nbytes in results.models("operations").items():
        cells = [
            *results.select("operations", model=model, operation="lock"),
            *results.select("operations", model=model, operation="unlock"),
        ]
        tensors = results.select("tensors", model=model, operation="lock_tensors, counter")
        others = [results.select("peers", model=model, operation=name) for name in names]
        rows.append(
            [
                model,
                size_text(nbytes),
                number_text(cells[0].reference_speed().middle) if cells else "–",
                *(_speed_and_ratio(cell) for cell in cells),
                _speed_and_ratio(tensors[0]) if tensors else "–",
                *(_speed_and_ratio(other[0]) if other else "–" for other in others),
            ]
        )
    titles = ["model", "size", "limit, GB/s", "lock", "unlock", "lock_tensors", *names]
    return _table(titles, rows)


def _operations(results: Results, charts: Charts) -> str:
    models = results.models("operations")
    if not models:
        return _NOTHING
    chart = charts.against_models(
        "operations",
        "Every operation on one flat buffer",
        models,
        _series(results, "operations", "operation"),
        results.limits("operations", operation="lock"),
    )
    rows = []
    for operation in results.distinct("operations", "operation"):
        found = results.select("operations", operation=operation)
        copies = {
            entry["model"]: f"{entry.ratio('copy').middle:.2f}"
            for entry in found
            if "copy" in entry.references
        }
        if copies:
            rows.append([operation, *_cells(models, copies)])
    return "\n\n".join(
        [
            _image("Every operation against model size", chart),
            _matrix(results, "operations", "operation"),
            "What writes to other memory, as a ratio to a copy (memcpy) by the same pool in the same rounds:",
            _table(["", *_titles(models)], rows),
        ]
    )


def _tensors(results: Results, charts: Charts) -> str:
    models = results.models("tensors")
    if not models:
        return _NOTHING
    chart = charts.against_models(
        "tensors",
        "Tensors locked by name, each with its own key stream",
        models,
        _series(results, "tensors", "operation"),
        results.limits("tensors", operation="lock_tensors, counter"),
    )
    rows = []
    for entry in results.select("tensors", operation="lock_tensors, counter"):
        flat = results.select("operations", model=entry["model"], operation="lock")
        excess = (entry.time.middle - flat[0].time.middle) / entry["tensors"] if flat else None
        rows.append(
            [
                entry["model"],
                str(entry["tensors"]),
                seconds_text(entry.time.middle),
                seconds_text(flat[0].time.middle) if flat else "–",
                seconds_text(max(excess, 0.0)) if excess is not None else "–",
            ]
        )
    return "\n\n".join(
        [
            _image("Named tensors against model size", chart),
            _matrix(results, "tensors", "operation"),
            "What a name costs: `lock_tensors` beside `lock` of one buffer of the same size.",
            _table(["model", "tensors", "lock_tensors", "lock, flat", "difference for each tensor"], rows),
        ]
    )


def _peers(results: Results, charts: Charts) -> str:
    models = results.models("peers")
    if not models:
        return _NOTHING
    series: dict[str, Points] = {"deeplock_kernels lock": results.speeds("operations", operation="lock")}
    series |= _series(results, "peers", "operation")
    limits = results.limits("peers", operation="memcpy by the same pool")
    chart = charts.against_models("peers", "What users could call instead", models, series, limits)
    versions = results.environment["peers"]
    missing = [name for name, version in versions.items() if version is None]
    rows = []
    for name, does in results.peers.items():
        found = results.select("peers", operation=name)
        factors = {entry["model"]: f"{1 / entry.ratio('lock').middle:.1f}" for entry in found}
        rows.append([name, does, *_cells(models, factors)])
    parts = [
        _image("Peers against model size", chart),
        _matrix(results, "peers", "operation"),
        "How many times as fast `lock` is, from the same rounds. The peers use one thread, as they come; "
        "`lock` uses all. What makes a tag does more than `lock`, which notices no changes.",
        _table(["peer", "what it does", *_titles(models)], rows),
    ]
    if missing:
        parts.append(f"**Not installed, so not measured: {', '.join(missing)}.**")
    return "\n\n".join(parts)


def _tiers(results: Results, charts: Charts) -> str:
    models = results.models("tiers")
    if not models:
        return _NOTHING
    best = results.environment["tier"]
    chart = charts.against_models(
        "tiers",
        "Lock, by each tier of processor features",
        models,
        _series(results, "tiers", "tier"),
        results.limits("tiers", tier=best),
        "the limit: XOR in place, by the best tier",
    )
    without = [name for name, supported in results.environment["tiers"].items() if not supported]
    parts = [_image("Tiers against model size", chart), _matrix(results, "tiers", "tier")]
    if without:
        parts.append(f"This processor cannot run: {', '.join(without)}.")
    return "\n\n".join(parts)


def _boxes(results: Results, charts: Charts) -> str:
    found = results.select("boxes")
    if not found:
        return _NOTHING
    panels = []
    for where, label in (("cache", "GB/s, one thread, in cache"), ("memory", "GB/s, all threads, in memory")):
        groups: dict[str, dict[str, Spread]] = {}
        for entry in results.select("boxes", where=where):
            row = groups.setdefault(f"{entry['tier']}, {entry['form']}", {})
            row[entry["direction"]] = entry.speed
        panels.append((label, groups))
    chart = charts.bars("boxes", "Each form of an S-Box in each tier", panels)
    clock = results.environment["clock_mhz"]
    rows = [
        [
            f"{entry['tier']}, {entry['form']}",
            entry["box"],
            entry["direction"],
            f"{entry['where']}, {size_text(entry.nbytes)}",
            str(entry["threads"]),
            _range(entry.speed),
            f"{entry.ratio().middle:.2f}",
            _cycles(entry, clock),
        ]
        for entry in found
    ]
    titles = ["tier, form", "S-Box", "direction", "where", "threads", "GB/s", "of the limit", "cycles/byte"]
    return "\n\n".join(
        [
            "A tier applies an S-Box in the first of its forms that can express it. The box named here is "
            "the one that the kernel applies; when unlocking that is the inverse of the S-Box. Cycles are "
            "those of the clock that the system shows, for one thread; they are too few where the "
            "processor runs faster.",
            _image("Forms of S-Boxes", chart),
            _table(titles, rows),
        ]
    )


def _cycles(entry: Measurement, clock: float | None) -> str:
    if clock is None or entry["threads"] != 1:
        return "–"
    return f"{entry.time.middle * clock * 1e6 / entry.nbytes:.3f}"


def _key_lengths(results: Results, _charts: Charts) -> str:
    found = results.select("key lengths")
    if not found:
        return _NOTHING
    rows = [[entry["operation"], _range(entry.speed), _range(entry.ratio())] for entry in found]
    return f"A buffer of {size_text(found[0].nbytes)}.\n\n" + _table(
        ["operation", "GB/s", "of the limit"], rows
    )


def _threads(results: Results, charts: Charts) -> str:
    models = results.models("threads")
    if not models:
        return _NOTHING
    series = {model: results.speeds("threads", by="threads", model=model) for model in models}
    largest = list(models)[-1]
    chart = charts.against_threads(
        "threads",
        "Lock, by the number of threads",
        series,
        (f"the limit: XOR in place, {largest}", results.limits("threads", by="threads", model=largest)),
    )
    rows = [
        [
            entry["model"],
            str(entry["threads"]),
            _range(entry.speed),
            f"{entry.ratio().middle:.2f}",
            f"{entry.ratio('one thread').middle:.2f}",
        ]
        for entry in results.select("threads")
    ]
    titles = ["model", "threads", "GB/s", "of the limit on as many threads", "to one thread"]
    return f"{_image('Threads', chart)}\n\n{_table(titles, rows)}"


def _latency(results: Results, charts: Charts) -> str:
    names = results.distinct("latency", "operation")
    if not names:
        return _NOTHING
    series = {}
    for name in names:
        found = results.select("latency", operation=name)
        series[name] = {entry.nbytes: entry.time.scaled(1e6) for entry in found}
    locks = results.select("latency", operation="lock")
    limit = {entry.nbytes: entry.reference_time().scaled(1e6) for entry in locks}
    chart = charts.against_bytes(
        "latency",
        "One call, with the schedule at hand",
        series,
        ylabel="time of a call in µs, logarithmic",
        logarithmic=True,
        dashed=("the limit: a bare XOR kernel", limit),
    )
    rows = []
    for nbytes in sorted({entry.nbytes for entry in results.select("latency")}):
        times = {entry["operation"]: entry for entry in results.select("latency", nbytes=nbytes)}
        peer = next((entry for entry in times.values() if "lock" in entry.references), None)
        rows.append(
            [
                size_text(nbytes),
                *(_range(times[name].time, seconds_text) if name in times else "–" for name in names),
                f"{1 / peer.ratio('lock').middle:.2f}" if peer is not None else "–",
            ]
        )
    table = _table(["bytes", *names, "lock is how many times as fast as the peer"], rows)
    return "\n\n".join(
        [
            "`cryptography` makes its cipher and its encryptor in each call, since one encryptor is one "
            "key stream; a schedule of this package is made once and serves any range.",
            _image("Latency", chart),
            table,
        ]
    )


def _threshold(results: Results, charts: Charts) -> str:
    found = sorted(results.select("threshold"), key=lambda entry: entry.nbytes)
    if not found:
        return _NOTHING
    first = next((entry.nbytes for entry in found if entry["pieces"] > 1), None)
    series = {
        "as the package decides": {entry.nbytes: entry.speed for entry in found},
        "one thread": {entry.nbytes: entry.reference_speed("one thread") for entry in found},
        "split among all threads": {
            entry.nbytes: entry.reference_speed("split at any size") for entry in found
        },
    }
    chart = charts.against_bytes(
        "threshold",
        "From which size on several threads pay",
        series,
        ylabel=SPEED,
        logarithmic=False,
        mark=None if first is None else ("first size measured that the package splits", float(first)),
    )
    rows = [
        [
            size_text(entry.nbytes),
            str(entry["pieces"]),
            number_text(entry.speed.middle),
            number_text(entry.reference_speed("one thread").middle),
            number_text(entry.reference_speed("split at any size").middle),
            _range(entry.ratio("one thread")),
        ]
        for entry in found
    ]
    titles = [
        "bytes",
        "pieces",
        "GB/s, as it decides",
        "one thread",
        "split among all",
        "ratio to one thread",
    ]
    return f"{_image('The threshold of the pool', chart)}\n\n{_table(titles, rows)}"


def _start(results: Results, charts: Charts) -> str:
    found = results.select("start")
    if not found:
        return _NOTHING
    times = {entry["operation"]: {"time": entry.time} for entry in found}
    peaks = {entry["operation"]: {"memory": Spread.of(entry["peak_bytes"]).scaled(2**-20)} for entry in found}
    chart = charts.bars(
        "start",
        "A new process, to the end of its first call on 1 MiB",
        [("seconds from its start to its end", times), ("peak memory in MiB", peaks)],
    )
    rows = [
        [
            entry["operation"],
            _range(entry.time, seconds_text),
            _range(Spread.of(entry["call_seconds"]), seconds_text) if max(entry["call_seconds"]) else "–",
            _range(Spread.of(entry["peak_bytes"]), size_text),
        ]
        for entry in found
    ]
    titles = ["process", "from start to end", "the first call alone", "peak memory"]
    return "\n\n".join([_image("Start-up", chart), _table(titles, rows), _start_sentence(results)])


def _start_sentence(results: Results) -> str:
    sentences = []
    for name, text in (
        ("first lock, kernels in the cache", "with compiled kernels in the cache"),
        ("first lock, empty cache", "when its kernels have to be compiled first"),
    ):
        for entry in results.select("start", operation=name):
            peak = size_text(Spread.of(entry["peak_bytes"]).middle)
            sentences.append(f"{seconds_text(entry.time.middle)} and a peak of {peak} {text}")
    if not sentences:
        return "The start of a process was not measured in this run."
    return f"A new process, from its start to its end with one locked MiB: {'; '.join(sentences)}."


def _compilation(results: Results, _charts: Charts) -> str:
    found = results.select("compilation")
    if not found:
        return _NOTHING
    rows = []
    for tier in results.distinct("compilation", "tier"):
        for operation in results.distinct("compilation", "operation"):
            entries = results.select("compilation", tier=tier, operation=operation)
            if entries:
                seconds = Spread.of(entry.time.middle for entry in entries)
                peak = max(max(entry["peak_bytes"]) for entry in entries)
                rows.append(
                    [
                        f"{tier}, {operation}",
                        str(len(entries)),
                        _range(seconds, seconds_text),
                        size_text(peak),
                    ]
                )
    return (
        "Each kernel alone in a new process, without a cache: the time from asking for it to having it, "
        "compiled, linked and tested against the oracle, with Numba imported already. That is paid once a "
        "machine, for those kernels that are used.\n\n"
    ) + _table(["tier, operation", "kernels", "seconds to compile one", "peak memory"], rows)


def _not_measured(results: Results, _charts: Charts) -> str:
    reasons: dict[str, list[str]] = {}
    for left in results.not_measured:
        reasons.setdefault(left["reason"], []).append(left["name"])
    if not reasons:
        return "Everything was measured."
    return "\n".join(
        f"- {reason}: {', '.join(f'`{name}`' for name in names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for reason, names in reasons.items()
    )


def _environment(results: Results, _charts: Charts) -> str:
    facts = results.environment
    versions = {"Python": facts["python"], **facts["packages"], **facts["peers"]}
    rows = [
        ["processor", facts["processor"]],
        ["processors to use", str(facts["processors"])],
        ["caches", ", ".join(f"{name} {size}" for name, size in facts["caches"].items()) or "unknown"],
        ["features that tiers need", " ".join(facts["features"]) or "none"],
        ["features that it has not", " ".join(facts["missing_features"]) or "none"],
        ["memory", size_text(facts["memory_bytes"]) if facts["memory_bytes"] else "unknown"],
        ["system", facts["system"]],
        ["load when the run began", "unknown" if facts["load"] is None else f"{facts['load']:.2f}"],
        ["tier, threads", f"{facts['tier']}, {facts['threads']}"],
        ["deeplock_kernels", f"{facts['deeplock_kernels']}, revision {facts['revision'] or 'unknown'}"],
        ["versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())],
        ["date", facts["date"]],
    ]
    return _table(["", ""], rows)


def _everything(results: Results, _charts: Charts) -> str:
    names = ("operation", "model", "tier", "form", "box", "direction", "where")
    rows = []
    for entry in results.measurements:
        if not entry.nbytes:
            continue
        what = ", ".join(str(entry[name]) for name in names if entry.has(name))
        rows.append(
            [
                f"{entry.section}: {what}" if what else entry.section,
                size_text(entry.nbytes),
                str(entry["threads"]),
                str(len(entry.seconds)),
                seconds_text(entry.time.low),
                seconds_text(entry.time.middle),
                _range(entry.speed),
                _range(entry.ratio()) if LIMIT in entry.references else "–",
            ]
        )
    return _table(
        ["what", "bytes", "threads", "rounds", "least time", "median time", "GB/s", "of the limit"], rows
    )


SECTIONS: dict[str, Callable[[Results, Charts], str]] = {
    "How to read this": _reading,
    "Throughput": _throughput,
    "Operations": _operations,
    "Named tensors": _tensors,
    "Peers": _peers,
    "Tiers": _tiers,
    "S-Boxes": _boxes,
    "Key lengths": _key_lengths,
    "Threads": _threads,
    "Latency": _latency,
    "Threshold of the pool": _threshold,
    "Start-up": _start,
    "Compilation": _compilation,
    "Not measured": _not_measured,
    "Environment": _environment,
    "Every measurement": _everything,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("results", metavar="RESULTS.json", help="what --benchmark-json wrote")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=DEFAULT_FOLDER, help="default benchmarks/results"
    )
    parser.add_argument(
        "--readme", metavar="FILE", type=Path, help="a README whose benchmark block is replaced"
    )
    parsed = parser.parse_args(arguments)
    try:
        results = Results.load(parsed.results)
        path = write_report(results, parsed.out)
        if parsed.readme is not None:
            update_readme(results, parsed.readme, parsed.out)
    except (OSError, ValueError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: written, with its charts beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
