"""Paged attention against its definition, each row's bits its own, on every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from actors.native import attention as module
from tests.kernels import INSTRUCTION_SETS, use

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [
    (9, 3, (64,), 64),
    (4, 4, (24,), 24),
    (5, 1, (80,), 80),
    (40, 1, (40,), 20),
    (3, 3, (7,), 100),
    (16, 1, (512, 64), 512),
    (3, 1, (29, 6), 29),
]
"""Query heads, heads of the planes, widths of the keys' planes and of the values: tails of all of them."""

SEGMENTS = [(1, 0), (7, 100), (60, 3), (1, 511), (2, 47), (1, 48), (5, 0)]
"""Rows and tokens before them: within a block of 48 tokens, at its edges and across some."""


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return use(request.param, monkeypatch).isa


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """Sequences in a shuffled cache; ``slots[s]`` are those of sequence s, what belongs to none of them is NaN."""

    query: Tensor
    keys: tuple[Tensor, ...]
    value: Tensor
    spans: list[tuple[int, int, int, int]]
    tables: Tensor
    block_size: int
    window: int | None
    scale: float = 0.2

    def slots(self, span: int) -> Tensor:
        _, length, context, table = self.spans[span]
        tokens = torch.arange(context + length)
        return self.tables[table + tokens // self.block_size] * self.block_size + tokens % self.block_size

    def run(self, spans: list[tuple[int, int, int, int]] | None = None, query: Tensor | None = None) -> Tensor:
        return module.attention(
            self.query if query is None else query,
            self.keys,
            self.value,
            torch.tensor(self.spans if spans is None else spans),
            self.tables,
            self.block_size,
            self.scale,
            self.window,
        )


def make(
    shape: tuple[int, int, tuple[int, ...], int],
    dtype: torch.dtype,
    window: int | None = None,
    block_size: int = 16,
    segments: list[tuple[int, int]] = SEGMENTS,
) -> Case:
    heads, groups, widths, value_dim = shape
    generator = torch.Generator().manual_seed(heads)
    counts = [-(-(length + context) // block_size) for length, context in segments]
    blocks = sum(counts) + 3
    spans, row, table = [], 0, 0
    for (length, context), count in zip(segments, counts, strict=True):
        spans.append((row, length, context, table))
        row, table = row + length, table + count

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    planes = [random(blocks * block_size, groups, width) for width in (*widths, value_dim)]
    case = Case(
        query=random(row, heads, sum(widths)),
        keys=tuple(planes[:-1]),
        value=planes[-1],
        spans=spans,
        tables=torch.randperm(blocks, generator=generator),
        block_size=block_size,
        window=window,
    )
    unused = torch.ones(blocks * block_size, dtype=torch.bool)
    for span in range(len(spans)):
        unused[case.slots(span)] = False
    for plane in planes:
        plane[unused] = float("nan")
    return case


def defined(case: Case, dtype: torch.dtype) -> Tensor:
    """Attention by its definition, row by row, computed in ``dtype``, the shares rounded to it."""
    out = case.query.new_empty(*case.query.shape[:2], case.value.shape[2], dtype=dtype)
    for span, (start, length, context, _) in enumerate(case.spans):
        slots = case.slots(span)
        shared = case.query.shape[1] // case.value.shape[1]
        key = torch.cat([plane[slots] for plane in case.keys], dim=-1).to(dtype).repeat_interleave(shared, 1)
        value = case.value[slots].to(dtype).repeat_interleave(shared, 1)
        for i in range(length):
            last = context + i
            seen = slice(0 if case.window is None else max(0, last + 1 - case.window), last + 1)
            scores = torch.matmul(key[seen].transpose(0, 1), case.query[start + i].to(dtype)[:, :, None])[..., 0]
            shares = torch.softmax(scores * case.scale, -1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
            out[start + i] = torch.matmul(shares[:, None], value[seen].transpose(0, 1))[:, 0]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("window", "block_size"), [(None, 16), (None, 1), (1, 4), (37, 4), (1000, 16)])
def test_attention_is_as_exact_as_torchs(
    dtype: torch.dtype, shape: tuple[int, int, tuple[int, ...], int], window: int | None, block_size: int
) -> None:
    case = make(shape, dtype, window, block_size)
    exact = defined(case, torch.float64)
    ours, theirs = ((out - exact).abs().max() for out in (case.run(), defined(case, dtype)))
    # bf16: one rounding at the end, where torch's scores and shares are rounded too; fp32: a few of the last bits.
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert ours <= (0.51 * unit if dtype == torch.bfloat16 else max(theirs, 4 * unit))
    assert window == 1 or dtype != torch.bfloat16 or ours <= theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 37])
def test_a_row_does_not_know_its_mates(
    dtype: torch.dtype, shape: tuple[int, int, tuple[int, ...], int], window: int | None
) -> None:
    """Decoded, in pieces of any size, on one thread: the same bits."""
    case = make(shape, dtype, window)
    together = case.run()
    for start, length, context, table in case.spans:
        rows = slice(start, start + length)
        for piece in (1, 4, 13, length):
            cut = [(i, min(piece, length - i), context + i, table) for i in range(0, length, piece)]
            assert torch.equal(case.run(cut, case.query[rows]), together[rows])
        alone = case.run([(0, 1, context + length - 1, table)], case.query[start + length - 1 : start + length])
        assert torch.equal(alone[0], together[start + length - 1])
    torch.set_num_threads(1)
    assert torch.equal(case.run(), together)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_where_work_is_cut_does_not_change_a_bit(threads: int) -> None:
    case = make((9, 3, (64,), 64), torch.float32)
    want = case.run()
    torch.set_num_threads(threads)
    assert torch.equal(case.run(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5])
def test_what_a_row_does_not_see_is_not_added(dtype: torch.dtype, window: int | None) -> None:
    """A NaN is in the rows that see its token, and in no other."""
    case = make((6, 2, (40,), 40), dtype, window, segments=[(60, 20)])
    want = case.run()
    token = case.slots(0)[50]
    case.keys[0][token] = case.value[token] = float("nan")
    got = case.run()
    seeing = slice(30, None if window is None else 35)
    assert got[seeing].isnan().all()
    got[seeing] = want[seeing]
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", ["positive", "negative", "both"])
def test_large_scores_do_not_overflow(dtype: torch.dtype, sign: str) -> None:
    """Scores of some 1e8: one token takes it all, in whichever block it is."""
    case = make((4, 2, (64,), 64), dtype, segments=[(3, 200), (1, 500)])
    case = replace(case, query=case.query * 1e8)
    if sign != "both":
        query, (key,) = case.query.abs(), case.keys
        case = replace(case, query=query if sign == "positive" else -query, keys=(key.abs(),))
    got, exact = case.run(), defined(case, torch.float64)
    assert (got - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 40, 48, 96, 99])
