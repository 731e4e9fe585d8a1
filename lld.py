"""Lazy Likelihood Displacement: what one update does to the likelihood of right answers ([NTHR], arXiv 2505.18830, sec. 4, 5).

    python lld.py config/lld_quickstart.py                     SmolLM2-135M on two-digit arithmetic, 2 CPU cores: make lld
    torchrun --nproc_per_node=4 lld.py config/lld_qwen15b_math.py    the questions split over four GPUs
    python lld.py config/lld_quickstart.py --optimizer=sgd --learning_rate=1e-2 --out_dir=out/lld_sgd

For each question with right and wrong responses and each variant: theta is what it was, takes ONE update on this question
alone, with the trainer's loss and optimizer, and Delta(x) = mean over correct responses of ln pi'(y|x) - ln pi(y|x) (eq. 2).

Leaves in out_dir: groups.jsonl (the sampled token ids), questions.jsonl (a row per question), summary.json and summary.md,
delta.png (Figs. 1, 4), gwhes.png (Table 1), success.png, tokens.html (Fig. 3). Stopped and started again, it goes on.
"""
import html
import json
import math
import os

from configurator import check, check_folder, configure, die, is_rank0, print0
from rollout import build_engine, sample_batch, sleep_engine  # before torch: it sets its threads
from data import check_lengths, encode_prompts, load_problems, load_tokenizer
from runs import free_name, save_figure, write_json, write_jsonl, write_whole

# model and data
model = "models/SmolLM2-135M-Instruct"  # Hugging Face folder or hub id
dataset = "arithmetic"        # a set's name (data.SETS) or a JSON Lines file with `problem` and `answer`
split = "train"               # of a name: "train" or "test"
data_dir = None               # folder of JSON Lines files, where names are looked for before the Hugging Face hub
system_prompt = None          # str; None: the data set's own
few_shot = None               # ((question, answer), ...) as earlier chat turns; None: the data set's own
out_dir = "out/lld"
seed = 0                      # of data order, sampling and Random's draw
# rollout
questions = 64                # questions with both outcomes, all ranks together
group_size = 8                # responses a question (G)
temperature = 1.0             # of sampling, and of all log-probabilities
max_response_tokens = 512     # tokens; a response cut off here is incorrect
oversample = 3.0              # questions asked in a round / questions still missing
max_rounds = 8                # questions asked at most / questions; then those there are
rollout_dtype = "auto"        # of vLLM; "auto": bfloat16 on CUDA, float32 on a CPU
gpu_memory_utilization = 0.4  # share of each GPU that vLLM takes (CUDA)
max_num_seqs = None           # sequences a vLLM engine runs at once; None: vLLM's own choice
# the update
variants = ("grpo", "pos_only", "random", "nthr")  # advantages.token_advantages
nthr_beta = 1.0               # tau = nthr_beta x the lowest mean score of a correct response; -inf: all
nthr_eta = 0.0                # what NTHR leaves of a selected token's advantage: a number, "2|0.5-p|", "p" or "1-p"
nthr_vocab = "response"       # scores over the tokens of the group's responses, or "full": over the whole vocabulary
advantage_norm = "std"        # as in train.py
loss_norm = "group"           # as in train.py
optimizer = "adamw"           # its first step, or "sgd"
learning_rate = 1e-6
weight_decay = 0.0
adam_betas = (0.9, 0.999)
grad_clip = 1.0               # largest global gradient norm; 0: no clipping
tokens_per_micro_batch = 8192  # packed tokens in one forward pass
compute_dtype = "float32"     # of the trainer's matrix products; bfloat16 rounds small changes of a likelihood away
activation_checkpointing = False
# results
epsilon = 0.0                 # a question is displaced if GRPO's Delta is below this (nats)
pages = 8                     # questions in tokens.html, those of smallest Delta

config = configure(globals())

DTYPES = ("auto", "float32", "bfloat16")
check(config, dict(variants=["grpo", "pos_only", "random", "nthr"], optimizer=("adamw", "sgd"), nthr_vocab=("response", "full"),
                   split=("train", "test"), advantage_norm=("std", "mean"), loss_norm=("group", "token", "constant"),
                   nthr_eta=("2|0.5-p|", "p", "1-p", float), compute_dtype=DTYPES, rollout_dtype=DTYPES),
      above_zero=("questions", "max_response_tokens", "max_rounds", "temperature", "learning_rate", "tokens_per_micro_batch"),
      not_negative=("seed", "grad_clip", "weight_decay", "pages"), whole=("max_num_seqs",), infinite=("nthr_beta", "oversample", "grad_clip"),
      text=("model", "dataset", "out_dir"), text_or_none=("data_dir", "system_prompt"))
