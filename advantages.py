"""Every variant of the advantage as plain functions; no model in here.

`token_advantages` is where a variant lives: it sees one group and what the policy that sampled it
says of the group's tokens, and returns the advantage of every token. A new variant is a name in
VARIANTS and a branch there. Numbers of a group's G responses are numpy arrays on the host, numbers
of its n response tokens are tensors on the device, one response after the other, nothing padded:

    responses of 2, 1 and 3 tokens, the second one right:
    reward (3,)     0  1  0             advantage of grpo (6,)   -.71 -.71 1.41 -.71 -.71 -.71

Rewards are 1 for a correct response, else 0; a fraction over data.RIGHT counts as correct. p is a
group's share of correct ones. [NTHR] is arXiv 2505.18830, [THR] 2510.03669, [DaGRPO] 2512.06337,
[NSR] 2506.01347, [ENTROPY] 2506.01939, [DrGRPO] 2503.20783."""
import math
from dataclasses import dataclass

import numpy as np
import torch

from data import RIGHT

VARIANTS = ("grpo", "pos_only", "random", "nthr", "spare_entropy", "spare_logp", "thr",
            "entropy_top", "dagrpo")
SCORED = ("random", "nthr", "spare_entropy", "spare_logp", "thr")  # those that read old.head

CHOICES = dict(  # of settings: the values that they may have, or their types
    variant=VARIANTS, nthr_eta=(None, "p", "1-p", float), nthr_vocab=("response", "full"),
    advantage_norm=("std", "mean", "sign"))


@dataclass
class Old:
    """What the policy that sampled says of the n response tokens of one group."""
    logp: torch.Tensor      # (n,) log-probability of each token, at `temperature`
    entropy: torch.Tensor   # (n,) entropy of the distribution it was drawn from, nats
    h: torch.Tensor         # (n, d) the hidden state that predicts it, as the LM head sees it
    lse: torch.Tensor       # (n,) logsumexp(logits / temperature) over the whole vocabulary
    head: torch.Tensor      # (V, d) the LM head, logits = h head^T; None if variant not in SCORED
    temperature: float = 1.0


# ---- advantages ----------------------------------------------------------------------------------

def group_advantages(reward, advantage_norm="std"):
    """A_i = (r_i - mean) / std over the group, population std ([NTHR] eq. 1). (G,) -> (G,) float64.
    advantage_norm "mean": r_i - mean, not divided ([DrGRPO], [DaGRPO]). Anchors count like any
    other response. A group of equal rewards has no signal: all 0. "sign": 1 for right, -1 for wrong
    responses, whatever the others are ([NSR])."""
    if advantage_norm == "sign":
        return np.where(reward > RIGHT, 1.0, -1.0)
    centred = reward.astype(np.float64) - reward.mean(dtype=np.float64)
    if advantage_norm == "mean":
        return centred
    std = np.sqrt(np.mean(centred**2))
    return centred / std if std > 1e-6 else np.zeros_like(centred)


def response_advantages(group, advantage_norm="std", pos_weight=1.0, neg_weight=1.0):
    """The advantages of a group's responses before a variant, (G,): all 0 without a signal.
    [NSR]: advantage_norm "sign", weights 1 and 0 (PSR), 0 and 1 (NSR), 0.1 and 1 (W-REINFORCE)."""
    weight = np.where(group.correct, pos_weight, neg_weight)
    return weight * group_advantages(group.reward, advantage_norm)


