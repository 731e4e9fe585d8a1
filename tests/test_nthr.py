"""NTHR's scores, selection and GWHES, and DaGRPO's masks and losses, against the formulas written out and autograd."""
import math

import numpy as np
import pytest
import torch

from advantages import (anchor_loss, clipped_loss, dagrpo_margins, dagrpo_masks, group_advantages, group_tokens, gwhes, influence,
                        nthr_select, policy_loss, random_like, token_advantages, token_weights,
                        truncated_importance)

D, V = 7, 19


def make_group(rewards, lengths, seed=0, temperature=1.0):
    """Random states, head and tokens of one group in float64, with what the formulas need."""
    g = torch.Generator().manual_seed(seed)
    response = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    h = torch.randn(len(response), D, generator=g, dtype=torch.float64)
    head = torch.randn(V, D, generator=g, dtype=torch.float64)
    y = torch.randint(V - 6, (len(response),), generator=g)  # some of the vocabulary is in no response
    rewards = torch.tensor(rewards, dtype=torch.float64)
    lse = (h @ head.T / temperature).logsumexp(-1)
    return h, y, lse, head, rewards, response, torch.zeros(len(lengths), dtype=torch.int64)


def eq_7(h, y, head, source, temperature, vocab):
    """s as the double sum over tokens, alpha = <u_k, u_k'> explicit."""
    pi = (h @ head.T / temperature).softmax(-1)
    keep = sorted(set(y.tolist())) if vocab == "response" else range(len(head))
    s = []
    for t in range(len(h)):
        total = 0.0
        for k in range(len(h)):
            if source[k]:
                alpha = sum(((v == y[k]).double() - pi[k, v]) * ((v == y[t]).double() - pi[t, v]) for v in keep)
                total = total + alpha * (h[k] @ h[t])
        s.append(total)
    return torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in s])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocab", ["response", "full"])
@pytest.mark.parametrize("rewards, lengths", [([1, 0, 1, 0], [3, 4, 2, 1]), ([0, 1], [1, 1]), ([0, 0], [2, 3]),
                                              ([1, 1], [2, 2]), ([1, 0, 1], [6, 4, 5])])  # the last: more sources than D
def test_influence_is_eq_7(rewards, lengths, vocab, temperature):
    h, y, lse, head, r, response, _ = make_group(rewards, lengths, 1, temperature)
    source = r[response] == 1
    want = eq_7(h, y, head, source, temperature, vocab)
    for chunk in (1, 3, 1000):
        got = influence(h, y, lse, head, source, temperature, vocab, chunk)
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lengths", [[3, 4, 2, 1], [9, 4, 12, 6]])  # fewer source tokens than D, and more
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_influence_is_the_inner_product_of_head_gradients(temperature, lengths):
    h, y, lse, head, r, response, _ = make_group([1, 0, 1, 0], lengths, 2, temperature)
    w = head.clone().requires_grad_()
    logp = (h @ w.T / temperature).log_softmax(-1)[torch.arange(len(y)), y]
    grads = [torch.autograd.grad(x, w, retain_graph=True)[0] for x in logp]
    source = r[response] == 1
    m = sum(g for g, s in zip(grads, source) if s)
    want = torch.stack([(g * m).sum() for g in grads]) * temperature ** 2
    assert torch.allclose(influence(h, y, lse, head, source, temperature, "full", 4), want, rtol=1e-9)


def algorithm_1(s, rewards, lengths, beta):
    """Selection of one group, written out token by token."""
    spans, at = [], 0
    for n in lengths:
        spans.append(range(at, at + n))
        at += n
    correct = [i for i, r in enumerate(rewards) if r == 1]
    if not correct:
        return math.inf, []
    means = [sum(float(s[t]) for t in spans[i]) / len(spans[i]) for i in correct]
    tau = -math.inf if beta == -math.inf else beta * min(means)
    return tau, [t for i, r in enumerate(rewards) if r == 0 for t in spans[i] if float(s[t]) > tau]


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.0, -1.0, -math.inf])
def test_selection_is_algorithm_1(beta):
    cases = [([1, 0, 1, 0], [3, 4, 2, 1]), ([0, 0], [2, 3]), ([1, 1, 1], [1, 2, 1]), ([0, 1], [1, 1]),
             ([0, 0, 0, 1], [5, 1, 9, 2])]
    signs = set()
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        s = [torch.randn(sum(n), generator=g, dtype=torch.float64) for _, n in cases]
        rewards = torch.tensor([x for r, _ in cases for x in r], dtype=torch.float64)
        lengths = torch.tensor([x for _, n in cases for x in n])
        response = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        group = torch.repeat_interleave(torch.arange(len(cases)), torch.tensor([len(r) for r, _ in cases]))
        selected, tau = nthr_select(torch.cat(s), rewards, response, group, beta)
        at = 0
        for i, (r, n) in enumerate(cases):
            want_tau, want = algorithm_1(s[i], r, n, beta)
            assert tau[i].item() == pytest.approx(want_tau)
            assert selected[at:at + sum(n)].nonzero()[:, 0].tolist() == want
            at += sum(n)
            signs.add(np.sign(want_tau))
    assert beta in (0.0, -math.inf) or {-1, 1} <= signs  # negative and positive thresholds were both met


