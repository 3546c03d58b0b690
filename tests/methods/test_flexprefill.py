import dataclasses
import itertools
import re

import pytest
import torch

import sparsebench
from sparsebench.kernels import causal_blocks
from sparsebench.kernels.line_scores import line_scores
from sparsebench.kernels.selection import block_mean
from sparsebench.methods import METHODS, flexprefill
from sparsebench.methods.flexprefill import block_sums, js_distance, pooled_estimate

pytestmark = pytest.mark.usefixtures("one_thread")
FlexPrefill = METHODS["flexprefill"]
AWARE = 0.9  # above every distance: sqrt(ln 2) is the largest
SPARSE = dict(min_budget=None, block=32)  # sparse at 500 tokens


def settings(theirs, key):
    """(tag, fields) of every setting that has `key`."""
    for name in sorted(theirs.keys()):
        match = re.fullmatch(rf"(flex/b(\d+)/g([\d.]+)/t([\d.]+)/m(\d+)){key}", name)
        if match:
            block, gamma, tau, budget = match.groups()[1:]
            yield match[1], dict(gamma=float(gamma), tau=float(tau), min_budget=int(budget), block=int(block))


@pytest.mark.parametrize("case", ["A", "D"])
class TestConformance:
    def load(self, conformance, case):
        inputs = conformance(f"{case}_inputs")
        return (*(inputs[name][None].float() for name in ("q", "k", "v")), conformance(f"{case}_flexprefill"))

    def test_every_block_map(self, conformance, case, check_conforms):
        q, k, _, theirs = self.load(conformance, case)
        tags = list(settings(theirs, "/block_map.bits"))
        assert len(tags) == 40
        for tag, fields in tags:
            mask = sparsebench.select(FlexPrefill(**fields), q, k)
            check_conforms("flexprefill", case, tag, mask.dense()[0], theirs[f"{tag}/block_map.bits"])

    @pytest.mark.parametrize("block", [64, 128])
    def test_scores(self, conformance, case, block):
        q, k, _, theirs = self.load(conformance, case)
        scale = q.shape[-1] ** -0.5
        vertical, slash = block_sums(torch.stack(line_scores(q, k, scale, block)) / block, block)[:, 0]
        k_mean = block_mean(k, block).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        estimate = pooled_estimate(q, k_mean, block, scale)[0]
        ours = {
            "vertical": vertical[:, 1:], "slash": slash[:, 1:].flip(-1), "avg_qk": estimate,
            "js_distance": js_distance(estimate, vertical),
        }  # fmt: skip
        expected = {name: theirs[f"flex/b{block}/scores/{name}"] for name in ours}
        expected["vertical"], expected["slash"] = expected["vertical"][:, 1:], expected["slash"][:, :-1]
        for name, score in ours.items():
            assert (score - expected[name]).abs().max() < 2e-6, name

    def test_budgets_and_query_aware_heads(self, conformance, case):
        q, k, _, theirs = self.load(conformance, case)
        lines = {block: torch.stack(line_scores(q, k, q.shape[-1] ** -0.5, block)) / block for block in (64, 128)}
        kinds = set()
        for tag, fields in settings(theirs, "/num_vertical_blocks"):
            method, block = FlexPrefill(**fields), fields["block"]
            aware = theirs[f"{tag}/block_sparse_head"]
            assert torch.equal(aware, theirs[f"flex/b{block}/scores/js_distance"] < method.tau)
            ours = method.line_blocks(lines[block])[:, 0].where(~aware, method.min_blocks)
            for name, number in zip(("vertical", "slash"), ours):
                assert torch.equal(number, theirs[f"{tag}/num_{name}_blocks"].long())
            kinds |= set(aware.tolist())
        assert kinds == {False, True}

    def test_outputs(self, conformance, case):
        q, k, v, theirs = self.load(conformance, case)
        reference = conformance(f"{case}_reference")
        rows = reference["rows"].long()
        tags, names = list(settings(theirs, r"\.O_rows")), theirs.keys()
        assert len(tags) == 2
        for tag, fields in tags:
            out = sparsebench.attention(FlexPrefill(**fields), q, k, v)[0][0]
            # Their kernel computed in bf16; the manifest gives 0.0105 as its largest distance from fp32.
            assert (out[:, rows] - theirs[f"{tag}.O_rows"].float()).abs().max() < 0.011
            if f"{tag}.O_proj" in names:  # not in the compact subset
                assert (out @ reference["proj"] - theirs[f"{tag}.O_proj"]).abs().max() < 0.011


def tensors(q_len, kv_len, batch=1):
    """Near-diagonal preference and a few keys that all queries look at, so that heads differ in their lines."""
    q, k = torch.randn(batch, 4, q_len, 32), torch.randn(batch, 2, kv_len, 32)
    angle = torch.arange(kv_len) * 0.01
    near = torch.stack([angle.cos(), angle.sin()], dim=-1) * 4
    k[:, 0, :, :2], q[:, :2, :, :2] = near, near[kv_len - q_len :]
    k[:, 1, ::97, 0] += 6
    q[:, 3] *= 0.3
    q[:, 2:, :, 0] += 2
    return q, k


