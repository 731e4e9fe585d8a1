"""The trainer's model: process group, packing, log-probabilities, DDP and FSDP2, optimizer.

Packing. The responses of some groups become micro-batches of trees: a prompt once, then the
responses that share it; what all prompts of a micro-batch begin with (few-shot examples) stands
before them, once. Tokens see what leads to them, nothing else, and position ids count along that
way: the numbers are those of each prompt + response alone, nothing is padded or computed twice.

    prompts [7 8 9] with responses [1 2] and [3], [7 8 6] with response [4]:
    input_ids  7 8 | 9 | 1 2 | 3 | 6 | 4    six segments: the common prefix, a prompt's rest, ...
    position   0 1   2   3 4   3   2   3
    predicts         2 3 2 6                the states that predict response tokens 1, 2, 3, 4
    targets          1 2 3 4"""
import ctypes
import itertools
import os
import signal
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention.varlen import varlen_attn
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface, AutoModelForCausalLM, logging

from configurator import die
from data import Group, of_ranks


def setup_distributed():
    """Join torchrun's process group, or make one of a single rank. Returns this rank's device."""
    libc = ctypes.CDLL(None)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1",
                          MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # any that is free
    else:
        libc.prctl(1, signal.SIGTERM)  # ranks of a torchrun that is killed end, too
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:  # glibc keeps what is freed: large blocks need not be cleared by the system again
        libc.mallopt(-4, 0)          # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if not dist.is_initialized():
        dist.init_process_group(backend)
    return device


# ---- packing: groups -> units -> micro-batches ---------------------------------------------------

@dataclass
class MicroBatch:
    """One forward pass: T packed tokens, n of them of its B responses. Fillers have n = 0."""
    input_ids: torch.Tensor     # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64
    predicts: torch.Tensor      # (n,) int64, index into T of the state that predicts each token
    targets: torch.Tensor       # (n,) int64, the tokens themselves
    response: torch.Tensor      # (n,) int64, which of the B responses each belongs to
    rollout_logp: torch.Tensor  # (n,) float32, what vLLM says; 0 for anchors
    weight: torch.Tensor        # (n,) float32, in the loss
    is_anchor: torch.Tensor     # (n,) bool, of a demonstration: not sampled
    right: torch.Tensor         # (B,) bool, rollouts that are right; demonstrations are none
    # attention: S segments, each sees what leads to it and itself, causally
    kv_index: torch.Tensor      # (K,) int64, the keys of all segments one after the other
    cu_q: torch.Tensor          # (S+1,) int32, where each segment starts in T
    cu_k: torch.Tensor          # (S+1,) int32, where its keys start in K
    max_q: int
    max_k: int
    prefix: int                 # tokens of the common prefix, the first of T
    spans: list                 # tokens of each part of T: the prefix, trees, short ones together
    segment: torch.Tensor       # (2, T) int32, each token's segment, and its prompt's
    update_tokens: int          # response tokens of the update, on all ranks
    # from the policy that sampled, before the weights move: train.ask_old_policy
    old_logp: torch.Tensor = None   # (n,)
    advantage: torch.Tensor = None  # (n,)
    ref_logp: torch.Tensor = None   # (n,) of the reference model, with a KL term only

    def to(self, device):
        """The same on a device."""
        return replace(self, **{name: x.to(device) for name, x in vars(self).items()
                                if isinstance(x, torch.Tensor)})


@dataclass
class Unit:
    """Whole groups: one micro-batch, or several if a single group is larger than the budget."""
    groups: list   # of data.Group
    batches: list  # of MicroBatch, their tokens in the order of the groups'
    early: bool    # the old policy is asked in a pass of its own, before the weights move

    def set_old(self, logp, advantage):
        """Deal both (n,), of all tokens of the unit, out to its micro-batches."""
        sizes = [len(batch.targets) for batch in self.batches]
        for batch, *of_batch in zip(self.batches, logp.split(sizes), advantage.split(sizes)):
            batch.old_logp, batch.advantage = of_batch


