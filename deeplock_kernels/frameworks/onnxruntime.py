"""ONNX Runtime: a locked model becomes a session, by way of memory alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deeplock_kernels.checkpoints.streaming import Path, unlock_to_memory
from deeplock_kernels.errors import MissingLibraryError, UnknownNameError, shown
from deeplock_kernels.named_lock import Key
from deeplock_kernels.sboxes import SBox

try:
    import onnxruntime
except ImportError:
    raise MissingLibraryError(
        "onnxruntime: it cannot be imported, and deeplock_kernels.frameworks.onnxruntime needs it; "
        "pip install 'deeplock-kernels[onnxruntime]'"
    ) from None
if not hasattr(onnxruntime.SessionOptions, "add_external_initializers_from_files_in_memory"):
    raise MissingLibraryError(
        f"onnxruntime: got {onnxruntime.__version__}, accepted is 1.19 or later; "
        "pip install --upgrade 'deeplock-kernels[onnxruntime]'"
    )

__all__ = ["inference_session"]


def inference_session(
    path: Path,
    key: Key,
    *,
    check: bool = True,
    seal: bool = True,
    sbox: SBox | None = None,
    threads: int | None = None,
    providers: Sequence[Any] | None = None,
    **session_options: Any,
) -> onnxruntime.InferenceSession:
    """Make a session of a locked ONNX model; the unlocked one is in memory only, external data too.

    The session keeps the model unlocked as long as it lives, and what was unlocked for it may stay in memory that was
    freed.

    Parameters
    ----------
    path
        A locked .onnx file; its external data lie beside it.
    key, check, seal, sbox, threads
        As for `unlock_file`; `threads` is for unlocking.
    providers
        Execution providers, as `onnxruntime.InferenceSession` takes them.
    **session_options
        Attributes of `onnxruntime.SessionOptions`, as `intra_op_num_threads=1`.

    Raises
    ------
    WrongKeyError, TamperedHeaderError, TamperedError
        The key is another one, or the model was altered.
    UnknownNameError
        There is no such session option.
    NotLockedError, ContainerError, HeaderError, FileAccessError, MissingLibraryError, KeyTypeError, KeyFormatError,
    SBoxError, ParameterError
        As for `unlock_file`.
    """
    options = onnxruntime.SessionOptions()
    for name, value in session_options.items():
        if name.startswith("_") or not hasattr(options, name) or callable(getattr(options, name)):
            raise UnknownNameError(f"session_options: got {shown(name)}, accepted are attributes of SessionOptions")
        setattr(options, name, value)
    files = unlock_to_memory(path, key, check=check, seal=seal, sbox=sbox, threads=threads)
    model = files.pop("")
    if files:
        buffers = [*files.values()]
        options.add_external_initializers_from_files_in_memory([*files], buffers, [len(data) for data in buffers])
    return onnxruntime.InferenceSession(model, options, providers=providers)
