"""The formats to the bit: what they keep, that they are unbiased, never freeze and have a floor."""

from __future__ import annotations

import pytest
import torch
from helpers.formats import HASHED

from rootfree_fused.reference import formats
from rootfree_fused.reference.formats import HALF, decoded, encoded, join_weight, split_weight

# Upper halves of float32, all of them, beside lower halves at which roundings turn.
LOW = [0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0x807F, 0x8080]
LOW += [0xFF7F, 0xFF80, 0xFFFF]


def all_numbers():
    high = torch.arange(1 << 16, dtype=torch.int32) << 16
    return torch.cat([(high | low).view(torch.float32) for low in LOW])


def random(steps, shape, stream=0, seed=1):
    like = torch.empty(shape)
    return formats.random_bits(seed, torch.tensor(float(steps)), stream, 0, like)


def same(a, b):
    """Equal to the bit, but for which NaN it is."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(0.0, torch.inf, -torch.inf).view(torch.int32),
        b.nan_to_num(0.0, torch.inf, -torch.inf).view(torch.int32),
    )


def test_a_residual_of_16_bits_keeps_every_bit():
    x = all_numbers()
    assert same(join_weight(*split_weight(x, torch.int16)), x)


def test_a_residual_of_8_bits_keeps_16_significant_bits():
    x = all_numbers()
    joined = join_weight(*split_weight(x, torch.int8))
    plain = x.isfinite() & joined.isfinite()
    assert not (x.isnan() ^ joined.isnan()).any()
    assert torch.equal(joined[x.isinf()], x[x.isinf()])
    assert (x[x.isfinite() & ~joined.isfinite()].abs() > 3.4e38).all()  # next to the largest
    assert torch.equal(joined[plain].signbit(), x[plain].signbit())
    x, joined = x[plain].double(), joined[plain].double()
    least = torch.finfo(torch.float32).tiny
    assert ((joined - x).abs() <= 2**-16 * x.abs().clamp_min(least)).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_the_upper_half_is_the_nearest_bfloat16(dtype):
    x = all_numbers()
    x = x[x.isfinite() & (x.abs() < 3.3e38)]
    high, _ = split_weight(x, dtype)
    error = (high.double() - x.double()).abs()
    nearest = (x.bfloat16().double() - x.double()).abs()
    slack = 2**-15 if dtype == torch.int8 else 0
    assert (error <= nearest + slack * x.double().abs().clamp_min(2**-126)).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_a_weight_that_someone_else_wrote_is_off_by_half_a_step_at_most(dtype):
    x = torch.cat([torch.linspace(-2, 2, 4001), torch.tensor([1e-3, -1e-3])])
    _, residual = split_weight(x, dtype)
    for written, half_step in (
        (0.0, 2.0**-134),
        (-0.0, 2.0**-134),
        (1.0, 2.0**-8),
        (-3.0, 2.0**-7),
    ):
        high = torch.full_like(x, written).bfloat16()
        joined = join_weight(high, residual)
        assert ((joined.double() - written).abs() <= half_step).all()
        assert torch.equal(joined.signbit(), high.signbit())


def test_the_hash_is_this_one():
    numbers = torch.stack(
        [
            formats.random_bits(seed, torch.tensor(step), stream, first, torch.empty(8))
            for seed, step, stream, first in HASHED
        ]
    )
    assert [" ".join(f"{n:08x}" for n in row) for row in numbers.tolist()] == [*HASHED.values()]
    assert torch.equal(numbers[6, 4:], numbers[0, :4])  # indices count modulo 2^32


def test_parts_of_a_tensor_have_its_numbers():
    step = torch.tensor(3.0)
    whole = formats.random_bits(7, step, 0, 0, torch.empty(6, 50))
    part = formats.random_bits(7, step, 0, 100, torch.empty(4, 50))
    assert torch.equal(whole[2:], part)


def test_random_numbers_are_uniform_and_independent():
    n = 1 << 18
    base = random(7, n)
    uniform = base.double() / 2**32
    # Of so many each statistic is normal: 5 of its deviations are seen once in a million.
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    counts = torch.bincount(base >> 24, minlength=256).double()
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5
    bits = torch.stack([((base >> b) & 1).double().mean() for b in range(32)])
    assert ((bits - 0.5).abs() < 5 * (0.25 / n) ** 0.5).all()
    others = [random(8, n), random(7, n, stream=1), random(7, n, seed=2), base.roll(1)]
    for other in others:
        correlation = ((uniform - 0.5) * (other.double() / 2**32 - 0.5)).mean() * 12
        assert abs(correlation) < 5 / n**0.5


def test_s8_takes_a_level_beside_and_keeps_the_largest():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 300, generator=generator) * torch.logspace(-25, 25, 5)[:, None]
    whole = torch.nn.functional.pad(x.reshape(-1), (0, 36)).view(6, 256)
    for bits in (HALF, random(1, x.shape), 0, 2**32 - 1):
        codes, scale = encoded(x, torch.int8, bits)
        assert codes.shape == x.shape
        assert torch.equal(scale, whole.abs().amax(1))
        assert (codes.abs() == 127).sum() >= len(scale)
        value = decoded(codes, scale)
        root = (whole.double().abs() / scale.double()[:, None]).sqrt().reshape(-1)[: x.numel()]
        assert ((root * 127 - codes.reshape(-1).double().abs()).abs() < 1 + 1e-4).all()
        assert torch.equal(codes.sign().float()[codes != 0], x.sign()[codes != 0])
        again, scale_again = encoded(value, torch.int8, HALF)
        assert torch.equal(again, codes)
        assert torch.equal(scale_again, scale)


def test_s8_has_a_least_scale():
    x = torch.full((512,), 2.0**-100)
    x[256:] *= 1 - 2.0**-20
    codes, scale = encoded(x, torch.int8)
    assert codes.tolist() == [127] * 256 + [0] * 256
    assert scale.tolist() == [2.0**-100, 0.0]


def test_e5m3_has_its_levels_in_order_and_keeps_them():
    codes = torch.arange(256).to(torch.uint8)
    for exponent in (31, 96, 127, 252):
        values = decoded(codes, torch.tensor([exponent], dtype=torch.uint8))
        assert (values.diff() > 0).all()
        assert values[0] == 2.0 ** (exponent - 127 - 30)
        assert values[247] == 1.875 * 2.0 ** (exponent - 127)
        kept = values[:248]  # to below twice the power of two, as a block has them
        for bits in (HALF, random(1, 248), 0, 2**32 - 1):
            again, scale = encoded(kept, torch.uint8, bits)
            assert scale.tolist() == [exponent]
            assert torch.equal(again, codes[:248])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16])
def test_stochastic_rounding_is_unbiased(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.exp2(torch.randn(1024, generator=generator) * 3) * 1e-6
    if dtype != torch.uint8:
        x = x * torch.randn(1024, generator=generator).sign()
    total, rounds = torch.zeros(1024).double(), 10_000
    for step in range(rounds // 100):  # a hundred numbers an element at a time
        bits = random(step, (100, 1024))
        total += torch.stack([decoded(*encoded(x, dtype, b)) for b in bits]).double().sum(0)
    # Of a choice between two neighbours the deviation is half their distance at most.
    step_width = torch.exp2(x.double().abs().log2().floor()) * (
        2.0**-3 if dtype == torch.uint8 else 2.0**-7
    )
    if dtype == torch.int8:
        scale = x.double().abs().view(4, 256).amax(1).repeat_interleave(256)
        level = x.double().abs() / scale * 127**2
        step_width = (2 * level.sqrt().floor() + 1) / 127**2 * scale
    sigmas = (total / rounds - x.double()).abs() / (step_width / 2 / rounds**0.5)
    assert (sigmas < 5).all()
    assert sigmas.square().mean().sqrt() < 1


# 1 - beta of an average, where it goes, and after how many steps that is looked at.
WALKS = [(0.05, 1e-4, 250), (0.01, 1e-4, 1200), (0.001, 1e-4, 3000), (0.01, 0.5, 500)]


def walk(dtype, weight, target, steps, bits):
    """Where s is that starts at 1, in a block of which one entry stays there."""
    s = torch.ones(1024)
    stored = encoded(s, dtype)
    for step in range(steps):
        s = torch.lerp(decoded(*stored), torch.full_like(s, target), weight)
        s[::256] = 1.0
        stored = encoded(s, dtype, bits(step))
    return decoded(*stored).view(4, 256)[:, 1:].double()


@pytest.mark.parametrize(("weight", "target", "steps"), WALKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_s_never_freezes(dtype, weight, target, steps):
    s = walk(dtype, weight, target, steps, lambda step: random(step, 1024))
    exact = target + (1 - target) * (1 - weight) ** steps
    # Unbiased at each step, and steps are linear: so is their sum.
    assert abs(s.mean() - exact) < 5 * s.std() / s.numel() ** 0.5 + 1e-5 * exact
    assert s.max() < 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_to_nearest_it_would(dtype):
    s = walk(dtype, 0.001, 1e-4, 200, lambda step: HALF)
    assert (s == 1).all()


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.98, 0.999])
def test_an_average_without_gradients_goes_to_zero(decay):
    """Beside an entry that stays: to nearest it would stay on the way."""
    average = torch.ones(1024)
    stored, expected = encoded(average, torch.int8), 1.0
    for step in range(int(4 / (1 - decay))):
        average = decoded(*stored) * decay
        average[::256] = 1.0
        expected *= decay
        stored = encoded(average, torch.int8, random(step, 1024))
    rest = decoded(*stored).view(4, 256)[:, 1:].double()
    assert abs(rest.mean() - expected) < 5 * rest.std() / rest.numel() ** 0.5 + 1e-5
    assert (walk(torch.int8, 0.02, 0.0, 400, lambda step: HALF) > 0.01).all()


def test_no_second_moment_is_flushed_to_zero():
    tiny = torch.finfo(torch.float32).tiny
    for largest in (3e38, 1.0, 1e-10, 1e-28, 1e-37, 1e-44):
        x = torch.logspace(-44, 0, 256) * largest
        for bits in (0, HALF, random(1, 256)):
            codes, scale = encoded(x, torch.uint8, bits)
            s = decoded(codes, scale)
            assert (s >= tiny).all()
            assert s.isfinite().all()
            power = 2.0 ** (int(scale[0]) - 127)
            assert (s <= torch.maximum(1.126 * x, torch.tensor(power * 2.0**-30))).all()
    codes, scale = encoded(torch.zeros(256), torch.uint8, random(1, 256))
    assert not codes.any()
    assert not scale.any()
    assert torch.equal(decoded(codes, scale), torch.zeros(256))


def test_steps_by_a_rounded_s_are_as_long_as_by_s():
    generator = torch.Generator().manual_seed(0)
    sigma = torch.exp2(torch.randn(2048, generator=generator) * 2) * 1e-2
    for dtype, noise, step_length in ((torch.uint8, 0.3, 1.1), (torch.bfloat16, 0.03, 1.01)):
        for weight in (0.05, 0.01):
            s, stored = torch.ones(2048), encoded(torch.ones(2048), dtype)
            deviation, ratio, seen = 0.0, 0.0, 0
            for step in range(int(16 / weight)):
                square = (torch.randn(2048, generator=generator) * sigma).square()
                s = torch.lerp(s, square, weight)
                kept = torch.lerp(decoded(*stored), square, weight)
                stored = encoded(kept, dtype, random(step, 2048))
                if step > 12 / weight:
                    rounded = decoded(*stored).double()
                    deviation += (rounded / s - 1).square().mean().item()
                    ratio += (s / rounded).mean().item()
                    seen += 1
            assert (deviation / seen) ** 0.5 < noise
            assert ratio / seen < step_length


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_a_number_that_is_not_finite_stays_in_its_block(dtype, bad):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(700, generator=generator) + 0.1
    expected = decoded(*encoded(x, dtype, random(1, 700)))
    x[300] = bad
    value = decoded(*encoded(x, dtype, random(1, 700)))
    assert not value[300].isfinite()
    own = slice(300, 301) if dtype == torch.bfloat16 else slice(256, 512)
    assert not value[own].isfinite().any()
    value[own] = expected[own]
    assert torch.equal(value, expected)


def test_no_finite_number_becomes_infinite():
    largest = torch.finfo(torch.float32).max
    x = torch.full((300,), largest)
    for dtype in (torch.int8, torch.uint8, torch.bfloat16):
        assert decoded(*encoded(x, dtype, 2**32 - 1)).isfinite().all()
