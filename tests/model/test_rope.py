import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from openmythos.config import Llama3ScalingConfig, RopeConfig
from openmythos.model.rope import apply_rope, rope_angles, rope_frequencies

DIM = 6


def rotated(x: torch.Tensor, positions: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    angles = rope_angles(positions, x.shape[-1], config, x.dtype)
    return apply_rope(x, angles, interleaved=config.interleaved)


def by_complex_numbers(
    x: torch.Tensor, positions: torch.Tensor, config: RopeConfig
) -> torch.Tensor:
    """Multiply each pair, read as a complex number, by exp(i position / theta^(2j/dim))."""
    frequencies = config.theta ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    turn = torch.polar(torch.ones(()).double(), positions[..., None] * frequencies)[:, :, None]
    if config.interleaved:
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn
        return torch.view_as_real(turned).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_equals_complex_multiplication(interleaved):
    config = RopeConfig(theta=100.0, interleaved=interleaved)
    x = torch.randn(2, 5, 3, DIM, dtype=torch.float64)
    positions = torch.randint(0, 1000, (2, 5))
    torch.testing.assert_close(
        rotated(x, positions, config), by_complex_numbers(x, positions, config)
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved):
    config = RopeConfig(interleaved=interleaved)
    q, k = torch.randn(2, 1, 1, 1, DIM, dtype=torch.float64)

    def score(at: int, to: int) -> float:
        q_at = rotated(q, torch.tensor([[at]]), config)
        return float((q_at * rotated(k, torch.tensor([[to]]), config)).sum())

    assert score(7, 3) == pytest.approx(score(104, 100))
    assert score(7, 3) != pytest.approx(score(7, 4))


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_slice_rotates_as_its_copy(before):
    """Heads are slices of a wider projection, at any place in it."""
    wide = torch.randn(2, 5, 3, before + 8 + 1)
    heads = wide[..., before : before + 8]
    rope = rope_angles(torch.arange(5).expand(2, -1), 8, RopeConfig(), torch.float32)
    for interleaved in (True, False):
        got = apply_rope(heads, rope, interleaved=interleaved)
        assert torch.equal(got, apply_rope(heads.clone(), rope, interleaved=interleaved))


def test_the_conventions_differ_by_a_permutation_of_channels():
    x = torch.randn(1, 4, 2, DIM, dtype=torch.float64)
    positions = torch.arange(4)[None]
    order = [0, 2, 4, 1, 3, 5]
    half = rotated(x[..., order], positions, RopeConfig())
    torch.testing.assert_close(
        half, rotated(x, positions, RopeConfig(interleaved=True))[..., order]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_stay_wide_in_low_precision(dtype):
    positions = torch.tensor([[1, 255, 257, 1023]])  # bf16 cannot tell the middle two apart
    cos, sin = rope_angles(positions, DIM, RopeConfig(), dtype)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(1, 4, 1, DIM).to(dtype)
    got = rotated(x, positions, RopeConfig())
    assert got.dtype == dtype
    wanted = rotated(x.double(), positions, RopeConfig())
    torch.testing.assert_close(got.double(), wanted, rtol=0.01, atol=0.01)


# --- scaling -------------------------------------------------------------------------------------

SCALINGS = {
    "Llama 3.1": (128, 500_000.0, Llama3ScalingConfig(factor=8.0)),
    "Llama 3.2": (64, 500_000.0, Llama3ScalingConfig(factor=32.0)),
    "narrow band": (
        24,
        100.0,
        Llama3ScalingConfig(
            factor=2.5, low_freq_factor=1.5, high_freq_factor=2.0, original_max_seq_len=50
        ),
    ),
}


@pytest.mark.parametrize(("dim", "theta", "part"), SCALINGS.values(), ids=list(SCALINGS))
def test_llama3_scaling_is_that_of_transformers(dim, theta, part):
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": part.factor,
        "low_freq_factor": part.low_freq_factor,
        "high_freq_factor": part.high_freq_factor,
        "original_max_position_embeddings": part.original_max_seq_len,
    }
    theirs = transformers.LlamaConfig(head_dim=dim, rope_parameters=rope)
    wanted, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    found = rope_frequencies(dim, RopeConfig(theta=theta, scaling=part))
    assert attention_factor == 1
    torch.testing.assert_close(found.float(), wanted, rtol=1e-6, atol=0)  # theirs are fp32
    plain = rope_frequencies(dim, RopeConfig(theta=theta))
    slowed = plain / found
    assert slowed[0] == 1
    assert float(slowed[-1]) == pytest.approx(part.factor)
    assert ((slowed > 1.001) & (slowed < part.factor - 0.001)).any()  # the band is not empty


def test_scaled_angles_turn_slower():
    part = Llama3ScalingConfig(factor=4.0, original_max_seq_len=8)
    x, positions = torch.randn(1, 3, 2, DIM).double(), torch.tensor([[0, 5, 40]])
    scaled = rotated(x, positions, RopeConfig(theta=100.0, scaling=part))
    turns = rope_frequencies(DIM, RopeConfig(theta=100.0, scaling=part)) * positions[0, :, None]
    first, second = x.chunk(2, dim=-1)
    cos, sin = turns.cos()[None, :, None], turns.sin()[None, :, None]
    wanted = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    torch.testing.assert_close(scaled, wanted)
    assert not torch.allclose(scaled, rotated(x, positions, RopeConfig(theta=100.0)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factor": 0.5}, "factor is 0.5; it must be at least 1"),
        ({"factor": 8.0, "high_freq_factor": 1.0}, "high_freq_factor is 1.0; it must be above"),
        ({"factor": 8.0, "low_freq_factor": 0.0}, "high_freq_factor is 4.0"),
        ({"factor": 8.0, "original_max_seq_len": 0}, "original_max_seq_len is 0"),
    ],
)
def test_bad_scalings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Llama3ScalingConfig(**fields)