def pack_units(groups, tokens_per_micro_batch, device="cpu"):
    """Groups as packed units, in their order: a list of Unit.
    A group is cut only if it is over the budget (packed tokens) by itself, and then between
    responses; a response that is over it makes a micro-batch alone."""
    prefix = common_prefix([g.prompt for g in groups])
    sizes = [len(g.prompt) - prefix + sum(g.lengths) for g in groups]
    units = []
    for first, stop in portions(sizes, tokens_per_micro_batch - prefix):
        whole = groups[first:stop]
        parts = [whole]
        if len(whole) == 1:
            [group] = whole
            room = tokens_per_micro_batch - len(group.prompt)
            parts = [[group.part(*ends)] for ends in portions(group.lengths, room)]
        units.append(Unit(whole, [pack(p).to(device) for p in parts], early=len(parts) > 1))
    return units


def portions(sizes, room):
    """Items of some sizes in runs that fit into `room`, one at least: (first, stop or None)s."""
    starts, used = [], np.inf
    for i, size in enumerate(sizes):
        if used + size > room:
            starts.append(i)
            used = 0
        used += size
    return zip(starts, [*starts[1:], None])


def pack_update(groups, tokens_per_micro_batch, moved, device="cpu"):
    """This rank's share of an update's groups, which all ranks hold: a list of Unit, never empty.
    moved: the weights will have moved when its turn comes, so all units are early. FSDP wants
    equally many passes on all ranks, before the weights move and after: fillers see to it."""
    units = pack_units(deal(groups), tokens_per_micro_batch, device)
    passes = [sum(len(u.batches) for u in units if u.early == early) for early in (True, False)]
    most = np.max([(0, 1), *of_ranks(passes)], axis=0)  # of both kinds; one at least is not early
    for early, missing in zip((True, False), most - passes):
        units += [Unit([], [pack([NOTHING]).to(device)], early) for _ in range(missing)]
    for unit in units:
        unit.early |= moved
    return units


NOTHING = Group({}, np.zeros(2), [], [], [], np.zeros(0))  # a filler; 1 token compiles anew


def deal(groups):
    """This rank's share of groups, in their order. Each rank gets about as many tokens."""
    sizes = np.array([len(g.prompt) + sum(g.lengths) for g in groups])
    load, owner = np.zeros(dist.get_world_size()), {}
    for i in np.argsort(-sizes, kind="stable"):
        owner[i] = load.argmin()
        load[owner[i]] += sizes[i]
    return [group for i, group in enumerate(groups) if owner[i] == dist.get_rank()]


def common_prefix(prompts):
    """How many tokens all prompts begin with, leaving each one of its own; 0 for one prompt."""
    if len(prompts) == 1:
        return 0
    return len(os.path.commonprefix([p[:-1].tolist() for p in prompts]))  # it takes lists, too


SDPA_TOKENS = 256  # shorter trees share a call of SDPA: fewer calls for a little more work


def pack(groups):
    """Pack groups (or parts of them) into one MicroBatch, on the host. See the layout above."""
    prefix = common_prefix([g.prompt for g in groups])
    ids, positions, predicts = [], [], []
    parents, keys, spans = [], [], []  # parents: the number of each segment's prompt's segment

    def add(tokens, path, parent):
        """Append a segment whose tokens see those at `path` (indices into T), then themselves."""
        at = sum(map(len, ids))
        seen = np.concatenate([path, np.arange(at, at + len(tokens))])
        ids.append(tokens)
        positions.append(np.arange(len(path), len(seen)))
        keys.append(seen)
        parents.append(parent)
        return seen

    before = np.arange(0)
    if prefix:
        before = add(groups[0].prompt[:prefix], before, 0)
        spans.append(prefix)
    for group in groups:
        root = len(parents)
        path = add(group.prompt[prefix:], before, root)
        for tokens in group.responses:
            seen = add(tokens, path, root)
            predicts.append(seen[len(path) - 1:-1])
        size = sum(map(len, ids)) - sum(spans)
        if size >= SDPA_TOKENS or group is groups[-1]:
            spans.append(size)

    response = torch.repeat_interleave(joined([g.lengths for g in groups]))  # of each token
    sizes = [*map(len, ids)]
    return MicroBatch(
        input_ids=joined(ids)[None], position_ids=joined(positions)[None],
        predicts=joined(predicts), kv_index=joined(keys),
        targets=joined([r for g in groups for r in g.responses]),
        rollout_logp=joined([x for g in groups for x in g.rollout_logp], torch.float32),
        weight=joined([g.weight for g in groups], torch.float32)[response],
        is_anchor=joined([g.is_anchor for g in groups], torch.bool)[response], response=response,
        right=joined([g.right for g in groups], torch.bool),
        cu_q=joined([[0], np.cumsum(sizes)], torch.int32),
        cu_k=joined([[0], np.cumsum([len(k) for k in keys])], torch.int32),
        max_q=max(sizes), max_k=max(map(len, keys)), prefix=prefix, spans=spans,
        segment=torch.from_numpy(np.repeat([range(len(sizes)), parents], sizes, axis=1)).int(),
        update_tokens=groups[0].update_tokens)


