"""Do the configs hold what the papers state, and which GPU does each fit? make configs-check

Prints the table of docs/GPU.md; exit code 1 if a config differs from its paper. Hyperparameters:
arXiv 2505.18830 (table of section 5 and appendix) and 2512.06337. Shapes: the models' published
config.json, since the hub may be out of reach; parameters are counted from them.
"""
import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from transformers import Qwen2Config

from configurator import configure
from memory import held_memory

ROOT = Path(__file__).resolve().parent.parent
# GiB that the driver shows: of an L4 or 4090, L40S, A100 or H100, H200
CARDS = {"24 GB": 23.6, "48 GB": 44.5, "80 GB": 79.2, "141 GB": 139.8}
RESERVE = 3  # GiB, as in memory.vllm_share


def shape(width, depth, heads, kv_heads, mlp, vocab=151936, tied=True):
    """A Qwen2.5 model's config."""
    return Qwen2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp, vocab_size=vocab,
        tie_word_embeddings=tied)


QWEN_05B = shape(896, 24, 14, 2, 4864), 494_032_768
QWEN_15B = shape(1536, 28, 12, 2, 8960), 1_543_714_304
QWEN_3B = shape(2048, 36, 16, 2, 11008), 3_085_938_688
QWEN_7B = shape(3584, 28, 28, 4, 18944, 152064, tied=False), 7_615_616_512
DEEPSEEK = shape(1536, 28, 12, 2, 8960, tied=False), 1_777_088_000

NTHR = dict(
    variant="nthr", nthr_eta=None, nthr_beta=1.0, temperature=1.0, learning_rate=1e-6,
    prompts_per_step=256, prompts_per_update=64, kl_coef=1e-4, clip_low=0.2, clip_high=0.2,
    dynamic_sampling=True, advantage_norm="std", loss_norm="group", dataset="math")
DAGRPO = dict(
    variant="dagrpo", delta=3.0, anchors=1, advantage_norm="mean",
    loss_norm="constant", kl_coef=0.0, group_size=8, prompts_per_step=128, prompts_per_update=64,
    learning_rate=1e-6, temperature=1.0, judge_model="gpt-4o", dataset="openr1-math-46k-8192")
# file: (GPUs in its command, (shape, parameters), what the paper states); the rest is chosen
PAPER = {
    "nthr_math": (4, QWEN_15B, NTHR | dict(
        model="Qwen/Qwen2.5-Math-1.5B", max_steps=40, max_response_tokens=3072)),
    "nthr_deepscaler": (4, QWEN_15B, NTHR | dict(
        model="Qwen/Qwen2.5-Math-1.5B", dataset="deepscaler", max_steps=45,
        max_response_tokens=3072)),
    "nthr_05b": (2, QWEN_05B, NTHR | dict(
        model="Qwen/Qwen2.5-0.5B-Instruct", max_steps=105, max_response_tokens=2500,
        learning_rate=5e-7, prompts_per_step=32, prompts_per_update=16)),
    "nthr_15b": (4, QWEN_15B, NTHR | dict(
        model="Qwen/Qwen2.5-1.5B-Instruct", max_steps=40, max_response_tokens=4000)),
    "nthr_3b": (4, QWEN_3B, NTHR | dict(
        model="Qwen/Qwen2.5-3B", max_steps=40, max_response_tokens=4000)),
    # learning rate and data set are not stated: those of the other 1.5B rows
    "nthr_deepseek": (4, DEEPSEEK, NTHR | dict(
        model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", max_steps=35, temperature=0.6,
        nthr_beta=0.0, max_response_tokens=4000)),
    # of the paper's model LUFFY's form, with a context of 16k
    "dagrpo_math": (8, QWEN_7B, DAGRPO | dict(max_steps=500, max_response_tokens=8192)),
}


def load(name):
    """The settings of train.py under a config file."""
    source = (ROOT / "train.py").read_text()
    scope = {"__doc__": ""}
    # the settings' own lines
    exec(source[source.index("# model and data"):source.index("config = configure(")], scope)
    settings = {k: v for k, v in scope.items() if not k.startswith("__")}
    with contextlib.redirect_stdout(io.StringIO()):
        return configure(settings, [str(ROOT / f"config/{name}.py")])


