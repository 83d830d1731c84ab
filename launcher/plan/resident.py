"""What a rank's memory is beyond its tensors: libraries, allocators, CUDA and its communicators.

The constants of CPU ranks are fitted by `benchmarks/measure_memory.py --fit` to runs of its own; those of GPUs are
published ranges and have not been measured by this project (docs/planner.md, Memory).
"""

MIB = 1 << 20

CPU_RANK = 398 * MIB
"""A rank with torch, transformers, DeepSpeed and gloo."""
CPU_RANK_SHARDED = 52 * MIB
"""More at stages 1 to 3: DeepSpeed imports its Muon there to ask for its type, which compiles (zero/utils.py)."""
CPU_LEFT, CPU_LEFT_SHARDED = 66 * MIB, 101 * MIB
"""What the C heap keeps at stage 0, and at stages 1 to 3: free pieces that fit nothing, and a top it does not trim."""
CPU_LEFT_ACCUMULATED = 148 * MIB
"""More at stages 1 to 3 where micro-batches are added up: backward passes follow each other without a trim."""
CPU_LEFT_FROM = 48 * MIB
"""Bytes of a model in fp32 from which on that is so; a smaller one leaves less in proportion."""
CPU_GATHERED_TWICE = 0.35
"""Share of stage 3's small gathered parameters that takes heap twice: they arrive in one piece and are copied out."""
CPU_ERROR = (0.11, 0.10)
"""The band below and above a CPU rank's peak: the farthest of the measured rows in fp32 and bf16."""
CPU_WIDENED = 0.17
"""The band above it in fp16: a CPU without fp16 instructions multiplies fp32 copies (launcher/engine/half.py)."""

CUDA_CONTEXT = 750 * MIB
"""0.5 to 1.8 GiB by GPU and torch: Stas Bekman, Machine Learning Engineering Open Book. BigScience: 1113 MiB, V100."""
NCCL = 1024 * MIB
"""1 to 2 GiB more with torch.distributed: the same book."""
CUDA_SLACK = 0.06
"""What torch's allocator reserves beyond what is allocated; an assumption."""
CUDA_ERROR = (0.07, 0.12)
"""The band below and above a GPU's peak: published runs of this stack lie 8 % above the sum of known terms."""
CUDA_HOST = 3072 * MIB
"""Host memory of a rank that drives a GPU: its libraries. An assumption."""
UNKNOWN_FAMILY = 0.5
"""How much more a model whose activations are not known may need."""
