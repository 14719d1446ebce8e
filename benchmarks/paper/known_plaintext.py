"""Study 5: whether what anybody can guess of a network's weights gives the master key away."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.paper.charts import Charts
from benchmarks.paper.key_from_floats import find_key
from benchmarks.paper.key_recovery import Bytes, longest_run, masked, recover, run_backwards
from benchmarks.paper.networks import ARCHITECTURES, Architecture
from benchmarks.paper.seeding import seeded
from benchmarks.paper.tables import percent, table
from benchmarks.paper.training import train, trained
from deeplock_kernels import LockHeader, WrongKeyError, lock_tensors, unlock_tensors

TITLE = "What breaks it: known plaintext, and floats as such"
BITS = (128, 192, 256)
UNTRAINED, TRAINED, ON_A_BASE = "untrained", "trained", "last layer trained on a public base"
_QUICK = ("MLP, digits", "LeNet-5, int8")
_SAMPLES = 320  # to train a last layer with; what becomes of it does not matter here
_DEVIATIONS = 6
_PLACES = {128: 400, 192: 25, 256: 100}  # of a locked network, at which the attack on floats tries its luck
_SURELY = "MLP, digits", (128, 256)  # where it needs little luck


def measure(quick: bool, seed: int) -> dict[str, Any]:
    """Lock each network by each schedule with keys of each length, and attack it."""
    rows = []
    with seeded(seed) as random:
        for name in _QUICK if quick else ARCHITECTURES:
            for state, plain, guesses, widths in _victims(ARCHITECTURES[name], quick):
                right = longest_run(np.concatenate([plain[tensor] == guesses[tensor] for tensor in plain]))
                for bits in BITS:
                    key = random.bytes(bits // 8)
                    rows.append(
                        {
                            "network": name,
                            "state": state,
                            "bits": bits,
                            "right": right[1] - right[0],
                            "expansion": _attack_expansion(plain, guesses, key),
                            "counter": _attack_counter(plain, guesses, key, right[0]),
                            "floats": _attack_floats(plain, widths, key) if state == TRAINED else None,
                        }
                    )
    return {"rows": rows}


def present(result: Mapping[str, Any], charts: Charts) -> str:
    """Write what was found."""
    cases: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        cases.setdefault((row["network"], row["state"]), []).append(row)
    guesses, floats = [], []
    for (network, state), rows in cases.items():
        guesses.append(
            (
                f"{network}, {state}",
                rows[0]["right"],
                _bits(row for row in rows if row["expansion"]["unlocked"]),
                _shown(next((row["expansion"]["tensors"] for row in rows if row["expansion"]["tensors"]), [])),
                _bits(row for row in rows if row["counter"]["key_found"]),
                percent(max(row["counter"]["equal"] for row in rows), 2),
            )
        )
        if state == TRAINED:
            found = [row["floats"]["expansion"] for row in rows]
            cells = (f"{each['nbytes']} bytes of {_shown(each['tensors'])}" if each else "–" for each in found)
            floats.append((network, *cells, _bits(row for row in rows if row["floats"]["counter"])))
    lost = len({row["network"] for row in result["rows"] if row["floats"] and row["floats"]["expansion"]})
    columns = ["network", "longest run guessed right, bytes", "`expansion` gives up keys of, bits", "given away by"]
    columns += ["`counter` gives up keys of, bits", "bytes that the attack's keys unlock"]
    widths = (f"`expansion`, {bits} bits, given away by" for bits in BITS)
    return "\n\n".join(
        [
            _GUESSES,
            table(columns, guesses),
            _FLOATS.format(places=max(_PLACES.values()), tried=len(floats), lost=lost),
            table(["trained network", *widths, "`counter` gives up keys of, bits"], floats),
        ]
    )


_GUESSES = """\
**The paper**, by its abstract (its text is not at hand), has each weight locked by an S-Box and a key of its own,
which a key schedule makes of one master key, and calls the scheme secure. `expansion` is such a schedule.

