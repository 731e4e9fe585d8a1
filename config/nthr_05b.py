# NTHR, Qwen2.5-0.5B-Instruct on MATH levels 3 to 5: smaller steps and more of them
#   torchrun --nproc_per_node=2 train.py config/nthr_05b.py
from config.nthr_math import *

model = "Qwen/Qwen2.5-0.5B-Instruct"
out_dir = "out/nthr_05b"
max_response_tokens = 2500
prompts_per_step = 32
prompts_per_update = 16
learning_rate = 5e-7
max_steps = 105
