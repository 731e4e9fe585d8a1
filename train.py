"""GRPO and its variants, from prompts to synced weights, in one file that reads top to bottom.

    python train.py config/quickstart.py                            one rank: a GPU, or a CPU
    torchrun --nproc_per_node=4 train.py config/nthr_math.py        four GPUs (or, small, CPU processes)
    python train.py config/quickstart.py --resume                    from the newest whole checkpoint

A step: sample groups of responses through vLLM, grade them, keep the groups with both outcomes, take one or more updates
on them, push the weights to vLLM. Settings are the globals below; config files and flags override them (configurator.py).
"""
import contextlib
import importlib.util
import json
import math
import os
import resource
import time
from functools import partial

from configurator import check, check_folder, check_tp, configure, die, is_rank0, print0

# model and data
model = "models/SmolLM2-135M-Instruct"  # Hugging Face folder or hub id
dataset = "arithmetic"        # a set's name (data.SETS) or a JSON Lines file with `problem` and `answer`
eval_dataset = None           # the same for evaluation; None: the set's own test split, or none if it has none
data_dir = None               # folder of JSON Lines files, where names are looked for before the Hugging Face hub
eval_problems = 128           # problems an evaluation uses at most, the first ones
system_prompt = None          # str; None: the data set's own (a file: "Please reason step by step, ...\boxed{}.")
few_shot = None               # ((question, answer), ...) as earlier chat turns; None: the data set's own
out_dir = "out/run"           # metrics.jsonl, samples.jsonl, curves.png, step_*/ go here
seed = 0                      # of data order, sampling and everything else
resume = False                # go on from the newest whole checkpoint in out_dir
# rollout
group_size = 8                # responses a prompt (G)
temperature = 1.0             # of sampling, and of the log-probabilities trained on
max_response_tokens = 512     # tokens; a response cut off here is incorrect
prompts_per_step = 32         # prompts (groups) trained on in a step, all ranks together
dynamic_sampling = True       # drop groups that are all correct or all incorrect and sample more
oversample = 1.0              # prompts in work at once / prompts still missing; inf: as many as fill the engines
streaming = True              # new prompts are issued as others finish; False: in rounds, when all have
max_rounds = 8                # prompts sampled a step at most / prompts_per_step; then train on what there is
rollout_dtype = "auto"        # of vLLM; "auto": bfloat16 on CUDA, float32 on a CPU
gpu_memory_utilization = None  # share of each GPU that vLLM takes (CUDA); None: what the trainer leaves (estimate_memory)
max_num_seqs = None           # sequences a vLLM engine runs at once; None: vLLM's own choice (H200: 1024, CPU: 256)
tp = 1                        # tensor parallel: neighbouring ranks that share an engine; 1: an engine a rank
sleep_level = 1               # while training, vLLM's weights: 1 to host memory, 2 dropped, 0 stay on the GPU (CUDA)
# variant and loss
variant = "grpo"              # "grpo", "pos_only", "random", "nthr" or "dagrpo": advantages.token_advantages
nthr_beta = 1.0               # NTHR and Random: tau = nthr_beta x the lowest mean score of a correct response; -inf: all
nthr_eta = None               # what NTHR leaves of a selected token's advantage: None is the paper's "2|0.5-p|"; "p", "1-p",
                              # or a number; p is the group's success rate
nthr_vocab = "response"       # scores over the tokens of the group's responses, or "full": over the whole vocabulary
advantage_norm = "std"        # (r - mean) / std, or "mean": r - mean (Dr.GRPO)
loss_norm = "group"           # "group" (eq. 1), "token" (DAPO) or "constant" (Dr.GRPO): advantages.token_weights
pos_weight = 1.0              # times the advantages of correct responses
neg_weight = 1.0              # times those of incorrect ones
clip_low = 0.2                # the ratio is clipped to [1 - clip_low, 1 + clip_high]
clip_high = 0.2               # 0.28: clip-higher (DAPO)
old_logp = "trainer"          # pi_old of the ratio: "trainer", from a pass of its own where the training pass will not do,
                              # or "rollout", vLLM's own figures
