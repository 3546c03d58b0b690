"""Launch gives Triton's launcher what kernel[grid](...) gives it, and never a kernel compiled for other arguments.

Without a GPU a driver stands in that compiles for Hopper and writes down what it is asked to launch, in a process of its own:
in this one the interpreter may run, and the driver is Triton's for good.
"""

import os
import subprocess
import sys

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from sparsebench.kernels.launch import aligned

SCRIPT = '''
import types
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

launches = []


class Launcher:
    def __init__(self, source, metadata):
        self.source = source

    def __call__(self, *args):
        launches.append((self.source.hash(), args))


class Driver:
    launcher_cls, device = Launcher, 0
    utils = types.SimpleNamespace(
        load_binary=lambda *_: (object(), 7, 10, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 232448},
        unload_module=lambda _: None,
    )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 100 + device


driver.set_active(Driver())
from sparsebench.kernels.launch import DIRECT, Launch


@triton.jit
def kernel(box, x, y, n, scale, flag, N: tl.constexpr, WIDE: tl.constexpr):
    b = box.load([0, 0])
    o = tl.arange(0, N)
    if flag:
        tl.store(x + n * o, tl.load(y + o) * scale + tl.sum(b))


def described(args):
    """Arguments as values that can be compared: descriptors and tensors by what they point at."""
    def one(a):
        if isinstance(a, TensorDescriptor):
            return a.base.data_ptr(), *a.shape, *a.strides, *a.block_shape
        if type(a).__name__ == "LazyDict":  # what hooks are told
            return a.data
        return a.data_ptr() if isinstance(a, torch.Tensor) else a
    return [(type(a).__name__, one(a)) for a in args]


def same(launch, tensors):
    """Direct, and by Triton: the same kernel and arguments."""
    launch(*tensors)
    kernel[launch.grid](*tensors, *launch.numbers, **launch.constants)
    (ours, ours_args), (theirs, theirs_args) = launches[-2:]
    assert ours == theirs, (tensors, launch.numbers)
    ours_args, theirs_args = described(ours_args), described(theirs_args)
    assert ours_args == theirs_args, (ours_args, theirs_args)
    return ours


x, y = torch.zeros(260), torch.zeros(64)
box = TensorDescriptor.from_tensor(torch.zeros(64, 64), [16, 16])
variants = set()
for numbers in ((1, 0.5, True), (2, 0.5, True), (16, 0.5, True), (2**40, 0.5, True), (1, 1, True), (1, 1.0, 1)):
    for constants in (dict(N=64, WIDE=1), dict(WIDE=True, N=32, num_warps=2))[: 2 if numbers[0] == 2 else 1]:
        launch = Launch(kernel, (3,), *numbers, **constants)
        for _ in range(2):  # the second time directly
            for tensors in (
                (box, x, y), (box, x[1:], y), (box, x[4:], y), (box, x, y.half()), (box, x, y.bfloat16()), (box, y, x),
                (TensorDescriptor.from_tensor(torch.zeros(64, 64), [16, 32]), x, y),
                (TensorDescriptor.from_tensor(torch.zeros(32, 64).half(), [16, 16]), x, y),
            ):
                variants.add(same(launch, tensors))
        assert DIRECT == bool(launch._compiled)
assert len(variants) >= 30, len(variants)

Driver.device = 1
same(launch, (box, x, y))
assert launches[-2][1][3] == 101  # the stream of that device

before = []
kernel.add_pre_run_hook(lambda *args, **kwargs: before.append(args))
launch(box, x, y)
assert before
'''


def test_launches_what_triton_launches(tmp_path):
    script = tmp_path / "launches.py"
    script.write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "ignore", str(script)], env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]


def test_what_a_descriptor_can_point_at_is_not_copied():
    for x in (torch.randn(1, 2, 9, 72).half()[..., 8:], torch.randn(1, 9, 2, 64).transpose(1, 2)):
        assert aligned(x) is x


UNFIT = {
    "starts at odd bytes": torch.randn(2 * 9 * 64 + 1).half()[1:].view(1, 2, 9, 64),
    "rows at odd bytes": torch.randn(1, 2, 9, 67).half()[..., :64],
    "channels apart": torch.randn(1, 2, 64, 9).half().transpose(2, 3),
    "one head for all": torch.randn(1, 1, 9, 64).half().expand(-1, 2, -1, -1),
    "one channel for all": torch.randn(1, 2, 9, 1).half().expand(-1, -1, -1, 64),
}


@pytest.mark.parametrize("x", UNFIT.values(), ids=UNFIT.keys())
def test_what_a_descriptor_cannot_point_at_is_copied(x):
    copy = aligned(x)
    assert torch.equal(copy, x)
    TensorDescriptor.from_tensor(copy, [1, 1, 8, 64])  # refuses what is not aligned
    assert 0 not in copy.stride()
