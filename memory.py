"""What training takes of a GPU, and what it leaves for vLLM."""
import torch
from transformers import AutoModelForCausalLM

from configurator import die, print0


def estimate_memory(config, ranks=1, parallel="ddp", compute_bytes=2,
                    reference=False, tokens=8192, activation_checkpointing=False, head_chunk=512):
    """What training takes of one GPU, GiB by part, counted from a Hugging Face config. reference:
    with a KL term; tokens: packed tokens of a micro-batch. "held" is what stays while vLLM samples,
    "peak" what a micro-batch and its update take; CUDA's context and fragments come on top."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    params = sum(p.numel() for p in model.parameters())
    layers, d = config.num_hidden_layers, config.hidden_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    head = config.vocab_size * d
    root = head if config.tie_word_embeddings else 2 * head  # embedding and head
    is_sharded = parallel == "fsdp"
    shards = ranks if is_sharded else 1

    # bytes a token that one layer keeps: two norms (input and result), casts for q, k, v, gate and
    # up, three forms of q and k, v and the gathered keys and values, attention's result, four of
    # the MLP. Autocast keeps the residual stream's type
    stream = compute_bytes if is_sharded else 4
    casts = 5 * d if compute_bytes != stream else 0
    products = casts + head_dim * (4 * heads + 6 * kv_heads) + 4 * config.intermediate_size
    layer = 4 * d * stream + products * compute_bytes
    kept = layers * d * stream + layer if activation_checkpointing else layers * layer

    out = {
        "weights": 4 * params / shards,
        "optimizer": 8 * params / shards,
        "reference": params * compute_bytes / shards if reference else 0,
        "gradients": 4 * params / shards,
        "copies": params * compute_bytes if compute_bytes != 4 else 0,
        "activations": tokens * kept,
        "head": 2 * head_chunk * config.vocab_size * 4 + head * (4 + 3 * compute_bytes),
    }
    out["held"] = out["weights"] + out["optimizer"] + out["reference"]
    if is_sharded:  # whole, for a time: the root and two layers; in a checkpoint the embedding
        out["copies"] = (root + 2 * (params - root) / layers) * (compute_bytes + 4)
        out["held"] += 8 * head
    elif ranks > 1:  # DDP's buckets stay
        out["held"] += out["gradients"]
    out["peak"] = sum(x for part, x in out.items() if part != "held")
    return {part: x / 2**30 for part, x in out.items()}


def vllm_share(device, memory):
    """The share of a GPU that estimate_memory leaves for vLLM; too little ends the program."""
    card = torch.cuda.get_device_properties(device).total_memory / 2**30
    usable = card - 3  # GiB: CUDA context, vLLM's graphs, fragments
    left = usable - memory["held"]
    parts = ", ".join(f"{part} {x:.1f}" for part, x in memory.items())
    print0(f"memory, GiB of {card:.0f}: vLLM {left:.1f}, training: {parts}")
    if left < 1 or memory["peak"] > usable:
        die("tokens_per_micro_batch, parallel, activation_checkpointing: training does not fit "
            f"the GPU's {card:.0f} GiB beside vLLM: {parts}")
    return min(0.9, left / card)
