"""Every variant of the advantage, and the loss, as plain functions; no model in here.

`token_advantages` is where a variant lives: it sees one group and what the policy that sampled it
says of the group's tokens, and returns the advantage of every token. A new variant is a name in
VARIANTS and a branch there. Numbers of a group's G responses are numpy arrays on the host, numbers
of its n response tokens are tensors on the device, one response after the other, nothing padded:

    responses of 2, 1 and 3 tokens, the second one right:
    reward (3,)     0  1  0             advantage of grpo (6,)   -.71 -.71 1.41 -.71 -.71 -.71

Rewards are 1 for a correct response and 0 for an incorrect one. p is a group's share of correct
ones. In order: advantages; the variants' parts (NTHR, DaGRPO); the loss.

[NTHR] is arXiv 2505.18830, [DaGRPO] 2512.06337, [LUFFY] 2504.14945, [DrGRPO] 2503.20783, [DAPO]
2503.14476, [TIS] Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training".
"""
from dataclasses import dataclass

import numpy as np
import torch

VARIANTS = ("grpo", "pos_only", "random", "nthr", "dagrpo")
SCORED = ("random", "nthr")  # of these, the ones that read old.head

# what NTHR leaves of a selected token's advantage, by the group's success rate p: [NTHR] section 5
ETAS = {"2|0.5-p|": lambda p: 2 * abs(0.5 - p), "p": lambda p: p, "1-p": lambda p: 1 - p}
ETAS[None] = ETAS["2|0.5-p|"]


@dataclass
class Old:
    """What the policy that sampled says of the n response tokens of one group."""
    logp: torch.Tensor      # (n,) log-probability of each token
    entropy: torch.Tensor   # (n,) entropy of the distribution it was drawn from, nats
    h: torch.Tensor         # (n, d) the hidden state that predicts it, as the LM head sees it
    lse: torch.Tensor       # (n,) logsumexp(logits / temperature) over the whole vocabulary
    head: torch.Tensor      # (V, d) the LM head, logits = h head^T; None but for SCORED variants
    temperature: float = 1.0


# --------------------------------------------------------------------------------------------------
# advantages

def group_advantages(reward, advantage_norm="std"):
    """A_i = (r_i - mean) / std over the group, population std ([NTHR] eq. 1). (G,) -> (G,) float64.

    advantage_norm "mean": r_i - mean, not divided ([DrGRPO], [DaGRPO]). Anchors count like any
    other response. A group with one outcome has no signal: all 0.
    """
    centred = reward.astype(np.float64) - reward.mean(dtype=np.float64)
    if advantage_norm == "mean":
        return centred
    std = np.sqrt(np.mean(centred**2))
    return centred / std if std > 1e-6 else np.zeros_like(centred)


def token_advantages(variant, group, old, advantage_norm="std", pos_weight=1.0, neg_weight=1.0,
                     nthr_beta=1.0, nthr_eta=None, nthr_vocab="response", delta=3.0,
                     figures=None):
    """The advantage of every response token of ONE group, (n,), a constant of the step.

    group: data.Group; old: Old. figures: runs.Figures, takes note of what a variant does; or None.

    grpo      A_i for all tokens of response i
    pos_only  negative A_i are 0; the loss goes on counting those tokens
    nthr      eta A_i for the tokens of incorrect responses that `nthr_select` finds
    random    0 for as many tokens of every incorrect response, drawn at random
    dagrpo    lambda_i A_i: 0 for whole responses that the judge cannot tell apart
    """
    lengths = group.lengths
    unweighted = group_advantages(group.reward, advantage_norm)
    advantage = unweighted * np.where(group.reward == 1, pos_weight, neg_weight)  # (G,)

    if variant == "pos_only":
        advantage = advantage.clip(min=0)
    if variant == "dagrpo":
        advantage = advantage * dagrpo_masks(group.score, unweighted, delta, figures)
    A = to_device(np.repeat(advantage, lengths), old.logp)  # (n,)

    if variant in SCORED:
        tokens, correct = np.concatenate(group.responses), np.repeat(group.reward == 1, lengths)
        s = influence(old, tokens, correct, nthr_vocab)
        selected, tau = nthr_select(s, group, nthr_beta)
        if variant == "random":
            selected = random_like(selected, lengths, group.seed)
        p = group.reward.mean(dtype=np.float64)
        eta = ETAS[nthr_eta](p) if nthr_eta in ETAS else nthr_eta
        A = torch.where(selected, (eta if variant == "nthr" else 0.0) * A, A)
        if figures is not None:
            wrong = to_device(~correct, old.logp, torch.bool)
            figures.mean("nthr/selected", selected, where=wrong)
            figures.mean("nthr/s_selected", s, where=selected)
            figures.mean("nthr/s_others", s, where=wrong & ~selected)
            if correct.any():
                figures.mean("nthr/tau", tau)
                figures.mean("nthr/tau_negative", tau < 0)
                figures.mean("nthr/eta", eta)
    return A


