"""The kernel of the output head, and sums of products, against float64."""

import pytest
import torch
import torch.nn.functional as F

from tensorlm.batch import IGNORED
from tensorlm.model import output_head
from tensorlm.model.loss_kernel import losses_and_gradients
from tensorlm.model.output_head import OutputHead
from tensorlm.model.sums import add_product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # else interpreted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [97, 4096, 9000])
def test_losses_and_gradients_are_those_of_float64(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(5, size, generator=generator) * 8).to(dtype)
    labels = torch.randint(size, (5,), generator=generator)
    labels[2] = IGNORED
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="none")
    losses.sum().backward()
    assert exact.grad is not None
    given = logits.clone().to(DEVICE)
    found = losses_and_gradients(given, labels.to(DEVICE), IGNORED).cpu()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-6, atol=4e-6)
    # Triton's interpreter truncates to bf16, a GPU rounds.
    step = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(given.cpu().double(), exact.grad, rtol=step, atol=1e-6)
    assert not given[2].any()


def test_logits_far_from_zero_keep_their_differences() -> None:
    logits = torch.full((1, 100), -1e30, device=DEVICE)
    label = torch.tensor([3], device=DEVICE)
    loss = losses_and_gradients(logits, label, IGNORED)
    assert loss.item() == pytest.approx(torch.tensor(100.0).log().item())
    assert logits.sum().item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("chunk", [0, 7])
def test_head_with_the_kernel_is_the_head_without(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = OutputHead(16, 53).to(DEVICE)
    hidden = torch.randn(2, 11, 16, device=DEVICE, requires_grad=True)
    labels = torch.randint(53, (2, 11), device=DEVICE)
    labels[0, :4] = IGNORED
    results = []
    for is_fused in (False, True):
        monkeypatch.setattr(output_head, "runs_loss_kernel", lambda *_, fused=is_fused: fused)
        loss = head(hidden, labels, chunk)
        assert loss.dtype == torch.float64
        results.append((loss, *torch.autograd.grad(loss * 0.3, [hidden, head.weight])))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_sum_of_products_rounds_no_product() -> None:
    left, right = (torch.randn(48, 512, device=DEVICE).bfloat16() for _ in range(2))
    exact = torch.ones(48, 48, device=DEVICE, dtype=torch.float64)
    total = torch.ones(48, 48, device=DEVICE)
    for _ in range(3):
        add_product(total, left, right.t())
        exact += left.double() @ right.double().t()
    limit = 1e-6 if DEVICE.type == "cuda" else 4e-3  # on a CPU each product is rounded to bf16
    assert (total - exact).norm() < limit * exact.norm()
