"""Lazy Likelihood Displacement: the analysis of [NTHR] (arXiv 2505.18830), sections 4 and 5.

    python lld.py config/lld_quickstart.py      SmolLM2-135M on arithmetic, 2 CPU cores: make lld
    torchrun --nproc_per_node=4 lld.py config/lld_qwen15b_math.py     four GPUs share the questions

For each question with right and wrong responses and each variant: theta takes ONE update on this
question alone, with the trainer's loss and optimizer, and is put back. Delta(x) is the mean over
correct responses of ln pi'(y|x) - ln pi(y|x) (eq. 2).

Leaves in out_dir: groups.jsonl (token ids), questions.jsonl (a row a question), summary.md and
.json, delta.png, tokens.html (Fig. 3); bench/overlap.py says whether the methods pick the same
tokens. Stopped and started again, it goes on; other settings of the update keep the samples."""
import copy
import itertools
import json
from pathlib import Path

from rollout import build_engine, sample_batch, sleep_engine, sync_weights  # before torch

import numpy as np
import pandas as pd
import seaborn
import torch
import torch.distributed as dist
from tqdm import trange

import advantages
import losses
import model_utils
from advantages import VARIANTS, Old, gwhes, influence, threshold
from configurator import check, configure, die, is_rank0, print0, settings_for
from data import Group, encode_prompts, load_problems, load_tokenizer, share_out
from eval import bootstrap, checksum_asked, kept_rows, table
from plot import save_figure, subplots, write_page
from runs import check_folder, write_jsonl, write_whole

# the questions and their responses; a change of one of these samples anew
model = "models/SmolLM2-135M-Instruct"  # Hugging Face folder or hub id
dataset = "arithmetic"        # as in train.py
split = "train"               # of a name: "train" or "test"
data_dir = "data"             # where known sets are: bench/get_data.py fetches them
system_prompt = None          # str; None: the data set's own
prompt = None                 # as in train.py
reward = None                 # likewise
seed = 0                      # of data order, sampling and Random's draw
questions = 64                # questions with both outcomes, all ranks together
group_size = 8                # responses a question (G)
temperature = 1.0             # of sampling, and of all log-probabilities
max_response_tokens = 512     # a response cut off here is incorrect
oversample = 3.0              # questions in work at once / questions missing
max_rounds = 8                # questions sampled at most / questions; then those there are
# the update; a change of one of these measures anew
_measured = [v for v in VARIANTS if v != "dagrpo"]  # which needs a judge's scores
variants = tuple(_measured)
nthr_beta = 1.0               # tau = nthr_beta x lowest mean score of a correct response; -inf: all
nthr_eta = 0.0                # share of a selected token's advantage that is left
nthr_vocab = "response"       # scores over the tokens of the group, or "full": the whole vocabulary
thr_p = 0.0                   # this and what follows as in train.py
entropy_share = 0.2
advantage_norm = "std"
loss_norm = "group"
learning_rate = 1e-6
grad_clip = 1.0               # largest global gradient norm; 0: no clipping
# what no question's numbers depend on
out_dir = "out/lld"
gpu_memory_utilization = 0.4  # share of each GPU that vLLM takes (CUDA)
tokens_per_micro_batch = 8192  # packed tokens in one forward pass
activation_checkpointing = False

config = configure(globals())

check(
    config, advantages.CHOICES | losses.CHOICES | dict(variants=_measured, split=("train", "test")),
    {"> 0": "questions max_response_tokens max_rounds oversample learning_rate "
            "tokens_per_micro_batch entropy_share gpu_memory_utilization",
     ">= 0": "grad_clip", ">= 0.01": "temperature", ">= 2": "group_size",
     "<= 1": "entropy_share gpu_memory_utilization"},
    infinite="nthr_beta oversample grad_clip", optional={str: "system_prompt prompt reward"})
if "grpo" not in variants:
    die("variants: grpo is what the others are compared with")
problems = load_problems(dataset, split, data_dir=data_dir)
tokenizer, hf_config = load_tokenizer(model)
model_utils.check_model(model, hf_config)
room = hf_config.max_position_embeddings - max_response_tokens
prompts = encode_prompts(tokenizer, problems, dataset, system_prompt, prompt, room)
context = max(map(len, prompts)) + max_response_tokens
check_folder(out_dir)

