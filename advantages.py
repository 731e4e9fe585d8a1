"""Every variant of the advantage and the loss, as pure functions on tensors; no model in here.

Rewards are binary: 1 for a correct response, 0 for an incorrect one (`check_rewards`). Responses are numbered in flat
order, B of them in M groups; `group` (B,) says which group each is in. Tokens are numbered in flat order too, N of them;
`response` (N,) says which response each is in. Nothing is padded.

    two groups of two responses with 2, 1 and 1, 3 tokens:
    group    [0, 0, 1, 1]
    response [0, 0, 1, 2, 3, 3, 3]

On a GPU nothing here waits for it: sizes come from shapes, or from the caller, who knows them on the host.

[NTHR] is arXiv 2505.18830, [DaGRPO] arXiv 2512.06337, [LUFFY] arXiv 2504.14945, [DrGRPO] arXiv 2503.20783, [DAPO] arXiv
2503.14476, [TIS] Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training". In order:
advantages; the loss; NTHR's scores and selection; DaGRPO's masks and anchors.
"""
import numpy as np
import torch

ETAS = {"2|0.5-p|": lambda p: 2 * (0.5 - p).abs(), "p": lambda p: p, "1-p": lambda p: 1 - p}  # [NTHR] sec. 5, ablation


# ---------------------------------------------------------------------------------------------------------------------
# advantages

def check_rewards(rewards):
    """Raise ValueError unless every reward is 0 or 1."""
    if not ((rewards == 0) | (rewards == 1)).all():
        raise ValueError(f"rewards must be 0 or 1, got {rewards[(rewards != 0) & (rewards != 1)][0].item()}")


def sum_by(index, values, size):
    """Sum of the values (N,) of each index: (size,). torch.bincount would ask the GPU how long it is."""
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, index, values)


def group_mean(values, group):
    """Mean of values (B,) within each response's group, given to each response: (B,)."""
    sums, sizes = (sum_by(group, x, len(group)) for x in (values, torch.ones_like(values)))  # there are B groups at most
    return (sums / sizes)[group]


def group_advantages(rewards, group, norm="std"):
    """A_i = (r_i - mean) / std within the group, population std ([NTHR] eq. 1). (B,), (B,) -> (B,).

    norm="mean": r_i - mean, not divided ([DrGRPO], [DaGRPO]). A group whose rewards are all equal has no signal: 0.
    Off-policy anchors are responses of their group like any other (the union of [DaGRPO] G_mix).
    """
    centred = rewards - group_mean(rewards, group)
    if norm == "mean":
        return centred
    std = group_mean(centred.square(), group).sqrt()
    return torch.where(std > 1e-6, centred / std.clamp(min=1e-6), torch.zeros_like(centred))


# ---------------------------------------------------------------------------------------------------------------------
# the loss

def token_weights(response, group, groups_in_update, norm="group", tokens_in_update=None, max_tokens=None):
    """The weight of every token's loss, (N,); the loss is the weighted sum over all ranks and micro-batches.

    norm "group": 1 / (tokens of the group x groups), [NTHR] eq. 1. "token": 1 / tokens of the update, [DAPO].
    "constant": 1 / (responses of the group x max_tokens x groups), [DrGRPO], [DaGRPO]: neither length nor masks change it.
    response (N,), group (B,) of whole groups on this rank; the counts are of the whole update, all ranks.
    """
    of_token = group[response]                                                                    # (N,)
    if norm == "token":
        return torch.full(of_token.shape, 1.0 / tokens_in_update, device=of_token.device)
    of_group = sum_by(of_token, torch.ones_like(of_token), len(group)) if norm == "group" else (
        sum_by(group, torch.ones_like(group), len(group)) * max_tokens)
    return 1.0 / (of_group[of_token] * groups_in_update).to(torch.float32)


