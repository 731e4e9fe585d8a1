import math

import pytest
import torch

from advantages import check_rewards, clipped_loss, group_advantages, kl_k3, token_advantages, token_weights

GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
REWARDS = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.float64)
LENGTHS = torch.tensor([3, 1, 2, 4, 1, 1, 1, 1, 2, 5, 1, 1])
RESPONSE = torch.repeat_interleave(torch.arange(12), LENGTHS)


def test_grpo_by_hand():
    # one right answer of four: mean 1/4, population std sqrt(3)/4
    a = group_advantages(REWARDS, GROUP)
    assert torch.allclose(a[:4], torch.tensor([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3, dtype=torch.float64))
    assert (a[4:] == 0).all()  # all wrong, all right: no signal, and no 0/0


def test_grpo_against_a_loop():
    g = torch.Generator().manual_seed(0)
    group = torch.repeat_interleave(torch.arange(50), 7)
    rewards = (torch.rand(350, generator=g, dtype=torch.float64) < 0.4).double()
    a = group_advantages(rewards, group)
    for i in range(50):
        r = rewards[7 * i:7 * i + 7]
        p = r.mean().item()
        for got, reward in zip(a[7 * i:7 * i + 7].tolist(), r.tolist()):
            # NTHR paper: p+ = (1-p)/sqrt(p(1-p)), p- = p/sqrt(p(1-p))
            want = 0 if p in (0, 1) else ((1 - p) if reward else -p) / math.sqrt(p * (1 - p))
            assert got == pytest.approx(want, abs=1e-12)


def test_advantage_edges():
    assert torch.equal(group_advantages(REWARDS, GROUP, "mean")[:4], torch.tensor([0.75, -0.25, -0.25, -0.25]).double())
    assert len(group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64))) == 0  # a rank without groups
    check_rewards(REWARDS)
    with pytest.raises(ValueError, match="0.5"):
        check_rewards(torch.tensor([1.0, 0.5]))


def test_variants_per_token():
    a = group_advantages(REWARDS, GROUP)
    selected = torch.zeros(len(RESPONSE), dtype=torch.bool)
    selected[[3, 5, 8]] = True
    adv = lambda variant, **kw: token_advantages(variant, a, REWARDS, RESPONSE, GROUP, **kw)
    assert torch.equal(adv("grpo"), a[RESPONSE])
    assert (adv("pos_only")[:3] == a[0]).all() and (adv("pos_only")[3:10] == 0).all()
    for eta, value in (("2|0.5-p|", 0.5), ("p", 0.25), ("1-p", 0.75), (0.3, 0.3), (0.0, 0.0), (-1.0, -1.0)):
        want = a[RESPONSE].clone()
        want[[3, 5, 8]] *= value
        assert torch.allclose(adv("nthr", selected=selected, eta=eta), want)
    want = a[RESPONSE].clone()
    want[[3, 5, 8]] = 0
    assert torch.equal(adv("random", selected=selected), want)
    lam = torch.tensor([1, 0, 1, 1] * 3).double()
    assert torch.equal(adv("dagrpo", lam=lam), (a * lam)[RESPONSE])


def test_lemma_4_2_grpo_gradient_is_p_plus_and_p_minus_sums():
    """For binary rewards the on-policy gradient of the group's loss is -(p+ sum of correct - p- sum of incorrect
    responses' gradients of log pi) / tokens, p+ = (1-p)/sqrt(p(1-p)), p- = p/sqrt(p(1-p))."""
    response = torch.repeat_interleave(torch.arange(4), LENGTHS[:4])
    theta = torch.randn(6, dtype=torch.float64, requires_grad=True)
    logp = torch.randn(len(response), 6, dtype=torch.float64) @ theta
    a = token_advantages("grpo", group_advantages(REWARDS[:4], GROUP[:4]), REWARDS[:4], response, GROUP[:4])
    w = token_weights(response, GROUP[:4], 1).double()
    got, = torch.autograd.grad((w * clipped_loss(logp, logp.detach(), a, 0.2, 0.2)[0]).sum(), theta, retain_graph=True)
    p = 0.25
    right, wrong = logp[:3].sum(), logp[3:].sum()
    want, = torch.autograd.grad(-((1 - p) * right - p * wrong) / math.sqrt(p * (1 - p)) / len(response), theta)
    assert torch.allclose(got, want, rtol=1e-6)


