"""The same job by several methods, ranks, rates and seeds: a grid of ordinary runs, and what they got."""