def update_memory(config, params, ranks=1, parallel="ddp", compute_bytes=2, tokens=8192,
                  activation_checkpointing=False, lora_rank=0, head_chunk=1024):
    """What an update takes of one GPU beside weights, moments and reference, GiB by part.
    tokens: packed tokens of a micro-batch; CUDA's context and fragments come on top."""
    layers, d = config.num_hidden_layers, config.hidden_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or d // heads
    head = config.vocab_size * d
    root = head if config.tie_word_embeddings else 2 * head  # embedding and head
    is_sharded = parallel == "fsdp"

    # bytes a token that one layer keeps: two norms (input and result), casts for q, k, v, gate and
    # up, three forms of q and k, v and the gathered keys and values, attention's result, four of
    # the MLP. Autocast keeps the residual stream's type
    stream = compute_bytes if is_sharded or lora_rank else 4
    casts = 5 * d if compute_bytes != stream else 0
    products = casts + head_dim * (4 * heads + 6 * kv_heads) + 4 * config.intermediate_size
    layer = 4 * d * stream + products * compute_bytes
    kept = layers * d * stream + layer if activation_checkpointing else layers * layer
    copies = params * compute_bytes if compute_bytes != 4 and not lora_rank else 0
    gradient = 0 if lora_rank else 4  # bytes; an adapter's is small
    if is_sharded:  # whole, for a time: the root and two layers
        copies = (root + 2 * (params - root) / layers) * (compute_bytes + gradient)
    of_head = 0 if lora_rank else head * (4 + 3 * compute_bytes)
    out = {
        "gradients": gradient * params / (ranks if is_sharded else 1),
        "copies": copies,
        "activations": tokens * kept,
        "head": 2 * head_chunk * config.vocab_size * 4 + of_head,
    }
    return {part: x / 2**30 for part, x in out.items()}


def fits(settings, ranks, model, params, lora_rank=0):
    """({"held": GiB while vLLM samples, "peak": in an update}, {card: GiB left for vLLM's keys,
    values and activations, or None}). None: an update does not fit, or not one group at its
    longest."""
    parallel = settings["parallel"]
    parts = held_memory(model, ranks, parallel, 2, settings["kl_coef"] > 0, lora_rank)
    shards = ranks if parallel == "fsdp" else 1
    assert lora_rank or round(parts["weights"] * 2**30 / 4 * shards) == params
    update = update_memory(model, params, ranks, parallel, 2, settings["tokens_per_micro_batch"],
                           settings["activation_checkpointing"], lora_rank)
    stays = sum(parts[part] for part in ("weights", "moments", "reference"))
    memory = {"held": sum(parts.values()), "peak": stays + sum(update.values())}
    kv_width = model.num_key_value_heads * model.hidden_size // model.num_attention_heads
    token = 2 * 2 * model.num_hidden_layers * kv_width  # bytes of keys and values
    longest = settings["max_response_tokens"] + 512
    group = settings["group_size"] * longest * token / 2**30
    cards = {}
    for card, size in CARDS.items():
        left = min(0.9 * size, size - RESERVE - memory["held"]) - 2 * params / 2**30
        fits = left > group and memory["peak"] < size - RESERVE
        cards[card] = left if fits else None
    return memory, cards


def check(lora_rank=0):
    """[(file, differences from the paper, memory, cards, GPUs)] of the papers' runs: see fits."""
    rows = []
    for name, (ranks, model, paper) in PAPER.items():
        settings = load(name)
        wrong = {k: (settings[k], v) for k, v in paper.items() if settings[k] != v}
        rows.append((name, wrong, *fits(settings, ranks, *model, lora_rank), ranks))
    return rows


if __name__ == "__main__":
    for lora_rank in (0, 16):
        head = [f"with --lora_rank={lora_rank}" if lora_rank else "config", "GPUs",
                "trainer between updates, in one", *CARDS]
        print(f"\n| {' | '.join(head)} |")
        print("|---" * len(head) + "|")
        rows = check(lora_rank)
        for name, wrong, memory, cards, ranks in rows:
            cells = ["no" if left is None else f"yes, {left:.0f}" for left in cards.values()]
            print(f"| `{name}.py` | {ranks} | {memory['held']:.1f}, {memory['peak']:.1f} | "
                  f"{' | '.join(cells)} |")
    for name, wrong, *_ in rows:
        for key, (ours, paper) in wrong.items():
            print(f"error: config/{name}.py: {key} is {ours!r}, in the paper {paper!r}",
                  file=sys.stderr)
    sys.exit(any(wrong for _, wrong, *_ in rows))
