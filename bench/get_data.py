"""Sets of the Hugging Face hub as JSON Lines files of data_dir, made once.

    python bench/get_data.py math math500 ...        into data/; without a name: all sets
"""
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import SETS
from runs import write_jsonl

# of each set, by its split: id[:configuration] and split on the hub
TABLE = """\
aime24               test  HuggingFaceH4/aime_2024                  train
aime25               test  math-ai/aime25                           test
amc23                test  math-ai/amc23                            test
amc83                test  AI-MO/aimo-validation-amc                train
math500              test  HuggingFaceH4/MATH-500                   test
minerva_math         test  math-ai/minervamath                      test
olympiadbench        test  Hothan/OlympiadBench:OE_TO_maths_en_COMP train
gsm8k                train openai/gsm8k:main                        train
gsm8k                test  openai/gsm8k:main                        test
arc_c                test  allenai/ai2_arc:ARC-Challenge            test
gpqa_diamond         test  Idavidrein/gpqa:gpqa_diamond             train
mmlu_pro             test  TIGER-Lab/MMLU-Pro                       test
math                 train nlile/hendrycks-MATH-benchmark           train
deepscaler           train agentica-org/DeepScaleR-Preview-Dataset  train
openr1-math-46k-8192 train Elliott/Openr1-Math-46k-8192             train
"""
HUB = {(name, split): source for name, split, *source in map(str.split, TABLE.splitlines())}
LETTERS = "ABCDEFGHIJ"


def our_rows(name, hub_rows):
    """Our rows of a set's rows on the hub."""
    for r in hub_rows:
        problem, answer = r.get("problem") or r.get("question"), r.get("answer")
        solution, options = r.get("solution"), r.get("options", [])
        if name == "math" and str(r["level"])[-1] not in "345":
            continue
        if name == "olympiadbench":
            answer = ",".join(r["final_answer"])
        if name == "openr1-math-46k-8192":
            problem, solution = r["prompt"][-1]["content"], r["target"][0]["content"]
            answer = r["reward_model"]["ground_truth"]
        if name == "arc_c":  # a few rows number their choices
            options = r["choices"]["text"]
            answer = LETTERS[r["choices"]["label"].index(r["answerKey"])]
        if name == "gpqa_diamond":
            problem, right = r["Question"], r["Correct Answer"].strip()
            options = [right, *(r[f"Incorrect Answer {k}"].strip() for k in (1, 2, 3))]
            random.Random(right).shuffle(options)  # the same in every run
            answer = LETTERS[options.index(right)]
        if options:
            lettered = [f"{letter}) {option}" for letter, option in zip(LETTERS, options)]
            problem = "\n".join([problem.strip(), "", *lettered])
        answer = str(answer).split("####")[-1].strip()  # GSM8K's comes after its derivation
        yield {"problem": problem, "answer": answer, "solution": solution,
               "n_choices": len(options)}


def fetch(names, data_dir="data"):
    """Write the sets of these names, of all if there are none; those that cannot be had are told
    of. A file that is there stays."""
    from datasets import load_dataset

    os.makedirs(data_dir, exist_ok=True)
    for (name, split), (hub_id, hub_split) in HUB.items():
        path = f"{data_dir}/{SETS[name, split]}.jsonl"
        if names and name not in names or os.path.exists(path):
            continue
        try:
            write_jsonl(path, our_rows(name, load_dataset(*hub_id.split(":"), split=hub_split)))
            print(f"wrote {path}")
        except Exception as e:  # no network, no access, no such version
            print(f"{name}: no {hub_id} on the hub: {e!r}")


if __name__ == "__main__":
    unknown = {*sys.argv[1:]} - {name for name, _ in HUB}
    if unknown:
        sys.exit(f"unknown sets {sorted(unknown)}; known: {sorted({name for name, _ in HUB})}")
    fetch(sys.argv[1:])
