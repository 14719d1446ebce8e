"""The command `deeplock`.

Exit codes: 0 done; 1 it could not be done (a bad file, a full disk, ...); 2 the command line is wrong; 3 the key is
not the right one; 4 the locked file was altered; 130 interrupted. Results go to the standard output, messages and
progress to the standard error. A message is one line `deeplock: error: ...`. A command that fails leaves no output
file.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from deeplock_kernels import __version__
from deeplock_kernels.errors import (
    DeepLockError,
    ExposedKeyWarning,
    FileAccessError,
    ParameterError,
    SameFileError,
    TamperedError,
    WrongKeyError,
)

if TYPE_CHECKING:
    from deeplock_kernels.keys import MasterKey
    from deeplock_kernels.passphrases import Passphrase

DONE, FAILED, USAGE, WRONG_KEY, TAMPERED, INTERRUPTED = 0, 1, 2, 3, 4, 130
_LARGEST_SIZE = 1 << 46  # bytes, beyond what any machine has
_UNITS = {
    "": 1,
    "B": 1,
    "K": 1 << 10,
    "KIB": 1 << 10,
    "M": 1 << 20,
    "MIB": 1 << 20,
    "G": 1 << 30,
    "GIB": 1 << 30,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    parsed = _parser(in_place=_in_place(words)).parse_args(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        for line in parsed.run(parsed):
            _print(line)
    except WrongKeyError as error:
        return _complain(error, WRONG_KEY)
    except TamperedError as error:
        return _complain(error, TAMPERED)
    except DeepLockError as error:
        return _complain(error, FAILED)
    except MemoryError:
        return _complain("there is not enough memory; give a smaller size, or close other programs", FAILED)
    except KeyboardInterrupt:
        print("deeplock: interrupted; every file is as it was, or complete", file=sys.stderr)
        return INTERRUPTED
    except _OutputError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error.__cause__, BrokenPipeError):  # its reader, such as `head`, has enough
            return DONE
        return _complain(f"standard output: {error}", FAILED)
    except OSError as error:  # of the system: files have errors of their own
        return _complain(error, FAILED)
    return DONE


class _OutputError(Exception):
    """The standard output cannot be written."""


def _print(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError as error:
        raise _OutputError(error.strerror) from error


def _complain(error: object, code: int) -> int:
    _say("error", error)
    return code


def _say(kind: str, message: object) -> None:
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message))
    print(f"deeplock: {kind}: {line}", file=sys.stderr)


def _in_place(words: Sequence[str]) -> bool:
    """Say whether a command line has no OUT, which has to be known before it is parsed."""
    options = itertools.takewhile(lambda word: word != "--", words)
    return any(len(word) > 2 and "--in-place".startswith(word) for word in options)


def _parser(*, in_place: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deeplock",
        description="Lock the weights of trained networks: without the key a model loads and computes nonsense.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong command line, 3 wrong key, 4 altered, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"deeplock {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], Iterator[str]], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run)
        return added

    keygen = command("keygen", _keygen, "write a new random key to a file that only you can read")
    keygen.add_argument("keyfile", metavar="KEYFILE", help="the file to write; never overwritten")
    keygen.add_argument(
        "--bits", type=int, choices=(128, 192, 256), default=256, help="its length (default 256)"
    )

    locker = command("lock", _lock, "lock a safetensors, npy, npz, GGUF or ONNX file, or a directory of shards")
    _add_files(locker, output=not in_place)
    _add_in_place(locker)
    locker.add_argument(
        "--schedule",
        type=_schedule,
        default="counter",
        help="counter (default), or expansion, the paper's, which gives away its key: to study it",
    )
    locker.add_argument(
        "--sbox", type=_sbox, default="aes", help="the S-Box (default aes); see `deeplock sboxes`"
    )
    locker.add_argument(
        "--only", metavar="GLOB", action="append", help="lock only tensors of such names; may be repeated"
    )

    locker.add_argument(
        "--exclude", metavar="GLOB", action="append", help="leave such files of a directory out; may be repeated"
    )
    locker.add_argument(
        "--no-seal",
        dest="seal",
        action="store_false",
        help="leave out the seals by which unlocking notices altered weights",
    )

    unlocker = command("unlock", _unlock, "unlock a locked file: the result is the original, byte for byte")
    _add_files(unlocker, output=not in_place)
    _add_in_place(unlocker)

    recoverer = command("recover", _recover, "finish a lock or unlock in place that was interrupted, or take it back")
    recoverer.add_argument("file", metavar="FILE", help="the file; one that is whole stays as it is")
    recoverer.add_argument("--undo", action="store_true", help="make it what it was, not what it was to become")
    _add_key(recoverer)
    _add_threads(recoverer)

    rekeyer = command("rekey", _rekey, "lock a locked file anew under another key, without unlocking it")
    _add_files(rekeyer)
    _add_key(rekeyer, "new-")

    verifier = command("verify", _verify, "say whether a locked file is as it was locked, without unlocking it")
    verifier.add_argument("file", metavar="FILE", help="the locked file or directory; it is only read")
    _add_key(verifier)
    _add_workers(verifier)
    _add_threads(verifier)

    wrapper = command("wrap-key", _wrap_key, "make a data key for one model, encrypted under a master key")
    wrapper.add_argument("output", metavar="WRAPPED", help="the file to write; never overwritten")
    wrapper.add_argument(
        "--bits", type=int, choices=(128, 192, 256), default=256, help="the data key's length (default 256)"
    )
    _add_key_source(wrapper)

    rewrapper = command("rewrap-key", _rewrap_key, "encrypt a data key anew under another master key")
    rewrapper.add_argument("input", metavar="WRAPPED", help="a file made by `deeplock wrap-key`")
    rewrapper.add_argument("output", metavar="OUT", help="the file to write; never overwritten")
    _add_key_source(rewrapper)
    _add_key_source(rewrapper, "new-")

    inspect = command("inspect", _inspect, "show what a file holds and what of it is locked; needs no key")
    inspect.add_argument("file", metavar="FILE")

    command("tiers", _tiers, "list the processor tiers and the one in use")
    command("sboxes", _sboxes, "list the S-Boxes and their properties")

    bench = command("bench", _bench, "measure locking against what this machine's memory allows")
    bench.add_argument(
        "--size", type=_size, default=256 << 20, help="bytes of the buffer, as in 64MiB (default 256MiB)"
    )
    bench.add_argument("--rounds", type=_positive, default=15, help="how often each is measured (default 15)")
    bench.add_argument("--threads", type=_positive, default=None, help="how many threads (default all)")
    bench.add_argument("--tier", type=_tier, default=None, help="a tier to force; see `deeplock tiers`")

    warm = command("warmup", _warmup, "compile every kernel of a tier into the cache, before it is needed")
    warm.add_argument(
        "--tier", type=_tier, default=None, help="the tier (default the one in use); see `deeplock tiers`"
    )
    warm.add_argument("--into", metavar="DIR", default=None, help="a cache directory to fill, to ship with an image")

    demo = command(
        "demo", _demo, "lock a real network that reads digits, try wrong keys, unlock it, and measure"
    )
    demo.add_argument("--quick", action="store_true", help="measure small sizes only")
    return parser


def _add_files(parser: argparse.ArgumentParser, *, output: bool = True) -> None:
    parser.add_argument("input", metavar="IN", help="the file, or the directory of shards, to read")
    if output:
        parser.add_argument("output", metavar="OUT", help="what to write; it appears when it is complete")
    _add_key(parser)
    _add_threads(parser)
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=_positive, default=None, metavar="N", help="work on a directory with N processes"
    )


def _add_in_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="change IN itself, without OUT, where the disk has no room for both; slower, see `deeplock recover`",
    )


def _add_key(parser: argparse.ArgumentParser, new: str = "") -> None:
    _add_key_source(parser, new)
    parser.add_argument(
        f"--{new}wrapped-key",
        metavar="FILE",
        help="a file made by `deeplock wrap-key`; the key above unwraps the one in it, which is used",
    )


def _add_key_source(parser: argparse.ArgumentParser, new: str = "") -> None:
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument(f"--{new}key", metavar="KEYFILE", help="a file made by `deeplock keygen`")
    sources.add_argument(f"--{new}key-env", metavar="NAME", help="an environment variable that holds the key")
    sources.add_argument(f"--{new}key-command", metavar="CMD", help="a command that prints the key; no shell runs it")
    sources.add_argument(f"--{new}passphrase", action="store_true", help="a passphrase, asked for on the terminal")
    sources.add_argument(
        f"--{new}passphrase-file", metavar="FILE", help="a file with a passphrase on its only line, or /dev/stdin"
    )


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_positive, default=None, help="how many threads (default all)")


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, accepted is a whole number of at least 1")
    return value


def _size(text: str) -> int:
    number = text.rstrip("BKMGIbkmgi")
    unit = _UNITS.get(text[len(number) :].upper())
    if unit is None or not number.isdecimal() or not 1 <= int(number) * unit < _LARGEST_SIZE:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, accepted are sizes such as 65536, 64KiB, 256MiB and 2GiB"
        )
    return int(number) * unit


def _schedule(text: str) -> str:
    from deeplock_kernels.header import SCHEDULE_NAMES

    return _one_of(text, SCHEDULE_NAMES)


def _sbox(text: str) -> str:
    from deeplock_kernels.sboxes import SBOXES

    return _one_of(text, SBOXES)


def _tier(text: str) -> str:
    from deeplock_kernels.runtime.tiers import TIERS

    return _one_of(text, [tier.name for tier in TIERS])


def _one_of(text: str, accepted: Collection[str]) -> str:
    if text not in accepted:
        raise argparse.ArgumentTypeError(f"got {text!r}, accepted are {', '.join(accepted)}")
    return text


@contextmanager
def _progress(path: str, verb: str) -> Iterator[Callable[[int], object]]:
    """Show progress on a terminal, and nothing elsewhere."""
    from tqdm import tqdm

    from deeplock_kernels.checkpoints.directory import checkpoint_at, read_checkpoint
    from deeplock_kernels.checkpoints.streaming import data_bytes

    place = checkpoint_at(path)
    try:
        total: int | None = data_bytes(path) if place is None else read_checkpoint(place).data_bytes
    except DeepLockError:  # said when the work begins
        total = None
    with tqdm(
        total=total,
        desc=verb,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        leave=False,
        disable=None,
        file=sys.stderr,
    ) as bar:
        yield bar.update


@contextmanager
def _at(path: str, arguments: argparse.Namespace) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Give the place of a file or checkpoint, whether it is a checkpoint, and the arguments that those have more."""
    from deeplock_kernels.checkpoints.directory import checkpoint_at
    from deeplock_kernels.errors import ResumeWarning

    place = checkpoint_at(path)
    if place is None:
        if arguments.workers is not None:
            raise ParameterError(f"--workers: {path} is no directory; accepted for a directory of shards")
        yield path, False, {}
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResumeWarning)
        try:
            if arguments.workers is None:
                yield place, True, {}
            else:
                with _processes(arguments.workers) as executor:
                    yield place, True, {"executor": executor}
        finally:
            for warning in caught:
                _say("warning", warning.message)


