"""The `torch.ops.longgen_kernels` operators: functional, with fake implementations and autograd."""
