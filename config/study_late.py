# bench/study.py: sums of two, on from where the quickstart ends: there is little left to learn
from config.quickstart import *

model = "out/study/start_late/step_000022"
max_steps = 10
decay_steps = 10
learning_rate = 5e-6
keep_ckpts = 1
