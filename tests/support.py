"""What several test files share: keys, boxes, data, the oracle's answers, raw kernels, guarded memory."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import mmap
import os
import random
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from deeplock_kernels import errors, frameworks, locking, reference
from deeplock_kernels.kernels.signatures import (
    INVERSE_FORMS,
    RCON_START,
    RCON_WORDS,
    RECORDS,
    SEAL_KEYS_BYTES,
    SEGMENTS_PER_GROUP,
    TAG_BYTES,
    KernelName,
    every_name,
    segment_bytes,
)
from deeplock_kernels.locking import lock, unlock
from deeplock_kernels.runtime import forms, tiers
from deeplock_kernels.sboxes import AES, SBOXES, SBox
from deeplock_kernels.schedules import CounterSchedule, ExpansionSchedule
from deeplock_kernels.transform import Transform

BITS = (128, 192, 256)
SCHEDULES = ("counter", "expansion")
DIRECTIONS = ("lock", "unlock")
OPERATIONS = {"lock": lock, "unlock": unlock}
KEYS = {bits: random.Random(bits).randbytes(bits // 8) for bits in BITS}
IV = ((0x0123456789ABCDEF << 64) + 2**64 - 100).to_bytes(16, "big")  # its low half wraps 1600 bytes on
BOXES = {
    **SBOXES,
    "aes_inverse": AES.inverse,
    "identity": SBox(bytes(range(256))),
    "random": SBox(bytes(random.Random(1).sample(range(256), 256))),
}
FORM_BOXES = {  # for each form in which a kernel takes a box, one that it expresses
    "identity": BOXES["identity"],
    "affine": BOXES["sm4"],
    "aes": BOXES["aes"],
    "aes_inverse": BOXES["aes_inverse"],
    "table": BOXES["random"],
}

# Data and expectations


def painted(nbytes, start=0):
    """Give bytes of period 251, a prime, so that no two places a power of two apart look alike."""
    return (np.arange(start, start + nbytes) % 251).astype(np.uint8)


def table_of(box):
    return np.frombuffer(box.table, np.uint8)


def expected(direction, data, stream, box):
    """Compute with table look-ups what `reference.lock` or `reference.unlock` gives."""
    if direction == "lock":
        return table_of(box)[data ^ stream]
    return table_of(box.inverse)[data] ^ stream


@functools.cache
def key_stream(schedule, bits, nbytes):
    """Give the start of the oracle's key stream for the schedule of `make_schedule`."""
    if schedule == "counter":
        stream = reference.counter_keystream(KEYS[bits], IV, nbytes)
    else:
        stream = reference.expansion_keystream(KEYS[bits], nbytes)
    return np.frombuffer(stream, np.uint8)


SEAL_KEY = random.Random(5).randbytes(32)


def openssl_seal(key, locked):
    """Give the tag of AES-256-GCM without plaintext, as `reference.seal` does."""
    return AESGCM(key).encrypt(bytes(12), b"", bytes(locked))


def openssl_key_stream(key, iv, nbytes, offset):
    block, skip = divmod(offset, 16)
    counter = (int.from_bytes(iv, "big") + block) % 2**128
    encryptor = Cipher(algorithms.AES(key), modes.CTR(counter.to_bytes(16, "big"))).encryptor()
    return np.frombuffer(encryptor.update(bytes(skip + nbytes)), np.uint8)[skip:]


def oracle_seal(key, header, name, locked):
    """Compute the seal of a tensor's locked bytes."""
    return reference.seal(reference.seal_key(key, header.salt, name), locked)


def oracle_mac(key, header, file=None):
    """Compute the mac of a header, in a file of this table."""
    return reference.header_mac(reference.header_key(key, header.salt), json.loads(header.to_json()), file)


def make_schedule(schedule, bits):
    return CounterSchedule(KEYS[bits], IV) if schedule == "counter" else ExpansionSchedule(KEYS[bits])


def aligned(nbytes):
    """Give zeroed memory that starts at a multiple of 64."""
    memory = np.zeros(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes]


# Kernels by their addresses

EVERY_KERNEL = [(tier, name) for tier in tiers.TIERS for name in every_name(tier.forms)]


def forget_transforms():
    """Make the package choose pieces and ask for kernels anew."""
    Transform.of.cache_clear()
    locking._latest.clear()


def examples_of_frameworks(section, language="python"):
    """Give the examples of a section of the documentation for other frameworks."""
    text = (Path(frameworks.__file__).parent / "README.md").read_text()
    text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    examples = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert examples
    return examples


def kernel_id(value):
    return value.name if isinstance(value, tiers.Tier) else str(value)


def with_integers(tier, name):
    """Give a kernel as a function of integers."""
    kernel, pack = tiers.kernel(tier, name), RECORDS[name.operation].pack
    return lambda *arguments: kernel(pack(*arguments))