def test_weights_are_eq_1():
    w = token_weights(RESPONSE, GROUP, 3).double()
    start = 0
    for lengths in LENGTHS.view(3, 4):
        n = int(lengths.sum())
        assert torch.allclose(w[start:start + n], torch.full((n,), 1 / (3 * n), dtype=torch.float64))
        start += n
    assert w.sum().item() == pytest.approx(1)


def test_worked_example_of_the_normalisations():
    """Two groups of two responses: one token right, three wrong; two right, two wrong. A = +1, -1 with std, +-1/2 without.

    eq. 1:    -((1 x 1 - 3 x 1) / 4 + (2 - 2) / 4) / 2                = 1/4
    DAPO:     -(1 - 3 + 2 - 2) / 8                                    = 1/4
    Dr.GRPO:  -(1/2 - 3/2 + 1 - 1) / (2 responses x 5 max x 2 groups) = 1/20
    """
    response = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3])
    group, rewards = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0, 1, 0])
    logp = torch.randn(8)

    def loss(advantage_norm, norm):
        a = group_advantages(rewards, group, advantage_norm)[response]
        w = token_weights(response, group, 2, norm, tokens_in_update=8, max_tokens=5)
        return (w * clipped_loss(logp, logp, a, 0.2, 0.2)[0]).sum().item()

    assert loss("std", "group") == pytest.approx(1 / 4)
    assert loss("std", "token") == pytest.approx(1 / 4)
    assert loss("mean", "constant") == pytest.approx(1 / 20)
    # lengths that differ between groups tell eq. 1 from DAPO: 1 right, 3 wrong; 1 right, 1 wrong
    response = torch.tensor([0, 1, 1, 1, 2, 3])
    a = group_advantages(rewards, group)[response]
    assert (token_weights(response, group, 2) * -a).sum().item() == pytest.approx(1 / 4)
    assert (token_weights(response, group, 2, "token", tokens_in_update=6) * -a).sum().item() == pytest.approx(1 / 3)


def test_clipped_loss_against_its_definition_and_autograd():
    g = torch.Generator().manual_seed(1)
    logp = torch.randn(400, generator=g, dtype=torch.float64).requires_grad_()
    old = logp.detach() + 0.3 * torch.randn(400, generator=g, dtype=torch.float64)
    adv = torch.randn(400, generator=g, dtype=torch.float64)
    adv[:20] = 0
    loss, clipped = clipped_loss(logp, old, adv, 0.1, 0.3)
    loss.sum().backward()
    for i in range(400):
        ratio, a = math.exp(logp[i].item() - old[i].item()), adv[i].item()
        want = min(ratio * a, min(max(ratio, 0.9), 1.3) * a)
        cut = (a > 0 and ratio > 1.3) or (a < 0 and ratio < 0.9)
        assert loss[i].item() == pytest.approx(-want, abs=1e-12)
        assert clipped[i].item() == cut
        assert logp.grad[i].item() == pytest.approx(0 if cut else -ratio * a, abs=1e-12)
    assert 0 < clipped.sum() < 400


def test_on_policy_gradient_is_minus_advantage():
    logp = torch.randn(5, dtype=torch.float64, requires_grad=True)
    adv = torch.tensor([1.0, -2.0, 0.0, 0.5, -0.1], dtype=torch.float64)
    clipped_loss(logp, logp.detach(), adv, 0.2, 0.2)[0].sum().backward()
    assert torch.allclose(logp.grad, -adv)


def test_kl_estimates_kl():
    g = torch.Generator().manual_seed(2)
    p, q = (torch.randn(6, generator=g, dtype=torch.float64).log_softmax(0) for _ in "pq")
    assert (kl_k3(p, q) >= 0).all() and (kl_k3(p, p) == 0).all()
    assert (p.exp() * kl_k3(p, q)).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item())
