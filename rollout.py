"""From prompts to groups of graded responses: everything that touches vLLM.

    engine = build_engine(model, ...)           one vLLM engine a rank, on a GPU or a CPU
    groups, ... = sample_batch(engine, ...)     training: groups with a signal, streaming
    groups = generate_all_ranks(engine, ...)    evaluation: a group for every problem
    sync_weights(engine, model)                 the trainer's weights, before the next rollout

Token ids come out of vLLM and go into the trainer as they are: nothing tokenises a rollout again.
Every response has a seed of its own: but for rounding, what is beside it changes nothing."""
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from configurator import CORES, RANKS, is_rank0

# Read by torch and vLLM when they are imported, so scripts import this module first. Threads on a
# CPU: this rank's share of the cores (torchrun says 1), bound to none, not spinning for long, since
# the two take turns. vLLM in this process shares torchrun's process group; its weights are at hand.
if "OMP_NUM_THREADS" not in os.environ or RANKS > 1 and os.environ["OMP_NUM_THREADS"] == "1":
    os.environ["OMP_NUM_THREADS"] = str(CORES)
os.environ |= dict(
    GOMP_SPINCOUNT="5000", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="2",  # GiB
    VLLM_LOGGING_LEVEL="ERROR") | os.environ  # what is set already stays

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tqdm import tqdm

from data import Group, choose_anchors, data_order, mixed, of_ranks, with_anchors
from grader import grade_all
from model_utils import plain_weights


def build_engine(model, context, seed, dtype, gpu_memory_utilization=0.5, max_num_seqs=None, tp=1):
    """A vLLM engine in this process, one per rank or `tp` neighbouring ranks (tensor parallel).
    context: tokens of the longest prompt and response. dtype: "auto" is bfloat16 on CUDA, float32
    on a CPU. All ranks call together, before the trainer takes its memory; it reseeds torch."""
    warnings.filterwarnings("ignore", module="vllm")
    from vllm import LLM  # here: an import of many seconds
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        of_device = dict(gpu_memory_utilization=gpu_memory_utilization, enable_sleep_mode=True,
                         hf_overrides={"head_dtype": "float32"})  # as the trainer's logits are
    else:  # small blocks share more of a prompt; prompts cut in chunks would have to take a seeded
        # draw back, which torch's generator on a CPU cannot
        of_device = dict(enforce_eager=True, block_size=32, enable_chunked_prefill=False)
        torch._dynamo.config.disable = True  # vLLM's sampler would want a compiler
    # log-probabilities are of the distribution sampled from, after temperature
    return LLM(
        model, dtype=dtype.replace("auto", "bfloat16" if on_cuda else "float32"), seed=seed,
        max_model_len=context, max_num_seqs=max_num_seqs, tensor_parallel_size=tp,
        distributed_executor_backend="external_launcher", logprobs_mode="processed_logprobs",
        enable_prefix_caching=True, use_tqdm_on_load=False, **of_device)


def make_group(tokenizer, row, prompt, seed, outs):
    """vLLM's outputs to a prompt as a Group that is not graded yet."""
    ids = [np.asarray(o.token_ids, dtype=np.int32) for o in outs]
    return Group(
        row=row, prompt=prompt, responses=ids,
        rollout_logp=[np.asarray(o.logprobs.logprobs, dtype=np.float32) for o in outs],
        texts=tokenizer.batch_decode(ids, skip_special_tokens=True),
        reward=np.zeros(len(outs), dtype=np.float32), seed=seed,
        truncated=np.array([o.finish_reason != "stop" for o in outs]))


def generate_all_ranks(engine, tokenizer, problems, prompts, n, temperature, max_response_tokens,
                       tp=1, seed=0, reward=None, reward_seconds=2.0):
    """n graded responses to every problem: a Group each, in their order, the same on all ranks."""
    return sample_batch(
        engine, tokenizer, problems, prompts, 0, seed=seed, prompts_per_step=len(problems),
        group_size=n, temperature=temperature, max_response_tokens=max_response_tokens,
        oversample=math.inf, max_rounds=1, dynamic_sampling=False, shuffle=False, tp=tp,
        reward=reward, reward_seconds=reward_seconds)[0]