tis_cap = 0.0                 # times pi_old / pi_rollout, cut at this (2 to 3), against their mismatch; 0: not
kl_coef = 0.0                 # times KL to the starting model; 0: no reference model is loaded (the NTHR paper: 1e-4)
reference = "resident"        # that model: on every GPU, "offload": in host memory between its passes, "shard": over the ranks
# DaGRPO: a judge, and demonstrations as anchors (which any variant can have)
demos = None                  # JSON Lines file with `problem` and `solution`; None: the data set's own solutions
judge = "rubric"              # of variant dagrpo: "rubric", "self" (the engine) or a server, "http://host:port/v1": judge.py
judge_model = None            # of a server; None: the first it lists
judge_tokens = 512            # a reply has at most
judge_retries = 2             # times that a reply without a score, or none, is asked for again
judge_timeout = 60.0          # seconds a server may take for a reply, its errors and our trying again included
judge_concurrency = 32        # requests to a server at once, per rank
delta = 3.0                   # points (of 1 to 10) that tell a response from the hardest one of the other sign; else masked
anchors = 0                   # demonstrations in a group, 0 or 1
anchor_mode = "replace"       # "replace" one of the group_size rollouts, or "add" to them
anchor_hard_only = False      # only in groups without a correct rollout
anchor_loss = "luffy"         # of their tokens: "luffy" (shaped by pi / (pi + 0.1)) or "logp" (eq. 13): advantages.anchor_loss
# optimization
max_steps = 100               # steps in all, those before a resume included
prompts_per_update = 32       # prompts a gradient update uses, all ranks; prompts_per_step / this = updates a step
tokens_per_micro_batch = 8192  # packed tokens (prompts and responses) in one forward pass of one rank
share_prompts = True          # compute a group's prompt, and what all prompts begin with, once a micro-batch
learning_rate = 1e-6          # of AdamW, constant after warm-up
warmup_steps = 0              # steps over which it rises linearly
decay_steps = 0               # steps over which it falls linearly to 0, counted from the first; 0: it does not
weight_decay = 0.0
adam_betas = (0.9, 0.999)
grad_clip = 1.0               # largest global gradient norm; 0: no clipping
parallel = "ddp"              # over ranks: "ddp" (a copy each) or "fsdp" (FSDP2, sharded)
param_dtype = "float32"       # of parameters, gradients and AdamW's moments; "bfloat16": half the memory, but a weight w does
                              # not move by steps under w / 512: learning rates of 1e-6 change hardly anything
compute_dtype = "auto"        # of the trainer's matrix products; "auto": bfloat16 on CUDA, float32 on a CPU
activation_checkpointing = False  # compute activations again in the backward pass
compile = False               # torch.compile the layers (CUDA)
# watching and saving
eval_every = 10               # steps; greedy accuracy on the evaluation problems, also at step 0 and the last; 0: never
ckpt_every = 0                # steps between checkpoints; 0: before every evaluation. There is always one at the end
keep_ckpts = 2                # newest checkpoints kept
samples_per_step = 16         # responses a step written to samples.jsonl
wandb_project = None          # log to Weights & Biases under this project
profile = False               # trace the second and third step, rollouts included (so: short ones): out_dir/trace.json.gz, and
                              # their ten most expensive operations, printed

config = configure(globals())

# ---------------------------------------------------------------------------------------------------------------------
# refuse bad input before anything large is loaded

from rollout import (accuracy, build_engine, generate_all_ranks, mixed, sample_batch, sleep_engine,
                     sync_weights)  # before torch: it sets its threads
from data import (check_lengths, drop_evaluated, encode_prompts, end_token, load_demos, load_problems, load_tokenizer, splits,
                  verify_demos)
from judge import ask_engine, ask_server, judge_all_ranks, judge_prompt, open_server, read_cache
from runs import newest_checkpoint, open_log, open_run, plot_curves, sample_rows, step_line, write_profile

world_size = int(os.environ.get("WORLD_SIZE", "1"))
DTYPES = ("auto", "float32", "bfloat16")
check(config, dict(
    variant=("grpo", "pos_only", "random", "nthr", "dagrpo"), nthr_eta=(None, "2|0.5-p|", "p", "1-p", float),
    nthr_vocab=("response", "full"), advantage_norm=("std", "mean"), loss_norm=("group", "token", "constant"),
    old_logp=("trainer", "rollout"), reference=("resident", "offload", "shard"), parallel=("ddp", "fsdp"),
    compute_dtype=DTYPES, rollout_dtype=DTYPES, param_dtype=DTYPES[1:], sleep_level=(0, 1, 2), anchors=(0, 1),
    anchor_mode=("replace", "add"), anchor_loss=("luffy", "logp")),
    above_zero=("prompts_per_step", "prompts_per_update", "max_response_tokens", "max_steps", "temperature",
                "tokens_per_micro_batch", "learning_rate", "keep_ckpts", "eval_problems", "max_rounds",
                "judge_tokens", "judge_timeout", "judge_concurrency", "tp"),
    not_negative=("eval_every", "ckpt_every", "warmup_steps", "decay_steps", "kl_coef", "clip_low", "clip_high", "grad_clip",
                  "weight_decay", "samples_per_step", "seed", "judge_retries", "tis_cap"),
    whole=("max_num_seqs",), infinite=("nthr_beta", "oversample", "clip_high", "tis_cap", "grad_clip", "judge_timeout"),
    text=("model", "dataset", "out_dir"),
    text_or_none=("eval_dataset", "data_dir", "system_prompt", "demos", "judge_model", "wandb_project"))
