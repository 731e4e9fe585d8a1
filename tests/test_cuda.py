"""What only a GPU can show of the trainer: CUDA kernels against plain float32 or float64."""
import pytest
import torch
from replay import replay
from test_advantages import make_case
from test_golden import GOLDEN, GROUPS
from test_model_utils import SIZES, batches_of, one_by_one, random_groups
from transformers import AutoModelForCausalLM

from advantages import Old, influence, token_advantages
from losses import policy_loss
from metrics import Figures
from model_utils import HeadLogprob, load_policy, pack, packed_attention, tree_masks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("prefix, heads", [(0, (4, 4)), (50, (4, 4)), (0, (6, 2)), (50, (6, 2))])
def test_varlen_kernel_against_masks(prefix, heads):
    """Output and gradients of torch's varlen kernel in bfloat16: those of masks in float32."""
    b = pack(random_groups(100, [*SIZES, (200, [300, 7, 150])], prefix)).to(CUDA)
    g, t, results = torch.Generator().manual_seed(0), b.input_ids.numel(), []
    q, k, v, up = (torch.randn(1, h, t, 64, generator=g).bfloat16().to(CUDA)
                   for h in (heads[0], heads[1], heads[1], heads[0]))
    for dtype, masks in ((torch.bfloat16, None), (torch.float32, tree_masks(b))):
        qkv = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = packed_attention(None, *qkv, None, scaling=0.125, layout=b, masks=masks)[0]
        results.append([out, *torch.autograd.grad(out, qkv, up.transpose(1, 2).to(dtype))])
    for got, want in zip(*results):
        assert (got.float() - want).abs().max() < 0.02 * want.abs().max() + 0.02


@pytest.mark.parametrize("dtype, mean, top", [(torch.float, 1e-4, 1e-3), (torch.bfloat16, .2, 1.5)])
def test_packed_logprobs_of_the_real_model(model_dir, dtype, mean, top):
    groups = random_groups(49152, SIZES, prefix=20)
    plain = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").float()
    policy = load_policy(model_dir, dtype, CUDA).requires_grad_(False)
    got = torch.cat([policy(b.to(CUDA), 0.8)[0] for b in batches_of(groups, 80)]).cpu()
    gap = (got - one_by_one(plain, groups, 0.8)[0]).abs()
    assert gap.mean() < mean and gap.max() < top  # of tokens as unlikely as exp(-14)


def test_head_in_bfloat16():
    g, results = torch.Generator().manual_seed(0), []
    h, w = (torch.randn(n, 64, generator=g).bfloat16() for n in (300, 5000))
    y, up = torch.randint(5000, (300,), generator=g), torch.randn(300, generator=g)
    for device, of_h, of_w in (CUDA, torch.bfloat16, torch.float32), ("cpu", *[torch.float64] * 2):
        leaves = h.to(device, of_h).requires_grad_(), (w / 8).to(device, of_w).requires_grad_()
        logp, entropy, lse = HeadLogprob.apply(*leaves, y.to(device), 0.7, 128)
        grads = torch.autograd.grad((logp * up.to(device)).sum(), leaves)
        results.append([x.double().cpu() for x in (logp, entropy, lse, *grads)])
    for most, got, want in zip((1e-5, 1e-5, 1e-5, 0.01, 0.01), *results):  # logits are not rounded
        assert (got - want).norm() < most * want.norm()


@pytest.mark.parametrize("precision, tolerance", [("highest", 1e-4), ("high", 2e-2)])
def test_scores(precision, tolerance):
    _, old, y, right = make_case([1, 0, 1, 0], [60, 90, 20, 30])
    low = Old(*(x.float().to(CUDA) for x in (old.logp, old.entropy, old.h, old.lse, old.head)))
    torch.set_float32_matmul_precision(precision)
    for vocab in ("response", "full"):
        want, got = (influence(x, y.numpy(), right.numpy(), vocab) for x in (old, low))
        assert (got.cpu() - want).abs().max() < tolerance * want.abs().max()
    torch.set_float32_matmul_precision("highest")


def test_nothing_in_a_micro_batch_waits(model_dir):
    """Forward, advantages, loss and backward while torch raises at whatever waits for the GPU."""
    groups, figures = random_groups(49152, SIZES), Figures(CUDA)
    policy = load_policy(model_dir, torch.bfloat16, CUDA)
    batch, sizes = pack(groups).to(CUDA), [sum(g.lengths) for g in groups]
    for mode in ("default", "error"):  # first kernels are compiled and libraries started
        torch.cuda.set_sync_debug_mode(mode)
        outs, advantage = policy(batch, 1.0), []
        states = zip(*(x.detach().split(sizes) for x in outs))
        for variant, group, x in zip(("nthr", "random", "thr", "entropy_top"), groups, states):
            old = Old(*x, policy.model.lm_head.weight.detach())
            advantage.append(token_advantages(variant, group, old, figures=figures))
        batch.advantage, batch.old_logp = torch.cat(advantage), outs[0].detach()
        policy_loss(outs[0], batch, tis_cap=2.0, figures=figures).backward()
    torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_fsdp2_on_one_rank_has_the_same_gradient(tmp_path):
    flags = [*GOLDEN["common"], *GOLDEN["flags"]["nthr_cut_two_updates"], f"--out_dir={tmp_path}"]
    want, got = (replay([GROUPS], *flags, f"--parallel={parallel}", probes=GOLDEN["probes"])[0][0]
                 for parallel in ("ddp", "fsdp"))
    for key in ("loss", "grad_norm", "grads"):
        assert got[key] == pytest.approx(want[key], rel=2e-3, abs=1e-6)