if not variants:
    die("variants: none given")
if nthr_beta == math.inf:
    die("nthr_beta: inf selects nothing; -inf all")
if group_size < 2 or oversample < 1:
    die(f"group_size: {group_size}, oversample: {oversample}: at least 2 and 1")
problems = load_problems(dataset, split, data_dir=data_dir)
tokenizer, hf_config = load_tokenizer(model)
prompts = encode_prompts(tokenizer, problems, dataset, system_prompt, few_shot)
context = check_lengths(prompts, max_response_tokens, hf_config.max_position_embeddings, f"dataset {dataset}")
check_folder(out_dir)

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from advantages import (group_advantages, gwhes, influence, nthr_select, policy_loss, random_like, token_advantages,
                        token_weights)
from eval import bootstrap
from model_utils import check_model, load_policy, make_optimizer, optimizer_step, pack_all, plan_micro_batches, setup_distributed

check_model(model, hf_config)
device = setup_distributed()
rank, world_size = dist.get_rank(), dist.get_world_size()
if compute_dtype == "auto":
    compute_dtype = "bfloat16" if device.type == "cuda" else "float32"

# ---------------------------------------------------------------------------------------------------------------------
# questions with both outcomes, sampled once and kept

of_groups = ("model", "dataset", "split", "data_dir", "system_prompt", "few_shot", "seed", "questions", "group_size",
             "temperature", "max_response_tokens", "oversample", "max_rounds")
of_rows = [k for k in config if k not in of_groups + ("out_dir", "epsilon", "pages", "tokens_per_micro_batch",
                                                      "gpu_memory_utilization", "max_num_seqs", "rollout_dtype")]


def saved(name, keys):
    """Rows of out_dir/name if its first line has the settings `keys` of this run, else None. A cut last line is left out."""
    rows = []
    try:
        with open(os.path.join(out_dir, name), encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.endswith("\n")]
    except (OSError, ValueError):
        pass
    settings = json.loads(json.dumps({k: config[k] for k in keys}))
    return rows[1:] if rows and rows[0] == settings else None


def begin(name, keys, rows):
    """Write out_dir/name with the settings and rows; one of other settings is kept as old_N/name. Rank 0."""
    path = os.path.join(out_dir, name)
    if os.path.exists(path) and saved(name, keys) is None:
        old = free_name(os.path.join(out_dir, "old_"), f"/{name}")
        os.makedirs(os.path.dirname(old), exist_ok=True)
        os.rename(path, old)
        print0(f"{path} is of other settings; it is now {old}")
    write_jsonl(path, [{k: config[k] for k in keys}] + rows)


found = [saved("groups.jsonl", of_groups), saved("questions.jsonl", of_groups + tuple(of_rows)) or []]
dist.broadcast_object_list(found)  # what rank 0 has read: all ranks must agree on what is left to do
groups, done = found
engine = None
if groups is None:
    engine = build_engine(model, context, seed, rollout_dtype, gpu_memory_utilization, max_num_seqs)
    torch.manual_seed(hash((seed, rank)) % 2**63)  # of vLLM's sampling
    kept, sampled, *_ = sample_batch(engine, tokenizer, problems, prompts, 0, seed, prompts_per_step=questions,
                                     oversample=oversample, max_prompts=min(max_rounds * questions, len(problems)),
                                     keep_all=False, n=group_size, streaming=False, seeded=device.type == "cuda",
                                     temperature=temperature, max_response_tokens=max_response_tokens)
    sleep_engine(engine, 2)
    print0(f"{len(kept)} of {len(sampled)} questions have both outcomes; {np.mean([g['rewards'].mean() for g in sampled]):.1%} "
           f"of their responses are correct")
    groups, done = [dict(problem=g["problem"], answer=g["answer"], prompt=g["prompt"].tolist(), texts=g["texts"],
                         responses=[r.tolist() for r in g["responses"]], rewards=g["rewards"].tolist()) for g in kept], []
if not groups:
    die(f"dataset: no question of {dataset} has right and wrong responses; more max_rounds, or an easier set")
