r"""Is the last `\boxed{}` of a response the reference answer?

    grade_all([("... so \\boxed{\\frac{1}{2}}.", {"answer": "0.5"}), ...])      # [True, ...]

Spelling first, here and at once (`quick`). What that leaves open goes to math-verify in worker processes, which have two
seconds of processor time an answer, end when they do not keep them, and are replaced: a response may be `9^{9^{9^9}}`. A
worker is this file run as a program, so nothing is forked (CUDA may be up) and no signal is needed here (any thread may call).

An answer is a number, a word, a formula, or several of these: `(1,2)` is ordered, `1,2` and `\{1,2\}` are not, and `[1,2]` is
not `(1,2)`. `equal` takes it apart, math-verify compares the pieces.
"""
import atexit
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

SECONDS = 2           # of processor time that a worker has for one answer
LONGEST = 2000        # characters of an answer; the longest reference answer of the papers' sets has 217
WORKER_BYTES = 2**31  # address space of a worker
WORKER_RESIDENT_KIB = 2**20  # a worker that has grown past this is replaced


def last_boxed(text):
    r"""The content of the last `\boxed{...}` after any `</think>`, or None. A box that never closes is no answer."""
    text = text[max(0, text.rfind("</think>")):]
    start = text.rfind("\\boxed")
    brace = re.compile(r"\\boxed\s*\{").match(text, start) if start >= 0 else None
    if brace is None:
        return None
    depth = 0
    for match in re.compile(r"\\[{}\\]|[{}]").finditer(text, brace.end() - 1, brace.end() + 10 * LONGEST):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # a printed brace \{ or \} opens and closes nothing
        if depth == 0:
            return text[brace.end():match.start()]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# one spelling

SWAPS = tuple(pair.split(" -> ") for pair in r"""
\leqslant -> \le; \geqslant -> \ge; \leqq -> \le; \geqq -> \ge; \leq -> \le; \geq -> \ge; \neq -> \ne; ≤ -> \le; ≥ -> \ge
\dfrac -> \frac; \tfrac -> \frac; \cfrac -> \frac; ½ -> \frac{1}{2}; √ -> \sqrt ; ** -> ^; \ast -> *; {10}^ -> 10^; ² -> ^2; ³ -> ^3
^{\prime\prime} -> ''; ^{\prime} -> '; ^\prime -> '; {,} -> ,; \% -> %; − -> -; – -> -; × -> \times; · -> \cdot; ± -> \pm
\lbrace -> \{; \rbrace -> \}; \{\} -> \emptyset; \{ \} -> \emptyset; \varnothing -> \emptyset; ∪ -> \cup; ∞ -> \infty; π -> \pi
\approx -> ; \checkmark -> ; np. -> ; \degree -> ^\circ; ° -> ^\circ""".strip().replace("\n", "; ").split("; "))
SPACE = re.compile(r"\\\\|\\(?:[,!;: ]|quad\b|qquad\b)|~")
SEPARATED = re.compile(r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3}(?!\d))")  # 10{,}000
FUNCTION = re.compile(r"(?<![\\a-zA-Z])(pi|arcsin|arccos|arctan|sin|cos|tan|ln|log|exp)(?![a-zA-Z])")
SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle)(?![a-zA-Z])")
TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textit|textrm|textnormal|mathit|mathsf|operatorname|hbox)\s*\{([^{}]*)\}")
DEGREES = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})")
SHORT_FRAC = re.compile(r"\\frac\s*(\d|\{[^{}]*\})\s*(\d|\{[^{}]*\})")
SHORT_SQRT = re.compile(r"\\sqrt\s*(\d|[a-zA-Z](?![a-zA-Z]))")