check_tp(tp)
if nthr_beta == math.inf:
    die("nthr_beta: inf selects nothing; -inf all")
if group_size < 2:
    die(f"group_size: {group_size} responses have no group mean to be compared with; at least 2")
if oversample < 1:
    die(f"oversample: {oversample} is too small")
served = str(judge).startswith(("http://", "https://"))
if not served and judge not in ("rubric", "self"):
    die(f"judge: {judge!r} is none of rubric, self and an address, http://host:port/v1")
if not 0 < delta <= 9:
    die(f"delta: {delta} is not in (0, 9], the differences of scores from 1 to 10")
if tis_cap and old_logp == "rollout":
    die(f"tis_cap: {tis_cap} has nothing to correct with old_logp=rollout: pi_old is pi_rollout")
if tp > 1 and judge == "self" and variant == "dagrpo":
    die("tp: judge=self asks an engine a rank; use 1, or another judge")
if gpu_memory_utilization is not None and not (isinstance(gpu_memory_utilization, float) and 0 < gpu_memory_utilization < 1):
    die(f"gpu_memory_utilization: {gpu_memory_utilization!r} is not between 0 and 1")
if prompts_per_step % prompts_per_update:
    die(f"prompts_per_update: {prompts_per_update} does not divide prompts_per_step={prompts_per_step}")
if wandb_project and not getattr(importlib.util.find_spec("wandb"), "origin", None):  # wandb's own folder of runs is no package
    die("wandb_project: the package wandb is not installed")
start, start_state = None, dict(step=0, position=0)
if resume:
    found = newest_checkpoint(out_dir)
    if found is None:
        die(f"resume: no whole checkpoint in {out_dir}; on several machines it has to be where all of them see it")
    start, start_state = found
    with open(os.path.join(start, "run_config.json")) as f:
        before = json.load(f)
    now = json.loads(json.dumps(config))  # tuples are lists there
    if changed := [f"{k} {before.get(k)!r} -> {v!r}" for k, v in now.items() if before.get(k) != v and k != "resume"]:
        print0("note: resumed with other settings: " + ", ".join(changed))
if profile and max_steps < start_state["step"] + 3:
    die(f"profile: traces the second and third step; max_steps={max_steps} leaves {max_steps - start_state['step']}")
if eval_dataset is None and "test" in splits(dataset):
    eval_dataset = dataset
train_problems = load_problems(dataset, "train", data_dir=data_dir)
test_problems = load_problems(eval_dataset, "test", "eval_dataset", data_dir)[:eval_problems] if eval_dataset else []
train_problems, dropped = drop_evaluated(train_problems, dataset, data_dir, test_problems)
if dropped:
    print0(f"{dataset}: {dropped} problems are in an evaluation set too and were dropped; {len(train_problems)} are left")
if not train_problems:
    die(f"dataset: all problems of {dataset} are in an evaluation set")
judged = variant == "dagrpo"
demonstrations = load_demos(train_problems, dataset, demos) if judged or anchors else None
if judged and served and is_rank0():
    judge_model = open_server(judge, judge_model, judge_timeout)
tokenizer, hf_config = load_tokenizer(model)
prompts = encode_prompts(tokenizer, train_problems, dataset, system_prompt, few_shot)
test_prompts = encode_prompts(tokenizer, test_problems, dataset, system_prompt, few_shot)  # asked as in training
context = max(check_lengths(p, max_response_tokens, hf_config.max_position_embeddings, name)
              for p, name in ((prompts, f"dataset {dataset}"), (test_prompts, f"eval_dataset {eval_dataset}")) if p)
if hf_config.num_attention_heads % tp:
    die(f"tp: {tp} does not divide the model's {hf_config.num_attention_heads} attention heads")
if judged and judge == "self":  # as long as its longest question, if the model's context is
    problem, solution = max(((row["problem"], d) for row, ds in zip(train_problems, demonstrations) for d in ds),
                            key=lambda pair: sum(map(len, pair)))
    question, _ = judge_prompt(dict(problem=problem, solution=solution, answer=""), "")
    context = max(context, min(hf_config.max_position_embeddings,
                               len(tokenizer(question)["input_ids"]) + 64 + max_response_tokens + judge_tokens))
check_folder(out_dir)

import numpy as np
import torch  # after the checks: it takes seconds to import
import torch.distributed as dist
from tqdm import tqdm

from advantages import (check_rewards, dagrpo_margins, dagrpo_masks, group_advantages, group_tokens, influence, kl_k3,
                        nthr_eta as eta_of, nthr_select, policy_loss, random_like, sum_by, token_advantages, token_weights,
                        truncated_importance)
