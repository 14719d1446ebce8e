"""The studies of the paper's claims: data, accuracies, intervals, what counts as a broken claim, and the report."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import secrets

import numpy as np
import pytest
import support

torch = support.framework("torch")
support.framework("sklearn")

from torch import nn  # noqa: E402

from benchmarks.paper import __main__ as command  # noqa: E402
from benchmarks.paper import (  # noqa: E402
    approximation,
    attacker,
    authorization,
    chance,
    charts,
    cost,
    data,
    fine_tuning,
    key_from_floats,
    key_recovery,
    known_plaintext,
    locked_bytes,
    locked_network,
    networks,
    partial,
    report,
    seeding,
    training,
)
from deeplock_kernels import lock_tensors, named_lock, reference  # noqa: E402

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
WINE = networks.ARCHITECTURES["MLP, wine"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(*tensors):
    return sorted(row.numpy().tobytes() for tensor in tensors for row in tensor)


# Data


@pytest.mark.parametrize(
    ("make", "samples", "tested"), [(data.digits, 1797, 360), (data.breast_cancer, 569, 120), (data.wine, 178, 60)]
)
def test_every_sample_is_either_learnt_or_judged_by_and_test_sets_are_balanced(make, samples, tested):
    found = make()
    assert len(found.train_x) == len(found.train_y) == samples - tested
    assert torch.bincount(found.test_y).tolist() == [tested // found.classes] * found.classes
    assert set(found.train_y.tolist()) == set(range(found.classes))
    assert not set(rows(found.train_x)) & set(rows(found.test_x))
    assert found.chance == 1 / found.classes


@pytest.mark.parametrize("make", [data.digits, data.breast_cancer, lambda: data.scenes(20, 20)])
def test_data_are_the_same_whatever_was_drawn_before(make):
    first = make()
    for cached in (data.digits, data.breast_cancer, data.scenes):
        cached.cache_clear()
    np.random.seed(3)
    torch.manual_seed(3)
    again = make()
    assert again is not first
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_features_are_scaled_by_what_is_learnt_from_alone():
    found = data.wine()
    torch.testing.assert_close(found.train_x.mean(0), torch.zeros(13), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.train_x.std(0, correction=0), torch.ones(13), atol=1e-5, rtol=0)
    assert found.test_x.mean(0).abs().max() > 0.01


def test_scenes_are_balanced_and_colour_or_brightness_tells_no_class():
    found = data.scenes(400, 100)
    assert found.train_x.shape == (400, 3, 32, 32)
    assert torch.bincount(found.train_y).tolist() == [40] * 10
    assert torch.bincount(found.test_y).tolist() == [10] * 10
    means = found.train_x.mean((2, 3))
    spread = torch.stack([means[found.train_y == label].mean(0) for label in range(10)]).std(0)
    assert (spread < 3 * means.std(0) / math.sqrt(40)).all()


def test_judges_are_as_many_of_each_class():
    x, y = data.digits().judges(55)
    assert torch.bincount(y).tolist() == [5] * 10
    assert set(rows(x)) <= set(rows(data.digits().test_x))


# Accuracy and training


class Constant(nn.Module):
    """Gives the same outputs whatever it is asked."""

    def __init__(self, outputs):
        super().__init__()
        self.given = nn.Parameter(torch.tensor(outputs))

    def forward(self, x):
        return self.given[: len(x)]


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("outputs", "answer"),
    [
        ([0.0, 1.0, 0.5], 1),
        ([0.0, NAN, INF], 1),
        ([NAN, NAN, NAN], 0),
        ([0.0, 9.0, INF], 2),
        ([-INF, -INF, -INF], 0),
        ([INF, 1.0, INF], 0),
    ],
)
def test_an_answer_is_the_first_nan_or_the_first_of_the_greatest(outputs, answer):
    module = Constant([outputs])
    for label in range(3):
        assert training.accuracy(module, torch.zeros(1, 1), torch.tensor([label])) == (label == answer)


def test_answers_tell_nan_infinity_and_what_is_always_the_same():
    y = torch.tensor([1, 1, 0, 1])
    module = Constant([[NAN, 2.0], [INF, 1.0], [3.0, 1.0], [-INF, NAN]])
    found = locked_network.answers(module, torch.zeros(4, 1), y)
    assert found == {"accuracy": 0.5, "constant": False, "nan": 0.5, "infinite": 0.5, "weights": 0.5}
    module = Constant([[0.0, 1.0]] * 4)
    found = locked_network.answers(module, torch.zeros(4, 1), y)
    assert found == {"accuracy": 0.75, "constant": True, "nan": 0.0, "infinite": 0.0, "weights": 0.0}


def test_accuracy_is_that_of_all_samples_also_beyond_one_batch():
    x = torch.arange(450.0)[:, None] - 300
    module = nn.Linear(1, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        module.bias.zero_()
    assert training.accuracy(module, x, (x[:, 0] > -100).long()) == pytest.approx(350 / 450)


def test_training_is_the_same_again_and_gives_a_copy(monkeypatch):
    first = training.trained(WINE, True)
    with torch.no_grad():
        first[1].weight.zero_()
    again = training.trained(WINE, True)
    monkeypatch.setattr(training, "_trained", {})
    torch.manual_seed(99)
    anew = training.trained(WINE, True)
    assert not anew.training
    for name, tensor in anew.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    found = data.wine()
    assert training.accuracy(anew, found.test_x, found.test_y) > 0.8


def test_training_changes_the_chosen_parameters_alone():
    module, found = WINE.untrained(0), data.wine()
    before = locked_network.copies(module)
    training.train(
        module, found.train_x, found.train_y, epochs=1, learning_rate=0.01, seed=0, parameters=module[5].parameters()
    )
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"5.weight", "5.bias"}


@pytest.mark.parametrize("name", networks.ARCHITECTURES)
def test_every_network_computes_in_the_dtype_that_it_says(name):
    architecture = networks.ARCHITECTURES[name]
    module = architecture.converted(architecture.untrained(0))
    x, _ = architecture.judges()
    found = training.outputs(module, x[:4])
    assert found.shape == (4, architecture.dataset().classes)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in module.state_dict().values()}
    assert architecture.dtype in dtypes
    assert dtypes <= {architecture.dtype, "int64"} | ({"float32"} if architecture.dtype == "int8" else set())


def test_a_quantized_network_answers_like_the_one_it_is_of():
    module, x = networks.lenet5().eval(), torch.randn(50, 1, 32, 32)
    plain, found = training.outputs(module, x), training.outputs(networks.quantized(module), x)
    assert 0 < (plain - found).abs().max() < 0.1 * plain.std()


# Locks


@pytest.mark.parametrize("schedule", ["counter", "expansion"])
def test_a_locked_network_comes_back_with_its_key_alone(schedule):
    module = WINE.untrained(0).eval()
    plain = copy.deepcopy(module.state_dict())
    network = locked_network.LockedNetwork(module, KEY, schedule=schedule)
    same = [locked_network.same_bytes(module.state_dict()[name], plain[name]) for name in plain]
    assert not any(same)
    for key, comes_back in ((KEY, True), (OTHER, False), (KEY, True)):
        network.unlock(key)
        assert all(locked_network.same_bytes(module.state_dict()[name], plain[name]) for name in plain) == comes_back
    assert network.comes_back()
    network.relock(OTHER)
    assert network.comes_back()
    network._plain["1.bias"][0] = 7
    assert not network.comes_back()


def test_one_bit_off_is_one_bit_off():
    keys = [int.from_bytes(authorization.one_bit_off(KEY, bit), "little") for bit in range(256)]
    own = int.from_bytes(KEY, "little")
    assert sorted(key ^ own for key in keys) == [1 << bit for bit in range(256)]


def test_sanitised_weights_are_numbers_and_small():
    module = nn.Sequential(Constant([[NAN, 3.0, -INF, 0.5, -0.25]]), Constant([[3.0, -99.0]]), nn.BatchNorm1d(2))
    module[2].running_var[0] = -1e9
    module[2].running_mean[0] = -1e9
    locked_network.sanitize(module)
    assert module[0].given.tolist() == [[0.0, 1.0, -1.0, 0.5, -0.25]]
    assert module[1].given.tolist() == [[3.0, -99.0]]
    assert module[2].running_var.tolist() == [1.0, 1.0]
    assert module[2].running_mean.tolist() == [-1.0, 0.0]


def test_salts_are_seeded_within_and_drawn_afterwards():
    def salt(seed):
        with seeding.seeded(seed):
            return locked_network.LockedNetwork(WINE.untrained(0), KEY).header.salt

    assert salt(1) == salt(1) != salt(2)
    assert named_lock.secrets is secrets
    assert not torch.are_deterministic_algorithms_enabled()


# Chance


@pytest.mark.parametrize(  # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I
    ("right", "samples", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(right, samples, low, high):
    assert chance.wilson(right, samples) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_bands_and_intervals_are_those_of_the_tables():
    assert chance.binomial_band(0.5, 10, 0.95) == (0.2, 0.8)  # P(2 to 8 of 10) = 0.979, P(3 to 7) = 0.891
    low, high = chance.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0], 0.95)  # t = 2.776 with 4 degrees of freedom
    assert (low, high) == (pytest.approx(3 - 2.776 * math.sqrt(2.5 / 5), abs=1e-3), pytest.approx(6 - low))
    assert chance.mean_interval([0.1, 0.1], 0.95) == (0.1, 0.1)


def test_a_mean_is_chance_within_its_interval_and_half_a_sample():
    def judged(values):
        return chance.is_chance(chance.distribution(values, 0.1, 100), 0.1, 100)

    assert judged([0.1] * 50)
    assert judged([0.104] * 50)
    assert not judged([0.106] * 50)
    assert judged([0.05, 0.2] * 20)
    assert not judged([0.15, 0.2] * 20)
    found = chance.distribution([0.1, 0.1, 0.5, 0.0], 0.1, 100)
    assert (found["keys"], found["low"], found["high"], found["bands"]["95"]) == (4, 0.0, 0.5, 0.5)
    for value in np.linspace(0, 1, 361).tolist():
        found = chance.distribution([value] * 3, 0.1, 360)
        assert found["low"] == found["mean"] == found["high"] == value


# Studies


def measured(study, monkeypatch, seed=1):
    monkeypatch.setattr(study, "_QUICK", ("MLP, wine",))
    return json.loads(json.dumps(study.measure(True, seed)))


def test_authorization_is_the_same_with_the_same_seed_and_notices_broken_claims(monkeypatch):
    result = measured(authorization, monkeypatch)
    assert authorization.check(result) == []
    assert measured(authorization, monkeypatch) == result
    other = measured(authorization, monkeypatch, 2)
    assert [group["accuracies"] for group in other["networks"][0]["groups"]] != [
        group["accuracies"] for group in result["networks"][0]["groups"]
    ]

    def broken(change):
        changed = copy.deepcopy(result)
        change(changed["networks"][0])
        return authorization.check(changed)

    def broken_by(kind, **changes):
        return broken(lambda network: next(one for one in network["groups"] if one["kind"] == kind).update(changes))

    assert len(broken(lambda network: network["comes_back"].update({"counter, aes": False}))) == 1
    assert len(broken(lambda network: network.update(after=0.5))) == 1
    for kind in (authorization.NO_KEY, authorization.RANDOM, authorization.ONE_BIT):
        assert len(broken_by(kind, interval=(0.4, 0.5))) == 1
        assert len(broken_by(kind, high=0.9)) == 1


def test_partial_locking_changes_the_part_and_nothing_else(monkeypatch):
    module = networks.resnet20().eval()
    plain = locked_network.copies(module)
    random = np.random.default_rng(0)
    found = [*partial._parts(module, "float32")]
    assert [part.label for part in found[:4]] == ["first layer", "last layer", "biases", "normalizations"]
    assert (found[0].only, found[1].only) == ("0.*", "14.*")
    assert set(found[-1].names) == set(plain)
    for part in found:
        locked_network.put(module, plain)
        partial._lock(module, part, random)
        for name, tensor in module.state_dict().items():
            size = tensor.element_size()
            now, before = (t.reshape(-1).view(torch.uint8).view(-1, size) for t in (tensor, plain[name]))
            columns = range(size) if part.columns is None else part.columns
            chosen = [*columns] if name in part.names else []
            others = [column for column in range(size) if column not in chosen]
            assert torch.equal(now[:, others], before[:, others])
            if chosen and tensor.numel() > 8:
                assert not torch.equal(now[:, chosen], before[:, chosen])


def test_partial_locking_adds_up_and_notices_broken_claims(monkeypatch):
    result = measured(partial, monkeypatch)
    assert partial.check(result) == []
    shares = {part["label"]: part["share"] for part in result["networks"][0]["parts"]}
    assert shares[partial.EVERYTHING] == 1
    assert shares["first layer"] == pytest.approx((13 + 1) * 32 / 1603)
    assert shares["bytes 0 and 1: the rest of the mantissa"] == 0.5
    everything = result["networks"][0]["parts"][-1]
    everything["locked"]["interval"] = (0.5, 0.6)
    assert len(partial.check(result)) == 1
    result["networks"][0]["after"] = 0.0
    assert len(partial.check(result)) == 2


def test_cost_notices_other_outputs(monkeypatch):
    result = measured(cost, monkeypatch)
    assert cost.check(result) == []
    result["networks"][0]["batches"][1]["same"] = False
    assert len(cost.check(result)) == 1


def test_statistics_of_bytes_are_those_of_their_definitions():
    every = np.arange(256, dtype=np.uint8)
    found = locked_bytes.statistics_of(np.tile(every, 4))
    assert (found["entropy"], found["chi_square"], found["chi_square_p"]) == (8.0, 0.0, 1.0)
    assert found["correlation"] > 0.9
    assert found["correlation_p"] < 1e-100
    found = locked_bytes.statistics_of(np.tile(np.array([0, 255], np.uint8), 128))
    assert found["entropy"] == 1.0
    assert found["chi_square"] == pytest.approx(254 * 1 + 2 * 127**2)
    assert found["correlation"] == pytest.approx(-1.0)
    random = np.random.default_rng(0)
    drawn = [locked_bytes.statistics_of(random.integers(0, 256, 4096).astype(np.uint8)) for _ in range(400)]
    for name in ("chi_square_p", "correlation_p"):
        assert 0.45 < np.mean([each[name] for each in drawn]) < 0.55


def test_statistics_notice_bytes_that_are_not_random(monkeypatch):
    result = measured(locked_bytes, monkeypatch)
    assert locked_bytes.check(result) == []
    result["networks"][0]["of"]["expansion"]["chi_square_p_uniform"] = 1e-9
    assert len(locked_bytes.check(result)) == 1


# The command and its report


def test_the_command_writes_a_report_with_all_its_charts(monkeypatch, tmp_path, capsys):
    for study in (authorization, partial, cost, locked_bytes):
        monkeypatch.setattr(study, "_QUICK", ("MLP, wine",))
    names = ["authorization", "partial", "cost", "locked_bytes"]
    assert command.main(["--quick", "--processes", "1", "--out", str(tmp_path / "new"), *names]) == 0
    page = (tmp_path / "new" / "report.md").read_text()
    document = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [*document["studies"]] == names
    assert document["environment"]["quick"]
    assert "FIGURES MEAN NOTHING" in page
    for name in names:
        assert f"\n## {command.STUDIES[name].TITLE}\n" in page
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert len(set(pictures)) == len(pictures) >= 4
    for picture in pictures:
        assert (tmp_path / "new" / picture).read_text().startswith("<?xml")
        assert (tmp_path / "new" / picture.replace(".svg", ".png")).stat().st_size
    tables = re.findall(r"(?:^\|.*\|$\n)+", page, re.MULTILINE)
    assert len(tables) == 7
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_page_is_written_anew_from_the_results(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "_QUICK", ("MLP, wine",))
    arguments = ["--quick", "--processes", "1", "--out", str(tmp_path), "cost"]
    assert command.main(arguments) == 0
    page, results = ((tmp_path / name).read_bytes() for name in ("report.md", "results.json"))
    (tmp_path / "report.md").unlink()
    monkeypatch.setattr(cost, "measure", None)
    assert command.main([*arguments[1:-1], "--rewrite"]) == 0
    assert [(tmp_path / name).read_bytes() for name in ("report.md", "results.json")] == [page, results]


def test_the_command_fails_where_a_claim_does_not_hold(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cost, "_QUICK", ("MLP, wine",))
    monkeypatch.setattr(cost, "check", lambda result: ["nothing is as it was"])
    assert command.main(["--quick", "--processes", "1", "--out", str(tmp_path), "cost"]) == 1
    assert "does not hold: cost: nothing is as it was" in capsys.readouterr().out
    assert (tmp_path / "report.md").exists()


def test_the_command_refuses_a_study_that_it_has_not():
    with pytest.raises(SystemExit) as caught:
        command.main(["--quick", "colour"])
    assert caught.value.code == 2


def test_results_are_json_that_anybody_reads():
    value = {"a": [1, 2.5, "x"], "b": [{"c": []}, {}], "d": {}, "e": [[1], [2]]}
    assert json.loads(report.compact(value)) == value
    assert report.compact(value).count("\n") < 12
    with pytest.raises(ValueError, match="JSON"):
        report.compact({"a": NAN})


def test_charts_give_the_line_that_shows_them(tmp_path):
    drawn = charts.Charts(tmp_path, "caption")
    lines = drawn.lines("a", "A title", "x", "y", {"one": [(1, 0.1, 0.2, 0.3), (2, 0.2, 0.2, 0.2)]}, limit=0.1)
    assert lines == "![A title](a.svg)"
    assert drawn.bars("b", "B", "label", {"row": {"one": (0.1, 0.2, 0.3)}}, limit=0.1) == "![B](b.svg)"
    assert drawn.histograms("c", "C", {"one": ({"s": [1.0, 1.0]}, 0.5), "two": ({"s": [2.0]}, None)}) == "![C](c.svg)"
    assert drawn.names == ["a", "b", "c"]
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{kind}" for name in "abc" for kind in ("svg", "png")}


# The master key from a key stream


BITS = (128, 192, 256)


def master_key(bits):
    return np.random.default_rng(bits).bytes(bits // 8)


def floats(count=6000):
    return np.random.default_rng(5).normal(0, 0.1, count).astype(np.float32).view(np.uint8)


@pytest.mark.parametrize("bits", BITS)
def test_the_key_expansion_runs_backwards_from_any_byte(bits):
    key, size = master_key(bits), bits // 8
    stream = reference.expansion_keystream(key, 4000)
    for position in (*range(2 * size + 1), 51 * size + 3, 3900):
        assert key_recovery.run_backwards(stream[position : position + size], position) == key


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_of_an_expansion_follows_and_a_changed_one_does_not(bits):
    size = bits // 8
    stream = np.frombuffer(reference.expansion_keystream(master_key(bits), 60 * size), np.uint8).copy()
    assert key_recovery.follows(stream, size)[size:].all()
    assert not key_recovery.follows(stream, size)[:size].any()
    stream[500] ^= 1
    changed = np.flatnonzero(~key_recovery.follows(stream, size)[size:]) + size
    assert {500, 500 + size} <= {*changed}
    assert changed.min() == 500
    assert len(changed) <= 7


@pytest.mark.parametrize("bits", BITS)
def test_a_run_of_right_guesses_gives_up_the_key_of_the_expansion_if_it_is_long_enough(bits):
    for known, given in ((bits // 8 + 4, True), (bits // 8 + 3, False)):
        plain = {"w": floats(), "known": np.full(known, 7, np.uint8), "behind": floats()}
        locked = {name: tensor.copy() for name, tensor in plain.items()}
        header = lock_tensors(locked, master_key(bits), schedule="expansion")
        guesses = {name: np.full_like(tensor, 7) for name, tensor in plain.items()}
        found = key_recovery.recover(locked, header, guesses)
        assert found == key_recovery.Recovery(*((master_key(bits), ("known",)) if given else (None, ())))


def test_a_key_that_the_header_does_not_know_is_not_given():
    locked = {"known": np.zeros(40, np.uint8)}
    header = lock_tensors(locked, master_key(128), schedule="expansion")
    guesses = {"known": np.zeros(40, np.uint8)}
    assert key_recovery.recover(locked, header, guesses).key == master_key(128)
    other = dataclasses.replace(header, check=bytes(16))
    assert key_recovery.recover(locked, other, guesses) == key_recovery.Recovery(None, ())


def test_the_longest_run_is_found():
    true = np.array([1, 0, 1, 1, 1, 0, 1, 1], bool)
    assert key_recovery.longest_run(true) == (2, 5)
    assert key_recovery.longest_run(true[:0]) == key_recovery.longest_run(~true[:1]) == (0, 0)


@pytest.mark.parametrize("bits", BITS)
def test_locked_floats_alone_give_up_the_key_of_the_expansion(bits):
    for odd in (0, 3):  # at any place of a word
        locked = {"odd": np.zeros(odd, np.uint8), "w": floats()}
        header = lock_tensors(locked, master_key(bits), schedule="expansion")
        found = key_from_floats.find_key(locked, header, {"w": 4}, 60)
        assert found is not None
        assert found.key == master_key(bits)
        assert found.tensors == ("w",)
        assert found.nbytes == bits // 8 * key_from_floats.window_rounds(bits // 32)


def test_locked_halves_of_floats_give_up_the_key_too():
    locked = {"w": floats().reshape(-1, 4)[:, 2:].copy().reshape(-1)}
    header = lock_tensors(locked, master_key(256), schedule="expansion")
    found = key_from_floats.find_key(locked, header, {"w": 2}, 60)
    assert found is not None
    assert found.key == master_key(256)


@pytest.mark.parametrize("bits", [128, 256])
def test_locked_floats_give_up_no_key_but_that_of_the_expansion_and_random_bytes_none_at_all(bits):
    locked = {"w": floats()}
    header = lock_tensors(locked, master_key(bits))
    assert key_from_floats.find_key(locked, header, {"w": 4}, 60) is None
    locked = {"w": floats()}
    header = lock_tensors(locked, master_key(bits), schedule="expansion")
    other = dataclasses.replace(header, check=bytes(16))  # which says that it was another key
    assert key_from_floats.find_key(locked, other, {"w": 4}, 3) is None
    locked = {"w": np.random.default_rng(1).integers(0, 256, 24_000, np.uint8)}
    header = lock_tensors(locked, master_key(bits), schedule="expansion")
    assert key_from_floats.find_key(locked, header, {"w": 4}, 60) is None


# What attackers start from


LOCKED = torch.tensor([[NAN, 1e38, -1e-30], [math.inf, -3.0, 0.01]])
FRESH = torch.tensor([[0.1, -0.2, 0.3], [-0.1, 0.0, 0.2]])


def test_sanitised_weights_are_finite_and_like_fresh_ones():
    made = {name: sanitiser(LOCKED.clone(), FRESH) for name, sanitiser in attacker.SANITISERS.items()}
    assert locked_network.same_bytes(made[attacker.AS_THEY_ARE], LOCKED)
    expected = torch.tensor([[0, 1e38, -1e-30], [0, -3.0, 0.01]])
    assert torch.equal(made[attacker.ZEROED], expected)
    assert torch.equal(made[attacker.CLIPPED], torch.tensor([[0, 0.3, -1e-30], [0.3, -0.2, 0.01]]))
    assert made[attacker.RESCALED].isfinite().all()
    assert made[attacker.RESCALED].mean().item() == pytest.approx(FRESH.mean().item(), abs=1e-6)
    assert made[attacker.RESCALED].std().item() == pytest.approx(FRESH.std().item(), rel=1e-5)
    assert torch.equal(made[attacker.RANKED].flatten().sort().values, FRESH.flatten().sort().values)
    assert made[attacker.RANKED].argmax() == 1
    assert made[attacker.RANKED].argmin() == 4
    ones = torch.ones(4)
    assert all(torch.equal(attacker.SANITISERS[name](ones, ones), ones) for name in attacker.SANITISERS)


def test_a_locked_start_bears_nothing_of_the_plain_weights_and_a_partly_locked_one_bears_the_rest():
    with seeding.seeded(3) as random:
        starts = attacker.starts(WINE, True, random)
    plain = starts[attacker.PLAIN].state_dict()
    for name, start in starts.items():
        equal = {tensor for tensor, value in start.state_dict().items() if torch.equal(value, plain[tensor])}
        if name == attacker.LAST_LOCKED:
            assert equal == plain.keys() - {"5.weight", "5.bias"}
        else:
            assert equal == (plain.keys() if name == attacker.PLAIN else set())


def test_every_beginning_of_the_attackers_data_has_as_many_of_each_class():
    y = data.digits().train_y
    order = attacker.balanced_order(y, np.random.default_rng(1))
    assert sorted(order.tolist()) == [*range(len(y))]
    for count in (10, 50, 140):
        assert np.ptp(np.bincount(y[order[:count]], minlength=10)) <= 1
    assert not torch.equal(order, attacker.balanced_order(y, np.random.default_rng(2)))


# Fine-tuning


def test_a_learning_rate_is_chosen_by_the_other_seeds():
    scores = np.array([[[0.9, 0.1, 0.1], [0.2, 0.3, 0.4]]])  # of one share: [rate][seed]
    assert fine_tuning._best_rate(scores).tolist() == [[0.2, 0.1, 0.1]]


def tuned(**scores):
    """Give a result in which each start has the same scores with both shares."""
    names = {"plain": attacker.PLAIN, "scratch": attacker.SCRATCH, "ranked": attacker.RANKED}
    each = {names[name]: [value, value] for name, value in scores.items()}
    return {"net": {"shares": [0.1, 0.5], "scores": {fine_tuning.ALL: each}}}


def test_a_locked_start_that_does_better_is_noticed():
    plain, scratch = [0.9, 0.91, 0.92], [0.7, 0.72, 0.71]
    better = [value + 0.1 for value in scratch]
    assert fine_tuning.check(tuned(plain=plain, scratch=scratch, ranked=scratch)) == []
    assert fine_tuning.check(tuned(plain=plain, scratch=scratch, ranked=[0.3, 0.3, 0.4])) == []
    assert len(fine_tuning.check(tuned(plain=plain, scratch=scratch, ranked=better))) == 3
    assert len(fine_tuning.check(tuned(plain=scratch, scratch=scratch, ranked=scratch))) == 1
    found = tuned(plain=plain, scratch=scratch, ranked=scratch)
    found["net"]["scores"][fine_tuning.ALL][attacker.RANKED][0] = [value + 0.06 + value / 1000 for value in scratch]
    assert len(fine_tuning.check(found)) == 1


def test_fine_tuning_is_seeded_and_written(monkeypatch, tmp_path):
    plan = fine_tuning.Plan((0.1, 0.5), (1e-2, 3e-2), 6, 2, (attacker.PLAIN, attacker.SCRATCH, attacker.RANKED))
    monkeypatch.setattr(fine_tuning, "_QUICK_PLANS", {"MLP, wine": plan})
    monkeypatch.setattr(training, "_trained", {})  # what is drawn must not depend on what was trained before
    found = fine_tuning.measure(True, 1)
    assert fine_tuning.measure(True, 1) == found
    assert np.shape(found["MLP, wine"]["scores"][fine_tuning.ALL][attacker.PLAIN]) == (2, 2)
    page = fine_tuning.present(json.loads(json.dumps(found)), charts.Charts(tmp_path, ""))
    assert "![Fine-tuning of MLP, wine: mean and range over seeds](fine_tuning_mlp__wine.svg)" in page


# Approximation


def test_a_genetic_search_finds_what_can_be_found_within_its_budget():
    target, asked = torch.linspace(-1, 1, 8), []

    def fitness(weights):
        asked.append(weights)
        return -float((weights - target).abs().sum())

    curve, best = approximation.evolve(
        torch.zeros(8), torch.ones(8), fitness, 600, torch.Generator().manual_seed(1)
    )
    assert 570 < len(asked) == curve[-1][0] <= 600
    assert curve[-1][1] == fitness(best) > -1.5
    assert [score for _, score in curve] == sorted(score for _, score in curve)


def test_a_climb_finds_a_key_where_there_is_something_to_climb():
    key = bytes(range(4))

    def fitness(guess):
        return -(int.from_bytes(guess, "big") ^ int.from_bytes(key, "big")).bit_count()

    found, best = approximation.climb(b"\xff" * 4, fitness, 400, np.random.default_rng(1))
    assert (found, best) == (key, 0)
    assert approximation._distance(key, approximation._flipped(key, [0, 9, 31])) == 3


def searched(ranked=0.3, nearest=100, best=0.2, wrong=0.2, right=0.9):
    keys = {"distances": {"0": [right], "1": [0.1, wrong]}, "searches": {approximation.CLIMB: [(best, nearest)]}}
    genetic = {
        start: [{"accuracy": value + step / 100, "curve": []} for step in (0, 1, 2)]
        for start, value in ((attacker.SCRATCH, 0.3), (attacker.RANKED, ranked))
    }
    return {"net": {"chance": 0.1, "trained": 0.9, "genetic": genetic, "keys": {"counter": keys}}}


@pytest.mark.parametrize(
    ("changed", "complaints"),
    [({}, 0), ({"ranked": 0.2}, 0), ({"ranked": 0.4}, 1), ({"ranked": 0.6}, 2), ({"nearest": 0}, 1)]
    + [({name: 0.5}, 1) for name in ("best", "wrong", "right")],
)
def test_a_search_that_leads_somewhere_is_noticed(changed, complaints):
    assert len(approximation.check(searched(**changed))) == complaints


def test_approximation_is_seeded_and_written(monkeypatch, tmp_path):
    plan = approximation.Plan(60, 2, (attacker.SCRATCH, attacker.RANKED), 4)
    monkeypatch.setattr(approximation, "_QUICK_PLANS", {"MLP, wine": plan})
    monkeypatch.setattr(training, "_trained", {})
    found = approximation.measure(True, 1)
    assert approximation.measure(True, 1) == found
    page = approximation.present(json.loads(json.dumps(found)), charts.Charts(tmp_path, ""))
    assert "(approximation_mlp__wine.svg)" in page
    assert "(approximation_keys.svg)" in page


# Known plaintext


def attacked(**changed):
    row = {"network": "MLP, digits", "state": known_plaintext.TRAINED, "bits": 128, "right": 8}
    row["expansion"] = {"unlocked": changed.pop("unlocked", False), "tensors": []}
    row["counter"] = {"key_found": False, "equal": 1 / 256, "bytes": 10**6} | changed.pop("counter", {})
    row["floats"] = {"expansion": {"tensors": ["w"], "nbytes": 1}, "counter": None} | changed.pop("floats", {})
    return {"rows": [row | changed]}


@pytest.mark.parametrize(
    ("changed", "complaints"),
    [
        ({}, 0),
        ({"right": 20}, 1),
        ({"right": 20, "unlocked": True}, 0),
        ({"state": known_plaintext.ON_A_BASE}, 1),
        ({"counter": {"key_found": True}}, 1),
        ({"counter": {"equal": 0.005}}, 1),
        ({"floats": {"counter": {"tensors": ["w"], "nbytes": 1}}}, 1),
        ({"floats": {"expansion": None}}, 1),
    ],
)
def test_a_schedule_that_gives_up_its_key_where_it_must_not_or_keeps_it_where_it_must_is_noticed(changed, complaints):
    assert len(known_plaintext.check(attacked(**changed))) == complaints


def test_the_attacks_break_the_expansion_of_a_network_and_not_the_counter(monkeypatch, tmp_path):
    monkeypatch.setattr(known_plaintext, "_QUICK", ("MLP, wine",))
    monkeypatch.setattr(known_plaintext, "BITS", (128, 256))
    found = known_plaintext.measure(True, 1)
    assert known_plaintext.check(found) == []
    unlocked = {(row["state"], row["bits"]) for row in found["rows"] if row["expansion"]["unlocked"]}
    assert unlocked == {(known_plaintext.ON_A_BASE, bits) for bits in (128, 256)}
    page = known_plaintext.present(json.loads(json.dumps(found)), charts.Charts(tmp_path, ""))
    assert "| MLP, wine, last layer trained on a public base | " in page


def test_untrained_normalizations_are_guessed():
    module = nn.Sequential(nn.BatchNorm2d(8), nn.LayerNorm(8), nn.Linear(8, 8)).bfloat16()
    plain, guesses = known_plaintext._bytes(module.state_dict()), known_plaintext._conventions(module)
    right = {name for name, tensor in plain.items() if np.array_equal(tensor, guesses[name])}
    assert right == plain.keys() - {"2.weight", "2.bias"}