device = model_utils.setup_distributed()
world_size = dist.get_world_size()

# ---- questions with both outcomes, sampled once and kept -----------------------------------------

as_read = [*json.loads(json.dumps(config)).items()]  # a file has lists for tuples
asked = checksum_asked(problems, prompts, reward)
files = {file.name: file.stat().st_mtime for file in Path(model).glob("*.*")}  # of a folder
# the settings above `variants`, and those above `out_dir`
of_groups, of_questions = (
    dict(as_read[:[*config].index(k)], files=files, asked=asked) for k in ("variants", "out_dir"))
groups = kept_rows(f"{out_dir}/groups.jsonl", of_groups) or []
done = kept_rows(f"{out_dir}/questions.jsonl", of_questions) or []
engine = None
if not groups:
    done = []
    engine = build_engine(model, context, seed, "auto", gpu_memory_utilization)
    sampling = settings_for(sample_batch, config)
    sampling["max_rounds"] = min(max_rounds, len(problems) / questions)  # no question twice
    kept, sampled, *_ = sample_batch(
        engine, tokenizer, problems, prompts, 0, prompts_per_step=questions, **sampling)
    sleep_engine(engine)
    print0(f"{len(kept)} of {len(sampled)} questions have both outcomes; "
           f"{np.mean([g.reward for g in sampled]):.1%} of their responses are correct")
    if not kept:
        die(f"dataset: no question of {dataset} has right and wrong responses; more max_rounds?")
    groups = [g.row | {"texts": g.texts, "prompt": g.prompt.tolist(), "rewards": g.reward.tolist(),
                       "responses": [r.tolist() for r in g.responses]} for g in kept]
    if is_rank0():
        write_jsonl(f"{out_dir}/groups.jsonl", [of_groups, *groups])

# ---- one update a question and variant, in float32: bfloat16 rounds small changes away -----------

policy = model_utils.load_policy(model, torch.float32, device, activation_checkpointing).train()
theta = copy.deepcopy(policy.state_dict())
head = policy.model.get_output_embeddings().weight.detach()  # (V, d)
of_variant = settings_for(advantages.token_advantages, config)


@torch.no_grad()
def ask(batches):
    """What the policy says of n response tokens: logp (n,), entropy (n,), h (n, d), lse (n,)."""
    outs = [policy(batch, temperature) for batch in batches]
    return [torch.cat(x) for x in zip(*outs)]


def one_update(variant, group, old, unit):
    """What one update does to the log-likelihood of every response, (G,); theta is put back."""
    optim = model_utils.make_optimizer(policy, learning_rate)
    unit.set_old(old.logp, advantages.token_advantages(variant, group, old, **of_variant))
    for batch in unit.batches:
        losses.policy_loss(policy(batch, temperature)[0], batch).backward()
    model_utils.optimizer_step(policy, optim, grad_clip)
    logp, *_ = ask(unit.batches)
    policy.load_state_dict(theta)
    change = (logp - old.logp).double()
    return np.array([x.sum().item() for x in change.split(group.lengths)])


def measure(index):
    """The row of one question: Delta by variant, and the scores of its tokens."""
    row = groups[index]
    responses = [np.array(tokens) for tokens in row["responses"]]
    not_kept = [0.0 * r for r in responses]
    group = Group(row, np.array(row["prompt"]), responses, not_kept, row["texts"],
                  np.array(row["rewards"]), seed=hash((seed, index)))
    losses.set_weights([group], loss_norm, max_response_tokens)
    [unit] = model_utils.pack_units([group], tokens_per_micro_batch, device)
    old = Old(*ask(unit.batches), head, temperature)
    lengths, right = group.lengths, group.correct  # (G,)
    row = {"question": index, "problem": row["problem"], "p": right.mean()}
    for variant in variants:
        change = one_update(variant, group, old, unit)
        row[f"delta_{variant}"] = change[right].mean()
        row[f"incorrect_{variant}"] = change[~right].mean()

    tokens, correct = np.concatenate(group.responses), np.repeat(right, lengths)  # (n,)
    s = influence(old, tokens, correct, nthr_vocab)
    s_mean = influence(old, tokens, correct / np.repeat(lengths, lengths), nthr_vocab)
    exact = influence(old, tokens, correct, "full")
    negative = influence(old, tokens, ~correct, "full")
    tau = threshold(s, group, nthr_beta)
    wrong = torch.from_numpy(~correct).to(device)
    selected = wrong & (s > tau)
    of_tokens = {"s": s, "thr": torch.where(wrong, -s_mean, s_mean), "entropy": old.entropy,
                 "surprisal": -old.logp, "selected_tokens": selected}
    for key, x in of_tokens.items():
        row[key] = [part.tolist() for part in x.split(lengths)]
    return row | {"correct": right.tolist(), "selected": (selected.sum() / wrong.sum()).item(),
                  "gwhes": gwhes(exact, negative, group).nanmean().item(), "tau": tau.item()}


