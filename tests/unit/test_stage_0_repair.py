"""Stage 0's sums in fp32: the same numbers as parameter by parameter, and memory only while a step needs it."""

import torch
from torch import Tensor, nn

from halfstep.launcher.engine.numerics.repair import Fp32Sums


def parameters() -> list[Tensor]:
    made = [nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in ((3, 2), (5,), (4, 4))]
    for parameter in made:
        parameter.grad_dtype = None
    return made


def gradients(seed: int, given: list[Tensor]) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(parameter.shape, generator=random).to(parameter.dtype) for parameter in given]


def test_micro_batches_are_added_in_fp32_to_the_bit() -> None:
    trained = parameters()
    sums = Fp32Sums(trained)
    for step in range(2):  # nothing of the first is left in the second
        parts = [gradients(10 * step + micro_step, trained) for micro_step in range(3)]
        for micro_step, part in enumerate(parts):
            for parameter, gradient in zip(trained, part, strict=True):
                parameter.grad = gradient
            if micro_step < 2:
                sums.collect()
                assert all(parameter.grad is None for parameter in trained)
        given = sums.give()
        sums.collect()  # a backward pass has ended, whose gradients have been given
        for parameter, total, each in zip(trained, given, zip(*parts, strict=True), strict=True):
            assert torch.equal(total, each[0].float() + each[1] + each[2])
            assert parameter.grad is total
        sums.end()
        assert all(parameter.grad is None for parameter in trained)


def test_a_parameter_that_no_micro_batch_used_has_a_gradient_of_zeros() -> None:
    trained = parameters()
    sums = Fp32Sums(trained)
    made = gradients(0, trained)
    for used in (0, 1):
        trained[used].grad = made[used]
        sums.collect()
    assert torch.equal(trained[2], torch.zeros(4, 4))
    for total, expected in zip(sums.give(), [*made[:2], torch.zeros(4, 4)], strict=True):
        assert torch.equal(total, expected.float())


def test_the_sums_take_memory_from_the_first_micro_batch_to_the_end_of_the_step() -> None:
    trained = parameters()
    sums = Fp32Sums(trained)
    held = [sums._storage.nbytes()]
    trained[0].grad = torch.ones_like(trained[0])
    sums.collect()
    held.append(sums._storage.nbytes())
    sums.end()
    held.append(sums._storage.nbytes())
    assert held == [0, 4 * (6 + 5 + 16), 0]
