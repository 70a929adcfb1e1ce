"""Products in float8: their error, their gradients, and that memory settings change no bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tensorlm.config import LinearFormat, load_config
from tensorlm.model import Llama
from tensorlm.model.float8 import apply_linears, check_linear
from tensorlm.model.float8_cast import E4M3, E5M2, _round, _scale, cast, cast_both, cast_transposed
from tensorlm.model.tiled_mlp import tiled_swiglu
from tensorlm.runtime.errors import UserError
from tests.model.test_memory import small
from tests.support.launching import ROOT

FORMATS: tuple[LinearFormat, ...] = ("float8_tensorwise", "float8_rowwise")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # else interpreted
formats = pytest.mark.parametrize("linear", FORMATS)


def values(*shape: int) -> Tensor:
    """Rows and columns of very different sizes."""
    generator = torch.Generator().manual_seed(sum(shape))
    spread = torch.rand(shape[0], 1, generator=generator) * 3
    return (torch.randn(shape, generator=generator) * spread).bfloat16()


@pytest.mark.parametrize("by_row", [False, True])
def test_casts_err_by_half_a_step_and_transposes_hold_the_same_matrix(by_row: bool) -> None:
    x = values(48, 80)
    gradient, turned = cast_both(x, by_row)
    # 3 bits of mantissa in e4m3, 2 in e5m2: half a step is 1 / 16, or 1 / 8, of a value.
    error = 2**-4 if by_row else 2**-3
    for scaled, exact, limit in (
        (cast(x, by_row), x, 2**-4), (cast_transposed(x, by_row), x.t(), 2**-4),
        (gradient, x, error), (turned, x.t(), error),
    ):  # fmt: skip
        assert scaled.data.is_contiguous()
        found = scaled.data.double() * scaled.scale.double()
        smallest = found.abs().max() * 2**-14  # subnormal numbers have fewer bits
        torch.testing.assert_close(found, exact.double(), rtol=limit, atol=float(smallest))
        assert float(scaled.data.float().abs().max()) > torch.finfo(scaled.data.dtype).max / 2.01


def test_zeros_and_huge_numbers_are_cast_to_finite_ones() -> None:
    for x in (torch.zeros(16, 16).bfloat16(), torch.full((16, 16), 3e38).bfloat16()):
        for by_row in (False, True):
            scaled = cast(x, by_row)
            found = scaled.data.float() * scaled.scale
            torch.testing.assert_close(found, x.float(), rtol=0.07, atol=0)


def test_a_nan_stays_one() -> None:
    x = values(128, 128)
    x[3, 5] = torch.nan
    for by_row in (False, True):
        scaled = cast(x, by_row)
        assert (scaled.data.float() * scaled.scale)[3, 5].isnan()


def representable(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """bf16 numbers [m, k] that `dtype` holds exactly, its largest one among them."""
    bits = torch.randint(256, (m, k), generator=torch.Generator().manual_seed(m)).to(torch.uint8)
    x = bits.view(dtype).float().nan_to_num(1.0, 1.0, -1.0).bfloat16()
    x[m // 2, k // 2] = torch.finfo(dtype).max
    return x


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("by_row", [False, True])
def test_kernel_casts_as_pytorch_does(by_row: bool, dtype: torch.dtype) -> None:
    from tensorlm.model.float8_kernel import round_matrix

    # Neither size is a multiple of a tile. Triton's interpreter cannot round to float8.
    x = values(130, 272) if DEVICE.type == "cuda" else representable(130, 272, dtype)
    rows, columns = _scale(x, 1 if by_row else None, dtype), _scale(x, 0 if by_row else None, dtype)
    for chosen in ((rows, None), (None, columns), (rows, columns)):
        given = [None if scale is None else scale.to(DEVICE) for scale in chosen]
        found = round_matrix(x.to(DEVICE), dtype, *given)
        for ours, plain in zip(found, _round(x, dtype, *chosen), strict=True):
            assert (ours is None) == (plain is None)
            if ours is not None and plain is not None:
                assert ours.is_contiguous()
                assert torch.equal(ours.cpu().view(torch.uint8), plain.view(torch.uint8))


@pytest.mark.parametrize("size", [1, 300, 8192 * 3 + 5])
@pytest.mark.parametrize("special", [0.0, -0.0, 3e38, -torch.inf, torch.nan, -torch.nan, 1e-40])
def test_kernel_finds_the_largest_magnitude(
    size: int, special: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorlm.model import float8_kernel

    monkeypatch.setattr(float8_kernel, "_PROGRAMS", 2)  # one reads two blocks
    x = values(size, 1)[:, 0]
    x = x * 1e-30 if special == 1e-40 else x  # then x is subnormal too
    x[size // 2] = special
    found = float8_kernel.largest_magnitude(x.to(DEVICE)).cpu()
    expected = torch.linalg.vector_norm(x, torch.inf).float()
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@formats
def test_gradients_are_those_of_the_products_to_the_error_of_float8(linear: LinearFormat) -> None:
    layers = [nn.Linear(64, size, bias=False).bfloat16() for size in (48, 32)]
    x = values(2 * 32, 64).view(2, 32, 64).requires_grad_()
    douts = [values(2 * 32, size).view(2, 32, size) for size in (48, 32)]
    inputs = [x, *(layer.weight for layer in layers)]
    outs = apply_linears(x, layers, linear)
    found = [*outs, *torch.autograd.grad(outs, inputs, douts)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact_outs = [wide[0] @ weight.t() for weight in wide[1:]]
    grads = torch.autograd.grad(exact_outs, wide, [d.double() for d in douts])
    for ours, exact in zip(found, [*exact_outs, *grads], strict=True):
        error = (ours.double() - exact).norm() / exact.norm()
        assert 1e-3 < error < 0.08, error  # not bf16's, which is 2e-3 at most


def test_no_gradients_no_float8() -> None:
    layer, x = nn.Linear(64, 32, bias=False).bfloat16(), values(16, 64)
    with torch.no_grad():
        assert torch.equal(apply_linears(x, [layer], "float8_tensorwise")[0], layer(x))


def gradients(linear: LinearFormat, **options: Any) -> list[Tensor]:
    config = small(hidden_size=64, intermediate_size=160)
    model = Llama(config, linear=linear, **options)
    model.init_weights(seed=3)
    model = model.bfloat16()
    tokens, labels = torch.randint(97, (2, 2, 64), generator=torch.Generator().manual_seed(1))
    loss = model(tokens, None, labels)
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


@formats
@pytest.mark.parametrize("mlp_chunk", [0, 48])
def test_recomputation_changes_no_bit(linear: LinearFormat, mlp_chunk: int) -> None:
    expected = gradients(linear, mlp_chunk=mlp_chunk)
    for options in (
        {"recompute": "block"},
        {"recompute": "attention"},
        {"recompute": "selective"},
        {"recompute": "selective", "activation_offload": True},
    ):
        found = gradients(linear, mlp_chunk=mlp_chunk, **options)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)), options
    plain = gradients("bf16", mlp_chunk=mlp_chunk)
    assert found[0].item() != plain[0].item()  # it did run in float8
    assert found[0].item() == pytest.approx(plain[0].item(), rel=1e-3)


@pytest.mark.parametrize("recompute", ["block", "attention", "selective"])
def test_recomputation_does_not_repeat_the_last_product(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiplied = []
    scaled_mm = torch._scaled_mm

    def count(left: Tensor, right: Tensor, **options: Any) -> Tensor:
        multiplied.append(left.shape)
        return scaled_mm(left, right, **options)

    monkeypatch.setattr(torch, "_scaled_mm", count)
    gradients("float8_rowwise")
    plain = len(multiplied)
    gradients("float8_rowwise", recompute=recompute)
    assert plain == 4 * 7 * 3  # layers, weights, products
    repeated = {"block": 4 * 6, "attention": 4 * 6, "selective": 0}[recompute]
    assert len(multiplied) == 2 * plain + repeated


@pytest.mark.parametrize(
    ("recompute", "times"), [("none", 1), ("selective", 1), ("attention", 1), ("block", 2)]
)
def test_scales_of_whole_tensors_are_computed_once(
    recompute: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward uses those of forward; only "block" computes them again."""
    sizes = []

    def count(x: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
        sizes.append((dtype, x.shape))
        return _scale(x, dim, dtype)

    monkeypatch.setattr("tensorlm.model.float8_cast._scale", count)
    gradients("float8_tensorwise", recompute=recompute)
    inputs, weights = 4 * 4, 4 * 7  # four layers
    assert sum(dtype == E4M3 for dtype, _ in sizes) == times * (inputs + weights)
    assert sum(dtype == E5M2 for dtype, _ in sizes) == weights  # gradients of outputs


@formats
def test_tiles_give_the_bits_of_untiled_products_of_each_tile(linear: LinearFormat) -> None:
    layers = [nn.Linear(64, 160, bias=False).bfloat16() for _ in range(2)]
    layers.append(nn.Linear(160, 64, bias=False).bfloat16())
    gate, up, down = weights = [layer.weight for layer in layers]
    x, dout = values(128, 64).requires_grad_(), values(128, 64).flip(0)
    out = tiled_swiglu(x, gate, up, down, 48, multiply, linear)
    found = [out, *torch.autograd.grad(out, [x, *weights], dout)]

    outs, dxs = [], []
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for part, dpart in zip(x.detach().split(48), dout.split(48), strict=True):
        part.requires_grad_()
        (one,) = apply_linears(
            multiply(*apply_linears(part, layers[:2], linear)), layers[2:], linear
        )
        dx, *dweights = torch.autograd.grad(one, [part, *weights], dpart)
        outs.append(one)
        dxs.append(dx)
        for total, gradient in zip(sums, dweights, strict=True):
            total += gradient
    expected = [torch.cat(outs), torch.cat(dxs), *(total.bfloat16() for total in sums)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def multiply(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


@formats
@pytest.mark.parametrize("recompute", ["none", "block", "attention", "selective"])
def test_tiles_cast_each_weight_once_in_each_pass(
    linear: LinearFormat, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: dict[str, list[torch.Size]] = {"cast": [], "cast_transposed": []}
    for name, function in (("cast", cast), ("cast_transposed", cast_transposed)):

        def count(x: Tensor, *arguments: Any, name: str = name, function: Any = function) -> Any:
            shapes[name].append(x.shape)
            return function(x, *arguments)

        monkeypatch.setattr(f"tensorlm.model.float8.{name}", count)
    gradients(linear, mlp_chunk=48, recompute=recompute)  # three tiles
    up, down = torch.Size([160, 64]), torch.Size([64, 160])  # of gate too
    assert shapes["cast"].count(up) == 4 * 2 * 2  # layers, weights, passes
    assert shapes["cast"].count(down) == 4
    assert shapes["cast_transposed"].count(up) == 4 * 2
    assert shapes["cast_transposed"].count(down) == 4


def test_a_device_without_float8_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_linear("bf16", torch.device("cpu"))
    with pytest.raises(UserError, match=r"train.linear: float8_rowwise needs .*, got the CPU"):
        check_linear("float8_rowwise", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    for capability, is_refused in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        if is_refused:
            with pytest.raises(UserError, match=r"NVIDIA A100 \(set train.linear = bf16\)"):
                check_linear("float8_rowwise", torch.device("cuda"))
        else:
            check_linear("float8_rowwise", torch.device("cuda"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.dtype=fp32", "train.linear: must be bf16 if train.dtype = fp32"),
        ("train.mlp_chunk=100", "train.mlp_chunk: must be a multiple of 16"),
        ("model.intermediate_size=1000", "model.intermediate_size: must be a multiple of 16"),
        ("data.seq_len=1000", "data.seq_len: must be a multiple of 16"),
    ],
)
def test_sizes_that_cublas_cannot_multiply_are_refused(override: str, words: str) -> None:
    config = ROOT / "configs/llama8b_32k_fold.toml"
    settings = ["train.linear=float8_tensorwise", "model.fold=[]"]
    load_config(config, settings)
    with pytest.raises(UserError) as error:
        load_config(config, [*settings, override])
    assert len(error.value.problems) == 1
    assert words in error.value.problems[0]