def clipped_loss(logp, old_logp, advantages, clip_low, clip_high):
    """-min(g A, clip(g, 1 - clip_low, 1 + clip_high) A) per token, g = exp(logp - old_logp) ([NTHR] eq. 1). All (N,).

    clip_high > clip_low is clip-higher ([DAPO]). Returns (loss, clipped): clipped is 1.0 where the clip was the smaller
    term, so that the token has no gradient.
    """
    ratio = (logp - old_logp).exp()
    plain = ratio * advantages
    limited = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(plain, limited), (limited < plain).detach().float()


def policy_loss(logp, old_logp, advantages, weights, clip_low=0.2, clip_high=0.2, kl_coef=0.0, ref_logp=None,
                anchor=None, anchor_form="luffy", importance=None):
    """The loss of tokens (N,), a weighted sum over them: clipped surrogate, and kl_coef times KL to the reference model.

    weights: token_weights. importance (N,): truncated_importance, times the surrogate alone. anchor (N,) bool: tokens of
    demonstrations, which the policy did not sample; theirs is anchor_loss, without KL and importance. Returns (loss (), clipped (N,),
    kl (N,)); the last two 0 for anchors, kl also without ref_logp.
    """
    if anchor is not None:  # ratios of 1: nothing to clip, no KL, nothing to overflow
        old_logp = torch.where(anchor, logp.detach(), old_logp)
        ref_logp = None if ref_logp is None else torch.where(anchor, logp.detach(), ref_logp)
    loss, clipped = clipped_loss(logp, old_logp, advantages, clip_low, clip_high)
    if importance is not None:
        loss = importance * loss
    kl = torch.zeros_like(logp) if ref_logp is None else kl_k3(logp, ref_logp)
    if anchor is not None:
        loss = torch.where(anchor, anchor_loss(logp, advantages, anchor_form), loss)
    return (weights * (loss + kl_coef * kl)).sum(), clipped, kl


@torch.no_grad()
def truncated_importance(old_logp, rollout_logp, cap):
    """(min(ratio, cap), ratio) with ratio = pi_old / pi_rollout, per token, no gradient ([TIS]). All (N,).

    pi_rollout is what vLLM says the sampled token had, pi_old what the trainer says for the same weights: kernels and
    precisions differ, and the product makes the surrogate's expectation the trainer's again, but for what the cap takes.
    """
    ratio = (old_logp - rollout_logp).exp()
    return ratio.clamp(max=cap), ratio


def anchor_loss(logp, advantages, form="luffy", gamma=0.1):
    """Loss of off-policy anchor tokens, no ratio and no clip. All (N,).

    "luffy": -A pi / (pi + gamma), whose gradient is -A gamma pi / (pi + gamma)^2 grad log pi ([LUFFY] eq. 8).
    "logp": -A log pi, [DaGRPO] eq. 13 to the letter.
    """
    return -advantages * (logp if form == "logp" else logp.exp() / (logp.exp() + gamma))


def kl_k3(logp, ref_logp):
    """Per-token estimate of KL(pi || ref), never negative: exp(d) - d - 1 with d = ref_logp - logp (GRPO). All (N,)."""
    d = ref_logp - logp
    return d.exp() - d - 1


# ---------------------------------------------------------------------------------------------------------------------
# NTHR: which tokens of incorrect responses pull the likelihood of correct ones down

def group_tokens(responses, rewards, device):
    """What `influence` would otherwise ask the GPU for, of one group: (source (K,) int64, index of the tokens of correct
    responses; (rows (W,), column (N,)), the group's distinct tokens and which of them each token is).

    responses: n int arrays, rewards (n,), both on the host.
    """
    correct = np.repeat(np.asarray(rewards) == 1, [len(r) for r in responses])
    rows, column = np.unique(np.concatenate(responses), return_inverse=True)
    source, rows, column = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (np.flatnonzero(correct), rows, column))
    return source, (rows, column)


