# NTHR, Qwen2.5-Math-1.5B on DeepScaleR: 45 steps
#   torchrun --nproc_per_node=4 train.py config/nthr_deepscaler.py
from config.nthr_math import *

dataset = "deepscaler"
out_dir = "out/nthr_deepscaler"
max_steps = 45