def test_ties_at_tau_are_not_selected():
    s = torch.tensor([2.0, 4.0, 3.0, 3.1, 2.9])  # tau = mean(2, 4) = 3
    rewards, response = torch.tensor([1.0, 0.0]), torch.tensor([0, 0, 1, 1, 1])
    selected, tau = nthr_select(s, rewards, response, torch.tensor([0, 0]))
    assert tau.tolist() == [3.0] and selected.tolist() == [False, False, False, True, False]
    s[2:] = 5.0
    assert nthr_select(s, rewards, response, torch.tensor([0, 0]))[0].tolist() == [False, False, True, True, True]
    # tau 0 exactly: s = 0 stays
    selected, _ = nthr_select(torch.tensor([1.0, 0.0, 1e-9]), rewards, torch.tensor([0, 1, 1]), torch.tensor([0, 0]), 0.0)
    assert selected.tolist() == [False, False, True]


def test_random_takes_as_many_tokens_from_every_response():
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 1, 8, 1, 30])
    response = torch.repeat_interleave(torch.arange(5), lengths)
    selected = torch.rand(45, generator=g) < 0.4
    selected[:5], selected[5] = False, True
    counts = torch.zeros(45)
    for seed in range(300):
        picked = random_like(selected, response, torch.Generator().manual_seed(seed))
        assert torch.equal(torch.bincount(response[picked], minlength=5), torch.bincount(response[selected], minlength=5))
        counts += picked
    share = torch.bincount(response[selected], minlength=5) / lengths
    assert (counts / 300 - share[response]).abs().max() < 0.15  # uniform: every token as often as its response's share
    again = random_like(selected, response, torch.Generator().manual_seed(299))
    assert torch.equal(picked, again)


def test_gwhes_is_eq_5():
    rewards, lengths = [1, 0, 1, 0, 0], [3, 4, 2, 1, 2]
    h, y, lse, head, r, response, group = make_group(rewards, lengths, 3)
    s = [influence(h, y, lse, head, r[response] == x, vocab="full") for x in (1, 0)]
    got = gwhes(*s, r, response, group)
    u = torch.nn.functional.one_hot(y, V) - (h @ head.T).softmax(-1)
    pair = (u @ u.T) * (h @ h.T)
    p = 0.4
    for i in range(5):
        if rewards[i] == 0:
            assert got[i].isnan()
            continue
        mine = response == i
        plus = pair[mine][:, r[response] == 1].sum() * (1 - p) / math.sqrt(p * (1 - p))
        minus = pair[mine][:, r[response] == 0].sum() * p / math.sqrt(p * (1 - p))
        assert got[i].item() == pytest.approx((minus - plus).item(), rel=1e-9)
    assert gwhes(*s, torch.ones(5).double(), response, group).isnan().all()


def test_theorem_4_4_terms_against_a_finite_difference():
    """Free-feature model (h and W parameters), gradient flow on the GRPO objective of one group: d/dt ln pi(y+) of correct
    response i is, through W, the score of eq. 5 with its sign turned, and, through h, p+ of its own states' squared
    gradients (each state belongs to one token). Both against a small explicit step."""
    rewards, lengths = [1, 0, 1, 0], [3, 4, 2, 2]
    h, y, lse, head, r, response, group = make_group(rewards, lengths, 4)
    a = group_advantages(r, group)[response]
    index = torch.arange(len(y))

    def loglik(h, w):
        return (h @ w.T).log_softmax(-1)[index, y]

    hp, wp = h.clone().requires_grad_(), head.clone().requires_grad_()
    gh, gw = torch.autograd.grad((a * loglik(hp, wp)).sum(), (hp, wp))  # gradient flow: dtheta/dt
    eps = 1e-6
    rate = (loglik(h + eps * gh, head + eps * gw) - loglik(h - eps * gh, head - eps * gw)) / (2 * eps)  # (N,)
    s = [influence(h, y, lse, head, r[response] == x, vocab="full") for x in (1, 0)]
    score = gwhes(*s, r, response, group)
    u = torch.nn.functional.one_hot(y, V) - (h @ head.T).softmax(-1)
    own = a * (u @ head).square().sum(-1)  # <W^T u_k, a_k W^T u_k>
    for i in (0, 2):
        mine = response == i
        assert rate[mine].sum().item() == pytest.approx((own[mine].sum() - score[i]).item(), rel=1e-6)


