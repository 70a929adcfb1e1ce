"""Kernels that decode one token of a routed layer, in the interpreter and at real size on a GPU."""

import pytest
import torch
from torch import Tensor

from tensor_attention import Rotary
from tensor_attention.routed_decode import Step, attend_step, choose_step, make_step, rotate_step
from tensor_attention.routing import block_scores, block_starts, pooled_keys, summed_queries
from tests.tensor_attention.cases import doc_start_of, poisoned_memory, rotary_table

pytest.importorskip("triton")

from tensor_attention.gpu.decode import decode_token, supports
from tensor_attention.gpu.decode_prepare import prepare_token

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
Shape = tuple[int, int, int, int]  # tokens, query heads, key heads, head size


class Case:
    """A row whose last token is new, as the cache of a routed layer holds it."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, starts: Tensor, *,
        window: int = 32, block: int = 16, top_k: int = 3, stretch: int = 4, open_tile: int = 16,
        pool: int = 4,
    ) -> None:  # fmt: skip
        num_tokens, heads, key_heads, dim = shape
        batch, generator = starts.shape[0], torch.Generator().manual_seed(0)
        self.block, self.top_k, self.pool, self.scale = block, top_k, pool, dim**-0.5

        def random(tokens: int, count: int) -> Tensor:
            # Quarters: scores of blocks are exact and often equal, and ties must be resolved alike.
            x = torch.randint(-8, 9, (batch, tokens, count, dim), generator=generator) / 4
            return x.to(DEVICE, dtype)

        self.q, self.k, self.v = random(1, heads), random(1, key_heads), random(1, key_heads)
        # Room after the last token, as in a cache.
        near, keys, values = (random(num_tokens + 5, key_heads) for _ in range(3))
        self.near = near[:, max(0, num_tokens - window - 3) : num_tokens]
        self.keys, self.values = keys[:, :num_tokens], values[:, :num_tokens]
        starts = starts.to(DEVICE)
        table = Rotary(*(x.float().to(DEVICE) for x in rotary_table(num_tokens, dim)))
        self.step: Step = make_step(
            starts, block_starts(starts, block), table, window=window, block=block,
            stretch=stretch, open_tile=open_tile,
        )  # fmt: skip
        slots = self.step.blocks.shape[-1]
        # Room after the last slot too. These keys are not rotated.
        pooled = pooled_keys(
            random(num_tokens, key_heads), block_starts(starts, block)[:, :slots], block, pool
        )
        self.pooled = torch.cat((pooled, pooled.new_full((batch, 3, *pooled.shape[2:]), 99)), dim=1)
        self.pooled = self.pooled[:, :slots]
        far = (num_tokens - 1 - window - starts[:, -1]) // block + 1  # blocks of each row
        rows = min(open_tile, num_tokens)
        # Some places are empty, and some blocks are chosen by several tokens.
        choices = torch.randint(-1, 1 << 20, (batch, rows + 2, key_heads, top_k + 1)).to(DEVICE)
        far = far.clamp(min=0)[:, None, None, None]
        choices = torch.where((choices >= 0) & (far > 0), choices % far.clamp(min=1), -1)
        self.choices = choices.to(torch.int32)[:, 2:]

    def by_kernels(self) -> tuple[Tensor, Tensor]:
        turned, scores = prepare_token(
            self.q, self.k, self.v, self.pooled, self.step, self.near, self.keys, self.values
        )
        z = decode_token(
            turned, scores, self.near, self.keys, self.values, self.choices, self.step,
            block=self.block, top_k=self.top_k, scale=self.scale,
        )  # fmt: skip
        return self.choices[:, -1:].clone(), z

    def by_operations(self) -> Tensor:
        """z for the choice that the cache holds."""
        queries, _ = rotate_step(self.q, self.k, self.step)
        return attend_step(
            queries, (self.near, self.keys), self.values, self.choices, self.step,
            block=self.block, scale=self.scale,
        )  # fmt: skip

    def assert_cached(self) -> None:
        """The token's keys and values are in the last rows."""
        _, (near_k, k) = rotate_step(self.q, self.k, self.step)
        tolerance = 1e-6 if self.q.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(self.near[:, -1:], near_k, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(self.keys[:, -1:], k, rtol=tolerance, atol=tolerance)
        assert torch.equal(self.values[:, -1:], self.v)

    def assert_chosen(self, choice: Tensor) -> None:
        """The choice equals that of the operations, except for scores that differ by rounding."""
        expected = choose_step(self.q, self.pooled, self.step, self.top_k)
        if self.q.dtype == torch.float32 and DEVICE == "cpu":
            assert torch.equal(choice, expected)
            return
        assert torch.equal(choice[..., 0], expected[..., 0])
        assert torch.equal(choice < 0, expected < 0)
        ordered = choice.sort(-1).values
        assert not bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any())
        queries = summed_queries(self.q, self.pooled.shape[3]).float().transpose(1, 2)
        scores = block_scores(queries, self.pooled.float())[:, :, 0]  # [B, K, N]
        closed = self.step.closed.expand_as(scores)
        # Each open slot has its block's place; closed slots are scattered after all of them.
        places = self.step.blocks.expand_as(scores).masked_fill(closed, scores.shape[-1] + 1).long()
        of_block = scores.new_zeros(*scores.shape[:2], scores.shape[-1] + 2)
        of_block.scatter_(2, places, scores)
        reached, best = (
            of_block.gather(2, x[:, 0, :, 1:].clamp(min=0).long()) for x in (choice, expected)
        )
        spread = 2e-2 * float(scores.std(correction=0).nan_to_num())  # 0 for one score or none
        torch.testing.assert_close(reached, best, rtol=2e-2, atol=spread)


