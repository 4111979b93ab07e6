"""A kernel that reads and does nothing else: what reading memory can take at best."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(x_ptr, sums_ptr, BLOCK: tl.constexpr):
    """sums (n / BLOCK,) of x (n,), fp32; grid (n / BLOCK,)."""
    block = tl.program_id(0).to(tl.int64)
    x = tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(sums_ptr + block, tl.sum(x, 0))