# Those that the safetensors library writes.
SAFETENSORS_DTYPES = [
    np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32,
    np.uint16, np.uint8, np.bool_, np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]  # fmt: skip


def refuse(kind, builtin, start, operation, *arguments, **keywords):
    """Check that an operation raises exactly `kind`, which is a `builtin`, with a message that starts so; give it."""
    with pytest.raises(errors.DeepLockError) as caught:
        operation(*arguments, **keywords)
    assert type(caught.value) is kind
    assert isinstance(caught.value, builtin)
    assert str(caught.value).startswith(start), str(caught.value)
    return caught.value


class RawKernel:
    """A kernel with its parameters in memory, to be called with addresses.

    A kernel that unlocks is given the table that it applies, as the package does. One that seals takes positions that
    are multiples of 16, and `tag` is what it leaves for all that it was given.

    Parameters
    ----------
    place
        Gives the address of a copy of some bytes; by default anywhere.
    """

    def __init__(self, tier, name, place=None):
        self.name = name
        self.function = with_integers(tier, name)
        self._kept = []
        place = place or self._place
        self.key = KEYS.get(name.bits)
        if name.operation.startswith("counter"):
            self._schedule = [place(self.key + IV), place(RCON_WORDS) + RCON_START]
        elif name.operation == "rekey":
            self._schedule = [place(self.key + IV), place(RCON_WORDS) + RCON_START]
            self._new_key = place(self.key[::-1] + IV[::-1])
        elif name.operation == "rekey_masked":
            self._mask = place(MASK)
        elif name.operation == "expansion":
            self._schedule = [place(self.key), place(RCON_WORDS) + RCON_START]
        elif name.operation == "expansion_indexed":
            # Saved states need not follow from each other. These are for two groups.
            self._states = [self.key[i:] + self.key[:i] for i in range(2 * SEGMENTS_PER_GROUP)]
            self._schedule = [place(b"".join(self._states)), place(RCON_WORDS) + RCON_START]
        if name.operation in ("counter_sealed", "rekey", "seal"):
            self._seal_keys, self._tag = place(bytes(SEAL_KEYS_BYTES)), place(bytes(TAG_BYTES))
            make = with_integers(tier, KernelName("seal_keys"))
            make(self._seal_keys, place(SEAL_KEY), 1, place(RCON_WORDS) + RCON_START)
        if name.form:
            self.box = FORM_BOXES[name.form]
            parameters = forms.parameters(self.box, name.form)
            self._box = place(parameters) if parameters else 0
        if name.operation.startswith("rekey"):
            parameters = forms.parameters(self.box.inverse, INVERSE_FORMS.get(name.form, name.form))
            self._inverse_box = place(parameters) if parameters else 0

    def _place(self, data):
        self._kept.append(ctypes.create_string_buffer(data, len(data)))
        return ctypes.addressof(self._kept[-1])

    @property
    def tag(self):
        return ctypes.string_at(self._tag, TAG_BYTES)

    def __call__(self, target, source, nbytes, offset=0, total=None):
        """Change `nbytes`; an indexed kernel takes whole groups from position 0, a substitution no offset."""
        operation = self.name.operation
        if operation == "substitute":
            self.function(target, source, nbytes, self._box)
        elif operation == "counter_list":
            record = (ctypes.c_int64 * 5)(target, source, nbytes, offset, self._schedule[0])
            self.function(ctypes.addressof(record), 1, self._schedule[1], self._box)
        elif operation in ("counter_sealed", "rekey", "seal"):
            key = 0 if operation == "seal" else self._schedule[0]
            total = offset + nbytes if total is None else total
            fields = [target, source, nbytes, offset, key, self._seal_keys, total, self._tag]
            common = [] if operation == "seal" else [self._schedule[1], self._box]
            if operation == "rekey":
                fields.append(self._new_key)
                common.append(self._inverse_box)
            record = (ctypes.c_int64 * len(fields))(*fields)
            self.function(ctypes.addressof(record), 1, *common)
        elif operation == "rekey_masked":
            record = (ctypes.c_int64 * 4)(target, source, nbytes, self._mask + len(MASK) - nbytes)
            self.function(ctypes.addressof(record), 1, self._box, self._inverse_box)
        elif operation == "expansion_indexed":
            groups, rest = divmod(nbytes, SEGMENTS_PER_GROUP * segment_bytes(self.name.bits))
            assert rest == 0
            self.function(target, source, groups, *self._schedule, self._box)
        else:
            self.function(target, source, nbytes, offset, *self._schedule, self._box)

    def expected(self, data, offset=0):
        """Compute what it makes of `data`."""
        table = table_of(self.box)
        operation, bits = self.name.operation, self.name.bits
        if operation == "substitute":
            return table[data]
        if operation.startswith("rekey"):
            if operation == "rekey":
                part = slice(offset, offset + len(data))
                mask = key_stream("counter", bits, 4096)[part] ^ new_key_stream(bits)[part]
            else:
                mask = np.frombuffer(MASK, np.uint8)[len(MASK) - len(data) :]
            return table[table_of(self.box.inverse)[data] ^ mask]
        if operation == "expansion_indexed":
            streams = b"".join(segment_stream(state, bits) for state in self._states)
            stream = np.frombuffer(streams, np.uint8)[: len(data)]
        else:
            stream = key_stream(operation.split("_")[0], bits, 4096)[offset : offset + len(data)]
        return table[data ^ stream] if self.name.direction == "lock" else table[data] ^ stream


