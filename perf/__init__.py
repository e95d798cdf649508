"""The comparison that `make perf` runs: hast beside what an administrator could pick instead, in one run.

Run as `python -m perf` from a built checkout; perf/__main__.py says what there is to choose.
"""
