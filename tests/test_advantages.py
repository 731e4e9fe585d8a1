"""Advantages, scores and masks against the formulas, brute force and autograd."""
import itertools
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model_utils import batches_of, make_group, random_groups
from torch.distributions import Categorical
from transformers import AutoConfig, AutoModelForCausalLM

import advantages
from advantages import Old, influence, response_advantages, threshold, token_advantages
from data import mixed
from losses import CHOICES, policy_loss
from metrics import Figures
from model_utils import Policy

D, V = 7, 19


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_case(reward, lengths, seed=0, temperature=1.0, **fields):
    """(group, old, y, right): random tokens y of one group, its states and head in float64."""
    tokens = np.random.default_rng(seed).integers(V - 6, size=(len(lengths), max(lengths)))
    responses = [row[:n] for row, n in zip(tokens, lengths)]
    group = make_group([1], responses, reward, seed=seed, **fields)
    y = torch.from_numpy(np.concatenate(responses))
    h, head = draw(seed, len(y), D), draw(seed + 1, V, D)
    logits = h @ head.T / temperature
    policy = Categorical(logits=logits)
    old = Old(policy.log_prob(y), policy.entropy(), h, logits.logsumexp(-1), head, temperature)
    return group, old, y, torch.from_numpy(np.repeat(group.reward > 0.5, lengths))


# rewards and tokens of groups: N+ = 2, 0, G, 1; of one token each; with more sources than D; with
# rewards that are fractions, those over a half right
CASES = [([1, 0, 1, 0], [3, 4, 2, 1]), ([0, 0], [2, 3]), ([1, 1, 1], [2, 1, 4]), ([0, 1], [1, 1]),
         ([0, 0, 0, 1], [5, 1, 9, 2]), ([1, 0, 1], [6, 4, 5]), ([0.9, 0.6], [1, 2]),
         ([0.9, 0.2, 0.6, 0.5], [3, 1, 4, 2])]


def eq_7(old, y, source, vocab):
    """s_t = sum over tokens k of source_k <u_k, u_t> <h_k, h_t>, every product explicit."""
    u = F.one_hot(y, len(old.head)) - (old.h @ old.head.T / old.temperature).softmax(-1)
    u = u[:, y.unique()] if vocab == "response" else u
    return source.to(u.dtype) @ ((u @ u.T) * (old.h @ old.h.T))


def along_gradient(old, y, source):
    """s as the product of each token's gradient, of the head alone, with that of the source."""
    def log_likelihoods(head):
        return Categorical(logits=old.h @ head.T / old.temperature).log_prob(y)

    J = torch.autograd.functional.jacobian(log_likelihoods, old.head).flatten(1)  # (n, V D)
    return J @ (source.double() @ J) * old.temperature**2


def algorithm_1(s, group, beta):
    """(selected, tau) of [NTHR] Algorithm 1, response by response."""
    scores, correct = [x.tolist() for x in s.split(group.lengths)], group.reward > 0.5
    means = [sum(x) / len(x) for x, is_right in zip(scores, correct) if is_right]
    tau = math.inf if not means else beta if beta == -math.inf else beta * min(means)
    return [not is_right and x > tau for part, is_right in zip(scores, correct) for x in part], tau


def most(by, selected, lengths):
    """As many tokens of every response as are selected there, those with most of `by`."""
    picked = torch.zeros(len(by), dtype=torch.bool)
    for at in torch.arange(len(by)).split(lengths):
        picked[sorted(at.tolist(), key=lambda t: -by[t])[:int(selected[at].sum())]] = True
    return picked


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
    fractions = np.array([0.9, 0.2, 0.6, 0.5])  # by hand; those over a half are right
    for norm, want in (("mean", [0.35, -0.35, 0.05, -0.05]), ("std", [1.4, -1.4, 0.2, -0.2]),
                       ("sign", [1, -1, 1, -1])):
        assert advantages.group_advantages(fractions, norm) == pytest.approx(want)


