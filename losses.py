"""The loss of a micro-batch: what each token weighs, ratios and clips, anchors, regularisers.

[NTHR] is arXiv 2505.18830, [LLDS] 2512.04220, [DaGRPO] 2512.06337, [GSPO] 2507.18071, [CISPO]
2506.13585, [LUFFY] 2504.14945, [DrGRPO] 2503.20783, [DAPO] 2503.14476, [TIS] Yao et al. 2025, "Your
efficient RL framework secretly brings you off-policy RL training"."""
import numpy as np
import torch

CHOICES = dict(  # of settings: the values that they may have
    loss=("clip", "gspo", "cispo"), loss_norm=("group", "response", "token", "constant"),
    anchor_loss=("luffy", "logp"))


def set_weights(groups, loss_norm="group", max_response_tokens=1):
    """Set weight (G,), of each response's tokens in the loss, and update_tokens of an update's
    groups, those of all ranks. The loss is the weighted sum over micro-batches and ranks.
    loss_norm "group": 1 / (tokens of the group x groups), [NTHR] eq. 1. "response": 1 / (tokens of
    the response x responses x groups), GRPO's first form and [GSPO]. "token": 1 / tokens of the
    update, [DAPO]. "constant": 1 / (responses x max_response_tokens x groups), [DrGRPO]."""
    update_tokens = sum(sum(g.lengths) for g in groups)
    for g in groups:
        tokens, size = np.array(g.lengths), len(g.responses)
        g.update_tokens = update_tokens
        divisor = {"group": tokens.sum() * len(groups), "response": tokens * size * len(groups),
                   "token": update_tokens, "constant": size * max_response_tokens * len(groups)}
        g.weight = np.ones(size) / divisor[loss_norm]


def policy_loss(logp, batch, loss="clip", clip_low=0.2, clip_high=0.2, kl_coef=0.0, tis_cap=0.0,
                seq_mask_cap=None, llds=0.0, anchor_loss="luffy", figures=None):
    """The loss of a micro-batch's n response tokens, a weighted sum: ().

    Rollout tokens, with A and ratio = pi / pi_old as in PPO ([NTHR] eq. 1):
    clip   max(-A ratio, -A clip(ratio))
    gspo   the same with the response's geometric mean of the ratios, whose gradient is taken token
           by token ([GSPO], GSPO-token): the same as GSPO where A is one number a response
    cispo  -A clip(ratio) logp, clip(ratio) a constant: no token's gradient is cut off ([CISPO])
    times the truncated importance min(pi_old / pi_rollout, tis_cap) if tis_cap ([TIS]), plus
    kl_coef times KL to the reference model, plus llds times `llds_penalty`. Responses whose product
    of pi_old / pi_rollout is over seq_mask_cap, or under 1 / seq_mask_cap, have no loss but LLDS's
    (and keep their share of the weights). Anchor tokens, which were not sampled: see anchor_losses.

    logp (n,), with gradient; batch: its old_logp, advantage, weight, is_anchor, response (n,),
    rollout_logp for tis_cap, ref_logp for kl_coef. clip_high > clip_low is clip-higher ([DAPO])."""
    sampled = ~batch.is_anchor
    A = batch.advantage
    old_logp = torch.where(sampled, batch.old_logp, logp.detach())  # an anchor's ratio is 1
    ratio = (logp - old_logp).exp()
    if loss == "gspo":  # a micro-batch has whole responses
        log_ratio = logp.detach() - old_logp
        means = per_response(log_ratio, batch) / per_response(torch.ones_like(log_ratio), batch)
        ratio = means.exp()[batch.response] * (logp - logp.detach()).exp()
    plain, clipped = (-A * x for x in (ratio, ratio.clamp(1 - clip_low, 1 + clip_high)))
    losses = clipped.detach() * logp if loss == "cispo" else torch.maximum(plain, clipped)

    log_importance = (batch.old_logp - batch.rollout_logp).where(sampled, 0)
    importance = log_importance.exp()
    if tis_cap:
        losses = losses * importance.clamp(max=tis_cap)
    if kl_coef:
        kl = kl_k3(logp, torch.where(sampled, batch.ref_logp, logp.detach()))
        losses = losses + kl_coef * kl
    losses = torch.where(sampled, losses, anchor_losses(logp, A, anchor_loss))
    if seq_mask_cap:
        left_out = per_response(log_importance, batch).abs() > np.log(seq_mask_cap)  # (B,)
        losses = losses.masked_fill(left_out[batch.response], 0)
    total = (batch.weight * losses).sum()
    if llds:
        penalty = llds_penalty(logp, old_logp, batch)
        total = total + llds * penalty

    if figures:
        gap = log_importance.abs()
        is_clipped = clipped != plain if loss == "cispo" else clipped > plain
        of_tokens = {"train/clip_fraction": is_clipped, "train/kl_old": kl_k3(old_logp, logp),
                     "gap/mean": gap, "gap/importance": importance}
        if kl_coef:
            of_tokens["train/kl"] = kl
        if tis_cap:
            of_tokens["gap/importance_cut"] = importance > tis_cap
        for key, x in of_tokens.items():
            figures.mean(key, x, where=sampled)
        figures.max("gap/max", gap, where=sampled)
        figures.sum("train/tokens", sampled)
        if llds:
            figures.sum("train/llds", penalty)  # over the step's updates
        if seq_mask_cap:
            figures.sum("gap/responses_left_out", left_out)
    return total


def per_response(x, batch):
    """Sums of x (n,) over the tokens of each of the B responses, (B,)."""
    return x.new_zeros(len(batch.right)).index_add(0, batch.response, x)


def llds_penalty(logp, old_logp, batch):
    """Likelihood that tokens with A >= 0 lost since they were sampled, per token of the update, ().
    [LLDS], response gate: sum of max(0, old_logp - logp) over the tokens of responses that lost
    likelihood as a whole, / batch.update_tokens. 0 before the step's second update."""
    lost = old_logp - logp
    gate = per_response(lost, batch) > 0  # (B,)
    counts = (batch.advantage >= 0) & gate[batch.response]
    return lost.clamp(min=0).where(counts, 0).sum() / max(1, batch.update_tokens)


def anchor_losses(logp, advantage, form):
    """Loss of demonstrations' tokens, without ratio, clip and KL. All (n,).
    "luffy": -A pi / (pi + gamma), whose gradient is -A gamma pi / (pi + gamma)^2 grad log pi
    ([LUFFY] eq. 8, gamma 0.1). "logp": -A log pi, [DaGRPO] eq. 13 to the letter."""
    pi = logp.exp()
    return -advantage * (logp if form == "logp" else pi / (pi + 0.1))


def kl_k3(logp, ref_logp):
    """Per-token estimate of KL(pi || ref), never negative: exp(d) - d - 1, d = ref_logp - logp."""
    d = ref_logp - logp
    return d.exp() - d - 1