def clean(answer):
    r"""One spelling for what differs only in LaTeX dressing: sizes, spaces, dollars, `\text{}`, `\frac12`. str -> str."""
    text = SEPARATED.sub("", answer.strip())
    for old, new in SWAPS:
        text = text.replace(old, new)
    text = SIZE.sub("", text).replace("\\$", "").replace("$", "")
    text = SPACE.sub(lambda m: {"\\\\": m[0], "\\!": "", "\\,": ""}.get(m[0], " "), text)
    text = TEXT.sub(_in_text, TEXT.sub(_in_text, DEGREES.sub(" degrees ", text)))
    text = FUNCTION.sub(r"\\\1", re.sub(r"(?<![\\a-zA-Z])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}", text))
    text = text.replace("all real numbers", "\\mathbb{R}")
    if "\\begin" not in text:
        text = re.sub(r"\\[()\[\]]", "", text)
    text = SHORT_FRAC.sub(lambda m: "\\frac" + "".join(x if x[0] == "{" else "{" + x + "}" for x in m.groups()), text)
    text = SHORT_SQRT.sub(r"\\sqrt{\1}", text)
    text = re.sub(r"\s+", " ", text).strip()
    return text[:-1].strip() if text.endswith(".") else text


def _in_text(match):
    r"""The content of a text command; a one-letter unit spelled out, since \text{ m} is metres and m may be a variable."""
    word = match[1].strip()
    return f" {LONG.get(word, match[1])} "


def spelling(text):
    """What two spellings of a cleaned answer share: no spaces, no case in words, no braces around one letter of an index,
    no parentheses around a letter."""
    text = re.sub(r"\b([apAP])\.? ?[mM]\b", lambda m: m[1].lower() + "m", text)  # 4:40 p.m.
    text = re.sub(r"(?<=[_^])\{(\w)\}", r"\1", text).replace(" ", "")
    text = re.sub(r"^\(([a-zA-Z])\)$", r"\1", text)
    return text.lower() if re.fullmatch(r"[a-zA-Z'.:\-\d]*[a-zA-Z]{3}[a-zA-Z'.:\-\d]*|[nN][oO]", text) else text


UNITS = {spelled: names.split()[0] for names in (  # a unit may be left out of an answer, but not be another one
    "cm centimeter centimeters centimetre centimetres", "mm millimeter millimeters", "m meter meters metre metres",
    "km kilometer kilometers kilometre kilometres", "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles",
    "g gram grams", "kg kilogram kilograms", "lb lbs pound pounds", "oz ounce ounces", "s sec second seconds",
    "min minute minutes", "h hr hrs hour hours", "day days", "week weeks", "month months", "year years", "mph", "rad radians",
    "degree degrees", "dollar dollars", "cent cents", "L liter liters litres", "mL milliliters", "J joules", "N newtons",
    "K kelvin", "W watts", "V volts", "Hz hertz", "Pa", "mol moles", "unit units", "way ways", "times", "people",
    "eV electronvolts", "nm nanometers", "erg ergs", "acre acres", "ohm ohms", "percent") for spelled in names.split()}
LONG = {unit: next(k for k, v in UNITS.items() if v == unit and k != unit) for unit in UNITS.values() if len(unit) == 1}
TAIL = re.compile(r"(.*?\S) ([a-zA-Z][a-zA-Z\s/.^{}\\\-\d]*)")
NO_UNIT = set("or and not more less least most remainder mod hundred thousand million billion dozen to is half".split())
UNIT = re.compile(r"\s((?:(?:square|sq\.?|cubic)\s)?)([a-zA-Z]+)\s?(?:\^\s?\{?([23])\}?)?"
                  r"(?:\s?(?:/|\bper\b)\s?([a-zA-Z]+)\s?(?:\^\s?\{?([23])\}?)?)?$")


def split_unit(text):
    """("15", "cm2") of a cleaned "15 cm ^2", ("15", "") of "15". A unit stands after a space, as a text command leaves it;
    words after a number are one too (12 apples)."""
    match = UNIT.search(text)
    names = match and [UNITS.get(x) or UNITS.get(x.lower()) for x in (match[2], match[4]) if x]
    if not names or None in names:
        tail = TAIL.fullmatch(text)
        words = re.findall(r"[a-zA-Z]+", tail[2]) if tail else []
        if words and number(tail[1].rstrip("% ")) is not None and not NO_UNIT & set(words) \
                and all(len(w) > 2 or w in UNITS for w in words):  # and 6 xy is a product
            return tail[1], " ".join(w.lower().rstrip("s") for w in words)
        return text, ""
    if names == ["percent"]:
        return text[:match.start()] + "%", ""
    if len(match[2]) == 1 and match[4] is None and number(text[:match.start()].strip("% ")) is None:
        return text, ""  # a variable, as in \pi r^2 h
    powers = match[3] or {"s": "2", "c": "3"}.get(match[1][:1], ""), match[5] or ""
    unit = "/".join(name + power for name, power in zip(names, powers))
    return text[:match.start()].strip(), {"mi/h": "mph"}.get(unit, unit)


