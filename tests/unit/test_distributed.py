"""What ranks send each other is data: JSON of ours, and no code in anybody's objects."""

import io
import json
import math
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from halfstep.launcher.engine.ranks import distributed
from halfstep.launcher.errors import HalfstepError, RefusedError, TopologyError


@pytest.fixture
def alone() -> Iterator[None]:
    """Be the only rank of a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("value", [None, True, 2**63, -0.0, "ü\x1b", [1, [2.5, "a"]], {"a": {"b": None}}], ids=str)
def test_values_come_back_as_they_were(value: object) -> None:
    assert distributed.gather_objects(value) == [value]
    assert distributed.on_rank_zero(lambda: value) == value


@pytest.mark.usefixtures("alone")
def test_what_is_not_finite_comes_back() -> None:
    values = distributed.gather_objects([math.inf, -math.inf, math.nan])[0]
    assert values[:2] == [math.inf, -math.inf]
    assert math.isnan(values[2])


@pytest.mark.usefixtures("alone")
def test_an_error_on_rank_0_is_raised_as_what_it_was() -> None:
    def refuse() -> None:
        raise RefusedError("what", where="where", fix="fix")

    with pytest.raises(RefusedError) as caught:
        distributed.on_rank_zero(refuse)
    assert str(caught.value) == "error: what\n from: where\n  try: fix"
    assert not caught.value.reported, "it is rank 0 that reports it"
    with pytest.raises(HalfstepError, match="ZeroDivisionError"):
        distributed.on_rank_zero(lambda: 1 / 0)


def test_an_error_from_another_rank_says_so_and_only_there() -> None:
    tree = RefusedError("what", where="where", fix="fix").to_dict()
    assert HalfstepError.from_dict(tree, reported=True).reported
    assert not HalfstepError.from_dict(tree).reported


@pytest.mark.usefixtures("alone")
def test_an_object_that_json_cannot_carry_is_our_own_mistake() -> None:
    with pytest.raises(TypeError):
        distributed.gather_objects(Path("/"))


class Payload:
    """What makes a folder in whoever reads it."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def test_torch_reads_no_code_from_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = {"a": [1, 2.5, "text", None, True, (3,), b"bytes"]}
    assert distributed.PlainUnpickler(io.BytesIO(pickle.dumps(plain))).load() == plain
    with pytest.raises(pickle.UnpicklingError, match=r"names posix\.mkdir"):
        distributed.PlainUnpickler(io.BytesIO(pickle.dumps(Payload()))).load()
    assert not (tmp_path / "executed").exists()


def test_a_network_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib7")
    with pytest.raises(TopologyError) as caught:
        distributed._check_interface()
    assert caught.value.what.endswith(" has no network interface 'ib7'")
    assert caught.value.fix.startswith("unset it, or name one of ")
    assert json.dumps(caught.value.to_dict())