# --- the real model's tensors ----------------------------------------------------------------------------------------

def test_scores_through_the_real_model(model_dir):
    """influence on the states that the packed forward returns, against autograd through transformers' own head."""
    from transformers import AutoModelForCausalLM
    from model_utils import load_policy, pack_all
    from test_model_utils import random_groups

    groups = random_groups(49152, [(9, [6, 4, 5])])
    policy = load_policy(model_dir, torch.float32, torch.device("cpu"))
    batch, = pack_all(groups, [[(0, [0, 1, 2])]], "cpu")
    with torch.no_grad():
        logp, _, h, lse = policy(batch, 0.9, states=True)
    source = torch.tensor([1] * 6 + [0] * 9).bool()
    head = policy.model.get_output_embeddings().weight
    full = influence(h, batch.targets, lse, head, source, 0.9, "full", chunk=4)
    part = influence(h, batch.targets, lse, head, source, 0.9, "response", chunk=4)
    index, vocabulary = group_tokens(groups[0]["responses"], [1, 0, 0], "cpu")  # known on the host: the same
    assert torch.equal(part, influence(h, batch.targets, lse, head, index, 0.9, vocabulary, chunk=4))

    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    rows = []
    for response in groups[0]["responses"]:
        ids = torch.from_numpy(np.concatenate([groups[0]["prompt"], response]).astype(np.int64))[None]
        with torch.no_grad():
            rows.append(plain.model(input_ids=ids).last_hidden_state[0, 8:-1])
    hidden, y = torch.cat(rows).double(), batch.targets
    w = plain.lm_head.weight.double().detach().requires_grad_()
    logps = (hidden @ w.T / 0.9).log_softmax(-1)
    m, = torch.autograd.grad(logps[torch.arange(15), y][source].sum(), w, retain_graph=True)
    for t in range(15):
        g, = torch.autograd.grad(logps[t, y[t]], w, retain_graph=True)
        assert full[t].item() == pytest.approx((g * m).sum().item() * 0.81, rel=2e-3, abs=1.0)
    pi = logps.detach().exp()
    keep = y.unique()
    u = (torch.nn.functional.one_hot(y, w.shape[0]) - pi)[:, keep]
    want = ((u @ u[source].T) * (hidden @ hidden[source].T)).sum(1)
    assert torch.allclose(part.double(), want, rtol=2e-3, atol=1.0)
    assert want.abs().max() > 100  # so that an absolute error of 1 is small


# --- DaGRPO ----------------------------------------------------------------------------------------------------------

def test_nothing_in_a_micro_batch_waits_for_the_gpu(model_dir, monkeypatch):
    """The work of train.py's loop on tensors without data (device meta), where whatever asks the device for a value (item,
    nonzero, unique, bincount, a boolean index) raises: forward, scores, selection, loss, backward."""
    from contextlib import nullcontext
    from dataclasses import fields, replace
    from transformers import AutoConfig, AutoModelForCausalLM
    from model_utils import Policy, pack_all
    from test_model_utils import random_groups

    groups = random_groups(49152, [(9, [6, 4, 5]), (3, [2, 2]), (5, [7, 1])])
    batch, = pack_all(groups, [[(0, [0, 1, 2]), (1, [0, 1]), (2, [0, 1])]])
    batch = replace(batch, **{f.name: x.to("meta") for f in fields(batch) if isinstance(x := getattr(batch, f.name), torch.Tensor)})
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(model_dir, num_hidden_layers=2)
        policy = Policy(AutoModelForCausalLM.from_config(config, attn_implementation="packed"), torch.float32)
        rewards, group = torch.zeros(7), torch.zeros(7, dtype=torch.int64)
        response, rollout_logp, weights = torch.zeros(27, dtype=torch.int64), torch.zeros(27), torch.zeros(27)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # there is none for meta
    logp, entropy, h, lse = policy(batch, 1.0, states=True)
    head = policy.model.get_output_embeddings().weight.detach()
    for vocab in ("response", "full"):
        s = []
        for first, g in zip((0, 15, 19), groups):
            span = slice(first, first + sum(map(len, g["responses"])))
            source, rows = group_tokens(g["responses"], [1] + [0] * (len(g["responses"]) - 1), "meta")
            s.append(influence(h[span], batch.targets[span], lse[span], head, source, 1.0, rows if vocab == "response" else "full"))
    selected, tau = nthr_select(torch.cat(s), rewards, response, group, 1.0, groups=3)
    picked = random_like(selected, response, torch.Generator().manual_seed(0))
    a = group_advantages(rewards, group)
    for variant, chosen in (("nthr", selected), ("random", picked)):
        per_token = token_advantages(variant, a, rewards, response, group, chosen)
    importance, ratio = truncated_importance(logp, rollout_logp, 2.0)
    loss, *_ = policy_loss(logp, logp.detach(), per_token, weights, kl_coef=0.1, ref_logp=rollout_logp, anchor=selected,
                           importance=importance)
    loss.backward()
    assert loss.is_meta and all(p.grad is not None and p.grad.is_meta for p in policy.parameters())
    with pytest.raises(Exception):
        nthr_select(torch.cat(s), rewards, response, group)  # looks the number of groups up: the device is asked


