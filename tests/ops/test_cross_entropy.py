import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from openmythos.ops.cross_entropy import IGNORED, cross_entropy, cross_entropy_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_definition(dtype):
    logits = (torch.randn(2, 5, 11) * 4).to(dtype)
    targets = torch.randint(0, 11, (2, 5))
    targets[0, 2] = targets[1, 4] = IGNORED
    got, wanted = cross_entropy(logits, targets), cross_entropy_reference(logits, targets)
    assert got.shape == (2, 5)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.float(), wanted)
    assert got[0, 2] == got[1, 4] == 0


def test_z_loss_by_hand():
    logits, targets = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([1, IGNORED])
    log_z = torch.tensor([1.0, 2.0]).logsumexp(dim=0)
    got = cross_entropy(logits, targets, z_loss=0.1)
    torch.testing.assert_close(got, torch.stack((log_z - 2 + 0.1 * log_z**2, torch.zeros(()))))


def test_uniform_logits_cost_log_v_and_ignored_ones_have_no_gradient():
    logits = torch.zeros(3, 7, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, IGNORED, 6]), z_loss=0.1)
    assert float(loss[0].detach()) == pytest.approx(1.9459 + 0.1 * 1.9459**2, abs=1e-3)
    loss.sum().backward()
    assert not logits.grad[1].any()


class LargestFloat(TorchDispatchMode):
    """The largest new float32 tensor, in numbers."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.most = max(self.most, made.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_chunks_equal_the_whole_bit_for_bit(dtype, z_loss, monkeypatch):
    logits = (torch.randn(3, 7, 13) * 4).to(dtype).requires_grad_()
    targets = torch.randint(0, 13, (3, 7))
    targets[0, 2:5] = IGNORED

    def both():
        logits.grad = None
        loss = cross_entropy(logits, targets, z_loss)
        (loss * torch.arange(21.0).view(3, 7)).sum().backward()
        return loss.detach(), logits.grad

    whole = both()
    monkeypatch.setattr("openmythos.ops.cross_entropy.CHUNK", 4 * 13 + 12)  # 4 rows, and 1 left
    for chunked, expected in zip(both(), whole, strict=True):
        assert torch.equal(chunked, expected) and chunked.dtype == expected.dtype


def test_chunks_keep_the_logits_alone_and_widen_one_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr("openmythos.ops.cross_entropy.CHUNK", 3 * 64)
    logits = torch.randn(30, 64, dtype=torch.bfloat16).requires_grad_()
    targets, kept = torch.randint(0, 64, (30,)), []
    with LargestFloat() as forward, saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = cross_entropy(logits, targets).sum()
    with LargestFloat() as backward:
        loss.backward()
    assert forward.most == backward.most == 3 * 64
    assert {(tuple(t.shape), t.dtype) for t in kept} == {
        ((30, 64), torch.bfloat16),
        ((30,), torch.int64),
    }
