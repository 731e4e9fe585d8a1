# bench/study.py: 32 sums of three, each met four times, for demos="self": a right answer of before
# can be a demonstration only where a problem comes again
from config.dagrpo_quickstart import *
from data import STYLES, chat, load_problems


def dataset(split):
    rows = load_problems("sums", split)
    return rows[:32] if split == "train" else rows


def prompt(row):
    style = STYLES["sums"]
    system = {"role": "system", "content": style["system_prompt"]}
    return [system, *chat(*style["few_shot"], row["problem"])]
