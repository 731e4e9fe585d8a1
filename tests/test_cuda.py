"""What only a GPU can show of the trainer: the CUDA kernels against plain float32 or float64. Skipped without one.
The tests that start train.py, eval.py and lld.py (whole runs, resume, two ranks) run on whatever there is."""
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from advantages import (group_advantages, group_tokens, influence, nthr_select, policy_loss, random_like, token_advantages,
                        token_weights)
from model_utils import HeadLogprob, load_policy, pack, pack_all, packed_attention, plan_micro_batches, prefetch, tree_masks
from test_model_utils import SIZES, one_by_one, random_groups

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def with_common_prompt(groups, prefix):
    for g in groups:
        g["prompt"] = np.concatenate([np.arange(3, 3 + prefix, dtype=np.int32), g["prompt"]])
    return groups


@pytest.mark.parametrize("prefix", [0, 50])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_varlen_kernel_against_masks(prefix, heads):
    """flash-attn, or torch's varlen attention, in bfloat16: output and gradients of SDPA with tree masks in float32."""
    groups = with_common_prompt(random_groups(100, SIZES + [(200, [300, 7, 150])]), prefix)
    b = pack(groups, [(g, range(len(groups[g]["responses"]))) for g in range(5)], 0, CUDA)
    g, t = torch.Generator().manual_seed(0), b.input_ids.numel()
    make = lambda h: torch.randn(1, h, t, 64, generator=g).bfloat16().to(CUDA)
    inputs, up, results = [make(heads[0]), make(heads[1]), make(heads[1])], make(heads[0]).transpose(1, 2), []
    for dtype in (torch.bfloat16, torch.float32):
        b.masks = None if dtype == torch.bfloat16 else tree_masks(b)
        qkv = [x.to(dtype).requires_grad_() for x in inputs]
        out = packed_attention(None, *qkv, None, scaling=0.125, layout=b)[0]
        results.append([out, *torch.autograd.grad((out * up.to(dtype)).sum(), qkv)])
    for got, want in zip(*results):
        assert (got.float() - want).abs().max() < 0.02 * want.abs().max() + 0.02


@pytest.mark.parametrize("dtype, mean, most", [(torch.float32, 1e-4, 1e-3), (torch.bfloat16, 0.2, 1.5)])  # of tokens as unlikely as exp(-14)
def test_packed_logprobs_of_the_real_model(model_dir, dtype, mean, most):
    groups = with_common_prompt(random_groups(49152, SIZES), 20)
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        want, _ = one_by_one(plain, groups, 0.8)
        policy = load_policy(model_dir, dtype, CUDA)
        batches = pack_all(groups, plan_micro_batches(groups, 80))
        got = torch.cat([policy(b, 0.8)[0] for b in prefetch(batches, CUDA)]).cpu()
    assert len(batches) > 1 and (got - want).abs().mean() < mean and (got - want).abs().max() < most


def test_head_in_bfloat16():
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(300, 64, generator=g).bfloat16(), torch.randn(5000, 64, generator=g).bfloat16() / 8
    y, up = torch.randint(5000, (300,), generator=g), torch.randn(300, generator=g)
    results = []
    for device, dtype in ((CUDA, torch.bfloat16), ("cpu", torch.float64)):
        leaves = [h.to(device, dtype).requires_grad_(), w.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()]
        logp, entropy, _ = HeadLogprob.apply(*leaves, y.to(device), 0.7, 128, dtype)
        results.append([x.double().cpu() for x in (logp, entropy, *torch.autograd.grad((logp * up.to(device)).sum(), leaves))])
    (logp, entropy, *grads), (want_logp, want_entropy, *want_grads) = results
    assert (logp - want_logp).abs().max() < 1e-4 and (entropy - want_entropy).abs().max() < 1e-4  # no rounding of logits
    for got, want in zip(grads, want_grads):
        assert (got - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("precision, tolerance", [("highest", 1e-4), ("high", 2e-2)])
def test_scores(precision, tolerance):
    g = torch.Generator().manual_seed(0)
    h, head = torch.randn(200, 32, generator=g, dtype=torch.float64), torch.randn(900, 32, generator=g, dtype=torch.float64) / 4
    y, source = torch.randint(50, (200,), generator=g), torch.arange(200) < 90
    lse = (h @ head.T).logsumexp(-1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for vocab in ("response", "full"):
            want = influence(h, y, lse, head, source, 1.0, vocab)
            got = influence(h.float().to(CUDA), y.to(CUDA), lse.float().to(CUDA), head.float().to(CUDA), source.to(CUDA), 1.0, vocab)
            assert (got.cpu() - want).abs().max() < tolerance * want.abs().max()
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_in_a_micro_batch_waits(model_dir):
    """Forward, scores, selection, loss and backward while torch raises at whatever waits for the GPU."""
    groups = random_groups(49152, SIZES)
    policy = load_policy(model_dir, torch.bfloat16, CUDA)
    rewards = [[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 1]]
    sizes = [sum(map(len, g["responses"])) for g in groups]
    batch, = prefetch(pack_all(groups, plan_micro_batches(groups, 10**6)), CUDA)
    tokens = [group_tokens(g["responses"], r, CUDA) for g, r in zip(groups, rewards)]
    reward, group = torch.tensor(rewards, device=CUDA).float().flatten(), torch.arange(4, device=CUDA).repeat_interleave(4)
    response = torch.repeat_interleave(torch.tensor([len(r) for g in groups for r in g["responses"]])).to(CUDA)
    weights, head = token_weights(response, group, 4), policy.model.get_output_embeddings().weight.detach().bfloat16()

    def micro_batch():
        logp, _, h, lse = policy(batch, 1.0, states=True)
        s = torch.cat([influence(a, b, c, head, source, 1.0, rows) for a, b, c, (source, rows) in zip(
            h.split(sizes), batch.targets.split(sizes), lse.split(sizes), tokens)])
        selected, _ = nthr_select(s, reward, response, group, 1.0, 4)
        selected |= random_like(selected, response, torch.Generator().manual_seed(0))
        per_token = token_advantages("nthr", group_advantages(reward, group), reward, response, group, selected)
        policy_loss(logp, logp.detach(), per_token, weights)[0].backward()

    micro_batch()  # kernels are compiled and libraries started
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_batch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_fsdp2_on_one_rank_has_the_same_gradient(run):
    want, got = ([float(x) for x in run("tests/gradients.py", *args, ranks=ranks).stdout.split("GRADIENTS")[1].split()]
                 for args, ranks in (((), 0), (("--parallel=fsdp",), 1)))
    assert want[0] > 0 and got == pytest.approx(want, rel=2e-3)
