"""The Triton kernels. Importing this package imports no triton; each op imports its kernels when it first runs them."""