if is_rank0():
    write_json(os.path.join(out_dir, "lld_config.json"), config)  # config.json would make it a model's folder
    begin("groups.jsonl", of_groups, groups)
    begin("questions.jsonl", of_groups + tuple(of_rows), done)

# ---------------------------------------------------------------------------------------------------------------------
# one update a question and variant

policy = load_policy(model, getattr(torch, compute_dtype), device, activation_checkpointing)
policy.train()
theta = [p.detach().clone() for p in policy.parameters()]
optim = make_optimizer(policy, optimizer, learning_rate, adam_betas, weight_decay)
head = policy.model.get_output_embeddings().weight.detach().clone()                                # (V, d)


def forward(batches, states=False):
    """Log-probabilities (N,) of all responses without gradient; states: also (h (N, d), lse (N,))."""
    with torch.no_grad():
        outs = [policy(b, temperature, states=states) for b in batches]
    return torch.cat([o[0] for o in outs]), *(torch.cat([o[k] for o in outs]) for k in ((2, 3) if states else ()))


def ranks_of(x):
    """Rank of each value, 0 the smallest (ties in order). (N,) -> (N,)"""
    return x.argsort(stable=True).argsort(stable=True).double()


def measure(index):
    """The row of one question."""
    group = dict(groups[index], prompt=np.array(groups[index]["prompt"], dtype=np.int32),
                 responses=[np.array(r, dtype=np.int32) for r in groups[index]["responses"]])
    batches = pack_all([group], plan_micro_batches([group], tokens_per_micro_batch), device)
    lengths = torch.tensor([len(r) for r in group["responses"]], device=device)
    rewards = torch.tensor(group["rewards"], device=device)                                        # (G,)
    response = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)         # (N,)
    one = torch.zeros(len(lengths), dtype=torch.int64, device=device)                              # (G,) all in group 0
    correct = rewards[response] == 1                                                               # (N,)

    def total(x):
        """Sum of a per-token quantity over each response: (G,)."""
        return torch.zeros(len(lengths), dtype=torch.float64, device=device).index_add(0, response, x.double())

    logp, h, lse = forward(batches, states=True)
    states = (h, torch.cat([b.targets for b in batches]), lse, head)
    s = influence(*states, correct, temperature, nthr_vocab)
    exact, negative = (influence(*states, of, temperature, "full") for of in (correct, ~correct))
    selected, tau = nthr_select(s, rewards, response, one, nthr_beta)
    selected_exact, tau_exact = nthr_select(exact, rewards, response, one, nthr_beta)
    scores = gwhes(exact, negative, rewards, response, one)
    picker = torch.Generator().manual_seed(hash((seed, index)) % 2**63)
    chosen = dict(nthr=selected, random=random_like(selected, response, picker))
    advantages = group_advantages(rewards, one, advantage_norm)
    weights = token_weights(response, one, 1, loss_norm, len(response), max_response_tokens)
    delta = {}
    for variant in variants:
        per_token = token_advantages(variant, advantages, rewards, response, one, chosen.get(variant), nthr_eta)
        for b in batches:
            loss, *_ = policy_loss(policy(b, temperature)[0], logp[b.span], per_token[b.span], weights[b.span])
            loss.backward()
        norm = optimizer_step(policy, optim, grad_clip)
        change = total(forward(batches)[0] - logp)                                                 # (G,)
        delta[variant] = dict(correct=change[rewards == 1].mean().item(), incorrect=change[rewards == 0].mean().item(),
                              each=change.tolist(), grad_norm=norm.item())
        with torch.no_grad():  # as if nothing had happened; in place, since new memory costs more than the update
            for p, q in zip(policy.parameters(), theta):
                p.copy_(q)
            for state in optim.state.values():
                for x in state.values():
                    x.zero_()
    wrong = ~correct
    ranks = torch.stack([ranks_of(x[wrong]) for x in (s, exact)])
    return dict(
        question=index, problem=group["problem"], answer=group["answer"], p=rewards.mean().item(), delta=delta,
        tau=tau.item(), selected=(selected.sum() / wrong.sum()).item(), gwhes=scores[rewards == 1].mean().item(),
        gwhes_each=[None if math.isnan(x) else x for x in scores.tolist()],
        rank_correlation=torch.corrcoef(ranks)[0, 1].item() if wrong.sum() > 1 else 1.0,
        agreement=(selected == selected_exact)[wrong].double().mean().item(), tau_exact=tau_exact.item(),
        selected_exact=(selected_exact.sum() / wrong.sum()).item(),
        s=[x.tolist() for x in s.split(lengths.tolist())], s_exact=[x.tolist() for x in exact.split(lengths.tolist())],
        selected_tokens=[x.tolist() for x in selected.split(lengths.tolist())])


