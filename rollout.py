"""From prompts to groups of graded responses: everything that touches vLLM.

    engine   = build_engine(model_dir, ...)                     # one vLLM engine a rank, on a GPU or a CPU
    groups   = generate(engine, tokenizer, problems, prompts, n=8, ...)   # a group a prompt, graded: see `generate`
    sync_weights(engine, hf_model)                              # the trainer's weights, before the next rollout

Token ids come out of vLLM and go into the trainer as they are: nothing here or there tokenises a response again.
"""
import json
import math
import os
from functools import partial

# Read by torch when it is imported, so scripts import this module first. Threads on a CPU: this rank's share of the cores,
# where torchrun would give every rank one; and none that spins for long, since torch and vLLM take turns.
_ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
if "OMP_NUM_THREADS" not in os.environ or (os.environ["OMP_NUM_THREADS"] == "1" and _ranks_here > 1):
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // _ranks_here))
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# Read by vLLM when it is imported. In one process, so that the engine shares torchrun's process group and its weights
# can be written from here; on a CPU, threads are the ones OMP_NUM_THREADS gives this rank, not bound to cores.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from tqdm import tqdm

from configurator import is_rank0
from data import data_index, encode_anchor, with_anchor
from grader import grade_all

# ---------------------------------------------------------------------------------------------------------------------
# the engine

def build_engine(model, context, seed, dtype, gpu_memory_utilization=0.5, max_num_seqs=None, tensor_parallel=1):
    """A vLLM engine in this process, one per rank (data parallel), inside torchrun's process group.

    model: Hugging Face folder or hub id; dtype: "auto" is bfloat16 on CUDA, float32 on a CPU; context: prompt and response tokens of the longest sequence; tensor_parallel:
    neighbouring ranks that share an engine. All ranks must call it together, before the trainer takes its memory;
    building it reseeds torch's global generator.
    """
    import torch
    import warnings
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    from vllm import LLM

    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    if torch.cuda.is_available():
        device_args = dict(gpu_memory_utilization=gpu_memory_utilization, enable_sleep_mode=True)
    else:  # no compiler needed; 32 is the smallest block, so the most of a shared prompt that the prefix cache can hold
        device_args = dict(enforce_eager=True, block_size=32)
        torch._dynamo.config.disable = True  # vLLM's sampler has a compiled function; a bare machine has no compiler
    engine = LLM(
        model,
        dtype=dtype,
        max_model_len=context,
        max_num_seqs=max_num_seqs,
        seed=seed,
        tensor_parallel_size=tensor_parallel,
        distributed_executor_backend="external_launcher",
        logprobs_mode="processed_logprobs",  # of the distribution sampled from: after temperature
        enable_prefix_caching=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **device_args,
    )
    if torch.cuda.is_available() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # of what torch allocates from here on, every free page can go back to the GPU, where vLLM wants it when it wakes up
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    return engine


RAW = dict(logprobs=0, flat_logprobs=True, detokenize=False)  # the sampled token's log-probability and id, no text


def generate(engine, tokenizer, problems, prompts, n, temperature, max_response_tokens, top_p=1.0, progress=False,
             seeds=None):
    """n graded responses (or n[i]) to every prompt: one group, a dict, per problem.

    seeds: int per prompt, whose responses then depend on nothing else; None: sampling follows torch's generator.

        problem, answer   str
        solution          str or None, the demonstration
        prompt            int32 (P,)
        responses         n int32 arrays (R_i,), end-of-sequence token included
        logprobs          n float32 arrays (R_i,), vLLM's log-probability of each sampled token at `temperature`
        texts             n str, special tokens left out
        truncated         bool (n,): hit max_response_tokens, so incorrect
        rewards           float32 (n,): 1 correct, 0 incorrect
        anchor            bool (n,), all False: none is a demonstration, see with_anchor
    """
    from vllm import SamplingParams

    counts = n if isinstance(n, list) else [n] * len(prompts)
    params = [SamplingParams(n=n, temperature=temperature, top_p=top_p, max_tokens=max_response_tokens, seed=s, **RAW)
              for n, s in zip(counts, seeds or [None] * len(prompts))]
    engine.reset_prefix_cache()  # never another policy's keys and values; the same numbers whatever ran before
    requests = [{"prompt_token_ids": p.tolist()} for p in prompts]
    results = engine.generate(requests, params, use_tqdm=partial(tqdm, leave=False) if progress and is_rank0() else False)
    return make_groups(tokenizer, problems, prompts, [sorted(r.outputs, key=lambda o: o.index) for r in results],
                       progress and is_rank0())