def joined(arrays, dtype=torch.int64):
    """Arrays, of which there may be none, one after the other as a tensor."""
    return torch.from_numpy(np.concatenate([[], *arrays])).to(dtype)


# ---- attention -----------------------------------------------------------------------------------

def tree_masks(batch):
    """What a span's tokens see of the prefix and itself: bool (tokens, prefix + tokens) a span.
    A token sees its own segment and its prompt's, not the future, and all of the prefix. None for
    the prefix itself, which is plain causal."""
    masks = []
    for own, prompt in batch.segment.split(batch.spans, dim=1):
        sees = ((own[:, None] == own) | (prompt[:, None] == own)).tril()
        masks.append(F.pad(sees, (batch.prefix, 0), value=True))
    if batch.prefix:
        masks[0] = None
    return masks


def packed_attention(module, query, key, value, attention_mask, scaling=None, layout=None,
                     masks=None, **kwargs):
    """transformers' attention hook. query (1, H, T, D), key and value (1, H_kv, T, D).
    Without masks (bfloat16 on CUDA) one varlen call, in which each segment's queries meet the keys
    that lead to it and its own; the causal mask is aligned to the last key. With tree_masks SDPA,
    a tree or a few short ones at a time, so that no token is masked against all others."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotary's float32
    if masks is None:
        # a prompt's keys serve all responses: gathered in float32, their gradients add up in it
        k, v = (x[0].transpose(0, 1).float().index_select(0, layout.kv_index).to(x.dtype)
                for x in (key, value))  # (K, H_kv, D)
        q = query[0].transpose(0, 1)  # (T, H, D)
        out = varlen_attn(q, k, v, layout.cu_q, layout.cu_k, layout.max_q, layout.max_k,
                          scale=scaling, window_size=(-1, 0), **GROUPED)  # causal
        return out[None], None
    if query.is_cuda:  # its memory-efficient kernel takes float32 and masks, but no grouped heads
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    # split, not slices: the backward pass of a slice fills a tensor of all T tokens
    out = []
    for mask, q, k, v in zip(masks, *(x.split(layout.spans, dim=2) for x in (query, key, value))):
        if mask is None:
            prefix = k, v
        elif layout.prefix:
            k, v = (torch.cat(pair, dim=2) for pair in zip(prefix, (k, v)))
        out.append(F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True))
    return torch.cat(out, dim=2).transpose(1, 2), None  # (1, T, H, D)


GROUPED = {} if torch.__version__ < "2.12" else dict(enable_gqa=True)  # torch 2.11 need not be told
AttentionInterface.register("packed", packed_attention)
logging.disable_progress_bar()


# ---- log-probabilities ---------------------------------------------------------------------------

def head_logits(h, w, temperature):
    """h W^T / temperature (n, V); of bfloat16 in float32, on CUDA the sums, not rounded between."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    of_sums = h.is_cuda and h.dtype != dtype
    logits = torch.mm(h, w.T, out_dtype=dtype) if of_sums else (h @ w.T).to(dtype)
    return logits.div_(temperature)


# on a GPU what stands between two matrix products is one kernel
fused = torch.compile(dynamic=True, disable=not torch.cuda.is_available())


@fused
def head_rows(h, w, targets, temperature):
    """(logp, entropy, logsumexp), (n,) each, of h (n, d)."""
    logits = head_logits(h, w, temperature)
    lse = logits.logsumexp(-1)
    logps = logits.sub_(lse[:, None])
    return logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1), lse


@fused
def head_errors(h, w, lse, grad, temperature):
    """grad x softmax(logits), (n, V), h's dtype."""
    logits = head_logits(h, w, temperature)
    return logits.sub_(lse[:, None]).exp_().mul_(grad[:, None]).to(h.dtype)


