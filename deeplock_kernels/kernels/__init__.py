"""The kernels: one file of primitives per processor tier, and the loops, written once, that are built over them.

Every kernel is a plain C function of 64-bit integers (addresses, lengths, positions) that returns nothing, never
raises, takes no lock and holds no secret of its own: keys are arguments. `signatures.py` names them all.
"""