def selected(q, k, **fields):
    return sparsebench.select(FlexPrefill(**{**SPARSE, **fields}), q, k)


def expected(q, k, gamma, tau, block, least=1, most=10**9):
    """bool [rows, blocks] of one head, block by block in fp64: q [q_len, D], k [kv_len, D], aligned to blocks of keys."""
    q, k = q.double() * q.shape[-1] ** -0.5, k.double()
    q_len, kv_len, rows = len(q), len(k), min(len(q), block)
    blocks, offset = -(-kv_len // block), (kv_len - q_len) // block
    i, j = torch.arange(kv_len - rows, kv_len)[:, None], torch.arange(kv_len)
    p = (q[-rows:] @ k.T).masked_fill(j > i, float("-inf")).softmax(-1) / rows
    diagonal = torch.stack([p[i - j == d].sum() for d in range(kv_len)])

    def count(lines):
        running, needed = 0.0, 0
        for value in sorted(lines.tolist(), reverse=True):
            running += value
            needed += running <= gamma
        return min(max((needed + 1) // 128 + 1, least), most, blocks)

    def best(mass, number):
        order = sorted(range(1, blocks), key=lambda n: -mass[n])
        return set([0, *order][:number])

    columns = [p[:, n * block : (n + 1) * block].sum() for n in range(blocks)]
    distances = [diagonal[max(kv_len - (n + 1) * block, 0) : kv_len - n * block].sum() for n in range(blocks)][::-1]
    k_mean = torch.stack([part.mean(0) for part in k.split(block)])
    estimate, actual = (q[-rows:].mean(0) @ k_mean.T).softmax(-1), torch.stack(columns)
    middle = (estimate + actual) / 2
    divergence = ((estimate * (estimate / middle).log()).sum() + (actual * (actual / middle).log()).sum()) / 2
    aware = bool(divergence.sqrt() < tau)
    verticals = best(columns, least if aware else count(p.sum(0)))
    slashes = best(distances, least if aware else count(diagonal))
    heights = range(-(-q_len // block))
    kept = {(r, c) for r in heights for c in range(r + offset + 1) if c in verticals or r + offset - c in slashes}
    if aware:
        q_mean = torch.stack([part.mean(0) for part in q.split(block)])
        pooled = {(r, c): value for r in heights
                  for c, value in enumerate((q_mean[r] @ k_mean[: r + offset + 1].T).softmax(-1).tolist())}  # fmt: skip
        running = 0.0
        for place in sorted(pooled, key=lambda place: -pooled[place]):
            running += pooled[place]
            if running > gamma * len(heights):
                break
            kept.add(place)
        kept.add((0, 0))
    out = torch.zeros(len(heights), blocks, dtype=torch.bool)
    out[tuple(zip(*kept))] = True
    return out, aware


@pytest.mark.parametrize("q_len, kv_len", [(500, 500), (333, 333), (257, 257), (480, 480), (129, 513), (20, 500), (96, 352)])
@pytest.mark.parametrize("gamma, tau", [(0.5, 0.0), (0.9, 0.2), (0.97, AWARE)])
def test_ragged_lengths_and_aligned_chunks(q_len, kv_len, gamma, tau):
    q, k = tensors(q_len, kv_len)
    kv_len -= (kv_len - q_len) % 32  # the chunk starts where a key block starts
    k = k[:, :, :kv_len]
    if tau > 0 and q_len < kv_len:
        with pytest.raises(ValueError, match="takes no chunk of a prompt"):
            selected(q, k, gamma=gamma, tau=tau)
        return
    for fields in ({}, dict(min_budget=64, max_budget=90)):
        ours = selected(q, k, gamma=gamma, tau=tau, **fields).dense()[0]
        bounds = (2, 3) if fields else (1,)
        theirs = [expected(q[0, h], k[0, h // 2], gamma, tau, 32, *bounds)[0] for h in range(4)]
        assert torch.equal(ours, torch.stack(theirs))


def test_the_heads_of_these_tests_are_of_both_kinds():
    q, k = tensors(500, 500)
    kinds = {expected(q[0, h], k[0, h // 2], 0.9, 0.2, 32)[1] for h in range(4)}
    assert kinds == {False, True}


def test_an_unaligned_chunk_keeps_every_line_of_its_queries():
    """Every query keeps the lines it has when blocks of queries and of keys share their bounds."""
    q, k = tensors(130, 500)
    method = FlexPrefill(**SPARSE, tau=0.0)
    lines = torch.stack(line_scores(q, k, 32**-0.5, 32)) / 32
    count = method.line_blocks(lines)
    mass = block_sums(lines, 32)
    mass[..., 0] = float("inf")
    vertical, slash = flexprefill.best_blocks(mass, count)
    query, key = torch.arange(370, 500)[:, None] // 32, torch.arange(500) // 32
    wanted = (vertical[..., key][:, :, None] | slash[..., (query - key).clamp(min=0)]) & (query >= key)
    wanted &= torch.ones(130, 500, dtype=torch.bool).tril(370)
    tokens = sparsebench.select(method, q, k).tokens()
    assert not (wanted & ~tokens).any()
    assert tokens.sum() < 2 * wanted.sum()


@pytest.mark.parametrize(
    "q_len, kv_len, tau",
    [(500, 500, 0.0), (500, 500, 0.2), (500, 500, AWARE), (500, 777, 0.0), (97, 500, 0.0), (128, 500, 0.0)],
)
def test_masks_nest_as_gamma_rises_and_no_query_is_blind(q_len, kv_len, tau):
    q, k = tensors(q_len, kv_len)
    low, high = FlexPrefill.knob_range
    masks = [selected(q, k, gamma=gamma, tau=tau) for gamma in (low, 0.3, 0.6, 0.9, 0.99, high)]
    for fewer, more in itertools.pairwise(mask.dense() for mask in masks):
        assert not (fewer & ~more).any()
    densities = [mask.density().mean().item() for mask in masks]
    assert densities[0] < densities[3] < densities[-1] == 1
    for mask in masks:
        dataclasses.replace(mask, trusted=False).check()


@pytest.mark.parametrize("min_budget, length, dense", [
    (512, 1, True), (512, 100, True), (512, 512, True), (500, 512, True), (512, 1100, False),
    (None, 256, True), (None, 257, False), (0, 256, True), (0, 257, False),
])  # fmt: skip
def test_short_prompts_run_dense(min_budget, length, dense):
    mask = sparsebench.select(FlexPrefill(gamma=0.1, min_budget=min_budget), *tensors(length, length))
    assert mask.q_block == mask.kv_block == 128
    assert (mask.density() == 1).all() if dense else (mask.density() < 1).all()


def test_a_single_query_runs_dense():
    assert (selected(*tensors(1, 500)).density() == 1).all()


def test_gamma_1_runs_dense_unless_a_budget_limits_it():
    q, k = tensors(500, 500)
    for block in (32, 64, 128):
        mask = selected(q, k, gamma=1.0, block=block)
        assert torch.equal(mask.dense()[0, 0], causal_blocks(500, 500, block, block))
    assert selected(q, k, gamma=1.0, max_budget=32, tau=0.0).density().max() < 0.5


def test_without_a_minimum_budget_rows_can_stay_empty():
    q, k = tensors(500, 500)
    q[:, 3] *= 30  # rows of this head are one block each
    mask = selected(q, k, gamma=0.3, tau=AWARE, min_budget=0)
    assert (mask.kv_num_blocks == 0).any()
    with pytest.raises(ValueError, match="would see no key"):
        sparsebench.attention(FlexPrefill(**{**SPARSE, "gamma": 0.3, "tau": AWARE, "min_budget": 0}), q, k, k)
    nothing = selected(q, k, gamma=0.01, tau=AWARE, min_budget=0).dense()  # even the largest entry crosses the sum
    assert nothing[..., 0, 0].all() and nothing.sum() == 4


def test_a_batch_row_does_not_see_the_other(monkeypatch):
    q, k = tensors(500, 500, batch=2)
    q[1] *= 0.01  # flat attention: every head of this row is query-aware
    fields = dict(gamma=0.3, tau=0.2, min_budget=0)
    both = selected(q, k, **fields).dense()
    monkeypatch.setattr(flexprefill, "SORTED_ENTRIES", 1)  # one head at a time
    for b in range(2):
        assert torch.equal(both[b : b + 1], selected(q[b : b + 1], k[b : b + 1], **fields).dense())
    own = torch.eye(16, dtype=torch.bool)
    assert (both[0] & own).sum() == 4 * 16  # a vertical-slash head among them lends its lines to all
    assert (both[1] & own).sum() < 4 * 16


@pytest.mark.parametrize("tau", [0.0, 0.2, AWARE])
def test_grouped_kv_heads_equal_repeated_ones(tau):
    q, k = tensors(500, 500)
    assert torch.equal(selected(q, k, tau=tau).dense(), selected(q, k.repeat_interleave(2, 1), tau=tau).dense())


def test_a_distance_that_is_no_number_makes_no_head_query_aware():
    q, k = tensors(500, 500)
    k[:, :, :64] -= 200 * q[:, ::2, -32:].mean(2, keepdim=True).sign()  # these keys' probability underflows to 0
    assert torch.equal(selected(q, k, tau=AWARE).dense()[0, ::2], selected(q, k, tau=0.0).dense()[0, ::2])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"gamma": 0.0}, r"gamma=0 is out of range \(0, 1\]"),
        ({"gamma": 1.1}, "gamma=1.1 is out of range"),
        ({"gamma": float("nan")}, "gamma=nan is out of range"),
        ({"tau": -0.1}, "tau=-0.1 is out of range"),
        ({"min_budget": -1}, "min_budget=-1 is out of range"),
        ({"max_budget": 0}, "max_budget=0 is out of range"),
        ({"block": 96}, "block=96 is none of 32, 64, 128"),
        ({"max_budget": 256}, "max_budget=256 is below min_budget=512"),
    ],
)
def test_refuses_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        FlexPrefill(**fields)
    assert "\n" not in str(error.value)