def test_dagrpo_masks_against_a_loop():
    g = torch.Generator().manual_seed(0)
    group = torch.repeat_interleave(torch.arange(40), 6)
    scores = torch.randint(1, 11, (240,), generator=g).double()
    rewards = (torch.rand(240, generator=g) < 0.5).double()
    rewards[:6], rewards[6:12] = 0, 1
    a = group_advantages(rewards, group, "mean")
    for delta in (1.0, 3.0, 5.0):
        lam = dagrpo_masks(scores, a, group, delta)
        for i in range(240):
            others = [j for j in range(240) if group[j] == group[i]]
            if a[i] > 0:
                want = scores[i] - max(scores[j] for j in others if a[j] < 0) >= delta
            elif a[i] < 0:
                want = min(scores[j] for j in others if a[j] > 0) - scores[i] >= delta
            else:
                want = False
            assert lam[i].item() == float(want)
        assert 0 < lam.sum() < 240
    # exactly delta apart counts
    edge = dagrpo_masks(torch.tensor([7.0, 4.0, 4.1]), torch.tensor([1.0, -1.0, -1.0]), torch.zeros(3).long(), 3.0)
    assert edge.tolist() == [0.0, 1.0, 0.0]
    # neither a response without advantage nor one without an opposite has a gradient to keep
    for score in (1.0, 9.0):
        lam = dagrpo_masks(torch.tensor([9.0, score, 1.0]), torch.tensor([1.0, 0.0, -1.0]), torch.zeros(3).long())
        assert lam.tolist() == [1, 0, 1]
    for sign in (1.0, -1.0):
        assert dagrpo_masks(torch.tensor([5.0, 5.0]), torch.tensor([sign, 0.0]), torch.zeros(2).long()).tolist() == [0, 0]


def test_margins_and_groups_that_were_not_judged():
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    a = torch.tensor([2.0, -1, -1, 1, 0, -1, 0, 0])
    scores = torch.tensor([9.1, 4.0, 6.1, 8.0, 9.0, torch.nan, 3.0, 1.0])
    margins = dagrpo_margins(scores, a, group)
    assert torch.allclose(margins[:3], torch.tensor([3.0, 5.1, 3.0])) and margins[3:6].isnan().all()
    assert (margins[6:] == -torch.inf).all()  # nothing to tell apart
    assert dagrpo_masks(scores, a, group).tolist() == [1, 1, 1, 1, 1, 1, 0, 0]  # not judged: without masks
    assert dagrpo_masks(scores, a, group, 4.0).tolist() == [0, 1, 0, 1, 1, 1, 0, 0]
    assert len(dagrpo_margins(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64))) == 0


