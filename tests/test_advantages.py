"""Advantages, scores and masks against the formulas, brute force and autograd."""
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_model_utils import batches_of, make_group, random_groups
from transformers import AutoConfig, AutoModelForCausalLM

import advantages
from advantages import Old, influence, nthr_select, response_advantages, token_advantages
from data import mixed
from losses import CHOICES, policy_loss
from metrics import Figures
from model_utils import Policy

D, V = 7, 19


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loglik(h, head, y, temperature=1.0):
    return (h @ head.T / temperature).log_softmax(-1)[range(len(y)), y]


def make_case(reward, lengths, seed=0, temperature=1.0, **fields):
    """(group, old, y, right): random tokens y of one group, its states and head in float64."""
    tokens = np.random.default_rng(seed).integers(V - 6, size=(len(lengths), max(lengths)))
    responses = [row[:n] for row, n in zip(tokens, lengths)]
    group = make_group([1], responses, reward, seed=seed, **fields)
    y = torch.from_numpy(np.concatenate(responses))
    h, head = draw(seed, len(y), D), draw(seed + 1, V, D)
    logp, lse = loglik(h, head, y, temperature), (h @ head.T / temperature).logsumexp(-1)
    log_pi = (h @ head.T / temperature).log_softmax(-1)
    old = Old(logp, -(log_pi.exp() * log_pi).sum(-1), h, lse, head, temperature)
    return group, old, y, torch.from_numpy(np.repeat(group.reward == 1, lengths))


def test_group_advantages_are_p_plus_and_p_minus():
    """[NTHR] Lemma 4.2: (1-p)/sqrt(p(1-p)) and -p/sqrt(p(1-p)); 0 in groups with one outcome."""
    for reward in (*(draw(0, 50, 7) < -0.3).float().numpy(), np.zeros(3), np.ones(3), np.ones(1)):
        p = sum(reward.tolist()) / len(reward)
        scale = math.sqrt(p * (1 - p)) or math.inf
        want = np.where(reward, 1 - p, -p)
        for norm, divisor in (("mean", 1), ("std", scale)):
            got = advantages.group_advantages(reward, norm)
            assert got == pytest.approx(want / divisor, abs=1e-12)
        signs = advantages.group_advantages(reward, "sign")
        assert signs.tolist() == [1 if r else -1 for r in reward]  # whatever the others are
    anchored = advantages.group_advantages(np.array([0.0] * 7 + [1]), "mean")  # it counts, too
    assert anchored == pytest.approx([-1 / 8] * 7 + [7 / 8])


@pytest.mark.parametrize("variant", ["nthr", "random", "spare_logp", "thr", "dagrpo", "pos_only"])
def test_of_rewards_that_are_fractions_those_over_a_half_are_right(variant):
    """They pick the same tokens as 0 and 1 do, whose advantages are those of the fractions."""
    lengths, score = [3, 1, 4, 2], np.array([9.0, 6.0, 6.1, 1.0])
    group, old, *_ = make_case([0.9, 0.2, 0.6, 0.5], lengths, score=score)
    whole, *_ = make_case([1, 0, 1, 0], lengths, score=score)
    assert group.correct.tolist() == [True, False, True, False] and mixed(group)
    got, factors = (token_advantages(variant, g, old, "mean", 1.0, 0.5, nthr_eta=0.0).numpy()
                    for g in (group, whole))
    A = np.array([0.35, -0.35 / 2, 0.05, -0.05 / 2]).repeat(lengths)
    assert got == pytest.approx(A * factors / np.array([0.5, -0.25] * 2).repeat(lengths), abs=1e-6)
    s = draw(3, 10)
    assert torch.equal(*(advantages.gwhes(s, s**2, g)[[0, 2]] for g in (group, whole)))
    assert advantages.group_advantages(group.reward, "sign").tolist() == [1, -1, 1, -1]
    assert not mixed(make_case([0.9, 0.6], [1, 1])[0])