def token_advantages(variant, group, old, advantage_norm="std", nthr_beta=1.0, nthr_eta=None,
                     nthr_vocab="response", thr_p=0.0, entropy_share=0.2, delta=3.0, figures=None,
                     **of_response):
    """The advantage of every response token of ONE group, (n,), a constant of the step.

    group: data.Group; old: Old. of_response: further settings of `response_advantages`. figures:
    metrics.Figures, notes what a variant does; or None.

    grpo           A_i for all tokens of response i
    pos_only       negative A_i are 0; the loss goes on counting those tokens
    nthr           eta A_i for the tokens of incorrect responses with s > tau, see `threshold`
    random         0 for as many tokens of every incorrect response, drawn at random
    spare_entropy  eta A_i for as many, those of highest entropy; spare_logp: of lowest logp
    thr            A_i 1[|THR| > tau] (1 + thr_p sign THR), THR = s of right, -s of wrong responses,
                   source tokens weighted by 1 / (tokens of their response), tau as in `threshold`
                   with these s ([THR], which leaves open if it is the lowest mean, or their mean)
    entropy_top    A_i for the entropy_share of the group's tokens with the highest entropy, else 0
                   ([ENTROPY], which takes them from the whole batch)
    dagrpo         lambda_i A_i: 0 for whole responses that the judge cannot tell apart"""
    lengths = group.lengths
    advantage = response_advantages(group, advantage_norm, **of_response)  # (G,)
    if variant == "pos_only":
        advantage = advantage.clip(min=0)
    if variant == "dagrpo":
        unweighted = group_advantages(group.reward, advantage_norm)  # a weight may be 0
        advantage = advantage * dagrpo_masks(group.score, unweighted, delta, figures)
    A = to_device(np.repeat(advantage, lengths), old.logp)  # (n,)

    if variant == "entropy_top":
        lowest = old.entropy.topk(math.ceil(entropy_share * len(A))).values[-1]
        # the first tokens of all responses have one entropy, but for rounding: keep all or none
        A = A * (old.entropy >= lowest - 1e-5)
    if variant in SCORED:
        tokens, correct = np.concatenate(group.responses), np.repeat(group.correct, lengths)
        wrong = to_device(~correct, A, torch.bool)
        source = correct / np.repeat(lengths, lengths) if variant == "thr" else correct
        s = influence(old, tokens, source, nthr_vocab)
        tau = threshold(s, group, nthr_beta)
    if variant == "thr":
        thr = torch.where(wrong, -s, s)
        kept = thr.abs() > tau
        A = A * kept * (1 + thr_p * thr.sign())
        if figures:
            figures.mean("thr/kept", kept)
            figures.mean("thr/positive", thr > 0, where=kept)
    elif variant in SCORED:
        selected = wrong & (s > tau)  # [NTHR] eq. 8, Algorithm 1
        if variant != "nthr":
            draws = torch.rand(len(A), generator=torch.Generator().manual_seed(group.seed % 2**63))
            by = {"random": draws.to(A.device, non_blocking=True), "spare_entropy": old.entropy,
                  "spare_logp": -old.logp}[variant]
            selected = as_many(selected, by, lengths)
        p = group.correct.mean()  # eta of it: [NTHR] section 5
        eta = {None: 2 * abs(0.5 - p), "p": p, "1-p": 1 - p}.get(nthr_eta, nthr_eta)
        eta = 0.0 if variant == "random" else eta
        A = torch.where(selected, eta * A, A)
        if figures:
            figures.mean("nthr/selected", selected, where=wrong)
            if correct.any():
                figures.mean("nthr/tau", tau)
                figures.mean("nthr/eta", eta)
    return A


def to_device(x, like, dtype=torch.float32):
    """A numpy array as a tensor where `like` is; a GPU is not waited for."""
    return torch.from_numpy(x).to(dtype).to(like.device, non_blocking=True)


# ---- NTHR: which tokens of incorrect responses pull the likelihood of correct ones down ----------

