"""Two attentions merged are the attention over both sets of keys."""

import pytest
import torch

from l0fast_kernels.merge_attention import merge_attention_, merge_attention_reference_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def halves(T=7, H=5, E=24, keys=(3, 9), seed=0):
    """(out [T, H, E], lse [H, T]) over each set of keys alone, and over both; float64."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(H, n, E, dtype=torch.float64, generator=g)  # noqa: E731
    q, k, v = 2 * draw(T), draw(sum(keys)), draw(sum(keys))
    scores = q @ k.transpose(1, 2)

    def over(columns):
        s = scores[..., columns]
        return (s.softmax(-1) @ v[:, columns]).transpose(0, 1).contiguous(), s.logsumexp(-1)

    return over(slice(0, keys[0])), over(slice(keys[0], None)), over(slice(None))


def test_the_reference_gives_attention_over_all_keys():
    (out, lse), other, (true_out, true_lse) = halves()
    merge_attention_reference_(out, lse, *other)
    torch.testing.assert_close(out, true_out)
    torch.testing.assert_close(lse, true_lse)


def triton_merge(*args):
    pytest.importorskip("triton", reason="kernels are tested where triton is installed")
    from l0fast_kernels.merge_attention_triton import merge_attention_triton_

    merge_attention_triton_(*args)


@pytest.mark.parametrize(("T", "H", "E"), [(7, 5, 24), (1, 1, 16), (3, 16, 128), (4, 17, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_attention_over_all_keys(T, H, E, dtype):
    (out, lse), (other, other_lse), (true_out, true_lse) = halves(T, H, E)
    # as the cascade calls it: a stretch of longer tensors
    whole = torch.full((T + 4, H, E), float("nan"), dtype=dtype, device=DEVICE)
    whole_lse = torch.full((H, T + 4), float("nan"), device=DEVICE)
    ours, our_lse = whole[2:-2], whole_lse[:, 2:-2]
    ours.copy_(out)
    our_lse.copy_(lse)
    triton_merge(ours, our_lse, other.to(DEVICE, dtype), other_lse.float().to(DEVICE))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(ours.cpu().double(), true_out, **tolerance)
    torch.testing.assert_close(our_lse.cpu().double(), true_lse, rtol=1e-5, atol=1e-5)
    margin = torch.cat([whole[:2], whole[-2:]])
    assert margin.isnan().all(), "the kernel wrote outside its stretch"


def test_a_side_that_saw_no_key_has_no_say():
    (out, lse), (other, _), _ = halves()
    for kernel in (triton_merge, merge_attention_):
        ours, our_lse = out.float().to(DEVICE), lse.float().to(DEVICE)
        kernel(ours, our_lse, other.float().to(DEVICE), torch.full_like(our_lse, -float("inf")))
        torch.testing.assert_close(ours.cpu(), out.float())
        torch.testing.assert_close(our_lse.cpu(), lse.float())
