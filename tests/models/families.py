"""What comes of every causal language model of transformers, made tiny: the table that the sweep holds against each."""

from dataclasses import dataclass

Cells = tuple[tuple[int, str], ...]
"""(stage, precision) of a fresh run, and of one from its export; empty: by the family's place in the table."""


@dataclass(frozen=True, kw_only=True)
class Trains:
    """It is planned, trained at two stages, resumed, exported and generates."""

    cells: Cells = ()
    exact: bool = True
    """Whether a resume comes to the same bits; False where the model draws from the clock."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """It is refused before the first step, by name and with a way out."""

    stage: str
    """How far the sweep came: `plan`, or `train fresh` where the ranks look at what was built."""
    code: int
    what: str
    """A pattern of what is said."""
    fix: str
    """A pattern of what to do about it."""
    cells: Cells = ()


def _sees(fix: str) -> Refused:
    return Refused(stage="train fresh", code=3, what=r"the model sees the future: changing the last 16 of 29", fix=fix)


def _cannot(what: str, fix: str = "correct its config.json") -> Refused:
    return Refused(stage="plan", code=2, what=what, fix=fix)


_TRAIN = (
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "bamba",
    "bart",
    "beam",
    "bigbird_pegasus",
    "biogpt",
    "bitnet",
    "blenderbot",
    "blenderbot-small",
    "bloom",
    "blt",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "cohere_compass_text",
    "ctrl",
    "cwm",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "diffllama",
    "doge",
    "dots1",
    "dots3_note",
    "dots3_note_text",
    "emu3",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "flex_olmo",
    "flint",
    "fuyu",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
    "git",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "got_ocr2",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_neox_japanese",
    "gpt_oss",
    "gptj",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hrm_text",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "hyperclovax",
    "inkling_text",
    "internlm3",
    "iquestcoder",
    "jais2",
    "jamba",
    "jetmoe",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "llama",
    "llama4",
    "llama4_text",
    "longcat_flash",
    "mamba",
    "mamba2",
    "marian",
    "mbart",
    "mellum",
    "mimo_v2_flash",
    "minicpm3",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "mllama",
    "modernbert-decoder",
    "moshi",
    "moss_transcribe_diarize",
    "mpt",
    "mvp",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "openai-gpt",
    "opt",
    "pegasus",
    "persimmon",
    "phi",
    "phi3",
    "phi4_multimodal",
    "phimoe",
    "plbart",
    "prophetnet",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp",
    "qwen4_exp_text",
    "recurrent_gemma",
    "rwkv",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "trocr",
    "vaultgemma",
    "whisper",
    "xglm",
    "xlstm",
    "youtu",
    "zamba",
    "zamba2",
    "zaya",
)
# BERT's kin: encoders unless their config says otherwise, and `NAME:decoder` is what it then says.
_ENCODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
FAMILIES: dict[str, Trains | Refused] = {
    **{name: Trains() for name in _TRAIN},
    **{name: _sees("set is_decoder to true in its config.json") for name in _ENCODERS},
    **{f"{name}:decoder": Trains() for name in (*_ENCODERS, "xlm", "xlnet")},
    "xlm": _sees("set causal to true in its config.json"),
    "xlnet": _sees('set attn_type to "uni" in its config.json'),
    "cpmant": _sees("nothing in the config of this one makes it causal"),
    "gemma3_text:bidirectional": _sees("remove use_bidirectional_attention from its config.json"),
    # It computes its router in fp32 on 16-bit weights, which are all that DeepSpeed leaves it.
    "inkling2_text": Trains(cells=((0, "fp32"), (3, "fp32"))),
    "inkling2_text:half": Refused(
        stage="train fresh",
        code=3,
        what="cannot be run in bf16: .* same dtype",
        fix="precision=fp32",
        cells=((1, "bf16"),),
    ),
    # Its forward pass reseeds torch from the clock (modeling_reformer.py, _init_attention_seed).
    "reformer": Trains(exact=False),
    "gemma3n": _cannot("a gemma3n model needs a package that is not here: .* timm", "install it"),
    # They continue another model's cache, and their layers make none of their own.
    "gemma4_assistant": _cannot("makes no gemma4_assistant model: The set of layer types producing a cache"),
    "gemma4_unified_assistant": _cannot("makes no gemma4_unified_assistant model: The set of layer types"),
    # transformers gives their decoder the configuration of the whole.
    "musicgen": _cannot("makes no musicgen model: 'MusicgenConfig' object has no attribute"),
    "musicgen_melody": _cannot("makes no musicgen_melody model: 'MusicgenMelodyConfig' object has no attribute"),
}

ROUTED = (
    "dbrx",
    "ernie4_5_moe",
    "flex_olmo",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "jamba",
    "jetmoe",
    "laguna",
    "mellum",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp",
    "qwen4_exp_text",
)
"""Families for whose routers transformers computes an auxiliary loss, with which they train."""
