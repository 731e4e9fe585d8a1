"""The trainer's model: process group, packing, log-probabilities, DDP/FSDP wrapping, checkpoints.

Layout. A step's responses are one flat run of tokens; every per-token quantity (log-probability, advantage, weight) is a
tensor (N,) in that order. For the forward pass they are packed into micro-batches of *trees*: a prompt once, then the
responses that share it; what all prompts of the micro-batch begin with (few-shot examples) stands before them, once.
Tokens see what leads to them, nothing else, and position ids count along that way, so the numbers are those of each
prompt + response alone, without padding and without computing anything twice.

    prompts [7 8 9] with responses [1 2] and [3], [7 8 6] with response [4]:
    input_ids  7 8 | 9 | 1 2 | 3 | 6 | 4    six segments: the common prefix, a prompt's rest, its responses, ...
    position   0 1   2   3 4   3   2   3
    predicts         2 3 2 6                index of the state that predicts response tokens 1, 2, 3, 4
    targets          1 2 3 4
"""
import ctypes
import hashlib
import inspect
import os
import shutil
import socket
import sys
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from configurator import die, is_rank0, print0
from runs import prune, write_json

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # torch's own build of the same kernels
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes fewer key heads unasked
    GROUPED = dict(enable_gqa=True) if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal):
        return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=softmax_scale, window_size=(-1, 0 if causal else -1), **GROUPED)


def setup_distributed():
    """Join torchrun's process group, or make one of a single rank. Returns this rank's torch.device."""
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif sys.platform == "linux":  # keep what is freed: a step's large tensors need not be cleared by the system again
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)          # M_MMAP_MAX: large blocks come from the heap too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: of which nothing is given back
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    return device


# ---------------------------------------------------------------------------------------------------------------------
# packing

@dataclass
class MicroBatch:
    """One forward pass: T packed tokens with N response tokens in them, response tokens in flat order."""
    input_ids: torch.Tensor   # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64
    predicts: torch.Tensor    # (N,) int64, index into T of the state that predicts each response token
    targets: torch.Tensor     # (N,) int64, the response tokens
    span: slice               # where the N tokens stand in the rank's flat order; (0, 0) for a filler
    kv_index: torch.Tensor    # (K,) int64, keys of all segments one after the other, varlen attention
    cu_q: torch.Tensor        # (S+1,) int32, where each segment starts in T
    cu_k: torch.Tensor        # (S+1,) int32, where its keys (what leads to it, and its own) start in K
    max_q: int
    max_k: int
    prefix: int               # tokens of the common prefix, the first of T
    spans: list               # [(start, end, causal)], SDPA: the common prefix, then trees, short ones together; causal: its
                              # tokens see all before them
    segment: torch.Tensor     # (2, T) int32, the segment of each token, and the one of the prompt before it
    masks: list = None        # of the spans, see tree_masks; None: varlen attention

    def to(self, device):
        """The same on a GPU, copied from pinned memory without waiting; on a CPU itself."""
        if torch.device(device).type == "cpu":
            return self
        return replace(self, **{f.name: x.pin_memory().to(device, non_blocking=True) for f in fields(self)
                                if isinstance(x := getattr(self, f.name), torch.Tensor)})


def plan_micro_batches(groups, tokens_per_micro_batch, share_prompts=True):
    """Cut groups into micro-batches of at most `tokens_per_micro_batch` packed tokens, in order.

    groups: dicts with "prompt" (P,) and "responses" [(R_i,)]. Returns a list of micro-batches, each a list of trees
    (group index, [response indices]). A group is cut in two only if it is larger than the budget by itself, and then
    between responses; a single response larger than it makes a micro-batch alone.
    """
    prefix = common_prefix([g["prompt"] for g in groups]) if share_prompts else 0  # in each micro-batch, once
    plan, room = [], 0
    for g, group in enumerate(groups):
        prompt = len(group["prompt"]) - prefix
        whole = sum(map(len, group["responses"])) + prompt * (1 if share_prompts else len(group["responses"]))
        fits = whole <= tokens_per_micro_batch - prefix
        for r, response in enumerate(group["responses"]):
            joins = share_prompts and r > 0
            need = whole if fits and r == 0 else len(response) + (0 if joins else prompt)
            if not plan or need > room:
                joins = False
                plan.append([])
                room = tokens_per_micro_batch - prefix
            if joins:
                plan[-1][-1][1].append(r)
            else:
                plan[-1].append((g, [r]))
            room -= len(response) + (0 if joins else prompt)
    return plan