@pytest.mark.parametrize("reward, lengths", CASES)
@pytest.mark.parametrize("norm", ["std", "mean", "sign"])
def test_weights_pos_only_and_dagrpo(reward, lengths, norm):
    score = np.array([9.0, 6.0, 6.1, 1.0])[:len(reward)]
    group, old, _, right = make_case(reward, lengths, score=score)
    of_responses = advantages.group_advantages(group.reward, norm)
    a, lam = (np.repeat(x, lengths) for x in (
        of_responses, advantages.dagrpo_masks(group.score, of_responses)))
    for variant, kept in (("grpo", 1), ("pos_only", a > 0), ("dagrpo", lam)):
        assert token_advantages(variant, group, old, norm).numpy() == pytest.approx(kept * a)
        for pos, neg in ((0.3, 2.0), (1.0, 0.0)):  # masks are of the advantages without weights
            got = token_advantages(variant, group, old, norm, pos_weight=pos, neg_weight=neg)
            assert got.numpy() == pytest.approx(np.where(right, pos, neg) * kept * a)
    assert mixed(group) == (len({*np.greater(reward, 0.5).tolist()}) == 2)
    signal = response_advantages(group, norm, 0.0, 1.0).any()  # NSR: of wrong ones alone
    assert signal == (mixed(group) or norm == "sign" and not right.any().item())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("reward, lengths", CASES)
def test_influence_is_eq_7_and_the_product_of_head_gradients(reward, lengths, temperature):
    _, old, y, right = make_case(reward, lengths, 1, temperature)
    wanted = [(vocab, eq_7(old, y, right, vocab)) for vocab in ("response", "full")]
    wanted.append(("full", along_gradient(old, y, right)))
    for (vocab, want), chunk in itertools.product(wanted, (1, 3, 1000)):
        got = influence(old, y.numpy(), right.numpy(), vocab, chunk)
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-10)


def test_a_score_at_tau_is_not_selected_and_tau_may_be_negative(monkeypatch):
    group = make_group([1], [[1, 2], [3, 4, 5]], [1, 0])
    for shift in (0.0, -1.0):
        s = torch.tensor([2, -1, 0.5, 0.6, 0.4]) + shift
        monkeypatch.setattr(advantages, "influence", lambda *_: s)
        A = token_advantages("nthr", group, Old(s, s, s, s, s), "sign", nthr_eta=0.0)
        assert threshold(s, group, 1.0) == 0.5 + shift and A.tolist() == [1, 1, -1, 0, -1]


@pytest.mark.parametrize("variant", ["nthr", "random", "spare_entropy", "spare_logp"])
@pytest.mark.parametrize("beta, vocab, eta, of_p", [
    (1.0, "response", None, lambda p: abs(1 - 2 * p)), (-0.1, "response", "p", lambda p: p),
    (0.1, "full", None, lambda p: abs(1 - 2 * p)), (0.0, "full", "1-p", lambda p: 1 - p),
    (-math.inf, "full", -0.3, lambda p: -0.3), (0.1, "response", 0.0, lambda p: 0.0)])
def test_nthr_and_its_controls(variant, beta, vocab, eta, of_p, on_ranks):
    """eta A for the tokens that Algorithm 1 picks, or for as many others. Figures: over incorrect
    tokens, of tau and eta over groups with a correct response."""
    ranks, of_tokens, of_groups = [Figures("cpu"), Figures("cpu")], [], []
    for seed, (reward, lengths) in enumerate(2 * CASES):
        group, old, y, right = make_case(reward, lengths, seed)
        selected, tau = algorithm_1(eq_7(old, y, right, vocab), group, beta)
        selected = torch.tensor(selected)
        draws = torch.rand(len(y), generator=torch.Generator().manual_seed(seed))
        by = dict(nthr=selected.double(), random=draws, spare_entropy=old.entropy,
                  spare_logp=-old.logp)
        picked = most(by[variant], selected, lengths)
        left = 0 if variant == "random" else of_p(np.greater(reward, 0.5).mean())
        a = np.repeat(advantages.group_advantages(group.reward), lengths)
        got = token_advantages(variant, group, old, nthr_beta=beta, nthr_eta=eta, nthr_vocab=vocab,
                               figures=ranks[seed % 2])
        want = np.where(picked, left * a, a)
        assert got.numpy() == pytest.approx(want)
        of_tokens += picked[~right].tolist()
        of_groups += [(tau, left)] * right.any().item()
    tau, left = np.mean(of_groups, 0)
    for told in on_ranks(*(figures.all_ranks for figures in ranks)):
        assert told == pytest.approx({
            "nthr/selected": np.mean(of_tokens), "nthr/tau": tau, "nthr/eta": left})