@torch.no_grad()
def influence(old, tokens, source, vocab="response", chunk=2048):
    """s_t = u_t^T M h_t of every token t of one group, M = sum over tokens k of source_k u_k h_k^T.

    [NTHR] eq. 7. u = onehot(token) - softmax(logits / temperature) is the prediction error: M is
    the gradient of the source tokens' log-likelihood with respect to the LM head, and s_t its
    inner product with token t's (times temperature^2). tokens (n,) int and source (n,), the
    weights, are on the host. vocab "response": only rows of the head whose tokens are in the group
    (V*_x, softmax still over all of them), or "full". Returns (n,) in float32 (float64 of float64).
    lse is known, so u is made a block of the vocabulary at a time: no array exceeds chunk x V."""
    dtype = torch.promote_types(old.h.dtype, torch.float32)
    h, shift = old.h.to(dtype), -old.lse[:, None].to(dtype)
    head, column = old.head, tokens
    if vocab == "response":
        rows, column = np.unique(tokens, return_inverse=True)
        head = head.index_select(0, to_device(rows, h, torch.int64))
    column = to_device(column, h, torch.int64)
    weight = to_device(source[source != 0], h, dtype)
    at = to_device(np.flatnonzero(source), h, torch.int64)  # (K,) the source tokens
    h_source = h.index_select(0, at) * weight[:, None]  # (K, d)
    s = h.new_zeros(len(h))
    block = max(1, chunk * len(head) // max(h.shape))  # tokens of the vocabulary
    for a in range(0, len(head), block):
        w = head[a:a + block].to(old.h.dtype).to(dtype)  # (block, d)
        u = torch.addmm(shift, h, w.T, alpha=1 / old.temperature).exp_().neg_()  # (n, block)
        here = ((column >= a) & (column < a + len(w))).to(dtype)
        u.scatter_add_(1, (column - a).clamp(0, len(w) - 1)[:, None], here[:, None])
        M = h_source.T @ u.index_select(0, at)  # (d, block), transposed
        s += torch.linalg.vecdot(u, h @ M)
    return s


def threshold(s, group, beta):
    """tau = beta x the lowest mean of s (n,) of a correct response, ().
    [NTHR] eq. 9. The sum in s is over all correct responses, the response itself included, as in
    the formulas. tau may be negative; -inf for beta=-inf, which selects every incorrect token; inf
    without a correct response. bench/overlap.py has it, too."""
    means = [x.mean() for x, correct in zip(s.split(group.lengths), group.correct) if correct]
    if not means or beta == -np.inf:
        return s.new_full((), beta if means else torch.inf)
    return beta * torch.stack(means).min()


def as_many(selected, by, lengths):
    """As many tokens of every response as `selected` (n,) has there: those with most of `by`."""
    parts = zip(by.split(lengths), selected.split(lengths))
    return torch.cat([x.argsort(descending=True, stable=True).argsort() < chosen.sum()
                      for x, chosen in parts])


def gwhes(s_positive, s_negative, group):
    """Group-weighted hidden embedding score of correct responses ([NTHR] eq. 5), others nan: (G,).
    p- x (sum of s_negative) - p+ x (sum of s_positive); p+ = (1-p)/sqrt(p(1-p)), p- likewise of p.
    s_positive, s_negative (n,): `influence` of the group's correct, of its incorrect tokens."""
    p = group.correct.mean()
    positive, negative = (torch.stack([x.sum() for x in s.split(group.lengths)])
                          for s in (s_positive, s_negative))
    scale = np.sqrt(p * (1 - p)) or np.nan  # nan: they have one outcome
    score = (p * negative - (1 - p) * positive) / scale
    return score.where(to_device(group.correct, score, torch.bool), torch.nan)


# ---- DaGRPO: which responses a judge can tell apart ----------------------------------------------

def dagrpo_margins(score, advantage):
    """How far the judge's score tells every response from the hardest one of the other sign, (G,).
    [DaGRPO]: S_j - max over negatives of S for A_j > 0, min over positives of S - S_k for A_k < 0,
    by the advantages of the whole group, anchors among them. -inf where A = 0 or there is no
    opposite: no gradient anyway. nan if the group lacks a score (nan)."""
    if np.isnan(score).any():
        return np.full(len(score), np.nan)
    positive, negative = advantage > 0, advantage < 0
    margin = np.full(len(score), -np.inf)
    if positive.any() and negative.any():
        margin[positive] = score[positive] - score[negative].max()
        margin[negative] = score[positive].min() - score[negative]
    return margin


def dagrpo_threshold(groups, delta, advantage_norm="std"):
    """delta in points. "q0.25": the margin that at most 25% of the responses that have one do
    not reach, over a step's groups; nan if none has. None: 3."""
    if not isinstance(delta, str):
        return 3.0 if delta is None else delta
    margins = sorted(x for g in groups for x in dagrpo_margins(
        g.score, group_advantages(g.reward, advantage_norm)) if np.isfinite(x))
    return margins[int(float(delta[1:]) * len(margins))] if margins else np.nan


def dagrpo_masks(score, advantage, delta=3.0, figures=None):
    """lambda of every response, (G,) bool: 1[margin >= delta], and 1 in a group not judged."""
    margin = dagrpo_margins(score, advantage)
    mask = np.isnan(margin) | (margin >= delta - 1e-5)  # 9.1 - 6.1 is 3 apart
    if figures and np.isfinite(margin).any():
        figures.mean("dagrpo/delta", delta)
        figures.mean("dagrpo/lambda_pos", mask, where=advantage > 0)
        figures.mean("dagrpo/lambda_neg", mask, where=advantage < 0)
        figures.mean("dagrpo/margin", margin, where=np.isfinite(margin))
        figures.mean("dagrpo/fully_masked", not mask.any())
    return mask
