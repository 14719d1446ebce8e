"""The network of `deeplock demo`: what is shipped, how it runs on garbage, and how it was trained."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from deeplock_kernels.demo import train
from deeplock_kernels.demo.network import (
    HELD_OUT_FILE,
    WEIGHT_SHAPES,
    WEIGHTS_FILE,
    accuracy,
    forward,
    load_tensors,
    propagate,
)
from deeplock_kernels.errors import ContainerError, FileAccessError, ParameterError, TensorNameError


@pytest.fixture(scope="module")
def weights():
    return load_tensors(WEIGHTS_FILE)


@pytest.fixture(scope="module")
def held_out():
    return load_tensors(HELD_OUT_FILE)


@pytest.fixture
def random():
    return np.random.default_rng(7)


def random_weights(random):
    """Trained-looking float64 weights whose biases keep blank pixels away from the kink of the ReLU."""
    return {
        name: random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        for name, shape in WEIGHT_SHAPES.items()
    }


def test_shipped_weights_read_unseen_digits(weights, held_out):
    assert accuracy(weights, held_out["images"], held_out["labels"]) >= 0.98


def test_shipped_weights_are_small_and_as_documented(weights):
    assert WEIGHTS_FILE.stat().st_size <= 200_000
    assert {name: weight.shape for name, weight in weights.items()} == dict(WEIGHT_SHAPES)
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}
    assert all(np.isfinite(weight).all() for weight in weights.values())


def test_held_out_images_cover_every_digit(held_out):
    images, labels = held_out["images"], held_out["labels"]
    assert HELD_OUT_FILE.stat().st_size <= 50_000
    assert images.shape == (359, 8, 8)
    assert images.dtype == labels.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 16)
    assert len(np.unique(images.reshape(359, 64), axis=0)) == 359
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10
    assert counts.min() >= 35


@pytest.mark.parametrize("path", [WEIGHTS_FILE, HELD_OUT_FILE], ids=lambda path: path.stem)
def test_load_tensors_agrees_with_the_safetensors_library(path):
    safetensors = pytest.importorskip("safetensors.numpy")
    expected = safetensors.load_file(path)
    loaded = load_tensors(path)
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert tensor.flags.writeable
        np.testing.assert_array_equal(tensor, expected[name], strict=True)


def test_load_tensors_refuses_other_dtypes_and_missing_files(tmp_path):
    table = json.dumps({"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "half.safetensors"
    path.write_bytes(len(table).to_bytes(8, "little") + table + bytes(2))
    with pytest.raises(ContainerError, match="F16"):
        load_tensors(path)
    with pytest.raises(FileAccessError):
        load_tensors(tmp_path / "absent.safetensors")


def forward_by_definition(weights, image):
    """Compute the logits of one image with a loop for every sum that the definition of a layer writes."""

    def convolve(maps, weight, bias):
        result = np.zeros((len(weight), 8, 8))
        for output, row, column in np.ndindex(result.shape):
            total = bias[output]
            for down, right in np.ndindex(3, 3):
                y, x = row + down - 1, column + right - 1
                if 0 <= y < 8 and 0 <= x < 8:
                    for channel in range(len(maps)):
                        total += maps[channel, y, x] * weight[output, channel, down, right]
            result[output, row, column] = max(total, 0)
        return result

    maps = convolve(image[np.newaxis] / 16, weights["conv1.weight"], weights["conv1.bias"])
    maps = convolve(maps, weights["conv2.weight"], weights["conv2.bias"])
    pooled = [
        maps[channel, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].max()
        for channel, row, column in np.ndindex(32, 4, 4)
    ]
    hidden = np.maximum(weights["dense1.weight"] @ pooled + weights["dense1.bias"], 0)
    return weights["dense2.weight"] @ hidden + weights["dense2.bias"]


def test_forward_follows_the_definition(held_out, random):
    weights = random_weights(random)
    image = held_out["images"][3]
    logits = forward(weights, image[np.newaxis])
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, [forward_by_definition(weights, image)], rtol=1e-10, atol=1e-12)


def test_images_do_not_influence_each_other(weights, held_out):
    images = held_out["images"][:20]
    together = forward(weights, images)
    assert together.dtype == np.float32
    for index in (0, 7, 19):
        np.testing.assert_allclose(forward(weights, images[index : index + 1])[0], together[index], rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, -1e38, 1e-45])
@pytest.mark.parametrize("name", [*WEIGHT_SHAPES, "all"])
def test_extreme_weights_pass_in_silence(weights, held_out, name, value):
    extreme = {
        key: np.full_like(weight, value) if name in (key, "all") else weight
        for key, weight in weights.items()
    }
    with np.errstate(all="raise"):
        score = accuracy(extreme, held_out["images"], held_out["labels"])
    assert 0.0 <= score <= 1.0


def test_random_bits_score_like_guessing(held_out, random):
    for _ in range(5):
        bits = {
            name: random.integers(0, 2**32, size=shape, dtype=np.uint32).view(np.float32)
            for name, shape in WEIGHT_SHAPES.items()
        }
        assert accuracy(bits, held_out["images"], held_out["labels"]) < 0.2


def test_nan_wins_and_the_first_nan_first(weights, held_out):
    images, labels = held_out["images"], held_out["labels"]
    bias = weights["dense2.bias"].copy()
    bias[3], bias[7] = np.inf, np.nan
    assert accuracy({**weights, "dense2.bias": bias}, images, labels) == np.mean(labels == 7)
    bias[5] = np.nan
    assert accuracy({**weights, "dense2.bias": bias}, images, labels) == np.mean(labels == 5)
    # A NaN in the first layer must get through every ReLU and maximum after it.
    nothing = {**weights, "conv1.bias": np.full_like(weights["conv1.bias"], np.nan)}
    assert np.isnan(forward(nothing, images)).all()
    assert accuracy(nothing, images, labels) == np.mean(labels == 0)


def test_errors_name_the_argument(weights, held_out):
    images, labels = held_out["images"], held_out["labels"]
    incomplete = {name: weight for name, weight in weights.items() if name != "conv2.bias"}
    with pytest.raises(TensorNameError, match=r"^weights: .*'conv2\.bias'"):
        forward(incomplete, images)
    with pytest.raises(ParameterError, match=r"^weights: .*\(3,\).*'conv2\.bias'"):
        forward({**weights, "conv2.bias": np.zeros(3, np.float32)}, images)
    with pytest.raises(ParameterError, match=r"^images: .*\(359, 64\)"):
        forward(weights, images.reshape(-1, 64))
    with pytest.raises(ParameterError, match=r"^labels: "):
        accuracy(weights, images, labels[1:])
    with pytest.raises(ParameterError, match=r"^labels: "):
        accuracy(weights, images[:0], labels[:0])


def test_gradients_match_finite_differences(held_out, random):
    images, labels = held_out["images"][:4].copy(), held_out["labels"][:4]
    images[1] = 0  # blank: ties in the 2x2 maximum, which digits do not have
    weights = random_weights(random)
    computed = train.gradients(weights, propagate(weights, images), labels)
    step = 1e-6
    for name, weight in weights.items():
        assert computed[name].shape == weight.shape
        for position in random.choice(weight.size, size=min(8, weight.size), replace=False):
            index = np.unravel_index(position, weight.shape)
            original = weight[index]
            losses = []
            for moved in (original - step, original + step):
                weight[index] = moved
                losses.append(train.loss(forward(weights, images), labels))
            weight[index] = original
            slope = (losses[1] - losses[0]) / (2 * step)
            assert computed[name][index] == pytest.approx(slope, rel=1e-4, abs=1e-8), (name, index)


def test_loss_of_guessing_is_log_10_and_of_certainty_0():
    labels = np.array([3, 9], np.uint8)
    assert train.loss(np.zeros((2, 10)), labels) == pytest.approx(np.log(10))
    certain = np.full((2, 10), -1e4)
    certain[[0, 1], labels] = 1e4
    assert train.loss(certain, labels) == 0.0


def test_one_step_lowers_the_loss(held_out, random):
    images, labels = held_out["images"][:64], held_out["labels"][:64]
    weights = train.initial_weights(random)
    before = propagate(weights, images)
    train.Adam(weights).step(train.gradients(weights, before, labels), learning_rate=1e-3)
    assert train.loss(forward(weights, images), labels) < train.loss(before.logits, labels)


def test_training_learns_and_repeats_itself(held_out):
    images, labels = held_out["images"][:96], held_out["labels"][:96]
    runs = []
    for _ in range(2):
        random = np.random.default_rng(1)
        weights = train.initial_weights(random)
        losses = list(train.train(weights, images, labels, random, epochs=12))
        assert losses[-1] < 0.6 * losses[0]
        assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}
        runs.append((losses, weights))
    assert runs[0][0] == runs[1][0]
    for name in WEIGHT_SHAPES:
        np.testing.assert_array_equal(runs[0][1][name], runs[1][1][name])


def test_split_holds_out_a_fifth_of_every_digit(random):
    labels = random.integers(0, 10, size=1797)
    training, held_out = train.split(labels)
    np.testing.assert_array_equal(np.sort(np.concatenate([training, held_out])), np.arange(1797))
    shares = np.bincount(labels[held_out]) / np.bincount(labels)
    assert shares.min() > 0.19
    assert shares.max() < 0.21


def test_warped_images_stay_images(held_out, random, monkeypatch):
    images = held_out["images"]
    warped = train.warped(images, random)
    assert warped.shape == images.shape
    assert warped.dtype == np.float32
    assert warped.min() >= 0
    assert warped.max() <= 16
    assert not np.array_equal(warped, images)
    monkeypatch.setattr(train, "WARP", 0.0)
    monkeypatch.setattr(train, "MOVE_PIXELS", 0.0)
    np.testing.assert_array_equal(train.warped(images, random), images)


class LargestDraw:
    """Stands in for a random generator and always draws the upper bound."""

    def uniform(self, low, high, size):
        return np.full(size, high)


def test_warp_interpolates_between_pixels(monkeypatch):
    monkeypatch.setattr(train, "WARP", 0.1)
    monkeypatch.setattr(train, "MOVE_PIXELS", 0.25)
    row, column = np.indices((8, 8))
    from_row = 3.5 + 0.25 + 1.1 * (row - 3.5) + 0.1 * (column - 3.5)
    from_column = 3.5 + 0.25 + 0.1 * (row - 3.5) + 1.1 * (column - 3.5)
    is_inside = (from_row >= 0) & (from_row <= 7) & (from_column >= 0) & (from_column <= 7)
    assert is_inside.sum() > 30
    ramp = 0.5 * row + 1.5 * column
    (warped,) = train.warped(ramp[np.newaxis], LargestDraw())
    expected = 0.5 * from_row + 1.5 * from_column
    np.testing.assert_allclose(warped[is_inside], expected[is_inside], rtol=1e-5)


def test_script_without_scikit_learn_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    assert train.main(["--folder", str(tmp_path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("train: sklearn")
    assert second == "hint: pip install scikit-learn safetensors"
    assert not list(tmp_path.iterdir())


def test_held_out_images_are_no_training_images(held_out):
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    training, chosen = train.split(digits.target)
    assert (len(training), len(chosen)) == (1438, 359)
    np.testing.assert_array_equal(digits.images[chosen], held_out["images"])
    np.testing.assert_array_equal(digits.target[chosen], held_out["labels"])
    seen = {image.tobytes() for image in digits.images[training].astype(np.uint8)}
    assert not any(image.tobytes() in seen for image in held_out["images"])


def test_script_writes_both_files(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn.datasets")
    pytest.importorskip("safetensors.numpy")
    monkeypatch.setattr(train, "EPOCHS", 1)
    assert train.main(["--folder", str(tmp_path / "new")]) == 0
    written = tmp_path / "new"
    assert (written / HELD_OUT_FILE.name).read_bytes() == HELD_OUT_FILE.read_bytes()
    assert accuracy(load_tensors(written / WEIGHTS_FILE.name), **load_tensors(HELD_OUT_FILE)) > 0.5
    assert "held out" in capsys.readouterr().out