@contextmanager
def _processes(count: int) -> Iterator[object]:
    from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
    from multiprocessing import get_context

    executor = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        yield executor
    except BrokenExecutor:
        raise DeepLockError(
            "--workers: a process ended while it worked; run it again: shards that are finished are kept"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


_KEY_FILES = {"key": "key file", "passphrase_file": "passphrase's file", "wrapped_key": "wrapped key"}


def _spare_key_files(arguments: argparse.Namespace) -> None:
    """Refuse an output that would take the place of a key, without which nothing can be unlocked again."""
    from deeplock_kernels.files import check_distinct

    if os.path.isdir(arguments.output):  # of a checkpoint, which writes over nothing but what it has left there
        return
    for new in ("", "new_"):
        for option, kind in _KEY_FILES.items():
            key_file = getattr(arguments, new + option, None)
            try:
                if key_file is not None:
                    check_distinct(key_file, arguments.output)
            except SameFileError:
                raise SameFileError(
                    f"{arguments.output}: it is the {kind}; another file is accepted; write to a new path"
                ) from None


@contextmanager
def _key(arguments: argparse.Namespace, new: str = "", *, twice: bool = False) -> Iterator[MasterKey | Passphrase]:
    """Give the key that the command line names, and wipe it at the end.

    With `new` as "new_" that of the options `--new-...`; with `twice` a passphrase that is typed is asked for again.
    """
    wrapped = getattr(arguments, f"{new}wrapped_key", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExposedKeyWarning)
        source = _key_source(arguments, new, twice=twice and wrapped is None)
    for warning in caught:
        _say("warning", warning.message)
    with source:
        if wrapped is None:
            yield source
            return
        from deeplock_kernels.key_wrapping import unwrap_key

        data_key = unwrap_key(wrapped, source)
    with data_key:
        yield data_key


def _key_source(arguments: argparse.Namespace, new: str, *, twice: bool) -> MasterKey | Passphrase:
    from deeplock_kernels import key_sources
    from deeplock_kernels.keys import MasterKey

    given = {name.removeprefix(new): value for name, value in vars(arguments).items() if name.startswith(new)}
    if given["key"] is not None:
        return MasterKey.from_file(given["key"])
    if given["key_env"] is not None:
        return key_sources.key_from_environment(given["key_env"])
    if given["key_command"] is not None:
        return key_sources.key_from_command(given["key_command"])
    if given["passphrase_file"] is not None:
        return key_sources.passphrase_from_file(given["passphrase_file"])
    return key_sources.passphrase_from_terminal(what=f"{new.replace('_', ' ')}passphrase", twice=twice)


def _keygen(arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.keys import MasterKey

    with MasterKey.generate(arguments.bits) as key:
        key.to_file(arguments.keyfile)
    yield (
        f"{arguments.keyfile}: a new key of {arguments.bits} bits; whoever has it can unlock, without it nobody can"
    )


def _lock(arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.checkpoints.inplace import lock_file_in_place
    from deeplock_kernels.checkpoints.sharded import lock_checkpoint
    from deeplock_kernels.checkpoints.streaming import lock_file

    names = ("schedule", "sbox", "only", "seal", "threads")
    choices = {name: getattr(arguments, name) for name in names}
    with (
        _key(arguments, twice=True) as key,
        _progress(arguments.input, "locking") as progress,
        _at(arguments.input, arguments) as (place, whole, options),
    ):
        if arguments.exclude and not whole:
            raise ParameterError(f"--exclude: {place} is no directory; accepted for a directory of shards")
        if arguments.exclude:
            options["exclude"] = arguments.exclude
        if arguments.in_place:
            target = _one_file(place, whole)
            header = lock_file_in_place(target, key, **choices, progress=progress)
        else:
            target = arguments.output
            _spare_key_files(arguments)
            header = (lock_checkpoint if whole else lock_file)(
                place, target, key, **choices, progress=progress, **options
            )
    nbytes = sum(record.nbytes for record in header.tensors.values())
    sealed = "locked and sealed" if arguments.seal else "locked, not sealed"
    yield f"{target}: {len(header.tensors)} tensors {sealed}, {nbytes:,} bytes"


def _unlock(arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.checkpoints.inplace import unlock_file_in_place
    from deeplock_kernels.checkpoints.sharded import unlock_checkpoint
    from deeplock_kernels.checkpoints.streaming import unlock_file

    with (
        _key(arguments) as key,
        _progress(arguments.input, "unlocking") as progress,
        _at(arguments.input, arguments) as (place, whole, options),
    ):
        if arguments.in_place:
            target = _one_file(place, whole)
            unlock_file_in_place(target, key, threads=arguments.threads, progress=progress)
        else:
            target = arguments.output
            _spare_key_files(arguments)
            unlock = unlock_checkpoint if whole else unlock_file
            unlock(place, target, key, threads=arguments.threads, progress=progress, **options)
    yield f"{target}: unlocked"


def _one_file(place: str, whole: bool) -> str:
    if whole:
        raise ParameterError(f"--in-place: got the directory {place}; accepted is one file; lock each shard by itself")
    return place


def _recover(arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.checkpoints.inplace import recover_file

    with _key(arguments) as key, _progress(arguments.file, "recovering") as progress:
        header = recover_file(arguments.file, key, undo=arguments.undo, threads=arguments.threads, progress=progress)
    yield f"{arguments.file}: whole, {'not locked' if header is None else 'locked'}"


def _rekey(arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.checkpoints.sharded import rekey_checkpoint
    from deeplock_kernels.checkpoints.streaming import rekey_file

    with (
        _key(arguments) as key,
        _key(arguments, "new_", twice=True) as new_key,
        _progress(arguments.input, "rekeying") as progress,
        _at(arguments.input, arguments) as (place, whole, options),
    ):
        _spare_key_files(arguments)
        header = (rekey_checkpoint if whole else rekey_file)(
            place, arguments.output, key, new_key, threads=arguments.threads, progress=progress, **options
        )
    yield f"{arguments.output}: {len(header.tensors)} tensors locked under the new key and sealed"


def _verify(arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.checkpoints.sharded import verify_checkpoint
    from deeplock_kernels.checkpoints.streaming import verify_file

    with (
        _key(arguments) as key,
        _progress(arguments.file, "verifying") as progress,
        _at(arguments.file, arguments) as (place, whole, options),
    ):
        verify = verify_checkpoint if whole else verify_file
        header = verify(place, key, threads=arguments.threads, progress=progress, **options)
    nbytes = sum(record.nbytes for record in header.tensors.values())
    yield f"{arguments.file}: as it was locked, {len(header.tensors)} tensors, {nbytes:,} bytes"


def _wrap_key(arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.key_wrapping import wrap_key

    with _key(arguments, twice=True) as master:
        wrap_key(arguments.output, master, bits=arguments.bits)
    yield f"{arguments.output}: a new data key of {arguments.bits} bits, wrapped; without its master key nobody has it"


def _rewrap_key(arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.key_wrapping import rewrap_key

    with _key(arguments) as old_master, _key(arguments, "new_", twice=True) as new_master:
        rewrap_key(arguments.input, arguments.output, old_master, new_master)
    yield f"{arguments.output}: the same data key, wrapped by the new master key"


def _count(things: Sized, name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _inspect(arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.checkpoints.directory import checkpoint_at, read_checkpoint
    from deeplock_kernels.checkpoints.streaming import opened
    from deeplock_kernels.header import LockHeader

    place = checkpoint_at(arguments.file)
    if place is None:
        with opened(arguments.file, "path") as model:
            kind, layout = model.format.name, model.layout
        tensors, shards = layout.tensors, ""
        header = None if layout.header is None else LockHeader.from_json(layout.header)
    else:
        checkpoint = read_checkpoint(place)
        kind, tensors, shards = "safetensors", checkpoint.tensors, f" in {_count(checkpoint.shards, 'shard')}"
        header = checkpoint.header() if checkpoint.is_locked else None
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    yield (
        f"{arguments.file}: {kind}, {_count(tensors, 'tensor')}{shards}, {nbytes:,} bytes, "
        f"{'not locked' if header is None else 'locked'}"
    )
    if header is not None:
        sbox = header.sbox if isinstance(header.sbox, str) else f"with SHA-256 {header.sbox['sha256']}"
        yield (
            f"format {header.format}, schedule {header.schedule}, S-Box {sbox}, key of {header.key_bits} bits"
        )
        if header.passphrase is not None:
            n, r, p, _salt = header.passphrase
            yield f"the key is made from a passphrase, by scrypt with n {n}, r {r}, p {p}"
        if header.schedule == "expansion":
            yield "warning: this schedule can give away the key, by one known block of weights or by their sizes alone"
    width = max((len(ascii(name)) for name in tensors), default=0)
    for name, tensor in tensors.items():
        record = header.tensors.get(name) if header is not None else None
        state = "plain" if record is None else "locked, sealed" if record.seal else "locked"
        yield (
            f"  {name!a:{width}}  {tensor.dtype:8} {list(tensor.shape)!s:20} {tensor.nbytes:>14,} bytes  {state}"
        )


def _tiers(_arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.runtime.tiers import tiers

    yield f"{'tier':10}{'supported':11}{'active':8}{'constant time':15}made of"
    for tier in tiers():
        supported, active, constant = (
            "yes" if flag else "no" for flag in (tier.supported, tier.active, tier.constant_time)
        )
        yield f"{tier.name:10}{supported:11}{active:8}{constant:15}{tier.description}"


def _sboxes(_arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.sboxes import SBOXES

    yield "An S-Box is public and adds no secrecy here: these numbers describe the tables."
    titles = ("name", "nonlinearity", "uniformity", "boomerang", "degree", "fixed points", "SHA-256")
    yield "{:12}{:>13}{:>12}{:>11}{:>8}{:>14}  {}".format(*titles)
    for name, box in SBOXES.items():
        found = box.properties()
        yield (
            f"{name:12}{found.nonlinearity:13}{found.differential_uniformity:12}{found.boomerang_uniformity:11}"
            f"{found.min_degree:8}{len(found.fixed_points):14}  {box.sha256[:16]}"
        )
        for weakness in found.weaknesses:
            yield f"{'':12}  {weakness}"


def _bench(arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels import measure
    from deeplock_kernels.runtime.pool import resolve_threads
    from deeplock_kernels.runtime.tiers import use_tier

    if arguments.tier is not None:
        use_tier(arguments.tier)
    threads = resolve_threads(arguments.threads)
    data, copy = measure.aligned(arguments.size), measure.aligned(arguments.size)
    work = measure.limits(data, copy, threads) | measure.locks(data, copy, threads) | measure.peers(data)
    yield measure.environment(threads)
    yield f"{arguments.size:,} bytes in place, median of {arguments.rounds} rounds [lowest to highest]"
    for name, figure in measure.measure(work, data.nbytes, arguments.rounds).items():
        yield f"  {name:40}{figure.row()}"
    seconds = sorted(measure.first_lock_seconds())
    yield (
        f"  {'process start to first locked MiB':40}{seconds[len(seconds) // 2]:7.2f} s"
        f"     [{seconds[0]:6.2f} to {seconds[-1]:6.2f}]  with compiled kernels in the cache"
    )


def _warmup(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.into is not None:
        os.environ["DEEPLOCK_CACHE_DIR"] = arguments.into
    from tqdm import tqdm

    from deeplock_kernels.runtime import codecache
    from deeplock_kernels.runtime.tiers import warmup

    if arguments.into is not None and codecache.directory(create=True) is None:
        raise FileAccessError(
            f"{arguments.into}: it cannot be a cache; accepted is a directory that nobody else can write, or a new one"
        )
    with tqdm(desc="compiling", unit=" kernels", leave=False, disable=None, file=sys.stderr) as bar:
        count = warmup(arguments.tier, bar.update)
    yield f"{codecache.directory() or 'no cache to be used'}: {count} kernels are ready"


def _demo(arguments: argparse.Namespace) -> Iterator[str]:
    from deeplock_kernels.demo.show import show

    yield from show(quick=arguments.quick)


if __name__ == "__main__":
    sys.exit(main())
