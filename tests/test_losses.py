"""Losses and weights against their definitions and autograd, in float64."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_advantages import draw
from test_model_utils import make_group

from losses import policy_loss, set_weights
from metrics import Figures


@pytest.mark.parametrize("loss_norm, want", [
    ("group", [1 / 8, 1 / 8, 1 / 14, 1 / 14]),     # 1 / (tokens of the group x 2 groups), eq. 1
    ("response", [1 / 4, 1 / 12, 1 / 8, 1 / 20]),  # 1 / (tokens of the response x 2 x 2 groups)
    ("token", [1 / 11] * 4), ("constant", [1 / 20] * 4)])  # 1 / (2 responses x 5 at most x 2)
def test_weights_of_the_normalisations(loss_norm, want):
    groups = [make_group([1], [range(n) for n in lengths]) for lengths in ([1, 3], [2, 5])]
    set_weights(groups, loss_norm, 5)
    assert np.concatenate([g.weight for g in groups]) == pytest.approx(want)
    assert [g.update_tokens for g in groups] == [11, 11]


def make_batch(lengths, seed=0):
    """(logp, batch) of responses, every fifth an anchor, whose other log-probabilities are nonsense
    that must not matter; a weight and an advantage, maybe 0, for each response."""
    response = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    is_anchor, n = response % 5 == 2, len(response)
    nonsense = torch.tensor([-2000.0, math.inf, 0.0, -math.inf]).double()[torch.arange(n) % 4]
    x = -draw(seed, n).abs()
    old, ref, rollout = (torch.where(is_anchor, nonsense, x + scale * draw(seed + i, n))
                         for i, scale in ((10, 0.3), (20, 1.0), (30, 0.4)))
    a, weight = draw(seed + 40, len(lengths)).round(), draw(seed + 50, len(lengths)).abs()
    return x.requires_grad_(), SimpleNamespace(
        old_logp=old, ref_logp=ref, rollout_logp=rollout, advantage=a[response],
        weight=weight[response], is_anchor=is_anchor, response=response, update_tokens=2 * n,
        right=a > 0)


def definition(logp, batch, lengths, loss="clip", clip_low=0.2, clip_high=0.2, kl_coef=0.0,
               tis_cap=0.0, seq_mask_cap=math.inf, llds=0.0, anchor_loss="luffy"):
    """The loss from the formulas of the papers, response by response, for autograd."""
    total = 0 * logp.sum()
    fields = (logp, batch.old_logp, batch.rollout_logp, batch.ref_logp, batch.advantage,
              batch.weight, batch.is_anchor)
    for x, old, rollout, ref, A, w, is_anchor in zip(*(v.split(lengths) for v in fields)):
        if is_anchor.any():
            pi = x.exp()
            total = total - (w * A * (x if anchor_loss == "logp" else pi / (pi + 0.1))).sum()
            continue
        lost, importance = old - x, (old - rollout).exp()
        ratio = (-lost).mean().exp() if loss == "gspo" else (-lost).exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        gain = torch.minimum(A * ratio, A * clipped)
        if loss == "cispo":
            gain = A * clipped.detach() * x
        if tis_cap:
            gain = gain * importance.clamp(max=tis_cap)
        kl = (ref - x).exp() - (ref - x) - 1
        if 1 / seq_mask_cap <= importance.prod() <= seq_mask_cap:
            total = total + (w * (kl_coef * kl - gain)).sum()
        if lost.sum() > 0:
            total = total + llds * lost.clamp(min=0)[A >= 0].sum() / batch.update_tokens
    return total


@pytest.mark.parametrize("lengths", [[1], [1] * 8, [3, 1, 4, 2, 5, 9, 30, 6]])
@pytest.mark.parametrize("how", [
    dict(), dict(clip_low=0.1, clip_high=0.3, tis_cap=1.5), dict(kl_coef=0.05, llds=0.7),
    dict(anchor_loss="logp", kl_coef=0.1, tis_cap=1.05, seq_mask_cap=1.5),
    dict(loss="gspo", clip_low=0.9, clip_high=9.0),  # no clip fires
    dict(loss="gspo", clip_low=0.01, clip_high=0.02, kl_coef=0.05, llds=0.7, seq_mask_cap=1.5),
    dict(loss="cispo"), dict(loss="cispo", clip_low=1.0, clip_high=0.05, tis_cap=1.5, llds=0.7)])
def test_loss_and_gradient_are_those_of_the_definition(lengths, how):
    for seed in range(5):
        logp, batch = make_batch(lengths, seed)
        if how.get("loss") != "gspo":  # which has one advantage a response
            batch.advantage = draw(seed + 60, len(logp)).round()
        got, want = policy_loss(logp, batch, **how), definition(logp, batch, lengths, **how)
        assert got.item() == pytest.approx(want.item())
        gradients = [torch.autograd.grad(x, logp)[0] for x in (got, want)]
        assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["clip", "cispo"])
def test_figures_are_over_what_was_sampled(loss, on_ranks):
    lengths, figures = [3, 1, 4, 2, 5, 9, 30, 6], Figures("cpu")
    logp, batch = make_batch(lengths)
    penalty = policy_loss(logp, batch, llds=1.0) - policy_loss(logp, batch)
    policy_loss(logp, batch, loss, 0.1, 0.3, 0.05, tis_cap=1.5, seq_mask_cap=1.5, llds=0.7,
                figures=figures)
    fields = (logp.detach(), batch.old_logp, batch.ref_logp, batch.rollout_logp, batch.advantage)
    x, old, ref, rollout, a = (v[~batch.is_anchor].numpy() for v in fields)
    ratio, gap, d = np.exp(x - old), old - rollout, ref - x
    cut = (a > 0) & (ratio > 1.3) | (a < 0) & (ratio < 0.9)
    if loss == "cispo":
        cut = (a != 0) & ((ratio > 1.3) | (ratio < 0.9))
    products = [part.sum().exp() for part in torch.from_numpy(gap).split([3, 1, 2, 5, 9, 30])]
    assert cut.any() and on_ranks(figures.all_ranks) == [pytest.approx({
        "train/clip_fraction": cut.mean(), "train/kl_old": (ratio - (x - old) - 1).mean(),
        "train/kl": (np.exp(d) - d - 1).mean(), "train/llds": penalty.item(),
        "train/tokens": len(x), "gap/mean": abs(gap).mean(), "gap/max": abs(gap).max(),
        "gap/importance": np.exp(gap).mean(), "gap/importance_cut": (np.exp(gap) > 1.5).mean(),
        "gap/responses_left_out": sum(not 1 / 1.5 <= p <= 1.5 for p in products)})]


def test_gspo_keeps_the_credit_of_tokens():
    """GSPO-token: with advantages of its own a token's gradient is w A s, s of its response."""
    logp, batch = make_batch([3, 4])
    batch.advantage = draw(9, 7)
    got, = torch.autograd.grad(policy_loss(logp, batch, "gspo", 0.99, 9.0), logp)
    ratio = torch.cat([x.mean().exp().expand(len(x))
                       for x in (logp.detach() - batch.old_logp).split([3, 4])])
    assert torch.allclose(got, -batch.weight * batch.advantage * ratio)
