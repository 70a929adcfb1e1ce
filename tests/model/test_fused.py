"""Liger's kernels against the plain layers, and what happens where they are not installed."""

import pytest
import torch
from torch import Tensor, nn

from tensorlm.config import ModelConfig
from tensorlm.model import fused
from tensorlm.model.layers import RMSNorm, SwiGLU
from tensorlm.runtime.errors import UserError

missing = not (torch.cuda.is_available() and fused.has_liger())
needs_liger = pytest.mark.skipif(missing, reason="needs a CUDA device and liger-kernel")


def layer(kind: str, fused_layers: fused.FusedLayers) -> nn.Module:
    if kind == "norm":
        return RMSNorm(48, 1e-5, fused_layers)
    chunk = 24 if kind == "tiled mlp" else 0
    config = ModelConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_layers=1, num_heads=4,
        num_kv_heads=2,
    )  # fmt: skip
    return SwiGLU(config, chunk, fused_layers)


def run(layer: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output and all gradients; the input is used once more outside, as in a block."""
    x = x.detach().requires_grad_()
    out = x + layer(x)
    gradients = torch.autograd.grad(out, [x, *layer.parameters()], cotangent)
    return [out, *gradients]


@pytest.mark.gpu
@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["norm", "mlp", "tiled mlp"])
def test_liger_is_as_exact_as_the_plain_layer(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x, cotangent = torch.randn(2, 2, 64, 48, device="cuda", generator=generator).to(dtype)
    plain = layer(kind, "torch").cuda().to(dtype)
    liger = layer(kind, "liger").cuda().to(dtype)
    exact = layer(kind, "torch").cuda()
    for other in (liger, exact):
        other.load_state_dict(plain.state_dict())
    exact = exact.double()
    expected = run(exact, x.double(), cotangent.double())
    for ours, theirs, right in zip(
        run(liger, x, cotangent), run(plain, x, cotangent), expected, strict=True
    ):
        error, allowed = ((found.double() - right).norm() for found in (ours, theirs))
        assert error <= 2 * allowed + 1e-7 * right.norm()


def test_auto_takes_the_plain_layers_on_a_cpu() -> None:
    x = torch.randn(3, 48)
    assert torch.equal(layer("norm", "auto")(x), layer("norm", "torch")(x))


def test_kernels_that_are_not_installed_are_one_error_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "has_liger", lambda: False)
    fused.check_layers("auto")
    with pytest.raises(UserError, match=r"train\.fused_layers: liger is not installed") as caught:
        fused.check_layers("liger")
    assert len(caught.value.problems) == 1
