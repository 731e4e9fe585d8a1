"""GRPO and its variants, from prompts to synced weights, in one file that reads top to bottom.

    python train.py config/quickstart.py                        one rank: a GPU, or a CPU
    torchrun --nproc_per_node=4 train.py config/nthr_math.py    four GPUs (or, small, CPU processes)
    python train.py config/quickstart.py --resume               from the newest whole checkpoint

Settings are the globals below; config files and flags override them (configurator.py)."""
import re
from functools import partial

import rollout  # before torch, whose threads it sets

import numpy as np
import torch
import torch.distributed as dist

import advantages
import data
import losses
import metrics
import model_utils
import runs
from advantages import Old, response_advantages, token_advantages
from configurator import check, configure, die, is_rank0, print0, settings_for
from judge import judge_all_ranks, open_judge, read_cache
from memory import held_memory, vllm_share
from plot import plot_runs, read_runs

# model and data; dataset, prompt and reward may be functions in a config file: config/countdown.py
model = "models/SmolLM2-135M-Instruct"  # Hugging Face folder or hub id
dataset = "arithmetic"        # a name in config/sets.py, a JSON Lines file: `problem`, `answer`
eval_dataset = None           # likewise; None: the set's own test split, or none if it has none
data_dir = "data"             # where known sets are: bench/get_data.py fetches them
eval_problems = 128           # problems an evaluation uses at most, the first ones
system_prompt = None          # str; None: the data set's own ("Please reason step by step, ...")
prompt = None                 # row -> chat; None: system_prompt, the set's examples, the problem
reward = None                 # (text, row) -> 0 to 1; None: is the last box the answer?
reward_seconds = 2.0          # that it may take for a response
out_dir = "out/run"           # metrics.jsonl, samples.jsonl, curves.png, step_*/ go here
seed = 0                      # of data order, sampling and everything else
resume = False                # go on from the newest whole checkpoint in out_dir
# rollout
group_size = 8                # responses a prompt (G)
temperature = 1.0             # of sampling, and of the log-probabilities trained on
max_response_tokens = 512     # a response cut off here is incorrect
prompts_per_step = 32         # prompts (groups) trained on in a step, all ranks together
dynamic_sampling = True       # drop groups without an advantage (all right or wrong), sample more
oversample = 1.0              # prompts in work at once / prompts missing; inf: fill the engines
max_rounds = 8                # prompts sampled a step at most / prompts_per_step
rollout_dtype = "auto"        # of vLLM; "auto": bfloat16 on CUDA, float32 on a CPU
gpu_memory_utilization = None  # vLLM's share of each GPU; None: what the trainer leaves (memory.py)
max_num_seqs = None           # sequences a vLLM engine runs at once; None: vLLM's own choice
tp = 1                        # tensor parallel: neighbouring ranks that share an engine
# variant and loss
variant = "grpo"              # one of advantages.VARIANTS, see advantages.token_advantages
nthr_beta = 1.0               # tau = nthr_beta x lowest mean score of a correct response; -inf: all
nthr_eta = None               # left of a selected token's advantage; None: 2|0.5-p|; "p", "1-p"
nthr_vocab = "response"       # scores over the tokens of the group, or "full": the whole vocabulary
thr_p = 0.0                   # of thr: 0.1 exploits, -0.1 explores
entropy_share = 0.2           # of entropy_top: share of a group's tokens that keep their advantage
advantage_norm = "std"        # "std", "mean" (Dr.GRPO), "sign" (NSR): group_advantages
loss = "clip"                 # one of losses.CHOICES, see losses.policy_loss
loss_norm = "group"           # "group" (eq. 1), "response", "token", "constant": set_weights
llds = 0.0                    # times LLDS's penalty on likelihood lost; needs several updates
pos_weight = 1.0              # times the advantages of correct responses
neg_weight = 1.0              # times those of incorrect ones
clip_low = 0.2                # ratios are clipped to [1 - clip_low, 1 + clip_high]
clip_high = 0.2               # 0.28: clip-higher (DAPO). With one update a step no ratio is clipped
tis_cap = 0.0                 # times pi_old / pi_rollout, cut at this (2 to 3); 0: not
seq_mask_cap = None           # drops responses whose product of it is over this or under 1/this
max_gap = None                # mean |difference| of vLLM's logp, nats, over which a run stops
kl_coef = 0.0                 # times KL to the starting model; 0: no reference model is loaded
# DaGRPO: a judge, and demonstrations as anchors (which any variant can have)
demos = None                  # a file; None: the set's own; "self": what this run got right before
judge = "rubric"              # of dagrpo: "rubric", "random", or a server's "http://host:port/v1"
judge_model = None            # of a server; None: the first it lists
judge_noise = 0.0             # standard deviation of what is added to its scores, points
delta = None                  # least margin of a response, points; None: 3; "q0.25" masks up to 1/4
anchors = 0                   # demonstrations in a group at most, in place of rollouts
anchor_share = 1.0            # share of the problems that get any, by a hash
anchor_hard_only = False      # only in groups without a correct rollout; always with demos="self"
anchor_loss = "luffy"         # of their tokens: "luffy" or "logp": losses.anchor_losses
# optimization
max_steps = 100               # steps in all, those before a resume included
prompts_per_update = 32       # prompts of a mini-batch, all ranks; divides prompts_per_step
tokens_per_micro_batch = 8192  # packed tokens (prompts and responses) in a forward pass of a rank
learning_rate = 1e-6          # of AdamW, constant after warm-up
warmup_steps = 0              # steps over which it rises linearly
decay_steps = 0               # steps over which it falls linearly to 0; 0: it does not
weight_decay = 0.0
grad_clip = 1.0               # largest global gradient norm; 0: no clipping
max_bad_steps = 3             # in a row, without a finite gradient, before the run ends
lora_rank = 0                 # of adapters in all linear layers but the head; 0: train the weights
parallel = "ddp"              # over ranks: "ddp" (a copy each) or "fsdp" (FSDP2, sharded)
compute_dtype = "auto"        # of matrix products; "auto": bfloat16 on CUDA, float32 on a CPU
activation_checkpointing = False  # compute activations again in the backward pass
# watching and saving
eval_every = 10               # steps; greedy accuracy, from step 0 on; 0: after the last one only
ckpt_every = 0                # steps; 0: before every evaluation. There is always one at the end
keep_ckpts = 2                # newest checkpoints kept
samples_per_step = 4          # groups a step written to samples.jsonl
on_full_disk = "stop"         # or "go on" without what cannot be written

