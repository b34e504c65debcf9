"""A plan of a run before it: the memory of each process, in parts, the seconds of a step, and what fits."""