@torch.no_grad()
def influence(h, targets, lse, head, source, temperature=1.0, vocab="response", chunk=512):
    """s_t = u_t^T M h_t of every token t of ONE group, M = sum over source tokens k of u_k h_k^T ([NTHR] eq. 7).

    u = onehot(target) - softmax(logits / temperature) is the prediction error, so M is the gradient of the source tokens'
    log-likelihood with respect to the LM head and s_t its inner product with token t's (times temperature^2).

    h (N, d): states that predict the tokens, before the head; targets (N,); lse (N,): logsumexp(logits / temperature)
    over the whole vocabulary; head (V, d); source (N,) bool, or an index. vocab "response": rows of the tokens in the group
    only (the paper's V*_x, no renormalisation); "full": all rows. The index and (rows, column) for "response" are group_tokens,
    without which the GPU is waited for. lse is known, so u comes a block of the vocabulary at a time, once, in at most
    chunk x V elements however long the group is. Returns s (N,), float32 (float64 of float64).
    """
    dtype = torch.promote_types(h.dtype, torch.float32)
    h, shift = h.to(dtype), -lse[:, None].to(dtype)
    column = targets
    if vocab != "full":
        rows, column = targets.unique(return_inverse=True) if vocab == "response" else vocab
        head = head[rows]
    if source.dtype == torch.bool:
        source = source.nonzero()[:, 0]
    h_source = h[source]                                                                          # (K, d)
    few = len(source) <= h.shape[1]  # then sum <u_t, u_k> <h_t, h_k> as it stands, else M: whichever multiplies less
    pairs = h.new_zeros(len(h), len(source) if few else 0)                                        # <u_t, u_k>, (N, K)
    s = h.new_zeros(len(h))
    block = max(1, chunk * len(head) // max(1, len(h)))
    for a in range(0, len(head), block):
        w = head[a:a + block].to(dtype)                                                           # (block, d)
        u = torch.addmm(shift, h, w.T, alpha=1 / temperature).exp_().neg_()                       # (N, block)
        here = ((column >= a) & (column < a + len(w))).to(dtype)
        u.scatter_add_(1, (column - a).clamp(0, len(w) - 1)[:, None], here[:, None])
        if few:
            pairs.addmm_(u, u[source].T)
        else:
            s += torch.linalg.vecdot(u, h @ (h_source.T @ u[source]))                             # M's rows of the block
    return s + torch.linalg.vecdot(pairs, h @ h_source.T) if few else s


def nthr_select(s, rewards, response, group, beta=1.0, groups=None):
    """Tokens of incorrect responses with s > tau = beta x min over correct i' of mean s ([NTHR] eq. 8, 9, Algorithm 1).

    s (N,), rewards (B,); groups: M, None to look it up. Returns (selected (N,) bool, tau (M,)). The minimum runs over the
    group's correct responses, the sum in s over all of them, i' itself included, as in the formulas. tau may be negative. beta=-inf
    selects every incorrect token; a group without a correct response selects none (tau = inf).
    """
    if groups is None:
        groups = int(group[-1]) + 1 if len(group) else 0
    mean_s = sum_by(response, s, len(rewards)) / sum_by(response, torch.ones_like(s), len(rewards))  # (B,)
    lowest = torch.full((groups,), torch.inf, dtype=s.dtype, device=s.device)
    lowest = lowest.scatter_reduce(0, group, mean_s.where(rewards == 1, torch.inf), "amin")       # (M,)
    tau = torch.full_like(lowest, -torch.inf) if beta == -torch.inf else beta * lowest
    tau = tau.where(lowest < torch.inf, torch.inf)
    return (rewards[response] == 0) & (s > tau[group[response]]), tau


def nthr_eta(eta, rewards, group):
    """What is left of a selected token's advantage, per response (B,): 2|0.5 - p|, p, 1 - p (p the group's success
    rate), or a constant."""
    p = group_mean(rewards, group)
    return ETAS[eta](p) if isinstance(eta, str) else torch.full_like(p, eta)


def random_like(selected, response, generator):
    """As many tokens of every response as `selected` has there, uniformly without replacement ([NTHR] "Random").

    selected (N,) bool, response (N,) ascending. Returns (N,) bool. generator: torch.Generator on the CPU.
    """
    draw = torch.rand(len(response), generator=generator, dtype=torch.float64, pin_memory=response.is_cuda)
    order = torch.argsort(response + draw.to(response.device, non_blocking=True))  # shuffles the tokens within each response
    wanted, lengths = (sum_by(response, x, len(response)) for x in (selected.long(), torch.ones_like(response)))
    place = torch.arange(len(response), device=response.device) - (lengths.cumsum(0) - lengths)[response]
    picked = torch.zeros_like(selected)
    picked[order] = place < wanted[response]
    return picked


def token_advantages(variant, advantages, rewards, response, group, selected=None, eta="2|0.5-p|", lam=None):
    """The advantage of every response token, (N,); a constant of the step, no gradient goes through it.

    grpo: A_i for all tokens of response i. pos_only: negative A_i set to 0; the loss keeps counting those tokens.
    nthr: eta A_i on `selected` tokens. random: 0 on them. dagrpo: lambda_i A_i, lam (B,) from dagrpo_masks.
    """
    if variant == "pos_only":
        advantages = advantages.clamp(min=0)
    if variant == "dagrpo" and lam is not None:
        advantages = advantages * lam
    out = advantages[response]
    if variant in ("nthr", "random"):
        keep = nthr_eta(eta, rewards, group)[response] if variant == "nthr" else torch.zeros_like(out)
        out = torch.where(selected, keep * out, out)
    return out


def gwhes(s_positive, s_negative, rewards, response, group):
    """Group-weighted hidden embedding score of every correct response ([NTHR] eq. 5), nan for the others: (B,).

    s_positive, s_negative (N,): `influence` with the group's correct, and with its incorrect, tokens as source.
    p- x sum over the response's tokens of s_negative - p+ x the same of s_positive; p+ = (1-p)/sqrt(p(1-p)), p- =
    p/sqrt(p(1-p)). A question's score is the mean over its correct responses.
    """
    p = group_mean(rewards, group).to(s_positive.dtype)
    scale = (p * (1 - p)).sqrt()
    sums = [torch.zeros_like(p).index_add(0, response, s) for s in (s_positive, s_negative)]
    score = (p * sums[1] - (1 - p) * sums[0]) / scale
    return score.where((rewards == 1) & (scale > 0), torch.nan)


# ---------------------------------------------------------------------------------------------------------------------
# DaGRPO: which responses a judge can tell apart

def dagrpo_margins(scores, advantages, group):
    """How far the judge's scores S tell every response from the hardest one of the other sign, (B,) ([DaGRPO]).

    S_j - max over negatives of S for A_j > 0, min over positives of S - S_k for A_k < 0; signs of the advantages of the
    whole group, anchors among them, before masking. -inf for a response without an opposite or with A = 0: it has no
    gradient anyway. nan in a group that lacks a score (nan).
    """
    def extreme(of, empty, how):
        start = torch.full(scores.shape, empty, dtype=scores.dtype, device=scores.device)
        return start.scatter_reduce(0, group, scores.where(of, empty), how)[group]

    positive, negative = advantages > 0, advantages < 0
    above = scores - extreme(negative, -torch.inf, "amax")
    below = extreme(positive, torch.inf, "amin") - scores
    margins = above.where(positive, below.where(negative, -torch.inf))
    margins = margins.where(margins < torch.inf, -torch.inf)  # no opposite
    missing = sum_by(group, scores.isnan().to(scores.dtype), len(group))[group] > 0
    return margins.masked_fill(missing, torch.nan)


def dagrpo_masks(scores, advantages, group, delta=3.0):
    """lambda of every response, 0 or 1, (B,) ([DaGRPO]): 1[margin >= delta], see dagrpo_margins. A group that was not
    judged is trained without masks: 1."""
    margins = dagrpo_margins(scores, advantages, group)
    return ((margins >= delta - 1e-5) | margins.isnan()).to(advantages.dtype)  # 9.1 - 6.1 is 3 apart