def splits_groups(plan):
    """True if a group of this plan has responses in more than one micro-batch."""
    seen = [g for trees in plan for g in {g for g, _ in trees}]
    return len(seen) != len(set(seen))


def common_prefix(prompts):
    """How many tokens all prompts begin with, leaving each at least one of its own; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    shortest = min(map(len, prompts)) - 1
    same = np.all([p[:shortest] == prompts[0][:shortest] for p in prompts], axis=0)
    return shortest if same.all() else int(same.argmin())


SDPA_TOKENS = 256  # trees shorter than this share a call of SDPA: fewer calls for a little more work


def pack(groups, trees, start, device="cpu", share_prompts=True):
    """Pack one micro-batch of a plan. start: flat index of its first response token. See the layout above."""
    prefix = common_prefix([groups[g]["prompt"] for g, _ in trees]) if share_prompts else 0
    before = np.arange(prefix)
    ids, positions, predicts, targets, kv, segments, segment = [], [], [], [], [], [], []
    spans = []
    base = prefix
    if prefix:
        ids.append(groups[trees[0][0]]["prompt"][:prefix])
        positions.append(before)
        kv.append(before)
        segment.append(np.zeros((2, prefix)))
        segments.append((prefix, prefix))
        spans.append((0, prefix, True))
    of_span = len(segments)  # segments before the span that is being filled
    for tree, (g, responses) in enumerate(trees):
        prompt = groups[g]["prompt"][prefix:]
        size = len(prompt)
        way = np.concatenate([before, base + np.arange(size)])  # where the whole prompt stands
        ids.append(prompt)
        positions.append(prefix + np.arange(size))
        kv.append(way)
        root = len(segments)
        segment.append(np.full((2, size), root))
        segments.append((size, len(way)))
        at = base + size
        for r in responses:
            response = groups[g]["responses"][r]
            n = len(response)
            ids.append(response)
            positions.append(len(way) + np.arange(n))
            predicts.append(np.concatenate([[base + size - 1], np.arange(at, at + n - 1)]))
            targets.append(response)
            kv.append(np.concatenate([way, np.arange(at, at + n)]))
            segment.append(np.repeat([[len(segments)], [root]], n, axis=1))
            segments.append((n, len(way) + n))
            at += n
        base = at
        first = spans[-1][1] if spans else 0
        if base - first >= SDPA_TOKENS or tree + 1 == len(trees):
            spans.append((first, base, not prefix and len(segments) - of_span == 2))
            of_span = len(segments)

    def long(arrays):
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64))

    def offsets(lengths):
        return torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)

    count = sum(len(t) for t in targets)
    return MicroBatch(
        input_ids=long(ids)[None], position_ids=long(positions)[None], predicts=long(predicts), targets=long(targets),
        span=slice(start, start + count), kv_index=long(kv), cu_q=offsets([q for q, _ in segments]),
        cu_k=offsets([k for _, k in segments]), max_q=max(q for q, _ in segments), max_k=max(k for _, k in segments),
        prefix=prefix, spans=spans, segment=torch.from_numpy(np.concatenate(segment, axis=1).astype(np.int32))).to(device)


def pack_all(groups, plan, device="cpu", at_least=0, share_prompts=True):
    """Micro-batches of a plan, with fillers (two tokens, empty span) up to `at_least`, so that all ranks run as many."""
    batches, start = [], 0
    for trees in plan:
        batches.append(pack(groups, trees, start, device, share_prompts))
        start = batches[-1].span.stop
    filler = [{"prompt": np.zeros(1, dtype=np.int32), "responses": [np.zeros(1, dtype=np.int32)]}]
    for _ in range(at_least - len(plan)):
        batches.append(pack(filler, [(0, [0])], start, device))
        batches[-1].span = slice(0, 0)
    return batches


def prefetch(batches, device):
    """The micro-batches on `device`, each copied before the one ahead of it is computed."""
    ahead = None
    for batch in batches:
        now, ahead = ahead, batch.to(device)
        if now is not None:
            yield now
    if ahead is not None:
        yield ahead


def balance(groups, world_size):
    """Deal groups to ranks so that each gets about as many tokens: a list of group indices per rank, ascending."""
    sizes = [len(g["prompt"]) + sum(len(r) for r in g["responses"]) for g in groups]
    load, share = [0] * world_size, [[] for _ in range(world_size)]
    for g in sorted(range(len(groups)), key=lambda g: -sizes[g]):
        rank = min(range(world_size), key=lambda r: (load[r], r))
        load[rank] += sizes[g]
        share[rank].append(g)
    return [sorted(s) for s in share]


def tree_masks(batch):
    """For every span which of the prefix and of itself its tokens see, bool (end - start, prefix + end - start); None: all
    before them. A token sees its own segment and its prompt, not the future, and all of the prefix."""
    def mask(own, parent):
        return F.pad(((own[:, None] == own) | (parent[:, None] == own)).tril(), (batch.prefix, 0), value=True)

    return [None if causal else mask(*batch.segment[:, a:b]) for a, b, causal in batch.spans]


@torch.compiler.disable  # its loop over spans would be compiled anew for every micro-batch
def packed_attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """transformers' attention hook for a packed MicroBatch. query (1, H, T, D), key and value (1, H_kv, T, D).

    Without masks (bfloat16 on CUDA, see Policy.forward): one varlen call, of flash-attn or of torch, in which each segment's
    queries meet the keys that lead to it and its own (the causal mask is aligned to the last key). Otherwise SDPA, a tree
    or a few short ones at a time, so that no token pays for all others.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings leave float32
    if layout.masks is None:
        # a prompt's keys serve all responses: gathered in float32, so that their gradients are added up in it
        k, v = (x[0].transpose(0, 1).float().index_select(0, layout.kv_index).to(x.dtype) for x in (key, value))
        out = flash_attn_varlen_func(query[0].transpose(0, 1), k, v, layout.cu_q, layout.cu_k, layout.max_q,
                                     layout.max_k, softmax_scale=scaling, causal=True)  # (T, H, D)
        return out[None], None
    if query.is_cuda:  # its memory-efficient kernel, which takes float32 and masks, takes no grouped heads
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    # split, not slices: the backward pass of a slice fills and adds a tensor of all T tokens, that of a split is one cat
    lengths = [b - a for a, b, _ in layout.spans]
    out = []
    for (a, b, _), mask, q, k, v in zip(layout.spans, layout.masks, *(x.split(lengths, dim=2) for x in (query, key, value))):
        if b == layout.prefix:
            prefix = k, v
        elif layout.prefix:
            k, v = (torch.cat(pair, dim=2) for pair in zip(prefix, (k, v)))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling,
                                                  enable_gqa=True))
    return torch.cat(out, dim=2).transpose(1, 2), None  # (1, T, H, D)