@pytest.mark.parametrize("reward", [[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
@pytest.mark.parametrize("norm", ["std", "mean", "sign"])
def test_weights_pos_only_and_dagrpo(reward, norm):
    lengths = [3, 1, 4, 2]
    group, old, _, right = make_case(reward, lengths, score=np.array([9.0, 6.0, 6.1, 1.0]))
    lam = advantages.dagrpo_masks(group.score, advantages.group_advantages(group.reward))
    a = np.repeat(advantages.group_advantages(group.reward, norm), lengths)
    for variant, kept in (("grpo", 1), ("pos_only", a > 0), ("dagrpo", np.repeat(lam, lengths))):
        assert token_advantages(variant, group, old, norm).numpy() == pytest.approx(kept * a)
        weighted = token_advantages(variant, group, old, norm, 0.3, 2.0).numpy()
        assert weighted == pytest.approx(np.where(right, 0.3, 2) * kept * a)
    signal = advantages.response_advantages(group, norm, 0.0, 1.0).any()  # NSR: of wrong ones alone
    assert signal == (0 in reward if norm == "sign" else 0 < sum(reward) < 4)


def most(by, selected, lengths):
    """As many tokens of every response as are selected there, those with most of `by`."""
    picked = torch.zeros(len(by), dtype=torch.bool)
    for at in torch.arange(len(by)).split(lengths):
        picked[sorted(at.tolist(), key=lambda t: -by[t])[:int(selected[at].sum())]] = True
    return picked


@pytest.mark.parametrize("variant, vocab", [
    ("nthr", "response"), ("nthr", "full"), ("random", "full"), ("spare_entropy", "response"),
    ("spare_logp", "full")])
@pytest.mark.parametrize("eta, of_p", [
    (None, lambda p: abs(1 - 2 * p)), ("2|0.5-p|", lambda p: abs(1 - 2 * p)), ("p", lambda p: p),
    ("1-p", lambda p: 1 - p), (-0.3, lambda p: -0.3), (0.0, lambda p: 0.0)])
def test_nthr_and_its_controls(variant, vocab, eta, of_p, on_ranks):
    """Figures are over incorrect tokens, of tau and eta over groups with a correct response."""
    ranks, seen, of_group = [Figures("cpu"), Figures("cpu")], [], []
    for i, reward in enumerate(([1, 0, 0], [0, 0], [1, 1], [0, 1, 0], [1, 0, 1])):
        lengths, p = [5, 9, 30][:len(reward)], sum(reward) / len(reward)
        group, old, y, right = make_case(reward, lengths, i)
        s = influence(old, y.numpy(), right.numpy(), vocab)
        picked, tau = nthr_select(s, group, 0.1)
        assert picked.any() == (0 < p < 1)
        draws = torch.rand(len(picked), generator=torch.Generator().manual_seed(i))
        by = dict(nthr=1.0 * picked, random=draws, spare_entropy=old.entropy, spare_logp=-old.logp)
        picked = most(by[variant], picked, lengths)
        a = np.repeat(advantages.group_advantages(group.reward), lengths)
        got = token_advantages(variant, group, old, nthr_beta=0.1, nthr_eta=eta, nthr_vocab=vocab,
                               figures=ranks[i % 2])
        left = 0.0 if variant == "random" else of_p(p)
        assert got.numpy() == pytest.approx(np.where(picked, left * a, a))
        seen += [(x.item(), score.item()) for x, score, r in zip(picked, s, right) if not r]
        of_group += [(tau.item(), of_p(p))] if 1 in reward else []
    (picked, s), (tau, etas) = np.array(seen).T, np.mean(of_group, 0)
    for told in on_ranks(*(figures.all_ranks for figures in ranks)):
        assert told == pytest.approx({
            "nthr/selected": picked.mean(), "nthr/tau": tau, "nthr/eta": etas})


@pytest.mark.parametrize("beta", [1.0, 0.1, -0.1])
@pytest.mark.parametrize("thr_p", [0.1, 0.0, -0.1])
@pytest.mark.parametrize("reward, lengths", [
    ([1, 0, 1, 0], [3, 4, 2, 1]), ([0, 1], [1, 1]), ([0, 0], [2, 3]), ([1, 1, 1], [2, 1, 4])])
def test_thr_token_by_token(reward, lengths, thr_p, beta):
    """A 1[|THR_t| > tau] (1 + p sign THR_t), THR_t = +-sum_i 1/|y_i| sum_{k in y_i} <..>, by
    response i; without a correct response nothing is dominant. `sign` leaves them an advantage."""
    signs = set()
    for seed in range(8):
        group, old, y, right = make_case(reward, lengths, seed)
        weight = torch.from_numpy(group.correct.repeat(lengths) / np.repeat(lengths, lengths))
        s = eq_7(old, y, weight, "response")
        means = [x.mean().item() for x, r in zip(s.split(lengths), reward) if r]
        tau = beta * min(means) if means else math.inf
        a = np.repeat(advantages.group_advantages(group.reward, "sign"), lengths)
        want = []
        for t in range(len(y)):
            thr = s[t].item() * (1 if right[t] else -1)
            want.append(a[t] * (abs(thr) > tau) * (1 + thr_p * np.sign(thr)))
            signs |= {np.sign(thr)} if abs(thr) > tau else set()
        got = token_advantages("thr", group, old, "sign", nthr_beta=beta, thr_p=thr_p)
        assert got.numpy() == pytest.approx(np.array(want), rel=1e-6)
    some_wrong = 0 < sum(reward) < len(reward)
    assert signs == {-1, 1} if beta < 1 and some_wrong else means or not signs


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_entropy_top_is_of_the_whole_group(share):
    group, old, *_ = make_case([1, 0, 1, 0], [3, 4, 2, 1], 5)
    old.entropy[:4] = 9.0 + 1e-7 * draw(0, 4)  # equals but for rounding: all or none
    lowest = sorted(old.entropy.tolist())[-math.ceil(share * 10)]
    kept = old.entropy.numpy() > lowest - 1e-4
    a = np.repeat(advantages.group_advantages(group.reward), [3, 4, 2, 1])
    got = token_advantages("entropy_top", group, old, entropy_share=share).numpy()
    assert got == pytest.approx(np.where(kept, a, 0)) and kept.sum() >= 4
    one, old, *_ = make_case([1, 0], [1, 1], 5)
    assert (token_advantages("entropy_top", one, old).numpy() != 0).sum() == 1


def eq_7(old, y, source, vocab):
    """s as the double sum over tokens, alpha = <u_k, u_t> explicit."""
    u = -(old.h @ old.head.T / old.temperature).softmax(-1)
    u[range(len(y)), y] += 1
    keep = sorted(set(y.tolist())) if vocab == "response" else range(V)
    s = torch.zeros(len(y), dtype=torch.float64)
    for t in range(len(y)):
        for k in source.nonzero()[:, 0]:
            s[t] += source[k] * sum(u[k, v] * u[t, v] for v in keep) * (old.h[k] @ old.h[t])
    return s


def along_gradient(old, y, source):
    """s: how fast each token's log-likelihood moves with the head along that of the source."""
    def of_head(head):
        return loglik(old.h, head, y, old.temperature)

    w = old.head.clone().requires_grad_()
    m, = torch.autograd.grad((of_head(w) * source).sum(), w)
    return torch.autograd.functional.jvp(of_head, old.head, m)[1] * old.temperature**2


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("reward, lengths", [
    ([1, 0, 1, 0], [3, 4, 2, 1]), ([0, 1], [1, 1]), ([0, 0], [2, 3]), ([1, 1], [2, 2]),
    ([1, 0, 1], [6, 4, 5])])  # the last: more sources than D
def test_influence_is_eq_7_and_the_product_of_head_gradients(reward, lengths, temperature):
    _, old, y, right = make_case(reward, lengths, 1, temperature)
    for vocab in ("response", "full"):
        want = eq_7(old, y, right, vocab)
        for chunk in (1, 3, 1000):
            got = influence(old, y.numpy(), right.numpy(), vocab, chunk)
            assert torch.allclose(got, want, rtol=1e-9, atol=1e-10)
    want = along_gradient(old, y, right)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-10)  # of the full vocabulary


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.0, -1.0, -math.inf])
def test_selection_is_algorithm_1(beta):
    cases = [([1, 0, 1, 0], [3, 4, 2, 1]), ([0, 0], [2, 3]), ([1, 1, 1], [1, 2, 1]),
             ([0, 1], [1, 1]), ([0, 0, 0, 1], [5, 1, 9, 2])]
    signs, ties = set(), 0
    for seed in range(20):
        for reward, lengths in cases:
            s = (2 * draw(seed, sum(lengths))).round() / 2  # some are at tau
            scores = [x.tolist() for x in s.split(lengths)]
            right = [sum(x) / len(x) for x, r in zip(scores, reward) if r]
            tau = math.inf if not right else beta if beta == -math.inf else beta * min(right)
            want = [r == 0 and x > tau for part, r in zip(scores, reward) for x in part]
            selected, got = nthr_select(s, make_group([1], scores, reward), beta)
            assert got.item() == pytest.approx(tau) and selected.tolist() == want
            signs.add(np.sign(tau))
            ties += sum(x == tau for part, r in zip(scores, reward) if not r for x in part)
    assert beta in (0.0, -math.inf) or {-1, 1} <= signs  # thresholds of both signs were met
    assert beta == -math.inf or ties