def make_groups(tokenizer, problems, prompts, outputs, progress=False):
    """Graded groups (see `generate`) of vLLM's finished outputs, a list of CompletionOutput per problem."""
    texts = [tokenizer.batch_decode([list(o.token_ids) for o in outs], skip_special_tokens=True) for outs in outputs]
    truncated = [np.array([o.finish_reason != "stop" for o in outs]) for outs in outputs]
    verdicts = iter(grade_all([("" if cut else text, problem) for problem, ts, cuts in zip(problems, texts, truncated)
                               for text, cut in zip(ts, cuts)], progress))
    return [dict(
        problem=problem["problem"], answer=problem["answer"], solution=problem.get("solution"), prompt=prompt,
        responses=[np.asarray(o.token_ids, dtype=np.int32) for o in outs],
        logprobs=[np.asarray(o.logprobs.logprobs, dtype=np.float32) for o in outs],
        texts=texts[i], truncated=truncated[i], rewards=np.array([next(verdicts) for _ in outs], dtype=np.float32),
        anchor=np.zeros(len(outs), dtype=bool),
    ) for i, (problem, prompt, outs) in enumerate(zip(problems, prompts, outputs))]


def generate_all_ranks(engine, tokenizer, problems, prompts, n, tensor_parallel=1, seeds=None, **kwargs):
    """`generate` with the problems dealt over the engines. Every rank gets all groups, in the order of `problems`."""
    import torch.distributed as dist

    engines = dist.get_world_size() // tensor_parallel
    mine = slice(dist.get_rank() // tensor_parallel, None, engines)  # engine e has the problems e, e + engines, ...
    groups = generate(engine, tokenizer, problems[mine], prompts[mine], n=n[mine] if isinstance(n, list) else n,
                      seeds=seeds and seeds[mine], **kwargs) if problems[mine] else []
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, groups)
    return [shares[i % engines * tensor_parallel][i // engines] for i in range(len(problems))]


def mixed(group):
    """True if some responses are right and some wrong: without that a group has no advantages, and no signal."""
    return group["rewards"].min() < group["rewards"].max()


LOOK_EVERY = 8  # engine steps between two looks at what has finished, on all ranks at once


def sample_batch(engine, tokenizer, problems, prompts, position, seed, *, prompts_per_step, oversample, max_prompts,
                 keep_all, n, temperature, max_response_tokens, streaming=True, tensor_parallel=1, seeded=False,
                 anchors="none", hard_only=False, end=None):
    """Dynamic sampling (DAPO): groups of n responses until `prompts_per_step` of them have both outcomes.

    Prompts come in the data order, a fresh shuffle an epoch, along which `position` (prompts, all ranks) counts. In work at
    once are `oversample` times the missing ones (inf: as many as fill the engines): streaming, new ones are issued as others
    finish; else when all have. Accepted are the first in the order of issue, whichever finished first, so that short
    responses are not favoured: once enough are accepted and nothing before them is open, the rest is aborted. The position
    stops behind the last one accepted; prompts beyond it, sampled in vain, are met again. After `max_prompts` prompts: what
    there is. keep_all: every group is accepted.

    anchors: "replace" or "add": a demonstration joins every group whose problem has one (row["anchor"], see verify_demos),
    in place of a rollout or as one more response, before the group is accepted or not; hard_only: only groups without a
    correct rollout. end: end_token. seeded: every response has its own seed, so that it depends on nothing sampled beside it;
    on CUDA vLLM needs that: its own draws there do not follow torch's generator, and are the same on every rank.

    All ranks call together and get the same: (accepted groups, the groups looked at, new position, tokens sampled in vain,
    all ranks).
    """
    import torch
    import torch.distributed as dist
    from concurrent.futures import ThreadPoolExecutor
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core = engine.llm_engine
    first = dist.get_rank() % tensor_parallel == 0  # of an engine's ranks, which all have its outputs: it grades them
    engines, mine = dist.get_world_size() // tensor_parallel, dist.get_rank() // tensor_parallel
    room = engines * (core.vllm_config.scheduler_config.max_num_seqs // n + 1)  # prompts that fill them; one waits at each
    order = [data_index(position + i, len(problems), seed) for i in range(max_prompts)]
    joins = [anchors != "none" and problems[p]["anchor"] for p in order]
    fewer = anchors == "replace" and not hard_only  # then the rollout that is replaced need not be sampled
    owner = []                                            # engine of every prompt issued, in order
    state = torch.zeros(max_prompts, dtype=torch.int8)    # of every prompt, on all ranks: 0 open, 1 dropped, 2 accepted
    outputs, groups = {}, {}                              # of this engine's prompts: {response: output}; graded groups
    finished, grading = [], None                          # prompts to be graded next; those being graded

    def issue(i):
        outputs[i] = {}
        for k in range(n - (fewer and joins[i])):
            core.add_request(f"{i}/{k}", {"type": "token", "prompt_token_ids": prompts[order[i]].tolist()}, SamplingParams(
                temperature=temperature, max_tokens=max_response_tokens, output_kind=RequestOutputKind.FINAL_ONLY,
                seed=hash((seed, position + i, k)) % 2**31 if seeded else None, **RAW))

    def grade(finished):
        made = make_groups(tokenizer, [problems[order[i]] for i in finished], [prompts[order[i]] for i in finished],
                           [[outputs[i][k] for k in sorted(outputs[i])] for i in finished])
        replace = anchors == "replace" and hard_only
        return {i: with_anchor(g, encode_anchor(tokenizer, g["prompt"], g["solution"], end), replace)
                if joins[i] and not (hard_only and g["rewards"].any()) else g for i, g in zip(finished, made)}

    def look():
        """Take in what the grader has been given; only here, and without seeds always at the same point of a run."""
        for i, g in grading.result().items() if grading else ():
            groups[i] = g
            state[i] = 2 if keep_all or mixed(g) else 1

    engine.reset_prefix_cache()  # never another policy's keys and values
    with ThreadPoolExecutor(1) as grader:  # while the engine goes on; what it finds is known at the next look
        while True:
            opened = np.flatnonzero(state[:len(owner)].numpy() == 0)
            closed = opened[0] if len(opened) else len(owner)  # prompts before which nothing is open
            missing = prompts_per_step - int((state == 2).sum())
            if int((state[:closed] == 2).sum()) >= prompts_per_step or not len(opened) and len(owner) == max_prompts:
                break
            if missing > 0 and (streaming or not len(opened)):
                work = min(oversample * missing, room if streaming or math.isinf(oversample) else math.inf)
                load = np.bincount([owner[i] for i in opened], minlength=engines)
                for i in range(len(owner), min(max_prompts, len(owner) + math.ceil(work) - len(opened))):
                    owner.append(int(load.argmin()))
                    load[owner[i]] += 1
                    if owner[i] == mine:
                        issue(i)
            for _ in range(LOOK_EVERY):
                for out in core.step() if core.has_unfinished_requests() else ():
                    i, k = map(int, out.request_id.split("/"))
                    outputs[i][k] = out.outputs[0]
                    if len(outputs[i]) == n - (fewer and joins[i]):
                        finished.append(i)
            busy = core.has_unfinished_requests()
            if not (seeded and busy and grading and not grading.done()):  # with seeds it does not matter when a grade is known
                look()
                grading, finished = grader.submit(grade, finished if first else []), []
            if not busy:
                look()  # nothing to do beside it
            dist.all_reduce(state, dist.ReduceOp.MAX)

    accepted = np.flatnonzero(state[:closed].numpy() == 2)[:prompts_per_step]
    looked_at = accepted[-1] + 1 if len(accepted) == prompts_per_step else closed
    wasted = sum(len(out.token_ids) for i, outs in outputs.items() if i >= looked_at for out in outs.values())
    wasted += sum(request.detokenizer.num_output_tokens() for request in core.output_processor.request_states.values())
    core.abort_request([f"{i}/{k}" for i, outs in outputs.items() if i >= looked_at for k in range(n) if k not in outs])
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (wasted, {i: g for i, g in groups.items() if i < looked_at}))
    shares = shares[::tensor_parallel]
    sampled = [shares[owner[i]][1][i] for i in range(looked_at)]
    return [sampled[i] for i in accepted], sampled, position + int(looked_at), sum(wasted for wasted, _ in shares)


def sleep_engine(engine, level):
    """Give the GPU to the trainer: the KV cache is dropped, the weights go to host memory (1) or too (2). CUDA only."""
    import torch

    if torch.cuda.is_available() and level:
        engine.sleep(level)


def sync_weights(engine, model, sleep_level=0):
    """Push the trainer's weights into this rank's engine; all ranks call it together (FSDP gathers each tensor in turn).

    model: the Hugging Face model, its parameters plain or DTensor; sleep_level: how the engine was put to sleep.
    """
    from model_utils import full

    weights = ((name, full(p.detach())) for name, p in model.named_parameters())
    push_weights(engine, weights, model.config.tie_word_embeddings, sleep_level)


def load_weights(engine, folder):
    """Put the weights of another checkpoint of the same model, a Hugging Face folder, into the engine."""
    from safetensors import safe_open

    def weights():
        for file in sorted(f for f in os.listdir(folder) if f.endswith(".safetensors")):
            with safe_open(os.path.join(folder, file), "pt") as f:
                yield from ((name, f.get_tensor(name)) for name in f.keys())

    with open(os.path.join(folder, "config.json")) as f:
        push_weights(engine, weights(), json.load(f).get("tie_word_embeddings", False))


def push_weights(engine, weights, tied, sleep_level=0):
    """Write (Hugging Face name, tensor) pairs into the engine's model in place. tied: the head is the embedding."""
    import torch

    if torch.cuda.is_available():
        if sleep_level:  # the weights first: the KV cache comes back when theirs is the only other memory in use
            torch.cuda.empty_cache()  # vLLM maps its memory anew, past torch's allocator, which keeps the trainer's
            engine.wake_up(["weights"])
        engine.apply_model(lambda m: m.load_weights(weights) and None)
        if sleep_level:
            engine.wake_up(["kv_cache"])
    else:  # the CPU engine has packed its linears: this path unpacks, loads and packs again
        engine.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
        if tied:  # reload_weights leaves a tied head as it was
            engine.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
    engine.reset_prefix_cache()


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

def accuracy(groups):
    """Mean over groups of the mean reward of their rollouts; demonstrations do not count."""
    return float(np.mean([g["rewards"][~g["anchor"]].mean() for g in groups]))