AttentionInterface.register("packed", packed_attention)
transformers_logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# log-probabilities

def head_logits(h, w, dtype):
    """h W^T (n, V) in `dtype`; of bfloat16 on CUDA the products' float32 sums, not rounded between."""
    return torch.mm(h, w.T, out_dtype=dtype) if h.is_cuda and h.dtype != dtype else (h @ w.T).to(dtype)


class HeadLogprob(torch.autograd.Function):
    """log softmax(h W^T / temperature)[target], the entropy and the logsumexp, `chunk` rows at a time, in float32.

    Logits exist for one chunk only; the backward pass computes them again. Memory: chunk x V, and V x d for W's gradient.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, temperature, chunk, dtype):
        h, w = h.to(dtype), weight.to(dtype)
        logp = torch.empty(len(h), dtype=torch.promote_types(dtype, torch.float32), device=h.device)
        lse, entropy = torch.empty_like(logp), torch.empty_like(logp)
        for a in range(0, len(h), chunk):
            rows = slice(a, a + chunk)
            logits = head_logits(h[rows], w, logp.dtype).div_(temperature)  # (chunk, V)
            lse[rows] = logits.logsumexp(-1)
            logps = logits.sub_(lse[rows, None])
            logp[rows] = logps.gather(-1, targets[rows, None])[:, 0]
            entropy[rows] = -torch.linalg.vecdot(logps.exp(), logps)
        ctx.save_for_backward(h, weight, targets, lse)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy, lse)
        return logp, entropy, lse

    @staticmethod
    def backward(ctx, grad, *_):
        h, weight, targets, lse = ctx.saved_tensors
        w = weight.to(h.dtype)
        dh, dw = torch.empty_like(h), torch.zeros_like(weight, dtype=lse.dtype)
        for a in range(0, len(h), ctx.chunk):
            rows = slice(a, a + ctx.chunk)
            logits = head_logits(h[rows], w, lse.dtype).div_(ctx.temperature)
            d = logits.sub_(lse[rows, None]).exp_().mul_(-grad[rows, None])  # -grad * softmax
            d.scatter_add_(-1, targets[rows, None], grad[rows, None])        # grad * (onehot - softmax)
            d = d.div_(ctx.temperature).to(h.dtype)
            dh[rows] = d @ w
            dw.addmm_(d.T, h[rows]) if d.dtype == dw.dtype else dw.add_(d.T @ h[rows])
        return dh, dw.to(weight.dtype), None, None, None, None


class Policy(torch.nn.Module):
    """A causal LM whose forward returns response log-probabilities: inside it, because DDP and FSDP2 hook the root's."""

    def __init__(self, model, compute_dtype, head_chunk=512):
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype  # of matrix products; parameters keep their own
        self.head_chunk = head_chunk        # rows of logits that exist at a time

    def forward(self, batch, temperature, states=False):
        """batch: MicroBatch. Returns (logp, entropy), each (N,): of the sampled tokens and of their distributions,
        both at `temperature`; entropy carries no gradient. states: also the hidden states that predict the tokens,
        (N, d), and logsumexp(logits / temperature), (N,), both detached: what advantages.influence needs."""
        if batch.masks is None and not (batch.input_ids.is_cuda and self.compute_dtype == torch.bfloat16):
            batch.masks = tree_masks(batch)  # for all layers and passes; there is no varlen kernel for float32, nor on a CPU
        with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16,
                            enabled=self.compute_dtype == torch.bfloat16):
            hidden = self.model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
                                           layout=batch).last_hidden_state[0]  # (T, d)
        hidden = hidden.index_select(0, batch.predicts)  # (N, d); the gradient of hidden[...] adds up in no fixed order
        head = self.model.get_output_embeddings().weight  # (V, d)
        logp, entropy, lse = HeadLogprob.apply(hidden, head, batch.targets, temperature, self.head_chunk,
                                               self.compute_dtype)
        return (logp, entropy, hidden.detach(), lse) if states else (logp, entropy)