class HeadLogprob(torch.autograd.Function):
    """log softmax(h W^T / temperature)[target], entropy and logsumexp, in float32.
    Logits exist for `chunk` rows at a time; the backward pass computes them again."""

    @staticmethod
    def forward(ctx, h, weight, targets, temperature, chunk=1024):
        w = weight.to(h.dtype)
        parts = [head_rows(x, w, y, temperature)
                 for x, y in zip(h.split(chunk), targets.split(chunk))]
        logp, entropy, lse = map(torch.cat, zip(*parts))
        ctx.save_for_backward(h, weight, targets, logp, lse)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy, lse)
        return logp, entropy, lse

    @staticmethod
    def backward(ctx, grad, *_):
        h, weight, targets, logp, lse = ctx.saved_tensors
        w = weight.to(h.dtype)
        dh = torch.empty_like(h)
        dw = torch.zeros_like(weight, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        grad = -grad / ctx.temperature
        of_target = (grad * logp.expm1()).to(h.dtype)  # p - 1, not p
        of_rows = (h, lse, grad, targets[:, None], of_target[:, None], dh)
        # a filler has no rows, which some kernels refuse
        for x, lse_x, grad_x, y, error, dx in zip(
                *(t.split(ctx.chunk) for t in of_rows if len(h))):
            d = head_errors(x, w, lse_x, grad_x, ctx.temperature).scatter_(-1, y, error)
            torch.mm(d, w, out=dx)
            if dw is None:  # LoRA leaves the head alone
                continue
            if d.is_cuda and d.dtype != dw.dtype:
                torch.addmm(dw, d.T, x, dw.dtype, out=dw)
            else:
                dw.addmm_(d.T.to(dw.dtype), x.to(dw.dtype))
        return dh, dw, None, None, None


class Policy(torch.nn.Module):
    """A causal LM whose forward gives log-probabilities: DDP and FSDP2 hook the forward."""

    def __init__(self, model, compute_dtype):
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype  # of matrix products; parameters keep their own
        self.adapters = [layer for layer in model.modules() if hasattr(layer, "set_scale")]
        for layer in self.adapters:
            layer.cast_input_dtype_enabled = False  # autocast does it, without a copy in float32
        if compute_dtype == torch.bfloat16 and torch.cuda.is_available():
            for layer in model.base_model.layers:  # part of 46% more tokens/s: docs/GPU.md
                layer.compile(dynamic=True)

    def forward(self, batch, temperature, adapted=True):
        """(logp (n,), entropy (n,), h (n, d), lse (n,)) of a MicroBatch's response tokens: Old's.
        At `temperature`; only logp has a gradient. adapted: with LoRA's adapters, or without."""
        for layer in self.adapters:
            layer.set_scale("default", float(adapted))
        device = batch.input_ids.device.type
        low = self.compute_dtype == torch.bfloat16
        masks = None if low and device == "cuda" else tree_masks(batch)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=low):
            hidden = self.model.base_model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
                layout=batch, masks=masks).last_hidden_state[0]  # (T, d)
        # index_select: the gradient of hidden[...] adds up in no fixed order
        h = hidden.index_select(0, batch.predicts).to(self.compute_dtype)  # (n, d)
        weight = self.model.get_output_embeddings().weight  # (V, d)
        logp, entropy, lse = HeadLogprob.apply(h, weight, batch.targets, temperature)
        return logp, entropy, h.detach(), lse


def plain_weights(model):
    """(name, tensor) of a model's weights, LoRA's products added to those they adapt: whole, also
    of FSDP shards; all ranks call together."""
    for name, p in model.named_parameters():
        if ".lora_" in name:
            continue
        layer, _, kind = name.partition(".base_layer")
        weight = full(p.detach())
        if kind == ".weight":
            adapter = model.get_submodule(layer)
            adapter.set_scale("default", 1.0)  # a pass without adapters leaves 0
            weight = weight + full(adapter.get_delta_weight("default").detach())
        yield layer + kind, weight


