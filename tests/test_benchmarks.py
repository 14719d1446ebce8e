"""The benchmarks: they run through with every peer, their report is complete, their models are the real ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deeplock_kernels import CounterSchedule, lock

ROOT = Path(__file__).resolve().parent.parent

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

from benchmarks import environment, files, operations, peers, rounds  # noqa: E402
from benchmarks.models import ALIGNMENT, NETWORKS, ONE_TENSOR, flat  # noqa: E402
from benchmarks.results import Results, Spread, seconds_text, size_text  # noqa: E402
from benchmarks.workspace import PAGE, Workspace  # noqa: E402

PUBLISHED = {  # parameters, entries of the state dictionary
    "LeNet-5": (61_706, 10),
    "MobileNetV2": (3_504_872, 314),
    "ResNet-18": (11_689_512, 122),
    "ResNet-50": (25_557_032, 320),
    "BERT-base": (109_482_240, 199),
    "GPT-2": (124_439_808, 149),
    "VGG-16": (138_357_544, 32),
}
KNOWN_TENSORS = {  # some of each, as the frameworks list them
    "LeNet-5": {"conv2.weight": (16, 6, 5, 5), "fc1.weight": (120, 400)},
    "MobileNetV2": {
        "features.1.conv.1.weight": (16, 32, 1, 1),
        "features.2.conv.1.0.weight": (96, 1, 3, 3),
        "features.17.conv.3.running_var": (320,),
        "features.18.1.num_batches_tracked": (),
        "classifier.1.weight": (1000, 1280),
    },
    "ResNet-18": {"layer2.0.downsample.0.weight": (128, 64, 1, 1), "layer4.1.bn2.bias": (512,)},
    "ResNet-50": {
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer3.5.conv2.weight": (256, 256, 3, 3),
        "fc.weight": (1000, 2048),
    },
    "BERT-base": {
        "embeddings.word_embeddings.weight": (30522, 768),
        "encoder.layer.11.intermediate.dense.weight": (3072, 768),
        "pooler.dense.bias": (768,),
    },
    "GPT-2": {
        "transformer.wpe.weight": (1024, 768),
        "transformer.h.11.attn.c_attn.weight": (768, 2304),
        "lm_head.weight": (50257, 768),
    },
    "VGG-16": {"features.28.weight": (512, 512, 3, 3), "classifier.0.weight": (4096, 25088)},
}


# Models


@pytest.mark.parametrize("model", NETWORKS, ids=lambda model: model.name)
def test_a_model_has_the_published_parameters_and_the_frameworks_tensors(model):
    parameters, entries = PUBLISHED[model.name]
    assert (model.parameters, model.published_parameters, len(model.tensors)) == (
        parameters,
        parameters,
        entries,
    )
    shapes = {spec.name: spec.shape for spec in model.tensors}
    assert len(shapes) == entries, "a name occurs twice"
    assert shapes.items() >= KNOWN_TENSORS[model.name].items()


def test_files_are_measured(tmp_path, capsys):
    """Every line of the report on files, of small ones; no process is started for peak memory."""
    made = files.make(tmp_path, 2, 1 << 16)
    with files.rows(made) as rows:
        checkpoint = files.make_checkpoint(tmp_path, files.SHARDS << 16)
        pairs = [*files.loads(made), *rows, *files.locks(made), *files.lock_checkpoints(checkpoint)]
        for pair in pairs:
            ours, theirs = files.measure(pair._replace(repeats=1), 1)
            assert len(ours) == len(theirs) == 1
    names = {(pair.name, pair.other) for pair in pairs}
    assert len(names) == len(pairs) == 7 + ("load_file, PyTorch" in dict(names))
    assert (tmp_path / "target").read_bytes() == made.plain.read_bytes()  # the last one was cp
    assert len([*checkpoint.glob("*.safetensors")]) == files.SHARDS
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in checkpoint.iterdir()}


def test_all_published_models_are_there_by_size():
    assert [model.name for model in NETWORKS] == list(PUBLISHED)
    sizes = [model.nbytes for model in (ONE_TENSOR, *NETWORKS)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1024


@pytest.mark.parametrize("model", NETWORKS[:2], ids=lambda model: model.name)
def test_tensors_lie_side_by_side_in_their_block(model):
    block = np.zeros(model.arena_bytes + ALIGNMENT, np.uint8)
    block = block[-block.ctypes.data % ALIGNMENT :]
    tensors = model.place(block)
    assert list(tensors) == [spec.name for spec in model.tensors]
    for spec, tensor in zip(model.tensors, tensors.values(), strict=True):
        assert (tensor.shape, tensor.dtype.name) == (spec.shape, spec.dtype)
        assert tensor.ctypes.data % ALIGNMENT == 0
        flat_bytes = tensor.reshape(-1).view(np.uint8)
        flat_bytes += 1
    assert set(block) == {0, 1}, "tensors overlap"
    assert int(block.sum()) == model.nbytes


def test_tied_tensors_are_one_memory():
    gpt2 = next(model for model in NETWORKS if model.name == "GPT-2")
    tied = [spec for spec in gpt2.tensors if spec.same_as]
    assert [(spec.name, spec.same_as) for spec in tied] == [("lm_head.weight", "transformer.wte.weight")]
    block = np.empty(gpt2.arena_bytes, np.uint8)  # never written, so it takes no memory
    tensors = gpt2.place(block)
    assert tensors["lm_head.weight"] is tensors["transformer.wte.weight"]
    assert gpt2.nbytes == 4 * gpt2.parameters


def test_a_flat_model_is_one_tensor_of_bytes():
    model = flat("2 GiB", 2 << 30)
    assert (model.nbytes, model.arena_bytes, len(model.tensors)) == (2 << 30, 2 << 30, 1)


# Measuring


def test_a_workspace_gives_random_places_that_do_not_overlap():
    workspace = Workspace(10_000)
    spots = [workspace.spot(10_000) for _ in range(50)]
    for spot in spots:
        assert (len(spot.data), len(spot.out)) == (10_000, 10_000)
        assert spot.data.ctypes.data % 64 == spot.out.ctypes.data % 64 == 0
        assert spot.room.ctypes.data == spot.data.ctypes.data
        assert len(spot.room) > len(spot.data)
        assert not np.shares_memory(spot.room, spot.out)
    assert len({spot.data.ctypes.data % PAGE for spot in spots}) > 10
    assert len(np.unique(spots[0].data)) > 200, "the data is not random"
    with pytest.raises(ValueError, match="nbytes"):
        workspace.spot(10_001)


class FakeBenchmark:
    """Runs rounds as pytest-benchmark does, and says that each took a second."""

    disabled = False

    def __init__(self):
        self.extra_info, self.stats, self.group = {}, self, None
        self.data = []

    def pedantic(self, target, setup, rounds):
        self.stats.stats = self
        for _ in range(rounds):
            arguments, keywords = setup()
            target(*arguments, **keywords)
            self.data.append(1.0)


def test_work_and_reference_take_turns_each_round_in_a_new_place():
    log = []

    def recorder(name):
        return lambda spot: lambda: log.append((name, spot.data.ctypes.data))

    benchmark = FakeBenchmark()
    measured = rounds.Rounds(benchmark, Workspace(PAGE), rounds.QUICK._replace(fewest=20, most=20))
    measured.measure("section", recorder("work"), {"limit": recorder("limit")}, 100, model="m")
    log = log[-40:]  # before those, everything ran to get warm
    assert [name for name, _ in log] == ["limit", "work"] * 20
    places = [place for _, place in log]
    assert places[::2] == places[1::2], "work and reference are in different places"
    assert len(set(places)) > 5
    info = benchmark.extra_info
    assert info["seconds"] == [1.0] * 20
    assert info["ratios"]["limit"] == info["references"]["limit"]
    assert (info["section"], info["nbytes"], info["model"]) == ("section", 100, "m")


@pytest.mark.parametrize(
    ("seconds", "repeats", "count"), [(2**-20, 1024, 5), (2**-10, 1, 5), (0.25, 1, 4), (0.5, 1, 3)]
)
def test_short_work_is_repeated_and_long_work_gets_fewer_rounds(monkeypatch, seconds, repeats, count):
    monkeypatch.setattr(rounds, "seconds_of", lambda work, repeats=1: seconds)
    settings = rounds.Settings(quick=False, budget=1.0, fewest=3, most=5, round_seconds=2**-10)
    benchmark, runs = FakeBenchmark(), []
    measured = rounds.Rounds(benchmark, Workspace(PAGE), settings)
    measured.measure("section", lambda spot: lambda: runs.append(1), {}, 1)
    assert benchmark.extra_info["repeats"] == repeats
    assert benchmark.extra_info["seconds"] == [1.0 / repeats] * count
    assert len(runs) == 1 + count * repeats  # once to get warm


def peer(name):
    found = next(peer for peer in peers.PEERS if peer.name == name)
    if found.version is None:
        pytest.skip(f"{found.distribution} is not installed")
    return found


@pytest.fixture
def spot():
    found = Workspace(5000).spot(5000)
    found.data[:] = np.arange(5000) % 251
    return found


@pytest.mark.parametrize("name", ["cryptography AES-CTR", "PyCryptodome AES-CTR"])
def test_a_counter_mode_peer_encrypts_in_place(spot, name):
    expected = spot.data ^ CounterSchedule(bytes(range(16)), bytes(16)).keystream(5000)
    peer(name).prepare(spot)()
    assert (spot.data == expected).all()


def test_long_data_is_chunked_by_those_who_take_only_so_much(spot, monkeypatch):
    monkeypatch.setattr(peers, "_CHUNK", 1600)
    expected = spot.data ^ CounterSchedule(bytes(range(16)), bytes(16)).keystream(5000)
    plain = spot.data.copy()
    peer("cryptography AES-CTR").prepare(spot)()
    assert (spot.data == expected).all()

    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    places = [(0, 1600), (1616, 1600), (3232, 1600), (4848, 200)]
    room = spot.room
    room[:5064] = np.resize(plain, 5064)
    taken = [room[start : start + length].tobytes() for start, length in places]
    peer("cryptography AES-GCM").prepare(spot)()
    for number, (start, length) in enumerate(places):
        sealed = room[start : start + length + 16].tobytes()
        assert AESGCM(bytes(range(16))).decrypt(number.to_bytes(12, "big"), sealed, None) == taken[number]


def test_galois_counter_mode_encrypts_in_place_and_puts_its_tag_behind(spot):
    plain, chosen = spot.data.tobytes(), peer("cryptography AES-GCM")
    chosen.prepare(spot)()
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    sealed = spot.room[: 5000 + 16].tobytes()
    assert AESGCM(bytes(range(16))).decrypt(bytes(12), sealed, None) == plain


def test_aegis_encrypts_in_place(spot):
    plain, chosen = spot.data.tobytes(), peer("pyaegis AEGIS-128X4")
    tag = chosen.prepare(spot)()
    from pyaegis import Aegis128X4

    Aegis128X4().decrypt_inplace(bytes(range(16)), bytes(16), memoryview(spot.data), tag)
    assert spot.data.tobytes() == plain


def test_secret_box_encrypts_into_new_bytes(spot):
    chosen = peer("PyNaCl SecretBox")
    sealed = chosen.prepare(spot)()
    from nacl.secret import SecretBox

    assert SecretBox(bytes(range(32))).decrypt(sealed) == spot.data.tobytes()


def test_numpy_locks_as_the_package_does(spot):
    keys = CounterSchedule(bytes(range(16)), bytes(16))
    spot.out[:] = keys.keystream(5000)
    assert (peer("NumPy S[x ^ k]").prepare(spot)() == lock(spot.data, keys)).all()


@pytest.mark.parametrize("nbytes", [8192, 1 << 23])
def test_limit_and_copy_go_over_all_of_the_data(nbytes):
    spot = Workspace(nbytes).spot(nbytes)
    before = spot.data.copy()
    operations.limit(2)(spot)()
    assert (spot.data == before ^ 0x5A).all()
    operations.copy(2)(spot)()
    assert (spot.out == spot.data).all()
    spot.out[:] = 0
    operations.best_copy(2)(spot)()  # in each piece it starts where the target is aligned and stops 64 bytes early
    assert (spot.out == 0).sum() < 0.02 * nbytes
    aligned = -spot.out.ctypes.data % 64
    assert (spot.out[aligned : aligned + 4000] == spot.data[:4000]).all()


def test_pieces_for_each_thread_lock_the_same(spot):
    expected = lock(spot.data, operations.schedule("counter"))
    operations.locking_in_pieces(2)(spot)()
    assert (spot.data == expected).all()


# The whole suite, and its report


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "results.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "-q", f"--benchmark-json={path}"]
    ended = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--benchmark-columns=median"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
    return json.loads(path.read_text())


def test_the_quick_suite_measures_everything_with_every_installed_peer(document):
    results = Results(document)
    assert results.environment["quick"] is True
    models = set(results.models("operations"))
    assert models == {"1 KiB tensor", "LeNet-5", "MobileNetV2"}
    for section, detail, expected in (
        ("operations", "operation", {operation.name for operation in operations.OPERATIONS}),
        ("key lengths", "operation", {operation.name for operation in operations.KEY_LENGTHS}),
        ("tiers", "tier", {name for name, supported in results.environment["tiers"].items() if supported}),
        ("latency", "operation", {"lock", "unlock", "cryptography AES-CTR"}),
        ("boxes", "direction", {"lock", "unlock"}),
        ("threads", "threads", {1, results.environment["threads"]}),
    ):
        assert set(results.distinct(section, detail)) == expected, section
    installed = {found.name for found in peers.PEERS if found.version is not None}
    assert set(results.distinct("peers", "operation")) == installed | {
        "memcpy by the same pool",
        "copy past the caches by the same pool",
    }
    for entry in (*results.select("operations"), *results.select("peers")):
        assert "limit" in entry.references
    assert {entry["model"] for entry in results.select("peers", operation="NumPy S[x ^ k]")} == models


def test_what_was_not_measured_is_in_the_results_with_its_reason(document):
    left = document["deeplock"]["not_measured"]
    assert all(entry["reason"] != "it failed" for entry in left)
    for found in peers.PEERS:
        reasons = [entry["reason"] for entry in left if f"-{found.name}]" in entry["name"]]
        assert bool(reasons) == (found.version is None), found.name


def test_results_name_neither_the_machine_nor_whole_models(document):
    assert "node" not in document["machine_info"]
    assert all(benchmark["params"] is None for benchmark in document["benchmarks"])


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks import report

    return report


@pytest.fixture(scope="module")
def written(document, report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "results.json").write_text(json.dumps(document))
    (folder / "README.md").write_text(
        "before\n<!-- benchmark:begin -->\nold\n<!-- benchmark:end -->\nafter\n"
    )
    arguments = [folder / "results.json", "--out", folder / "out", "--readme", folder / "README.md"]
    assert report.main([str(argument) for argument in arguments]) == 0
    return folder


def test_the_report_has_its_environment_every_section_and_every_chart(document, report, written):
    text = (written / "out" / "report.md").read_text()
    line = environment.line(document["deeplock"]["environment"])
    assert text.startswith(f"# Benchmarks\n\nMeasured on: {line}.\n")
    assert re.findall("^## (.*)$", text, re.M) == list(report.SECTIONS)
    assert "Nothing of this was measured" not in text
    assert "its figures mean nothing" in text
    charts = set(re.findall(r"!\[.*\]\((.*)\.svg\)", text))
    assert {
        "throughput",
        "operations",
        "peers",
        "tiers",
        "threads",
        "latency",
        "threshold",
        "start",
    } <= charts
    for chart in charts:
        assert (written / "out" / f"{chart}.svg").read_text().lstrip().startswith("<?xml")
        assert (written / "out" / f"{chart}.png").read_bytes().startswith(b"\x89PNG")
    assert str(ROOT) not in text
    assert str(written) not in text


def test_every_row_of_a_table_has_as_many_cells_as_its_titles(written):
    tables = re.findall(r"(?:^\|.*\|\n)+", (written / "out" / "report.md").read_text(), re.M)
    assert len(tables) > 10
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_only_what_stands_between_its_markers_in_the_readme_is_replaced(document, report, written):
    text = (written / "README.md").read_text()
    assert text.startswith("before\n<!-- benchmark:begin -->\n")
    assert text.endswith("\n<!-- benchmark:end -->\nafter\n")
    assert "old" not in text
    assert environment.line(document["deeplock"]["environment"]) in text
    assert "](out/throughput.svg)" in text
    assert "| MobileNetV2 |" in text
    report.update_readme(Results(document), written / "README.md", written / "out")
    assert (written / "README.md").read_text() == text


@pytest.mark.parametrize("text", ["no markers", "<!-- benchmark:end --> <!-- benchmark:begin -->"])
def test_a_readme_without_its_markers_is_left_alone(document, report, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="benchmark:begin"):
        report.update_readme(Results(document), readme, tmp_path)
    assert readme.read_text() == text


@pytest.mark.parametrize("ours", [None, {}, {"peers": {}, "not_measured": []}])
def test_nothing_is_reported_without_the_environment(document, report, tmp_path, capsys, ours):
    (tmp_path / "bare.json").write_text(json.dumps(document | {"deeplock": ours}))
    assert report.main([str(tmp_path / "bare.json"), "--out", str(tmp_path / "out")]) == 1
    assert "without the environment" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_peer_that_is_not_installed_is_reported_as_missing(document, report, tmp_path):
    ours = document["deeplock"]
    lacking = {
        "benchmarks": [
            benchmark
            for benchmark in document["benchmarks"]
            if benchmark["extra_info"]["section"] == "peers"
            and "pyaegis" not in benchmark["extra_info"]["operation"]
        ],
        "deeplock": {
            "environment": ours["environment"] | {"peers": ours["environment"]["peers"] | {"pyaegis": None}},
            "peers": ours["peers"],
            "not_measured": [{"name": "test_peer[m-pyaegis]", "reason": "pyaegis is not installed"}],
        },
    }
    text = report.write_report(Results(lacking), tmp_path).read_text()
    assert re.search(r"\*\*Not installed, so not measured: .*\bpyaegis\b", text)
    assert "- pyaegis is not installed: `test_peer[m-pyaegis]`" in text
    assert re.search(r"^\| pyaegis AEGIS-128X4 \| .* \| – \| – \| – \|$", text, re.M)
    assert text.count("Nothing of this was measured in this run.") >= 8


def test_spreads_and_units():
    assert Spread.of([3.0, 1.0, 2.0]) == (1.0, 2.0, 3.0)
    assert [size_text(n) for n in (1, 1024, 100 << 20, 5 << 29)] == ["1 B", "1 KiB", "100 MiB", "2.5 GiB"]
    texts = [seconds_text(s) for s in (1.5, 0.0123, 4.56e-6, 9.99e-8)]
    assert texts == ["1.50 s", "12.3 ms", "4.56 µs", "99.9 ns"]


# Two revisions


@pytest.fixture(scope="module")
def repository():
    found = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=ROOT, capture_output=True)
    if found.returncode != 0 or not (ROOT / ".git").exists():
        pytest.skip("this is no git repository, or there is no git")


def compare(*arguments):
    command = [sys.executable, "-m", "benchmarks.compare", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_revision_is_compared_with_itself(repository):
    tiny = ["--mib", "1", "--rounds", "1", "--processes", "2"]
    ended = compare("HEAD", "HEAD", *tiny, "--only", "lock", "--only", "first lock of a process")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("measured on: ")
    commits = [re.fullmatch(r"[AB]: HEAD \(([0-9a-f]{10,})\)", line)[1] for line in lines[1:3]]
    assert commits[0] == commits[1]
    row = r"  {} +A +[0-9.]+ \S+  B +[0-9.]+ \S+ +([0-9.]+) \[[0-9.]+ to [0-9.]+\]  {} rounds"
    assert re.fullmatch(row.format("lock", 2), lines[4])
    assert re.fullmatch(row.format("first lock of a process", 1), lines[5])


def test_what_is_no_revision_is_an_error(repository):
    ended = compare("HEAD", "no-such-revision")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"compare: error: no-such-revision: it is no revision of .*\n", ended.stderr)
