"""What every op with a Triton kernel shares: which implementation runs, and what its kernel may be given."""

from __future__ import annotations

from torch import Tensor

LOG2E = 1.4426950408889634


def runs_triton(impl: str, applies: bool) -> bool:
    """Whether `impl` means the Triton kernel: "triton" always, "reference" never, "auto" where it applies.

    Raises: ValueError for another name.
    """
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl is 'auto', 'triton' or 'reference', got {impl!r}")
    return impl == "triton" or (impl == "auto" and applies)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy, as descriptors need it: channels together, everything else at multiples of 16 bytes."""
    strides = [stride * x.element_size() for stride in x.stride()[:-1]]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)
    return x if fits else x.contiguous()
