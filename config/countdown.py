# Reach a number with given numbers, each used once: a set, a prompt and a reward of one's own
#   python train.py config/countdown.py
import ast
import operator
import random
from fractions import Fraction

out_dir = "out/countdown"
max_steps = 20
prompts_per_step = 24
prompts_per_update = 24
max_rounds = 1
group_size = 8
max_response_tokens = 24
tokens_per_micro_batch = 3000
learning_rate = 1e-5
eval_every = 10
eval_problems = 256

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv}


def dataset(split):
    """Three numbers and what adding and subtracting them in some order comes to."""
    draw = random.Random(split)
    rows = []
    for _ in range(256 if split == "test" else 4000):
        numbers = [draw.randint(1, 50) for _ in range(3)]
        a, b, c = draw.sample(numbers, 3)
        target = a + draw.choice((1, -1)) * b + draw.choice((1, -1)) * c
        if target > 0:
            rows.append({"problem": f"{numbers} -> {target}", "answer": str(target),
                         "numbers": numbers})
    return rows


def prompt(row):
    """A chat with two examples."""
    turns = ("[3, 5, 8] -> 10", "8 + 5 - 3", "[20, 7, 4] -> 9", "20 - 7 - 4", row["problem"])
    system = "Reach the number with the three numbers, each used once. Write the calculation only."
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
