# NTHR, DeepSeek-R1-Distill-Qwen-1.5B: temperature 0.6, beta 0, 35 steps. Data set and learning rate
# are not stated for it: those of the other 1.5B rows
#   torchrun --nproc_per_node=4 train.py config/nthr_deepseek.py
from config.nthr_math import *

model = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
out_dir = "out/nthr_deepseek"
temperature = 0.6
nthr_beta = 0.0
max_response_tokens = 4000
max_steps = 35
