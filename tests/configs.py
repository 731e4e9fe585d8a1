"""make configs-check: does every config hold what its paper states, and which GPU does it fit. Prints the README's table.

Hyperparameters: arXiv 2505.18830 (table of section 5 and appendix) and arXiv 2512.06337. Shapes: the models' published
config.json, since the hub may be out of reach; parameters are counted from them. Memory: model_utils.estimate_memory.
"""
import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from transformers import Qwen2Config

from configurator import configure
from model_utils import estimate_memory

ROOT = Path(__file__).resolve().parent.parent
CARDS = {"24 GB": 23.6, "48 GB": 44.5, "80 GB": 79.2, "141 GB": 139.8}  # GiB that the driver shows of L4/4090, L40S, A100/H100, H200
RESERVE = 3  # GiB, as in train.py

NTHR = dict(variant="nthr", nthr_eta=None, prompts_per_step=256, prompts_per_update=64, kl_coef=1e-4, clip_low=0.2,
            clip_high=0.2, dynamic_sampling=True, advantage_norm="std", loss_norm="group")
MATH = NTHR | dict(nthr_beta=1.0, temperature=1.0, learning_rate=1e-6)
# file: (GPUs in its command, hidden, layers, heads, key-value heads, MLP, vocabulary, tied head, parameters), and what the paper
# states; the rest is chosen
PAPER = {
    "nthr_math": ((4, 1536, 28, 12, 2, 8960, 151936, True, 1_543_714_304), MATH | dict(
        model="Qwen/Qwen2.5-Math-1.5B", dataset="math", max_steps=40, max_response_tokens=3072)),
    "nthr_deepscaler": ((4, 1536, 28, 12, 2, 8960, 151936, True, 1_543_714_304), MATH | dict(
        model="Qwen/Qwen2.5-Math-1.5B", dataset="deepscaler", max_steps=45, max_response_tokens=3072)),
    "nthr_05b": ((2, 896, 24, 14, 2, 4864, 151936, True, 494_032_768), MATH | dict(
        model="Qwen/Qwen2.5-0.5B-Instruct", dataset="math", max_steps=105, max_response_tokens=2500, learning_rate=5e-7,
        prompts_per_step=32, prompts_per_update=16)),
    "nthr_15b": ((4, 1536, 28, 12, 2, 8960, 151936, True, 1_543_714_304), MATH | dict(
        model="Qwen/Qwen2.5-1.5B-Instruct", dataset="math", max_steps=40, max_response_tokens=4000)),
    "nthr_3b": ((4, 2048, 36, 16, 2, 11008, 151936, True, 3_085_938_688), MATH | dict(
        model="Qwen/Qwen2.5-3B", dataset="math", max_steps=40, max_response_tokens=4000)),
    "nthr_deepseek": ((4, 1536, 28, 12, 2, 8960, 151936, False, 1_777_088_000), NTHR | dict(  # lr and data set: not stated
        model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", max_steps=35, max_response_tokens=4000, temperature=0.6,
        nthr_beta=0.0)),
    "dagrpo_math": ((8, 3584, 28, 28, 4, 18944, 152064, False, 7_615_616_512), dict(  # model: LUFFY's 16k form of the paper's
        dataset="openr1-math-46k-8192", variant="dagrpo", delta=3.0, anchors=1, anchor_mode="replace",
        advantage_norm="mean", loss_norm="constant", kl_coef=0.0, group_size=8, prompts_per_step=128,
        prompts_per_update=64, learning_rate=1e-6, max_steps=500, max_response_tokens=8192, temperature=1.0,
        judge_model="gpt-4o")),
}


def load(name):
    """The settings of train.py under a config file."""
    source = (ROOT / "train.py").read_text()
    scope = {"__doc__": ""}
    exec(source[source.index("# model and data"):source.index("config = configure(")], scope)  # the settings' own lines
    with contextlib.redirect_stdout(io.StringIO()):
        return configure({k: v for k, v in scope.items() if not k.startswith("__")}, [str(ROOT / f"config/{name}.py")])


def fits(settings, shape):
    """(estimate_memory's dict, {card: GiB left, or None}): of one GPU; left for vLLM's keys and values and its own activations,
    None where an update does not fit, or not one group at its longest."""
    ranks, hidden, layers, heads, kv_heads, mlp, vocab, tied, params = shape
    config = Qwen2Config(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         intermediate_size=mlp, vocab_size=vocab, tie_word_embeddings=tied)
    masters = dict(float32=4, bfloat16=2)[settings["param_dtype"]]
    memory = estimate_memory(config, ranks, settings["parallel"], masters, 2, settings["reference"] if settings["kl_coef"] else
                             None, settings["tokens_per_micro_batch"], settings["activation_checkpointing"])
    counted = memory["weights"] * 2**30 / masters * (ranks if settings["parallel"] == "fsdp" else 1)
    assert round(counted) == params, (counted, params)
    engine = 2 * params / 2**30
    token = 2 * 2 * layers * kv_heads * hidden // heads                                             # bytes of keys and values
    group = settings["group_size"] * (settings["max_response_tokens"] + 512) * token / 2**30        # a group, at its longest
    left = {card: min(0.9 * gib, gib - RESERVE - memory["held"]) - engine for card, gib in CARDS.items()}
    return memory, {card: kv if kv > group and memory["peak"] < CARDS[card] - RESERVE else None for card, kv in left.items()}


def check():
    """[(file, differences from the paper, memory, fits)] of all configs of the papers' runs."""
    rows = []
    for name, (shape, paper) in PAPER.items():
        settings = load(name)
        wrong = {k: (settings[k], v) for k, v in paper.items() if settings[k] != v}
        rows.append((name, wrong, *fits(settings, shape), shape[0]))
    return rows


if __name__ == "__main__":
    print("| config | GPUs | trainer between updates, in an update (GiB a GPU) | " + " | ".join(CARDS) + " |")
    print("|---" * (3 + len(CARDS)) + "|")
    failed = False
    for name, wrong, memory, cards, ranks in check():
        cells = " | ".join("no" if kv is None else f"yes, {kv:.0f}" for kv in cards.values())
        print(f"| `{name}.py` | {ranks} | {memory['held']:.1f}, {memory['peak']:.1f} | {cells} |")
        for key, (ours, paper) in wrong.items():
            failed = True
            print(f"error: config/{name}.py: {key} is {ours!r}, in the paper {paper!r}", file=sys.stderr)
    sys.exit(1 if failed else 0)