have = {r["question"] for r in done}
todo = [i for i in range(len(groups)) if i not in have]
bar = tqdm(total=len(groups), initial=len(have), desc="lld", unit="question", disable=not is_rank0())
for first in range(0, len(todo), world_size):
    mine, rows = todo[first + rank] if first + rank < len(todo) else None, [None] * world_size
    dist.all_gather_object(rows, None if mine is None else measure(mine))
    rows = [r for r in rows if r is not None]
    done += rows
    if is_rank0():
        with open(os.path.join(out_dir, "questions.jsonl"), "a", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)
    bar.update(len(rows))
    bar.set_postfix_str(", ".join(f"{v} {np.mean([r['delta'][v]['correct'] for r in done]):+.4f}" for v in variants))
bar.close()
done.sort(key=lambda r: r["question"])

# ---------------------------------------------------------------------------------------------------------------------
# summary and pictures

NAMES = dict(grpo="GRPO", pos_only="Pos Only", random="Random", nthr="NTHR")
COLORS = dict(grpo="tab:red", pos_only="tab:green", random="tab:gray", nthr="tab:blue")


def summarize(rows):
    """Figures over all questions, with 95% bootstrap intervals."""
    d = {v: np.array([r["delta"][v]["correct"] for r in rows]) for v in variants}                  # (questions,) each

    def with_interval(values):
        return [float(np.mean(values)), *bootstrap([np.asarray(values, dtype=float)], seed)]

    out = dict(questions=len(rows), learning_rate=learning_rate, optimizer=optimizer,
               delta={v: dict(mean=with_interval(x), median=float(np.median(x)), displaced=with_interval(x < epsilon),
                              incorrect=float(np.mean([r["delta"][v]["incorrect"] for r in rows]))) for v, x in d.items()})
    for better, worse in (("nthr", "grpo"), ("random", "grpo"), ("nthr", "random"), ("pos_only", "grpo")):
        if better in d and worse in d:
            out[f"{better} > {worse}"] = dict(share=with_interval(d[better] > d[worse]),
                                              equal=float(np.mean(d[better] == d[worse])),  # NTHR may select nothing
                                              less=with_interval(d[better] < d[worse]),
                                              difference=with_interval(d[better] - d[worse]))
    for key in ("selected", "selected_exact", "rank_correlation", "agreement"):
        out[key] = float(np.mean([r[key] for r in rows]))
    out["tau_negative"], out["tau_exact_negative"] = (float(np.mean([r[k] < 0 for r in rows])) for k in ("tau", "tau_exact"))
    if "grpo" in d:
        out["overlap"] = {str(k): dict(overlap=overlap(rows, k), chance=k / len(rows)) for k in (10, 15) if k <= len(rows)}
    return out


def overlap(rows, k):
    """Share of the k questions of smallest Delta (GRPO) that are among the k of largest GWHES (Table 1)."""
    smallest = sorted(range(len(rows)), key=lambda i: rows[i]["delta"]["grpo"]["correct"])[:k]
    largest = sorted(range(len(rows)), key=lambda i: -rows[i]["gwhes"])[:k]
    return len(set(smallest) & set(largest)) / k