LOOK_EVERY = 8  # engine steps between two looks at what has finished, on all ranks at once
OPEN, DROPPED, ACCEPTED = 0, 1, 2


def sample_batch(engine, tokenizer, problems, prompts, position, *, seed, prompts_per_step,
                 group_size, temperature, max_response_tokens, oversample=1.0,
                 max_rounds=8, dynamic_sampling=True, wanted=mixed, shuffle=True, tp=1,
                 anchors=0, anchor_share=1.0, anchor_hard_only=False, anchor_texts=None, end=None,
                 reward=None, reward_seconds=2.0):
    """Groups of graded responses until `prompts_per_step` are `wanted` ([DAPO], 2503.14476).

    Prompts come in the data order, along which `position` (prompts, all ranks) counts. In work at
    once are `oversample` times the missing ones (inf: as many as fill the engines). Accepted are
    the first in the order of issue, whichever finished first, so that short responses are not
    favoured; the rest is aborted, and its prompts, past the new position, are met again. After
    max_rounds x prompts_per_step prompts: what there is. Without dynamic_sampling every group is
    accepted. A response depends on seed, its prompt's position and number; greedy at temperature 0.

    anchors: at most so many demonstrations (data.choose_anchors) take the places of rollouts if the
    problem has some, or only if no rollout is correct (anchor_hard_only), before the group is
    accepted or not. end: data.end_token.

    All ranks call together and get the same: (accepted groups, all groups looked at, new position,
    prompts issued in vain)."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core = engine.llm_engine
    engines = dist.get_world_size() // tp
    mine, nth = divmod(dist.get_rank(), tp)  # this rank's engine, and which of its ranks it is
    room = engines * (core.vllm_config.scheduler_config.max_num_seqs // group_size + 1)
    max_prompts = max(1, round(max_rounds * prompts_per_step))
    order = data_order(position, max_prompts, len(prompts), seed) if shuffle else range(max_prompts)
    # vLLM counts a request's seeds on from the first: prompts are kept apart
    seeds = [(seed * 1_000_003 + position + i) % 2**47 * 2**16 for i in range(max_prompts)]
    joining = [choose_anchors(problems[p]["problem"], anchor_texts, anchors, anchor_share, seed)
               for p in order]

    def grade(outputs):
        groups = {i: make_group(tokenizer, problems[order[i]], prompts[order[i]], seeds[i], outs)
                  for i, outs in outputs.items()}
        # a response that was cut off is incorrect, whatever is in it
        rewards = iter(grade_all([(text, g.row) for g in groups.values() for text, is_cut in zip(
            g.texts, g.truncated) if not is_cut], reward, reward_seconds))
        for i, g in groups.items():
            g.reward[~g.truncated] = [next(rewards) for _ in g.reward[~g.truncated]]
            if joining[i] and not (anchor_hard_only and g.correct.any()):
                groups[i] = with_anchors(tokenizer, g, joining[i], group_size, end)
        return groups

    owner = []                              # the engine of every prompt issued
    state = np.zeros(max_prompts, np.int8)  # of every prompt, the same on all ranks
    requests, graded = {}, {}               # of this engine's prompts: vLLM's name, group
    finished, grading = {}, []              # outputs by prompt, then futures of their groups
    engine.reset_prefix_cache()             # never another policy's keys and values
    bar = tqdm(None, "prompts", max_prompts, leave=False, disable=not is_rank0() or None)
    with bar, ThreadPoolExecutor(1) as grader:  # grades while the engine goes on
        while True:
            # enough?
            waiting = np.flatnonzero(state[:len(owner)] == OPEN)
            closed = next(iter(waiting), len(owner))  # all prompts before it are decided
            accepted = np.flatnonzero(state[:closed] == ACCEPTED)[:prompts_per_step]
            bar.update(closed - bar.n)
            if len(accepted) == prompts_per_step or closed == max_prompts:
                break
            # issue prompts, each to the engine with the fewest
            missing = prompts_per_step - np.count_nonzero(state == ACCEPTED)
            # inf x 0 is nan
            most = math.ceil(min(oversample * missing, room)) if missing > 0 else 0
            load = np.bincount([owner[i] for i in waiting], minlength=engines)
            for i in range(len(owner), min(max_prompts, len(owner) + most - len(waiting))):
                owner.append(load.argmin())
                load[owner[i]] += 1
                if owner[i] == mine:
                    ids = {"type": "token", "prompt_token_ids": prompts[order[i]].tolist()}
                    count = group_size - (0 if anchor_hard_only else len(joining[i]))
                    params = SamplingParams(  # of each token its log-probability, no text
                        n=count, seed=seeds[i], temperature=temperature, logprobs=0,
                        flat_logprobs=True, detokenize=False, max_tokens=max_response_tokens,
                        output_kind=RequestOutputKind.FINAL_ONLY)
                    requests[i] = core.add_request(str(i), ids, params)
            # sample
            for _ in range(LOOK_EVERY):
                for out in core.step() if core.has_unfinished_requests() else ():
                    finished[int(out.request_id)] = out.outputs
            # grade on an engine's first rank; a GPU does not wait, a CPU's runs repeat to the bit
            grading.append(grader.submit(grade, {} if nth else finished))
            finished = {}
            waits = not (torch.cuda.is_available() and core.has_unfinished_requests())
            while grading and (waits or grading[0].done()):
                for i, group in grading.pop(0).result().items():
                    graded[i] = group
                    state[i] = DROPPED if dynamic_sampling and not wanted(group) else ACCEPTED
            dist.all_reduce(torch.from_numpy(state), dist.ReduceOp.MAX)

    seen = int(accepted[-1]) + 1 if len(accepted) == prompts_per_step else closed
    core.abort_request([name for i, name in requests.items() if i >= seen], internal=True)
    shares = of_ranks({i: g for i, g in graded.items() if i < seen})
    sampled = [shares[owner[i] * tp][i] for i in range(seen)]
    return [sampled[i] for i in accepted], sampled, position + seen, len(owner) - seen


# ---- the trainer's weights, and the GPU's memory -------------------------------------------------

def sleep_engine(engine):
    """Give the GPU to the trainer: the KV cache is dropped, the weights go to host memory. CUDA."""
    if torch.cuda.is_available():
        engine.sleep(1)
        torch.cuda.reset_peak_memory_stats()


def sync_weights(engine, model):
    """Wake the engine and push the trainer's weights; all ranks call together.
    model: the Hugging Face model, its parameters plain or DTensor."""
    if torch.cuda.is_available():
        # vLLM maps its memory past torch's allocator, which keeps the trainer's
        torch.cuda.empty_cache()
        engine.wake_up(["weights"])
    push_weights(engine, plain_weights(model))
    if torch.cuda.is_available():
        engine.wake_up(["kv_cache"])


def load_weights(engine, folder):
    """Put the weights of another checkpoint of the same model, a folder, into the engine."""
    files = sorted(Path(folder).glob("*.safetensors"))
    push_weights(engine, (pair for file in files for pair in load_file(file).items()))


def push_weights(engine, weights):
    """Write (name, tensor) pairs into the engine's model. Its prefix cache is of the model before
    until `sample_batch` empties it."""
    if torch.cuda.is_available():
        engine.apply_model(lambda m: m.load_weights(weights) and None)
    else:  # the CPU engine has packed its linears: this unpacks, loads and packs them again
        engine.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
        if engine.llm_engine.model_config.hf_config.tie_word_embeddings:  # leaves a head as it was
            engine.apply_model(
                lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