def check_model(path, config):
    """End the program if the packed forward pass would not give a model's own log-probabilities. config: a Hugging Face one."""
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    scaled = [k for k in ("final_logit_softcapping", "logits_scaling", "logit_scale") if getattr(config, k, None) not in (None, 1)]
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(config).get_output_embeddings()
    more = scaled + ["sliding_window"] * bool(sliding) + ["a bias of the head"] * (getattr(head, "bias", None) is not None)
    if more:
        die(f"model: {path}: models with {', '.join(more)} are not supported by the packed forward pass")


def load_policy(path, compute_dtype, device, activation_checkpointing=False, param_dtype=torch.float32, compile=False):
    """Load a Hugging Face folder or hub id as a Policy with parameters of `param_dtype` on `device`; one that is to be
    sharded is better loaded on the CPU, see parallelize. path may be a Hugging Face config: random weights.

    compile: True, or a backend of torch.compile; the layers are compiled, one by one, their attention is not.
    """
    load = AutoModelForCausalLM.from_config if isinstance(path, PretrainedConfig) else AutoModelForCausalLM.from_pretrained
    model = load(path, dtype=param_dtype, attn_implementation="packed")
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.base_model.layers if compile else ():
        layer.compile(dynamic=True, backend="inductor" if compile is True else compile)
    return Policy(model.to(device), compute_dtype)