from model_utils import (balance, check_model, estimate_memory, fingerprint, full, load_optimizer, load_policy, make_optimizer, mfu,
                         optimizer_step, pack_all, parallelize, plan_micro_batches, prefetch, save_checkpoint, setup_distributed,
                         splits_groups, vllm_share)

check_model(model, hf_config)

# ---------------------------------------------------------------------------------------------------------------------
# set up: process group, run folder, engine (first: it measures free memory), policy, optimizer

device = setup_distributed()
rank = dist.get_rank()
scored = variant in ("nthr", "random")  # variants that select tokens by NTHR's scores
eta = "2|0.5-p|" if nthr_eta is None else nthr_eta
on_cuda = device.type == "cuda"
if compile and not on_cuda:
    die("compile: needs CUDA; on a CPU vLLM is run without a compiler, and turns torch's off")
torch.manual_seed(seed)
seen = [None] * world_size  # machines differ: one could not read an evaluation set from the hub, or has an older checkpoint
dist.all_gather_object(seen, (len(train_problems), start_state["step"]))
if len(set(seen)) > 1:
    die(f"dataset, resume: the ranks have different numbers of training problems, or steps to resume from: {seen}")
end = None
if demonstrations is not None:
    end = end_token(tokenizer, model)
    verify_demos(tokenizer, train_problems, prompts, demonstrations, max_response_tokens, end)
    if anchors and not any(row["anchor"] for row in train_problems):
        die(f"anchors: all demonstrations are longer than max_response_tokens={max_response_tokens}")
if is_rank0():
    open_run(out_dir, config, start and start_state["step"])
dist.barrier()
compute = getattr(torch, ("bfloat16" if on_cuda else "float32") if compute_dtype == "auto" else compute_dtype)
masters = getattr(torch, param_dtype)
if on_cuda and gpu_memory_utilization is None:
    gpu_memory_utilization = vllm_share(device, sleep_level, estimate_memory(
        hf_config, world_size, parallel, masters.itemsize, compute.itemsize, reference if kl_coef else None,
        tokens_per_micro_batch, activation_checkpointing))
engine = build_engine(start or model, context, seed, rollout_dtype, gpu_memory_utilization, max_num_seqs, tp)
vllm_bytes = torch.cuda.memory_allocated() if on_cuda and sleep_level else 0  # which torch counts while vLLM sleeps, too
if compute == torch.bfloat16:
    torch.set_float32_matmul_precision("high")  # TF32 for NTHR's scores; after the engine, which sets it for itself
if masters == torch.bfloat16 and learning_rate < 1e-5:
    print0(f"warning: param_dtype=bfloat16 rounds most updates at learning_rate={learning_rate:g} away")
policy = load_policy(start or model, compute, "cpu" if parallel == "fsdp" else device, activation_checkpointing, masters, compile)
net = parallelize(policy, parallel, device)
net.train()
ref, ref_home = None, []  # the parameters of an offloaded one, in host memory
if kl_coef:
    ref = load_policy(model, compute, device if reference == "resident" else "cpu", param_dtype=compute).requires_grad_(False)
    if reference == "shard":
        ref = parallelize(ref, "fsdp", device, frozen=True)
    if reference == "offload":
        ref_home = [p.data.pin_memory() if on_cuda else p.data for p in ref.parameters()]
        for buffer in ref.buffers():
            buffer.data = buffer.to(device)
if judged:
    scores_known = read_cache(out_dir)  # of this run before it was resumed
    names = [judge_model]
    dist.broadcast_object_list(names)  # rank 0 has asked the server
    ask = partial(ask_server, url=judge, model=names[0], max_tokens=judge_tokens, concurrency=judge_concurrency,
                  timeout=judge_timeout) if served else partial(
        ask_engine, engine=engine, tokenizer=tokenizer, max_tokens=judge_tokens)
optimizer = make_optimizer(policy, "adamw", learning_rate, adam_betas, weight_decay)
if start:
    load_optimizer(start, optimizer)
    print0(f"resumed from {start}")
log = open_log(out_dir, config, start_state["step"], wandb_project) if is_rank0() else None


# what is summed over a step's tokens, groups or responses, on all ranks
TALLY = ("tokens", "anchor_tokens", "packed", "loss", "entropy", "clipped", "kl", "kl_old", "anchor_logp",  # tokens computed
         "compared", "gap", "ratio", "ratio_cut",                                        # tokens whose pi_old is the trainer's
         "wrong", "selected", "s_selected", "s_others", "scored_groups", "tau_negative", "tau", "eta",  # NTHR: tokens, groups
         "correct", "moved", "fell")                                                     # displacement: correct responses


