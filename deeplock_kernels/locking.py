"""Lock, unlock and substitute the bytes of one buffer: check everything, plan, run."""

from __future__ import annotations

from typing import Any

from deeplock_kernels import buffers
from deeplock_kernels.errors import BufferTypeError, UnknownNameError, shown
from deeplock_kernels.runtime.pool import resolve_threads, run_one
from deeplock_kernels.runtime.tiers import Tier, active_tier
from deeplock_kernels.sboxes import AES, SBOXES, SBox
from deeplock_kernels.schedules import SCHEDULES, CounterSchedule, Schedule
from deeplock_kernels.schedules.base import MAX_OFFSET, check_range
from deeplock_kernels.transform import Transform

_NO_SCHEDULE = object()  # what None must never mean
_latest: dict[str, tuple[Transform, object, Tier]] = {}  # the transform of the last few bytes, per direction


def lock(
    data: Any,
    schedule: Schedule,
    *,
    sbox: SBox | str = AES,
    offset: int = 0,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """Lock bytes: c[i] = S[p[i] XOR k[offset + i]] (Deep-Lock, arXiv 2008.05966).

    Parameters
    ----------
    data
        What to lock, as the flat sequence of its bytes: an array of any dtype and shape, a CPU tensor, or any other
        contiguous buffer.
    schedule
        Gives the key stream k.
    sbox
        The S-Box S, or the name of one. It is public; the secrecy of the result rests on the key stream alone.
    offset
        The position in the key stream of the first byte, up to 2^63 less the length.
    out
        Where to write: `data` itself for in place, or separate memory of the same number of bytes. By default a new
        array (a tensor for a tensor) of the same shape and dtype.
    threads
        How many threads at most; None for `get_num_threads()`.

    Returns
    -------
    `out`, or the new array or tensor.

    Raises
    ------
    BufferTypeError, BufferLayoutError, ReadOnlyError, SizeMismatchError, OverlapError
        `data` or `out` is no memory that can be used so; nothing was changed.
    ParameterError, UnknownNameError
        `offset` or `threads` is out of range, or there is no such S-Box.
    """
    return _apply("lock", data, schedule, sbox, offset, out, threads)


def unlock(
    data: Any,
    schedule: Schedule,
    *,
    sbox: SBox | str = AES,
    offset: int = 0,
    out: Any = None,
    threads: int | None = None,
) -> Any:
    """Undo `lock`: p[i] = S^-1[c[i]] XOR k[offset + i].

    Parameters, return value and errors are those of `lock`. A wrong key is not noticed here: it gives nonsense.
    """
    return _apply("unlock", data, schedule, sbox, offset, out, threads)


def substitute(
    data: Any, sbox: SBox | str, *, inverse: bool = False, out: Any = None, threads: int | None = None
) -> Any:
    """Replace each byte by S[x], or by S^-1[x]; no key is involved, so this hides nothing.

    Parameters
    ----------
    data, out, threads
        As for `lock`.
    sbox
        The S-Box S, or the name of one.
    inverse
        Whether to apply S^-1.

    Returns
    -------
    `out`, or the new array or tensor.

    Raises
    ------
    BufferTypeError, BufferLayoutError, ReadOnlyError, SizeMismatchError, OverlapError, ParameterError, UnknownNameError
        As for `lock`.
    """
    return _apply("unlock" if inverse else "lock", data, _NO_SCHEDULE, sbox, 0, out, threads)


def find_sbox(sbox: object, argument: str = "sbox") -> SBox:
    """Give an SBox for an SBox or a name.

    Raises
    ------
    UnknownNameError
        There is no S-Box of that name.
    """
    if isinstance(sbox, SBox):
        return sbox
    if isinstance(sbox, str) and sbox in SBOXES:
        return SBOXES[sbox]
    raise UnknownNameError(f"{argument}: got {shown(sbox)}, accepted are an SBox or one of {', '.join(SBOXES)}")


def _apply_to_few(
    direction: str, data: Any, schedule: CounterSchedule, sbox: object, offset: object
) -> bool:
    """Do what `_apply` does for few bytes in place, in as few steps as Python allows, or nothing at all."""
    address = buffers.writable_address(data)
    if not address:
        return False
    transform, known, tier = _latest.get(direction, (None, None, None))
    if known is not sbox or tier is not active_tier() or transform is None:
        tier = active_tier()
        transform = Transform.of(find_sbox(sbox), direction, tier)
        _latest[direction] = transform, sbox, tier
    nbytes = data.nbytes
    if not 0 < nbytes <= transform.small or type(offset) is not int or not 0 <= offset <= MAX_OFFSET - nbytes:
        return False
    function, record = schedule.in_place(transform, address, nbytes, offset)
    transform.prepare_undo()
    buffers.note_written(data)
    run_one(function, (record,), transform.revert)
    return True


def _apply(
    direction: str,
    data: Any,
    schedule: object,
    sbox: object,
    offset: int,
    out: Any,
    threads: int | None,
) -> Any:
    if (
        out is data
        and type(schedule) is CounterSchedule
        and (threads is None or (type(threads) is int and threads > 0))
        and _apply_to_few(direction, data, schedule, sbox, offset)
    ):
        return data
    source = buffers.memory(data)
    if schedule is not _NO_SCHEDULE and not isinstance(schedule, Schedule):
        raise BufferTypeError(
            f"schedule: got {type(schedule).__name__}, accepted is a schedule "
            f"({', '.join(kind.__name__ for kind in SCHEDULES.values())})"
        )
    box = find_sbox(sbox)
    offset = check_range(offset, source.nbytes)
    transform = Transform.of(box, direction, active_tier())
    few = threads is None and source.nbytes <= transform.small
    count = 1 if few else resolve_threads(threads)
    if isinstance(schedule, Schedule):
        schedule.ready()
    result = buffers.new_like(data) if out is None else out
    target = buffers.output_memory(result, source)
    if source.nbytes == 0:
        return result
    piece = transform.piece(source.nbytes, count)
    if not isinstance(schedule, Schedule):
        calls = [
            transform.call(
                "substitute", 0, target.address + i, source.address + i, min(piece, source.nbytes - i)
            )
            for i in range(0, source.nbytes, piece)
        ]
    else:
        calls = schedule.calls(transform, target.address, source.address, source.nbytes, offset, piece)
    buffers.note_written(result)
    transform.run(calls, count, in_place=target.address == source.address)
    return result