def parallelize(policy, parallel, device="cpu", frozen=False):
    """Wrap for training: "ddp" (a copy a rank) or "fsdp" (FSDP2, parameters sharded). Call the result like a Policy.

    Gradients come out averaged over ranks, so a loss that is a sum over all ranks is to be multiplied by the world size.
    fsdp moves a policy that is on the CPU to `device` layer by layer, so that no GPU ever holds all of it. frozen: it has no
    backward pass, after which the embedding and the head would be sharded again, so they are after the forward pass.
    """
    if parallel == "ddp":
        if dist.get_world_size() == 1:
            return policy
        # no buffer ever changes; gradients live in the buckets that are reduced, not beside them: see optimizer_step
        return torch.nn.parallel.DistributedDataParallel(policy, forward_sync_buffers=False, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    mixed = MixedPrecisionPolicy(param_dtype=policy.compute_dtype, reduce_dtype=torch.float32)
    for layer in policy.model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    return fully_shard(policy, mesh=mesh, mp_policy=mixed, **(dict(reshard_after_forward=True) if frozen else {}))


def make_optimizer(policy, name, learning_rate, adam_betas, weight_decay):
    """AdamW ("adamw") or plain gradient descent ("sgd") over a policy's parameters."""
    if name == "sgd":
        return torch.optim.SGD(policy.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
    return torch.optim.AdamW(policy.parameters(), lr=learning_rate, betas=adam_betas, weight_decay=weight_decay, fused=True)


def optimizer_step(policy, optimizer, grad_clip, keep=False):
    """Clip the gradients to the global norm grad_clip (0: not), update, clear them. Returns the norm before, a tensor ().

    keep: set them to 0 where they are, in DDP's buckets; new ones would stand beside those in every later micro-batch."""
    norm = full(torch.nn.utils.clip_grad_norm_(policy.parameters(), grad_clip or torch.inf))
    optimizer.step()
    optimizer.zero_grad(set_to_none=not keep)
    return norm


def full(tensor):
    """The whole tensor of an FSDP shard (all ranks call together), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fingerprint(model):
    """A hash of the weights, the same on all ranks, which call together: of some 64 numbers of every parameter (shard)."""
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    own = b"".join(x.detach().flatten()[::max(1, x.numel() // 64)].float().cpu().numpy().tobytes() for x in shards)
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(own).hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints: out_dir/step_000010/ is a Hugging Face folder, with the trainer's state beside the weights. Which there are,
# and which are whole: runs.py

def save_checkpoint(out_dir, step, policy, tokenizer, optimizer, state, config, keep):
    """Write out_dir/step_NNNNNN aside and rename it, then delete all but the newest `keep`. All ranks call together.

    state: JSON-able trainer state (step, data position); config: the resolved settings.
    """
    final = os.path.join(out_dir, f"step_{step:06d}")
    def whole(x):  # all ranks gather, the first keeps it
        x = full(x.detach())
        return x.cpu() if is_rank0() else None

    weights = {name: whole(p) for name, p in policy.model.named_parameters()}
    moments = {i: {k: whole(v) for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    if is_rank0():
        tmp = final + ".tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        policy.model.save_pretrained(tmp, state_dict=weights)
        tokenizer.save_pretrained(tmp)
        torch.save(moments, os.path.join(tmp, "optimizer.pt"))
        write_json(os.path.join(tmp, "run_config.json"), config)
        sizes = {name: os.path.getsize(os.path.join(tmp, name)) for name in sorted(os.listdir(tmp))}
        write_json(os.path.join(tmp, "trainer_state.json"), dict(state, files=sizes))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(tmp, final)
        prune(out_dir, final, keep)
    dist.barrier()


def load_optimizer(path, optimizer):
    """Restore optimizer state saved by save_checkpoint, sharded like the parameters if they are."""
    moments = torch.load(os.path.join(path, "optimizer.pt"), map_location="cpu", weights_only=True, mmap=True)
    state = optimizer.state_dict()
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for i, saved in moments.items():
        p = params[i]
        state["state"][i] = {k: distribute_tensor(v.to(p.device), p.device_mesh, p.placements)
                             if isinstance(p, DTensor) and v.shape == p.shape and v.dim() else v
                             for k, v in saved.items()}
    optimizer.load_state_dict(state)


def convert_gguf(package, file, out_dir):
    """Turn a GGUF file inside an installed Python package into an ordinary Hugging Face folder, in float32, once."""
    import importlib.util

    from transformers import AutoTokenizer, GgufConfig

    if os.path.exists(os.path.join(out_dir, "config.json")):
        return
    source = importlib.util.find_spec(package).submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32,
                                                 quantization_config=GgufConfig(dequantize=True))
    tmp = out_dir + ".tmp"
    model.save_pretrained(tmp)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(tmp)
    os.rename(tmp, out_dir)


# ---------------------------------------------------------------------------------------------------------------------
# what it takes of a GPU, and what it gets out of it

def estimate_memory(config, ranks=1, parallel="ddp", param_bytes=4, compute_bytes=2, reference=None, tokens=8192,
                    activation_checkpointing=False, head_chunk=512):
    """What training takes of one GPU, GiB by part, counted from the shapes of a Hugging Face config; no model is made.

    reference: None, "resident", "offload" or "shard"; tokens: packed tokens of a micro-batch. "held" is what stays while
    vLLM samples, "peak" what a micro-batch and its update take in all; the CUDA context and fragmentation come on top.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    params, layers, d = sum(p.numel() for p in model.parameters()), config.num_hidden_layers, config.hidden_size
    heads, kv_heads, mlp = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or d // heads
    head = config.vocab_size * d
    root = head if config.tie_word_embeddings else 2 * head  # parameters: the embedding, and a head of its own
    c, stream = compute_bytes, compute_bytes if parallel == "fsdp" else param_bytes  # autocast keeps the residual stream's type
    # kept for the backward pass, bytes a token of one layer: two norms (their input and result), casts to the compute type
    # for q, k, v, gate and up, three forms of q and k, v and the gathered keys and values, attention's result, four of the MLP
    casts = 5 * d * c if c != stream else 0
    layer = 4 * d * stream + casts + c * head_dim * (4 * heads + 6 * kv_heads) + 4 * c * mlp
    shards = ranks if parallel == "fsdp" else 1
    out = {
        "weights": params * param_bytes / shards, "optimizer": 2 * params * param_bytes / shards,
        "reference": params * c / (ranks if reference == "shard" else 1) if reference else 0,
        "gradients": params * param_bytes / shards,
        # whole weights and gradients of what FSDP2 has gathered, the root and two layers; or autocast's copies
        "copies": (root + 2 * (params - root) / layers) * (c + param_bytes) if shards > 1 else params * c if c != param_bytes else 0,
        "activations": tokens * (layers * d * stream + layer if activation_checkpointing else layers * layer),
        "head": 2 * head_chunk * config.vocab_size * 4 + head * (4 + 3 * c)}
    held = out["weights"] + out["optimizer"] + (out["reference"] if reference != "offload" else 0)
    held += out["gradients"] if parallel == "ddp" and ranks > 1 else 0  # DDP's buckets stay
    held += 2 * head * param_bytes if shards > 1 else 0  # a checkpoint gathers the embedding, whole
    # an offloaded reference model is here for its own pass, when there are no gradients and activations yet
    peak = sum(out.values()) - (out["reference"] if reference == "offload" else 0)
    return {k: v / 2**30 for k, v in (out | {"held": held, "peak": peak}).items()}


def vllm_share(device, sleep_level, memory):
    """gpu_memory_utilization: the share of a GPU that training, which takes `memory` (estimate_memory), leaves for vLLM; the
    end of the program if that is too little. sleep_level 0: vLLM keeps its memory while training."""
    card = torch.cuda.get_device_properties(device).total_memory / 2**30
    left = card - 3 - memory["held" if sleep_level else "peak"]  # 3 GiB: CUDA context, vLLM's graphs, fragments
    print0(f"memory, GiB of {card:.0f}: trainer {memory['held']:.1f}, in an update {memory['peak']:.1f}; vLLM {left:.1f}")
    if left < 1 or memory["peak"] > card - 3:
        die(f"tokens_per_micro_batch, parallel, activation_checkpointing, reference: of the GPU's {card:.0f} GiB an update needs "
            f"about {memory['peak']:.0f}, and {memory['held']:.0f} stay while vLLM samples: " + ", ".join(
                f"{k} {v:.1f}" for k, v in memory.items() if k not in ("held", "peak")))
    return min(0.9, left / card)


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
              "4090": 165e12}  # dense bf16, the vendors' figures


def mfu(model, tokens, seconds):
    """Model FLOPs utilisation of one GPU: 6 FLOPs a parameter and packed token, attention's own not counted, over the
    card's bf16 peak; nan for a card not in PEAK_FLOPS. tokens: packed tokens of this rank's updates."""
    name = torch.cuda.get_device_name()
    peak = next((flops for card, flops in PEAK_FLOPS.items() if card in name), float("nan"))
    return 6 * sum(p.numel() for p in model.parameters()) * tokens / seconds / peak