MASK = random.Random(6).randbytes(4096)


@functools.cache
def new_key_stream(bits):
    return np.frombuffer(reference.counter_keystream(KEYS[bits][::-1], IV[::-1], 4096), np.uint8)


@functools.cache
def segment_stream(key, bits):
    return reference.expansion_keystream(key, segment_bytes(bits))


# Memory between pages that must not be touched


def _guarded_pages(nbytes):
    """Give the first address and the end of pages that lie between two forbidden ones."""
    size = mmap.PAGESIZE
    pages = -(-nbytes // size)
    memory = mmap.mmap(-1, (pages + 2) * size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    library = ctypes.CDLL(None, use_errno=True)
    library.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for forbidden in (start, start + (pages + 1) * size):
        if library.mprotect(forbidden, size, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    _kept.append(memory)
    return start + size, start + (pages + 1) * size


_kept = []


def place_before_forbidden_page(data):
    _, end = _guarded_pages(max(len(data), 1))
    ctypes.memmove(end - len(data), data, len(data))
    return end - len(data)


def run_kernels_between_forbidden_pages(tier_name):
    """Run every kernel of a tier where one byte read or written outside its memory ends the process."""
    tier = next(tier for tier in tiers.TIERS if tier.name == tier_name)
    largest = SEGMENTS_PER_GROUP * segment_bytes(256)
    target_start, target_end = _guarded_pages(largest)
    source_start, source_end = _guarded_pages(largest)
    for name in every_name(tier.forms):
        if name.operation in ("expansion_chain", "copy_past_cache", "seal_keys", "xor", "xor_sum"):
            continue
        kernel = RawKernel(tier, name, place_before_forbidden_page)
        if name.operation == "expansion_indexed":
            lengths = [SEGMENTS_PER_GROUP * segment_bytes(name.bits)]
        else:
            lengths = range(330)
        for nbytes in lengths:
            offset = 11 * nbytes % 97
            if name.operation in ("counter_past_cache", "counter_sealed", "rekey", "seal"):
                offset -= offset % 16
            if name.operation == "counter_past_cache":
                kernel(target_end - (nbytes + 63) // 64 * 64, source_end - nbytes, nbytes, offset)
                kernel(target_start, source_start, nbytes, offset)
                if nbytes % 64 == 0:
                    kernel(target_end - nbytes, source_start, nbytes, offset)
                continue
            kernel(target_end - nbytes, source_end - nbytes, nbytes, offset)
            kernel(target_start, source_start, nbytes, offset)
            kernel(target_end - nbytes, target_end - nbytes, nbytes, offset)
    keys, made = place_before_forbidden_page(2 * SEAL_KEY), place_before_forbidden_page(bytes(2 * SEAL_KEYS_BYTES))
    with_integers(tier, KernelName("seal_keys"))(made, keys, 2, place_before_forbidden_page(RCON_WORDS) + RCON_START)
    for bits in BITS:
        states = place_before_forbidden_page(KEYS[bits] + bytes(2 * bits // 8))
        chain = with_integers(tier, KernelName("expansion_chain", bits))
        chain(states, 2, place_before_forbidden_page(RCON_WORDS) + RCON_START)
    total = place_before_forbidden_page(bytes(64))
    for nbytes in range(330):
        with_integers(tier, KernelName("xor"))(target_end - nbytes, nbytes, 1)
        with_integers(tier, KernelName("xor_sum"))(total, source_end - nbytes, nbytes)
        copy = with_integers(tier, KernelName("copy_past_cache"))
        copy(target_start, source_end - nbytes, nbytes)
        if nbytes % 64 == 0:
            copy(target_end - nbytes, source_start, nbytes)


def framework(name):
    """Import a framework, or skip the test; where DEEPLOCK_REQUIRE_FRAMEWORKS is set, its absence is an error."""
    if os.environ.get("DEEPLOCK_REQUIRE_FRAMEWORKS"):
        return importlib.import_module(name)
    return pytest.importorskip(name)