NUMBER = re.compile(r"([+-]?)(?:(\d+\.?\d*|\.\d+)(?:[eE]([+-]?\d{1,3})|(?:\\times|\\cdot|[*x])10\^\{?([+-]?\d{1,3})\}?)?"
                    r"|10\^\{?([+-]?\d{1,3})\}?)")
FRACTION = re.compile(r"([+-]?)(\d*)\\frac\{([+-]?)(\d+)\}\{(\d+)\}|([+-]?)(?:(\d+) )?(\d+)\.? ?/ ?(\d+)")


def number(text):
    """The value of a cleaned answer as a Fraction if it is a number as people write it, else None.

    Integers with and without separators, decimals, scientific notation, fractions, mixed numbers.
    """
    if len(text) > 100 or not text:
        return None
    m = FRACTION.fullmatch(text)
    if m:
        sign, whole, up, down = (m[1] + m[3], m[2], m[4], m[5]) if m[4] else (m[6], m[7], m[8], m[9])
        value = int(down) and int(whole or 0) + Fraction(int(up), int(down))
        return (-value if sign.count("-") % 2 else value) if int(down) else None
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    text = text.replace(" ", "")
    m = re.fullmatch(r"([+-]?)(\d*)\.(\d*)\\(?:overline|bar)\{(\d+)\}", text)
    if m:  # 0.1\overline{6}
        value = (int(m[2] + m[3] or 0) + Fraction(int(m[4]), 10 ** len(m[4]) - 1)) / 10 ** len(m[3])
        return -value if m[1] == "-" else value
    m = NUMBER.fullmatch(text)
    if m is None:
        return None
    value = Fraction(m[2] or 1) * Fraction(10) ** int(m[3] or m[4] or m[5] or 0)
    return -value if m[1] == "-" else value


def same_number(gold, pred):
    """Equal; or one of them is a decimal and within a millionth of the other, which has no end as a decimal (1/3)."""
    endless = [10**400 % x.denominator != 0 for x in (gold, pred)]
    return gold == pred or endless[0] != endless[1] and abs(gold - pred) <= Fraction(11, 10**7) * abs(gold)


def quick(gold, pred):
    """True or False if spelling or arithmetic decides whether two cleaned answers are the same, else None."""
    if spelling(gold) == spelling(pred) or not pred:
        return bool(pred)
    (gold, gold_unit), (pred, pred_unit) = split_unit(gold), split_unit(pred)
    if gold_unit and pred_unit and gold_unit != pred_unit:
        return False
    g, p = number(gold.rstrip("% ")), number(pred.rstrip("% "))
    if g is not None and p is not None:
        if gold.endswith("%") == pred.endswith("%"):
            return same_number(g, p)
        if gold.endswith("%"):  # 50 and 0.5 are 50%
            return same_number(g, p) or same_number(g / 100, p)
        return same_number(g, p / 100) or abs(g) >= 1 and same_number(g, p)  # a percentage asked for as a number
    words = re.compile(r"[a-zA-Z][a-zA-Z' \-]{3,}")
    if words.fullmatch(gold) and words.fullmatch(pred):
        return len({spelling(re.sub(r"^(?:an?|the) ", "", x, flags=re.I)) for x in (gold, pred)}) == 1
    if len(gold) == len(pred) == 1 and gold.isalpha() and pred.isalpha():
        return False  # N is not n
    base = [re.fullmatch(r"\(?([0-9A-Z]+)\)?_\{?(\d+)\}?", x.replace(" ", "")) for x in (gold, pred)]
    if base[0] and (base[1] or p is not None):  # the base may be left out too
        return base[0][1] == (base[1][1] if base[1] else pred.replace(" ", "")) and (not base[1] or base[0][2] == base[1][2])
    if base[1] and g is not None:
        return base[1][2] == "10" and base[1][1].isdigit() and g == int(base[1][1])
    ratios = [[number(x.strip()) for x in text.split(":")] for text in (gold, pred)]
    if min(map(len, ratios)) > 1 and all(ratios[0] + ratios[1]):
        return [x / ratios[0][0] for x in ratios[0]] == [x / ratios[1][0] for x in ratios[1]]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# in a worker: answers of several parts, and math-verify

