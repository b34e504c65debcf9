"""What holds A and B of a layer, one kind a file; `low_rank` is the plain one."""