def to_device(x, like, dtype=torch.float32):
    """A numpy array as a tensor where `like` is; a GPU is not waited for."""
    return torch.from_numpy(x).to(dtype).to(like.device, non_blocking=True)


# --------------------------------------------------------------------------------------------------
# NTHR: which tokens of incorrect responses pull the likelihood of correct ones down

@torch.no_grad()
def influence(old, tokens, source, vocab="response", chunk=512):
    """s_t = u_t^T M h_t of every token t of one group, M = sum over source tokens k of u_k h_k^T.

    [NTHR] eq. 7. u = onehot(token) - softmax(logits / temperature) is the prediction error: M is
    the gradient of the source tokens' log-likelihood with respect to the LM head, and s_t its
    inner product with token t's (times temperature^2).

    old: Old; tokens (n,) int and source (n,) bool, both on the host. vocab "response": only rows
    of the head whose tokens are in the group (V*_x, softmax still over all of them), or "full".
    Returns (n,) in float32 (float64 of float64). lse is known, so u comes a block of the
    vocabulary at a time: at most chunk x V numbers exist at once, however long the group is.
    """
    dtype = torch.promote_types(old.h.dtype, torch.float32)
    h, shift = old.h.to(dtype), -old.lse[:, None].to(dtype)
    head, column = old.head, tokens
    if vocab == "response":
        rows, column = np.unique(tokens, return_inverse=True)
        head = head.index_select(0, to_device(rows, h, torch.int64))
    column = to_device(column, h, torch.int64)
    source = to_device(np.flatnonzero(source), h, torch.int64)
    h_source = h.index_select(0, source)  # (K, d)

    # sum_k <u_t, u_k> <h_t, h_k> as it stands, or through M (V x d): whichever multiplies less
    pairwise = len(source) <= h.shape[1]
    pairs = h.new_zeros(len(h), len(source) if pairwise else 0)  # <u_t, u_k>
    s = h.new_zeros(len(h))
    block = max(1, chunk * len(head) // max(1, len(h)))
    for a in range(0, len(head), block):
        w = head[a:a + block].to(old.h.dtype).to(dtype)  # (block, d)
        u = torch.addmm(shift, h, w.T, alpha=1 / old.temperature).exp_().neg_()  # (n, block)
        here = ((column >= a) & (column < a + len(w))).to(dtype)
        u.scatter_add_(1, (column - a).clamp(0, len(w) - 1)[:, None], here[:, None])
        u_source = u.index_select(0, source)  # (K, block)
        if pairwise:
            pairs.addmm_(u, u_source.T)
        else:
            s += torch.linalg.vecdot(u, h @ (h_source.T @ u_source))
    return torch.linalg.vecdot(pairs, h @ h_source.T) if pairwise else s


def nthr_select(s, group, beta=1.0):
    """Tokens of incorrect responses with s > tau = beta x min over correct i of mean s of i.

    [NTHR] eq. 8, 9, Algorithm 1. s (n,) -> (selected (n,) bool, tau ()). The sum in s is over all
    correct responses, i itself included, as in the formulas. tau may be negative. beta=-inf
    selects every incorrect token; without a correct response none is (tau = inf).
    """
    wrong = to_device(np.repeat(group.reward == 0, group.lengths), s, torch.bool)
    means = [x.mean() for x, reward in zip(s.split(group.lengths), group.reward) if reward == 1]
    if not means:
        tau = s.new_full((), torch.inf)
    elif beta == -np.inf:
        tau = s.new_full((), -torch.inf)
    else:
        tau = beta * torch.stack(means).min()
    return wrong & (s > tau), tau


def random_like(selected, lengths, seed):
    """As many tokens of every response as `selected` (n,) has there, drawn at random: (n,) bool.

    [NTHR] "Random". The draw depends on the seed alone, not on the ranks that groups are dealt to.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    draws = torch.rand(len(selected), generator=generator).to(selected.device, non_blocking=True)
    picked = []
    for draw, chosen in zip(draws.split(lengths), selected.split(lengths)):
        rank = draw.argsort().argsort()
        picked.append(rank < chosen.sum())
    return torch.cat(picked)


def gwhes(s_positive, s_negative, group):
    """Group-weighted hidden embedding score of correct responses ([NTHR] eq. 5), others nan: (G,).

    s_positive, s_negative (n,): `influence` with the group's correct, and its incorrect, tokens as
    source. p- x (sum of s_negative) - p+ x (sum of s_positive), p+ = (1-p)/sqrt(p(1-p)), p- =
    p/sqrt(p(1-p)).
    """
    p = group.reward.mean(dtype=np.float64)
    if p in (0, 1):
        return s_positive.new_full((len(group.reward),), torch.nan)
    positive, negative = (torch.stack([x.sum() for x in s.split(group.lengths)])
                          for s in (s_positive, s_negative))
    score = (p * negative - (1 - p) * positive) / np.sqrt(p * (1 - p))
    return score.where(to_device(group.reward == 1, score, torch.bool), torch.nan)


# --------------------------------------------------------------------------------------------------
# DaGRPO: which responses a judge can tell apart

def dagrpo_margins(score, advantage):
    """How far the judge's score tells every response from the hardest one of the other sign, (G,).

    [DaGRPO]: S_j - max over negatives of S for A_j > 0, min over positives of S - S_k for A_k < 0,
    by the advantages of the whole group, anchors among them. -inf where A = 0 or there is no
    opposite: no gradient anyway. nan if the group lacks a score (nan).
    """
    if np.isnan(score).any():
        return np.full(len(score), np.nan)
    positive, negative = advantage > 0, advantage < 0
    margin = np.full(len(score), -np.inf)
    if positive.any() and negative.any():
        margin[positive] = score[positive] - score[negative].max()
        margin[negative] = score[positive].min() - score[negative]
    return margin


def dagrpo_masks(score, advantage, delta=3.0, figures=None):
    """lambda of every response, 0 or 1, (G,): 1[margin >= delta], and 1 in a group not judged."""
    margin = dagrpo_margins(score, advantage)
    mask = np.where(np.isnan(margin) | (margin >= delta - 1e-5), 1.0, 0.0)  # 9.1 - 6.1 is 3 apart
    if figures is not None and np.isfinite(margin).any():
        figures.mean("dagrpo/lambda_pos", mask, where=advantage > 0)
        figures.mean("dagrpo/lambda_neg", mask, where=advantage < 0)
        figures.mean("dagrpo/margin", margin, where=np.isfinite(margin))
        figures.mean("dagrpo/fully_masked", not mask.any())
    return mask


# --------------------------------------------------------------------------------------------------
# the loss

def token_weights(groups, loss_norm="group", max_response_tokens=None):
    """The weight of each token of each group in the loss: a list of floats, one a group.

    The loss is the weighted sum over all micro-batches and ranks; groups: all of an update, on all
    ranks. loss_norm "group": 1 / (tokens of the group x groups), [NTHR] eq. 1. "token": 1 / tokens
    of the update, [DAPO]. "constant": 1 / (responses of the group x max_response_tokens x groups),
    [DrGRPO], [DaGRPO].
    """
    tokens = [sum(g.lengths) for g in groups]
    if loss_norm == "token":
        return [1 / sum(tokens)] * len(groups)
    if loss_norm == "constant":
        tokens = [len(g.responses) * max_response_tokens for g in groups]
    return [1 / (count * len(groups)) for count in tokens]


def policy_loss(logp, batch, clip_low=0.2, clip_high=0.2, kl_coef=0.0, tis_cap=0.0,
                anchor_loss="luffy", figures=None):
    """The loss of a micro-batch's n response tokens, a weighted sum: ().

    Rollout tokens: the clipped surrogate, A and ratio = pi / pi_old as in PPO ([NTHR] eq. 1),
    times the truncated importance min(pi_old / pi_rollout, tis_cap) if tis_cap ([TIS]), plus
    kl_coef times KL to the reference model. Anchor tokens, which the policy did not sample: see
    anchor_losses.

    logp (n,), with gradient; batch: its old_logp, advantage, weight, is_anchor (n,), rollout_logp
    for tis_cap and ref_logp for kl_coef. clip_high > clip_low is clip-higher ([DAPO]).
    """
    sampled = ~batch.is_anchor
    A = batch.advantage
    old_logp = torch.where(sampled, batch.old_logp, logp.detach())
    ratio = (logp - old_logp).exp()
    pg_loss1 = -A * ratio
    pg_loss2 = -A * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(pg_loss1, pg_loss2)

    importance = (batch.old_logp - batch.rollout_logp).where(sampled, 0).exp()
    if tis_cap:
        loss = loss * importance.clamp(max=tis_cap)
    if kl_coef:
        kl = kl_k3(logp, torch.where(sampled, batch.ref_logp, logp.detach()))
        loss = loss + kl_coef * kl
    loss = torch.where(sampled, loss, anchor_losses(logp, A, anchor_loss))

    if figures is not None:
        gap = (batch.old_logp - batch.rollout_logp).abs()
        figures.mean("train/clip_fraction", pg_loss2 > pg_loss1, where=sampled)
        figures.mean("train/kl_old", kl_k3(old_logp, logp.detach()), where=sampled)
        figures.mean("gap/mean", gap, where=sampled)
        figures.max("gap/max", gap, where=sampled)
        figures.mean("gap/importance", importance, where=sampled)
        figures.max("gap/importance_max", importance, where=sampled)
        figures.mean("anchor/logp", logp.detach(), where=batch.is_anchor)
        if kl_coef:
            figures.mean("train/kl", kl.detach(), where=sampled)
        if tis_cap:
            figures.mean("gap/importance_cut", importance > tis_cap, where=sampled)
    return (batch.weight * loss).sum()


def anchor_losses(logp, advantage, form="luffy", gamma=0.1):
    """Loss of demonstrations' tokens, without ratio, clip and KL. All (n,).

    "luffy": -A pi / (pi + gamma), whose gradient is -A gamma pi / (pi + gamma)^2 grad log pi
    ([LUFFY] eq. 8). "logp": -A log pi, [DaGRPO] eq. 13 to the letter.
    """
    pi = logp.exp()
    return -advantage * (logp if form == "logp" else pi / (pi + gamma))


def kl_k3(logp, ref_logp):
    """Per-token estimate of KL(pi || ref), never negative: exp(d) - d - 1, d = ref_logp - logp."""
    d = ref_logp - logp
    return d.exp() - d - 1
