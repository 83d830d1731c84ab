"""What a rank's memory is beyond its tensors: libraries, allocators, CUDA and its communicators.

The constants of CPU ranks are fitted by `benchmarks/measure_memory.py --fit` to runs of its own; those of GPUs are
published ranges and have not been measured by this project (docs/planner.md, Memory).
"""

MIB = 1 << 20

CPU_RANK = 393 * MIB
"""A rank with torch, transformers, DeepSpeed and gloo."""
CPU_LEFT = 6.0
"""Free pieces of the C heap that fit nothing, in fp32 copies of a block: building leaves them, and every step."""
CPU_ERROR = 0.05
"""Half of the band around a CPU rank's peak."""

CUDA_CONTEXT = 750 * MIB
"""0.5 to 1.8 GiB by GPU and torch: Stas Bekman, Machine Learning Engineering Open Book. BigScience: 1113 MiB, V100."""
NCCL = 1024 * MIB
"""1 to 2 GiB more with torch.distributed: the same book."""
CUDA_SLACK = 0.06
"""What torch's allocator reserves beyond what is allocated: 5 to 10 % (planner facts, section 10)."""
CUDA_ERROR = (0.07, 0.12)
"""The band below and above a GPU's peak: published runs of this stack lie 8 % above the sum of known terms."""
CUDA_HOST = 3072 * MIB
"""Host memory of a rank that drives a GPU: its libraries. An assumption."""
UNKNOWN_FAMILY = 0.5
"""How much more a model whose activations are not known may need."""