def check_model(path, config):
    """End the program if the packed pass would not give this model's own log-probabilities."""
    odd = [k for k in ("final_logit_softcapping", "logits_scaling", "logit_scale")
           if getattr(config, k, None) not in (None, 1)]
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        odd.append("sliding_window")
    odd += {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}  # conv, mamba, ...
    with torch.device("meta"):
        head = AutoModelForCausalLM.from_config(config).get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        odd.append("a bias of the head")
    if os.path.isdir(path) and not any(f.endswith(".safetensors") for f in os.listdir(path)):
        odd.append("no *.safetensors")
    if odd:
        die(f"model: {path}: models with {', '.join(odd)} are not supported by the packed pass")


def load_policy(path, compute_dtype, device, activation_checkpointing=False,
                param_dtype=torch.float32, lora_rank=0, resumed=None):
    """A Hugging Face folder or hub id as a Policy, its parameters of `param_dtype` on `device`.
    lora_rank: of adapters in float32 on a frozen base in compute_dtype. resumed: a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=compute_dtype if lora_rank else param_dtype, attn_implementation="packed")
    if lora_rank:
        # alpha does not grow with the rank: nor does the best learning rate, then
        get_peft_model(model, LoraConfig(  # in place
            r=lora_rank, lora_alpha=32, target_modules="all-linear"))
        if resumed:
            adapters = torch.load(f"{resumed}/adapters.pt", weights_only=True)
            unknown = model.load_state_dict(adapters, strict=False).unexpected_keys
            assert not unknown, unknown
    if activation_checkpointing:
        model.gradient_checkpointing_enable()
    return Policy(model.to(device), compute_dtype)


# ---- over ranks, and the optimizer ---------------------------------------------------------------

def parallelize(policy, parallel, device):
    """Wrap for training: "ddp" (a copy a rank) or "fsdp" (FSDP2, sharded). Called like a Policy.
    Gradients come out averaged over ranks, so a loss that is a sum over ranks is to be multiplied
    by the world size. fsdp moves a policy from the CPU layer by layer: no GPU ever holds it."""
    frozen = not any(p.requires_grad for p in policy.parameters())
    if parallel == "ddp":
        if frozen or dist.get_world_size() == 1:
            return policy
        # no buffer ever changes; gradients live in the buckets that are reduced, not beside them
        return DistributedDataParallel(
            policy, forward_sync_buffers=False, gradient_as_bucket_view=True)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    mixed = MixedPrecisionPolicy(param_dtype=policy.compute_dtype, reduce_dtype=torch.float32)
    for layer in policy.model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    # without a backward pass the embedding and the head would stay whole
    return fully_shard(policy, mesh=mesh, mp_policy=mixed, reshard_after_forward=frozen)


def make_optimizer(policy, learning_rate, weight_decay=0.0):
    """AdamW over a policy's parameters, of which it skips those that have no gradient."""
    return torch.optim.AdamW(
        policy.parameters(), learning_rate, weight_decay=weight_decay, fused=True)


def optimizer_step(net, optimizer, grad_clip):
    """Clip gradients to the norm grad_clip (0: not), update, clear. Returns the norm before; one
    that is not finite, the same on all ranks, leaves weights and moments as they are."""
    norm = full(torch.nn.utils.clip_grad_norm_(net.parameters(), grad_clip or torch.inf))
    if norm.isfinite():
        optimizer.step()
    # a gradient made anew is outside DDP's buckets
    optimizer.zero_grad(set_to_none=not isinstance(net, DistributedDataParallel))
    return norm


def trained_tensors(optimizer):
    """This rank's part of the weights that are trained, then of their moments, if there are any."""
    params = [p for p in optimizer.param_groups[0]["params"] if p.requires_grad]
    moments = [x for p in params for x in optimizer.state[p].values()]
    return [(x.to_local() if hasattr(x, "to_local") else x).detach() for x in params + moments]


def snapshot(optimizer):
    """Copies of `trained_tensors` in host memory, for `put_back`."""
    return [x.to("cpu", copy=True) for x in trained_tensors(optimizer)]


def put_back(optimizer, before):
    """Make weights and moments what they were at a snapshot."""
    for x, kept in itertools.zip_longest(trained_tensors(optimizer), before):
        x.zero_() if kept is None else x.copy_(kept)  # moments begin as 0


def full(tensor):
    """The whole tensor of an FSDP shard (all ranks call together), or the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
