"""Losses and weights against their definitions and autograd, in float64."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_advantages import draw
from test_model_utils import make_group

import advantages
from losses import policy_loss, set_weights
from metrics import Figures


def test_weights_are_eq_1_and_the_other_normalisations():
    """Two groups of two: one token right, three wrong; two right, two wrong. A = +-1 or +-1/2.

    eq. 1:    -((1 - 3) / 4 + (2 - 2) / 4) / 2                           = 1/4
    DAPO:     -(1 - 3 + 2 - 2) / 8                                       = 1/4
    Dr.GRPO:  -(1/2 - 3/2 + 1 - 1) / (2 responses x 5 at most x 2 groups) = 1/20
    GRPO's first form, a mean over responses of their means: 0"""
    def loss(lengths, norm="std", loss_norm="group"):
        groups = [make_group([1], [range(n) for n in of_group], [1, 0]) for of_group in lengths]
        sums = [advantages.group_advantages(g.reward, norm) * g.lengths for g in groups]
        set_weights(groups, loss_norm, 5)
        return pytest.approx(-np.vdot([g.weight for g in groups], sums))

    assert loss([[1, 3], [2, 2]]) == 1 / 4 == loss([[1, 3], [2, 2]], "std", "token")
    assert loss([[1, 3], [2, 2]], "mean", "constant") == 1 / 20
    assert loss([[1, 3], [2, 2]], "std", "response") == 0
    groups = [make_group([1], [range(n) for n in lengths]) for lengths in ([1, 3], [2, 5])]
    set_weights(groups, "response")
    assert [g.update_tokens for g in groups] == [11, 11]
    weights = np.concatenate([g.weight for g in groups])
    assert weights == pytest.approx([1 / 4, 1 / 12, 1 / 8, 1 / 20])  # 1 / (tokens x 2 x 2)
    # groups of different lengths tell eq. 1 from DAPO
    assert loss([[1, 3], [1, 1]]) == 1 / 4 and loss([[1, 3], [1, 1]], "std", "token") == 1 / 3


@pytest.mark.parametrize("form", ["luffy", "logp"])
@pytest.mark.parametrize("tis_cap, kl_coef", [(0.0, 0.0), (1.5, 0.0), (1.5, 0.05), (0.0, 0.05)])
def test_loss_against_its_definition(form, tis_cap, kl_coef, on_ranks):
    """Value, gradient and figures by hand. Anchors' other log-probabilities must not matter."""
    x, a, w, anchor = -draw(0, 200).abs(), draw(1, 200).round(), draw(2, 200), draw(3, 200) < -0.5
    old, ref, rollout = (x + scale * draw(4 + i, 200) for i, scale in enumerate((0.3, 1, 0.5)))
    for nonsense, of_anchor in enumerate((-2000.0, math.inf, 0.0, -math.inf)):
        for value in (old, ref, rollout):
            value[anchor & (torch.arange(200) % 4 == nonsense)] = of_anchor
    batch = SimpleNamespace(old_logp=old, advantage=a, weight=w, is_anchor=anchor, ref_logp=ref,
                            rollout_logp=rollout)
    logp, figures = x.clone().requires_grad_(), Figures("cpu")
    loss = policy_loss(logp, batch, "clip", 0.1, 0.3, kl_coef, tis_cap, anchor_loss=form,
                       figures=figures)
    got = torch.autograd.grad(loss, logp)[0].numpy()
    adv, log_ratio, gap, d = (v[~anchor].numpy() for v in (a, x - old, old - rollout, ref - x))
    x, a, w, anchor = (v.numpy() for v in (x, a, w, anchor))
    ratio, importance, kl, gap = np.exp(log_ratio), np.exp(gap), np.exp(d) - d - 1, abs(gap)
    cut = (adv > 0) & (ratio > 1.3) | (adv < 0) & (ratio < 0.9)
    cap = importance.clip(max=tis_cap) if tis_cap else 1
    value, slope, pi = np.zeros(200), np.zeros(200), np.exp(x[anchor])
    value[~anchor] = -cap * np.minimum(ratio * adv, ratio.clip(0.9, 1.3) * adv) + kl_coef * kl
    slope[~anchor] = -cap * ratio * adv * ~cut + kl_coef * (1 - np.exp(d))
    value[anchor] = -a[anchor] * (x[anchor] if form == "logp" else pi / (pi + 0.1))
    slope[anchor] = -a[anchor] * (1 if form == "logp" else 0.1 * pi / (pi + 0.1)**2)
    assert loss.item() == pytest.approx(w @ value) and got == pytest.approx(w * slope, abs=1e-12)
    assert kl_coef or (got[a == 0] == 0).all()  # exactly no gradient
    assert cut.sum() > 9 and (importance > 1.5).sum() > 9
    of_step = {"train/clip_fraction": cut.mean(), "train/kl_old": (ratio - log_ratio - 1).mean(),
               "gap/mean": gap.mean(), "gap/max": gap.max(), "gap/importance": importance.mean(),
               "train/tokens": len(adv)}
    of_step |= {"train/kl": kl.mean()} if kl_coef else {}
    of_step |= {"gap/importance_cut": (importance > tis_cap).mean()} if tis_cap else {}
    assert on_ranks(figures.all_ranks) == [pytest.approx(of_step)]


