"""What training holds of a GPU while vLLM samples, and what it leaves for vLLM."""
import torch
from transformers import AutoModelForCausalLM

from configurator import die, print0


def held_memory(config, ranks, parallel, compute_bytes, reference, lora_rank):
    """What training holds of one GPU while vLLM samples, GiB by part, from a Hugging Face config.
    reference: with a KL term. What an update takes beside it: bench/configs.py."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    frozen, trained = 0, model.num_parameters()
    if lora_rank:
        linear = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
        frozen, trained = trained, lora_rank * sum(sum(m.weight.shape) for m in linear)
    is_sharded = parallel == "fsdp"
    share = 1 / ranks if is_sharded else 1
    out = {"weights": (4 * trained + compute_bytes * frozen) * share,
           "moments": 8 * trained * share,
           "reference": compute_bytes * trained * share if reference and not lora_rank else 0,
           "DDP's buckets": 4 * trained if ranks > 1 and not is_sharded else 0,
           "embedding": 8 * config.vocab_size * config.hidden_size if is_sharded else 0}  # pushed
    return {part: x / 2**30 for part, x in out.items()}


def vllm_share(device, held):
    """The share of a GPU that is left for vLLM; too little ends the program."""
    card = torch.cuda.get_device_properties(device).total_memory / 2**30
    left = card - 3 - sum(held.values())  # GiB: CUDA context, communicators, fragments
    parts = ", ".join(f"{part} {x:.1f}" for part, x in held.items())
    print0(f"memory, GiB of {card:.0f}: vLLM {left:.1f}, training: {parts}")
    if left < 1:
        die(f"parallel: {parts} GiB leave nothing of the GPU's {card:.0f} to vLLM; try fsdp")
    return min(0.9, left / card)
