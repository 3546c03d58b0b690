"""The gates before every timing: errors of outputs and gradients on samples."""

from __future__ import annotations

import pytest
import torch

from sparsebench.kernels import BlockMask
from sparsebench.methods.a_shape import AShape
from sparsebench.methods.base import dense_mask, select
from sparsebench.methods.minference import MInference
from sparsebench.methods.random_blocks import RandomBlocks
from sparsebench.suites.checks import MOST_ERROR, MOST_GRADIENT_ERROR, Case, gradient_error, sampled_error

pytestmark = pytest.mark.usefixtures("one_thread")
SCALE = 0.25


def tensors(q_len, kv_len):
    return torch.randn(1, 4, q_len, 16), torch.randn(1, 2, kv_len, 16), torch.randn(1, 2, kv_len, 16)


def exact(q, k, v, mask):
    """The definition in fp64 from the pairs of mask.tokens()."""
    tokens = mask.tokens().repeat_interleave(q.shape[1] // mask.kv_num_blocks.shape[1], dim=1)
    k, v = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
    return (q.double() @ k.mT * SCALE).masked_fill(~tokens, float("-inf")).softmax(-1) @ v


def columns_in_the_future(q_len, kv_len):
    """A single column of every row that only the last row can see."""
    rows = -(-q_len // 64)
    first = torch.zeros(1, 1, rows, 1, dtype=torch.int32)
    ones, column = torch.ones(1, 1, rows, dtype=torch.int32), torch.full_like(first, kv_len - 3)
    return BlockMask(ones, first, q_len, kv_len, 64, 64, column, ones).check()


def tri_shape(q_len, kv_len):
    mask = select(RandomBlocks(density=1.0), *tensors(q_len, kv_len))
    return BlockMask(mask.kv_num_blocks, mask.kv_indices, q_len, kv_len, 64, 64, window=30, sink=7, last=100)


MASKS = {
    "blocks": lambda q_len, kv_len: select(RandomBlocks(density=0.3), *tensors(q_len, kv_len)),
    "window": lambda q_len, kv_len: select(AShape(init=5, local=70), *tensors(q_len, kv_len)),
    "columns": lambda q_len, kv_len: select(MInference(vertical=40, slash=60), *tensors(q_len, kv_len)),
    "future": columns_in_the_future,
    "last": tri_shape,
}


@pytest.mark.parametrize("lengths", [(512, 512), (413, 413), (200, 413)])
@pytest.mark.parametrize("kind", MASKS)
def test_sampled_error_is_that_of_the_selection(kind, lengths):
    mask = MASKS[kind](*lengths)
    q, k, v = tensors(*lengths)
    out = exact(q, k, v, mask)
    assert sampled_error(out, q, k, v, mask, SCALE) < 1e-5
    assert sampled_error(1.02 * out, q, k, v, mask, SCALE) == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("row", [0, 256, 511])
def test_sampled_error_sees_one_wrong_row_of_the_sampled_blocks(row):
    q, k, v = tensors(512, 512)
    mask = MASKS["window"](512, 512)
    wrong = exact(q, k, v, mask)
    wrong[:, 2, row] += 3
    assert sampled_error(wrong, q, k, v, mask, SCALE) > MOST_ERROR
    wrong[:, 2, row] = float("nan")
    assert sampled_error(wrong, q, k, v, mask, SCALE) == float("inf")


def test_sampled_error_tells_the_selection_from_its_neighbours():
    """A kernel that forgets the window, or takes one block more, is not right by accident."""
    q, k, v = tensors(512, 512)
    window, wider = (select(AShape(init=5, local=n), q, k) for n in (70, 71))
    assert sampled_error(exact(q, k, v, wider), q, k, v, window, SCALE) > MOST_ERROR
    fewer, more = (select(RandomBlocks(density=d), q, k) for d in (0.3, 0.4))
    assert sampled_error(exact(q, k, v, more), q, k, v, fewer, SCALE) > MOST_ERROR


GRADIENT_MASKS = {
    **{name: MASKS[name] for name in ("blocks", "window", "last")},
    "shared": lambda n, m: select(RandomBlocks(density=0.3), torch.randn(1, 2, n, 16), torch.randn(1, 2, m, 16)),
    "small": lambda n, m: select(RandomBlocks(density=0.3, block=32), torch.randn(1, 4, n, 16), torch.randn(1, 2, m, 16)),
    "dense": lambda n, m: dense_mask(n, m),
}


@pytest.fixture
def gradients(request):
    """(Case, gradients of the definition, its output, the gradient that came in)"""
    kind, lengths = request.param
    q, k, v = tensors(*lengths)
    mask = GRADIENT_MASKS[kind](*lengths)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = exact(*leaves, mask)
    grad = torch.randn(out.shape)
    return Case(q, k, v, mask, SCALE), torch.autograd.grad(out, leaves, grad.double()), out.detach(), grad


@pytest.mark.parametrize("gradients", [(kind, (413, 413)) for kind in GRADIENT_MASKS], indirect=True)
def test_gradient_error_is_that_of_the_selection(gradients):
    case, right, out, grad = gradients
    assert gradient_error(right, out, grad, case) < 1e-4
    for which in range(3):
        wrong = [x.clone() for x in right]
        wrong[which] *= 1.03
        assert gradient_error(tuple(wrong), out, grad, case) == pytest.approx(0.03, rel=1e-2)


@pytest.mark.parametrize("gradients", [("blocks", (300, 413)), ("blocks", (512, 512))], indirect=True)
@pytest.mark.parametrize("which, token", [(0, 0), (0, -1), (1, 3), (1, -1), (2, 3), (2, -1)])
def test_gradient_error_sees_one_wrong_token_of_the_samples(gradients, which, token):
    case, right, out, grad = gradients
    wrong = [x.clone() for x in right]
    wrong[which][:, 1, token] += 10
    assert gradient_error(tuple(wrong), out, grad, case) > MOST_GRADIENT_ERROR
    wrong[which][:, 1, token] = float("nan")
    with pytest.raises(ArithmeticError, match="gradients differ from the reference by inf"):
        case.check_gradients(tuple(wrong), out, grad)


@pytest.mark.parametrize("gradients", [("blocks", (512, 512))], indirect=True)
def test_gradient_error_counts_every_query_of_a_key(gradients):
    """A backward that forgets one block of queries, none of the sampled ones, is seen in the keys."""
    case, _, out, grad = gradients
    row = int(case.mask.dense()[0, 0, 1:, 0].nonzero()[0]) + 1  # one that chose the first key block
    forgetful = grad.clone()
    forgetful[:, 0, row * 64 : (row + 1) * 64] = 0
    leaves = [x.double().requires_grad_() for x in (case.q, case.k, case.v)]
    dq, dk, dv = torch.autograd.grad(exact(*leaves, case.mask), leaves, forgetful.double())
    assert gradient_error((dq, dk, dv), out, grad, case) > MOST_GRADIENT_ERROR


def test_gradients_of_single_columns_are_not_checked_and_so_not_timed():
    case = Case(*tensors(413, 413), MASKS["columns"](413, 413), SCALE)
    with pytest.raises(ValueError, match="without single columns"):
        case.check_gradients((case.q, case.k, case.v), case.q, case.q)