@pytest.mark.parametrize("form", ["luffy", "logp"])
def test_loss_of_rollouts_and_anchors_against_its_definition(form):
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(200, generator=g, dtype=torch.float64)
    logp = (-draw().abs()).requires_grad_()
    old, ref, a, w = logp.detach() + 0.3 * draw(), logp.detach() + draw(), draw(), draw().abs()
    anchor = torch.rand(200, generator=g) < 0.3
    old[anchor] = torch.where(torch.rand(int(anchor.sum()), generator=g) < 0.5, -2000.0, 0.0).double()  # nobody's: must not matter
    loss, clipped, kl = policy_loss(logp, old, a, w, 0.2, 0.3, 0.05, ref, anchor, form)
    got, = torch.autograd.grad(loss, logp)
    want = torch.zeros((), dtype=torch.float64)
    for i in range(200):
        if anchor[i]:
            term = a[i] * (logp[i] if form == "logp" else logp[i].exp() / (logp[i].exp() + 0.1))
            assert clipped[i] == kl[i] == 0
        else:
            ratio = (logp[i] - old[i]).exp()
            term = torch.minimum(ratio * a[i], ratio.clamp(0.8, 1.3) * a[i])
            term = term - 0.05 * ((ref[i] - logp[i]).exp() - (ref[i] - logp[i]) - 1)
        want = want - w[i] * term
    assert loss.item() == pytest.approx(want.item()) and torch.allclose(got, torch.autograd.grad(want, logp)[0])
    assert 0 < clipped.sum() and kl[~anchor].min() > 0
    # without anchors in it, the loss is the same with and without being told so
    none = policy_loss(logp, logp.detach(), a, w, anchor=torch.zeros(200, dtype=torch.bool), anchor_form=form)
    assert torch.equal(none[0], policy_loss(logp, logp.detach(), a, w)[0])


def test_all_masked_group_has_exactly_no_gradient():
    rewards, group = torch.tensor([1.0, 0, 1, 0]), torch.zeros(4, dtype=torch.int64)
    response = torch.tensor([0, 0, 1, 2, 3, 3])
    a = group_advantages(rewards, group, "mean")
    lam = dagrpo_masks(torch.tensor([5.0, 4.0, 5.0, 5.0]), a, group)
    adv = token_advantages("dagrpo", a, rewards, response, group, lam=lam)
    logp = torch.randn(6, requires_grad=True)
    w = token_weights(response, group, 1, "constant", max_tokens=8)
    loss = (w * clipped_loss(logp, logp.detach() + 0.1, adv, 0.2, 0.2)[0]).sum()
    loss.backward()
    assert lam.sum() == 0 and loss.item() == 0 and (logp.grad == 0).all()


def test_anchor_gradients():
    logp = -3 * torch.rand(50, dtype=torch.float64)
    logp.requires_grad_()
    a = torch.randn(50, dtype=torch.float64)
    got, = torch.autograd.grad(anchor_loss(logp, a).sum(), logp)
    pi = logp.exp()
    assert torch.allclose(got, -a * 0.1 * pi / (pi + 0.1) ** 2)
    got, = torch.autograd.grad(anchor_loss(logp, a, "logp").sum(), logp)
    assert torch.allclose(got, -a)


def test_union_advantages_with_an_anchor():
    """7 wrong rollouts and a correct demonstration: mean 1/8, so +7/8 for the anchor and -1/8 for each rollout."""
    a = group_advantages(torch.tensor([0.0] * 7 + [1.0]), torch.zeros(8, dtype=torch.int64), "mean")
    assert torch.allclose(a, torch.tensor([-1 / 8] * 7 + [7 / 8]))


def test_truncated_importance_against_its_definition():
    """The gradient of min(pi_old / pi_rollout, cap) x the clipped surrogate by finite differences; the KL term keeps its own
    weight, anchors have none, and no gradient goes through the weight, whose pi_old is the same tensor as logp here."""
    g = torch.Generator().manual_seed(0)
    n = 40
    logp, rollout, ref = (-torch.rand(n, generator=g, dtype=torch.float64) * 3 for _ in range(3))
    a, w = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2))
    anchor = torch.rand(n, generator=g) < 0.2
    cap = 2.0
    x = logp.clone().requires_grad_()
    importance, ratio = truncated_importance(x, rollout, cap)
    assert not importance.requires_grad and torch.allclose(ratio, (logp - rollout).exp())
    assert (importance == cap).sum() > 3 and (importance < cap).sum() > 3 and importance.max() == cap
    loss, *_ = policy_loss(x, x.detach(), a, w, 0.2, 0.2, 0.3, ref, anchor, "logp", importance)
    got, = torch.autograd.grad(loss, x)
    for i in range(n):
        pi, q = math.exp(logp[i]), math.exp(rollout[i])
        if anchor[i]:
            want = -a[i]
        else:  # d/dlogp of -min(g A, clip A) at g = 1 is -A; of k3: 1 - pi_ref / pi
            want = -a[i] * min(pi / q, cap) + 0.3 * (1 - math.exp(ref[i] - logp[i]))
        assert got[i].item() == pytest.approx((w[i] * want).item(), rel=1e-9, abs=1e-12)
    same, *_ = policy_loss(x, x.detach(), a, w, 0.2, 0.2, 0.3, ref, anchor, "logp", torch.ones(n, dtype=torch.float64))
    assert torch.equal(same, policy_loss(x, x.detach(), a, w, 0.2, 0.2, 0.3, ref, anchor, "logp")[0])