config = configure(globals())

# ---- refuse bad input before anything large is loaded --------------------------------------------

DTYPES = ("auto", "float32", "bfloat16")
check(  # a setting whose default is None takes any value, unless it is named here
    config, advantages.CHOICES | losses.CHOICES | dict(
        delta=(None, float, str), parallel=("ddp", "fsdp"), compute_dtype=DTYPES,
        rollout_dtype=(*DTYPES, "float16"), on_full_disk=("stop", "go on")),
    {"> 0": "prompts_per_step prompts_per_update max_response_tokens max_steps max_rounds delta "
            "tokens_per_micro_batch learning_rate keep_ckpts eval_problems max_num_seqs max_gap "
            "gpu_memory_utilization entropy_share max_bad_steps reward_seconds",
     ">= 0": "eval_every ckpt_every warmup_steps decay_steps kl_coef clip_low clip_high grad_clip "
            "weight_decay samples_per_step tis_cap llds anchors anchor_share lora_rank judge_noise",
     ">= 1": "oversample seq_mask_cap", ">= 2": "group_size", "<= 9": "delta",
     ">= 0.01": "temperature", "<= 1000": "max_rounds", "<= 1000000": "reward_seconds",
     "< 1": "gpu_memory_utilization", "<= 1": "entropy_share anchor_share weight_decay",
     "<= 0.01": "learning_rate", "< inf": "nthr_beta"},
    infinite="nthr_beta oversample clip_high tis_cap grad_clip",
    optional={str: "eval_dataset system_prompt prompt reward demos judge_model",
              int: "max_num_seqs", float: "gpu_memory_utilization max_gap seq_mask_cap"})
if llds and prompts_per_update == prompts_per_step:
    die("llds: is always 0 with one update a step; take a smaller prompts_per_update")
if not re.fullmatch(r"rubric|random|https?://[^@?]+", judge):  # it is printed and saved
    die("judge: neither rubric nor random nor an address, http://host:port/v1, without a key; "
        "that is in JUDGE_API_KEY")
if isinstance(delta, str) and not re.fullmatch(r"q0?\.\d+", delta):
    die(f"delta: {delta!r} is neither points nor a share under 1, q0.25")
if anchors >= group_size or not anchors and (demos == "self" or demos and variant != "dagrpo"):
    die(f"anchors: {anchors} is not less than {group_size=}, or is 0, so that {demos=} is unused")
