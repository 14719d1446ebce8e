"""What stands between the Python API and the kernels: tiers, their compiled code, its cache, and threads."""
