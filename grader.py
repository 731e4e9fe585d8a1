r"""Is the last `\boxed{}` of a response the reference answer?

    grade_all([("... so \\boxed{\\frac{1}{2}}.", {"answer": "0.5"}), ...])      # [True, ...]

Both get one spelling (`normalise`); equal spellings and numbers are compared here (`quick`), the
rest by math-verify in workers (this file as a program): `9^{9^{9^9}}` costs two seconds of
processor time and a worker, no more. A function of the user's, `reward`, can take its place."""
import contextlib
import faulthandler
import json
import os
import re
import resource
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from subprocess import DEVNULL, PIPE, Popen

from configurator import CORES, load_function

SECONDS = 2           # of processor time that a worker has for one answer
LONGEST = 2000        # characters of an answer; the longest reference answer has 217

# What `normalise` replaces, in this order; math-verify reads the rest of LaTeX by itself
RULES = (
    (r"^\$? ?\\approx|\\?\$|\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-z])|\\!(?! *\d)", ""),
    (r"(?<=\\\\)\[[\d.]+[a-z]+\]|\*\*|\\(?=%)", ""),  # \\[4pt]
    (r"\\[dtc]frac", r"\\frac"), (r"\\varnothing", r"\\emptyset"),
    (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\ | ) *(?=\d{3}(?![\d/]))", ""),  # 10{,}000
    (r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![a-z])|~|\s)+", " "),
    (r"\\frac ?(\d) ?(?=[\d{])", r"\\frac{\1}"),  # \frac12
    (r"(\\frac\{[^{}]*\}) ?(\d)", r"\1{\2}"),
    (r"([_^])\{(\w|\\circ)\}(?!\w)", r"\1\2"),
    (r"(\\(?:sin|cos|tan) ?\(?[\d.]+) ?(?:\^ ?\\circ|°)", r"\1 \\pi/180"),
    (r" ?(?:\^ ?\\circ|\\degree|°)|\b(?:square|sq\.?|cubic) (?=[a-z])|\.$", ""),
    (r"(?<![\\a-zA-Z])(?:np\.)?(pi|arcsin|arccos|arctan|sin|cos|tan|ln|log)(?![a-z])", r"\\\1"),
    (r"(?<=\d) ?(?:[eE]|(?:\\times|\\cdot|[*x]) ?10\^)\{?([+-]?\d+)\}?", r"\\times 10^{\1}"),
    (r"^(-?)10(?=\^)", r"\g<1>1\\times 10"), (r"[, ]*(\\text\{ ?)?\b(for all|where) .*", ""),
    (r"\\(?:overline|bar)\{(\d+)\}", r"\1\1\1\1\1\1\1\1"),
    (r"^([^,]*)\\pm([^,]*)$", r"\1+\2,\1-\2"),
    (r"^(\d+) ?: ?(\d+) ?: ?(\d+)$", r"(\1,\2,\3)"),  # a ratio of three
    (r"\\\{ ?[a-z][^|:]*?(?:\\mid|\||:)(.*)\\\}", r"\1"),  # \{x \mid 2 < x < 5\}
    (r"(?<=\d)i(?![a-z])", " i"),  # else math-verify sees no imaginary unit
    (r"\b([apAP])\. ?([mM])\b\.?", r"\1\2"),  # 4:30 p.m.
    (r"\\(?:text[a-z]*|mbox|math(?:rm|bf|it)|boldsymbol|bm) ?\{ ?(?:(?:an?|the) )?", r"\\text{"),
    (r"^(.*(?:[\d}%]|\\pi)) ([ckm]?m|k?g|ft|in|[a-zA-Z]{3}[a-zA-Z /]*)(?:\^\d)?$", r"\1\\text{\2}"),
    (r"^\(?([0-9A-F]+|\\text\{[0-9A-F]+\})\)? ?_\{?(\d+)\}?$", r"\1\\text{base \2}"),
)
SYMBOLS = str.maketrans({"−": "-", "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "×": "*"})
UNIT = re.compile(r"(.*?[a-zA-Z\d})%]) ?\\text\{(?!(?i:and|or|hundred|thousand|million|billion"
                  r"|[ap]m|i)\b)([^{}]*)\}(?:\^\{?-?\d\}?| |/|\\cdot|\\text\{(?!and|or)[^{}]*\})*")
# Two different ones of these are two answers; any other unit is not looked at
MEASURES = set("""mm millimeters cm centimeters m meters km kilometers in inches ft feet miles g
    grams kg kilograms seconds min minutes hours days weeks months years dollars cents""".split())
NUMBER = re.compile(r"([+-]?) ?(?:(\d+)(?= ?\\frac| \d+/))? ?(?:\\frac\{)?(\d+\.?\d*|\.\d+)"
                    r"(?:(?:\}\{| ?/ ?)0*([1-9]\d*)\}?)?(?:\\times 10\^\{([+-]?\d{1,3})\})?")
CHOICE = re.compile(r"(?i)(?:(?:option|answer|choice)[ :]*)?[(\[]?([A-Z]|\d\d?)(?:$|[)\].:]| -| \()"
                    r"(?!.*\([A-J]\)|(?:.*[,;/\s])?[A-J][.):]|(?:[,;/\s]|and|or|[A-J]\b)*\b[A-J]$)")


def last_boxed(text):
    r"""The content of the last `\boxed{...}` after any `</think>`, None if it never closes."""
    _, box, rest = text.rpartition("</think>")[2].rpartition("\\boxed")
    rest, depth = rest.lstrip(), 0
    if not box or not rest.startswith("{"):
        return None
    for brace in re.finditer(r"\\[{}\\]|[{}]", rest):  # a printed \{ opens nothing
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return rest[1:brace.start()]
    return None


def normalise(answer):
    """(answer in one spelling, its unit or ""). str -> (str, str)"""
    answer = answer.translate(SYMBOLS)
    for pattern, new in RULES:
        answer = re.sub(pattern, new, answer.strip())
    match = UNIT.fullmatch(answer)
    answer, unit = match.groups() if match else (answer, "")
    answer = re.sub(r"\\text\{([^{}]*?)\.?\}", r" \1 ", answer).strip()
    return answer if "\\" in answer else answer.lower(), unit.strip(" .")


def number(text):
    """The value of a normalised answer if it is an integer, decimal, fraction or mixed number."""
    text = re.sub(r"(?<=\d)(?<!\d{4}),(?=\d{3}(?!\d))", "", text)  # 12,345
    if match := NUMBER.fullmatch(text[:LONGEST]):  # int() reads 4,300 digits; RULES lengthen
        sign, whole, top, bottom, power = match.groups("")
        value = int(whole or 0) + Fraction(top) / int(bottom or 1)
        return int(sign + "1") * value * Fraction(10) ** int(power or 0)


def quick(text, problem):
    """True or False if this can be said at once, else what to ask a worker: (gold, pred)."""
    boxed, gold = last_boxed(text), str(problem["answer"]).strip()
    if not boxed:
        return False
    if problem.get("n_choices"):
        letter = CHOICE.match(normalise(boxed[:LONGEST])[0])  # or number
        return bool(letter) and letter[1].upper() in (gold.upper(), problem.get("answer_letter"))
    if max(len(boxed), len(gold)) > LONGEST:
        return boxed.strip() == gold
    (gold, unit), (pred, pred_unit) = normalise(gold), normalise(boxed)
    short, long = sorted((unit[:30], pred_unit[:30]), key=len)
    measures = {unit, pred_unit} <= MEASURES or unit[:4] == pred_unit[:4] == "base"
    if measures and not re.match(".*".join(map(re.escape, short)), long):  # min: minutes
        return False
    if re.sub(r"(?<!\d) | (?!\d)", "", gold) == re.sub(r"(?<!\d) | (?!\d)", "", pred):
        return True
    g, p = number(gold.rstrip("% ")), number(re.sub(r"^[\w\\ {}]+=", "", pred).strip("% "))
    if g is not None and p is not None:
        scale = Fraction(100) ** (gold.endswith("%") - pred.endswith("%"))
        values = [p * scale, p] if abs(g) >= 1 else [p * scale]
        if g in values or all(abs(g - x) > abs(g) / 900_000 for x in values):  # 0.333333 is 1/3
            return g in values
    # To math-verify a word is the product of its letters, in any case and order
    words = re.compile(r"[a-zA-Z][a-zA-Z' -]{2,}")
    return False if words.fullmatch(gold) and words.fullmatch(pred) else (gold, pred)


def work():
    """A worker: a line [seconds, reward, *asked] in; a number, or a text, what went wrong, out."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy.core.cache import clear_cache
    rules = NormalizationConfig(malformed_operators=True)  # not units: the h of \pi r^2 h
    config = [LatexExtractionConfig(normalization_config=rules)]

    def same(*pair):
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))  # bytes
        gold, pred = (parse(f"${x}$", config, parsing_timeout=None) for x in pair)
        return verify(gold, pred, timeout_seconds=None, allow_set_relation_comp=True)
    load, out = cache(load_function), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, it is no verdict
    os.register_at_fork(after_in_child=out.close)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        seconds, reward, *asked = json.loads(line)
        score = load(reward, "reward") if reward else same
        if reward:  # its time; it may have signals of its own
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)
        else:  # processor time, at whose end a signal ends the process
            signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = float(score(*asked))
            assert 0 <= verdict <= 1, f"{verdict} is not from 0 to 1"
        except BaseException as e:  # the parsers raise everything
            verdict = " ".join(f"{type(e).__name__}: {e}".split())
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        clear_cache()
        print(json.dumps(verdict), file=out, flush=True)


_mine = threading.local()  # .worker: the process of this thread of the pool
_pool = ThreadPoolExecutor(min(8, CORES))


def _ask(question):
    """A worker's reply, see `work`; a text, too, if it took too long or died of it."""
    worker = getattr(_mine, "worker", None)
    if worker is None or worker.poll() is not None:
        worker = _mine.worker = Popen(
            [sys.executable, __file__], 0, stdin=PIPE, stdout=PIPE, stderr=DEVNULL,
            start_new_session=True)  # Ctrl-C is the parent's, which may want more
        if not worker.stdout.readline():
            raise RuntimeError(f"the grader's worker does not start: {sys.executable} {__file__}")
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.write(json.dumps(question).encode() + b"\n")
        if reply := worker.stdout.readline():
            return json.loads(reply)
    os.killpg(worker.pid, signal.SIGKILL)  # whatever it has started
    worker.wait()
    return f"over {question[0]} seconds, or the end of its process"


def grade_all(items, reward=None, reward_seconds=2.0):
    r"""[(response text, problem), ...] -> [bool, ...]: is the last `\boxed{}` the problem's answer?
    problem: {"answer": str}; one with "n_choices" is multiple choice, its answer a letter. reward:
    "FILE.py:NAME", a function that is asked instead, (text, problem) -> a number from 0 to 1; where
    it raises or takes longer a 0, and a line says so. Any thread may call this."""
    if reward:
        replies = [*_pool.map(_ask, [(reward_seconds, reward, *item) for item in items])]
        for why, count in Counter(x for x in replies if isinstance(x, str)).items():
            print(f"reward: {count} of {len(items)} responses are worth 0: {why}", flush=True)
        return [0.0 if isinstance(x, str) else x for x in replies]
    verdicts = [quick(text, problem) for text, problem in items]
    pairs = {x for x in verdicts if isinstance(x, tuple)}
    replies = _pool.map(_ask, [(SECONDS, None, *pair) for pair in pairs])
    answers = {pair: reply == 1 for pair, reply in zip(pairs, replies)}
    return [answers.get(x, x) for x in verdicts]


if __name__ == "__main__":
    work()