if prompts_per_step % prompts_per_update:
    die(f"prompts_per_update: {prompts_per_update} does not divide {prompts_per_step=}")
start = runs.newest_checkpoint(out_dir) if resume else None
if resume and start is None:
    die(f"resume: no whole checkpoint in {out_dir}; all machines have to see it")
problems = data.load_problems(dataset, "train", data_dir=data_dir)
if eval_dataset is None and (
        dataset in data.MADE or (dataset, "test") in data.SETS or ".py:" in dataset):
    eval_dataset = dataset
test_problems = data.load_problems(eval_dataset, "test", "eval_dataset", data_dir)[
    :eval_problems] if eval_dataset else []
problems = data.drop_evaluated(problems, dataset, data_dir, test_problems)
judged, from_self = variant == "dagrpo", demos == "self"
config["anchor_hard_only"] |= from_self
tokenizer, hf_config = data.load_tokenizer(model, tp)
model_utils.check_model(model, hf_config)
encode = partial(data.encode_prompts, tokenizer, **settings_for(data.encode_prompts, config),
                 room=hf_config.max_position_embeddings - max_response_tokens)
prompts, test_prompts = encode(problems), encode(test_problems, key="eval_dataset")
context = max(map(len, prompts + test_prompts)) + max_response_tokens
runs.check_folder(out_dir)

# ---- set up: process group, run folder, engine (it measures free memory), policy, optimizer ------

device = model_utils.setup_distributed()
on_cuda = device.type == "cuda"
world_size = dist.get_world_size()
resumed, state = start or (None, {"step": 0, "position": 0})
step, position = state["step"], state["position"]
seen = data.of_ranks((len(problems), step))  # a machine may lack a set, or the last checkpoint
if len(set(seen)) > 1:
    die(f"dataset, resume: the ranks have different numbers of problems, or steps: {seen}")
end = data.end_token(tokenizer, model)
anchor_texts = {}  # {problem: {text: the step that it is of}}
if judged or anchors and not from_self:
    demonstrations = data.load_demos(problems, dataset, None if from_self else demos)
    anchor_texts = data.verify_demos(tokenizer, problems, prompts, demonstrations,
                                     max_response_tokens, end, reward, reward_seconds)
    if anchors and not anchor_texts and not from_self:
        die(f"anchors: all demonstrations are longer than {max_response_tokens=}")
if judged:
    config["judge_model"] = open_judge(judge, judge_model)
if is_rank0():
    with runs.or_say_so(out_dir, "run_config.json", "stop"):
        lock = runs.lock_folder(out_dir)
        runs.open_run(out_dir, config, start)
dist.barrier()
if from_self:
    anchor_texts = data.remember({}, runs.read_rows(out_dir, "right_answers"), anchors)

compute = getattr(torch, compute_dtype.replace("auto", "bfloat16" if on_cuda else "float32"))
if on_cuda and gpu_memory_utilization is None:
    gpu_memory_utilization = vllm_share(device, held_memory(
        hf_config, world_size, parallel, compute.itemsize, kl_coef > 0, lora_rank))
load_from = resumed or model
engine = rollout.build_engine(load_from, context, seed, rollout_dtype, gpu_memory_utilization,
                              max_num_seqs, tp)
vllm_bytes = torch.cuda.memory_allocated()  # 0 on a CPU
if compute == torch.bfloat16:
    torch.set_float32_matmul_precision("high")  # TF32 for NTHR's scores
home = "cpu" if parallel == "fsdp" else device
torch.manual_seed(seed)  # of LoRA's adapters, the same on all ranks
policy = model_utils.load_policy(
    model if lora_rank else load_from, compute, home, activation_checkpointing,
    lora_rank=lora_rank, resumed=resumed)
net = model_utils.parallelize(policy, parallel, device).train()
optimizer = model_utils.make_optimizer(policy, learning_rate, weight_decay)
if resumed:
    runs.load_optimizer(resumed, optimizer)
    print0(f"resumed from {resumed}")
ref = partial(net, adapted=False)  # LoRA's model without its adapters
if kl_coef and not lora_rank:
    ref = model_utils.load_policy(model, compute, home, param_dtype=compute).requires_grad_(False)
    ref = model_utils.parallelize(ref, parallel, device)
if is_rank0():
    with runs.or_say_so(out_dir, "a checkpoint", on_full_disk):
        runs.check_space(out_dir, policy.model)
scores_known = read_cache(out_dir)  # of the judge, before this run was resumed

