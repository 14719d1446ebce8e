"""What the paper claims, measured: `python -m benchmarks.paper`. One file is one study."""