MATRIX = re.compile(r"[(\[]? ?\\begin\{([pb]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\} ?[)\]]?", re.S)
LEFT_SIDE = re.compile(r"\(?[a-zA-Z](?:_\{?\w+\}?|\([a-zA-Z]\))?(?: ?, ?[a-zA-Z](?:_\{?\w+\}?)?)*\)? ?(?:=|\\in(?![a-z])) ?")
ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
BUILDER = re.compile(r"\\\{ ?([a-zA-Z])(?: ?\\in ?\\mathbb\{?R\}?)? ?(?:\\mid|\||:) ?(.*\1.*)\\\}")  # \{x \mid 2 < x < 5\}
SEPARATOR = re.compile(r"\\\\|\\[{}]|[()\[\]{},;]|\\cup(?![a-z])| (?:and|or|AND|OR) ")


def split(text):
    """Split a cleaned answer at the separators that stand in no bracket. Returns (parts, the separators), or two empty
    lists if a bracket closes that was not opened."""
    parts, found, depth, start = [], [], 0, 0
    for m in SEPARATOR.finditer(text):
        if m[0][-1] in "([{":
            depth += 1
        elif m[0][-1] in ")]}":
            depth -= 1
            if depth < 0:
                return [], []
        elif depth == 0 and m[0] != "\\\\":
            parts.append(text[start:m.start()])
            found.append(m[0])
            start = m.end()
    return [p.strip() for p in parts + [text[start:]]], found


def pieces(text):
    r"""(kind, parts) of a cleaned answer. kind: "()", "[)", ... for what brackets hold, "{}" for an unordered set, "" for
    a bare list, "cup" for a union, "2x3" for a matrix by rows, "one" for anything else."""
    m = MATRIX.fullmatch(text)
    if m:
        rows = [[x.strip() for x in row.split("&")] for row in re.split(r"\\\\(?:\[[^\]]*\])?", m[2]) if row.strip()]
        return f"{len(rows)}x{len(rows[0])}" if rows else "one", [x for row in rows for x in row]
    parts, found = split(text)
    if found:
        if "\\cup" in found:
            return "cup", re.split(r"\\cup(?![a-z])", text)
        parts = [p for p in parts if p]
        if LEFT_SIDE.match(parts[0]) and not any("=" in p for p in parts[1:]):  # n = 2, 5, 13
            parts[0] = LEFT_SIDE.sub("", parts[0], count=1)
        return "", [x for p in parts for x in plus_minus(p)]
    m = re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", text)
    inner = split(m[2])[0] if m else []
    if inner:  # and not (a)(b)
        kind = m[1][-1] + m[3][-1]
        return kind, [x for p in inner for x in (plus_minus(p) if kind == "{}" else [p])]
    parts = plus_minus(text)
    return ("one", parts) if len(parts) == 1 else ("", parts)


def plus_minus(text):
    r"""[a + b, a - b] of a \pm b, [text] of anything else."""
    return [text.replace("\\pm", sign) for sign in "+-"] if text.count("\\pm") == 1 else [text]


