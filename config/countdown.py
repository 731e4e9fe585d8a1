# Reach a number with given numbers, each used once: a set, a prompt and a reward of one's own
#   python train.py config/countdown.py
import ast
import operator
import random
from fractions import Fraction

out_dir = "out/countdown"
max_steps = 10
prompts_per_step = 24
prompts_per_update = 24
max_rounds = 1
group_size = 8
max_response_tokens = 24
tokens_per_micro_batch = 3000
learning_rate = 1e-5
eval_every = 5
eval_problems = 256

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv}


def dataset(split):
    """Two numbers, and what their sum, difference or product is."""
    draw = random.Random(split)
    rows = []
    for _ in range(256 if split == "test" else 4000):
        numbers = a, b = draw.sample(range(2, 51), 2)
        target = draw.choice((a + b, abs(a - b), a * b))
        rows.append({"problem": f"{numbers} -> {target}", "answer": str(target),
                     "numbers": numbers})
    return rows


def prompt(row):
    """A chat with three examples."""
    turns = ("[9, 7] -> 16", "9 + 7", "[4, 12] -> 8", "12 - 4", "[6, 5] -> 30", "6 * 5",
             row["problem"])
    system = "Reach the number with the others, each used once. Write the calculation only."
    return [{"role": "system", "content": system}] + [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def _value(node):
    """What an expression comes to."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))


def reward(text, row):
    """1 if the calculation reaches the number, 0.2 if it only uses each number once, else 0."""
    try:
        tree = ast.parse(text.split("=")[0].strip(), mode="eval").body
        value = _value(tree)
    except (SyntaxError, ValueError, AttributeError, KeyError, ZeroDivisionError):
        return 0.0
    used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    if sorted(used) != sorted(row["numbers"]):
        return 0.0
    return 1.0 if value == int(row["answer"]) else 0.2
