"""What only a GPU can show of the probe for the future: its kernels, too, give an earlier token the same bits."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from halfstep.launcher.system import machine
from halfstep.models.causality import look
from halfstep.models.network import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(machine.gpu_count() == 0, reason="no GPU on this machine: nothing was measured"),
]
SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
FAMILIES = {"llama": {}, "mixtral": {"num_key_value_heads": 2}, "qwen3_moe": {"num_experts": 16}, "bert": {}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_causal_model_moves_an_earlier_logit_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    config = CONFIG_MAPPING[family](**SIZES, **FAMILIES[family], vocab_size=4096).to_dict()
    model = build(config, seed=1, dtype=dtype).to("cuda").eval()
    sight = look(
        lambda tokens: model(input_ids=tokens).logits, vocabulary=4096, longest=128, device=torch.device("cuda")
    )
    assert sight.causal == (family != "bert"), sight
    assert sight.later > 0.01