of_sampling = settings_for(rollout.sample_batch, config)
of_evaluation = settings_for(rollout.generate_all_ranks, config) | {"temperature": 0.0}
of_judge = settings_for(judge_all_ranks, config)
of_response = settings_for(response_advantages, config)
of_variant = settings_for(token_advantages, config)
of_loss = settings_for(losses.policy_loss, config)


def has_signal(group):
    """Has a response of the group an advantage? Other groups are idle."""
    return response_advantages(group, **of_response).any()


def ask_old_policy(unit, outs, head, figures):
    """Set old_logp and advantage (n,) of a unit's micro-batches. outs: what the policy that sampled
    says of each, see Policy.forward; head (V, d): its own."""
    of_unit = [torch.cat(x).detach() for x in zip(*outs)]  # logp, entropy, h, lse
    counts = [sum(group.lengths) for group in unit.groups]
    logp, advantage = of_unit[0], [of_unit[0].new_zeros(0)]
    for group, *of_group in zip(unit.groups, *(x.split(counts) for x in of_unit)):
        old = Old(*of_group, head, temperature)
        metrics.note_anchors(figures, group, old)
        advantage.append(token_advantages(
            group=group, old=old, figures=figures, **of_response | of_variant))
        group.of_tokens = torch.stack([old.logp, old.entropy, advantage[-1]])
    unit.set_old(logp, torch.cat(advantage))


def check_gap(figures):
    """End the run, before an update, if vLLM does not sample from the trainer's weights."""
    if max_gap and (gap := figures.all_ranks()["gap/mean"]) > max_gap:
        die(f"step {step}: vLLM's logp is {gap:.2g} nats from the trainer's, {max_gap=}: did a "
            "push miss weights, is rollout_dtype coarse, is it another model to vLLM?", code=1)


def write_row(row, groups, answers):
    """Write a step's figures, its first groups, its right answers; print a line. All ranks call."""
    samples = metrics.samples(groups[:samples_per_step], row["step"], tokenizer, of_response)
    if not is_rank0():
        return
    row |= metrics.speed_figures(row, vllm_bytes)
    alarms = metrics.find_alarms(row, runs.read_rows(out_dir))
    with runs.or_say_so(out_dir, f"step {row['step']}", on_full_disk):
        runs.log(out_dir, metrics=[row], samples=samples, right_answers=answers)
        if row.get("train/bad_step"):
            torch.save(groups, f"{out_dir}/bad_step_{row['step']}.pt")
    print0("\n".join([metrics.step_line(row, max_steps), *alarms]))


def evaluate(step):
    """Greedy accuracy on the evaluation problems, logged and printed."""
    groups = rollout.generate_all_ranks(
        engine, tokenizer, test_problems, test_prompts, n=1, **of_evaluation)
    row = {"step": step, "eval/accuracy": data.accuracy(groups),
           "eval/mean_length": np.mean([n for g in groups for n in g.lengths]),
           "eval/truncated": np.mean([g.truncated for g in groups])}
    if is_rank0():
        with runs.or_say_so(out_dir, f"the evaluation of step {step}", on_full_disk):
            runs.log(out_dir, metrics=[row])
        print0(f"step {step}: greedy accuracy {row['eval/accuracy']:.1%} on {len(groups)} "
               "held-out problems")


# ---- the loop ------------------------------------------------------------------------------------

