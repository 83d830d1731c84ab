"""What a rank's memory is beyond its tensors: libraries, allocators, CUDA and its communicators.

The constants of CPU ranks are fitted by `benchmarks/measure_memory.py --fit` to runs of its own; those of GPUs are
published ranges and have not been measured by this project (docs/planner.md, Memory).
"""

MIB = 1 << 20

CPU_RANK = 409 * MIB
"""A rank with torch, transformers, DeepSpeed and gloo, and what the C heap keeps (launcher/heap.py)."""
CPU_RANK_SHARDED = 45 * MIB
"""More at stages 1 to 3: DeepSpeed imports its Muon there to ask for its type, which compiles (zero/utils.py)."""
CPU_HEAP = 1.26
"""Bytes of the C heap for a byte of activations in tensors that it serves, where it keeps them: with the holes."""
CPU_ERROR = (0.07, 0.07)
"""The band below and above a CPU rank's peak: the farthest of the measured rows."""

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
