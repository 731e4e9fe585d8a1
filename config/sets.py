"""The sets that have a name: where they are, the functions that make some, how they are asked.

A set of your own needs no name: see `dataset` in train.py."""
import random

# (name, split) -> file in data_dir without .jsonl, which bench/get_data.py fetches
TESTS = ("aime24 aime25 amc23 amc83 math500 minerva_math olympiadbench arc_c gpqa_diamond "
         "mmlu_pro gsm8k").split()
SETS = {(name, "test"): name for name in TESTS} | {
    ("mmlu_pro", "test"): "mmlu_pro_500",
    ("gsm8k", "test"): "gsm8k_test", ("gsm8k", "train"): "gsm8k_train",
    ("math", "train"): "math_lvl3to5_12k_split", ("deepscaler", "train"): "deepscaler_sub",
    ("openr1-math-46k-8192", "train"): "openr1-math-46k-8192",
}


# ---- those that are made: functions of the split to rows -----------------------------------------

def arithmetic(split, operators="+-", held_out=128):
    """Two-digit sums and differences (never negative) in a fixed order, some of them held out."""
    pairs = [(a, op, b) for op in operators for a in range(10, 100) for b in range(10, a + 1)]
    random.Random(0).shuffle(pairs)
    flip = random.Random(1)
    rows = []
    for a, op, b in pairs[:held_out] if split == "test" else pairs[held_out:]:
        answer = a + b if op == "+" else a - b
        problem = f"{b} + {a}" if op == "+" and flip.random() < 0.5 else f"{a} {op} {b}"
        rows.append({"problem": problem, "answer": str(answer)})
    return rows


def addition(split):
    """Two-digit sums alone, 512 held out."""
    return arithmetic(split, operators="+", held_out=512)


def sums(split):
    """Sums of three two-digit numbers, worked in two steps; 128 of 4,096 are held out."""
    draw = random.Random(0)
    triples = sorted({tuple(draw.randint(10, 99) for _ in range(3)) for _ in range(5000)})
    draw.shuffle(triples)
    rows = {}
    for a, b, c in triples:
        solution = f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c} \\boxed{{{a + b + c}}}"
        row = {"problem": f"{a} + {b} + {c}", "answer": str(a + b + c), "solution": solution}
        rows.setdefault(tuple(sorted((a, b, c))), row)  # not the same sum in another order
    rows = list(rows.values())
    return rows[:128] if split == "test" else rows[128:4096]


def sums_again(split):
    """32 of `sums`, which a short run meets several times; held out are the same."""
    return sums(split)[:32 if split == "train" else None]


MADE = {"arithmetic": arithmetic, "addition": addition, "sums": sums, "sums_again": sums_again}

# ---- how a set's problems are put to a model, if not as BOXED ------------------------------------

BOXED = dict(few_shot=(), system_prompt=(
    "Please reason step by step, and put your final answer within \\boxed{}."))
CHOICE = dict(BOXED, system_prompt=(
    "Please reason step by step, and put the letter of your choice within \\boxed{}."))
ARITHMETIC = dict(
    # with a problem 97 tokens: three blocks of 32, which vLLM caches, and one
    system_prompt="Work out the answer, in a box.",
    few_shot=("57 + 38", "57 + 38 = 95 \\boxed{95}", "64 - 23", "64 - 23 = 41 \\boxed{41}"),
    max_response_tokens=28)
SUMS = dict(
    ARITHMETIC, max_response_tokens=48,
    few_shot=("57 + 38 + 46", "57 + 38 = 95, 95 + 46 = 141 \\boxed{141}",
              "64 + 23 + 85", "64 + 23 = 87, 87 + 85 = 172 \\boxed{172}"))
STYLES = {"arithmetic": ARITHMETIC, "addition": ARITHMETIC, "sums": SUMS, "sums_again": SUMS}