def markdown(out):
    """The summary as Markdown tables."""
    lines = [f"{out['questions']} questions, {out['optimizer']}, learning rate {out['learning_rate']:g}", "",
             "| variant | mean Delta (95%) | median | share below epsilon (95%) | mean of incorrect |", "|---|---|---|---|---|"]
    for v, x in out["delta"].items():
        lines.append("| {} | {:+.4f} ({:+.4f} to {:+.4f}) | {:+.4f} | {:.0%} ({:.0%} to {:.0%}) | {:+.4f} |".format(
            NAMES[v], *x["mean"], x["median"], *x["displaced"], x["incorrect"]))
    lines += ["", "| on the same question | share (95%) | equal | less | mean difference (95%) |", "|---|---|---|---|---|"]
    for key, x in out.items():
        if isinstance(x, dict) and "share" in x:
            lines.append("| {} | {:.0%} ({:.0%} to {:.0%}) | {:.0%} | {:.0%} | {:+.4f} ({:+.4f} to {:+.4f}) |".format(
                key, *x["share"], x["equal"], x["less"][0], *x["difference"]))
    for k, x in out.get("overlap", {}).items():
        lines += [] if lines[-1].startswith("GWHES") else [""]
        lines.append(f"GWHES: of the {k} questions of smallest Delta, {x['overlap']:.0%} are among the {k} of largest GWHES "
                     f"(chance {x['chance']:.0%})  ")
    lines += ["", f"NTHR selects {out['selected']:.1%} of incorrect tokens; tau is negative in {out['tau_negative']:.0%} of questions. "
              f"Scores over the response vocabulary against exact ones: rank correlation {out['rank_correlation']:.3f}, the same "
              f"decision for {out['agreement']:.1%} of incorrect tokens (exact selects {out['selected_exact']:.1%}, tau negative in "
              f"{out['tau_exact_negative']:.0%})."]
    return "\n".join(lines) + "\n"


def draw(rows):
    """delta.png: sorted bars (Figs. 1, 4); gwhes.png: GWHES against Delta; success.png: Delta by success rate."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    d = {v: np.array([r["delta"][v]["correct"] for r in rows]) for v in variants}
    fig, axes = plt.subplots(len(d), 1, figsize=(9, 1 + 1.9 * len(d)), sharex=True, sharey=True, constrained_layout=True,
                             squeeze=False)
    for ax, (v, x) in zip(axes[:, 0], d.items()):
        ax.bar(range(len(x)), np.sort(x), color=COLORS[v])
        ax.axhline(0, color="black", lw=0.6)
        ax.set_title(f"{NAMES[v]}: mean {x.mean():+.3f}, {np.mean(x < epsilon):.0%} below {epsilon:g}", fontsize=10, loc="left")
        ax.set_ylabel(r"$\Delta(x)$, nats")
    axes[-1, 0].set_xlabel(f"questions, sorted for each variant ({optimizer}, learning rate {learning_rate:g})")
    save_figure(fig, os.path.join(out_dir, "delta.png"))

    p = np.array([r["p"] for r in rows])
    fig, ax = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    levels = sorted(set(p))
    for k, (v, x) in enumerate(d.items()):
        at = [q + (k - (len(d) - 1) / 2) * 0.012 for q in levels]
        ax.plot(at, [x[p == q].mean() for q in levels], marker="o", color=COLORS[v], label=NAMES[v])
        ax.scatter([at[levels.index(q)] for q in p], x, s=8, alpha=0.35, color=COLORS[v])
    ax.axhline(0, color="black", lw=0.6)
    ax.set_xlabel("success rate p of the question")
    ax.set_ylabel(r"$\Delta(x)$, nats; lines: means")
    ax.legend(fontsize=8)
    save_figure(fig, os.path.join(out_dir, "success.png"))

    if "grpo" in d:
        fig, ax = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
        points = ax.scatter([r["gwhes"] for r in rows], d["grpo"], c=p, cmap="viridis")
        fig.colorbar(points, label="success rate p")
        shares = ", ".join(f"top {k}: {overlap(rows, k):.0%} (chance {k / len(rows):.0%})" for k in (10, 15) if k <= len(rows))
        ax.set_title("overlap of smallest $\\Delta$ and largest GWHES\n" + shares, fontsize=10)
        ax.set_xlabel("GWHES (eq. 5), mean over the correct responses")
        ax.set_ylabel(r"$\Delta(x)$ of GRPO, nats")
        ax.grid(alpha=0.3)
        save_figure(fig, os.path.join(out_dir, "gwhes.png"))


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Which tokens of wrong answers pull right ones down</title><style>
body { font: 15px/1.6 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
h1 { font-size: 1.35em } h2 { font-size: 1.05em; margin: 2em 0 .3em; border-top: 1px solid #ddd; padding-top: 1em }
.text { font-family: ui-monospace, monospace; font-size: 14px; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0 .3em 7em }
.name { float: left; width: 6.5em; color: #666; font-size: 13px }
.prompt { max-height: 12em; overflow: auto; color: #555; background: #f6f6f6; padding: .3em .6em }
.t { border-radius: 2px; padding: 1px 0; cursor: default } .t:hover { outline: 1px solid #000 }
.sel { text-decoration: underline; text-decoration-thickness: 2.5px; text-underline-offset: 3px; text-decoration-skip-ink: none }
.scale { position: relative; height: 14px; width: 24em; margin: 22px 0 6px 7em; border: 1px solid #999;
  background: linear-gradient(90deg, rgb(33,102,172), #fff 50%, rgb(214,40,40)) }
.scale b { position: absolute; top: -21px; transform: translateX(-50%); font-size: 12px; white-space: nowrap }
.scale i { position: absolute; top: -4px; bottom: -4px; width: 2px; background: #000 }
.scale span { position: absolute; top: 15px; font-size: 11px; color: #666 }
</style></head><body>
"""


