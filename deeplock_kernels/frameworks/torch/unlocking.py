"""Unlocks the layers of a module one after the other into scratch memory, and the next ones ahead of time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from deeplock_kernels.errors import LayerError
from deeplock_kernels.frameworks.torch.scratch import Group, Layer, Locked, Scratch
from deeplock_kernels.named_lock import NamedLock

_SLACK = 16  # a buffer is larger by that part of the largest layer, so that small ones fit beside it
_WORTH_A_THREAD = 256 << 10  # bytes of a group from which on it is unlocked ahead


class _Held:
    """A group that is unlocked, or about to be, in a buffer of its own.

    Attributes
    ----------
    left
        How many more times one of its layers is to run.
    running
        How many of its layers run now.
    """

    def __init__(self, group: Group, scratch: Scratch) -> None:
        self.group, self.scratch = group, scratch
        self.left, self.running = group.uses, 0
        self.outcome: SimpleQueue[BaseException | None] | None = None  # of unlocking it ahead

    def wait(self) -> None:
        """Wait until it is unlocked."""
        if self.outcome is not None:
            error = self.outcome.get()
            self.outcome = None
            if error is not None:
                raise error


class Unlocking:
    """Opens and closes layers while a module runs.

    The first call unlocks each layer for itself, and learns the order. Later calls unlock as many layers together as
    take hardly more room than the largest one, and the next ones beside them, where threads are given for that: two
    buffers at a time, and one more for each layer that others run within.

    Parameters
    ----------
    layers
        All that there are.

    Attributes
    ----------
    largest
        The bytes of the largest layer.
    peak_bytes
        The greatest number of plain bytes at a time in the last call.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.largest = max((layer.nbytes for layer in layers), default=0)
        self._room = self.largest + self.largest // _SLACK
        self._order: list[Layer] = []
        self._course: list[Group] = []  # the group of each layer in the order
        self.forget()

    def forget(self) -> None:
        """Drop whatever a call that never ended has left."""
        for scratch in getattr(self, "_all", ()):
            scratch.wipe()
        self._all: list[Scratch] = []
        self._free: list[Scratch] = []
        self._lock: NamedLock | None = None
        self.peak_bytes = 0

    @contextmanager
    def call(self, lock: NamedLock, threads: int, *, ahead: int, seal: bool) -> Iterator[None]:
        """Let layers be opened with a lock's keys, on that many threads, or ahead of time; the end wipes everything."""
        self._threads, self._ahead, self._seal = threads, ahead, seal
        self._seen: list[Layer] = []
        self._enclosing: set[Layer] = set()
        self._running: list[Layer] = []
        self._held: dict[Group, _Held] = {}
        self._shown: dict[str, Tensor] = {}  # what stands in for each tensor now
        self._on_course, self.peak_bytes = True, 0
        self._helper: _Helper | None = None
        self._lock = lock
        try:
            yield
            if self._seen != self._order:
                self._learn()
        finally:
            self._lock = None
            try:
                if self._helper is not None:
                    self._helper.end()
            finally:
                for scratch in self._all:
                    scratch.wipe()
                self._free = [*self._all]

    def open(self, layer: Layer) -> tuple[_Held, list[Tensor]]:
        """Unlock a layer; what this gives is for `close`."""
        if self._lock is None:
            raise LayerError("module: its copy runs outside of the call that has the key; call the KeyedModule")
        with torch._C.DisableTorchFunction():  # a Watch is for what the module does
            held = self._hold(self._group_of(layer))
            held.wait()
            held.running += 1
            before = [self._shown.get(tensor.name, tensor.nothing) for tensor in layer.tensors]
            self._show(layer, held.scratch.views(layer, held.group.layers[layer]))
            self._running.append(layer)
            return held, before

    def close(self, layer: Layer, held: _Held, before: list[Tensor]) -> None:
        """Take the layer's tensors away; their memory is for the next ones."""
        with torch._C.DisableTorchFunction():
            self._show(layer, before)
        self._running.pop()
        held.running -= 1
        held.left -= 1
        if not held.running and (not held.left or not self._on_course):
            self._release(held)

    def kept(self, result: Any) -> Any:
        """Give what a layer returned, copied where it is the layer's own weights."""
        storages = {scratch.storage for scratch in self._all}

        def own(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor

        with torch._C.DisableTorchFunction():
            if all(own(tensor) is tensor for tensor in tensors_within(result)):
                return result
            return tree_map_only(Tensor, own, result)

    def _show(self, layer: Layer, data: list[Tensor]) -> None:
        for tensor, shown in zip(layer.tensors, data, strict=True):
            tensor.stand_in.data = self._shown[tensor.name] = shown

    def _group_of(self, layer: Layer) -> Group:
        self._enclosing.update(self._running)
        position = len(self._seen)
        self._seen.append(layer)
        if self._on_course and self._order[position : position + 1] != [layer]:
            self._on_course = False
            for held in [*self._held.values()]:
                if not held.running:
                    with suppress(Exception):  # nobody asks for it any more
                        held.wait()
                    self._release(held)
        return self._course[position] if self._on_course else Group(layer)

    def _hold(self, group: Group) -> _Held:
        """Give a group that is unlocked, or will be when it is waited for, and begin with the next one."""
        held = self._held.get(group)
        if held is None:
            held = self._begin(group)
            self._unlock(held, self._threads)
        if self._ahead and self._on_course and not held.running and held.left == group.uses:
            self._look_ahead(group)
        return held

    def _begin(self, group: Group) -> _Held:
        # Of several buffers the one in which least has to be wiped, and most is overwritten.
        if self._free:
            scratch = min(self._free, key=lambda each: (max(each.plain - group.nbytes, 0), -each.plain))
            self._free.remove(scratch)
        else:
            scratch = Scratch(self._room)
            self._all.append(scratch)
        held = self._held[group] = _Held(group, scratch)
        return held

    def _release(self, held: _Held) -> None:
        if self._held.pop(held.group, None) is held:
            self._free.append(held.scratch)

    def _unlock(self, held: _Held, threads: int) -> None:
        lock = self._lock
        assert lock is not None
        ranges = held.scratch.ranges(held.group)
        self.peak_bytes = max(self.peak_bytes, sum(each.plain for each in self._all))
        if self._seal:
            lock.expect(lock.unlock_and_seal(ranges, threads))
        else:
            lock.unlock(ranges, threads)

    def _look_ahead(self, group: Group) -> None:
        """Begin to unlock the group behind one that is about to run."""
        following = next((each for each in self._course[len(self._seen) :] if each is not group), None)
        if following is None or following in self._held or following.nbytes < _WORTH_A_THREAD:
            return
        if self._helper is None:
            self._helper = _Helper()
        if self._helper.started:
            held = self._begin(following)
            held.outcome = self._helper.give(partial(self._unlock, held, self._ahead))

    def _learn(self) -> None:
        """Group the layers in the order in which they were seen."""
        self._order, self._course = self._seen, []
        for scratch in self._all:
            scratch.forget()
        group: Group | None = None
        for layer in self._order:
            if layer in self._enclosing:
                self._course.append(Group(layer))
                continue
            more = 0 if group is not None and layer in group.layers else layer.nbytes
            if group is None or group.nbytes + more > self._room:
                group = Group(layer)
            else:
                group.add(layer)
            self._course.append(group)


class _Helper:
    """A thread that unlocks ahead; it lives no longer than a call, so no fork and no exit meets it."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="deeplock", daemon=True)
        self.started = False
        with suppress(RuntimeError):  # at interpreter exit, or where no more threads are allowed
            self._thread.start()
            self.started = True

    def give(self, work: Any) -> SimpleQueue[BaseException | None]:
        """Give it work, and say where its outcome will be."""
        outcome: SimpleQueue[BaseException | None] = SimpleQueue()
        self._work.put((work, outcome))
        return outcome

    def end(self) -> None:
        """Let it finish."""
        self._work.put(None)
        if self.started:
            self._thread.join()

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            work, outcome = item
            try:
                work()
                outcome.put(None)
            except BaseException as error:
                outcome.put(error)
            del item, work, outcome


class Watch(TorchFunctionMode):
    """Refuses every operation on a locked tensor whose layer does not run."""

    def __init__(self, locked: Sequence[Locked]) -> None:
        super().__init__()
        self._stand_ins = {id(one.stand_in): one for one in locked}
        self._storages = {one.like.untyped_storage().data_ptr(): one for one in locked}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operands, then go on."""
        for tensor in tensors_within((args, kwargs)):
            one = self._stand_ins.get(id(tensor)) if tensor.numel() == 0 else None
            one = one or self._storages.get(tensor.untyped_storage().data_ptr())
            if one is not None:
                raise LayerError(
                    f"tensors[{one.name!r}]: it is used while the module that owns it does not run, so it is locked; "
                    "give the class of the module that uses it in `layers`, or use it through a module of its own"
                )
        return function(*args, **(kwargs or {}))


def tensors_within(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_within(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_within(item)