bad_steps = 0  # in a row
signals = []   # (number, time)
evaluated = data.of_ranks([r["step"] for r in runs.read_rows(out_dir) if "eval/accuracy" in r])[0]
runs.catch_signals(signals)
while True:
    # ---- save and evaluate
    stop = max(data.of_ranks(signals[0][0] if signals else 0))  # all ranks or none
    due = step == max_steps or eval_every and step % eval_every == 0
    save = stop or step == max_steps or (step % ckpt_every == 0 if ckpt_every else due)
    if save and step != state["step"]:
        runs.save_checkpoint(out_dir, dict(step=step, position=position), policy.model,
                             tokenizer, optimizer, config)
    if stop:
        print0(f"stopped by signal {stop} after step {step}; saved: {runs.checkpoints(out_dir)}")
        raise SystemExit(128 + stop)
    if due and test_problems and step not in evaluated:
        evaluate(step)
    if step >= max_steps:
        break
    step += 1
    figures, row = metrics.Figures(device), {"step": step}

    # ---- rollout: every rank samples a share, then holds every group
    groups, sampled, position, wasted = rollout.sample_batch(
        engine, tokenizer, problems, prompts, position, wanted=has_signal,
        anchor_texts=anchor_texts, end=end, **of_sampling)
    figures.lap("rollout")
    rollout.sleep_engine(engine)
    figures.lap("sleep")

    # ---- judge
    if judged:
        row |= judge_all_ranks(groups, cache=scores_known, **of_judge)
        of_variant["delta"] = advantages.dagrpo_threshold(groups, delta, advantage_norm)
    figures.lap("judge")

    # ---- pack: an update is a list of units, this rank's share of a mini-batch, the last of which
    # may be smaller. Idle groups count in the loss, but without a regulariser have no gradient
    updates = []
    for first in range(0, len(groups), prompts_per_update):
        mini_batch = groups[first:first + prompts_per_update]
        losses.set_weights(mini_batch, loss_norm, max_response_tokens)
        live = [g for g in mini_batch if kl_coef or llds or has_signal(g)]
        updates.append(model_utils.pack_update(live, tokens_per_micro_batch, bool(updates), device))

    # ---- old policy: units of later updates, and of groups that are cut, get a pass of their own
    # before the weights move; for the others it is the training pass
    units, head = sum(updates, []), None
    if variant in advantages.SCORED:  # whole; read before the weights move
        head = model_utils.full(policy.model.get_output_embeddings().weight.detach())  # (V, d)
    with torch.no_grad():
        for unit in units:
            if unit.early:
                ask_old_policy(unit, [net(b, temperature) for b in unit.batches], head, figures)
        # FSDP wants the passes of the two models in the same order on all ranks: these are last
        for batch in [batch for unit in units for batch in unit.batches if kl_coef]:
            batch.ref_logp = ref(batch, temperature)[0]
    figures.lap("old_policy")

    # ---- update
    rest = max(0.0, 1 - (step - 1) / decay_steps) if decay_steps else 1.0
    lr = optimizer.param_groups[0]["lr"] = learning_rate * rest * min(1, step / (warmup_steps + 1))
    before = model_utils.snapshot(optimizer) if updates[1:] else None
    for update in updates:
        for unit in update:
            for batch in unit.batches:
                # DDP averages gradients in the last micro-batch; FSDP adds shards up as it goes
                net.require_backward_grad_sync = batch is update[-1].batches[-1]
                logp, entropy, *_ = out = net(batch, temperature)
                if not unit.early:
                    ask_old_policy(unit, [out], head, figures)
                batch_loss = losses.policy_loss(logp, batch, figures=figures, **of_loss)
                (batch_loss * world_size).backward()  # gradients are averaged; the loss is a sum
                figures.sum("train/loss", batch_loss / len(updates))
                figures.mean("train/entropy", entropy, where=~batch.is_anchor)
                figures.sum("train/packed_tokens", batch.input_ids.numel())
                if update is not updates[0]:  # what the updates before did to right responses
                    moved = losses.per_response(logp.detach() - batch.old_logp, batch)
                    figures.mean("displacement/mean", moved, where=batch.right)
                    figures.mean("displacement/fell", moved < 0, where=batch.right)
        check_gap(figures)
        norm = model_utils.optimizer_step(net, optimizer, grad_clip)
        figures.mean("train/grad_norm", norm)
        figures.max("train/bad_step", ~norm.isfinite())
        if before and not norm.isfinite():  # the whole step is undone
            model_utils.put_back(optimizer, before)
            break
    updates = update = units = unit = batch = out = _ = head = before = None  # vLLM wants room
    figures.lap("update")

    # ---- sync
    rollout.sync_weights(engine, policy.model)
    figures.lap("sync")

    # ---- one row of figures, over all ranks
    row |= {"train/lr": lr, **figures.all_ranks(),
            **metrics.rollout_figures(groups, sampled, wasted, step, anchor_texts)}
    answers = data.right_answers(sampled, step, anchors) if from_self else []
    data.remember(anchor_texts, answers, anchors)
    write_row(row, groups, answers)
    bad_steps = bad_steps + 1 if row.get("train/bad_step") else 0
    if bad_steps == max_bad_steps:
        die(f"step {step}: no finite gradient, {bad_steps} steps in a row; checkpoints before: "
            f"{runs.checkpoints(out_dir)}; groups: {out_dir}/bad_step_*.pt", code=1)

if is_rank0():
    with runs.or_say_so(out_dir, "curves.png", on_full_disk):
        plot_runs(read_runs([out_dir]), f"{out_dir}/curves.png")
    print0(f"wrote {out_dir}/: metrics.jsonl, samples.jsonl, curves.png, step_*/")
engine = None  # last: its shutdown ends the process group
