"""Measurements: interleaved runs, medians, ratios; each prints JSON. The entry is `runner.run_bench`."""