**Measured, first: guesses.** The attacker has the locked tensors, the header and the public S-Box, and guesses plain
bytes: that whatever has one axis and is called `weight` or `running_var` is 1, and all else 0; or, where only the
last layer was trained on top of a public base, that all is as in the base. Nobody tells which guesses are right. With
`expansion` they prove themselves: a run of them that is 4 bytes longer than the key shows where it lies, as many
bytes as the key has are turned back into the master key, and that has to unlock the whole network bit for bit. With
`counter` the same is tried, and then the keys that come of the longest run of right guesses are forced upon the whole
network: what is equal to the plain bytes then is 1 byte in 256 (0.39 %), which is chance.

**Where it fails:** with `expansion`, wherever 16, 24 or 32 bytes in a row are known, at any place. Fresh
normalizations are enough, and so is one layer of a public base. Networks that were trained from scratch have no such
run here: their biases and normalizations have moved away from 0 and 1, a batch normalization's `num_batches_tracked`
gives 8 bytes at most, nothing is padded, and PyTorch starts biases at random (Keras and Flax start them at 0, so that
untrained layers would do). Frozen or padded rows, zero points of quantized layers, or weights that a public seed made
would all do. `counter` gives up nothing."""
_FLOATS = """\
**Measured, second: no guess at all.** Of a float of a trained network the size is roughly known. That is enough:
`benchmarks/paper/key_from_floats.py` takes the high bytes of as many locked weights in a row as the table says, finds
by Viterbi's algorithm how the expansion most likely went on beneath them, solves for all other bytes of its state,
and has the master key. A place takes it 10 ms with keys of 128 and 256 bits and a second with 192; it tries at most
{places} places of a network. The attacker knows nothing of the weights, and asks nobody. **So of {tried} locked
networks {lost} gave up the key of `expansion` for one of the key lengths at least, from the locked file alone.**
Where the table has a dash, more places may do, or a search among the next likeliest: two sizes that are equally
frequent are what this one finds hardest. int8 weights fill their bytes too evenly for this way, and their few float
scales and biases are too short. A schedule of the paper's kind would need a step that cannot be undone, as AES in
counter mode has: against `counter` the same program finds nothing."""


def _bits(rows: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(str(row["bits"]) for row in rows) or "none"


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if names[2:] else ""
    return ", ".join(f"`{name}`" for name in names[:2]) + more or "–"


def check(result: Mapping[str, Any]) -> list[str]:
    """Name what is not as it must be: the expansion broken by what is known, and the counter never."""
    wrong = []
    for row in result["rows"]:
        where = f"known plaintext: {row['network']}, {row['state']}, {row['bits']} bits"
        expansion, counter = row["expansion"], row["counter"]
        must = row["state"] == ON_A_BASE or row["right"] >= row["bits"] // 8 + 4
        if must and not expansion["unlocked"]:
            wrong.append(f"{where}: `expansion` did not give up its key")
        if counter["key_found"]:
            wrong.append(f"{where}: `counter` gave up a key")
        if row["floats"] and row["floats"]["counter"]:
            wrong.append(f"{where}: `counter` gave up a key to the attack on floats")
        surely = row["network"] == _SURELY[0] and row["bits"] in _SURELY[1]
        if row["floats"] and surely and not row["floats"]["expansion"]:
            wrong.append(f"{where}: floats did not give up the key of `expansion`")
        chance = 1 / 256
        if counter["equal"] > chance + _DEVIATIONS * (chance / counter["bytes"]) ** 0.5:
            wrong.append(f"{where}: a key of the attack unlocked bytes that `counter` locked")
    return wrong


class Victim(NamedTuple):
    """A network to be attacked.

    Attributes
    ----------
    state
        What became of it.
    plain, guesses
        The bytes of its tensors, and what the attacker takes them for.
    widths
        The number of bytes of an element of its tensors of floats.
    """

    state: str
    plain: dict[str, Bytes]
    guesses: dict[str, Bytes]
    widths: dict[str, int]


def _victims(architecture: Architecture, quick: bool) -> Iterator[Victim]:
    """Give a network in each state."""
    untrained = architecture.converted(architecture.make())
    yield Victim(UNTRAINED, _bytes(untrained.state_dict()), _conventions(untrained), _widths(untrained))
    module = trained(architecture, quick)
    yield Victim(TRAINED, _bytes(module.state_dict()), _conventions(module), _widths(module))

    base = trained(_float_twin(architecture), quick)
    tuned, data = copy.deepcopy(base), architecture.dataset()
    last = [*tuned.parameters()][-2:]
    x, y = data.train_x[:_SAMPLES], data.train_y[:_SAMPLES]
    train(tuned, x, y, epochs=1, learning_rate=architecture.learning_rate, seed=1, parameters=last)
    tuned, base = architecture.converted(tuned), architecture.converted(base)
    yield Victim(ON_A_BASE, _bytes(tuned.state_dict()), _bytes(base.state_dict()), _widths(tuned))


def _float_twin(architecture: Architecture) -> Architecture:
    """Give the same network with weights of float32."""
    return next(
        other for other in ARCHITECTURES.values() if other.make is architecture.make and other.dtype == "float32"
    )


def _bytes(tensors: Mapping[str, Tensor]) -> dict[str, Bytes]:
    return {name: tensor.detach().reshape(-1).view(torch.uint8).numpy().copy() for name, tensor in tensors.items()}


def _widths(module: nn.Module) -> dict[str, int]:
    return {
        name: tensor.element_size() for name, tensor in module.state_dict().items() if tensor.is_floating_point()
    }


def _conventions(module: nn.Module) -> dict[str, Bytes]:
    """Guess what frameworks start with."""
    guesses = {}
    for name, tensor in module.state_dict().items():
        ones = tensor.dim() == 1 and name.rpartition(".")[2] in ("weight", "running_var")
        guesses[name] = torch.ones_like(tensor) if ones else torch.zeros_like(tensor)
    return _bytes(guesses)


def _copy(tensors: Mapping[str, Bytes]) -> dict[str, Bytes]:
    return {name: tensor.copy() for name, tensor in tensors.items()}


def _attack_expansion(plain: Mapping[str, Bytes], guesses: Mapping[str, Bytes], key: bytes) -> dict[str, Any]:
    tensors = _copy(plain)
    header = lock_tensors(tensors, key, schedule="expansion")
    found = recover(tensors, header, guesses)
    unlocked = False
    if found.key is not None:
        unlock_tensors(tensors, found.key, header)
        unlocked = found.key == key and all(np.array_equal(tensors[name], plain[name]) for name in plain)
    return {"unlocked": unlocked, "tensors": list(found.tensors)}


def _attack_counter(
    plain: Mapping[str, Bytes], guesses: Mapping[str, Bytes], key: bytes, place: int
) -> dict[str, Any]:
    """Try what breaks the expansion, and then force the keys that the longest run of right guesses gives."""
    tensors = _copy(plain)
    header = lock_tensors(tensors, key, schedule="counter")
    found = recover(tensors, header, guesses).key is not None
    stream = np.concatenate([masked(tensors[name], header) ^ guesses[name] for name in plain])
    size, within = len(key), place - _start_of_tensor(plain, place)
    place = min(place, stream.size - size)
    known = stream[place : place + size].tobytes()
    equal = total = 0
    for guessed in {run_backwards(known, position) for position in (place, within, 0)} | {known}:
        found = found or guessed == key or _opens(tensors, guessed, header)
        forced = _copy(tensors)
        unlock_tensors(forced, guessed, header, check=False, seal=False)
        equal += sum(int((forced[name] == plain[name]).sum()) for name in plain)
        total += sum(tensor.size for tensor in plain.values())
    return {"key_found": found, "equal": equal / total, "bytes": total}


def _start_of_tensor(tensors: Mapping[str, Bytes], place: int) -> int:
    start = 0
    for tensor in tensors.values():
        if start + tensor.size > place:
            break
        start += tensor.size
    return start


def _opens(tensors: Mapping[str, Bytes], key: bytes, header: LockHeader) -> bool:
    try:
        unlock_tensors(_copy(tensors), key, header)
    except WrongKeyError:
        return False
    return True


def _attack_floats(plain: Mapping[str, Bytes], widths: Mapping[str, int], key: bytes) -> dict[str, Any]:
    """Try what needs no guess, and give by schedule what gave the key away, or None."""
    outcome = {}
    for schedule in ("expansion", "counter"):
        tensors = _copy(plain)
        header = lock_tensors(tensors, key, schedule=schedule)
        found = find_key(tensors, header, widths, _PLACES[header.key_bits])
        assert found is None or found.key == key
        outcome[schedule] = None if found is None else {"tensors": list(found.tensors), "nbytes": found.nbytes}
    return outcome