for first in trange(len(done), len(groups), world_size, desc="lld", disable=not is_rank0()):
    some = range(len(groups))[first:first + world_size]  # a question for each rank
    done += share_out(lambda share: map(measure, share), some)
    if is_rank0():
        write_jsonl(f"{out_dir}/questions.jsonl", [of_questions, *done])

# ---- summary and pictures ------------------------------------------------------------------------

columns = pd.DataFrame(done).select_dtypes(float)


def summarize():
    """{what: [mean over questions, and its 95% bootstrap interval]}."""
    falls = columns.filter(regex="^(tau|delta_)") < 0
    figures = {**columns.drop(columns="tau"), **falls.add_suffix(" < 0, share")}
    controls = {"random", "spare_entropy", "spare_logp"}
    for better, worse in itertools.permutations(variants, 2):
        if worse == "grpo" or better == "nthr" and worse in controls:
            gain = columns[f"delta_{better}"] - columns[f"delta_{worse}"]
            figures[f"{better} > {worse}, share"] = gain > 0
            figures[f"{better} > {worse}, mean difference"] = gain
    for k in (10, 15):
        if k <= len(done):
            name = f"{k} of {len(done)} of smallest delta_grpo, share among largest gwhes"
            smallest = columns["delta_grpo"].nsmallest(k).index
            figures[name] = smallest.isin(columns["gwhes"].nlargest(k).index)
    return {name: bootstrap([x], seed) for name, x in figures.items()}


def picture():
    """Delta of every variant: sorted, by success rate, by GWHES; the mean of those that share x."""
    fig, axes = subplots(3)
    for ax, (xlabel, x) in zip(axes, {
            "questions, sorted for each variant (Figs. 1, 4)": None,
            "success rate p of the question": columns["p"],
            "GWHES (eq. 5, Table 1), mean over correct responses": columns["gwhes"]}.items()):
        for variant in variants:
            y = columns[f"delta_{variant}"]
            seaborn.lineplot(x=y.argsort().argsort() if x is None else x, y=y, ax=ax, marker="o",
                             linestyle="", errorbar=None, label=variant)
        ax.axhline(0, color="black")
        ax.set(xlabel=xlabel, ylabel=r"$\Delta(x)$, nats")
    save_figure(fig, f"{out_dir}/delta.png")


def page():
    """Write tokens.html, the questions of smallest Delta, to be coloured by token (Fig. 3)."""
    rows = []
    for i in columns["delta_grpo"].nsmallest(8).index:
        tokens = [tokenizer.batch_decode([*zip(ids)]) for ids in groups[i]["responses"]]
        rows.append(done[i] | {"prompt": tokenizer.decode(groups[i]["prompt"]), "tokens": tokens})
    write_page("lld.html", f"{out_dir}/tokens.html", rows)


if is_rank0():
    summary = summarize()
    rows = [[f"{len(done)} questions, AdamW, {learning_rate=:g}", "mean", "95% interval"]]
    for name, (mean, low, high) in sorted(summary.items()):
        rows.append([name, f"{mean:.4f}", f"{low:.4f} to {high:.4f}"])
    text = table(rows)
    write_whole(f"{out_dir}/summary.json", json.dumps(summary, indent=1))
    write_whole(f"{out_dir}/summary.md", text)
    page()
    picture()
    print0(f"{text}\nwrote {out_dir}/: summary.md, tokens.html, delta.png and more")
dist.barrier()
if engine:
    sync_weights(engine, policy.model)  # awake: its shutdown would unmap again what sleep unmapped
del engine  # last: its shutdown ends the process group