def check(case: Case) -> None:
    """The choice, the output up to rounding, and the same bits twice."""
    assert supports(case.q, case.values, case.step, case.top_k, case.block, case.pool)
    with poisoned_memory():
        choice, z = case.by_kernels()
        again, z_again = case.by_kernels()
    assert torch.equal(choice, again)
    assert torch.equal(z, z_again)
    case.assert_cached()
    case.assert_chosen(choice)
    exact = case.by_operations().float()
    tolerance = 2e-5 if case.q.dtype == torch.float32 else 1e-2
    assert float((z.float() - exact).norm() / exact.norm()) < tolerance


def packed(num_tokens: int) -> Tensor:
    """[2, T]: a row that ends in a long document, and one that ends in a short document."""
    rows = [[num_tokens // 5, num_tokens - num_tokens // 5], [num_tokens - 9, 9]]
    return torch.cat([doc_start_of(lengths) for lengths in rows])


@pytest.mark.parametrize("num_tokens", [1, 20, 49, 150, 151])
def test_a_token_has_the_results_of_the_operations(num_tokens: int) -> None:
    shape = (num_tokens, 4, 2, (16, 20)[num_tokens % 2])
    check(Case(shape, torch.float32, doc_start_of([num_tokens])))


@pytest.mark.parametrize("open_tile", [1, 5])
def test_the_last_token_of_packed_documents(open_tile: int) -> None:
    check(Case((140, 6, 2, 16), torch.float32, packed(140), open_tile=open_tile))


def test_fewer_blocks_than_the_choice_holds() -> None:
    check(Case((90, 2, 1, 16), torch.float16, doc_start_of([90]), top_k=20))


@pytest.mark.parametrize("pool", [16, 99, 6])  # a block is one part, or its last part is shorter
def test_other_parts(pool: int) -> None:
    check(Case((150, 4, 2, 16), torch.float32, packed(150), pool=pool))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_a_long_row(dim: int, dtype: torch.dtype) -> None:
    starts = torch.cat((doc_start_of([20001]), doc_start_of([12000, 8001])))
    check(
        Case(
            (20001, 8, 2, dim), dtype, starts, window=1024, block=64, top_k=16, stretch=16, pool=16
        )
    )  # fmt: skip