def spare_tokens(update, batch, h, lse, head, picker, tally):
    """NTHR or Random for the groups that are whole with this micro-batch: scores from the old policy's states of its
    tokens, selection, and update["token_advantages"] of these groups. h (n, d), lse (n,): as Policy.forward gives them."""
    done, kept = update["scored"]
    n = batch.span.stop - batch.span.start
    states = (h[:n], batch.targets[:n], lse[:n])
    if kept is not None:
        states = tuple(torch.cat(pair) for pair in zip(kept, states))
    tokens, responses = update["first_token"], update["first_response"]
    whole = done
    while whole + 1 < len(tokens) and tokens[whole + 1] <= batch.span.stop:
        whole += 1
    base = tokens[done]  # flat index of the first token in states
    update["scored"] = [whole, tuple(x[tokens[whole] - base:] for x in states)]
    if whole == done:
        return
    r, t = slice(responses[done], responses[whole]), slice(tokens[done], tokens[whole])
    rewards, response, group = (update["rewards"][r], update["response"][t] - responses[done], update["group"][r] - done)
    s = torch.cat([influence(*(x[tokens[g] - base:tokens[g + 1] - base] for x in states), head, source, temperature,
                             rows if nthr_vocab == "response" else "full")
                   for g, (source, rows) in zip(range(done, whole), update["group_tokens"][done:whole])])  # (these groups' tokens,)
    selected, tau = nthr_select(s, rewards, response, group, nthr_beta, whole - done)
    picked = random_like(selected, response, picker) if variant == "random" else selected
    update["token_advantages"][t] = token_advantages(variant, update["advantages"][r], rewards, response, group, picked, eta)
    wrong = rewards[response] == 0
    real = tau.isfinite()
    etas = eta_of(eta, rewards, group)
    for key, x in dict(wrong=wrong, selected=picked, s_selected=s * picked, s_others=s * (wrong & ~picked), scored_groups=real,
                       tau_negative=(tau < 0) & real, tau=tau.where(real, 0),
                       eta=(etas / sum_by(group, torch.ones_like(etas), len(group))[group]).where(real[group], 0)).items():
        tally[key] += x.sum().double()


def evaluate(step):
    """Greedy accuracy on the evaluation problems, logged and printed."""
    began = time.time()
    groups = generate_all_ranks(engine, tokenizer, test_problems, test_prompts, n=1, temperature=0.0, tensor_parallel=tp,
                                max_response_tokens=max_response_tokens)
    row = {"step": step, "eval/accuracy": accuracy(groups), "eval/problems": len(groups),
           "eval/mean_length": float(np.mean([len(r) for g in groups for r in g["responses"]])),
           "eval/truncated": float(np.mean([g["truncated"] for g in groups])), "time/eval": time.time() - began}
    if is_rank0():
        log(row)
        tqdm.write(f"step {step}: greedy accuracy {row['eval/accuracy']:.1%} on {len(groups)} held-out problems")


# ---------------------------------------------------------------------------------------------------------------------
# the loop

