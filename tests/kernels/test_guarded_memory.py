"""The guard of conftest.py sees what a kernel touches outside of its tensors."""

import pytest
import torch
import triton
import triton.language as tl

from sparsebench.kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a guard of the interpreter")


@triton.jit
def copy_kernel(x, y, read, written, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < read, other=0.0), mask=o < written)


@pytest.mark.parametrize("read, written", [(8, 8), (9, 8), (8, 9)])
def test_a_kernel_stays_inside_its_tensors(read, written):
    x, y = torch.arange(8.0), torch.zeros(8)
    if read == written:
        copy_kernel[(1,)](x, y, read, written, BLOCK=16)
        assert torch.equal(x, y)
    else:
        with pytest.raises(Exception, match="1 of 9 addresses"):
            copy_kernel[(1,)](x, y, read, written, BLOCK=16)