def color(share):
    """Background of a token: share in [-1, 1], blue to white to red."""
    end = (214, 40, 40) if share > 0 else (33, 102, 172)
    return "rgb({},{},{})".format(*(round(255 + (c - 255) * min(1.0, abs(share)) * 0.85) for c in end))


def page(rows):
    """tokens.html: prompt, a correct response and the incorrect ones of the questions of smallest Delta, tokens coloured by s."""
    by = "grpo" if "grpo" in variants else variants[0]
    out = [PAGE, "<h1>Which tokens of wrong answers pull right ones down</h1><p>", html.escape(
        f"The {min(pages, len(rows))} of {len(rows)} questions with the smallest Delta(x) under {NAMES[by]} ({model}, {optimizer}, "
        f"learning rate {learning_rate:g}). A token of an incorrect response is red if the penalty on it lowers the likelihood of the "
        "correct responses (s > 0, eq. 7), blue if it raises it; underlined if NTHR spares it (s > tau). Hover: s and its rank."),
        "</p>\n"]
    for r in sorted(rows, key=lambda r: r["delta"][by]["correct"])[:pages]:
        g = groups[r["question"]]
        wrong = [i for i, reward in enumerate(g["rewards"]) if reward == 0]
        right = g["rewards"].index(1.0)
        order = sorted((-x for i in wrong for x in r["s"][i]))
        top = max(max((abs(x) for i in wrong for x in r["s"][i]), default=0), 1e-12)
        deltas = ", ".join(f"{NAMES[v]} {x['correct']:+.4f}" for v, x in r["delta"].items())
        out.append(f"<h2>{html.escape(r['problem'])}</h2><div>answer {html.escape(r['answer'])}; p = {r['p']:.3f}; Delta: {deltas}</div>\n")
        out.append(f'<div class="name">prompt</div><div class="text prompt">{html.escape(tokenizer.decode(g["prompt"]))}</div>\n')
        out.append(f'<div class="name">correct</div><div class="text">{html.escape(tokenizer.decode(g["responses"][right]))}</div>\n')
        at = 50 + 50 * max(-1, min(1, r["tau"] / top))
        beyond = "" if abs(r["tau"]) <= top else " (beyond the scale)"
        out.append(f'<div class="scale"><b style="left:{at:.1f}%">tau = {r["tau"]:.3g}{beyond}</b><i style="left:{at:.1f}%"></i>'
                   f'<span style="left:0">s = {-top:.3g}</span><span style="right:0">{top:.3g}</span></div>\n<p></p>')
        for i in wrong:
            tokens = []
            for t, x, chosen in zip(g["responses"][i], r["s"][i], r["selected_tokens"][i]):
                place = int(np.searchsorted(order, -x)) + 1
                tokens.append(f'<span class="t{" sel" if chosen else ""}" style="background:{color(x / top)}" '
                              f'title="s = {x:.4g}, rank {place} of {len(order)}">{html.escape(tokenizer.decode([t]))}</span>')
            out.append(f'<div class="name">incorrect</div><div class="text">{"".join(tokens)}</div>\n')
    return "".join(out) + "</body></html>\n"


if is_rank0():
    summary = summarize(done)
    write_json(os.path.join(out_dir, "summary.json"), summary)
    for name, text in (("summary.md", markdown(summary)), ("tokens.html", page(done))):
        write_whole(os.path.join(out_dir, name), text)
    draw(done)
    print0(markdown(summary))
    print0(f"wrote {out_dir}/: groups.jsonl, questions.jsonl, summary.json, summary.md, delta.png, gwhes.png, success.png, tokens.html")
dist.barrier()
if engine is not None and device.type == "cuda":
    engine.wake_up()  # what it unmapped when it went to sleep is not to be unmapped again
del engine  # last: its shutdown ends the process group