step, position = start_state["step"], start_state["position"]
profiler = torch.profiler.profile(acc_events=True) if profile and is_rank0() else None
bar = tqdm(total=max_steps, initial=step, desc="train", unit="step", disable=not is_rank0())
saved = step if start else None  # the step of the newest checkpoint
while True:
    due = step == max_steps or bool(eval_every) and step % eval_every == 0
    if step > 0 and step != saved and (step == max_steps or (step % ckpt_every == 0 if ckpt_every else due)):
        save_checkpoint(out_dir, step, policy, tokenizer, optimizer, dict(step=step, position=position), config,
                        keep_ckpts)
        saved = step
    if due and test_problems:
        evaluate(step)
    if step >= max_steps:
        break
    step += 1
    if profiler and step == start_state["step"] + 2:
        profiler.start()
    clock = [time.time()]
    seconds = {}

    def lap(phase):
        """Seconds since the last lap go to time/`phase`; waits for the GPU, so it stands between phases only."""
        if on_cuda:
            torch.cuda.synchronize()
        clock.append(time.time())
        seconds[f"time/{phase}"] = seconds.get(f"time/{phase}", 0.0) + clock[-1] - clock[-2]

    # rollout: every rank samples its share and then holds all groups of the step
    torch.manual_seed(hash((seed, step, rank // tp)) % 2**63)  # of vLLM's sampling: a resumed run draws the same
    groups, sampled, position, wasted = sample_batch(
        engine, tokenizer, train_problems, prompts, position, seed, prompts_per_step=prompts_per_step,
        oversample=oversample, max_prompts=max_rounds * prompts_per_step, keep_all=not dynamic_sampling, n=group_size,
        streaming=streaming, tensor_parallel=tp, seeded=on_cuda,
        anchors=anchor_mode if anchors else "none", hard_only=anchor_hard_only, end=end,
        temperature=temperature, max_response_tokens=max_response_tokens)
    lap("rollout")
    if judged:  # while the engine is awake and has nothing else to do
        for g in groups:
            g["scores"] = np.full(len(g["rewards"]), np.nan, dtype=np.float32)
        name = names[0] if served else f"self {fingerprint(policy.model)}" if judge == "self" else ""
        judge_counts = judge_all_ranks(list(filter(mixed, groups)), judge, ask, name, scores_known,  # others need no scores
                                       os.path.join(out_dir, f"judge_{rank}.jsonl"), judge_retries)
    sleep_engine(engine, sleep_level)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    lap("judge" if judged else "rollout")

    # advantages of all responses of the step, (B,), on the host: every rank holds every group
    rewards = torch.tensor([r for g in groups for r in g["rewards"]])
    check_rewards(rewards)
    sizes = [len(g["responses"]) for g in groups]
    group = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    advantages = group_advantages(rewards, group, advantage_norm)
    figures = dict(advantages=advantages * torch.where(rewards == 1, pos_weight, neg_weight))
    if judged:
        scores = torch.tensor([s for g in groups for s in g["scores"]])  # nan: not judged
        figures |= dict(margins=dagrpo_margins(scores, advantages, group), lam=dagrpo_masks(scores, advantages, group, delta))
    for key, values in figures.items():
        for g, part in zip(groups, values.split(sizes)):
            g[key] = part.numpy()  # (n,)

    # updates: mini-batches of groups, each dealt to the ranks; this rank's share is flat tokens in micro-batches
    updates = []
    for first in range(0, len(groups), prompts_per_update):
        chunk = groups[first:first + prompts_per_update]
        # all right or all wrong: they count in the loss, but without KL have no gradient, and nothing is computed for them
        live = [g for g in chunk if kl_coef or mixed(g)]
        shares = [[live[i] for i in share] for share in balance(live, world_size)]
        plans = [plan_micro_batches(share, tokens_per_micro_batch, share_prompts) for share in shares]
        mine = shares[rank]

        def of_mine(key, dtype=torch.float32):
            return torch.tensor([x for g in mine for x in g[key]], dtype=dtype, device=device)     # (B,) of this rank

        sizes = [len(g["responses"]) for g in mine]
        rewards, advantages = of_mine("rewards"), of_mine("advantages")
        group = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64)).to(device)         # (B,)
        response = torch.repeat_interleave(torch.tensor([len(r) for g in mine for r in g["responses"]],
                                                        dtype=torch.int64)).to(device)             # (N,)
        rollout_logp = np.concatenate([l for g in mine for l in g["logprobs"]] or [np.empty(0, "f4")])
        update = dict(
            groups=mine, rewards=rewards, group=group, response=response, advantages=advantages, old_logp=None,
            is_anchor=of_mine("anchor", torch.bool),
            first_response=np.cumsum([0] + sizes).tolist(),                                        # (M+1,), of each group
            first_token=np.cumsum([0] + [sum(len(r) for r in g["responses"]) for g in mine]).tolist(),
            batches=pack_all(mine, plans[rank], at_least=max(1, *map(len, plans)), share_prompts=share_prompts),  # on the host
            group_tokens=[group_tokens(g["responses"], g["rewards"], device) for g in mine] if scored else None,
            rollout_logp=torch.from_numpy(rollout_logp).to(device),                                # (N,)
            moved=torch.zeros_like(rewards),  # (B,) log-likelihood since the step began, when its update comes
            token_weights=token_weights(response, group, len(chunk), loss_norm,                    # (N,)
                                        tokens_in_update=sum(len(r) for g in chunk for r in g["responses"]),
                                        max_tokens=max_response_tokens),
            token_advantages=token_advantages("grpo" if scored else variant, advantages, rewards, response, group,
                                              lam=of_mine("lam") if judged else None))
        # the first update meets the policy that sampled: its old log-probabilities, and NTHR's states if no group is cut
        # in two, are those of its own training forward. Later updates need a forward pass before the first
        update["old_known"] = not updates or scored or old_logp == "trainer"  # the trainer's pi_old will be there
        update["old_pass"] = bool(updates) and update["old_known"] or scored and any(map(splits_groups, plans))
        update["scored"] = [0, None]  # groups scored so far; states of a group whose other half is in the next batch
        updates.append(update)
    picker = torch.Generator().manual_seed(hash((seed, step, rank)) % 2**63)  # of Random's tokens
    tally = dict.fromkeys(TALLY, 0)  # of this rank
    head = full(policy.model.get_output_embeddings().weight.detach()).to(compute) if scored else None  # (V, d)

    for update in updates:
        if update["old_pass"]:
            with torch.no_grad():
                outs = []
                for batch in prefetch(update["batches"], device):
                    logp, _, *states = net(batch, temperature, states=scored)
                    outs.append(logp[:batch.span.stop - batch.span.start])
                    if scored:
                        spare_tokens(update, batch, *states, head, picker, tally)
                update["old_logp"] = torch.cat(outs)                                               # (N,)
    lap("old_logp")
    if ref is not None:
        for p, home in zip(ref.parameters(), ref_home):
            p.data = home.to(device, non_blocking=True)
        with torch.no_grad():
            for update in updates:
                update["ref_logp"] = torch.cat([ref(b, temperature)[0][:b.span.stop - b.span.start]
                                                for b in prefetch(update["batches"], device)])     # (N,)
        for p, home in zip(ref.parameters(), ref_home):
            p.data = home
        lap("ref_logp")

    lr = learning_rate * min(1.0, step / (warmup_steps + 1))
    if decay_steps:
        lr *= max(0.0, 1 - (step - 1) / decay_steps)
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    highest = torch.zeros(2, device=device)  # gap and ratio to vLLM
    grad_norms = []
    for update in updates:
        for i, batch in enumerate(prefetch(update["batches"], device)):
            last = i == len(update["batches"]) - 1
            span, n = batch.span, batch.span.stop - batch.span.start
            # DDP averages gradients once an update, in its last micro-batch; FSDP adds shards up as it goes
            with contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync():
                fresh = scored and not update["old_pass"]
                logp, entropy, *states = net(batch, temperature, states=fresh)
                logp, entropy = logp[:n], entropy[:n]                                              # (n,)
                if fresh:
                    spare_tokens(update, batch, *states, head, picker, tally)
                before = logp.detach() if update["old_logp"] is None else update["old_logp"][span]  # the trainer's pi_old
                sampler = update["rollout_logp"][span]
                old = before if old_logp == "trainer" else sampler
                anchor = update["is_anchor"][update["response"][span]]                             # (n,)
                importance, ratio = truncated_importance(before, sampler, tis_cap or math.inf)
                loss, clipped, kl = policy_loss(
                    logp, old, update["token_advantages"][span], update["token_weights"][span], clip_low, clip_high,
                    kl_coef, update["ref_logp"][span] if ref is not None else None, anchor, anchor_loss,
                    importance if tis_cap else None)
                (loss * world_size).backward()  # gradients are averaged over ranks; the loss is their sum
            with torch.no_grad():
                if update["old_known"]:
                    update["moved"].index_add_(0, update["response"][span], logp - before)
                ours = ~anchor & update["old_known"]  # sampled tokens; the gap needs the trainer's pi_old too
                gap, ratio = (before - sampler).abs().where(ours, 0), ratio.where(ours, 0)
                highest = torch.maximum(highest, torch.stack([gap.max(), ratio.max()]) if n else highest)
                for key, x in dict(loss=loss, entropy=entropy.where(~anchor, 0), clipped=clipped, kl=kl,
                                   kl_old=kl_k3(old, logp).where(~anchor, 0), anchor_logp=logp.where(anchor, 0), compared=ours,
                                   gap=gap, ratio=ratio, ratio_cut=ratio > importance).items():
                    tally[key] += x.sum().double()
        grad_norms.append(optimizer_step(policy, optimizer, grad_clip, keep=hasattr(net, "no_sync")))
        if update is not updates[0] and update["old_known"]:  # what earlier updates did to this one's correct responses
            correct = (update["rewards"] == 1) & ~update["is_anchor"]
            for key, x in dict(correct=correct, moved=update["moved"] * correct, fell=correct & (update["moved"] < 0)).items():
                tally[key] += x.sum().double()
    head = states = None  # vLLM needs the room
    for update in updates:
        update["scored"] = None
    lap("update")

    sync_weights(engine, policy.model, sleep_level)
    lap("sync")
    if profiler and step == start_state["step"] + 3:
        write_profile(profiler, out_dir)
        profiler = None

    # one row of figures, over all ranks
    for u in updates:
        for g in u["groups"]:
            for r, is_anchor in zip(g["responses"], g["anchor"]):
                tally["anchor_tokens" if is_anchor else "tokens"] += len(r)
        tally["packed"] += sum(b.input_ids.numel() for b in u["batches"])
    sums = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in tally.values()])
    dist.all_reduce(sums)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    tally = dict(zip(tally, sums.tolist()))
    seconds["time/step"] = clock[-1] - clock[0]
    kept = sum(len(r) for g in groups for r, a in zip(g["responses"], g["anchor"]) if not a)  # of what counts in the loss
    tokens, compared = max(tally["tokens"], 1), max(tally["compared"], 1)  # of what was computed, as train/ and gap/ figures are
    responses = [len(r) for g in sampled for r, a in zip(g["responses"], g["anchor"]) if not a]
    row = {
        "step": step, "reward/mean": accuracy(groups) if groups else 0.0, "reward/accuracy": accuracy(sampled),
        "rollout/groups_sampled": len(sampled), "rollout/groups_kept": len(groups),
        "rollout/response_tokens": kept, "rollout/tokens_wasted": wasted,
        "rollout/tokens_dropped": sum(responses) - kept, "train/tokens": int(tally["tokens"]),
        "rollout/mean_length": float(np.mean(responses)),
        "rollout/truncated": float(np.mean([cut for g in sampled for cut in g["truncated"][~g["anchor"]]])),
        "train/loss": tally["loss"] / max(len(updates), 1), "train/entropy": tally["entropy"] / tokens,
        "train/grad_norm": float(torch.stack(grad_norms).mean()) if grad_norms else 0.0,
        "train/clip_fraction": tally["clipped"] / tokens, "train/kl": tally["kl"] / tokens, "train/kl_old": tally["kl_old"] / tokens,
        "train/lr": lr, "train/updates": len(updates),
        "gap/mean": tally["gap"] / compared, "gap/max": highest[0].item(), "gap/ratio": tally["ratio"] / compared,
        "gap/ratio_max": highest[1].item(), **seconds,
        "perf/rollout_tok_s": (sum(responses) + wasted) / seconds["time/rollout"],
        "perf/train_tok_s": tally["packed"] / seconds["time/update"],
        "perf/peak_memory_gib": (torch.cuda.max_memory_allocated() - vllm_bytes if on_cuda else
                                 resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30,
    }
    if tis_cap:
        row["gap/ratio_cut"] = tally["ratio_cut"] / compared
    if scored and tally["tokens"]:
        selected, others, scored_groups = tally["selected"], tally["wrong"] - tally["selected"], max(tally["scored_groups"], 1)
        row |= {"nthr/selected": selected / max(tally["wrong"], 1), "nthr/tau_negative": tally["tau_negative"] / scored_groups,
                "nthr/tau": tally["tau"] / scored_groups, "nthr/eta": tally["eta"] / scored_groups,
                "nthr/s_selected": tally["s_selected"] / max(selected, 1), "nthr/s_others": tally["s_others"] / max(others, 1)}
    if judged and groups:
        row |= {f"judge/{key}": judge_counts[key] for key in ("asked", "cached", "without_demo")}  # responses, responses, groups
        row["judge/failed"] = judge_counts["groups_failed"]                                        # groups
        known = [g for g in groups if np.isfinite(g["margins"]).any()]                             # judged ones
        if known:
            a, margin, stays = (np.concatenate([g[key] for g in known]) for key in ("advantages", "margins", "lam"))
            row |= {f"dagrpo/margin_p{q}": float(np.percentile(margin[a != 0], q)) for q in (10, 50, 90)}
            row |= {"dagrpo/lambda_pos": float(stays[a > 0].mean()), "dagrpo/lambda_neg": float(stays[a < 0].mean()),
                    "dagrpo/fully_masked": float(np.mean([not g["lam"].any() for g in known]))}
    if anchors and groups:
        row |= {"anchor/groups": sum(bool(g["anchor"].any()) for g in groups), "anchor/tokens": int(tally["anchor_tokens"]),
                "anchor/hard": float(np.mean([not g["rewards"][~g["anchor"]].any() for g in groups])),
                "anchor/logp": tally["anchor_logp"] / max(tally["anchor_tokens"], 1)}
    if tally["correct"]:  # with several updates a step: what the earlier ones did to correct responses of the later ones
        row |= {"displacement/mean": tally["moved"] / tally["correct"], "displacement/fell": tally["fell"] / tally["correct"]}
    if on_cuda:
        row["perf/mfu"] = mfu(policy.model, tally["packed"] / world_size, seconds["time/update"])
    if is_rank0():
        log(row, sample_rows(step, groups, tokenizer, samples_per_step))
        tqdm.write(step_line(row))
        bar.set_postfix_str(f"accuracy {row['reward/accuracy']:.2f}, {seconds['time/step']:.1f} s/step")
    bar.update()
    if not math.isfinite(row["train/grad_norm"]):  # the weights are lost; the checkpoints are not to be
        bar.close()
        print0(f"error: step {step}: the gradient norm is {row['train/grad_norm']}; nothing of it is saved, the newest checkpoint is "
               + (f"{out_dir}/step_{saved:06d}" if saved else "the model itself"))
        raise SystemExit(1)

bar.close()
if is_rank0():
    plot_curves(out_dir)
    print0(f"wrote {out_dir}/: metrics.jsonl, samples.jsonl, curves.png, step_{step:06d}/")
del engine  # last: its shutdown ends the process group
