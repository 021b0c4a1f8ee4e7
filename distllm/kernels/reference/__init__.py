"""Every operation in plain torch: what the fast kernels are compared with, and what runs without a GPU."""
