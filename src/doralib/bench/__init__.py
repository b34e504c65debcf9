"""Measurements: interleaved runs, medians, ratios; each prints JSON."""
