"""Tools that prove GPU kernels without a GPU."""
