"""The tests' own test: breaks the product in many ways, one at a time, and demands that a test fails for each.

`python -m tests.mutation` does it, `mutants.py` lists the ways, `RESULTS.md` says which test noticed which.
"""