def test_scores_of_minus_infinity_are_not_seen(dtype: torch.dtype, hidden: int) -> None:
    """Whole blocks of them included; where there is nothing else there is no number."""
    case = make((2, 1, (32,), 32), dtype, segments=[(1, 99)])
    case = replace(case, query=case.query.abs() + 1)
    slots = case.slots(0)
    case.keys[0][slots[:hidden]] = -float("inf")
    case.value[slots[:hidden]] = torch.finfo(dtype).max
    exact = defined(case, torch.float64)
    assert exact.abs().max() < 100
    assert (case.run() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()
    case.keys[0][slots] = -float("inf")
    assert case.run().isnan().all()


def test_a_share_below_the_smallest_number_is_none() -> None:
    """Of a value that would be seen otherwise."""
    case = make((1, 1, (32,), 32), torch.float32, segments=[(1, 99)])
    slots = case.slots(0)
    case = replace(case, query=torch.ones_like(case.query))
    case.keys[0][slots], case.value[slots] = 0.0, 0.0
    case.keys[0][slots[0]], case.value[slots[0]] = -1000.0, 3e38
    assert (case.run() == 0).all()
    case.keys[0][slots[0]], case.keys[0][slots[-1]], case.value[slots[0]] = 0.0, 1000.0, 3e38
    assert (case.run() == 0).all()


def test_fused_multiply_add_gives_the_same_everywhere(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of one cluster may differ: in fp32 they agree, unless one has no FMA at all."""
    if isa == "portable":
        pytest.skip("portable: no fused multiply-add there, so its last bits are others")
    case = make((9, 3, (64,), 64), torch.float32)
    got = case.run()
    use(INSTRUCTION_SETS[0], monkeypatch)
    assert torch.equal(got, case.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "k", "n"), [(1, 3, 128, 512), (5, 16, 11, 29), (33, 2, 70, 13), (2, 9, 32, 1)]
)
def test_products_per_head(dtype: torch.dtype, rows: int, heads: int, k: int, n: int) -> None:
    """Parts of wider tensors; a row alone has the same bits; what lies beside the outputs is left as it was."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(rows, heads, k + 6, generator=generator).to(dtype)[..., 3 : 3 + k]
    weight = torch.randn(heads, n, k, generator=generator).to(dtype)
    wide = torch.full((rows, heads, n + 5), 7.0, dtype=dtype)
    module.head_products(x, weight, wide[..., :n])
    exact = torch.einsum("rhk,hnk->rhn", x.double(), weight.double())
    unit = torch.finfo(dtype).eps * exact.abs().max()
    assert (wide[..., :n] - exact).abs().max() <= unit * (0.51 if dtype == torch.bfloat16 else 4)
    assert (wide[..., n:] == 7).all()
    torch.set_num_threads(1)
    for i in range(rows):
        alone = torch.empty(1, heads, n, dtype=dtype)
        module.head_products(x[i : i + 1], weight, alone)
        assert torch.equal(alone[0], wide[i, :, :n])
