"""A pytest plugin: the loss is computed by its Triton kernels on the CPU, too."""

from halfstep.models import loss


def pytest_configure() -> None:
    loss.implementation = lambda device: "triton"
