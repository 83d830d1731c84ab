"""Every family of transformers cut down from its own defaults, as the parity gate does: a nano model, or a reason."""

import pytest
import tiny
from families import FAMILIES, Trains
from test_sweep import SMOKE

from halfstep.models import network
from halfstep.models.hf_config import Unfit
from halfstep.models.nano import nano

NOT_CUT_DOWN = {
    **dict.fromkeys(("dots3_note", "dots3_note_text", "zamba"), r"it still has [\d,]+ parameters"),
    "mllama": "a small one has no MllamaCrossAttentionDecoderLayer",
    "reformer": "does not run: .*axial_pos_shape",
}
"""What trains, and of which no nano model can be made: what is said of it."""
_TRAIN = sorted(name for name, expected in FAMILIES.items() if isinstance(expected, Trains))
LISTED = [pytest.param(name, marks=[] if name in SMOKE else [pytest.mark.models]) for name in _TRAIN]


@pytest.mark.parametrize("name", LISTED)
def test_a_family_that_trains_has_a_nano_model_or_says_why_not(name: str) -> None:
    family, _, variant = name.partition(":")
    key, value = tiny.AS_DECODER.get(family, ("is_decoder", True))
    config = {"model_type": family, **({key: value} if variant else {})}
    try:
        network.skeleton(config)
    except Unfit:  # a file of this family has to say more than its name
        config = tiny.config(name)
    if family == "deepseek_v2":  # that one says no number of experts
        config |= {"num_experts_per_tok": 6}
    if name in NOT_CUT_DOWN:
        with pytest.raises(Unfit, match=NOT_CUT_DOWN[name]):
            nano(config, 64)
        return
    made = nano(config, 64)
    assert network.count_parameters(network.skeleton(made)) <= 4_000_000
    assert nano(made, 64) == made, "what is small already stays as it is"