@pytest.mark.parametrize("beta", [1.0, 0.1, -0.1])
@pytest.mark.parametrize("thr_p", [0.1, 0.0, -0.1])
def test_thr(thr_p, beta, on_ranks):
    """A 1[|THR_t| > tau] (1 + p sign THR_t), THR_t = +-sum_i 1/|y_i| sum_{k in y_i} <..>, by
    response i; without a correct response nothing is dominant. `sign` leaves them an advantage."""
    figures, seen = Figures("cpu"), []
    for seed, (reward, lengths) in enumerate(8 * CASES):
        group, old, y, right = make_case(reward, lengths, seed)
        source = torch.from_numpy(np.repeat((group.reward > 0.5) / lengths, lengths))
        s = eq_7(old, y, source, "response")
        _, tau = algorithm_1(s, group, beta)
        thr = torch.where(right, s, -s)
        dominant = thr.abs() > tau
        a = np.repeat(advantages.group_advantages(group.reward, "sign"), lengths)
        got = token_advantages("thr", group, old, "sign", nthr_beta=beta, thr_p=thr_p,
                               figures=figures)
        want = a * (dominant * (1 + thr_p * thr.sign())).numpy()
        assert got.numpy() == pytest.approx(want, rel=1e-6)
        seen += (dominant * thr.sign()).tolist()
    assert {*seen} == {-1, 0, 1} or beta == 1
    kept, signs = np.abs(seen), np.array(seen)[np.nonzero(seen)]
    assert on_ranks(figures.all_ranks) == [pytest.approx({
        "thr/kept": kept.mean(), "thr/positive": (signs > 0).mean()})]


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


def test_gwhes_is_eq_5():
    """Minus d/dt ln pi(y+), through the head alone, along the gradient of the objective."""
    lengths = [3, 4, 2, 1, 2]
    group, old, y, right = make_case([0.9, 0, 0.7, 0.5, 0], lengths, 3)
    s = [influence(old, y.numpy(), source.numpy(), "full") for source in (right, ~right)]
    a = torch.from_numpy(np.repeat(advantages.group_advantages(1.0 * group.correct), lengths))
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


@pytest.mark.parametrize("norm", ["std", "sign"])
def test_masks_are_those_of_margins_in_a_loop(norm):
    """"q0.25" is the margin that a quarter of all responses that have one do not reach."""
    rng, margins = np.random.default_rng(0), []
    groups = [make_group([1], [[1]] * 6, rng.random(6) < 0.4, score=rng.uniform(1, 10, 6))
              for _ in range(20)]
    groups += [make_group([1], [[1]] * 6, [r] * 6, score=np.arange(6.0)) for r in (0, 1)]
    groups.append(make_group([1], [[1]] * 6))  # not judged: no masks
    for g in groups:
        right, wrong = g.score[g.reward == 1], g.score[g.reward == 0]
        margins.append([-np.inf if not mixed(g) else s - wrong.max() if r else right.min() - s
                        for s, r in zip(g.score, g.reward)])
    known = np.array([x for own in margins for x in own if np.isfinite(x)])
    for delta in (1.0, 3.0, 5.0, "q0.0", "q0.25", "q0.5", "q0.99"):
        points = advantages.dagrpo_threshold(groups, delta, norm)
        if isinstance(delta, str):
            assert (known < points).sum() == int(float(delta[1:]) * len(known))
        for g, own in zip(groups, margins):
            mask = advantages.dagrpo_masks(g.score, response_advantages(g, norm), points)
            assert mask.tolist() == [not x < points for x in own]
    assert np.isnan(advantages.dagrpo_threshold(groups[20:], "q0.5", norm))
    assert [advantages.dagrpo_threshold(groups, x) for x in (None, 2, 4.5)] == [3, 2, 4.5]


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