def equal(gold, pred, depth=0):
    """Are two cleaned answers the same? Recursive over their parts; formulas are compared by math-verify."""
    verdict = quick(gold, pred)
    if verdict is not None or depth > 8:
        return bool(verdict)
    gold, pred = (BUILDER.sub(r"\2", x) for x in (gold, pred))
    sides = [LEFT_SIDE.match(x) for x in (gold, pred)]
    if bool(sides[0]) != bool(sides[1]) and "=" not in (pred if sides[0] else gold):  # x = 5 is 5, but not y = 5
        return equal(*(x[m.end():] if m else x for x, m in zip((gold, pred), sides)), depth + 1)
    chain = [number(x.strip()) for x in re.sub(r"^[a-zA-Z] ?=", "", pred).split("=")]
    if "=" in pred and gold.count("=") < 2 and None not in chain and len(set(chain)) > 1:
        return False  # 1 = 7 is not 7
    (kind, parts), (pred_kind, pred_parts) = pieces(gold), pieces(pred)
    if kind != "one" or pred_kind != "one":
        if len(parts) == len(pred_parts) == 1 and {kind, pred_kind} <= {"one", "()", "{}", ""}:
            return equal(parts[0], pred_parts[0], depth + 1)
        unordered = {kind, pred_kind} <= {"", "{}"} or {kind, pred_kind} <= {"", "cup"}
        if unordered or kind == pred_kind or {kind, pred_kind} == {"", "()"}:
            if len(parts) != len(pred_parts):
                return False
            if not unordered and kind != "cup":
                return all(equal(g, p, depth + 1) for g, p in zip(parts, pred_parts))
            left = list(pred_parts)
            for g in parts:
                same = next((i for i, p in enumerate(left) if equal(g, p, depth + 1)), None)
                if same is None:
                    return False
                del left[same]
            return True
        plain = [number(split_unit(x)[0]) is not None for x in (gold, pred)]
        if any(plain) and max(len(parts), len(pred_parts)) > 1 or "one" not in (kind, pred_kind):
            return False
    bare = split_unit(gold)[0], split_unit(pred)[0]
    if same_formula(gold, pred) or bare != (gold, pred) and same_formula(*bare):
        return True
    if gold.count("=") == pred.count("=") == 1:  # x + y = 5 is x = 5 - y
        gold, pred = ("{}-({})".format(*x.split("=")) for x in (gold, pred))
        return same_formula(gold, pred) or same_formula(gold, f"-({pred})")
    return False


def same_formula(gold, pred):
    """math-verify on two LaTeX formulas; where it says no, their values at three points, to 60 digits. It rounds to six
    decimals, so small numbers that it takes for equal are compared once more."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, Float, I, Rational, nsimplify

    if "\\pm" in gold + pred:  # those that mean two answers were taken apart
        return False
    # units=False: it would take the h off \pi r^2 h
    plain = LatexExtractionConfig(normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True))
    both = [re.sub(r"(\d+) degrees", r"(\1\\pi/180)", x) if ANGLE.search(x) else x for x in (gold, pred)]
    both = [re.sub(r"(?<![a-zA-Z\\])E_", "Z_", x) for x in both]  # E is 2.718... to it, with an index too
    gold, pred = (parse("$" + x + "$", [plain], parsing_timeout=None) for x in both)
    same = verify(gold, pred, timeout_seconds=None, allow_set_relation_comp=True)
    a, b = (x[0] if x and isinstance(x[0], Basic) else None for x in (gold, pred))
    if a is None or b is None:
        return same
    try:
        if same:
            a, b = complex(a), complex(b)
            return abs(a - b) <= 1e-5 * abs(a) or min(abs(a), abs(b)) > 1e-3
        letters = {str(x) for x in a.free_symbols ^ b.free_symbols}
        if not letters <= {"i"}:
            return False
        a, b = (nsimplify(x, rational=True) if x.has(Float) else x for x in (a, b))  # 0.5 as written
        for point in (1, 2, 3):
            at = {x: I if str(x) == "i" else Rational(7 * point + 3 * k, 11 + k) * (-1) ** (point == 3)  # |x| is not x
                  for k, x in enumerate(sorted(a.free_symbols | b.free_symbols, key=str))}
            x, y = a.subs(at).evalf(80), b.subs(at).evalf(80)
            if not 0 < abs(x) < 10**100 or abs(x - y) > abs(x) / 10**60:
                return False
        return True
    except (TypeError, ValueError, AttributeError, OverflowError):  # not numbers: sets, relations, ...
        return same


def work():
    """A worker: a line [gold, pred] in, "1" or "0" out; "2" or "3" if this was its last. Only its parent speaks to it."""
    import logging
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, WORKER_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.set_int_max_str_digits(0)
    logging.disable(logging.CRITICAL)
    same_formula("\\frac{1}{2} x^2", "\\sqrt{2}")  # the first call builds tables
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, it is not an answer
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time; its default action ends the process
        verdict, last = False, False
        try:
            verdict = equal(*json.loads(line))
        except MemoryError:
            last = True
        except Exception:  # the parsers raise everything; an answer they cannot read is wrong
            pass
        signal.setitimer(signal.ITIMER_PROF, 0)
        last = last or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > WORKER_RESIDENT_KIB
        print(verdict + 2 * last, file=out, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# here: the workers, and whole batches

_mine = threading.local()  # .worker: the process of this thread of the pool
_started = []              # all of them, to be ended with this process
_pool, _lock = None, threading.Lock()
WORKERS = max(1, min(8, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


atexit.register(lambda: [w.kill() for w in _started])


def _worker():
    """This thread's worker, a running one."""
    worker, _mine.worker = getattr(_mine, "worker", None), None
    if worker is not None and worker.poll() is None:
        return worker
    for _ in range(3):
        if worker is not None:
            _end(worker)
        worker = subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL, bufsize=0, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        _started.append(worker)
        if worker.stdout.readline() == b"ready\n":
            return worker
    _end(worker)
    raise RuntimeError(f"the grader's worker does not start: try `{sys.executable} {os.path.abspath(__file__)}`")