def test_gwhes_is_eq_5():
    """Minus d/dt ln pi(y+), through the head alone, along the gradient of the objective."""
    lengths = [3, 4, 2, 1, 2]
    group, old, y, right = make_case([1, 0, 1, 0, 0], lengths, 3)
    s = [influence(old, y.numpy(), source.numpy(), "full") for source in (right, ~right)]
    a = torch.from_numpy(np.repeat(advantages.group_advantages(group.reward), lengths))
    rates = [x.sum().item() for x in along_gradient(old, y, a).split(lengths)]
    want = [-x if correct else math.nan for x, correct in zip(rates, group.correct)]
    assert advantages.gwhes(*s, group).tolist() == pytest.approx(want, rel=1e-9, nan_ok=True)
    assert advantages.gwhes(*s, replace(group, reward=np.ones(5))).isnan().all()


def test_nothing_in_a_micro_batch_waits_for_the_gpu(model_dir, monkeypatch):
    """On tensors without data (device meta), where whatever asks for a value (item, nonzero, a
    boolean index) raises: forward, scores, selection, loss, figures, backward."""
    groups, figures = random_groups(49152, [(9, [6, 4, 5]), (3, [2, 2])]), Figures("meta")
    batch, = batches_of(groups)
    for name, x in vars(batch).items():
        setattr(batch, name, x.to("meta") if isinstance(x, torch.Tensor) else x)
    config = AutoConfig.from_pretrained(model_dir, num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # none for meta
    outs = Policy(model, torch.float32)(batch, 1.0)
    batch.old_logp = batch.ref_logp = outs[0].detach()
    of_group = list(zip(groups, *(x.detach().split([15, 4]) for x in outs)))
    for variant in advantages.VARIANTS:
        batch.advantage = torch.cat([
            token_advantages(variant, group, Old(*x, model.lm_head.weight), figures=figures)
            for group, *x in of_group])
        for loss in CHOICES["loss"]:
            policy_loss(outs[0], batch, loss, kl_coef=0.1, tis_cap=2.0, llds=0.2,
                        figures=figures).backward(retain_graph=True)
    assert all(p.grad.is_meta for p in model.parameters())


def test_masks_against_a_loop():
    rng, kept = np.random.default_rng(0), []
    for reward in (*(rng.random((40, 6)) < 0.5), np.zeros(6), np.ones(6)):
        scores, a = rng.integers(1, 11, 6), advantages.group_advantages(reward, "mean")
        for delta in (1.0, 3.0, 5.0):
            want = [scores[i] - max(scores[a < 0]) >= delta if a[i] > 0 else
                    a[i] < 0 and min(scores[a > 0]) - scores[i] >= delta for i in range(6)]
            kept += want
            assert advantages.dagrpo_masks(scores, a, delta).tolist() == want
    assert 0.1 < np.mean(kept) < 0.9


@pytest.mark.parametrize("scores, a, margins, mask", [
    ([7.0, 4.0, 4.1], [1, -1, -1], [2.9, 3.0, 2.9], [0, 1, 0]),  # exactly delta apart counts
    ([5.1, 1.0, 2.1], [2, -1, -1], [3.0, 4.1, 3.0], [1, 1, 1]),  # whatever floats make of it
    ([9.0, 1.0, 1.0], [1, 0, -1], [8, -np.inf, 8], [1, 0, 1]),  # without advantage: no gradient
    ([5.0, 5.0], [1, 0], [-np.inf] * 2, [0, 0]), ([5.0, 5.0], [-1, 0], [-np.inf] * 2, [0, 0]),
    ([8.0, 9.0, np.nan], [1, 0, -1], [np.nan] * 3, [1, 1, 1])])  # not judged: no masks
def test_margins(scores, a, margins, mask):
    scores, a = np.array(scores), np.array(a)
    assert advantages.dagrpo_margins(scores, a) == pytest.approx(np.array(margins), nan_ok=True)
    assert advantages.dagrpo_masks(scores, a).tolist() == mask


def test_masked_groups_and_their_figures(on_ranks):
    """Figures are over groups that were judged and have both outcomes."""
    figures, masked = Figures("cpu"), []
    for reward, score in (([1, 0, 0], [7.0, 4, 6]), ([1, 0], [4.0, 3]), ([1, 1], [9.0, 2]),
                          ([0, 1], [math.nan, 3])):
        group, old, *_ = make_case(reward, [1] * len(reward), score=np.array(score))
        masked.append(not token_advantages("dagrpo", group, old, figures=figures).any())
    assert masked == [False, True, True, False]
    assert on_ranks(figures.all_ranks) == [pytest.approx({
        "dagrpo/lambda_pos": 0, "dagrpo/lambda_neg": 1 / 3, "dagrpo/fully_masked": 1 / 2,
        "dagrpo/delta": 3, "dagrpo/margin": np.mean([1, 3, 1, 1, 1])})]


@pytest.mark.parametrize("norm", ("std", "sign"))
def test_a_quantile_masks_that_share_of_all_judged_groups(norm):
    """Oracle: sort the margins of every response with an opposite, mask the first ones."""
    rng = np.random.default_rng(0)
    groups = [make_group([1], [[1]] * 6, reward=rng.random(6) < 0.4, score=rng.uniform(1, 10, 6))
              for _ in range(20)]
    groups += [make_group([1], [[1]] * 2, reward=[0, 1]),  # not judged
               make_group([1], [[1]] * 2, reward=[1, 1], score=np.array([9.0, 2.0]))]
    of_group = []
    for g in groups[:20]:
        right, wrong = g.score[g.reward == 1], g.score[g.reward == 0]
        if len(right) and len(wrong):
            of_group += [*(right - wrong.max()), *(right.min() - wrong)]
    for share in (0.0, 0.25, 0.5, 0.99):
        delta = advantages.dagrpo_threshold(groups, f"q{share}", norm)
        masks = [advantages.dagrpo_masks(g.score, response_advantages(g, norm), delta)
                 for g in groups if mixed(g)]
        assert sum(np.sum(mask == 0) for mask in masks) == int(share * len(of_group))
        assert delta == pytest.approx(sorted(of_group)[int(share * len(of_group))])
    assert np.isnan(advantages.dagrpo_threshold(groups[20:], "q0.5", norm))
    assert [advantages.dagrpo_threshold(groups, x) for x in (None, 2, 4.5)] == [3, 2, 4.5]