def make_batch(lengths, seed=0):
    """(logp, batch) of responses of several lengths, each with one advantage, 0 among them."""
    n = sum(lengths)
    response = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    a = torch.tensor([1.0, -1.0, 0.0, 0.5, -2.0] * 3, dtype=torch.float64)[:len(lengths)]
    logp = -draw(seed, n).abs()
    old = logp + 0.3 * draw(seed + 1, n)
    return logp.requires_grad_(), SimpleNamespace(
        old_logp=old, rollout_logp=old, advantage=a[response], weight=draw(seed + 2, n).abs(),
        is_anchor=torch.zeros(n, dtype=torch.bool), response=response, update_tokens=2 * n,
        right=a > 0)


def test_responses_whose_importance_is_far_from_1_are_left_out(on_ranks):
    lengths, figures = [3, 1, 4, 2, 5], Figures("cpu")
    logp, batch = make_batch(lengths)
    batch.ref_logp, batch.is_anchor[8:10] = batch.old_logp + 0.1, True  # the fourth response
    # products e^0.3, e^-1, e^0.2, of an anchor's nonsense, e^1
    apart = [0.1, 0.1, 0.1, -1.0, 0.5, -0.3, 0.5, -0.5, 9.0, 9.0, 0.2, 0.2, 0.2, 0.2, 0.2]
    batch.rollout_logp = batch.old_logp - torch.tensor(apart, dtype=torch.float64)
    out, how = [1, 4], dict(kl_coef=0.1, tis_cap=2.0)
    got = policy_loss(logp, batch, **how, seq_mask_cap=1.5, figures=figures)
    assert on_ranks(figures.all_ranks)[0]["gap/responses_left_out"] == len(out)
    batch.weight[torch.isin(batch.response, torch.tensor(out))] = 0
    assert got == policy_loss(logp, batch, **how) and got != 0


@pytest.mark.parametrize("lengths", [[1], [3, 1, 4, 2, 5], [1, 1, 1, 1, 1, 1]])
def test_gspo_is_the_loss_of_whole_responses(lengths):
    """Each response weighted alike, autograd through the geometric mean itself; no clip fires."""
    for low, high in ((0.9, 9.0), (0.01, 0.02)):
        logp, batch = make_batch(lengths)
        batch.weight = 1 / torch.tensor(lengths, dtype=torch.float64)[batch.response]
        want = 0.0
        for i, n in enumerate(lengths):
            own = batch.response == i
            s, a = ((logp - batch.old_logp)[own].sum() / n).exp(), batch.advantage[own][0]
            want = want - torch.minimum(s * a, s.clamp(1 - low, 1 + high) * a)
        got = policy_loss(logp, batch, "gspo", low, high)
        assert got.item() == pytest.approx(want.item())
        gradients = [torch.autograd.grad(x, logp)[0] for x in (got, want)]
        assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)


def test_gspo_keeps_the_credit_of_tokens():
    """GSPO-token: with advantages of its own a token's gradient is w A s, s of its response."""
    logp, batch = make_batch([3, 4])
    batch.advantage = draw(9, 7)
    got, = torch.autograd.grad(policy_loss(logp, batch, "gspo", 0.99, 9.0), logp)
    ratio = torch.cat([x.mean().exp().expand(len(x))
                       for x in (logp.detach() - batch.old_logp).split([3, 4])])
    assert torch.allclose(got, -batch.weight * batch.advantage * ratio)


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (1.0, 0.05)])
def test_cispo_cuts_no_gradient_off(low, high):
    logp, batch = make_batch([30, 9, 4, 7, 50])
    got, = torch.autograd.grad(policy_loss(logp, batch, "cispo", low, high), logp)
    ratio = np.exp((logp.detach() - batch.old_logp).numpy())
    want = -batch.weight.numpy() * ratio.clip(1 - low, 1 + high) * batch.advantage.numpy()
    assert got.numpy() == pytest.approx(want) and ((ratio > 1 + high) & (want != 0)).any()


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
def test_llds_is_its_definition(loss):
    """lambda / tokens of the update x sum over tokens with A >= 0 of responses that lost
    likelihood of max(0, old - logp); nothing before the weights move, nothing of anchors."""
    lengths = [3, 1, 4, 2, 5, 1, 6, 2]
    logp, batch = make_batch(lengths, 3)
    batch.is_anchor[4:8] = True  # the third response
    value, slope, gated = 0.0, np.zeros(len(logp)), 0
    lost = (batch.old_logp - logp.detach()).numpy()
    for i in range(len(lengths)):
        own = np.flatnonzero(batch.response == i)
        if i == 2 or lost[own].sum() <= 0 or batch.advantage[own[0]] < 0:
            continue
        gated += 1
        for t in own:
            value += 0.7 * max(0, lost[t]) / batch.update_tokens
            slope[t] -= 0.7 * (lost[t] > 0) / batch.update_tokens
    with_it, without = (policy_loss(logp, batch, loss, llds=x) for x in (0.7, 0.0))
    got, = torch.autograd.grad(with_it - without, logp)
    assert 0 < gated < 5 and (with_it - without).item() == pytest.approx(value)
    assert got.numpy() == pytest.approx(slope, abs=1e-12)
    batch.old_logp = logp.detach()
    assert policy_loss(logp, batch, loss, llds=0.7) == policy_loss(logp, batch, loss)