def _end(worker):
    _started.remove(worker)
    worker.kill()
    worker.wait()
    worker.stdin.close()
    worker.stdout.close()


def _ask(pair):
    """A worker's verdict on cleaned (gold, pred), False if it takes too long or dies of it."""
    worker, reply = _worker(), b""
    try:
        worker.stdin.write(json.dumps(pair).encode() + b"\n")
        poll = select.poll()
        poll.register(worker.stdout, select.POLLIN)
        if poll.poll(5000 * SECONDS):  # it ends itself after SECONDS of processor time; the rest is for a busy machine
            reply = worker.stdout.readline()
    except BrokenPipeError:
        pass
    if reply in (b"0\n", b"1\n"):
        _mine.worker = worker
    else:
        _end(worker)
    return reply in (b"1\n", b"3\n")


def choice(boxed):
    """The letter (or the number, where choices are numbered) that a box names, upper case, or None."""
    text = clean(boxed[:LONGEST].replace("*", ""))
    match = re.match(r"(?:(?:option|answer|choice) ?:? ?)?[(\[]?([A-Z]|\d{1,2})(?:$|[)\].:]| -| \(| \.)", text, re.I)
    several = match and re.search(r"\(([A-J])\)|(?:^|[,;/\s])([A-J])(?:[.):]|$)", text[match.end():])
    return match[1].upper() if match and not several else None


def vote(text, problem):
    """What a response stands for in a majority vote: a letter, a number's value or an answer's spelling; None: no answer."""
    boxed = last_boxed(text)
    if not boxed or len(boxed) > LONGEST:
        return None
    answer = clean(boxed)
    value = number(answer)
    return choice(boxed) if problem.get("n_choices") else spelling(answer) if value is None else str(value)


def grade_all(items, progress=False):
    r"""[(response text, problem), ...] -> [bool, ...]: is the last `\boxed{}` of the text the problem's answer?

    problem: {"answer": str}; one with "n_choices" is multiple choice, its answer a letter. Equal pairs are compared once.
    Any thread may call this. progress: show a bar over what the workers are asked.
    """
    global _pool
    verdicts, open_pairs = [False] * len(items), {}
    for i, (text, problem) in enumerate(items):
        boxed = last_boxed(text)
        if boxed is None:
            continue
        gold = str(problem["answer"])
        if problem.get("n_choices"):
            names = {str(problem[key]).strip().upper() for key in ("answer", "answer_letter") if problem.get(key)}
            verdicts[i] = choice(boxed) in names
        elif max(len(boxed), len(gold)) > LONGEST:
            verdicts[i] = boxed.strip() == gold.strip()
        else:
            pair = clean(gold), clean(boxed)
            verdict = quick(*pair)
            verdicts[i] = bool(verdict)
            if verdict is None:
                open_pairs.setdefault(pair, []).append(i)
    if open_pairs:
        with _lock:
            _pool = _pool or ThreadPoolExecutor(WORKERS)
        answers = _pool.map(_ask, open_pairs)
        if progress:
            from tqdm import tqdm
            answers = tqdm(answers, total=len(open_pairs), desc="grading", unit="answer")
        for rows, verdict in zip(open_pairs.values(), answers):
            for i in rows:
                verdicts[i] = verdict
    return verdicts


if __name__ == "__main__":
    work()
