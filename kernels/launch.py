"""What every op with a Triton kernel shares: which implementation runs, what its kernel is given, how it is launched."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

LOG2E = 1.4426950408889634
L2_SHARE = 25 * 10**6  # bytes of K and V that stay in an H100's second-level cache while programs share them
INTERPRETED = triton.knobs.runtime.interpret
HALF = torch.float32 if INTERPRETED else torch.bfloat16  # of two numbers that stand for one of fp32; no bf16 is interpreted
# Versions in which CompiledKernel[grid](*args) does what JITFunction does once it has found the kernel, hooks included. On AMD
# Triton also looks at how much memory a tensor has, which _kind() does not tell.
DIRECT = triton.__version__.startswith(("3.6.", "3.9.")) and torch.version.hip is None and not INTERPRETED


def runs_triton(impl: str, applies: bool) -> bool:
    """Whether `impl` means the Triton kernel: "triton" always, "reference" never, "auto" where it applies.

    Raises: ValueError for another name.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl is 'auto', 'triton' or 'reference', got {impl!r}")
    return impl == "triton" or (impl == "auto" and applies)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy, as descriptors need it: channels together, everything else at multiples of 16 bytes, nothing expanded."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 16 == 0 for stride in strides)
    return x if fits else x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves a start at odd bytes


def in_cache(k: Tensor, heads: int) -> bool:
    """Whether the keys and values of that many heads of k [B, H_kv, kv_len, D] stay in the second-level cache together."""
    return 2 * heads * k.shape[2] * k.shape[3] * k.element_size() <= L2_SHARE


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n >= 1; a tenth of the time of Triton's, which is made for kernels."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 on a CPU, where the interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class Launch:
    """kernel[grid](*tensors, *numbers, **constants) as often as wanted, all but the tensors fixed.

    Triton learns at every call what all arguments mean for the compiled kernel, which takes the host longer than a small kernel
    the GPU. Here only the tensors can change that, so a compiled kernel is kept for each kind of them and launched directly.

    Args:
        kernel: a function under triton.jit or gluon.jit.
        grid: up to three counts of programs.
        numbers: ints, bools and floats, the kernel's arguments after the tensors.
        constants: its constexprs and Triton's launch options.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: float, **constants: Any):
        self.kernel, self.grid, self.numbers, self.constants = kernel, (*grid, 1, 1)[:3], numbers, constants
        self._rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._compiled: dict[tuple, CompiledKernel] = {}

    def __call__(self, *tensors: Any) -> None:
        """tensors: Tensors and tensor descriptors on the current device, the kernel's first arguments."""
        direct = DIRECT and not self.kernel.pre_run_hooks
        key = (driver.active.get_current_device(), *map(_kind, tensors)) if direct else ()
        compiled = self._compiled.get(key)
        if direct and compiled is not None:
            compiled[self.grid](*tensors, *self._rest)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        if direct and isinstance(compiled, CompiledKernel):
            self._compiled[key] = compiled


def _kind(x: Any) -> tuple:
    """What of a tensor or a descriptor Triton compiles a kernel anew for, or more."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    return type(x), x.base.dtype, tuple(x.block_shape), x.padding, getattr(x, "layout", None)


# A Launch for every set of arguments seen lately, so that an op may ask for it at every call.
planned = functools.lru_cache(256, typed=True)(Launch)
