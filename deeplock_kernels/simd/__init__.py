"""Vectors for Numba: a 64-byte and a 16-byte type, portable operations on them, and the instructions of each machine.

Every kernel works on `u8x64`, four AES blocks side by side, whatever the processor: where registers are narrower, the
compiler splits the portable operations and the tables of instructions split theirs. So a loop is written once.
"""
