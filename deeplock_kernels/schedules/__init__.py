"""Key schedules: which key byte masks which position. A new one is a file here and a line in `SCHEDULES`."""

from __future__ import annotations

from deeplock_kernels.schedules.base import Schedule
from deeplock_kernels.schedules.counter import CounterSchedule
from deeplock_kernels.schedules.expansion import ExpansionSchedule, expand_key

SCHEDULES: dict[str, type[Schedule]] = {"counter": CounterSchedule, "expansion": ExpansionSchedule}

__all__ = ["SCHEDULES", "CounterSchedule", "ExpansionSchedule", "Schedule", "expand_key"]
